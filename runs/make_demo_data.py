"""Make the small real example data that evercell ships (src/evercell/data/pancreas; its README states the sources).

    python runs/make_demo_data.py FOLDER [--output FOLDER]

FOLDER holds `baron_human.h5ad`, `fasolino_pancreas.h5ad`, `muraro_pancreas.h5ad` and `tritschler_pancreas.h5ad`: raw
counts in X, gene symbols in var, `cell_type` and `donor` in obs. Draws are seeded: the same files give the same cells.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
from scipy import sparse

from evercell.genes import GeneVocabulary, align, canonical_genes

TARGET = Path(__file__).resolve().parents[1] / "src" / "evercell" / "data" / "pancreas"
SEED = 0
N_GENES = 6000
MAX_BYTES = 3_000_000
COLUMNS = ["cell_type", "donor", "dataset", "technology"]


CELLXGENE = "CC BY 4.0 (CELLxGENE); the copy read is in the package hormone2cell 0.1.2, MIT"
FOUR_STUDIES = "CELLxGENE, in the copy of at most 200 cells of a type and study in the package hormone2cell 0.1.2"


@dataclass(frozen=True)
class Draw:
    """Which cells of a study make one example, and what is to be said of them.

    At most `most` cells of a type are drawn (of a type and donor where `by_donor`), then types below `least` cells are
    left out; `n_cells` draws from all cells alike instead, so that the mix of types stays.
    """

    name: str
    file: str
    dataset: str
    study: str
    source: str
    licence: str
    notes: str
    donors: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    most: int | None = None
    by_donor: bool = False
    least: int = 1
    n_cells: int | None = None


DRAWS = (
    Draw(
        "baron_stage1",
        "baron_human.h5ad",
        "baron",
        "Baron et al. 2016, Cell Systems 3:346-360",
        source="GEO GSE84133, in the copy of 2,142 human cells in the package came 0.1.13",
        licence="public GEO deposit without a stated licence; the copy read is in the package came 0.1.13, MIT",
        notes="at most 50 cells of a type and donor, donors human1, human2 and human3; without endothelial cells, "
        "which come new at stage 2, and without types of fewer than 10 cells",
        donors=("human1", "human2", "human3"),
        without=("endothelial",),
        most=50,
        by_donor=True,
        least=10,
    ),
    Draw(
        "fasolino_stage2",
        "fasolino_pancreas.h5ad",
        "fasolino",
        "Fasolino et al. 2022, Nature Metabolism 4:284-299",
        source=FOUR_STUDIES,
        licence=CELLXGENE,
        notes="donors without disease, at most 42 cells of a type",
        most=42,
    ),
    Draw(
        "muraro_stage3",
        "muraro_pancreas.h5ad",
        "muraro",
        "Muraro et al. 2016, Cell Systems 3:385-394",
        source=FOUR_STUDIES,
        licence=CELLXGENE,
        notes="at most 28 cells of a type, types of fewer than 10 cells left out; counts as the source gives them, up "
        "to 450,742 of one gene in a cell, so probably of reads and not of molecules",
        most=28,
        least=10,
    ),
    Draw(
        "tritschler_unseen",
        "tritschler_pancreas.h5ad",
        "tritschler",
        "Tritschler et al. 2022, Molecular Metabolism 66:101595",
        source=FOUR_STUDIES,
        licence=CELLXGENE,
        notes="donors without disease, 250 cells drawn from all alike; to test on, not to train on",
        n_cells=250,
    ),
)


def drawn(obs: pd.DataFrame, draw: Draw, rng: np.random.Generator) -> np.ndarray:
    """Rows of the cells to keep, in the order of the file."""
    rows = np.arange(len(obs))
    if draw.n_cells is not None:
        return np.sort(rng.choice(rows, draw.n_cells, replace=False))
    types, donors = obs["cell_type"].astype(str), obs["donor"].astype(str)
    fits = ~types.isin(draw.without) & (donors.isin(draw.donors) | (not draw.donors))
    table = pd.DataFrame({"row": rows, "type": types.to_numpy(), "donor": donors.to_numpy()})[fits.to_numpy()]
    shuffled = table.iloc[rng.permutation(len(table))]
    kept = shuffled.groupby(["type", "donor"] if draw.by_donor else ["type"]).head(draw.most)
    kept = kept[kept.groupby("type")["row"].transform("size") >= draw.least]
    return np.sort(kept["row"].to_numpy())


def residual_variance(counts: sparse.csr_matrix) -> np.ndarray:
    """Variance of each gene's clipped Pearson residuals (G,), negative binomial with overdispersion 0.01.

    After Lause, Berens and Kobak 2021, Genome Biology 22:258.
    """
    dense = counts.toarray().astype(np.float64)
    expected = dense.sum(axis=1, keepdims=True) * dense.sum(axis=0) / dense.sum()
    residuals = (dense - expected) / np.sqrt(np.maximum(expected + expected**2 / 100, 1e-12))
    bound = np.sqrt(len(dense))
    return np.clip(residuals, -bound, bound).var(axis=0)


def informative(stages: list[sparse.csr_matrix], n_genes: int) -> np.ndarray:
    """Columns of the genes that vary most in any stage, among those in 2 % of its cells at least.

    A gene's place is its best rank over the stages, so a small stage has as much say as a large one.
    """
    ranks = []
    for counts in stages:
        common = np.asarray((counts > 0).mean(axis=0)).ravel() >= 0.02
        variance = np.where(common, residual_variance(counts), -1.0)
        ranks.append(np.argsort(np.argsort(-variance, kind="stable")))
    return np.sort(np.argsort(np.min(ranks, axis=0), kind="stable")[:n_genes])


def smallest(counts: sparse.csr_matrix) -> sparse.csr_matrix:
    """The same counts in the smallest unsigned integer type that holds them."""
    return counts.astype(np.min_scalar_type(int(counts.data.max())))


def squeeze(path: Path) -> None:
    """Pack the arrays of an .h5ad as small as they get, in place.

    One chunk an array, bytes shuffled before gzip; names of fixed length, because HDF5 compresses no others.
    """
    packed = path.with_suffix(".packed")
    with h5py.File(path) as source, h5py.File(packed, "w") as target:
        target.attrs.update(source.attrs)

        def copy(name: str, item: h5py.Group | h5py.Dataset) -> None:
            if isinstance(item, h5py.Group):
                target.create_group(name).attrs.update(item.attrs)
            elif item.ndim == 0 or item.size < 64:
                source.copy(item, target, name=name)
            else:
                values, dtype = item[...], item.dtype
                if h5py.check_string_dtype(dtype):
                    dtype = h5py.string_dtype("utf-8", max(map(len, values)))
                made = target.create_dataset(name, data=values.astype(dtype), dtype=dtype, chunks=item.shape,
                                             compression="gzip", compression_opts=9, shuffle=True)  # fmt: skip
                made.attrs.update(item.attrs)

        source.visititems(copy)
    packed.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of the source files")
    parser.add_argument("--output", type=Path, default=TARGET)
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)

    rng = np.random.default_rng(SEED)
    studies = []
    for draw in DRAWS:
        adata = ad.read_h5ad(options.folder / draw.file)
        studies.append(adata[drawn(adata.obs, draw, rng)].copy())
    # genes are chosen on the stages only: the unseen study has no say in what is measured
    stages = studies[:-1]
    shared = GeneVocabulary.from_genes(
        [canonical_genes(study.var, species="human") for study in stages], how="intersection"
    )
    known = GeneVocabulary.of([name for name in shared.names if name.startswith("ENSG")], species="human")
    counts = [
        align(study.var, known, species="human", name=draw.file).apply(study.X)
        for draw, study in zip(DRAWS, studies, strict=True)
    ]
    genes = informative(counts[:-1], N_GENES)
    symbols = [known.symbols[gene] for gene in genes]

    total = 0
    for draw, study, all_genes in zip(DRAWS, studies, counts, strict=True):
        obs = study.obs.assign(dataset=draw.dataset)[COLUMNS].astype(str).astype("category")
        obs.index = [f"{draw.dataset}_{cell}" for cell in study.obs_names]
        obs["n_counts_source"] = np.asarray(study.X.sum(axis=1)).ravel().astype(np.uint32)
        example = ad.AnnData(
            smallest(all_genes[:, genes]),
            obs=obs,
            var=pd.DataFrame(index=pd.Index(symbols, name="gene")),
            uns={
                "source": f"{draw.study}; {draw.source}",
                "licence": draw.licence,
                "notes": f"A subset, written by runs/make_demo_data.py: {draw.notes}. {len(genes):,} genes: those that "
                "vary most in the cells of the three stages, by Pearson residuals. `n_counts_source`: counts of the "
                "cell over all genes of the source.",
            },
        )
        path = options.output / f"{draw.name}.h5ad"
        example.write_h5ad(path, compression="gzip", compression_opts=9)
        squeeze(path)
        total += path.stat().st_size
        print(f"{draw.name}: {example.n_obs} cells, {example.n_vars} genes, {example.X.dtype}, "
              f"{path.stat().st_size / 1e3:,.0f} kB, {obs['cell_type'].value_counts().to_dict()}")  # fmt: skip
    if total > MAX_BYTES:
        raise SystemExit(f"the examples take {total:,} bytes; {MAX_BYTES:,} were allowed: lower N_GENES")


if __name__ == "__main__":
    main()

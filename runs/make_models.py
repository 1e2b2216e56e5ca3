"""Make the annotators that evercell ships: from the pretrained backbone, one training study after the other.

    bash runs/pretrain.sh backbone
    python runs/make_models.py --base backbone --output src/evercell/models

Each is trained on its first study and updated with every further one, as a user would. Names of types are settled by
the tables below. A study whose deposit states no licence leaves a sketch of its types in the model and no cell.
Genes: of the backbone's those that most of the annotator's studies express. Weights are rounded to half precision.
`benchmarks/annotators.py` measures the models on studies that none has seen and writes the figures into the cards.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import anndata as ad
import numpy as np
from scipy.sparse import csr_matrix

import evercell as ec
from evercell.bank import balanced_rows, kinds_of
from evercell.finetuning import settings_for
from evercell.genes import align
from evercell.model_card import model_card

DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "labelled"
GENES, BANK, SEALED = 8_000, 800, 150
"""Of a finished annotator: genes, example cells, sealed cells; all models together are to stay below 40 MB."""
LEAST_CELLS = 10
"""Types with fewer cells in a study are set aside: they can be neither learnt nor judged."""


@dataclass(frozen=True)
class Study:
    """One labelled study and what it adds.

    Parameters
    ----------
    file
        Under DATA, without suffix.
    names
        Names of types in the model, where they differ from the file's; None sets the cells aside.
    groups
        Column of donors or batches, to hold out whole ones.
    source, licence
        For the card.
    bank
        ``sketch`` where no cell of the study may be passed on.
    tolerance
        How far an old type may fall on its sealed cells when the study is learnt.
    """

    file: str
    source: str
    licence: str = "GEO deposit, public data"
    names: Mapping[str, str | None] = field(default_factory=dict)
    groups: str | None = None
    bank: str = "cells"
    tolerance: float = 0.02

    def read(self, folder: Path) -> ad.AnnData:
        """Cells that have a type, under the model's names."""
        cells = ad.read_h5ad(folder / f"{self.file}.h5ad")
        labels = cells.obs["cell_type"].astype(str).map(lambda name: self.names.get(name, name))
        sizes = labels.value_counts()
        kept = labels.notna() & (labels != "unknown") & labels.isin(sizes.index[sizes >= LEAST_CELLS])
        cells.obs["label"] = labels
        return cells[kept.to_numpy()].copy()


TENX = "CC BY 4.0"
MONOCYTES = {"cd14_monocyte": "monocyte", "fcgr3a_monocyte": "monocyte"}
NO_STELLATE = {"stellate": None}  # a later study calls together what an earlier one tells apart
MODELS: dict[str, tuple[str, list[Study]]] = {
    "human-immune": (
        "Human blood: T, B, NK, monocytes, dendritic cells and platelets' precursors",
        [
            Study("human/pbmc3k", "10x Genomics PBMC 3k", TENX),
            Study("human/kang_pbmc", "Kang et al. 2018, GSE96583, control and interferon-beta", groups="batch"),
            # Kang's dendritic cells hold plasmacytoid ones, as their genes show (GZMB in 97 %, LYZ in 3 % of them):
            # once these have a name, a seventh of that type is given it.
            Study("human/pbmc4k_labelled", "10x Genomics PBMC 4k", TENX, tolerance=0.3),
            Study("human/onek1k_subset", "Yazar et al. 2022 (OneK1K), GSE196830, 1,000 genes", groups="donor"),
            Study("human/liu_covid_pbmc", "Liu et al. 2021, GSE161918, 1,000 genes", groups="donor"),
        ],
    ),
    "human-pancreas": (
        "Human pancreas: endocrine, exocrine and supporting cells",
        [
            Study("human/baron_human", "Baron et al. 2016, GSE84133", groups="donor"),
            Study("human/muraro_pancreas", "Muraro et al. 2016, by CELLxGENE", "CC BY 4.0", NO_STELLATE, "donor"),
            Study("human/fasolino_pancreas", "Fasolino et al. 2022, by CELLxGENE", "CC BY 4.0", NO_STELLATE, "donor"),
        ],
    ),
    "human-lung": (
        "Human lung: epithelium, stroma, endothelium, immune cells, adenocarcinoma cells",
        [
            Study(
                "human/travaglini_lung_subset",
                "Travaglini et al. 2020, Human Lung Cell Atlas, subset",
                "licence of the subset not stated: no cell of it is in the model",
                {
                    **MONOCYTES,
                    "bronchial_epithelial": "club",
                    "goblet": "club",
                    "lymphatic_endothelial": "endothelial",
                },
                "donor",
                "sketch",
            ),
            Study(
                "human/kim_luad_multitissue",
                "Kim et al. 2020, GSE131907, subset",
                names={"t": None, "myofibroblast": "fibroblast"},
                groups="donor",
            ),
        ],
    ),
    "mouse-lung": (
        "Mouse lung: epithelium, stroma, endothelium, immune cells",
        [
            Study(
                "mouse/tm_lung_10x_P7_8",
                "Tabula Muris 2018, GSE109774, one mouse",
                names={
                    "classical monocyte": "monocyte",
                    "non-classical monocyte": "monocyte",
                    "leukocyte": "neutrophil",
                },
            ),
            Study("mouse/zilionis_lung_immune", "Zilionis et al. 2019, GSE127465", groups="batch"),
            Study("mouse/nkx21_lung_at2", "Little et al. 2021, alveolar type 2 cells"),
            Study(
                "mouse/riemondy_lung_injury_subset",
                "Riemondy et al. 2019, GSE113049",
                names={
                    "injured at2: other": "at2",
                    "injured at2: cell cycle arrest": "at2",
                    "injured at2: proliferating": "at2",
                    "injured at2: transdifferentiating": None,
                    "endothelial/fibroblast": None,
                },
            ),
        ],
    ),
}


def expressed(base: ec.Annotator, studies: list[ad.AnnData], n_genes: int) -> np.ndarray:
    """Columns of the base's genes with the largest sum over studies of the share of cells that express them."""
    shares = np.zeros(len(base.vocabulary))
    for cells in studies:
        counts = align(cells.var, base.vocabulary).apply(csr_matrix(cells.X))
        shares += np.bincount(counts.indices, minlength=len(shares)) / cells.n_obs
    found = np.argsort(-shares, kind="stable")[:n_genes]
    return np.sort(found[shares[found] > 0])


def made(base: ec.Annotator, studies: list[Study], folder: Path, *, seed: int = 0) -> ec.Annotator:
    """The annotator, stage by stage."""
    cells = [study.read(folder) for study in studies]
    base = base.over_genes(expressed(base, cells, GENES))
    model: ec.Annotator | None = None
    for study, part in zip(studies, cells, strict=True):
        start = time.perf_counter()
        groups = study.groups if study.groups and part.obs[study.groups].nunique() > 2 else None
        name = Path(study.file).name
        if model is None:
            model = ec.train(
                part,
                "label",
                groups=groups,
                base=base,
                bank=study.bank,
                seed=seed,
                names=[name],
                shown=False,
                settings=replace(settings_for(base), finetune="all"),  # later stages train the whole model
            )
        else:
            model = ec.update(
                model,
                part,
                "label",
                groups=groups,
                mapping={label: label for label in part.obs["label"].unique()},
                bank=study.bank,
                settings=ec.UpdateSettings(new_genes=False),
                tolerance=study.tolerance,
                seed=seed,
                names=[name],
                shown=False,
            )
        facts = model.ledger.stages[-1].facts
        told = facts["metrics"]["model"]
        print(
            f"  {name}: {part.n_obs:,} cells, {len(model.types)} types, held-out accuracy {told['accuracy']:.3f}, "
            f"{time.perf_counter() - start:.0f} s",
            file=sys.stderr,
            flush=True,
        )
    if model is None or model.rejector is None:
        raise ValueError("an annotator is made of one study at least")
    print(f"  thresholds of unknown cells allow for {model.rejector.allowance:.2f}", file=sys.stderr)
    rng = np.random.default_rng(seed)
    bank = model.bank.taken(balanced_rows(model.bank.codes, BANK, rng))
    sealed = model.sealed
    if sealed is not None:
        kinds = kinds_of(sealed.codes, sealed.stages)
        sealed = sealed.taken(balanced_rows(kinds, SEALED, rng))
    return replace(model, bank=bank, sealed=sealed).halved()


def card(model: ec.Annotator, summary: str, studies: list[Study]) -> str:
    """The card that the run writes, with what the annotator is for and where its cells come from."""
    lines = ["", "## Data and licences", "", "Model: MIT, as the package. Example cells in it: as their studies.", ""]
    lines += [f"- `{Path(study.file).name}`: {study.source}; {study.licence}" for study in studies]
    return model_card(model, summary=f"{summary}.") + "\n".join(lines) + "\n"


def main() -> None:
    """Make all annotators, or those that are named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True, help="the pretrained model")
    parser.add_argument("--output", type=Path, required=True, help="folder of models")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    base = ec.load(asked.base)
    asked.output.mkdir(parents=True, exist_ok=True)
    if not (asked.output / "backbone").exists():
        halved = base.halved()
        summary = "Pretrained on human and mouse cells of many tissues; for train --from and embed."
        ec.save(halved, asked.output / "backbone", card=model_card(halved, summary=summary))
    for name in asked.models:
        summary, studies = MODELS[name]
        print(name, file=sys.stderr, flush=True)
        model = made(base, studies, asked.data, seed=asked.seed)
        ec.save(model, asked.output / name, card=card(model, summary, studies), overwrite=True)


if __name__ == "__main__":
    main()

"""Write the packaged raw mouse-lung samples: three 10x folders and a table of cells, from three published studies.

    python runs/make_lung_data.py [DATA] [OUTPUT]

DATA holds labelled/mouse/*.h5ad (../shared/data by default). Seeded: the same sources give the same files.
"""

from __future__ import annotations

import gzip
import sys
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scanpy as sc
from scipy.io import mmwrite
from scipy.sparse import csr_matrix

from evercell.gene_names import canonical_genes

ROOT = Path(__file__).resolve().parents[1]
GENES = 4000
# file, folder, most cells of a type, column of obs that tells the animal
STUDIES = (
    ("tm_lung_10x_P7_8", "tabula_muris", 40, "mouse_id"),
    ("zilionis_lung_immune", "zilionis", 60, "animal"),
    ("nkx21_lung_at2", "nkx2-1_mutant", 60, "batch"),
)
# At the level that the studies share; `leukocyte` of Tabula Muris are neutrophils (S100a8, Retnlg and Csf3r on top).
NAMES = {"classical monocyte": "monocyte", "non-classical monocyte": "monocyte", "leukocyte": "neutrophil"}
FEWEST = 10


def chosen(cells: ad.AnnData, most: int, rng: np.random.Generator) -> ad.AnnData:
    """At most `most` cells of a type, and the genes that vary most among them."""
    cells.obs["cell_type"] = cells.obs["cell_type"].astype(str).replace(NAMES)
    sizes = cells.obs["cell_type"].value_counts()
    kept = [name for name in sizes.index if sizes[name] >= FEWEST and name != "unknown"]
    rows = [
        rng.choice(own, min(most, len(own)), replace=False)
        for own in (np.flatnonzero(cells.obs["cell_type"] == name) for name in sorted(kept))
    ]
    cells = cells[np.sort(np.concatenate(rows))].copy()
    cells.X = csr_matrix(cells.X, dtype=np.float32)
    sc.pp.filter_genes(cells, min_cells=max(3, cells.n_obs // 50))
    residuals = sc.experimental.pp.normalize_pearson_residuals(cells, inplace=False)["X"]
    # Mitochondrial genes stay: the quality filter looks at them.
    wanted = np.argsort(-residuals.var(axis=0))[:GENES]
    mitochondrial = np.flatnonzero(cells.var_names.str.startswith("mt-"))
    return cells[:, np.union1d(wanted, mitochondrial)].copy()


def write_text(path: Path, lines: list[str]) -> None:
    """Lines as gzip without a time and a name inside."""
    path.write_bytes(gzip.compress(("\n".join(lines) + "\n").encode(), mtime=0))


def main() -> None:
    """Write the folders and ``cells.csv``."""
    data = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT.parent / "shared" / "data"
    output = Path(sys.argv[2]) if len(sys.argv) > 2 else ROOT / "src" / "evercell" / "data" / "mouse_lung"
    rng = np.random.default_rng(0)
    tables = []
    for file, folder, most, animal in STUDIES:
        cells = chosen(ad.read_h5ad(data / "labelled" / "mouse" / f"{file}.h5ad"), most, rng)
        place = output / folder
        place.mkdir(parents=True, exist_ok=True)
        ids = canonical_genes(cells.var, species="mouse").names
        write_text(place / "barcodes.tsv.gz", cells.obs_names.tolist())
        lines = [f"{i}\t{name}\tGene Expression" for i, name in zip(ids, cells.var_names, strict=True)]
        write_text(place / "features.tsv.gz", lines)
        mmwrite(place / "matrix.mtx", cells.X.T.astype(np.int32))
        text = (place / "matrix.mtx").read_bytes()
        (place / "matrix.mtx").unlink()
        (place / "matrix.mtx.gz").write_bytes(gzip.compress(text, mtime=0))
        obs = cells.obs
        columns = {"source": folder, "barcode": cells.obs_names, "cell_type": obs["cell_type"].to_numpy()}
        tables.append(pd.DataFrame({**columns, "animal": obs[animal].astype(str).to_numpy()}))
        print(folder, cells.shape, obs["cell_type"].value_counts().to_dict())
    pd.concat(tables).to_csv(output / "cells.csv", index=False)


if __name__ == "__main__":
    main()

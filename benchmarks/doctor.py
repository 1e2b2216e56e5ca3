"""The doctor on real files as they are, and on the same files spoiled: what it finds, and false alarms.

    python benchmarks/doctor.py [--data ../shared/data] [--output benchmarks/results/doctor.csv]

Every file is looked at as it is and with 20 % ambient RNA, 20 % doublets, 30 % empty droplets, log-normalised, with
its gene names shuffled, and as mouse where it is human (and the other way round). One row a file and alteration:
the signs that are measured, and the subjects of its warnings and errors.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
from anndata import AnnData

from evercell.cells import find_counts, read_cells
from evercell.doctor.cells import sign_findings
from evercell.doctor.genes import gene_findings
from evercell.doctor.signs import signs
from evercell.genes import canonical_genes
from evercell.testing import with_ambient, with_doublets, with_empty_droplets


def as_they_are(cells: AnnData) -> AnnData:
    return cells


def shuffled(cells: AnnData) -> AnnData:
    """The same counts under one another's names."""
    found = cells.copy()
    found.var_names = np.random.default_rng(0).permutation(found.var_names)
    return found


def log_normalised(cells: AnnData) -> AnnData:
    import scanpy as sc

    found = cells.copy()
    found.X = found.X.astype(np.float32)
    sc.pp.normalize_total(found, target_sum=1e4)
    sc.pp.log1p(found)
    return found


ALTERATIONS: dict[str, Callable[[AnnData], AnnData]] = {
    "none": as_they_are,
    "ambient": lambda cells: with_ambient(cells, 0.2),
    "doublets": lambda cells: with_doublets(cells, 0.2),
    "droplets": lambda cells: with_empty_droplets(cells, 0.3),
    "log": log_normalised,
    "shuffled": shuffled,
    "species": as_they_are,
}


def counted(path: Path, most: int) -> AnnData:
    """Counts of at most so many cells of a file, evenly spaced over it."""
    adata = read_cells(path)
    counts = find_counts(adata, name=str(path), empty_cells="keep")
    rows = np.unique(np.linspace(0, adata.n_obs - 1, min(most, adata.n_obs)).astype(int))
    found = AnnData(counts.to_csr()[rows], obs=pd.DataFrame(index=adata.obs_names[rows]), var=counts.genes)
    found.X.data = np.rint(found.X.data)  # counts as deposited are not all whole
    return found


def looked_at(path: Path, most: int) -> list[dict[str, object]]:
    cells = counted(path, most)
    species = canonical_genes(cells.var).species
    rows = []
    for name, alter in ALTERATIONS.items():
        started = time.process_time()
        altered = alter(cells)
        as_other = {"human": "mouse", "mouse": "human"}[species] if name == "species" else "auto"
        row: dict[str, object] = {"file": path.stem, "species": species, "altered": name}
        counts = find_counts(altered, name=path.stem, empty_cells="keep")
        genes = canonical_genes(counts.genes, species=as_other)
        measured = signs(counts, genes)
        found = [*gene_findings(counts, None, path.stem, species=as_other, column=None), *sign_findings(measured)]
        row |= {"values": counts.transform, **asdict(measured)}
        row["findings"] = ", ".join(one.subject for one in found if one.severity != "info")
        row["seconds"] = round(time.process_time() - started, 1)
        rows.append(row)
        print(row, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--most", type=int, default=600, help="cells of a file that are looked at")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--only", nargs="*", help="alterations to make")
    asked = parser.parse_args()
    logging.disable(logging.WARNING)
    for name in set(ALTERATIONS) - set(asked.only or ALTERATIONS):
        del ALTERATIONS[name]
    rows = []
    for path in sorted(asked.data.glob("*labelled/*/*.h5ad")):
        rows += looked_at(path, asked.most)
    table = pd.DataFrame(rows)
    if asked.output is not None:
        table.to_csv(asked.output, index=False, float_format="%.4g")
    for name, part in table.groupby("altered", sort=False):
        print(f"\n{name}: {len(part)} files")
        subjects = part["findings"].str.split(", ").explode()
        print(subjects[subjects != ""].value_counts().to_string())


if __name__ == "__main__":
    main()

"""Files of cells, labelled or not, read for pretraining, each over its own genes; which of them are held out."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix

from evercell.cells import Counts, find_counts, read_cells
from evercell.errors import CellsError, LabelsError, SettingsError
from evercell.evaluation import Split, split_cells
from evercell.labels import is_unassigned, listed
from evercell.progress import progress
from evercell.sources import Part, parts_of
from evercell.stored_counts import ROWS, stacked

if TYPE_CHECKING:
    from anndata import AnnData


@dataclass(frozen=True)
class PretrainingStudy:
    """Counts of one file over its own genes.

    Parameters
    ----------
    name
        Name of the file without its suffix, or what the caller calls the data.
    counts
        Counts (N, G_study), CSR in the smallest type that holds them; cells without a count are left out.
    genes
        Variable table of the counts (G_study).
    groups
        Donor or batch of each cell (N,), strings that name the study too; None where the study does not tell them.
    facts
        What the ledger says of the file.
    labels
        Cell type of each cell (N,), "" where it has none; None where no labels were asked for or the file has none.
    tissues
        Tissue of each cell (N,); None where no tissues were asked for or the file does not tell them.
    """

    name: str
    counts: csr_matrix
    genes: pd.DataFrame
    groups: np.ndarray | None
    facts: dict[str, Any]
    labels: np.ndarray | None = None
    tissues: np.ndarray | None = None

    def __len__(self) -> int:
        return int(self.counts.shape[0])


def cell_files(data: Sequence[Any]) -> list[Any]:
    """What was given, each folder replaced by its .h5ad and .zarr files in order of their paths, each file once.

    Raises
    ------
    CellsError
        If a folder holds no such file, or nothing was given.
    """
    found: list[Any] = []
    for one in data:
        if not isinstance(one, str | os.PathLike):
            found.append(one)
            continue
        path = Path(one)
        # A 10x folder is one set of cells.
        if not path.is_dir() or path.suffix == ".zarr" or any(path.glob("*matrix.mtx*")):
            found.append(path)
            continue
        files = [
            file
            for file in sorted(path.rglob("*"))
            if file.suffix in (".h5ad", ".zarr") and not any(parent.suffix == ".zarr" for parent in file.parents)
        ]
        if not files:
            raise CellsError(
                f"the folder `{path}` holds no .h5ad or .zarr file", hint="name the files, or a folder that holds them"
            )
        found += files
    if not found:
        raise CellsError("no cells were given", hint="name at least one file, or a folder of .h5ad or .zarr files")
    once = {(os.path.realpath(one) if isinstance(one, Path) else id(one)): one for one in reversed(found)}
    return list(reversed(once.values()))


def n_cells_of(files: Sequence[Any]) -> int:
    """Number of cells of files and folders, before they are read for good."""
    return sum(read_cells(file, backed=file.suffix == ".h5ad").n_obs for file in cell_files(files))


def read_for_pretraining(
    data: Sequence[Any],
    *,
    names: Sequence[str] | None = None,
    groups: str | None = None,
    labels: str | None = None,
    tissues: str | None = None,
    layer: str | None = None,
    store: Path | None = None,
    shown: bool | None = None,
) -> list[PretrainingStudy]:
    """Read the counts of files or AnnData objects, one after the other, and labels and tissues if columns are named.

    Raises
    ------
    CellsError
        If a file cannot be read or holds no counts.
    LabelsError
        If `groups`, `labels` or `tissues` is a column of none of them.
    """
    given = cell_files(data)
    names = list(names) if names is not None else _names(given)
    columns = {"groups": groups, "labels": labels, "tissues": tissues}
    studies = []
    with progress("reading", shown=shown) as step:
        for done, (one, name) in enumerate(zip(given, names, strict=True), start=1):
            studies += _read(one, name, columns, layer, store)
            step(done, len(given), None)
    if groups is not None and all(study.groups is None for study in studies):
        raise LabelsError(f"no data set has a column `{groups}` in obs", hint="name the column of donors or batches")
    if labels is not None and all(study.labels is None for study in studies):
        raise LabelsError(
            f"no data set has a column `{labels}` in obs with cell types", hint="name their column, or leave it out"
        )
    if tissues is not None and all(study.tissues is None for study in studies):
        raise LabelsError(f"no data set has a column `{tissues}` in obs", hint="name the column of tissues")
    return studies


def _names(given: Sequence[Any]) -> list[str]:
    names = [one.stem if isinstance(one, Path) else f"data set {i}" for i, one in enumerate(given, start=1)]
    return [
        name if names.count(name) == 1 or not isinstance(one, Path) else str(one.with_suffix(""))
        for name, one in zip(names, given, strict=True)
    ]


def _read(
    one: Any, name: str, columns: Mapping[str, str | None], layer: str | None, store: Path | None
) -> list[PretrainingStudy]:
    """The studies of a file: one, or the sources that it was merged of, each over the genes that it measured."""
    called = str(one) if isinstance(one, Path) else name
    adata: AnnData = one if not isinstance(one, Path) else read_cells(one, layer=layer, backed=one.suffix == ".h5ad")
    try:
        counts = find_counts(adata, layer=layer, name=called, empty_cells="keep")
        parts = parts_of(adata, called)
        return [_study(adata, counts, part, (name, called), columns, store) for part in parts]
    finally:
        if isinstance(one, Path) and adata.isbacked:
            adata.file.close()


def _study(
    adata: AnnData,
    counts: Counts,
    part: Part,
    names: tuple[str, str],
    columns: Mapping[str, str | None],
    store: Path | None,
) -> PretrainingStudy:
    name, called = (f"{one}/{part.name}" if part.name else one for one in names)
    measured = part.genes_of(counts, name=called)
    genes, obs = counts.genes[measured], adata.obs.iloc[part.rows]
    digest = hashlib.sha256("\n".join(map(str, genes.index)).encode())

    def blocks() -> Iterator[csr_matrix]:
        for block in part.blocks(counts, measured):
            for array in (block.data, block.indices, block.indptr):
                digest.update(np.ascontiguousarray(array).tobytes())
            yield block

    matrix = stacked(blocks(), store)
    filled = np.diff(matrix.indptr) > 0
    if not filled.any():
        raise CellsError(f"`{called}` has no cell with a count", hint="leave it out")
    groups, labels, tissues = columns["groups"], columns["labels"], columns["tissues"]
    named = told = tissue_of = None
    # A column that a merged file has of its other sources tells nothing of this one.
    there = {key for key in (groups, labels, tissues) if key in obs and not (part.name and obs[key].isna().all())}
    if groups is not None and groups in there:
        named = (name + "/" + obs[groups].astype(str)).to_numpy()[filled]
    if labels is not None and labels in there:
        told = np.array(["" if is_unassigned(one) else str(one) for one in obs[labels]], dtype=object)[filled]
    if tissues is not None and tissues in there:
        tissue_of = np.array([tissue_key(str(one)) for one in obs[tissues]], dtype=object)[filled]
    facts = {
        "name": name,
        "cells": int(filled.sum()),
        "genes": len(genes),
        "counts": counts.source,
        "sha256": digest.hexdigest(),
        "notes": list(counts.notes),
    }
    if told is not None:
        facts["labelled"] = int((told != "").sum())
        facts["labels_sha256"] = hashlib.sha256("\n".join(told).encode()).hexdigest()
    if tissue_of is not None:
        facts["tissues"] = {str(one): int(n) for one, n in pd.Series(tissue_of).value_counts().items()}
    if not filled.all():
        kept = np.flatnonzero(filled)
        matrix = stacked((matrix[kept[i : i + ROWS]] for i in range(0, len(kept), ROWS)), store)
    return PretrainingStudy(name, matrix, genes, named, facts, told, tissue_of)


def split_studies(
    studies: Sequence[PretrainingStudy], *, share: float, names: Sequence[str] = (), seed: int = 0
) -> tuple[Split, tuple[list[np.ndarray], list[np.ndarray]]]:
    """Hold cells out: the studies named, else whole studies of four or more, else whole donors, else cells.

    Returns
    -------
    Split
        Over the cells of all studies, one study after the other.
    tuple
        Rows of each study to train on, and rows of each study held out.

    Raises
    ------
    SettingsError
        If a name is none of the studies, or every study is named.
    """
    known, sizes = [study.name for study in studies], [len(study) for study in studies]
    study_of = np.repeat(np.asarray(known, dtype=object), sizes)
    if names:
        if missing := sorted(set(names) - set(known)):
            raise SettingsError(
                f"held_out_studies names `{missing[0]}`; the studies are {listed(known)}",
                hint="change held_out_studies",
            )
        out = np.isin(study_of, list(names))
        if out.all():
            raise SettingsError("held_out_studies names every study", hint="leave at least one to train on")
        split = Split(np.flatnonzero(~out), np.flatnonzero(out), "studies", tuple(sorted(names)))
    else:
        groups, whole_studies = None, len(studies) > 3
        if whole_studies:
            groups = study_of
        elif any(study.groups is not None for study in studies):
            # A study that tells no donors is one group.
            told = [np.full(len(s), s.name, dtype=object) if s.groups is None else s.groups for s in studies]
            groups = np.concatenate(told)
        split = split_cells(np.full(len(study_of), "cell"), groups, test_share=share, seed=seed)
        if whole_studies and split.by == "groups":
            split = replace(split, by="studies")
    edges = np.cumsum([0, *sizes])

    def of_each(rows: np.ndarray) -> list[np.ndarray]:
        rows = np.sort(rows)
        return [rows[(rows >= start) & (rows < stop)] - start for start, stop in pairwise(edges)]

    return split, (of_each(split.train), of_each(split.validation))


def tissue_key(name: str) -> str:
    """What studies that write a tissue differently share: no case, no underscores, nothing in brackets."""
    return re.sub(r"\(.*?\)", "", name).replace("_", " ").strip().lower()

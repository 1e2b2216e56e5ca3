"""Cells of many files, labelled or not, brought into one gene order and drawn a study at a time."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix

from evercell import ontology
from evercell.cells import Counts, find_counts, read_cells
from evercell.errors import CellsError, GenesError, LabelsError, SettingsError
from evercell.evaluation import Split, split_cells
from evercell.genes import Alignment, GeneVocabulary, align, canonical_genes
from evercell.labels import is_unassigned, listed
from evercell.progress import progress
from evercell.sources import Part, parts_of
from evercell.stored_counts import column_sizes, stacked

if TYPE_CHECKING:
    from anndata import AnnData

ROWS = 4096  # cells brought into the model's gene order at a time


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
    """

    name: str
    counts: csr_matrix
    genes: pd.DataFrame
    groups: np.ndarray | None
    facts: dict[str, Any]
    labels: np.ndarray | None = None

    def __len__(self) -> int:
        return int(self.counts.shape[0])


@dataclass(frozen=True)
class PretrainingCells:
    """Cells of several studies over a model's genes, in memory or in files (see `stored_counts`).

    Parameters
    ----------
    names
        Name of each study (S).
    counts
        Counts of each study (N_s, G), CSR.
    measured
        Genes that each study measured (S, G), bool.
    codes
        Type code of the cells of each study (N_s,), -1 for a cell without a label; none where no study is labelled.
    types
        Keys of the types (K): one type has one key in all studies (see `type_key`).
    """

    names: tuple[str, ...]
    counts: tuple[csr_matrix, ...]
    measured: np.ndarray
    codes: tuple[np.ndarray, ...] = ()
    types: tuple[str, ...] = ()

    @property
    def sizes(self) -> np.ndarray:
        """Number of cells of each study (S,)."""
        return np.array([counts.shape[0] for counts in self.counts], dtype=np.int64)

    @cached_property
    def shown(self) -> np.ndarray:
        """Types that each study shows (S, K), bool."""
        shown = np.zeros((len(self.names), len(self.types)), dtype=bool)
        for study, codes in enumerate(self.codes):
            shown[study, codes[codes >= 0]] = True
        return shown

    def draw(self, study: int, n_cells: int, rng: np.random.Generator) -> tuple[csr_matrix, np.ndarray]:
        """Random cells of one study, none twice; fewer where the study has fewer.

        Where the study is labelled, its types are drawn in proportion to the root of their number of cells.

        Returns
        -------
        counts, codes
            (n_cells, G), float32, and (n_cells,), -1 where a cell has no label.
        """
        counts = self.counts[study]
        n_all = counts.shape[0]
        n_cells = min(n_cells, n_all)
        if not self.types or not self.shown[study].any():
            rows = np.sort(rng.choice(n_all, n_cells, replace=False, shuffle=False))
            return counts[rows].astype(np.float32), np.full(n_cells, -1)
        codes = self.codes[study]
        # The smallest of exponential draws, each divided by its cell's weight: a weighted choice, none twice.
        waits = rng.exponential(size=n_all) * np.sqrt(np.bincount(codes + 1)[codes + 1])
        rows = np.sort(np.argpartition(waits, n_cells - 1)[:n_cells])
        return counts[rows].astype(np.float32), codes[rows]

    def spread(self, most: int) -> Iterator[tuple[int, np.ndarray, csr_matrix]]:
        """Study, rows and counts (at most `ROWS`, G), float32, of about `most` evenly spaced cells of all studies."""
        share = min(most / max(int(self.sizes.sum()), 1), 1.0)
        for study, counts in enumerate(self.counts):
            n_all = counts.shape[0]
            rows = np.linspace(0, n_all - 1, int(np.ceil(share * n_all))).astype(int)
            for start in range(0, len(rows), ROWS):
                some = rows[start : start + ROWS]
                yield study, some, counts[some].astype(np.float32)

    def over_genes(self, columns: np.ndarray, store: Path | None = None) -> PretrainingCells:
        """Only the genes `columns`, and only the cells that express one of them; `store` as in `stacked`."""
        kept, rows = [], []
        for counts in self.counts:
            found: list[np.ndarray] = []
            kept.append(stacked(_expressing(counts, columns, found), store))
            rows.append(np.concatenate(found))
        filled = [study for study, expressing in enumerate(rows) if expressing.any()]
        return PretrainingCells(
            tuple(self.names[study] for study in filled),
            tuple(kept[study] for study in filled),
            self.measured[filled][:, columns],
            tuple(self.codes[study][rows[study]] for study in filled) if self.codes else (),
            self.types,
        )

    def n_expressing(self) -> np.ndarray:
        """Number of cells of each study that express each gene (S, G)."""
        return np.stack([column_sizes(counts) for counts in self.counts])


def _expressing(counts: csr_matrix, columns: np.ndarray, found: list[np.ndarray]) -> Iterator[csr_matrix]:
    """Blocks of the cells that express one of the genes `columns`; a mask of every block is added to `found`."""
    for start in range(0, counts.shape[0], ROWS):
        block = counts[start : start + ROWS][:, columns].tocsr()
        found.append(np.diff(block.indptr) > 0)
        yield block[found[-1]]


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
    layer: str | None = None,
    store: Path | None = None,
    shown: bool | None = None,
) -> list[PretrainingStudy]:
    """Read the counts of files or AnnData objects, one after the other, and their labels if a column is named.

    Raises
    ------
    CellsError
        If a file cannot be read or holds no counts.
    LabelsError
        If `groups` or `labels` is a column of none of them.
    """
    given = cell_files(data)
    names = list(names) if names is not None else _names(given)
    studies = []
    with progress("reading", shown=shown) as step:
        for done, (one, name) in enumerate(zip(given, names, strict=True), start=1):
            studies += _read(one, name, {"groups": groups, "labels": labels}, layer, store)
            step(done, len(given), None)
    if groups is not None and all(study.groups is None for study in studies):
        raise LabelsError(f"no data set has a column `{groups}` in obs", hint="name the column of donors or batches")
    if labels is not None and all(study.labels is None for study in studies):
        raise LabelsError(
            f"no data set has a column `{labels}` in obs with cell types", hint="name their column, or leave it out"
        )
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
    groups, labels = columns["groups"], columns["labels"]
    named = told = None
    # A column that a merged file has of its other sources tells nothing of this one.
    there = {key for key in (groups, labels) if key in obs and not (part.name and obs[key].isna().all())}
    if groups is not None and groups in there:
        named = (name + "/" + obs[groups].astype(str)).to_numpy()[filled]
    if labels is not None and labels in there:
        told = np.array(["" if is_unassigned(one) else str(one) for one in obs[labels]], dtype=object)[filled]
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
    if not filled.all():
        kept = np.flatnonzero(filled)
        matrix = stacked((matrix[kept[i : i + ROWS]] for i in range(0, len(kept), ROWS)), store)
    return PretrainingStudy(name, matrix, genes, named, facts, told)


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


def shared_vocabulary(
    studies: Sequence[PretrainingStudy],
    how: Literal["union", "intersection"],
    *,
    species: str = "auto",
    column: str | None = None,
) -> GeneVocabulary:
    """Genes of any or of all studies; mouse genes beside human ones are brought to their orthologues.

    Raises
    ------
    GenesError
        If the studies share no gene.
    """
    genes = [canonical_genes(study.genes, species=species, column=column) for study in studies]
    found = GeneVocabulary.from_genes(genes, how=how)
    if len(found) == 0:
        raise GenesError(
            f"the {len(studies)} data sets share no gene", hint="take the genes of any of them: vocabulary='union'"
        )
    return found


def gathered(
    studies: Sequence[PretrainingStudy],
    rows: Sequence[np.ndarray],
    vocabulary: GeneVocabulary,
    *,
    species: str = "auto",
    column: str | None = None,
    store: Path | None = None,
) -> PretrainingCells:
    """The cells `rows` of each study over the genes of a vocabulary, without the studies of which none is asked for."""
    names, counts, measured, keys = [], [], [], []
    for study, wanted in zip(studies, rows, strict=True):
        if len(wanted) == 0:
            continue
        alignment = align(study.genes, vocabulary, species=species, column=column, name=study.name)
        names.append(study.name)
        counts.append(stacked(_aligned(study.counts, wanted, alignment), store))
        measured.append(alignment.measured)
        labels = np.full(len(wanted), "", dtype=object) if study.labels is None else study.labels[wanted]
        known = {label: type_key(label) for label in np.unique(labels) if label}
        keys.append(np.array([known.get(label, "") for label in labels], dtype=object))
    types = tuple(sorted({key for of_study in keys for key in of_study} - {""}))
    codes: tuple[np.ndarray, ...] = ()
    if types:
        place = {key: code for code, key in enumerate(types)} | {"": -1}
        codes = tuple(np.array([place[key] for key in of_study], dtype=np.int64) for of_study in keys)
    return PretrainingCells(tuple(names), tuple(counts), np.stack(measured), codes, types)


def type_key(label: str) -> str:
    """What studies that write a type differently share: its Cell Ontology id, else its name without case and plural."""
    found = ontology.find(label)
    return found.id if found is not None else ontology.normalised(label)


def _aligned(counts: csr_matrix, rows: np.ndarray, alignment: Alignment) -> Iterator[csr_matrix]:
    for start in range(0, len(rows), ROWS):
        yield alignment.apply(counts[rows[start : start + ROWS]])

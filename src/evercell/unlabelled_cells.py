"""Unlabelled cells of many files, brought into one gene order and drawn a study at a time."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix, vstack

from evercell.cells import find_counts, read_cells
from evercell.errors import CellsError, GenesError, LabelsError, SettingsError
from evercell.evaluation import Split, split_cells
from evercell.genes import Alignment, GeneVocabulary, align, canonical_genes
from evercell.labels import listed
from evercell.progress import progress

if TYPE_CHECKING:
    from anndata import AnnData

ROWS = 4096  # cells brought into the model's gene order at a time


@dataclass(frozen=True)
class UnlabelledStudy:
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
    """

    name: str
    counts: csr_matrix
    genes: pd.DataFrame
    groups: np.ndarray | None
    facts: dict[str, Any]

    def __len__(self) -> int:
        return int(self.counts.shape[0])


@dataclass(frozen=True)
class UnlabelledCells:
    """Cells of several studies over a model's genes, held in memory.

    Training asks for `sizes`, `measured`, `draw` and `spread` only: a class that has these may read from disk instead.

    Parameters
    ----------
    names
        Name of each study (S).
    counts
        Counts of each study (N_s, G), CSR.
    measured
        Genes that each study measured (S, G), bool.
    """

    names: tuple[str, ...]
    counts: tuple[csr_matrix, ...]
    measured: np.ndarray

    @property
    def sizes(self) -> np.ndarray:
        """Number of cells of each study (S,)."""
        return np.array([counts.shape[0] for counts in self.counts], dtype=np.int64)

    def draw(self, study: int, n_cells: int, rng: np.random.Generator) -> csr_matrix:
        """Random cells of one study, none twice: counts (n_cells, G), float32; fewer where the study has fewer."""
        counts = self.counts[study]
        n_all = counts.shape[0]
        rows = np.sort(rng.choice(n_all, min(n_cells, n_all), replace=False, shuffle=False))
        return counts[rows].astype(np.float32)

    def spread(self, most: int) -> Iterator[tuple[int, csr_matrix]]:
        """Study and counts (at most `ROWS`, G), float32, of at most about `most` evenly spaced cells of all studies."""
        share = min(most / max(int(self.sizes.sum()), 1), 1.0)
        for study, counts in enumerate(self.counts):
            n_all = counts.shape[0]
            rows = np.linspace(0, n_all - 1, int(np.ceil(share * n_all))).astype(int)
            for start in range(0, len(rows), ROWS):
                yield study, counts[rows[start : start + ROWS]].astype(np.float32)

    def over_genes(self, columns: np.ndarray) -> UnlabelledCells:
        """Only the genes `columns`, and only the cells that express one of them."""
        kept = [counts[:, columns].tocsr() for counts in self.counts]
        kept = [counts[np.diff(counts.indptr) > 0] for counts in kept]
        filled = [study for study, counts in enumerate(kept) if counts.shape[0] > 0]
        return UnlabelledCells(
            tuple(self.names[study] for study in filled),
            tuple(kept[study] for study in filled),
            self.measured[filled][:, columns],
        )

    def n_expressing(self) -> np.ndarray:
        """Number of cells that express each gene (G,)."""
        found = np.zeros(self.measured.shape[1], dtype=np.int64)
        for counts in self.counts:
            found += np.bincount(counts.indices, minlength=len(found))
        return found


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


def read_unlabelled(
    data: Sequence[Any],
    *,
    names: Sequence[str] | None = None,
    groups: str | None = None,
    layer: str | None = None,
    shown: bool | None = None,
) -> list[UnlabelledStudy]:
    """Read the counts of files or AnnData objects, one after the other; labels are not looked at.

    Raises
    ------
    CellsError
        If a file cannot be read or holds no counts.
    LabelsError
        If `groups` is a column of none of them.
    """
    given = cell_files(data)
    names = list(names) if names is not None else _names(given)
    studies = []
    with progress("reading", shown=shown) as step:
        for done, (one, name) in enumerate(zip(given, names, strict=True), start=1):
            studies.append(_read(one, name, groups, layer))
            step(done, len(given), None)
    if groups is not None and all(study.groups is None for study in studies):
        raise LabelsError(f"no data set has a column `{groups}` in obs", hint="name the column of donors or batches")
    return studies


def _names(given: Sequence[Any]) -> list[str]:
    names = [one.stem if isinstance(one, Path) else f"data set {i}" for i, one in enumerate(given, start=1)]
    return [
        name if names.count(name) == 1 or not isinstance(one, Path) else str(one.with_suffix(""))
        for name, one in zip(names, given, strict=True)
    ]


def _read(one: Any, name: str, groups: str | None, layer: str | None) -> UnlabelledStudy:
    called = str(one) if isinstance(one, Path) else name
    adata: AnnData = one if not isinstance(one, Path) else read_cells(one, layer=layer, backed=one.suffix == ".h5ad")
    try:
        counts = find_counts(adata, layer=layer, name=called, empty_cells="keep")
        digest = hashlib.sha256("\n".join(map(str, counts.genes.index)).encode())
        blocks = []
        for _, _, block in counts.chunks():
            for array in (block.data, block.indices, block.indptr):
                digest.update(np.ascontiguousarray(array).tobytes())
            blocks.append(compact(block))
        matrix = vstack(blocks, format="csr")
    finally:
        if isinstance(one, Path) and adata.isbacked:
            adata.file.close()
    filled = np.diff(matrix.indptr) > 0
    if not filled.any():
        raise CellsError(f"`{called}` has no cell with a count", hint="leave it out")
    named = None
    if groups is not None and groups in adata.obs:
        named = (name + "/" + adata.obs[groups].astype(str)).to_numpy()[filled]
    facts = {
        "name": name,
        "cells": int(filled.sum()),
        "genes": len(counts.genes),
        "counts": counts.source,
        "sha256": digest.hexdigest(),
        "notes": list(counts.notes),
    }
    return UnlabelledStudy(name, matrix if filled.all() else matrix[filled], counts.genes, named, facts)


def compact(counts: csr_matrix) -> csr_matrix:
    """The same counts in the smallest unsigned integer type that holds them; float32 where they are not whole."""
    most = counts.data.max(initial=0)
    if most >= 2**32 or not np.array_equal(counts.data, np.floor(counts.data)):
        return counts.astype(np.float32)
    return counts.astype(np.min_scalar_type(int(most)))


def split_studies(
    studies: Sequence[UnlabelledStudy], *, share: float, names: Sequence[str] = (), seed: int = 0
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
    studies: Sequence[UnlabelledStudy],
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
    studies: Sequence[UnlabelledStudy],
    rows: Sequence[np.ndarray],
    vocabulary: GeneVocabulary,
    *,
    species: str = "auto",
    column: str | None = None,
) -> UnlabelledCells:
    """The cells `rows` of each study over the genes of a vocabulary, without the studies of which none is asked for."""
    names, counts, measured = [], [], []
    for study, wanted in zip(studies, rows, strict=True):
        if len(wanted) == 0:
            continue
        alignment = align(study.genes, vocabulary, species=species, column=column, name=study.name)
        names.append(study.name)
        counts.append(_aligned(study.counts, wanted, alignment))
        measured.append(alignment.measured)
    return UnlabelledCells(tuple(names), tuple(counts), np.stack(measured))


def _aligned(counts: csr_matrix, rows: np.ndarray, alignment: Alignment) -> csr_matrix:
    parts = [compact(alignment.apply(counts[rows[i : i + ROWS]])) for i in range(0, len(rows), ROWS)]
    return vstack(parts, format="csr")

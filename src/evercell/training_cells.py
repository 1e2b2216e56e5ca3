"""Labelled cells of one or more studies, brought into one gene order."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.sparse import csr_matrix, issparse

from evercell.bank import ExampleBank, balanced_rows, kinds_of
from evercell.cells import find_counts
from evercell.celltypes import CellTypes
from evercell.errors import LabelsError, SettingsError
from evercell.genes import GeneVocabulary, align, canonical_genes
from evercell.labels import listed, read_labels
from evercell.profiles import ProfileModel, fit_profiles
from evercell.sources import unmerged
from evercell.stored_counts import CellCounts, stacked
from evercell.tokenizers import View

if TYPE_CHECKING:
    from anndata import AnnData


BALANCES = ("sqrt", "oversample", "weights", "none")


def check_balance(balance: str) -> None:
    """Refuse a way of balancing types that there is not."""
    if balance not in BALANCES:
        raise SettingsError(f"there is no balance `{balance}`", hint=f"choose one of: {', '.join(BALANCES)}")


@dataclass(frozen=True)
class TrainingCells:
    """Labelled cells over a model's genes, their counts in memory or in files.

    Parameters
    ----------
    stored
        Raw counts (N, G), read some cells at a time; of a CSR matrix they are made.
    codes
        Type code of each cell (N,).
    studies
        Row of `measured` for each cell (N,).
    measured
        Genes that each study measured (S, G), bool.
    groups
        Donor or batch of each cell (N,), strings that name the study too; None where no study tells them.
    """

    stored: CellCounts
    codes: np.ndarray
    studies: np.ndarray
    measured: np.ndarray
    groups: np.ndarray | None

    def __post_init__(self) -> None:
        if issparse(self.stored):
            object.__setattr__(self, "stored", CellCounts.of(self.stored))

    def __len__(self) -> int:
        return len(self.codes)

    @property
    def counts(self) -> csr_matrix:
        """Counts of all cells (N, G), CSR, float32: a copy in memory."""
        return self.stored[:]

    def taken(self, rows: np.ndarray) -> TrainingCells:
        """Only the cells `rows`; no counts are copied."""
        groups = None if self.groups is None else self.groups[rows]
        return TrainingCells(self.stored.taken(rows), self.codes[rows], self.studies[rows], self.measured, groups)

    def over_genes(self, columns: np.ndarray) -> TrainingCells:
        """Only the genes `columns`."""
        return TrainingCells(
            self.stored.over_genes(columns), self.codes, self.studies, self.measured[:, columns], self.groups
        )

    def joined(self, other: TrainingCells) -> TrainingCells:
        """Cells of both; `other` may know more genes, appended behind those of this one. Groups are dropped."""
        more = other.stored.n_genes - self.stored.n_genes
        return TrainingCells(
            self.stored.joined(other.stored),
            np.concatenate([self.codes, other.codes]),
            np.concatenate([self.studies, other.studies + len(self.measured)]),
            np.vstack([np.pad(self.measured, ((0, 0), (0, more))), other.measured]),
            None,
        )

    def as_bank(self, *, stage: int | np.ndarray) -> ExampleBank:
        """The cells as examples of a stage, or each of its own (N,), in memory."""
        stages = np.array(np.broadcast_to(stage, len(self)))
        return ExampleBank(self.counts, self.codes, stages, self.studies, self.measured)

    @property
    def measured_by_any(self) -> np.ndarray:
        """Genes that at least one study measured (G,), bool."""
        return np.asarray(self.measured.any(axis=0))

    def profiles(self, n_types: int) -> ProfileModel:
        """Profiles of the types (K) over marker genes."""
        return fit_profiles(self.stored, self.codes, self.studies, self.measured, n_types=n_types)

    def sampling_weights(self, balance: str) -> np.ndarray:
        """Probability with which each cell is drawn in training (N,).

        ``sqrt`` draws the types of each study in proportion to the root of their number of cells, ``oversample`` each
        type as often, so that cells of rare types come again and again, ``weights`` and ``none`` each cell as often.
        """
        weight = self._kind_sizes() ** {"sqrt": -0.5, "oversample": -1.0, "weights": 0.0, "none": 0.0}[balance]
        found: np.ndarray = weight / weight.sum()
        return found

    def loss_weights(self, balance: str) -> np.ndarray | None:
        """What each cell counts in the loss (N,), 1 on the mean; None where all count alike.

        With ``weights`` every type of a study counts as much in all, whatever its number of cells.
        """
        if balance != "weights":
            return None
        weight = 1.0 / self._kind_sizes()
        found: np.ndarray = weight / weight.mean()
        return found

    def _kind_sizes(self) -> np.ndarray:
        """Number of cells of the type of each cell in its study (N,)."""
        kinds = kinds_of(self.codes, self.studies)
        return np.bincount(kinds)[kinds].astype(np.float64)


@dataclass(frozen=True)
class Study:
    """One labelled AnnData as given: its counts, labels and groups, before genes are matched."""

    name: str
    cells: AnnData
    counts: Any
    labels: np.ndarray  # type names (N,), labelled cells only
    rows: np.ndarray  # labelled cells
    groups: np.ndarray | None
    notes: tuple[str, ...]

    def blocks(self) -> Iterator[csr_matrix]:
        """Counts of the labelled cells over the study's own genes, some cells at a time."""
        for start, stop, block in self.counts.chunks():
            inside = self.rows[np.searchsorted(self.rows, start) : np.searchsorted(self.rows, stop)] - start
            if len(inside):
                yield block if len(inside) == stop - start else block[inside]

    def brought_to(
        self, vocabulary: GeneVocabulary, *, species: str = "auto", column: str | None = None
    ) -> tuple[Iterator[csr_matrix], np.ndarray]:
        """The same over the genes of a vocabulary, and which of these the study measured (G,), bool."""
        alignment = align(self.counts.genes, vocabulary, species=species, column=column, name=self.name)
        return (alignment.apply(block) for block in self.blocks()), alignment.measured


def read_study(
    adata: AnnData,
    labels: str,
    *,
    groups: str | None = None,
    layer: str | None = None,
    name: str = "the data",
    least_types: int = 2,
) -> Study:
    """Check one labelled AnnData.

    Raises
    ------
    CellsError, LabelsError
        No counts, no such column, no labelled cells.
    """
    counts = find_counts(adata, layer=layer, name=name)
    column = read_labels(adata, labels, name=name, least_types=least_types)
    rows = np.flatnonzero(column.notna().to_numpy())
    named = None
    if groups is not None:
        if groups not in adata.obs:
            raise LabelsError(
                f"`{name}` has no column `{groups}` in obs; columns: {listed(map(str, adata.obs.columns)) or 'none'}",
                hint="name the column of donors or batches with --donor or --batch",
            )
        named = (name + "/" + adata.obs[groups].astype(str)).to_numpy()[rows]
    notes = (*counts.notes, *column.attrs.get("notes", ()))
    return Study(name, adata, counts, column.to_numpy()[rows].astype(str), rows, named, notes)


def read_studies(
    adatas: Sequence[AnnData],
    labels: str,
    *,
    groups: str | None = None,
    layer: str | None = None,
    names: Sequence[str] | None = None,
    least_types: int = 2,
) -> list[Study]:
    """Check labelled AnnData; where a study lacks the column of groups that another has, it is a group of its own.

    Merged cells (`evercell.sources`) are a study for each source, over the genes that it measured; sources without a
    label are left out, as cells without one are.

    Raises
    ------
    CellsError, LabelsError
        As `read_study`.
    SettingsError
        No data sets, or another number of names.
    """
    names = list(names) if names is not None else [f"data set {i + 1}" for i in range(len(adatas))]
    if not adatas or len(names) != len(adatas):
        raise SettingsError(
            f"{len(adatas)} data sets with {len(names)} names were given", hint="give at least one, each with its name"
        )
    parts = [part for adata, name in zip(adatas, names, strict=True) for part in _labelled(adata, labels, name)]
    merged = len(parts) > len(adatas)  # of several sources one may hold a single type
    tells = [groups in part.obs and not (merged and part.obs[groups].isna().all()) for _, part in parts]
    return [
        read_study(
            part,
            labels,
            groups=groups if told or not any(tells) else None,
            layer=layer,
            name=name,
            least_types=1 if merged else least_types,
        )
        for (name, part), told in zip(parts, tells, strict=True)
    ]


def _labelled(adata: AnnData, labels: str, name: str) -> list[tuple[str, AnnData]]:
    """The sources of merged cells that have labels, or the AnnData itself; all of them where none has."""
    if labels not in adata.obs:
        return [(name, adata)]  # told where labels are read
    parts = unmerged(adata, name)
    if len(parts) == 1:
        return parts
    found = [(one, part) for one, part in parts if read_labels(part, labels, name=one, least_types=0).notna().any()]
    return found or parts


def vocabulary_of(studies: Sequence[Study], *, species: str = "auto", column: str | None = None) -> GeneVocabulary:
    """Genes of all studies, in the order in which they come."""
    return GeneVocabulary.from_genes(
        [canonical_genes(study.counts.genes, species=species, column=column) for study in studies]
    )


def gather(
    studies: Sequence[Study],
    vocabulary: GeneVocabulary,
    types: CellTypes,
    *,
    species: str = "auto",
    column: str | None = None,
    store: Path | None = None,
) -> TrainingCells:
    """Labelled cells of all studies over the genes of a vocabulary; `store` as in `stacked`."""
    brought = [study.brought_to(vocabulary, species=species, column=column) for study in studies]
    groups = None
    if any(study.groups is not None for study in studies) or len(studies) > 2:
        # With several studies, a study without donors is one group.
        groups = np.concatenate(
            [np.full(len(s.rows), s.name, dtype=object) if s.groups is None else s.groups for s in studies]
        )
    return TrainingCells(
        stored=CellCounts.of(stacked((block for blocks, _ in brought for block in blocks), store), store),
        codes=np.concatenate([types.codes(study.labels) for study in studies]),
        studies=np.repeat(np.arange(len(studies)), [len(study.rows) for study in studies]),
        measured=np.stack([measured for _, measured in brought]),
        groups=groups,
    )


def describe(study: Study) -> dict[str, Any]:
    """What the ledger says of a data set; the fingerprint covers its counts, genes and labels."""
    # Values, columns and row pointers of all cells as one matrix has them, read twice so that none has to be there.
    digest, sizes, kind = hashlib.sha256(), [np.zeros(1, dtype=np.int64)], np.dtype(np.int32)
    for _, _, block in study.counts.chunks():
        digest.update(block.data)
        sizes.append(np.diff(block.indptr))
        kind = np.promote_types(kind, block.indices.dtype)
    indptr = np.cumsum(np.concatenate(sizes))
    kind = np.promote_types(kind, np.min_scalar_type(-int(indptr[-1]) - 1))
    for _, _, block in study.counts.chunks():
        digest.update(block.indices.astype(kind))
    digest.update(indptr.astype(kind).tobytes())
    genes = list(map(str, study.counts.genes.index))
    unlabelled = digest.copy()  # an update names labels anew: by this its file is found again
    unlabelled.update("\n".join(genes).encode())
    digest.update("\n".join([*genes, *study.labels]).encode())
    return {
        "name": study.name,
        "cells": len(study.rows),
        "genes": len(study.counts.genes),
        "counts": study.counts.source,
        "sha256": digest.hexdigest(),
        "counts_sha256": unlabelled.hexdigest(),
        "notes": list(study.notes),
    }


def chosen_genes(cells: TrainingCells, *, least_cells: int, variable_genes: int | None) -> np.ndarray:
    """Columns of the genes that enough cells express, at most the `variable_genes` most variable of them."""
    n_cells = np.zeros(cells.stored.n_genes, dtype=np.int64)
    for block in cells.stored.blocks():
        n_cells += np.bincount(block.indices, minlength=len(n_cells))
    expressed = np.flatnonzero(n_cells >= min(least_cells, max(len(cells) // 10, 1)))
    if variable_genes is None or len(expressed) <= variable_genes:
        return expressed
    mean, squares = np.zeros((2, len(n_cells)), dtype=np.float32)
    for block in cells.stored.blocks():  # cell after cell, as the means of one matrix are summed up
        logged = View.whole(block).log_normalised()
        np.add.at(mean, block.indices, logged * (1.0 / len(cells)))
        np.add.at(squares, block.indices, logged * logged * (1.0 / len(cells)))
    spread = squares - mean**2
    # Dispersion of the logarithms among genes of like mean, as Scanpy's "seurat" flavour does.
    order = np.argsort(mean[expressed], kind="stable")
    relative = np.empty(len(expressed))
    for part in np.array_split(order, min(20, len(order))):
        dispersion = spread[expressed[part]] / np.maximum(mean[expressed[part]], 1e-9)
        relative[part] = (dispersion - dispersion.mean()) / max(dispersion.std(), 1e-9)
    return np.sort(expressed[np.argsort(-relative, kind="stable")[:variable_genes]])


def sealed_rows(cells: TrainingCells, held_out: np.ndarray, most: int, *, seed: int) -> np.ndarray:
    """Sorted rows of held-out cells to seal, class-balanced, half of them at most: the others are learnt from."""
    size = min(most, len(held_out) // 2)
    found: np.ndarray = held_out[balanced_rows(cells.codes[held_out], size, np.random.default_rng(seed))]
    return found

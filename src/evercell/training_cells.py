"""Labelled cells of one or more studies, brought into one gene order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.sparse import csr_matrix, vstack

from evercell.cells import find_counts
from evercell.celltypes import CellTypes
from evercell.errors import LabelsError
from evercell.genes import GeneVocabulary, align, canonical_genes
from evercell.labels import listed, read_labels

if TYPE_CHECKING:
    from anndata import AnnData


@dataclass(frozen=True)
class TrainingCells:
    """Labelled cells over a model's genes.

    Parameters
    ----------
    counts
        Raw counts (N, G), CSR, float32.
    codes
        Type code of each cell (N,).
    studies
        Row of `measured` for each cell (N,).
    measured
        Genes that each study measured (S, G), bool.
    groups
        Donor or batch of each cell (N,), strings that name the study too; None where no study tells them.
    """

    counts: csr_matrix
    codes: np.ndarray
    studies: np.ndarray
    measured: np.ndarray
    groups: np.ndarray | None

    def __len__(self) -> int:
        return len(self.codes)

    def taken(self, rows: np.ndarray) -> TrainingCells:
        """Only the cells `rows`."""
        groups = None if self.groups is None else self.groups[rows]
        return TrainingCells(self.counts[rows], self.codes[rows], self.studies[rows], self.measured, groups)

    def over_genes(self, columns: np.ndarray) -> TrainingCells:
        """Only the genes `columns`."""
        return TrainingCells(
            self.counts[:, columns].tocsr(), self.codes, self.studies, self.measured[:, columns], self.groups
        )

    @property
    def measured_by_any(self) -> np.ndarray:
        """Genes that at least one study measured (G,), bool."""
        return np.asarray(self.measured.any(axis=0))

    def sampling_weights(self, balance: str) -> np.ndarray:
        """Probability with which each cell is drawn in training (N,).

        ``sqrt`` draws the types of each study in proportion to the root of their number of cells, ``equal`` each type
        as often, ``none`` each cell as often.
        """
        _, kinds = np.unique(np.stack([self.studies, self.codes]), axis=1, return_inverse=True)
        sizes = np.bincount(kinds.ravel())[kinds.ravel()].astype(np.float64)
        weight = {"sqrt": sizes**-0.5, "equal": sizes**-1.0, "none": np.ones(len(self))}[balance]
        found: np.ndarray = weight / weight.sum()
        return found


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


def read_study(
    adata: AnnData,
    labels: str,
    *,
    groups: str | None = None,
    layer: str | None = None,
    name: str = "the data",
) -> Study:
    """Check one labelled AnnData.

    Raises
    ------
    CellsError, LabelsError
        No counts, no such column, no labelled cells.
    """
    counts = find_counts(adata, layer=layer, name=name)
    column = read_labels(adata, labels, name=name)
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
) -> TrainingCells:
    """Labelled cells of all studies over the genes of a vocabulary."""
    counts, measured = [], []
    for study in studies:
        alignment = align(study.counts.genes, vocabulary, species=species, column=column, name=study.name)
        counts.append(alignment.apply(study.counts.to_csr()[study.rows]))
        measured.append(alignment.measured)
    groups = None
    if any(study.groups is not None for study in studies) or len(studies) > 2:
        # With several studies, a study without donors is one group.
        groups = np.concatenate(
            [np.full(len(s.rows), s.name, dtype=object) if s.groups is None else s.groups for s in studies]
        )
    return TrainingCells(
        counts=vstack(counts, format="csr"),
        codes=np.concatenate([types.codes(study.labels) for study in studies]),
        studies=np.repeat(np.arange(len(studies)), [len(study.rows) for study in studies]),
        measured=np.stack(measured),
        groups=groups,
    )

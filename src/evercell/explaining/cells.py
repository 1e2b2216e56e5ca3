"""The cells that an explanation is asked for, as the model sees them."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix, vstack

from evercell.annotator import Annotator
from evercell.cells import find_counts
from evercell.counts import ROWS, Counts
from evercell.errors import CellsError, LabelsError
from evercell.gene_names import canonical_genes
from evercell.labelling import Asked, Labeller
from evercell.labels import listed
from evercell.rejection import Outputs
from evercell.sources import unmerged
from evercell.tokenizers import View

if TYPE_CHECKING:
    from anndata import AnnData

AT_ONCE = 4096  # cells a pass of the model


@dataclass(frozen=True)
class Piece:
    """Some cells of one source, with the model fitted to its genes.

    Parameters
    ----------
    labeller
        The model made ready for the source.
    view
        The cells over the model's genes.
    rows
        Their rows in the file (B,).
    """

    labeller: Labeller
    view: View
    rows: np.ndarray

    @property
    def model(self) -> Annotator:
        """The model as it labels these cells."""
        return self.labeller.fitted

    @cached_property
    def outputs(self) -> Outputs:
        """What the model says of the cells."""
        return self.model.outputs(self.view)

    @property
    def threshold(self) -> float:
        """Score above which a cell is called unknown; none where that depends on the other cells."""
        return self.labeller.threshold() if self.labeller.rejector.per_cell else np.inf

    @cached_property
    def rejected(self) -> np.ndarray:
        """Which of the cells are called unknown (B,)."""
        found: np.ndarray = self.labeller.rejector.score(self.outputs) > self.threshold
        return found

    def taken(self, rows: np.ndarray) -> Piece:
        """Only the cells `rows`."""
        return Piece(self.labeller, self.view.taken(rows), self.rows[rows])


@dataclass(frozen=True)
class Sources:
    """The cells of a file by their row, each source with the model fitted to its genes."""

    labellers: tuple[Labeller, ...]
    names: pd.Index
    symbols: np.ndarray
    """Of the model's genes (G,), as the species of the file has them."""

    @classmethod
    def of(cls, model: Annotator, adata: AnnData, asked: Asked, name: str) -> Sources:
        """Match the genes of every source and fit the model to them."""
        labellers = []
        symbols = np.array(model.vocabulary.symbols, dtype=object)
        for one, part in unmerged(adata, name):
            counts = find_counts(part, layer=asked.layer, name=one, empty_cells="keep")
            labellers.append(Labeller.ready(model, counts, asked, one))
            genes = canonical_genes(counts.genes, species=asked.species, column=asked.gene_column)
            columns = labellers[-1].alignment.columns
            symbols[columns[columns >= 0]] = genes.symbols[columns >= 0]
        return cls(tuple(labellers), adata.obs_names, symbols)

    def pieces(self, rows: np.ndarray) -> tuple[Piece, ...]:
        """The cells `rows` of the file that the model knows a count of; none at all is possible."""
        found = []
        for one in self.labellers:
            places = one.counts.cells.get_indexer(self.names[rows])
            there = np.flatnonzero(places >= 0)
            there = there[np.argsort(places[there])]
            view = View.whole(one.alignment.apply(_read(one.counts, places[there])), one.alignment.measured)
            seen = np.flatnonzero(view.totals > 0)
            if len(seen):
                found.append(Piece(one, view.taken(seen), rows[there[seen]]))
        return tuple(found)


def _read(counts: Counts, rows: np.ndarray) -> csr_matrix:
    """Counts of some cells, sorted row numbers; of a file only the blocks that hold them are read."""
    parts = [csr_matrix((0, counts.shape[1]), dtype=np.float32)]
    for start in range(0, counts.shape[0], ROWS):
        inside = rows[(rows >= start) & (rows < start + ROWS)]
        if len(inside):
            first = int(inside[0])
            parts.append(counts.rows(first, int(inside[-1]) + 1)[inside - first])
    return vstack(parts, format="csr")


def proba_without(pieces: Sequence[Piece], removed: Sequence[np.ndarray]) -> np.ndarray:
    """Probabilities (R, B, K) of the cells after each of several sets of genes (codes) was removed.

    A gene is removed by taking its counts out of the cell and leaving the total as it was, so that the other genes keep
    their values: the model sees a cell in which it was not found.
    """
    return np.concatenate([_proba_without(one, removed) for one in pieces], axis=1)


def _proba_without(piece: Piece, removed: Sequence[np.ndarray]) -> np.ndarray:
    n_cells = len(piece.rows)
    found: list[np.ndarray] = []
    at_once = max(AT_ONCE // n_cells, 1)
    for start in range(0, len(removed), at_once):
        views = [_without(piece.view, genes) for genes in removed[start : start + at_once]]
        found += np.split(piece.model.outputs(View.joined(views)).proba, len(views))
    return np.stack(found)


def _without(view: View, genes: np.ndarray) -> View:
    counts = view.counts.copy()
    gone = np.zeros(counts.shape[1], dtype=bool)
    gone[genes] = True
    counts.data[gone[counts.indices]] = 0
    counts.eliminate_zeros()
    return replace(view, counts=counts)


@dataclass(frozen=True)
class Expression:
    """Sums of log(1 + counts per 10,000) over cells (G,), and number of the cells whose source measured a gene (G,)."""

    sums: np.ndarray
    cells: np.ndarray

    @classmethod
    def of(cls, pieces: Sequence[Piece], n_genes: int) -> Expression:
        """Of the cells of some pieces."""
        sums, cells = np.zeros((2, n_genes))
        for one in pieces:
            sums += np.asarray(one.view.logged().sum(axis=0), dtype=float).ravel()
            cells += len(one.rows) * one.view.measured
        return cls(sums, cells)

    def less(self, other: Expression) -> Expression:
        """Of the cells that are left without some of them."""
        return Expression(np.maximum(self.sums - other.sums, 0), self.cells - other.cells)

    @property
    def mean(self) -> np.ndarray:
        """Mean of the cells whose source measured the gene (G,); 0 where there is none."""
        found: np.ndarray = self.sums / np.maximum(self.cells, 1)
        return found


def named_cells(names: Sequence[str], index: pd.Index, *, name: str) -> dict[str, np.ndarray]:
    """Row of each cell that was asked for, by its name.

    Raises
    ------
    CellsError
        There is no such cell.
    """
    if isinstance(names, str):
        names = [names]
    places = index.get_indexer(pd.Index(list(names)))
    for cell, place in zip(names, places, strict=True):
        if place < 0:
            hint = f"its cells are named like {listed(map(str, index), most=3)}"
            raise CellsError(f"`{name}` has no cell `{cell}`", hint=near(str(cell), index.astype(str)) or hint)
    return {str(cell): np.array([place]) for cell, place in zip(names, places, strict=True)}


def grouped_cells(obs: pd.DataFrame, key: str, only: Sequence[str] | None, *, name: str) -> dict[str, np.ndarray]:
    """Rows of the cells of each group in a column of `obs`, in the order of its categories or the alphabet.

    Raises
    ------
    LabelsError
        There is no such column or group.
    """
    if key not in obs:
        raise LabelsError(
            f"`{name}` has no column `{key}` in obs; columns: {listed(map(str, obs), most=50) or 'none'}",
            hint="name the column of groups with --groups",
        )
    column = obs[key]
    if not isinstance(column.dtype, pd.CategoricalDtype) and column.nunique() > 200:
        raise LabelsError(
            f"column `{key}` of `{name}` has {column.nunique():,} values: they are no groups",
            hint="name a column of clusters or types with --groups",
        )
    codes = pd.Categorical(column)
    found = {str(group): np.flatnonzero(codes.codes == code) for code, group in enumerate(codes.categories)}
    return of_those(found, only, f"column `{key}` of `{name}` has no group")


def of_those(found: Mapping[str, np.ndarray], only: Sequence[str] | None, missing: str) -> dict[str, np.ndarray]:
    """The groups that were asked for, all that have cells by default.

    Raises
    ------
    LabelsError
        There is no such group.
    """
    present = {group: rows for group, rows in found.items() if len(rows)}
    wanted = list(present) if only is None else [only] if isinstance(only, str) else [str(one) for one in only]
    for group in wanted:
        if group not in present:
            hint = near(group, list(present)) or f"there are {listed(present, most=30) or 'none'}"
            raise LabelsError(f"{missing} `{group}`", hint=hint)
    return {group: present[group] for group in wanted}


def near(word: str, names: Sequence[str] | pd.Index) -> str | None:
    """A hint that names what may have been meant."""
    found = difflib.get_close_matches(word, list(names[:5000]), n=3)
    return f"did you mean {listed(found, most=3)}?" if found else None

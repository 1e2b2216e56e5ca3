"""Folds for cross-validation that keep donors whole, and copies of a cell on one side."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from evercell.errors import LabelsError, SettingsError
from evercell.labels import listed
from evercell.stored_counts import cell_digests

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

TWINS = ("refuse", "together", "apart")
LEAST_VALUES = 20  # cells with fewer genes are alike by chance


@dataclass(frozen=True, eq=False)
class Folds:
    """Which fold tests each cell.

    Attributes
    ----------
    of
        Fold of each cell (N,), 0 to `n` - 1.
    n
        Number of folds.
    by
        ``groups`` where donors, batches or studies are kept whole, ``cells`` where cells were drawn at random by type.
    held_out
        Names of the groups that each fold tests; empty where cells were drawn.
    copies
        Cells that have the same counts as another cell.
    leaked
        Test cells, over all folds, of which a copy is in the training cells of their fold.
    warnings
        What makes the figures optimistic, each a sentence.
    """

    of: np.ndarray
    n: int
    by: str
    held_out: tuple[tuple[str, ...], ...]
    copies: int
    leaked: int
    warnings: tuple[str, ...]

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Rows to train on and rows to test on, fold by fold."""
        for fold in range(self.n):
            yield np.flatnonzero(self.of != fold), np.flatnonzero(self.of == fold)


def make_folds(
    labels: Sequence[Any] | np.ndarray,
    groups: Sequence[Any] | np.ndarray | None = None,
    *,
    n_folds: int = 5,
    seed: int = 0,
    twins: np.ndarray | None = None,
    when_twins: str = "refuse",
) -> Folds:
    """Divide cells into folds with about the same share of every type.

    Parameters
    ----------
    labels
        (N,) cell types.
    groups
        (N,) donors, batches or studies, which are kept whole; None draws cells at random by type.
    n_folds
        Number of folds, at least two and at most as many as groups.
    seed
        Of the choice; the same seed gives the same folds.
    twins
        (N,) numbers, equal for cells that are copies of each other (see `twins_of`).
    when_twins
        What to do where copies would be tested on what was trained on: ``refuse``; keep them ``together`` in one fold;
        or leave them ``apart`` and say so.

    Raises
    ------
    SettingsError
        Fewer than two folds, or more than there are groups or cells.
    LabelsError
        Copies of cells would be on both sides, and `when_twins` is ``refuse``.
    """
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    types = np.unique(np.asarray(labels).astype(str), return_inverse=True)[1]
    if when_twins not in TWINS:
        raise SettingsError(f"there is no way `{when_twins}` with copies", hint=f"choose one of: {', '.join(TWINS)}")
    names, whole = (None, None) if groups is None else np.unique(np.asarray(groups).astype(str), return_inverse=True)
    _check_number(n_folds, len(types), names)
    copies = np.arange(len(types)) if twins is None else np.asarray(twins)
    sizes = np.bincount(np.unique(copies, return_inverse=True)[1])
    keys = _joined(whole, copies) if when_twins == "together" else whole
    if keys is None:
        splitter = StratifiedKFold(n_folds, shuffle=True, random_state=seed)
    else:
        if len(np.unique(keys)) < n_folds:
            raise SettingsError(
                f"copies of cells tie all groups into {len(np.unique(keys))}, too few for {n_folds} folds",
                hint="remove the copies, or pass --twins apart and read the figure with care",
            )
        splitter = StratifiedGroupKFold(n_folds, shuffle=True, random_state=seed)
    of = np.full(len(types), -1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The least populated class")  # rare types are told by the scores
        for fold, (_, tested) in enumerate(splitter.split(types, types, keys)):
            of[tested] = fold
    leaked = _leaked(of, copies)
    found = []
    if leaked:
        sentence = (
            f"{leaked:,} of {len(of):,} cells are tested while a copy of them, the same counts, is trained on "
            f"({int(sizes[sizes > 1].sum()):,} cells have a copy)"
        )
        if when_twins == "refuse":
            raise LabelsError(
                f"{sentence}: no figure of such folds can be trusted",
                hint="were cells oversampled before? Give the file from before that, or pass --twins together "
                "(copies in one fold) or --twins apart (the figure, marked as leaked)",
            )
        found.append(f"{sentence}: the figures are too good")
    held_out: tuple[tuple[str, ...], ...] = ((),) * n_folds
    if names is not None and whole is not None:
        held_out = tuple(tuple(names[np.unique(whole[of == fold])].tolist()) for fold in range(n_folds))
    by = "cells" if groups is None else "groups"
    return Folds(of, n_folds, by, held_out, int(sizes[sizes > 1].sum()), leaked, tuple(found))


def twins_of(counts: csr_matrix) -> np.ndarray:
    """Numbers (N,), equal for cells with the same counts (N, G); cells of fewer than 20 genes are never alike."""
    first: dict[bytes, int] = {}
    rows = np.arange(counts.shape[0])
    alike = np.array([first.setdefault(digest, row) for row, digest in enumerate(cell_digests(counts))], dtype=int)
    return np.where(np.diff(counts.indptr) >= LEAST_VALUES, alike, rows)


def _check_number(n_folds: int, n_cells: int, names: np.ndarray | None) -> None:
    if n_folds < 2:
        raise SettingsError(f"{n_folds} folds leave nothing to test or to train on", hint="pass --folds 2 or more")
    most, of = (n_cells, "cells") if names is None else (len(names), "groups")
    if n_folds > most:
        shown = "" if names is None else f": {listed(names)}"
        mend = "or --by stratified" if names is not None and most < 2 else f"pass --folds {most} or fewer"
        raise SettingsError(
            f"{n_folds} folds need as many {of}; there are {most}{shown}",
            hint=mend if most >= 2 else "name a column with several groups, or pass --by stratified",
        )


def _joined(whole: np.ndarray | None, copies: np.ndarray) -> np.ndarray:
    """Groups (N,) that keep whole groups and copies together: what either ties is tied."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    n = len(copies)
    cells = np.arange(n)
    twin_nodes = n + np.unique(copies, return_inverse=True)[1]
    edges, size = [(cells, twin_nodes)], 2 * n
    if whole is not None:
        edges.append((cells, 2 * n + whole))
        size += int(whole.max()) + 1
    rows, columns = (np.concatenate(part) for part in zip(*edges, strict=True))
    graph = coo_matrix((np.ones(len(rows)), (rows, columns)), shape=(size, size))
    found: np.ndarray = connected_components(graph, directed=False)[1][:n]
    return found


def _leaked(of: np.ndarray, copies: np.ndarray) -> int:
    """Cells of which a copy is in another fold."""
    kinds = np.unique(copies, return_inverse=True)[1]
    lowest, highest = np.full(kinds.max() + 1, len(of)), np.full(kinds.max() + 1, -1)
    np.minimum.at(lowest, kinds, of)
    np.maximum.at(highest, kinds, of)
    return int((lowest < highest)[kinds].sum())

"""What the values of a matrix are, and how normalised or log-transformed values are turned back into counts.

A count is a whole number and normalisation multiplies all counts of a cell by one factor, so every value of a cell is a
multiple of the value of one count. Finding the value that makes all multiples whole undoes the normalisation exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp

from evercell.errors import CellsError, words_of
from evercell.vetting import check_indices, check_sparse

SAME = 1e-3  # a value this close to a whole number is whole: float noise of a division and a multiplication
MOST = 0.95  # share of the sampled cells that must agree before values are turned back into counts
LARGEST_UNIT = 30  # a cell whose smallest count is above this is not turned back exactly

UNREADABLE = (OSError, RuntimeError, ValueError, TypeError, LookupError)  # what readers of broken files raise

# Before normalisation: value -> something proportional to the counts of the cell.
UNDO: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "log1p": np.expm1,
    "log2(1 + x)": lambda x: np.exp2(x) - 1,
    "log10(1 + x)": lambda x: np.power(10.0, x) - 1,
    "log1p applied twice": lambda x: np.expm1(np.expm1(x)),
    "": lambda x: x,
}


@dataclass(frozen=True)
class Reading:
    """How the values of one matrix are to be read."""

    undo: str | None = None  # a key of UNDO, None where the values are counts as they stand
    normalised: bool = False  # a factor a cell has to be divided out
    expected: bool = False  # counts that are not all whole
    binary: bool = False  # no value above 1: shallow counts, or no counts at all
    notes: tuple[str, ...] = ()

    @property
    def transform(self) -> str:
        if self.undo is None:
            return "none"
        return " and ".join(filter(None, [self.undo, "per-cell normalisation" * self.normalised])) + " undone"


def csr_block(matrix: Any, start: int, stop: int) -> sp.csr_matrix:
    """Rows of any matrix as a float64 CSR of its own, canonical and without stored zeros."""
    block = read_rows(matrix, start, stop).astype(np.float64, copy=True)
    block.sum_duplicates()
    block.eliminate_zeros()
    return block


def read_rows(matrix: Any, start: int, stop: int) -> sp.csr_matrix:
    """Rows of any matrix as CSR.

    Raises
    ------
    CellsError
        The matrix is in a file, and there they are damaged.
    """
    try:
        rows = sp.csr_matrix(matrix[start:stop])
        if hasattr(matrix, "group"):
            check_indices(rows.indices, rows.shape[1], name="the matrix")
    except UNREADABLE as error:
        if sp.issparse(matrix) or isinstance(matrix, np.ndarray):
            raise
        raise _unreadable(matrix, f"cells {start + 1:,} to {stop:,}", error) from error
    return rows


def read_columns(matrix: Any) -> sp.csc_matrix:
    """A matrix that its file holds by columns, whole.

    Raises
    ------
    CellsError
        It is damaged.
    """
    try:
        found = matrix.to_memory()
        check_sparse(found, name="the matrix")
    except UNREADABLE as error:
        raise _unreadable(matrix, "its matrix", error) from error
    return found


def _unreadable(matrix: Any, part: str, error: Exception) -> CellsError:
    what = words_of(error)
    return CellsError(
        f"{_file_of(matrix)} is damaged or cut off: {part} cannot be read ({what})",
        hint="copy or download the file again",
    )


def _file_of(matrix: Any) -> str:
    """The file that a matrix is in, as messages call it."""
    group = getattr(matrix, "group", matrix)
    name = getattr(getattr(group, "file", None), "filename", None) or getattr(getattr(group, "store", None), "root", "")
    return f"`{name}`" if name else "the file"


def called(name: str) -> str:
    """The data as messages call it: a path in backticks."""
    return name if name == "the data" else f"`{name}`"


def check_finite(block: sp.csr_matrix, cells: pd.Index, genes: pd.Index, name: str) -> None:
    """Raise for the first missing, infinite or negative value."""
    odd = ~np.isfinite(block.data)
    if odd.any():
        raise CellsError(f"{called(name)} has a missing or infinite value: {_at(block, odd, cells, genes)}")
    negative = block.data < 0
    if negative.any():
        raise CellsError(
            f"{called(name)} does not hold counts: {_at(block, negative, cells, genes)} is negative",
            hint="give the raw counts: scaled or corrected values cannot be turned back",
        )


def check_whole(block: sp.csr_matrix, cells: pd.Index, genes: pd.Index, name: str) -> None:
    """Raise for the first value that is not a whole number."""
    part = ~whole(block.data)
    if part.any():
        raise CellsError(f"{called(name)} does not hold counts: {_at(block, part, cells, genes)}")


def _at(block: sp.csr_matrix, bad: np.ndarray, cells: pd.Index, genes: pd.Index) -> str:
    """The first value of those marked, with its cell and gene: "7.31 at cell `AAACCTG-1`, gene `INS`"."""
    first = int(np.flatnonzero(bad)[0])
    row = int(np.searchsorted(block.indptr, first, side="right")) - 1
    return f"{block.data[first]:.6g} at cell `{cells[row]}`, gene `{genes[block.indices[first]]}`"


def whole(values: np.ndarray) -> np.ndarray:
    """Which values are whole numbers up to float noise."""
    return np.abs(values - np.rint(values)) < SAME


def _row_share(true: np.ndarray, block: sp.csr_matrix) -> np.ndarray:
    """Share of the stored values of each row that are true; 1 for an empty row."""
    sums = np.concatenate([[0], np.cumsum(true)])
    stored = np.diff(block.indptr)
    return np.where(stored == 0, 1.0, np.diff(sums[block.indptr]) / np.maximum(stored, 1))


def judge(sample: sp.csr_matrix, cells: pd.Index, genes: pd.Index, name: str) -> Reading:
    """Tell counts, expected counts, normalised or log-transformed counts, and anything else apart."""
    values = sample.data
    part = ~whole(values)
    if not part.any():
        if values.size and values.max() == 1:
            return Reading(binary=True, notes=("no value is above 1: the data may hold presence, not counts",))
        total = _constant(sample)
        same = f"every cell has the same total, {total or 0:,.0f}: the counts look downsampled or rounded"
        return Reading(notes=() if total is None else (same,))
    logs = [word for word in UNDO if word] if values.max() < 50 else []  # exp(50) is no number of molecules
    for undo, share in _invertible(sample, logs):
        return Reading(undo=undo, normalised=not _all_whole(UNDO[undo](values)), notes=_relative(share))
    odd = _row_share(~part, sample) < 1
    if _constant(sample) is None and np.mean(_row_expected(sample)[odd]) >= MOST:
        note = f"not all values are whole, such as {_at(sample, part, cells, genes)}: taken as expected counts"
        return Reading(expected=True, notes=(note,))
    for undo, share in _invertible(sample, [""]):
        return Reading(undo=undo, normalised=True, notes=_relative(share))
    raise CellsError(f"{called(name)} does not hold counts: {_at(sample, part, cells, genes)}{_reason(sample)}")


def _all_whole(values: np.ndarray) -> bool:
    # An exponential makes the rounding of float32 grow with the value.
    return bool((np.abs(values - np.rint(values)) < SAME + 2e-6 * values).all())


def _relative(share: float) -> tuple[str, ...]:
    if share == 1:
        return ()
    return (f"{1 - share:.1%} of the sampled cells have no exact counts: their values are multiples of the smallest",)


def _invertible(sample: sp.csr_matrix, words: list[str]) -> list[tuple[str, float]]:
    """Transformations whose undoing gives whole counts in most cells, with the share of cells, the surest first."""
    telling = _telling(sample)
    telling &= _row_share(whole(sample.data), sample) < 1  # a cell of whole numbers stays one when divided
    sample = sample[np.flatnonzero(telling)[:: -(-int(telling.sum()) // 128) or 1]]  # a few cells suffice
    found = []
    for word in words if sample.nnz else []:
        with np.errstate(over="ignore", invalid="ignore"):  # a logarithm that was not taken may overflow: not whole
            share = float(to_counts(sample, Reading(undo=word, normalised=True))[1].mean())
        if share >= MOST:
            found.append((word, share))
    return sorted(found, key=lambda pair: -pair[1])


def _telling(block: sp.csr_matrix) -> np.ndarray:
    """Cells with more than two different values: two always look like one and some multiple of it."""
    return np.array([np.unique(row.round(6)).size > 2 for row in np.split(block.data, block.indptr[1:-1])])


def check_one_kind(block: sp.csr_matrix, reading: Reading, cells: pd.Index, name: str) -> None:
    """Raise for a cell that holds counts although the values of the others have to be turned back."""
    rows = np.flatnonzero((_row_share(whole(block.data), block) == 1) & (np.diff(block.indptr) > 2))
    if not rows.size or not reading.undo:
        return
    part = block[rows]
    mixed = rows[_telling(part) & ~to_counts(part, reading)[1]]
    if mixed.size:
        raise CellsError(
            f"{called(name)} mixes counts and transformed values: cell `{cells[mixed[0]]}` holds whole numbers, "
            f"other cells values after {reading.undo}",
            hint="put the raw counts of all cells into X",
        )


def _row_expected(sample: sp.csr_matrix) -> np.ndarray:
    """Cells whose values look like estimates of counts.

    Read assignment by expectation maximisation (RSEM) leaves a part of the values whole. Correction for barcode
    collisions (CEL-seq: ``-K log(1 - k / K)``) shifts every value by a little: small ones stay next to whole numbers.
    """
    partly_whole = _row_share(whole(sample.data), sample) >= 0.2
    small = sample.copy()
    small.data[small.data > 4.5] = 0
    small.eliminate_zeros()
    near = (np.abs(small.data - np.rint(small.data)) < 0.055) & (small.data > 0.9)
    return partly_whole | ((np.diff(small.indptr) > 0) & (_row_share(near, small) >= 0.9))


def to_counts(block: sp.csr_matrix, reading: Reading) -> tuple[np.ndarray, np.ndarray]:
    """Undo a transformation: the counts in the order of ``block.data``, and which cells came out whole.

    The unit of a cell, the value of one count, is its smallest value divided by a small whole number (1 where a gene
    with a single count is left). Cells for which no unit makes all values whole get multiples of their smallest value:
    relative counts. Each cell is turned back by itself, whatever the others hold.
    """
    stored = np.diff(block.indptr)
    filled = np.flatnonzero(stored)
    if not filled.size:
        return block.data, np.ones(len(stored), dtype=bool)
    values = UNDO[reading.undo or ""](block.data)
    if not reading.normalised:
        return np.rint(values), np.ones(len(stored), dtype=bool)
    starts, lengths = block.indptr[:-1][filled], stored[filled]
    ratios = values / np.repeat(np.minimum.reduceat(values, starts), lengths)
    result, exact = ratios.copy(), np.zeros(filled.size, dtype=bool)
    todo = np.arange(filled.size)
    for unit in range(1, LARGEST_UNIT + 1):
        index = np.concatenate([np.arange(starts[i], starts[i] + lengths[i]) for i in todo])
        tried, sizes = ratios[index] * unit, lengths[todo]
        heads = np.concatenate([[0], np.cumsum(sizes)[:-1]])
        # The smallest value may be imprecise; all small counts of the cell together give a better unit.
        small = tried < 20.5
        drift = np.add.reduceat(np.where(small, tried, 0), heads) / np.maximum(
            np.add.reduceat(np.where(small, np.rint(tried), 0), heads), 1
        )
        tried /= np.repeat(np.where(np.abs(drift - 1) < 0.02, drift, 1.0), sizes)
        # Many units are tried after the first, so each has to fit better.
        slack = (0.02 if unit == 1 else 0.01) + 2e-3 / unit * tried
        fits = np.logical_and.reduceat(np.abs(tried - np.rint(tried)) <= slack, heads)
        kept = np.repeat(fits, sizes)
        result[index[kept]] = np.rint(tried[kept])
        exact[todo[fits]] = True
        todo = todo[~fits]
        if not todo.size:
            break
    fine = _fine_enough(block, starts, lengths)
    good = np.ones(len(stored), dtype=bool)
    good[filled] = exact & fine
    return result, good


def _fine_enough(block: sp.csr_matrix, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Cells whose smallest value is well above the last decimal: a rounded table always holds multiples of 0.01."""
    for decimals in range(4):
        scaled = block.data * 10**decimals
        if np.abs(scaled - np.rint(scaled)).max() < 1e-3:
            return np.minimum.reduceat(block.data, starts) > 20 * 10.0**-decimals
    return np.ones(len(lengths), dtype=bool)


def _constant(sample: sp.csr_matrix) -> float | None:
    """The total that all cells share, or None."""
    totals = np.asarray(sample.sum(axis=1)).ravel()
    totals = totals[totals > 0]
    if len(totals) < 3 or np.ptp(totals) > 1e-3 * totals.mean():
        return None
    return float(totals.mean())


def _reason(sample: sp.csr_matrix) -> str:
    """Why the values are not counts and cannot be turned back into counts, as the end of a sentence."""
    total = _constant(sample)
    if total is not None:
        kind = "CPM or TPM" if abs(total / 1e6 - 1) < 0.01 else "normalised values"
        return f"; every cell sums to {total:,.0f}, {kind} that cannot be turned back"
    for word, undo in UNDO.items():
        if word and sample.data.max() < 50:
            undone = sample.copy()
            with np.errstate(over="ignore", invalid="ignore"):
                undone.data = undo(sample.data)
            total = _constant(undone) if np.isfinite(undone.data).all() else None
            if total is not None:
                return f"; {word} of values that sum to {total:,.0f} a cell and cannot be turned back"
    if sample.data.max() < 3:
        return "; the values look log-transformed twice, and cannot be turned back"
    return "; the values look log-transformed" if sample.data.max() < 30 else ""

"""Counts of many cells, stacked block by block: in memory, or in files that are mapped and read where needed."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from scipy.sparse import csr_matrix, vstack

from evercell import distributed
from evercell.errors import CellsError
from evercell.locking import temporary_folder
from evercell.outputs import full_disk_told

BLOCK = 1 << 22  # values counted at a time
ROWS = 4096  # cells read at a time


@dataclass(frozen=True, eq=False)
class CellCounts:
    """Counts of cells in one or more matrices, in memory or in files, of which some cells are read at a time.

    Choosing cells and joining sets of cells copies no counts. What is read is float32, whatever type holds the counts.

    Parameters
    ----------
    parts
        CSR matrices, as `stacked` makes them; a part may know fewer genes than there are.
    rows
        Row of each cell in the parts one below the other (N,).
    n_genes
        Number of genes G.
    store
        Folder for what is written anew, as in `stacked`.
    """

    parts: tuple[csr_matrix, ...]
    rows: np.ndarray
    n_genes: int
    store: Path | None = None

    @classmethod
    def of(cls, counts: csr_matrix, store: Path | None = None) -> CellCounts:
        """All cells of one matrix (N, G)."""
        return cls((counts,), np.arange(counts.shape[0]), counts.shape[1], store)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def shape(self) -> tuple[int, int]:
        """Number of cells and of genes."""
        return len(self.rows), self.n_genes

    @property
    def indptr(self) -> np.ndarray:
        """Where the values of each cell would begin and end in one matrix (N + 1,)."""
        _, begins, ends = self._places(self.rows)
        return np.concatenate([[0], np.cumsum(ends - begins)])

    def __getitem__(self, wanted: np.ndarray | slice | tuple[slice, np.ndarray]) -> csr_matrix:
        """Counts of some cells (numbers, mask or slice) over all genes, or of all cells over some genes, in memory."""
        if isinstance(wanted, tuple):
            return vstack([block[:, wanted[1]] for block in self.taken(wanted[0]).blocks()], format="csr")
        rows = self.rows[wanted]
        part, begins, ends = self._places(rows)
        indptr = np.concatenate([[0], np.cumsum(ends - begins)])
        values, columns = np.empty(indptr[-1], dtype=np.float32), np.empty(indptr[-1], dtype=np.int32)
        # Neighbours are read at once. SciPy would take the rows too, but of more than 2^31 values only after making all
        # columns as wide as the row pointers, in memory.
        first = np.flatnonzero((np.diff(rows, prepend=-2) != 1) | (np.diff(part, prepend=-1) != 0))
        last = np.append(first[1:], len(rows))[: len(first)]
        for which, i, j, start, stop in zip(
            *(one.tolist() for one in (part[first], begins[first], ends[last - 1], indptr[first], indptr[last])),
            strict=True,
        ):
            data, indices = self._arrays[which]
            values[start:stop], columns[start:stop] = data[i:j], indices[i:j]
        return csr_matrix((values, columns, indptr), shape=(len(rows), self.n_genes))

    def _places(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Part of each row, and where its values begin and end there."""
        starts = np.cumsum([0, *(part.shape[0] for part in self.parts)])
        part = np.searchsorted(starts, rows, side="right") - 1
        begins, ends = np.zeros(len(rows), dtype=np.int64), np.zeros(len(rows), dtype=np.int64)
        for number, counts in enumerate(self.parts):
            inside = part == number
            own = rows[inside] - starts[number]
            begins[inside], ends[inside] = counts.indptr[own], counts.indptr[own + 1]
        return part, begins, ends

    @cached_property
    def _arrays(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Values and columns of each part; plain arrays, because a slice of a mapped one takes ten times as long."""
        return [(np.asarray(part.data), np.asarray(part.indices)) for part in self.parts]

    def blocks(self) -> Iterator[csr_matrix]:
        """All cells, at most `ROWS` at a time, at least one block."""
        for start in range(0, max(len(self), 1), ROWS):
            yield self[start : start + ROWS]

    def totals(self) -> np.ndarray:
        """Sum of the counts of each cell (N,), float32."""
        return np.concatenate([np.asarray(block.sum(axis=1), dtype=np.float32).ravel() for block in self.blocks()])

    def taken(self, rows: np.ndarray | slice) -> CellCounts:
        """Only the cells `rows`."""
        return replace(self, rows=self.rows[rows])

    def joined(self, other: CellCounts) -> CellCounts:
        """Cells of both; one may know more genes, appended behind those of the other."""
        behind = sum(part.shape[0] for part in self.parts)
        return CellCounts(
            (*self.parts, *other.parts),
            np.concatenate([self.rows, behind + other.rows]),
            max(self.n_genes, other.n_genes),
            self.store or other.store,
        )

    def over_genes(self, columns: np.ndarray) -> CellCounts:
        """Only the genes `columns`, written anew unless they are all."""
        if np.array_equal(columns, np.arange(self.n_genes)):
            return self
        return CellCounts.of(stacked((block[:, columns].tocsr() for block in self.blocks()), self.store), self.store)


def stacked(blocks: Iterable[csr_matrix], store: Path | None = None) -> csr_matrix:
    """Blocks of cells (B, G) one below the other, CSR.

    Parameters
    ----------
    blocks
        At least one.
    store
        Folder for the values, as float32, and their columns; memory then holds a number a cell. Of several processes on
        a machine one writes, and all map what it wrote. The files have no name any more once they are mapped: their
        room is free again when the counts are not used any more, or the process has ended. None: all in memory, in the
        smallest type that holds the counts.
    """
    if store is None:
        return vstack([compact(block) for block in blocks], format="csr")
    writes = distributed.here().local_rank == 0
    folder = Path(distributed.of_machine(tempfile.mkdtemp(dir=store) if writes else ""))
    names = [folder / "values", folder / "columns"]
    sizes, n_genes = [np.zeros(1, dtype=np.int64)], 0
    # The other processes go through the same blocks: the caller may learn from them.
    with ExitStack() as stack:
        values, columns = (stack.enter_context((name if writes else Path(os.devnull)).open("wb")) for name in names)
        for block in blocks:
            values.write(np.ascontiguousarray(block.data, dtype=np.float32).data)
            columns.write(np.ascontiguousarray(block.indices, dtype=np.int32).data)
            sizes.append(np.diff(block.indptr).astype(np.int64))
            n_genes = block.shape[1]
    distributed.wait()
    indptr = np.cumsum(np.concatenate(sizes))
    found = csr_matrix((len(indptr) - 1, n_genes), dtype=np.float32)
    if indptr[-1] > 0:  # nothing else can be mapped
        if indptr[-1] < np.iinfo(np.int32).max:
            indptr = indptr.astype(np.int32)  # or SciPy would make the columns as wide, in memory
        found.data, found.indices = (np.memmap(*one, "r") for one in zip(names, (np.float32, np.int32), strict=True))
        found.indptr = indptr
    distributed.wait()
    if writes:
        shutil.rmtree(folder, ignore_errors=True)  # where mapped files cannot be removed, `room_in` does it at the end
    return found


def compact(counts: csr_matrix) -> csr_matrix:
    """The same counts in the smallest unsigned integer type that holds them; float32 where they are not whole."""
    most = counts.data.max(initial=0)
    if most >= 2**32 or not np.array_equal(counts.data, np.floor(counts.data)):
        return counts.astype(np.float32)
    return counts.astype(np.min_scalar_type(int(most)))


def cell_digests(counts: csr_matrix) -> list[bytes]:
    """Digest of the counts of each cell (N): the same for cells with the same counts over the same genes (N, G)."""
    counts.sort_indices()
    found = []
    for i, j in zip(counts.indptr[:-1], counts.indptr[1:], strict=True):
        digest = hashlib.blake2b(counts.indices[i:j].astype(np.int64).tobytes(), digest_size=16)
        digest.update(counts.data[i:j].astype(np.float32).tobytes())
        found.append(digest.digest())
    return found


def column_sizes(counts: csr_matrix) -> np.ndarray:
    """Number of stored values of each column (G,), int64, a part of them at a time."""
    found = np.zeros(counts.shape[1], dtype=np.int64)
    for start in range(0, counts.nnz, BLOCK):
        found += np.bincount(counts.indices[start : start + BLOCK], minlength=len(found))
    return found


@contextmanager
def room_in(store: Path | None) -> Iterator[Path | None]:
    """Folder below `store` for the files of one run, one for all processes of a machine, removed afterwards.

    None for None.

    Raises
    ------
    CellsError
        If `store` is no folder that can be written to.
    """
    if store is None:
        yield None
        return
    if not store.is_dir():
        raise CellsError(f"the folder `{store}` for counts does not exist", hint="make it first, or name another")
    if distributed.here().local_rank > 0:
        yield Path(distributed.of_machine(""))
        return
    with full_disk_told(store), temporary_folder(store, "evercell-") as place:
        yield Path(distributed.of_machine(str(place)))

"""Counts of many cells, stacked block by block: in memory, or in files that are mapped and read where needed."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
from scipy.sparse import csr_matrix, vstack

from evercell import distributed
from evercell.errors import CellsError

BLOCK = 1 << 22  # values counted at a time


def stacked(blocks: Iterable[csr_matrix], store: Path | None = None) -> csr_matrix:
    """Blocks of cells (B, G) one below the other, CSR.

    Parameters
    ----------
    blocks
        At least one.
    store
        Folder for the values, as float32, and their columns; memory then holds a number a cell. Of several processes on
        a machine one writes, and all map what it wrote. None: all in memory, in the smallest type that holds the
        counts.
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
    if indptr[-1] == 0:  # nothing can be mapped
        return csr_matrix((len(indptr) - 1, n_genes), dtype=np.float32)
    if indptr[-1] < np.iinfo(np.int32).max:
        indptr = indptr.astype(np.int32)  # or SciPy would make the columns as wide, in memory
    parts = [np.memmap(name, dtype, "r") for name, dtype in zip(names, (np.float32, np.int32), strict=True)]
    found = csr_matrix((len(indptr) - 1, n_genes), dtype=np.float32)
    found.data, found.indices, found.indptr = *parts, indptr
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
    with tempfile.TemporaryDirectory(prefix="evercell-", dir=store, ignore_cleanup_errors=True) as place:
        yield Path(distributed.of_machine(place))

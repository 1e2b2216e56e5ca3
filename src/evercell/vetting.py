"""What a file of a stranger declares, looked at before it is read: sizes, links, external storage, codecs.

An HDF5 or Zarr file says of every array how large it is, and where and how its values are stored. Readers believe it:
a file of a few kilobytes can ask for terabytes, or for the content of other files of the one who reads it.
"""

from __future__ import annotations

import gzip
import io
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from evercell.errors import CellsError

SMALL = 1 << 29
"""Bytes of an array that are never too many, however few of them are stored."""
MOST_PACKED = 500
"""Bytes read per byte stored; a dense matrix of counts with one in 200 not zero, gzipped, stays below."""
PACKED_TEXT = 1100  # characters that gzip can make of a byte, at most
ASCII = bytes(range(32, 127)) + b"\t\r\n"
MOST_OBJECTS = 1_000_000
ARRAYS = ("data", "indices", "indptr")
POINTERS = ("/indices", "/indptr")
DEEPEST = 100  # groups in groups; readers go down by calling themselves
LONGEST_LINE = 1 << 27
"""Characters of a line of a table; a million cells with names of 100 letters, or as many values, have less."""
COPY = "download or copy the file again, from a source that you trust"


def vet_hdf5(path: Path) -> None:
    """Look through an HDF5 file without reading a value.

    Raises
    ------
    CellsError
        An array declares far more than is stored of it, or the file leads to others.
    OSError, ValueError
        It is no HDF5 file, or the pointers of a sparse matrix are no whole numbers.
    """
    import h5py

    with h5py.File(path, "r") as file:
        total = held = 0
        for name, dataset in _datasets(file, path):
            if dataset.external or dataset.is_virtual:
                raise _leads_away(path, name)
            if name.endswith(POINTERS) and dataset.dtype.kind not in "iu" and "data" in dataset.parent:
                raise ValueError(f"`{name}` is of type {dataset.dtype}")  # SciPy would make numbers of anything
            declared = _size(dataset.shape or (), dataset.dtype)
            stored = dataset.id.get_storage_size()
            _check_size(path, name, dataset.shape or (), declared, stored)
            total, held = total + declared, held + stored
    _check_total(path, total, held)


def vet_zarr(path: Path) -> None:
    """Look through the metadata of a Zarr folder without reading a value.

    Raises
    ------
    CellsError
        As `vet_hdf5`; or a codec would run code.
    """
    total = held = seen = 0
    for folder, _, files in os.walk(path):
        for file in {".zarray", ".zmetadata", "zarr.json"}.intersection(files):
            seen += 1
            if seen > MOST_OBJECTS:
                raise CellsError(f"`{path}` holds more than {MOST_OBJECTS:,} arrays", hint=COPY)
            try:
                told = json.loads((Path(folder) / file).read_text(encoding="utf-8"))
            except (ValueError, RecursionError) as error:
                where = _within(path, folder)
                raise CellsError(f"`{path}` is damaged: {file} of `{where}` is no JSON", hint=COPY) from error
            if _runs_code(told):
                raise CellsError(
                    f"`{path}` is refused: `{_within(path, folder)}` is stored as a pickle, which can run code",
                    hint="have it written again without the codec `pickle`",
                )
            if not (isinstance(told, dict) and isinstance(shape := told.get("shape"), list)):
                continue
            if not all(isinstance(n, int) and n >= 0 for n in shape):
                raise CellsError(f"`{path}` is damaged: `{_within(path, folder)}` has the shape {shape}", hint=COPY)
            dtype = told.get("dtype", told.get("data_type"))
            try:
                kind: np.dtype[Any] = np.dtype(dtype)
            except TypeError:  # text, or a type that the reader judges
                kind = np.dtype(object)
            if folder.endswith(POINTERS) and kind.kind not in "iu" and (Path(folder).parent / "data").is_dir():
                raise ValueError(f"`{_within(path, folder)}` is of type {kind}")
            declared = _size(shape, kind)
            stored = sum(one.stat().st_size for one in Path(folder).rglob("*") if one.is_file())
            _check_size(path, _within(path, folder), shape, declared, stored)
            total, held = total + declared, held + stored
    _check_total(path, total, held)


def check_sparse(matrix: Any, *, name: str) -> None:
    """Check a compressed sparse matrix, in memory or in a file: compiled code believes its pointers and would crash.

    Parameters
    ----------
    matrix
        SciPy's, or AnnData's of a file; of one in a file the pointers alone are read (see `check_indices`).
    name
        What messages call it.

    Raises
    ------
    ValueError
        Its arrays do not fit one another or its shape; the message says what does not.
    """
    parts, (n, m) = getattr(matrix, "group", None), matrix.shape
    n, m = (m, n) if matrix.format == "csc" else (n, m)
    data, indices, indptr = (getattr(matrix, one) if parts is None else parts[one] for one in ARRAYS)
    n_data, n_indices, n_pointers = (math.prod(one.shape) for one in (data, indices, indptr))
    problem = ""
    if n_data != n_indices:
        problem = f"{n_data:,} values and {n_indices:,} indices are stored"
    elif np.dtype(indptr.dtype).kind not in "iu" or indptr.ndim != 1 or n_pointers != n + 1:
        problem = f"`indptr` holds {n_pointers:,} pointers, and {n + 1:,} were expected"
    else:
        found = np.asarray(indptr[:]).astype(np.int64)
        if found[0] != 0 or (np.diff(found) < 0).any():
            problem = "the pointers in `indptr` do not begin at 0, or go down"
        elif found[-1] > n_data:
            problem = f"`indptr` ends at {found[-1]:,}, and {n_data:,} values are stored"
    if problem:
        raise ValueError(f"{name}: {problem}")
    if parts is None:
        check_indices(indices, m, name=name)


def check_indices(indices: np.ndarray, n: int, *, name: str) -> None:
    """Check that the indices of a compressed sparse matrix are 0 to ``n - 1``.

    Raises
    ------
    ValueError
    """
    if indices.dtype.kind not in "iu":
        raise ValueError(f"{name}: its indices are of type {indices.dtype}")
    if len(indices) and not 0 <= (least := int(indices.min())) <= (most := int(indices.max())) < n:
        odd = least if least < 0 else most
        raise ValueError(f"{name}: index {odd:,} was found, and 0 to {n - 1:,} were expected")


def vet_matrix_market(path: Path) -> tuple[int, int]:
    """Rows and columns that a Matrix Market file declares, whose number of values is checked against its size.

    Raises
    ------
    CellsError
        It declares more values than it can hold, or its values are no text: SciPy's reader ends the process over NUL.
    """
    with lines_of(path) as file:
        line = file.readline().decode("ascii", "replace")
        while line.startswith("%"):
            line = file.readline().decode("ascii", "replace")
        text = not any(part.translate(None, ASCII) for part in iter(lambda: file.read(1 << 20), b""))
    words = line.split()
    if not 2 <= len(words) <= 3 or not all(word.isdecimal() for word in words):
        raise CellsError(
            f"`{path}` is no Matrix Market file: rows, columns and values were expected, not `{line.strip()[:60]}`",
            hint="copy or download the file again",
        )
    n_rows, n_columns, n_values = (*map(int, words), 0)[:3] if len(words) == 2 else map(int, words)
    if not text:
        raise CellsError(f"`{path}` is damaged: among its values are bytes that are no text", hint=COPY)
    packed = PACKED_TEXT if path.suffix.lower() == ".gz" else 1
    most = min(n_rows * n_columns, path.stat().st_size * packed // len("1 1\n"))
    if n_values > most:
        raise CellsError(f"`{path}` is refused: it declares {n_values:,} values, and holds {most:,} at most", hint=COPY)
    return n_rows, n_columns


@contextmanager
def lines_of(path: Path) -> Iterator[BinaryIO]:
    """A text file, also ``.gz``, as bytes; a line of it cannot fill the memory.

    Raises
    ------
    CellsError
        While it is read: a line is longer than `LONGEST_LINE`.
    """
    opener = gzip.open if path.suffix.lower() == ".gz" else open
    with opener(path, "rb") as file, io.BufferedReader(_Lines(file, path)) as lines:  # type: ignore[arg-type]
        yield lines


class _Lines(io.RawIOBase):
    """Bytes of a file, as long as its lines end in time."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.file, self.path, self.length = file, path, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        part = self.file.read(len(buffer))
        buffer[: len(part)] = part
        end = part.rfind(b"\n")
        self.length = len(part) - end - 1 if end >= 0 else self.length + len(part)
        if self.length > LONGEST_LINE:
            raise CellsError(
                f"`{self.path}` is refused: a line is longer than {LONGEST_LINE:,} characters",
                hint="give a table with a line a cell or a gene",
            )
        return len(part)


def _datasets(file: Any, path: Path) -> Iterator[tuple[str, Any]]:
    """All arrays of an HDF5 file; links to other files are refused, what is linked twice is seen once."""
    import h5py

    waiting: list[tuple[str, Any, int]] = [("", file, 0)]
    seen: set[Any] = {h5py.h5o.get_info(file.id).addr}
    while waiting:
        place, group, depth = waiting.pop()
        for name in group:
            full = f"{place}/{name}" if place else name
            if isinstance(group.get(name, getlink=True), h5py.ExternalLink):
                raise _leads_away(path, full)
            item = group.get(name)  # None for a link that leads nowhere
            if item is None:
                continue
            if (known := h5py.h5o.get_info(item.id).addr) in seen:
                if isinstance(item, h5py.Group):  # readers would go round, or down two ways at every fork
                    raise CellsError(f"`{path}` is refused: its group `{full}` is linked more than once", hint=COPY)
                continue
            seen.add(known)
            if len(seen) > MOST_OBJECTS or depth > DEEPEST:
                what = f"more than {MOST_OBJECTS:,} parts" if depth <= DEEPEST else f"groups {depth} deep"
                raise CellsError(f"`{path}` is refused: it holds {what}", hint=COPY)
            if isinstance(item, h5py.Dataset):
                yield full, item
            elif isinstance(item, h5py.Group):
                waiting.append((full, item, depth + 1))


def _leads_away(path: Path, name: str) -> CellsError:
    return CellsError(
        f"`{path}` is refused: the values of `{name}` lie in another file, which it names",
        hint="have it written again with all values inside",
    )


def _size(shape: Any, dtype: np.dtype[Any]) -> int:
    return math.prod(int(n) for n in shape) * max(dtype.itemsize, 1)


def _check_size(path: Path, name: str, shape: Any, declared: int, stored: int) -> None:
    if declared > SMALL and declared > MOST_PACKED * stored:
        size = " x ".join(f"{int(n):,}" for n in shape)
        raise CellsError(
            f"`{path}` is refused: `{name}` declares {size} values, {_bytes(declared)}; {_bytes(stored)} are stored",
            hint=COPY,
        )


def _check_total(path: Path, total: int, stored: int) -> None:
    """Many arrays that are each small enough are too many together."""
    if total > 4 * SMALL and total > MOST_PACKED * stored:
        raise CellsError(
            f"`{path}` is refused: it declares {_bytes(total)} in all, and {_bytes(stored)} are stored", hint=COPY
        )


def _bytes(n: int) -> str:
    for unit, size in (("TB", 1 << 40), ("GB", 1 << 30), ("MB", 1 << 20), ("kB", 1 << 10)):
        if n >= size:
            return f"{n / size:,.1f} {unit}"
    return f"{n} bytes"


def _within(path: Path, folder: str) -> str:
    return Path(folder).relative_to(path).as_posix()


def _runs_code(told: Any) -> bool:
    """Whether a codec of the metadata, however deep in them, is pickle."""
    waiting = [told]
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict):
            if any(str(one.get(key)).rpartition(".")[2] == "pickle" for key in ("id", "name")):
                return True
            waiting.extend(one.values())
        elif isinstance(one, list):
            waiting.extend(one)
    return False

"""A file of cells written as a copy of another with columns and arrays added, whatever the number of cells.

Matrices are not read: from ``.h5ad`` to ``.h5ad`` and from ``.zarr`` to ``.zarr`` they are copied as they are stored,
compressed or not; between the two some megabytes at a time.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from evercell.errors import CellsError
from evercell.h5_files import h5_file
from evercell.outputs import atomic_path
from evercell.progress import progress
from evercell.stored_cells import there, watch

if TYPE_CHECKING:
    import pandas as pd

GROUPS = ("obsm", "varm", "obsp", "varp", "layers", "uns")
AT_ONCE = 1 << 24  # bytes
PACKED = {"compression": "gzip"}

Copy = Callable[[Any, Any, str], None]  # of one element: from a group, to a group, by name


def can_be_extended(source: Path, output: Path) -> bool:
    """Whether `extended` can write `output`: both are ``.h5ad`` or ``.zarr``, `source` of AnnData 0.8 or later."""
    kinds = (".h5ad", ".zarr")
    if source.suffix not in kinds or output.suffix not in kinds or source.is_dir() != (source.suffix == ".zarr"):
        return False
    root = _opened(source)
    try:
        return "encoding-type" in root.attrs
    finally:
        _close(root)


@progress("writing the file")
def extended(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    obs: pd.DataFrame,
    obsm: Mapping[str, np.ndarray],
    uns: Mapping[str, Any],
    check: Callable[[], None] | None = None,
) -> None:
    """Copy a file of cells with another table of cells, and further arrays and facts.

    Parameters
    ----------
    source
        ``.h5ad`` or ``.zarr`` (see `can_be_extended`); not changed, unless it is `output` too.
    output
        ``.h5ad`` or ``.zarr``; whole or absent.
    obs
        Takes the place of the table in the file.
    obsm
        Arrays (B, any), which may be mapped from files: written a part at a time.
    uns
        Added to what is there; what has the same name is replaced.
    check
        Called before the output appears: that `source` is still what `obs` was made of (see `stored_cells.watch`); by
        default, that it is what it was when the copy began.

    Raises
    ------
    CellsError
        `source` changes meanwhile, or something cannot be stored.
    OutputError
        `output` cannot be written.
    """
    source, output = Path(source), Path(output)
    check = check or watch(source)
    check()
    root = _opened(source)
    with atomic_path(output) as unfinished, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*zarr v2")
        try:
            same = source.suffix == output.suffix
            with _made(unfinished, like=root if same else None) as made:
                _fill(root, made, _copier(source, unfinished) if same else _converted, obs, obsm, uns)
        except (CellsError, MemoryError):
            raise
        except Exception as error:
            raise CellsError(f"`{output}` cannot be written: {error}") from error
        finally:
            _close(root)
        check()


def _opened(path: Path) -> Any:
    if path.suffix == ".h5ad":
        import h5py

        return h5py.File(path, "r")
    import zarr

    return zarr.open_group(str(path), mode="r")


@contextmanager
def _made(path: Path, like: Any) -> Iterator[Any]:
    """An empty file of cells; of ``.zarr`` in the format of `like`, whose arrays it is to hold."""
    with ExitStack() as stack:
        if path.suffix == ".h5ad":
            root: Any = stack.enter_context(h5_file(path))
        else:
            import zarr

            # As AnnData writes them, which is format 2 with every version of the zarr package so far.
            options: dict[str, Any] = {}
            if hasattr(zarr.Group, "metadata"):
                options["zarr_format"] = 2 if like is None else like.metadata.zarr_format
            root = zarr.open_group(str(path), mode="w", **options)
        root.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
        yield root


def _close(root: Any) -> None:
    if hasattr(root, "close"):
        root.close()


def _fill(
    root: Any,
    made: Any,
    copy: Copy,
    obs: pd.DataFrame,
    obsm: Mapping[str, np.ndarray],
    uns: Mapping[str, Any],
) -> None:
    from anndata.io import write_elem

    packed = {} if _is_zarr(made) else PACKED
    for name in ("X", "var"):
        if there(root, name):
            copy(root, made, name)
    write_elem(made, "obs", obs, dataset_kwargs=packed)
    new: dict[str, Mapping[str, Any]] = {"obsm": obsm, "uns": uns}
    for name in GROUPS:
        write_elem(made, name, {})
        for key in root.get(name, ()):
            if key not in new.get(name, {}):
                copy(root[name], made[name], key)
    if there(root, "raw"):
        write_elem(made, "raw", {})
        made["raw"].attrs.update({"encoding-type": "raw", "encoding-version": "0.1.0"})
        for key in root["raw"]:
            copy(root["raw"], made["raw"], key)
    for key, array in obsm.items():
        _write_array(made["obsm"], key, array)
        made["obsm"][key].attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
    for key, facts in uns.items():
        write_elem(made["uns"], key, facts, dataset_kwargs=packed)
    if _is_zarr(made):
        import zarr

        zarr.consolidate_metadata(made.store)


def _is_zarr(group: Any) -> bool:
    return hasattr(group, "store")


def _copier(source: Path, made: Path) -> Copy:
    """A copy of elements as they are stored, between files of one kind."""
    if source.suffix == ".h5ad":
        return lambda of, to, name: of.copy(of[name], to, name=name)

    def copied(of: Any, to: Any, name: str) -> None:
        # A group or array of a zarr is a folder of its own.
        inside = [one.path for one in (of, to)]
        shutil.copytree(source / inside[0] / name, made / inside[1] / name)

    return copied


def _converted(of: Any, to: Any, name: str) -> None:
    """Copy an element to a file of the other kind: matrices a part at a time, all else through memory."""
    from anndata.io import read_elem, write_elem

    element = of[name]
    kind = element.attrs.get("encoding-type", "")
    if kind in ("csr_matrix", "csc_matrix"):
        write_elem(to, name, {})
        made = to[name]
        shape = [int(n) for n in element.attrs["shape"]]
        made.attrs.update({"encoding-type": kind, "encoding-version": "0.1.0", "shape": shape})
        for array in ("data", "indices", "indptr"):
            _write_array(made, array, element[array])
    elif kind == "array" and len(element.shape) > 1 and np.dtype(element.dtype).kind in "biuf":
        _write_array(to, name, element)
        to[name].attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
    else:
        write_elem(to, name, read_elem(element), dataset_kwargs={} if _is_zarr(to) else PACKED)


def _write_array(group: Any, name: str, array: Any) -> None:
    """Write numbers into a group, some rows at a time."""
    facts: dict[str, Any] = {"shape": array.shape, "dtype": array.dtype}
    if not _is_zarr(group):
        # An array that is empty, or one that shall grow, is stored in chunks.
        made = group.create_dataset(name, **facts, maxshape=(None, *array.shape[1:]), **PACKED)
    elif hasattr(group, "create_array"):
        made = group.create_array(name, **facts)
    else:
        made = group.create_dataset(name, **facts)
    for rows in _spans(array):
        made[rows] = _read(array, rows)


def _read(array: Any, rows: slice) -> np.ndarray:
    """Rows of an array; those of a mapped file are read, because pages that were looked at count as memory."""
    if isinstance(array, np.memmap) and array.filename and array.nbytes == os.path.getsize(array.filename):
        width = int(np.prod(array.shape[1:], dtype=np.int64))
        found = np.fromfile(
            array.filename, array.dtype, (rows.stop - rows.start) * width, offset=rows.start * width * array.itemsize
        )
        return found.reshape(-1, *array.shape[1:])
    part: np.ndarray = array[rows]
    return part


def _spans(array: Any) -> Iterator[slice]:
    """Runs of rows of about `AT_ONCE` bytes, of whole chunks where it is stored in chunks."""
    row = max(1, int(np.prod(array.shape[1:], dtype=np.int64)) * np.dtype(array.dtype).itemsize)
    chunk = (getattr(array, "chunks", None) or (1,))[0]
    step = max(1, AT_ONCE // row // chunk) * chunk
    for start in range(0, array.shape[0], step):
        yield slice(start, min(start + step, array.shape[0]))

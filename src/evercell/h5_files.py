"""HDF5 files written so that a full disk is an error.

HDF5 writes much of a file when it is closed. If that fails, the file stays open in the library, which then may crash
the process when another file is closed, or at its end. So the bytes go through a file of Python, which after a failure
lets the library believe that all was written: it can close, and the failure is raised.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import h5py
    from anndata import AnnData

MAPPINGS = ("obsm", "varm", "obsp", "varp", "layers", "uns")


@contextmanager
def h5_file(path: Path) -> Iterator[h5py.File]:
    """A new HDF5 file.

    Raises
    ------
    OSError
        What went wrong first where a write failed; the file is closed then, and not whole.
    """
    import h5py

    with _Patient(path) as raw:
        try:
            with h5py.File(raw, "w") as root:
                yield root
        except Exception as error:
            if raw.failure is None or error is raw.failure:
                raise
            raise raw.failure from error
        if raw.failure is not None:
            raise raw.failure


def write_h5ad(path: Path, adata: AnnData, **how: Any) -> None:
    """Write an AnnData to a new ``.h5ad``; `how` are settings of all arrays, such as ``compression``."""
    with h5_file(path) as root:
        write_tables(root, adata, **how)


def write_tables(root: h5py.File, adata: AnnData, **how: Any) -> None:
    """Write all that an AnnData holds, in the order of its own writer."""
    from anndata.io import write_elem

    root.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
    parts = {"X": adata.X, "raw": adata.raw, "obs": adata.obs, "var": adata.var}
    parts = {name: one for name, one in parts.items() if one is not None}
    for name, one in (parts | {name: dict(getattr(adata, name)) for name in MAPPINGS}).items():
        write_elem(root, name, one, dataset_kwargs=how)


class _Patient(io.FileIO):
    """A file that takes all writes after one has failed, and remembers the first failure."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "w+")
        self.failure: OSError | None = None

    def write(self, data: Any) -> int:
        """Write all of it, or nothing more from then on."""
        given = memoryview(data).cast("B")
        done = 0
        while self.failure is None and done < len(given):
            try:
                done += super().write(given[done:]) or 0
            except OSError as error:
                self.failure = error
        return len(given)

    def truncate(self, size: int | None = None) -> int:
        """Change the size, as far as there is room."""
        try:
            return super().truncate(size)
        except OSError as error:
            self.failure = self.failure or error
            return size or 0

    def readinto(self, buffer: Any) -> int:
        """Read; what could not be written reads as nothing."""
        found = super().readinto(buffer) or 0
        view = memoryview(buffer).cast("B")
        if self.failure is not None:
            view[found:] = bytes(len(view) - found)
            return len(view)
        return found

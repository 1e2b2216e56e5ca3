"""Cells whose matrices stay in their file: ``X``, layers, ``raw``, ``obsm`` and ``obsp`` are read where they are used.

AnnData's own backed mode leaves only ``X`` and ``raw`` in an ``.h5ad``; layers and embeddings come into memory whole.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from evercell.errors import CellsError
from evercell.vetting import check_sparse

if TYPE_CHECKING:
    from anndata import AnnData

OF_CELLS = ("layers", "obsm", "obsp")  # groups of matrices that grow with the cells
OTHERS = ("obs", "var", "uns", "varm", "varp")


def file_facts(path: Path) -> list[tuple[str, int, int]]:
    """Path, size and time of a file, or of all files of a ``.zarr``: they tell whether it has changed."""
    inside = sorted(one for one in path.rglob("*") if one.is_file()) if path.is_dir() else [path]
    found = []
    for one in inside:
        try:
            state = one.stat()
        except OSError:  # gone: a change too
            continue
        found.append((str(one), state.st_size, state.st_mtime_ns))
    return found


def watch(path: str | os.PathLike[str]) -> Callable[[], None]:
    """Give a check that a file is as it is now; to be called when it was read, before anything made of it is written.

    The check raises a `CellsError`. Of a folder with a 10x matrix, where other files may come and go, it asks nothing.
    """
    path = Path(path)
    before = file_facts(path) if path.suffix == ".zarr" or path.is_file() else None

    def check() -> None:
        if before is not None and file_facts(path) != before:
            raise CellsError(
                f"`{path}` has changed while it was read", hint="wait until it is written, then run the same call again"
            )

    return check


def open_h5ad(path: Path) -> AnnData:
    """An ``.h5ad`` with its matrices left in it. Files of before AnnData 0.8 are opened in AnnData's backed mode."""
    import h5py
    from anndata import AnnData
    from anndata.io import read_h5ad

    file = h5py.File(path, "r")
    if "encoding-type" not in file.attrs:
        file.close()
        return read_h5ad(path, backed="r")
    parts = _parts(file)
    _check_shapes(parts | ({"X": stored(file["X"])} if there(file, "X") else {}))
    if not there(file, "X"):  # AnnData's backed mode needs one
        return AnnData(**parts)
    if "raw" in parts:
        del parts["raw"]["X"]  # found by its name
    return AnnData(filename=path, filemode="r", **parts)


def open_zarr(path: Path) -> AnnData:
    """A ``.zarr`` with its matrices left in it; one of before AnnData 0.8 is read whole."""
    import zarr
    from anndata import AnnData
    from anndata.io import read_zarr

    root = zarr.open_group(str(path), mode="r")
    if "encoding-type" not in root.attrs:
        return read_zarr(path)
    parts = _parts(root) | ({"X": stored(root["X"])} if there(root, "X") else {})
    _check_shapes(parts)
    return AnnData(**parts)


def _parts(root: Any) -> dict[str, Any]:
    """Everything but ``X`` of an open file, as AnnData takes it."""
    from anndata.io import read_elem

    parts: dict[str, Any] = {name: read_elem(root[name]) for name in OTHERS if name in root}
    parts |= {name: {key: stored(root[name][key]) for key in root[name]} for name in OF_CELLS if name in root}
    if there(root, "raw"):
        raw = root["raw"]
        parts["raw"] = {key: read_elem(raw[key]) for key in ("var", "varm") if key in raw} | {"X": stored(raw["X"])}
    return parts


def sound(adata: AnnData) -> AnnData:
    """The cells of a file that was read whole, if its sparse matrices can be used.

    Raises
    ------
    ValueError
        The pointers or indices of one do not fit it.
    """
    import scipy.sparse as sp

    raw = adata.raw
    found = {"X": adata.X, "raw/X": None if raw is None else raw.X}
    for name in ("layers", "obsm", "varm", "obsp", "varp"):
        found |= {f"{name}/{key}": matrix for key, matrix in getattr(adata, name).items()}
    for name, matrix in found.items():
        if sp.issparse(matrix) and matrix.format in ("csr", "csc"):
            check_sparse(matrix, name=f"`{name}`")
    return adata


def _check_shapes(parts: dict[str, Any]) -> None:
    """Check matrices that stay in the file as AnnData checks those in memory: it believes those in a file."""
    if missing := [name for name in ("obs", "var") if name not in parts]:
        raise ValueError(f"there is no `{missing[0]}`")
    n_cells, n_genes = len(parts["obs"]), len(parts["var"])
    matrices = {f"layers/{key}": matrix for key, matrix in parts.get("layers", {}).items()}
    if "X" in parts:
        matrices["X"] = parts["X"]
    for name, matrix in matrices.items():
        if tuple(matrix.shape) != (n_cells, n_genes):
            shape = " x ".join(map(str, matrix.shape))
            raise ValueError(f"`{name}` is {shape}, for {n_cells} cells and {n_genes} genes")
    raw = parts.get("raw")
    if raw is not None and tuple(raw["X"].shape) != (n_cells, len(raw["var"])):
        raise ValueError(f"`raw/X` does not fit its {n_cells} cells and {len(raw['var'])} genes")


def there(group: Any, name: str) -> bool:
    """Whether a group has an element, and not as a mark that there is none."""
    return name in group and group[name].attrs.get("encoding-type") != "null"


def stored(element: Any) -> Any:
    """A matrix of numbers as it lies in the file, to be sliced; anything else in memory."""
    from anndata.io import read_elem, sparse_dataset

    if element.attrs.get("encoding-type") in ("csr_matrix", "csc_matrix"):
        matrix = sparse_dataset(element)
        check_sparse(matrix, name=f"`{element.name.strip('/')}`")
        return matrix
    # Groups have no dtype.
    if len(getattr(element, "shape", ())) > 1 and np.dtype(element.dtype).kind in "biufc":
        return element
    return read_elem(element)


def stored_csr(group: Any, shape: tuple[int, int]) -> Any:
    """The arrays ``data``, ``indices`` and ``indptr`` of an HDF5 group as AnnData's matrix in a file.

    Parameters
    ----------
    group
        h5py group, of a file that was not written by AnnData.
    shape
        Rows and columns.
    """
    import h5py
    from anndata.io import sparse_dataset

    class Attributes(dict[str, Any]):
        """AnnData names the second argument of `get`, as h5py does and a dict does not."""

        def get(self, key: str, default: Any = None) -> Any:
            return super().get(key, default)

    class Described(h5py.Group):
        """The group, with the attributes that AnnData would have written."""

        @property
        def attrs(self) -> Attributes:
            return Attributes({"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": np.array(shape)})

    matrix = sparse_dataset(Described(group.id))
    check_sparse(matrix, name=f"`{group.name.strip('/')}`")
    return matrix

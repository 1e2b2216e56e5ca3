"""Cells whose matrices stay in their file: ``X``, layers, ``raw``, ``obsm`` and ``obsp`` are read where they are used.

AnnData's own backed mode leaves only ``X`` and ``raw`` in an ``.h5ad``; layers and embeddings come into memory whole.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from anndata import AnnData

OF_CELLS = ("layers", "obsm", "obsp")  # groups of matrices that grow with the cells
OTHERS = ("obs", "var", "uns", "varm", "varp")


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
    parts = _parts(root)
    return AnnData(X=stored(root["X"]) if there(root, "X") else None, **parts)


def _parts(root: Any) -> dict[str, Any]:
    """Everything but ``X`` of an open file, as AnnData takes it."""
    from anndata.io import read_elem

    parts: dict[str, Any] = {name: read_elem(root[name]) for name in OTHERS if name in root}
    parts |= {name: {key: stored(root[name][key]) for key in root[name]} for name in OF_CELLS if name in root}
    if there(root, "raw"):
        raw = root["raw"]
        parts["raw"] = {key: read_elem(raw[key]) for key in ("var", "varm") if key in raw} | {"X": stored(raw["X"])}
    return parts


def there(group: Any, name: str) -> bool:
    """Whether a group has an element, and not as a mark that there is none."""
    return name in group and group[name].attrs.get("encoding-type") != "null"


def stored(element: Any) -> Any:
    """A matrix of numbers as it lies in the file, to be sliced; anything else in memory."""
    from anndata.io import read_elem, sparse_dataset

    if element.attrs.get("encoding-type") in ("csr_matrix", "csc_matrix"):
        return sparse_dataset(element)
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

    return sparse_dataset(Described(group.id))

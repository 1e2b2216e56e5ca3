"""A store of labels: a folder with a small ``.h5ad`` without counts for each part, and ``manifest.json``.

Parts and manifest appear whole. A store is whole when its manifest says that the call that writes it has ended.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from evercell.errors import CellsError
from evercell.outputs import atomic_path

if TYPE_CHECKING:
    from anndata import AnnData

FORMAT = 1  # of the manifest
MANIFEST, PARTS = "manifest.json", "parts"


def read_labels(store: str | os.PathLike[str]) -> pd.DataFrame:
    """All labels of a store.

    Returns
    -------
    pandas.DataFrame
        One row a cell, in the order of the manifest: ``file``, then the columns that `annotate` writes. Cells of files
        that could not be labelled are not in it.

    Raises
    ------
    CellsError
        It is no store, or the call that writes it has not ended.

    Examples
    --------
    >>> read_labels("labels")["evercell"].value_counts()  # doctest: +SKIP
    """
    manifest = manifest_of(Path(store))
    if manifest is None or not manifest["ended"]:
        what = "is no store of labels" if manifest is None else "is not complete"
        raise CellsError(f"`{store}` {what}", hint="run `evercell annotate ... --output` with this folder (again)")
    tables, files = [], []
    for entry in manifest["files"]:
        if "error" not in entry:
            tables += [part.obs for part in stored(Path(store), entry["parts"])]
            files += [entry["file"]] * entry["cells"]
    if not tables:
        raise CellsError(f"no file of `{store}` could be labelled", hint=f"see {MANIFEST} in it")
    found = pd.concat(tables)
    found.insert(0, "file", pd.Categorical(files))
    return found


def stored(store: Path, names: Iterable[str]) -> Iterator[AnnData]:
    """Parts: labels in ``obs``, and in ``uns`` what else `annotate` says."""
    from anndata.io import read_h5ad

    return (read_h5ad(store / PARTS / name) for name in names)


def manifest_of(store: Path) -> dict[str, Any] | None:
    """The manifest; None where a folder is no store."""
    try:
        manifest = json.loads((store / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return manifest if isinstance(manifest, dict) and manifest.get("format") == FORMAT else None


def write_manifest(store: Path, facts: dict[str, Any], *, ended: bool) -> dict[str, Any]:
    """Write the manifest, and give it back."""
    manifest = {"format": FORMAT, "ended": ended, **facts}
    with atomic_path(store / MANIFEST) as unfinished:
        unfinished.write_text(json.dumps(manifest, indent=1, ensure_ascii=False), encoding="utf-8")
    return manifest


def make_store(store: Path) -> None:
    """Make an empty store, or take up one that is there.

    Raises
    ------
    CellsError
        Something else is there, or it cannot be made.
    """
    there = manifest_of(store) is not None
    if not there and store.exists() and (not store.is_dir() or any(store.iterdir())):
        raise CellsError(f"`{store}` is already there, and is no store of labels", hint="choose another --output")
    try:
        store.mkdir(exist_ok=True)
        if not there:
            write_manifest(store, {"files": []}, ended=False)  # from now on all that is in it is ours
        (store / PARTS).mkdir(exist_ok=True)
    except OSError as error:
        raise CellsError(f"`{store}` cannot be made: {error.strerror}", hint="choose another --output") from error


def keep_parts(store: Path, names: set[str]) -> None:
    """Remove all other parts, and what processes that died had begun."""
    for one in (store / PARTS).iterdir():
        if one.name not in names:
            one.unlink()

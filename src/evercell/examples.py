"""Small real data sets that come with evercell: human pancreas from four studies, and raw samples of mouse lung.

Of the pancreas there are three stages and one unseen study. Stage 2 brings a type that stage 1 does not hold
(endothelial), and its stellate cells are not split as stage 1's are. The unseen study is there to test on. The lung
comes as three 10x folders and a table of cells, as raw data do. The README.md in each folder of ``data`` names the
studies to cite.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from evercell.errors import SettingsError

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["EXAMPLES", "SETS", "Example", "copy_examples", "describe", "example_path", "load_example"]

EXAMPLES = ("baron_stage1", "fasolino_stage2", "muraro_stage3", "tritschler_unseen")
"""Names of the examples, in the order of the stages."""

SETS = {"pancreas": "pancreas", "mouse-lung": "mouse_lung"}
"""Name of a set of example files -> its folder in ``data``."""


@dataclass(frozen=True)
class Example:
    """What is to be known of one example before it is used or passed on.

    Attributes
    ----------
    name
        One of `EXAMPLES`.
    n_cells, n_genes
        Shape of its counts.
    source
        The study and the copy that the cells were drawn from.
    licence
        Licence of the data, as far as it is stated.
    notes
        How cells and genes were drawn.
    """

    name: str
    n_cells: int
    n_genes: int
    source: str
    licence: str
    notes: str


def example_path(name: str) -> Path:
    """Path of an example's ``.h5ad`` file.

    Parameters
    ----------
    name
        One of `EXAMPLES`.

    Raises
    ------
    SettingsError
        If there is no such example.

    Examples
    --------
    >>> example_path("baron_stage1").name
    'baron_stage1.h5ad'
    """
    if name not in EXAMPLES:
        raise SettingsError(f"there is no example `{name}`", hint=f"choose one of: {', '.join(EXAMPLES)}")
    return Path(__file__).parent / "data" / "pancreas" / f"{name}.h5ad"


def copy_examples(name: str, folder: Path) -> list[Path]:
    """Copy a set of example files.

    Parameters
    ----------
    name
        ``pancreas`` (four ``.h5ad``) or ``mouse-lung`` (three 10x folders and ``cells.csv``).
    folder
        To be made; it must not be there yet, or be empty.

    Returns
    -------
    list of Path
        What lies in the folder now, sorted.

    Raises
    ------
    SettingsError
        If there is no such set, or the folder holds something.
    CellsError
        If the folder cannot be made.
    """
    from evercell.outputs import atomic_path

    if name not in SETS:
        raise SettingsError(f"there are no examples `{name}`", hint=f"choose one of: {', '.join(SETS)}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise SettingsError(f"`{folder}` is already there", hint="choose another --output")
    if folder.exists():
        folder.rmdir()
    with atomic_path(folder) as unfinished:
        shutil.copytree(Path(__file__).parent / "data" / SETS[name], unfinished)
    return sorted(folder.iterdir())


def load_example(name: str) -> AnnData:
    """Cells of an example: counts in ``X``, ``cell_type``, ``donor``, ``dataset`` and ``technology`` in ``obs``.

    Parameters
    ----------
    name
        One of `EXAMPLES`.

    Returns
    -------
    anndata.AnnData
        Counts (cells, genes), CSR of unsigned integers, gene symbols as ``var_names``; the same genes in every example.

    Raises
    ------
    SettingsError
        If there is no such example.
    """
    from evercell.cells import read_cells

    return read_cells(example_path(name))


def describe(name: str) -> Example:
    """Source, licence and size of an example, without reading its counts.

    Parameters
    ----------
    name
        One of `EXAMPLES`.

    Raises
    ------
    SettingsError
        If there is no such example.
    """
    import h5py

    with h5py.File(example_path(name)) as file:
        n_cells, n_genes = (int(n) for n in file["X"].attrs["shape"])
        source, licence, notes = (file["uns"][key].asstr()[()] for key in ("source", "licence", "notes"))
    return Example(name, n_cells, n_genes, source, licence, notes)

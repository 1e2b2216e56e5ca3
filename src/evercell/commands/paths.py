"""Files that commands are given: read with a word about what is in them, and checked before a long run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from evercell import outputs
from evercell.commands.console import Console
from evercell.errors import CellsError, SettingsError

if TYPE_CHECKING:
    from anndata import AnnData

CELL_SUFFIXES = (".h5ad", ".zarr")
TABLE_SUFFIXES = (".csv", ".tsv", ".csv.gz", ".tsv.gz")


def read_file(path: Path, console: Console, *, layer: str | None = None, backed: bool = False) -> AnnData:
    """Cells of a file; where `backed`, the counts of an .h5ad stay in the file."""
    from evercell.cells import read_cells

    adata = read_cells(path, layer=layer, backed=backed and path.suffix == ".h5ad")
    console.note(f"`{path}`: {adata.n_obs:,} cells, {adata.n_vars:,} genes")
    return adata


def is_table(path: Path) -> bool:
    """Whether a path is that of a table."""
    return path.name.lower().endswith(TABLE_SUFFIXES)


def check_file_output(path: Path, suffixes: Sequence[str], *, option: str = "--output") -> None:
    """Whether a file of a kind can be written, said before the work rather than after it."""
    if not path.name.lower().endswith(tuple(suffixes)):
        raise CellsError(f"`{path}` does not end in {' or '.join(suffixes)}", hint=f"change the suffix of {option}")
    outputs.check_folder(path, option)


def check_report(path: Path | None) -> None:
    """Whether the page that --report names, if it does, can be written."""
    if path is not None:
        check_file_output(path, (".html",), option="--report")


def check_model_output(path: Path, *, overwrite: bool) -> None:
    """Whether a model can be written, said before a long run rather than after it."""
    outputs.check_model_output(path, overwrite=overwrite)
    outputs.check_folder(path, "--output")


def file_names(files: Sequence[Path]) -> list[str]:
    """A name of each file, for messages and the ledger; no file may be given twice."""
    places = [file.resolve() for file in files]
    for number, file in enumerate(files):
        if places[number] in places[:number]:
            raise SettingsError(f"`{file}` is given twice", hint="give each file once")
    names = [file.name for file in files]
    return names if len(set(names)) == len(names) else [str(file) for file in files]

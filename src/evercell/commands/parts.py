"""`annotate` of a folder of files, or by several processes or a cluster: labels are made in parts."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer

from evercell.commands.console import Console
from evercell.commands.paths import TABLE_SUFFIXES, check_file_output, is_table
from evercell.errors import CellsError, SettingsError
from evercell.model_card import table
from evercell.outputs import check_folder, remove_whole
from evercell.registry import AUTO


def in_parts(file: Path, output: Path, *, engine: str, workers: int | None) -> bool:
    """Whether what `annotate` is asked for are labels in parts."""
    from evercell.atlas import is_folder_of_files

    return engine != "local" or workers is not None or _is_folder(output) or is_folder_of_files(file)


def annotate_parts(
    file: Path, output: Path, console: Console, *, for_one: Mapping[str, Any], as_json: bool, **options: Any
) -> None:
    """Label the cells of one file or many into a folder, or of one file into a table by way of a hidden folder.

    `for_one` are options, by name, that need all cells of one file at once; `options` those of `annotate_files`.
    """
    from evercell.atlas import annotate_files
    from evercell.cells import write_table
    from evercell.label_store import PARTS, read_labels

    _check(file, output, model=options["model"], given=[f"--{name}" for name, value in for_one.items() if value])
    started = time.perf_counter()
    store = output if _is_folder(output) else output.with_name(f".{output.name}.parts")
    manifest = annotate_files(source=file, store=store, shown=console.shown, **options)
    files = manifest["files"]
    failed = [one for one in files if "error" in one]
    for one in failed:
        console.error(one["error"] if len(files) == 1 else f"`{one['file']}`: {one['error']}", one["hint"])
    if len(failed) == len(files):
        if store != output and not any((store / PARTS).iterdir()):
            remove_whole(store)
        raise typer.Exit(2)
    if store != output:
        write_table(read_labels(store).drop(columns="file").rename_axis("cell"), output)
        remove_whole(store)
    n_cells, n_parts = manifest["cells"], sum(len(one["parts"]) for one in files)
    n_files = f"{len(files) - len(failed):,} of {len(files):,} files" if failed else f"files: {len(files):,}"
    console.note(f"cells: {n_cells:,}, {n_files}, parts: {n_parts:,}")
    if failed:
        console.warning("the same command tries again those that failed, and keeps what is done")
    console.note(f"written: {output}")
    rows = [[name, f"{number:,}", f"{100 * number / n_cells:.1f} %"] for name, number in manifest["labels"].items()]
    data = {"output": output, **manifest, "seconds": round(time.perf_counter() - started, 1)}
    console.result(table(["type", "cells", "share"], rows), data, as_json=as_json)
    if failed:
        raise typer.Exit(1)


def _is_folder(output: Path) -> bool:
    return output.suffix == "" or (output.is_dir() and output.suffix != ".zarr")


def _check(file: Path, output: Path, *, model: str, given: list[str]) -> None:
    """Whether labels can be made in parts as asked, said before the work."""
    from evercell.atlas import is_folder_of_files

    if given:
        raise SettingsError(
            f"{given[0]} needs all cells of one file at once",
            hint=f"leave {given[0]} out, or label one FILE to an .h5ad or .csv without --engine and --workers",
        )
    if model == AUTO:
        raise SettingsError(
            "--model auto looks at all cells of one file", hint="name a model; `evercell models list` shows them"
        )
    if _is_folder(output):
        check_folder(output, "--output")
    elif is_table(output) and is_folder_of_files(file):
        raise CellsError(f"`{output}` is one file, `{file}` a folder of files", hint="give --output a folder")
    elif output.suffix in (".h5ad", ".zarr"):
        raise CellsError(
            f"`{output}` cannot be written in parts", hint="give --output a folder, or a .csv where FILE is one file"
        )
    else:
        check_file_output(output, TABLE_SUFFIXES)

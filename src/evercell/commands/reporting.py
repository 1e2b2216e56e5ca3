"""`report`: one page about annotated cells, or about a model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from evercell import registry
from evercell.commands.annotating import check_column
from evercell.commands.console import Console, examples
from evercell.commands.models import load_model
from evercell.commands.options import Json
from evercell.commands.paths import check_file_output
from evercell.errors import ModelError, SettingsError

if TYPE_CHECKING:
    from anndata import AnnData

    from evercell.annotator import Annotator


def report(
    context: typer.Context,
    *,
    file: Annotated[
        Path,
        typer.Argument(metavar="FILE|MODEL", help="A file that was annotated, or the name or directory of a model."),
    ],
    output: Annotated[
        Path, typer.Option("--output", metavar="FILE", help="The page, one .html file; replaced if it is there.")
    ] = Path("report.html"),
    key: Annotated[str, typer.Option("--key", metavar="NAME", help="Column of obs with the labels.")] = "evercell",
    truth: Annotated[
        str | None, typer.Option("--truth", metavar="KEY", help="Column of obs with true types, to score against.")
    ] = None,
    old_labels: Annotated[
        str | None,
        typer.Option(
            "--old-labels", metavar="KEY", help="Column of obs with earlier labels or clusters. Found if not given."
        ),
    ] = None,
    basis: Annotated[
        str | None,
        typer.Option(
            "--basis", metavar="KEY", help="Map that is in obsm already, such as X_umap; if not given, one is made."
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model", metavar="NAME|DIR", help="The model that annotated FILE, for its stages. Found by name."
        ),
    ] = None,
    title: Annotated[str | None, typer.Option("--title", metavar="TEXT", help="Heading of the page.")] = None,
    as_json: Json = False,
) -> None:
    """Write a page about annotated cells or about a model.

    One .html file that asks no other machine for anything, for a browser, a phone or the printer.
    """
    console: Console = context.obj
    check_file_output(output, (".html",))
    if (folder := _model_folder(file)) is not None:
        given = {"--truth": truth, "--old-labels": old_labels, "--basis": basis, "--model": model}
        if wrong := [option for option, value in given.items() if value is not None]:
            raise SettingsError(f"{wrong[0]} is for a file of cells; `{file}` is a model", hint=f"leave out {wrong[0]}")
        model_page(load_model(str(file), console), output, name=folder.name, card=registry.card(folder), title=title)
        facts: dict[str, Any] = {"report": output, "model": folder.name}
    else:
        facts = _cells_page(
            file, output, console, model=model, key=key, truth=truth, old_labels=old_labels, basis=basis, title=title
        )
    console.result(f"report: {output}", facts, as_json=as_json)


def model_page(model: Annotator, output: Path, *, name: str, card: str, title: str | None = None) -> None:
    """Write the page about a model."""
    from evercell.reporting.model_report import write_model_report

    write_model_report(model, output, name=name, card=card, title=title)


def _model_folder(path: Path) -> Path | None:
    """The directory of a model that a name or path leads to; None for a file of cells, there or not."""
    if path.is_file() or path.suffix:
        return None
    try:
        return registry.find(str(path))
    except ModelError:
        if path.is_dir():
            return None  # a .zarr without its suffix, or nothing that can be read: reading it says so
        raise


def _cells_page(
    file: Path, output: Path, console: Console, *, model: str | None, key: str, title: str | None, **options: Any
) -> dict[str, Any]:
    from evercell.cells import read_cells
    from evercell.reporting import write_report

    adata = read_cells(file, backed=file.suffix == ".h5ad")
    console.note(f"`{file}`: {adata.n_obs:,} cells, {adata.n_vars:,} genes")
    check_column(adata, key, name=str(file), option="--key", hint="`evercell annotate` the file first, or ")
    for option, column in (("--truth", options["truth"]), ("--old-labels", options["old_labels"])):
        if column is not None:
            check_column(adata, column, name=str(file), option=option)
    stages = _stages(adata, key, model, console)
    title = title or f"Cell types of {file.name}"
    write_report(adata, output, key=key, title=title, stages=stages, **options)
    return {"report": output, "cells": adata.n_obs, "stages": len(stages)}


def _stages(adata: AnnData, key: str, model: str | None, console: Console) -> Sequence[Mapping[str, Any]]:
    """Stages of the model that annotated the cells, where it is found and still the same."""
    from evercell.ledger import Ledger

    info = adata.uns.get(key, {})
    name = model or str(info.get("model") or "")
    if not name:
        return ()
    try:
        folder = registry.find(name)
        now = json.loads((folder / "annotator.json").read_text(encoding="utf-8")).get("fingerprint")
        text = (folder / "ledger.jsonl").read_text(encoding="utf-8")
    except (ModelError, OSError, ValueError):
        if model is not None:
            raise
        console.note(f"the model `{name}` was not found; with --model DIR the page tells its stages too")
        return ()
    before = info.get("model_fingerprint")
    if before is not None and str(before) != now:
        words = f"`{folder}` is not the model that annotated the cells: its fingerprint is another"
        if model is not None:
            raise ModelError(words, hint="give the directory of that model with --model, or leave it out")
        console.note(f"{words}; its stages are left out")
        return ()
    return [stage.facts for stage in Ledger.from_text(text, name=str(folder / "ledger.jsonl"))]


COMMANDS = {
    report: examples(
        "evercell report annotated.h5ad --output report.html",
        "evercell report annotated.h5ad --truth cell_type --basis X_umap",
        "evercell report human-pancreas --output model.html",
    ),
}

"""`demo`, `example` and `doctor`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from evercell.commands.console import Console, examples
from evercell.commands.models import load_model
from evercell.commands.options import Device, GeneColumn, Json, Layer, Seed, Species
from evercell.commands.paths import check_parent
from evercell.errors import SettingsError


def demo(
    context: typer.Context,
    *,
    output: Annotated[
        Path, typer.Option("--output", metavar="DIR", help="Folder for the model, the labels and the report.")
    ] = Path("evercell-demo"),
    seed: Seed = 0,
    samples: Annotated[int | None, typer.Option("--samples", hidden=True, help="Training cells, for tests.")] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Train on packaged cells and label others.

    Real cells of the human pancreas: a model is trained on one study and labels three that it has not seen. Takes less
    than two minutes on two cores and no network.
    """
    from dataclasses import replace

    from evercell.demo import run_demo
    from evercell.finetuning import ModelSettings
    from evercell.training import choose_device

    console: Console = context.obj
    check_parent(output, "--output")
    choose_device(device)
    settings = ModelSettings()
    if samples is not None:
        settings = replace(settings, training=replace(settings.training, samples=samples))
    found = run_demo(output, seed=seed, settings=settings, device=device, shown=console.shown, say=console.note)
    console.result(found.table(), found.to_dict(), as_json=as_json)


def example(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="pancreas or mouse-lung.")],
    *,
    output: Annotated[Path, typer.Option("--output", metavar="DIR", help="Folder to be made.")],
    as_json: Json = False,
) -> None:
    """Write packaged example files.

    pancreas: four labelled studies (.h5ad). mouse-lung: three raw 10x folders and a table of their cells.
    """
    from evercell.examples import copy_examples

    console: Console = context.obj
    check_parent(output, "--output")
    written = copy_examples(name, output)
    console.result("\n".join(map(str, written)), {"output": output, "files": written}, as_json=as_json)


def doctor(
    context: typer.Context,
    *,
    file: Annotated[Path | None, typer.Argument(metavar="[FILE]", help="Cells to check as well.")] = None,
    model: Annotated[
        str | None, typer.Option("--model", metavar="NAME|DIR", help="Check FILE against the genes of this model.")
    ] = None,
    layer: Layer = None,
    species: Species = "auto",
    gene_column: GeneColumn = None,
    strict: Annotated[bool, typer.Option("--strict", help="Exit code 1 where there are warnings.")] = False,
    as_json: Json = False,
) -> None:
    """Check the installation and a file.

    Of a file: what it holds, whether evercell can use it, and what mends it.
    """
    from evercell.doctor import check_cells, check_installation

    console: Console = context.obj
    if model is not None and file is None:
        raise SettingsError("--model is there to check a file against", hint="give the file too")
    vocabulary = None if model is None else load_model(model, console).vocabulary
    findings = check_installation()
    if file is not None:
        findings += check_cells(file, vocabulary, layer=layer, species=species, gene_column=gene_column)
    errors, warnings = (sum(one.level == level for one in findings) for level in ("error", "warning"))
    lines = []
    for one in findings:
        lines.append(f"{one.level:<9}{one.subject}: {one.message}")
        if one.mend:
            lines.append(f"{'':<9}  -> {one.mend}")
    lines.append(f"errors: {errors}, warnings: {warnings}" if errors or warnings else "nothing to mend")
    data = {"ok": not errors, "errors": errors, "warnings": warnings, "findings": [vars(one) for one in findings]}
    console.result("\n".join(lines), data, as_json=as_json)
    if errors:
        raise typer.Exit(2)
    if strict and warnings:
        raise typer.Exit(1)


COMMANDS = {
    demo: examples("evercell demo", "evercell demo --output pancreas --json"),
    example: examples("evercell example mouse-lung --output raw", "evercell example pancreas --output studies --json"),
    doctor: examples(
        "evercell doctor",
        "evercell doctor query.h5ad --model model",
        "evercell doctor query.h5ad --strict --json",
    ),
}

"""`demo`, `example` and `doctor`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from evercell.commands.console import Console, examples
from evercell.commands.models import load_model
from evercell.commands.options import Device, GeneColumn, Json, KeyAdded, Layer, Seed, Species
from evercell.errors import SettingsError
from evercell.outputs import check_folder


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
    check_folder(output, "--output")
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
    check_folder(output, "--output")
    written = copy_examples(name, output)
    console.result("\n".join(map(str, written)), {"output": output, "files": written}, as_json=as_json)


def doctor(
    context: typer.Context,
    *,
    file: Annotated[
        Path | None, typer.Argument(metavar="[FILE]", help="Cells to check as well, before or after `annotate`.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", metavar="NAME|DIR", help="Compare FILE with what this model was trained on."),
    ] = None,
    layer: Layer = None,
    species: Species = "auto",
    gene_column: GeneColumn = None,
    key_added: KeyAdded = "evercell",
    device: Device = "auto",
    strict: Annotated[bool, typer.Option("--strict", help="Exit code 1 where there are warnings.")] = False,
    as_json: Json = False,
) -> None:
    """Check the installation and a file.

    Of a file: what it holds, whether its cells look like cells, and what mends it; with --model what the labels of a
    sample of its cells would be like; of an annotated file whether its labels can be believed.
    """
    from evercell.cells import kind_of
    from evercell.doctor import check_installation, examine, number_of

    console: Console = context.obj
    if file is not None:
        kind_of(file)  # what is not there has no findings
    if model is not None and file is None:
        raise SettingsError("--model is there to check a file against", hint="give the file too")
    annotator = None if model is None else load_model(model, console)
    findings = check_installation()
    if file is not None:
        findings += examine(
            file, annotator, key=key_added, layer=layer, species=species, gene_column=gene_column, device=device
        )
    errors, warnings = (number_of(findings, severity) for severity in ("error", "warning"))
    lines = [line for one in findings for line in one.lines()]
    lines.append(f"errors: {errors}, warnings: {warnings}" if errors or warnings else "nothing to mend")
    data = {"ok": not errors, "errors": errors, "warnings": warnings, "findings": [one.to_dict() for one in findings]}
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
        "evercell doctor annotated.h5ad --model model",
        "evercell doctor query.h5ad --strict --json",
    ),
}

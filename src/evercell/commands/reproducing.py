"""`reproduce`: the stages of a model run again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from evercell.commands.console import Console, examples
from evercell.commands.models import Directory
from evercell.commands.options import Device, Json, Overwrite
from evercell.commands.paths import check_model_output
from evercell.registry import find


def reproduce(
    context: typer.Context,
    directory: Directory,
    *,
    data: Annotated[
        list[Path] | None,
        typer.Option("--data", metavar="FILE|FOLDER", help="Cells of the stages, found by their content. Repeatable."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", metavar="DIR", help="Write the model that comes out here as well.")
    ] = None,
    device: Device = "auto",
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Run the stages of a model again and compare.

    Every stage in the ledger is run from its data, settings and seed, and the model that comes out is compared with the
    one that came out then. Exit code 1 at the first stage that differs, with what is known of the reason.
    """
    from evercell.checkpoint import save
    from evercell.model_card import model_card
    from evercell.reproducing import reproduce as run_again
    from evercell.training import choose_device

    console: Console = context.obj
    if output is not None:
        check_model_output(output, overwrite=overwrite)
    choose_device(device)
    compared, made = run_again(find(str(directory)), data or [Path()], device=device, shown=console.shown)
    lines = []
    for one in compared:
        lines.append(f"stage {one.stage}: {one.verdict}" + (f", {one.found[:12]}" if one.verdict == "same" else ""))
        if one.verdict == "different":
            lines.append(f"  expected {one.expected[:12]}, found {one.found[:12]}")
        if one.n_differing is not None:
            lines.append(f"  arrays that differ: {one.n_differing}, by {one.largest:.3g} at most")
        lines += [f"  {one.why}"] if one.why else []
    if output is not None and made is not None:
        save(made, output, card=model_card(made), overwrite=overwrite)
        console.note(f"model: {output}")
    same = all(one.verdict == "same" for one in compared)
    facts = {"ok": same, "stages": [one.to_dict() for one in compared], "output": output if made is not None else None}
    console.result("\n".join(lines), facts, as_json=as_json)
    if not same:
        raise typer.Exit(1)


COMMANDS = {
    reproduce: examples(
        "evercell reproduce model --data labelled.h5ad --data new.h5ad",
        "evercell reproduce human-pancreas --data studies/ --output again --json",
    ),
}

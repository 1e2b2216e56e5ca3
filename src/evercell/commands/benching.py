"""`bench`: how fast this machine is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from evercell.commands.console import Console, examples
from evercell.commands.models import check_model, load_model
from evercell.commands.options import Device, Json
from evercell.errors import SettingsError
from evercell.registry import AUTO

if TYPE_CHECKING:
    from evercell.benching import Bench


def bench(
    context: typer.Context,
    *,
    model: Annotated[
        str, typer.Option("--model", metavar="NAME|DIR", help="Model that annotates the packaged cells.")
    ] = "human-pancreas",
    device: Device = "auto",
    threads: Annotated[
        int | None, typer.Option("--threads", metavar="N", help="Threads of the CPU; torch's choice if not given.")
    ] = None,
    seconds: Annotated[
        float, typer.Option("--seconds", metavar="N", help="What the measurements share; a slow machine takes longer.")
    ] = 45.0,
    as_json: Json = False,
) -> None:
    """Measure how fast this machine annotates and trains.

    In about a minute, on packaged real cells of the human pancreas, drawn with repeats and thinned: they tell time, not
    accuracy. Medians are printed; what else the machine does shows in them.
    """
    from evercell.benching import bench as measure
    from evercell.training import choose_device

    console: Console = context.obj
    if model == AUTO:
        raise SettingsError("`auto` chooses a model for the cells of a file; here there is none", hint="name a model")
    check_model(model)
    choose_device(device)
    found = measure(load_model(model, console), name=model, device=device, threads=threads, seconds=seconds)
    console.result(_text(found), found.to_dict(), as_json=as_json)


def _text(found: Bench) -> str:
    """The table, and what it means in words."""
    from rich.console import Console as Rich
    from rich.table import Table

    from evercell.benching import WORDS

    ratios, machine, cells = found.ratios, found.machine, found.cells
    beside = {
        "scanpy": f"{ratios['scanpy_to_annotate']:.1f} times as fast as annotate",
        "forward": f"{ratios['forward_latent_to_performer']:,.0f} times as fast as performer",
        "train": f"{ratios['train_latent_to_performer']:,.0f} times as fast as performer",
    }
    if found.peak_mb is not None:
        beside["annotate"] = f"peak {found.peak_mb:,.0f} MB"
    table = Table(box=None, pad_edge=False)
    for head, side in (("", "left"), ("cells/s", "right"), ("repeats", "right"), ("", "left")):
        table.add_column(head, justify=side, no_wrap=True)  # type: ignore[arg-type]
    for name, words in WORDS.items():
        pace = found.paces[name]
        rate = pace.cells_per_second
        whose = f", {found.model['backbone']}" if name == "forward" else ""
        table.add_row(
            words + whose, f"{rate:,.0f}" if rate >= 100 else f"{rate:.2g}", str(pace.repeats), beside.get(name, "")
        )
    console = Rich(width=110)
    with console.capture() as printed:
        console.print(table)
    load = "" if machine["load"] is None else f", load {machine['load']}"
    lines = [
        f"{machine['processor']}, cores: {machine['cores']}, threads: {machine['threads']}{load}, "
        f"device: {machine['device']}, torch {machine['torch']}",
        f"{cells['source']}; {cells['file_cells']:,} cells in the file, {cells['genes']:,} genes, "
        f"{cells['expressed_genes']:,} of them expressed in a cell; model `{found.model['name']}`",
        "",
        *(line.rstrip() for line in printed.get().splitlines()),
        "",
        found.estimate(),
    ]
    if found.bandwidth is not None:
        share = found.bandwidth["share"]
        lines.insert(-1, f"the forward pass reads its tables at {share:.0%} of the memory bandwidth of a copy")
    return "\n".join(lines)


COMMANDS = {bench: examples("evercell bench", "evercell bench --threads 1 --seconds 20 --json")}

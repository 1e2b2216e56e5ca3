"""`explain`: why the model says what it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from evercell.commands.annotating import File
from evercell.commands.console import Console, examples, plain
from evercell.commands.models import check_model, model_and_cells
from evercell.commands.options import Device, GeneColumn, Json, KeyAdded, Layer, Model, Species
from evercell.commands.paths import TABLE_SUFFIXES, check_file_output, is_table
from evercell.model_card import table as text_table

if TYPE_CHECKING:
    from evercell.explaining import Explanation
    from evercell.explaining.result import Reason

SHOWN = 10  # genes of each type on the screen


def explain(
    context: typer.Context,
    *,
    file: File,
    model: Model,
    cell: Annotated[
        list[str] | None, typer.Option("--cell", metavar="NAME", help="Name of a cell; may be given more than once.")
    ] = None,
    groups: Annotated[
        str | None,
        typer.Option("--groups", metavar="KEY", help="Column of obs with clusters or other groups of cells."),
    ] = None,
    group: Annotated[
        list[str] | None,
        typer.Option("--group", metavar="VALUE", help="One of these groups, more than once for several; else all."),
    ] = None,
    type_: Annotated[
        list[str] | None,
        typer.Option("--type", metavar="NAME", help="Label, also Unknown, whose cells are explained together."),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option("--against", metavar="TYPE", help="Hold the label against this type, not against the runner-up."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", metavar="FILE", help=".csv or .tsv: the genes; .html: a page; .json: everything."),
    ] = None,
    top: Annotated[int, typer.Option("--top", metavar="N", help="Genes listed for each of the two types.")] = 20,
    method: Annotated[
        str,
        typer.Option(
            "--method", metavar="NAME", help="integrated: exact sums; gradient: faster, and they do not add up."
        ),
    ] = "integrated",
    max_cells: Annotated[
        int, typer.Option("--max-cells", metavar="N", help="Of a group or a label so many cells are drawn.")
    ] = 30,
    reject: Annotated[
        str | None,
        typer.Option(
            "--reject",
            metavar="off|RATE",
            help="Share of cells of known types that may be called Unknown; if not given, the model's own.",
        ),
    ] = None,
    layer: Layer = None,
    species: Species = "auto",
    gene_column: GeneColumn = None,
    key_added: KeyAdded = "evercell",
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Of the draws of cells and of random genes.")] = 0,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Name the genes that carry a label.

    For cells, groups of cells, or all cells of a label: the genes for it, the runner-up and the genes for that, what
    would flip it, and why a cell is Unknown. Labels that the model gave the file are taken; else it is annotated.
    """
    from evercell.annotation import rejection_rate
    from evercell.cells import write_table
    from evercell.explaining import explain as explain_labels
    from evercell.outputs import atomic_path
    from evercell.reporting.explanation import write_explanation
    from evercell.training import choose_device

    console: Console = context.obj
    check_model(model)
    rejection_rate(reject)
    choose_device(device)
    if output is not None:
        check_file_output(output, (*TABLE_SUFFIXES, ".html", ".json"))
    model, annotator, adata = model_and_cells(
        model, file, console, layer=layer, species=species, gene_column=gene_column, device=device, backed=True
    )
    found = explain_labels(
        annotator,
        adata,
        cells=cell or None,
        groups=groups,
        group=group or None,
        types=type_ or None,
        against=against,
        top=top,
        method=method,
        max_cells=max_cells,
        seed=seed,
        reject=reject,
        key=key_added,
        layer=layer,
        species=species,
        gene_column=gene_column,
        name=str(file),
        model_name=Path(model).resolve().name,
        device=device,
        shown=console.shown,
    )
    if output is not None:
        if is_table(output):
            write_table(found.genes, output)
        elif output.suffix == ".html":
            write_explanation(found, output, title=f"Why these labels: {file.name}")
        else:
            with atomic_path(output) as unfinished:
                unfinished.write_text(
                    json.dumps(plain(found.to_dict()), ensure_ascii=False, indent=1), encoding="utf-8"
                )
        console.note(f"written: {output}")
    console.result(_text(found), {"output": output, **found.to_dict()}, as_json=as_json)


def _text(found: Explanation) -> str:
    return "\n\n".join(_of(one) for one in found.reasons)


def _of(one: Reason) -> str:
    """A reason as the screen shows it: the sentence, the genes of both types, the check, why cells are unknown."""
    lines = [one.sentence()]
    if one.explained > 1:
        lines.append(
            f"  {one.explained:,} of {one.cells:,} cells explained; `{one.label}` is the most probable type of "
            f"{one.agreement:.0%} of them"
        )
    if one.unknown is not None:
        whose = "it is" if one.explained == 1 else f"{one.unknown.cells:,} of them are"
        lines.append(f"  {whose} called Unknown: {one.unknown.sentence()}")
    some = one.genes
    for direction, genes in (
        (one.label, some[some["contribution"] > 0].head(SHOWN)),
        (one.runner_up, some[some["contribution"] < 0].iloc[::-1].head(SHOWN)),
    ):
        if len(genes):
            rows = [
                [str(row["gene"]), *(f"{row[name]:{form}}" for name, form in COLUMNS.items())]
                for row in genes.to_dict(orient="records")
            ]
            shown = text_table([f"genes for {direction}", *COLUMNS], rows)
            lines += ["", *(f"  {line}" for line in shown.splitlines())]
    if words := one.deletion_words():
        lines += ["", f"  check: {words}"]
    return "\n".join(lines)


COLUMNS = {"contribution": "+.2f", "expression": ".2f", "elsewhere": ".2f"}
"""Columns of the tables on the screen, and how they are written."""

COMMANDS = {
    explain: examples(
        "evercell explain annotated.h5ad --model model --type beta",
        "evercell explain query.h5ad --model human-immune --groups leiden --group 3 --against cd4_t",
        "evercell explain query.h5ad --model model --cell AAACCTGAGCAT-1 --output why.html",
    ),
}

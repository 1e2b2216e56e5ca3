"""`discover` and `select`: what a model does not know yet, and which labels would teach it most."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from evercell.commands.annotating import File
from evercell.commands.console import Console, examples
from evercell.commands.models import check_model, model_and_cells
from evercell.commands.options import Device, GeneColumn, Json, Layer, Model, Species
from evercell.commands.paths import CELL_SUFFIXES, TABLE_SUFFIXES, check_file_output
from evercell.errors import CellsError, SettingsError
from evercell.model_card import table as text_table

EDITABLE = (".csv", ".tsv")
SHOWN = 20  # cells on the screen


def discover(
    context: typer.Context,
    *,
    file: File,
    model: Model,
    output: Annotated[
        Path, typer.Option("--output", metavar="FILE", help=".h5ad or .zarr: FILE with labels and clusters.")
    ],
    table: Annotated[
        Path, typer.Option("--table", metavar="FILE", help=".csv or .tsv: a line for each cluster, to be edited.")
    ],
    reject: Annotated[
        str | None,
        typer.Option(
            "--reject",
            metavar="RATE",
            help="Share of cells of known types that may be called Unknown; if not given, the model's own.",
        ),
    ] = None,
    resolution: Annotated[
        float, typer.Option("--resolution", metavar="R", help="More gives more and smaller clusters.")
    ] = 0.7,
    least_cells: Annotated[int, typer.Option("--least-cells", metavar="N", help="Cells of the smallest cluster.")] = 10,
    layer: Layer = None,
    species: Species = "auto",
    gene_column: GeneColumn = None,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="The same seed gives the same clusters.")] = 0,
    device: Device = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a table that is at --table.")] = False,
    as_json: Json = False,
) -> None:
    """Find groups of cells that are of no type of the model.

    Cells called Unknown are clustered; each cluster gets its marker genes and nearest known type. Fill in the table,
    and `evercell update --accept` teaches the model the clusters that you accept.
    """
    from evercell.annotation import rejection_rate
    from evercell.cells import write_cells, write_table
    from evercell.discovery import discover as discover_types
    from evercell.training import choose_device

    console: Console = context.obj
    check_model(model)
    rejection_rate(reject)
    choose_device(device)
    check_file_output(output, CELL_SUFFIXES)
    check_file_output(table, EDITABLE, option="--table")
    if table.exists() and not overwrite:
        raise CellsError(
            f"`{table}` is already there: names that were written into it would be lost",
            hint="choose another --table, or pass --overwrite to replace it",
        )
    model, annotator, adata = model_and_cells(
        model, file, console, layer=layer, species=species, gene_column=gene_column, device=device
    )
    found = discover_types(
        annotator,
        adata,
        reject=reject,
        resolution=resolution,
        least_cells=least_cells,
        seed=seed,
        layer=layer,
        species=species,
        gene_column=gene_column,
        name=str(file),
        model_name=Path(model).resolve().name,
        device=device,
        shown=console.shown,
    )
    if found.in_file:
        console.note("the labels that this model gave the file are taken as they are")
    for note in found.notes:
        console.note(note)
    found.write_into(adata)
    write_cells(adata, output)
    write_table(found.table, table)
    console.note(f"written: {output}, {table}")
    command = shlex.join(["evercell", "update", model, str(output), "--accept", str(table), "--output", "MODEL2"])
    text = "no cluster of unknown cells was found"
    if len(found.table):
        text = (
            f"{found.summary()}\n\n"
            f"In {table}, write a type's name and yes beside each cluster that you recognise; then:\n  {command}"
        )
    data = {
        "output": output,
        "table": table,
        "cells": adata.n_obs,
        "unknown": found.n_unknown,
        "clusters": found.table.drop(columns=["name", "accept"]).to_dict(orient="records"),
        "notes": found.notes,
    }
    console.result(text, data, as_json=as_json)


def select(
    context: typer.Context,
    *,
    file: File,
    model: Model,
    number: Annotated[int, typer.Option("--number", metavar="N", help="How many cells you can label.")],
    output: Annotated[Path, typer.Option("--output", metavar="FILE", help=".csv or .tsv: a line for each cell.")],
    layer: Layer = None,
    species: Species = "auto",
    gene_column: GeneColumn = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Name the cells that are most worth a label.

    Cells that the model is unsure of, or that are unlike every known type, and unlike each other. Label them, in a
    column of obs that leaves all other cells empty, and `evercell update --labels` teaches the model.
    """
    from evercell.cells import write_table
    from evercell.discovery import select as select_cells
    from evercell.training import choose_device

    console: Console = context.obj
    check_model(model)
    choose_device(device)
    check_file_output(output, TABLE_SUFFIXES)
    if number < 1:
        raise SettingsError(f"--number is {number}", hint="pass how many cells you can label, such as --number 50")
    model, annotator, adata = model_and_cells(
        model, file, console, layer=layer, species=species, gene_column=gene_column, device=device
    )
    found = select_cells(
        annotator,
        adata,
        number,
        layer=layer,
        species=species,
        gene_column=gene_column,
        name=str(file),
        device=device,
        shown=console.shown,
    )
    write_table(found, output)
    console.note(f"written: {output}")
    rows = [
        [row["cell"], row["label"], f"{row['confidence']:.2f}", row["reason"]]
        for row in found.head(SHOWN).to_dict(orient="records")
    ]
    text = text_table(["cell", "label", "confidence", "reason"], rows)
    if len(found) > SHOWN:
        text += f"\nand {len(found) - SHOWN:,} more in {output}"
    console.result(text, {"output": output, "cells": found.to_dict(orient="records")}, as_json=as_json)


COMMANDS = {
    discover: examples(
        "evercell discover query.h5ad --model model --output discovered.h5ad --table clusters.csv",
        "evercell discover query.h5ad --model model --output found.h5ad --table clusters.csv --reject 0.05",
    ),
    select: examples(
        "evercell select query.h5ad --model model --number 50 --output select.csv",
        "evercell select annotated.h5ad --model model --number 20 --output select.csv --json",
    ),
}

"""`reconcile`: how the labels of a new data set agree with the types of a model, before it is taught."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from evercell.commands.console import Console, examples
from evercell.commands.models import load_model
from evercell.commands.options import GeneColumn, Json, Labelled, Layer, Overwrite, Species
from evercell.commands.paths import check_file_output, file_names, read_file
from evercell.errors import LabelsError
from evercell.model_card import table as text_table
from evercell.registry import find


def reconcile(
    context: typer.Context,
    *,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Name or directory of the model that is to learn.")],
    files: Annotated[list[Path], typer.Argument(metavar="FILE", help="New labelled cells, raw counts.")],
    labels: Labelled,
    output: Annotated[
        Path, typer.Option("--output", metavar="FILE", help=".csv or .tsv: a line for each label, for --mapping.")
    ],
    layer: Layer = None,
    species: Species = "auto",
    gene_column: GeneColumn = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Show which new label lands on which type of a model.

    By name, synonym and Cell Ontology, and by what the model sees in the cells. Edit the column `name` where you know
    better, and give the table to `evercell update --mapping`.
    """
    from evercell.cells import write_table
    from evercell.training_cells import read_studies
    from evercell.updating.settlement import OPEN, label_table

    console: Console = context.obj
    find(model)
    check_file_output(output, (".csv", ".tsv"))
    if output.exists() and not overwrite:
        raise LabelsError(
            f"`{output}` is already there: names that were written into it would be lost",
            hint="choose another --output, or pass --overwrite to replace it",
        )
    old = load_model(model, console)
    cells = [read_file(file, console, layer=layer) for file in files]
    studies = read_studies(cells, labels, layer=layer, names=file_names(files), least_types=1)
    found = label_table(old, studies, species=species, column=gene_column)
    write_table(found.set_index("label"), output)
    console.note(f"written: {output}")
    rows = [
        [
            row["label"],
            f"{row['cells']:,}",
            f"{row['top_type']} ({row['share']:.0%})",
            f"{row['unknown']:.0%}",
            row["finding"],
            row["name"] or "(several)",
        ]
        for row in found.to_dict(orient="records")
    ]
    text = text_table(["label", "cells", "the model sees", "unknown", "finding", "becomes"], rows)
    left = found[found["finding"].isin(OPEN)]
    if len(left):
        text += "\n\nto be settled before an update:\n" + "\n".join(f"- {one}" for one in left["sentence"])
    console.result(text, {"output": output, "labels": found.to_dict(orient="records")}, as_json=as_json)


COMMANDS = {
    reconcile: examples(
        "evercell reconcile model new.h5ad --labels cell_type --output labels.csv",
        "evercell reconcile model new.h5ad --labels cell_type --output labels.csv --json",
    ),
}

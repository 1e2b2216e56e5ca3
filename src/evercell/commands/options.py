"""Options that several commands share, with the same words everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from evercell.registry import AUTO, names


def named_models(incomplete: str) -> list[str]:
    """What the shell offers for a model, beside files; nothing where something else was begun."""
    return names(incomplete) + ([AUTO] if AUTO.startswith(incomplete) else [])


def named_models_only(incomplete: str) -> list[str]:
    """The same where the model cannot be chosen by the cells."""
    return names(incomplete)


Labelled = Annotated[str, typer.Option("--labels", metavar="KEY", help="Column of obs that holds the cell types.")]
Model = Annotated[
    str,
    typer.Option(
        "--model",
        metavar="NAME|DIR|auto",
        autocompletion=named_models,
        help="Name of a model (see `evercell models list`), its directory, or auto: the one that fits the cells best.",
    ),
]
Layer = Annotated[
    str | None,
    typer.Option("--layer", metavar="NAME", help="Where the raw counts are: X, raw or a layer. Found if not given."),
]
Species = Annotated[str, typer.Option("--species", metavar="NAME", help="human, mouse, or auto: told by the genes.")]
GeneColumn = Annotated[
    str | None,
    typer.Option(
        "--gene-column", metavar="NAME", help="Column of var with gene symbols or Ensembl ids, or index. Found."
    ),
]
Device = Annotated[
    str,
    typer.Option("--device", metavar="NAME", autocompletion=lambda: ["auto", "cpu", "cuda"], help="auto, cpu or cuda."),
]
Seed = Annotated[int, typer.Option("--seed", metavar="N", help="The same seed and data give the same model.")]
KeyAdded = Annotated[str, typer.Option("--key-added", metavar="NAME", help="Prefix of all names that are written.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a model that is at --output.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]
Report = Annotated[
    Path | None, typer.Option("--report", metavar="FILE", help="Write a report, one HTML file, here as well.")
]

"""`import` and `export`: models of other programs, and parts of a model in forms that other programs read."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from evercell.commands.console import Console, examples
from evercell.commands.models import load_model
from evercell.commands.options import Json, Overwrite, Species
from evercell.commands.paths import check_file_output, check_model_output
from evercell.errors import SettingsError
from evercell.model_card import model_card

if TYPE_CHECKING:
    from evercell.annotator import Annotator

Output = Annotated[Path, typer.Option("--output", metavar="DIR", help="Directory of the model to be made.")]

app = typer.Typer(
    name="import",
    help="Make a model from one of another program.",
    epilog=examples(
        "evercell import scbert panglao_pretrain.pth --genes panglao_genes.txt --output scbert",
        "evercell import celltypist Immune_All_Low.pkl --trust-pickle --output immune",
    ),
    rich_markup_mode=None,
)


@app.callback(invoke_without_command=True)
def _import(context: typer.Context) -> None:
    # Docstring-less on purpose: the help text is that of `app`.
    if context.invoked_subcommand is None:
        print(context.get_help())


def scbert(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Checkpoint of scBERT, CANAL or TransAnno-Net.")],
    *,
    genes: Annotated[
        Path | None,
        typer.Option(
            "--genes", metavar="FILE", help="Its genes in their order, which it does not name: one a line, or .h5ad."
        ),
    ] = None,
    output: Output,
    all_genes: Annotated[
        bool,
        typer.Option("--all-genes", help="Tokens for all genes, as it was trained: ten times the time and memory."),
    ] = False,
    species: Species = "auto",
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Import the weights of a checkpoint of the scBERT family.

    The model knows no cell types: it is there for train --from and for embed. Only tensors are read from the file.
    """
    if genes is None:
        raise SettingsError(
            "--genes is missing: the checkpoint does not name its genes",
            hint="give the list that it was trained with, one gene a line, or the .h5ad file of its cells; for that of "
            "scBERT itself these are the 16,906 genes of its panglao file",
        )
    check_model_output(output, overwrite=overwrite)
    from evercell.importing import import_scbert

    model = import_scbert(file, genes, species=species, zeros=all_genes)
    _saved(model, output, context.obj, overwrite=overwrite, as_json=as_json)


def celltypist(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="CellTypist model, a .pkl file.")],
    *,
    output: Output,
    trust_pickle: Annotated[
        bool, typer.Option("--trust-pickle", help="Read the pickle: its source is trusted.")
    ] = False,
    species: Species = "auto",
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Import a CellTypist model.

    It gives CellTypist's labels and can be updated. No cell comes with it, so no cell is called Unknown until then.
    """
    check_model_output(output, overwrite=overwrite)
    from evercell.importing.celltypist import WARNING, import_celltypist

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        model = import_celltypist(file, trust_pickle=trust_pickle, species=species)
    for one in caught:
        if WARNING in str(one.message):  # other libraries warn of what a user cannot act on
            context.obj.warning(str(one.message))
    _saved(model, output, context.obj, overwrite=overwrite, as_json=as_json)


def _saved(model: Annotator, output: Path, console: Console, *, overwrite: bool, as_json: bool) -> None:
    """Write an imported model and say what it is."""
    from evercell.checkpoint import save

    save(model, output, card=model_card(model), overwrite=overwrite)
    facts = model.ledger.stages[-1].facts
    for note in facts["notes"]:
        console.note(note)
    kinds = f"{len(model.types):,} cell types" if len(model.types) else "no cell types"
    data: dict[str, Any] = {
        "model": output,
        "fingerprint": model.fingerprint,
        "types": model.types.names,
        "genes": len(model.vocabulary),
        "source": facts["source"],
        "notes": facts["notes"],
    }
    console.result(
        f"{output}: {kinds}, {facts['genes']:,} genes, from {facts['source']['name']}", data, as_json=as_json
    )


IMPORTS: dict[Callable[..., None], str] = {
    scbert: examples(
        "evercell import scbert panglao_pretrain.pth --genes panglao_genes.txt --output scbert",
        "evercell import scbert panglao_pretrain.pth --genes panglao_human.h5ad --all-genes --output scbert",
    ),
    celltypist: examples(
        "evercell import celltypist Immune_All_Low.pkl --trust-pickle --output immune",
        "evercell import celltypist Immune_All_Low.pkl --trust-pickle --output immune --json",
    ),
}
for command, epilog in IMPORTS.items():
    app.command(epilog=epilog)(command)


def export(
    context: typer.Context,
    *,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Name or directory of the model.")],
    form: Annotated[
        str,
        typer.Option("--format", metavar="onnx|csv", help="onnx: the whole model; csv: the linear member's weights."),
    ],
    output: Annotated[Path, typer.Option("--output", metavar="FILE", help="File to be written, .onnx or .csv.")],
    as_json: Json = False,
) -> None:
    """Write a model in a form that other programs read.

    onnx goes from tokens to log-probabilities; csv is a table of weights, genes by types, which says how to use it.
    """
    if form not in ("onnx", "csv"):
        raise SettingsError(f"--format is `{form}`", hint="pass --format onnx or --format csv")
    check_file_output(output, (f".{form}",))
    console: Console = context.obj
    loaded = load_model(model, console)
    from evercell.exporting import export_csv, export_onnx

    facts = export_onnx(loaded, output) if form == "onnx" else export_csv(loaded, output)
    text = f"{output}: " + ", ".join(f"{name} {', '.join(map(str, one))}" for name, one in facts.items())
    console.result(text, {"output": output, "format": form, **facts}, as_json=as_json)


COMMANDS = {
    export: examples(
        "evercell export model --format onnx --output model.onnx",
        "evercell export model --format csv --output weights.csv",
    ),
}

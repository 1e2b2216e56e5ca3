"""`models`: the models that a name leads to, those that come with evercell and the user's own."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from evercell import registry
from evercell.commands.console import Console, examples
from evercell.commands.options import Json, named_models_only
from evercell.errors import ModelError
from evercell.model_card import table
from evercell.outputs import check_folder
from evercell.registry import ListedModel

Name = Annotated[
    str, typer.Argument(metavar="NAME|DIR", help="Name or directory of a model.", autocompletion=named_models_only)
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]

app = typer.Typer(
    name="models",
    help="List, show, add and export the models that a name leads to.",
    epilog=examples("evercell models list", "evercell models show human-immune", "evercell models add model"),
    rich_markup_mode=None,
)


@app.callback(invoke_without_command=True)
def _models(context: typer.Context) -> None:
    # Docstring-less on purpose: the help text is that of `app`.
    if context.invoked_subcommand is None:
        print(context.get_help())


def list_models(context: typer.Context, as_json: Json = False) -> None:
    """List the models that a name leads to.

    Those that come with evercell and your own, which are kept in $EVERCELL_MODELS, or else where the system keeps your
    data.
    """
    found, own = registry.available(), registry.own_folder()
    text = f"no models; `evercell models add DIR` copies one of yours to {own}"
    if found:
        rows = [[one.name, f"{one.source:<8}", *(_figures(one) if not one.problem else [""] * 5)] for one in found]
        header, *lines = table(["name", "", "gene names", "genes", "types", "stages", "size"], rows).splitlines()
        said = [f"  {one.problem or one.description}" for one in found]
        lines = [f"{line:<{len(header)}}{words}".rstrip() for line, words in zip(lines, said, strict=True)]
        text = "\n".join([header, *lines])
    context.obj.result(text, {"models": [vars(one) for one in found], "own_folder": own}, as_json=as_json)


def show(context: typer.Context, name: Name, *, as_json: Json = False) -> None:
    """Show what a model says of itself.

    What is in its directory, its cell types, and its model card.
    """
    found, text = _described(name), registry.card(registry.find(name))
    facts = {
        "directory": str(found.path),
        "source": found.source,
        "description": found.description,
        "genes": f"{found.n_genes:,}, by their {found.species} names; those of other species by orthologues",
        "stages": str(found.stages),
        "size": _size(found),
        "format": str(found.format),
        "cell types": f"{found.n_types:,}" + (f": {', '.join(found.types)}" if found.types else ", pretrained only"),
    }
    lines = [found.name, *(f"  {word:<13}{value}" for word, value in facts.items() if value)]
    context.obj.result("\n".join([*lines, "", text.strip()]).strip(), {**vars(found), "card": text}, as_json=as_json)


def path(context: typer.Context, name: Name, *, as_json: Json = False) -> None:
    """Print the directory of a model, for scripts."""
    found = os.path.abspath(registry.find(name))
    context.obj.result(found, {"name": name, "path": found}, as_json=as_json)


def add(
    context: typer.Context,
    directory: Annotated[
        Path, typer.Argument(metavar="DIR|FILE.zip", help="Directory of a model, or a zip that `export` wrote.")
    ],
    *,
    name: Annotated[
        str | None,
        typer.Option("--name", metavar="NAME", help="Its name from now on; if not given, the directory's."),
    ] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Copy a model of yours to where its name leads to it.

    It is checked first. A name of a model that comes with evercell needs --overwrite, and then leads to yours.
    """
    console: Console = context.obj
    found = registry.add(directory, name, overwrite=overwrite)
    console.note(f"copied to `{found.path}`")
    console.result(f"{found.name}: {found.n_types:,} cell types", vars(found), as_json=as_json)


def export(
    context: typer.Context,
    name: Name,
    *,
    output: Annotated[
        Path, typer.Option("--output", metavar="DIR|FILE.zip", help="A copy of the directory, or a zip of it.")
    ],
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Write a model to pass on.

    It is checked first. A zip holds one folder, with the name of the model.
    """
    check_folder(output, "--output")
    found = _described(name)
    registry.export(name, output, overwrite=overwrite)
    context.obj.result(f"{found.name}: {output}", {"name": found.name, "output": output}, as_json=as_json)


COMMANDS: dict[Callable[..., None], str] = {
    list_models: examples("evercell models list", "evercell models list --json"),
    show: examples("evercell models show human-immune", "evercell models show model --json"),
    path: examples("evercell models path human-immune"),
    add: examples(
        "evercell models add model --name our-pancreas",
        "evercell models add our-pancreas.zip",
    ),
    export: examples(
        "evercell models export human-immune --output human-immune.zip",
        "evercell models export our-pancreas --output copy",
    ),
}
for _command, _epilog in COMMANDS.items():
    app.command("list" if _command is list_models else None, epilog=_epilog)(_command)


def _described(name: str) -> ListedModel:
    """What a model says of itself.

    Raises
    ------
    ModelError
        If there is none, or it cannot be read.
    """
    path = registry.find(name)
    found = registry.describe(path)
    if not (path / "annotator.json").is_file():
        raise ModelError(f"`{path}` is no model: it has no annotator.json", hint="give the directory of a model")
    if found.problem:
        raise ModelError(f"the model `{path}` {found.problem}", hint="copy it again, or train it again")
    return found


def _figures(model: ListedModel) -> list[str]:
    return [model.species, f"{model.n_genes:,}", f"{model.n_types:,}", str(model.stages), _size(model)]


def _size(model: ListedModel) -> str:
    return f"{model.n_bytes / 1e6:,.1f} MB"

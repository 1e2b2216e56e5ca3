"""`log` and `verify`, and how commands find a model: by its name, its directory, or the cells (`auto`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from evercell.commands.console import Console, examples
from evercell.commands.options import Json, named_models_only
from evercell.commands.paths import read_file
from evercell.errors import ModelError
from evercell.model_card import score_table, table
from evercell.registry import AUTO, find, with_types

if TYPE_CHECKING:
    from anndata import AnnData

    from evercell.annotator import Annotator

Directory = Annotated[
    Path, typer.Argument(metavar="NAME|DIR", help="Name or directory of a model.", autocompletion=named_models_only)
]


def check_model(name: str) -> None:
    """Whether there is the model that `--model` names, or for `auto` one to choose: said before files are read."""
    if name == AUTO:
        with_types()
    else:
        find(name)


def load_model(name: str, console: Console) -> Annotator:
    """The model that `--model` or `--from` names."""
    from evercell.checkpoint import load

    path = find(name)
    model = load(path)
    genes = f"{len(model.vocabulary):,} {model.vocabulary.species} genes"
    called = f"`{path}`" if path == Path(name) else f"`{name}` in `{path.parent}`"
    console.note(f"{called}: {len(model.types):,} cell types, {genes}")
    console.detail(f"fingerprint {model.fingerprint}, {model.backbone.name} backbone, stages: {len(model.ledger)}")
    return model


def model_and_cells(
    name: str,
    file: Path,
    console: Console,
    *,
    layer: str | None,
    species: str,
    gene_column: str | None,
    device: str,
    adapt: bool = True,
    backed: bool = False,
) -> tuple[str, Annotator, AnnData]:
    """What `--model` names, that model, and the cells of a file; for `auto` the model that fits these cells best."""
    if name != AUTO:
        model = load_model(name, console)
        return name, model, read_file(file, console, layer=layer, backed=backed)
    from evercell.choosing import choose

    adata = read_file(file, console, layer=layer, backed=backed)
    console.note(f"trying the models that there are: {len(with_types()):,}")
    choice = choose(
        adata, layer=layer, species=species, gene_column=gene_column, adapt=adapt, name=str(file), device=device
    )
    console.note(choice.text())
    console.note(choice.reason)
    if choice.warning:
        console.warning(choice.warning)
    # A model of this name in the folder where the user is would be taken for it.
    name = choice.name if find(choice.name) == choice.path else str(choice.path)
    return name, load_model(name, console), adata


def log(context: typer.Context, directory: Directory, as_json: Json = False) -> None:
    """Show the stages of a model.

    What it was trained on, which types it learnt, and how well.
    """
    from evercell.ledger import Ledger

    file = find(str(directory)) / "ledger.jsonl"
    if not file.is_file():
        raise ModelError(f"`{directory}` is no model: it has no ledger.jsonl", hint="give the directory of a model")
    ledger = Ledger.from_text(file.read_text(encoding="utf-8"), name=str(file))
    stages = [{**stage.facts, "previous": stage.previous, "hash": stage.digest} for stage in ledger]
    shown = [*map(_stage_text, stages), _forgetting_table(stages)]
    context.obj.result("\n\n".join(filter(None, shown)) or "no stages", {"stages": stages}, as_json=as_json)


def _stage_text(stage: Mapping[str, Any]) -> str:
    how = f" by {stage['strategy']}" if "strategy" in stage else ""
    lines = [f"stage {stage['stage']}: {stage.get('verb', '')}{how}  {stage['hash'][:12]}"]
    lines += [f"  {one['name']}: {one['cells']:,} cells, {one['genes']:,} genes" for one in stage.get("data", [])]
    if types := stage.get("types_added"):
        lines.append(f"  types added: {', '.join(types)}")
    metrics = stage.get("metrics") or {}
    if "model" in metrics:
        lines.append(f"  on {(stage.get('held_out') or {}).get('cells', 0):,} held-out cells:")
        lines += [f"    {line}" for line in score_table(metrics).splitlines()]
    return "\n".join(lines)


def _forgetting_table(stages: Sequence[Mapping[str, Any]]) -> str:
    """The forgetting matrix: right labels on the sealed cells of each stage (columns) after each stage (rows)."""
    rows = [(stage["stage"], (stage.get("sealed") or {}).get("stages", {})) for stage in stages]
    columns = sorted({int(part) for _, row in rows for part in row})
    if len(columns) < 2:
        return ""
    lines = [
        [f"after stage {number}", *(f"{row[str(part)]:.3f}" if str(part) in row else "" for part in columns)]
        for number, row in rows
    ]
    return table(["", *(f"sealed in {part}" for part in columns)], lines)


def verify(context: typer.Context, directory: Directory, as_json: Json = False) -> None:
    """Check that a model is as it was written.

    Hashes of its files, chain of its stages, fingerprint of its weights.
    """
    from evercell.checkpoint import FILES, load, load_stage, stages_kept
    from evercell.outputs import is_model

    console: Console = context.obj
    path = find(str(directory))
    if not is_model(path):
        raise ModelError(f"`{path}` is no model: it has no annotator.json", hint="give the directory of a model")
    try:
        model = load(path)
        for stage in stages_kept(path):
            load_stage(path, stage, now=model)
    except ModelError as error:
        console.error(error.message, error.hint)
        console.result(f"{path}: not as it was written", {"ok": False, "error": error.message}, as_json=as_json)
        raise typer.Exit(1) from error
    facts = {"ok": True, "fingerprint": model.fingerprint, "stages": len(model.ledger), "head": model.ledger.head}
    n_files = len(FILES) + (model.sealed is not None) + (model.sketch is not None)
    parts = f"files: {n_files}, stages: {len(model.ledger)}, fingerprint: {model.fingerprint}"
    text = f"{path}: as it was written\n  {parts}"
    console.result(text, facts, as_json=as_json)


COMMANDS = {
    log: examples("evercell log model", "evercell log model --json"),
    verify: examples("evercell verify model", "evercell verify model --json"),
}

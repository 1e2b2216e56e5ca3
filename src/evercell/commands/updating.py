"""`update`, and what looks at the stages of a model: `diff`, `revert`, `bisect`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from evercell.commands.asking import Batch, Donor, PresetName, Samples, asked_preset, given_over
from evercell.commands.console import Console, examples
from evercell.commands.models import Directory, load_model
from evercell.commands.options import Device, GeneColumn, Json, Layer, Overwrite, Report, Seed, Species
from evercell.commands.paths import check_model_output, check_report, file_names, read_file
from evercell.commands.training import Bank, Output, Resume, Run, Store, joined_cells, read_labelled, training_report
from evercell.errors import LabelsError, ModelError, SettingsError
from evercell.model_card import score_table, table
from evercell.registry import find

if TYPE_CHECKING:
    from anndata import AnnData

    from evercell.annotator import Annotator


def update(
    context: typer.Context,
    *,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Name or directory of the model that is to learn.")],
    files: Annotated[list[Path], typer.Argument(metavar="FILE", help="New labelled cells, raw counts.")],
    labels: Annotated[
        str | None, typer.Option("--labels", metavar="KEY", help="Column of obs that holds the cell types.")
    ] = None,
    accept: Annotated[
        Path | None,
        typer.Option(
            "--accept", metavar="FILE", help="Instead of --labels: the edited table of `discover`, FILE its output."
        ),
    ] = None,
    output: Output,
    strategy: Annotated[
        str,
        typer.Option("--strategy", metavar="NAME", help="canal, replay, analytic, lwf, ewc, naive or joint."),
    ] = "canal",
    mapping: Annotated[
        Path | None,
        typer.Option(
            "--mapping", metavar="FILE", help="What labels mean: label and name of a type. .yaml, .json, .csv."
        ),
    ] = None,
    accept_proposals: Annotated[
        bool, typer.Option("--accept-proposals", help="Settle renamed and coarser labels as the model proposes.")
    ] = False,
    tolerance: Annotated[
        float, typer.Option("--tolerance", metavar="SHARE", help="Most of its sealed cells that an old type may lose.")
    ] = 0.02,
    force: Annotated[
        bool, typer.Option("--force", help="Write the model even if old types fall; nothing else is tried.")
    ] = False,
    joint_with: Annotated[
        list[Path] | None,
        typer.Option("--joint-with", metavar="FILE", help="Cells of an earlier stage, for joint. Repeatable."),
    ] = None,
    bank: Bank = "cells",
    bank_size: Annotated[
        int | None, typer.Option("--bank-size", metavar="N", help="Example cells kept afterwards, of all types.")
    ] = None,
    selection: Annotated[
        str | None,
        typer.Option("--selection", metavar="NAME", help="Which cells: herding (default), random, nearest or kcentre."),
    ] = None,
    refit: Annotated[
        bool | None,
        typer.Option("--refit/--no-refit", help="Train once more on all new cells, held-out ones included."),
    ] = None,
    preset: PresetName = None,
    donor: Donor = None,
    batch: Batch = None,
    layer: Layer = None,
    species: Species = "auto",
    gene_column: GeneColumn = None,
    seed: Seed = 0,
    samples: Samples = None,
    device: Device = "auto",
    report: Report = None,
    store: Store = None,
    resume: Resume = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Teach a model new labelled cells.

    MODEL stays as it is. The new model is tried on sealed cells of every earlier stage; where an old type falls, safer
    settings are tried, and nothing is written if none of them holds.
    """
    from evercell.updating import STRATEGIES, UpdateSettings
    from evercell.updating.update import update as update_model

    run = Run(context, output, overwrite=overwrite, device=device)
    console = run.console
    check_report(report)
    chosen = STRATEGIES[strategy].name
    settings = UpdateSettings()
    published = asked_preset(preset, console)
    names = file_names(files)
    if (labels is None) == (accept is None):
        raise SettingsError(
            f"{'neither' if labels is None else 'both'} of --labels and --accept given",
            hint="name the column of cell types with --labels, or the edited table of `discover` with --accept",
        )
    if accept is not None and (mapping is not None or len(files) > 1):
        raise SettingsError(
            "--accept takes one FILE" if len(files) > 1 else "--mapping is for --labels",
            hint="give the one file that `discover` wrote; the table says what its clusters are",
        )
    old = load_model(model, console)
    place = store if accept is None else None  # the accepted cells of a file are taken out of it
    adatas = [read_labelled(file, console, layer=layer, store=place) for file in files]
    if published is not None:
        settings = published.over(sum(adata.n_obs for adata in adatas)).update
    settings = given_over(settings, selection=selection, refit=refit)
    if samples is not None:
        settings = replace(settings, training=replace(settings.training, samples=samples))
    meanings: Path | Mapping[str, str] | None = mapping
    if accept is not None:
        adatas, meanings = _accepted(adatas[0], accept, old, console, name=names[0])
    new = update_model(
        old,
        adatas,
        labels or "cell_type",
        groups=donor if donor is not None else batch,
        strategy=chosen,
        mapping=meanings,
        accept_proposals=accept_proposals,
        joint_with=[read_labelled(one, console, layer=layer, store=store) for one in joint_with or ()] or None,
        bank=bank,
        bank_size=bank_size,
        settings=settings,
        seed=seed,
        tolerance=tolerance,
        force=force,
        names=names,
        layer=layer,
        species=species,
        gene_column=gene_column,
        device=device,
        state_folder=resume,
        store=store,
        shown=console.shown,
    )
    facts = run.saved(new, previous=find(model))
    if report is not None:
        learnt = joined_cells(adatas, names, layer=layer)
        training_report(new, learnt, report, console, labels=labels or "cell_type", device=device)
    for row in facts["labels"]:
        if row["by"] not in ("exact", "") and row["label"] != row["to"]:
            console.note(f"label `{row['label']}` is `{row['to']}` ({row['by']})")
    if old.linear_only:
        console.note("the linear member alone knows the types of this model, so it alone has learnt")
    elif facts["strategy"] != chosen:
        console.warning(f"with `{chosen}` old types fell; the model was made with `{facts['strategy']}`")
    if not facts["tries"][-1]["holds"]:
        console.warning(f"old types fell, and --force was given: {', '.join(facts['tries'][-1]['fallen'])}")
    added = ", ".join(facts["types_added"]) or "none"
    text = f"types added: {added}\non {facts['held_out']['cells']:,} held-out cells:\n{score_table(facts['metrics'])}"
    if sealed := facts["tries"][-1]["types"]:
        drawn = facts["tries"][-1].get("drawn_stages")
        of = f" and, for stages that kept no cells ({', '.join(map(str, drawn))}), on draws" if drawn else ""
        text += f"\nold types on sealed cells{of}:\n{_sealed_table(sealed)}"
    keys = ("strategy", "types_added", "genes_added", "labels", "tries", "sealed")
    data = run.data(new) | {key: facts[key] for key in keys} | {"report": report}
    console.result(text, data, as_json=as_json)


def _accepted(
    adata: AnnData, table: Path, model: Annotator, console: Console, *, name: str
) -> tuple[list[AnnData], dict[str, str]]:
    """Cells of the accepted clusters, and each name mapped to itself: what the user wrote is no proposal."""
    from evercell.celltypes import reconcile
    from evercell.discovery import accepted

    cells = accepted(adata, table, name=name)
    sizes = cells.obs["cell_type"].value_counts()
    for match in reconcile(sizes.index, model.types).matches:
        console.note(f"`{match.label}`: {sizes[match.label]:,} cells accepted")
        if match.verdict == "same" and match.label != match.name:
            console.warning(
                f"`{match.label}` becomes a type beside `{match.name}`, which it reads like; "
                f"if they are one, write `{match.name}` into `{table}`"
            )
    return [cells], {str(one): str(one) for one in sizes.index}


def _sealed_table(rows: Mapping[str, Mapping[str, float]]) -> str:
    lines = [
        [name, f"{row['cells']:,.0f}", f"{row['before']:.3f}", f"{row['after']:.3f}"] for name, row in rows.items()
    ]
    return table(["", "cells", "before", "after"], lines)


def diff(
    context: typer.Context,
    first: Annotated[Path, typer.Argument(metavar="A", help="Name or directory of a model.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="Name or directory of another, such as its update.")],
    file: Annotated[Path | None, typer.Argument(metavar="[FILE]", help="Cells that both models label.")] = None,
    *,
    layer: Layer = None,
    as_json: Json = False,
) -> None:
    """Compare two models.

    Types, each type's share of right labels on the sealed cells, and the labels that change on FILE.
    """
    console: Console = context.obj
    models = {str(path): load_model(str(path), console) for path in (first, second)}
    a, b = models.values() if len(models) == 2 else (next(iter(models.values())),) * 2
    added = [name for name in b.types.names if name not in a.types]
    missing = [name for name in a.types.names if name not in b.types]
    recall = [_sealed_recall(one) for one in (a, b)]
    shared = [name for name in a.types.names if all(name in one for one in recall)]
    per_type = {name: {"a": recall[0][name], "b": recall[1][name]} for name in shared}
    lines = [
        f"types only in {first}: {', '.join(missing) or 'none'}",
        f"types only in {second}: {', '.join(added) or 'none'}",
    ]
    if per_type:
        rows = [[name, f"{row['a']:.3f}", f"{row['b']:.3f}"] for name, row in per_type.items()]
        lines.append(f"right labels on the sealed cells of each model:\n{table(['', 'A', 'B'], rows)}")
    data: dict[str, Any] = {"only_in_a": missing, "only_in_b": added, "types": per_type}
    if file is not None:
        changes, n_cells = _label_changes(a, b, file, console, layer)
        data |= {"cells": n_cells, "changes": changes}
        n_changed = sum(one["cells"] for one in changes)
        lines.append(f"labels that change on {file}: {n_changed:,} of {n_cells:,} cells")
        if changes:
            rows = [[one["a"], one["b"], f"{one['cells']:,}"] for one in changes]
            lines.append(table(["A", "B", "cells"], rows))
    console.result("\n".join(lines), data, as_json=as_json)


def _sealed_recall(model: Annotator) -> dict[str, float]:
    """Share of right labels of each type on the sealed cells, from the last stage of the ledger."""
    facts = model.ledger.stages[-1].facts if len(model.ledger) else {}
    types = (facts.get("sealed") or {}).get("types", {})
    return {name: row["recall"] for name, row in types.items()}


def _label_changes(
    a: Annotator, b: Annotator, file: Path, console: Console, layer: str | None
) -> tuple[list[dict[str, Any]], int]:
    """Labels that two models give the same cells, where they differ, the most frequent first."""
    from collections import Counter

    from evercell.annotation import annotate

    cells = read_file(file, console, layer=layer)
    labels = [annotate(model, cells, layer=layer, name=str(file), shown=console.shown).labels for model in (a, b)]
    pairs = Counter((str(one), str(two)) for one, two in zip(*labels, strict=True) if str(one) != str(two))
    return [{"a": one, "b": two, "cells": n} for (one, two), n in pairs.most_common()], cells.n_obs


def revert(
    context: typer.Context,
    directory: Directory,
    *,
    stage: Annotated[int, typer.Option("--stage", metavar="N", help="Stage to go back to.")],
    output: Output,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Write a model as it was after an earlier stage.

    An updated model keeps its earlier stages.
    """
    from evercell.checkpoint import revert as revert_model

    console: Console = context.obj
    check_model_output(output, overwrite=overwrite)
    model = revert_model(find(str(directory)), stage, output, overwrite=overwrite)
    facts = {"model": output, "stage": stage, "fingerprint": model.fingerprint, "types": model.types.names}
    console.result(f"{output}: stage {stage}, {len(model.types):,} cell types", facts, as_json=as_json)


def bisect(
    context: typer.Context,
    directory: Directory,
    *,
    cell_type: Annotated[str, typer.Option("--type", metavar="NAME", help="Cell type that has got worse.")],
    as_json: Json = False,
) -> None:
    """Find the stage in which a type got worse.

    Told by the ledger: each update was tried on the sealed cells of the stages before it.
    """
    from evercell.ledger import Ledger

    file = find(str(directory)) / "ledger.jsonl"
    if not file.is_file():
        raise ModelError(f"`{directory}` is no model: it has no ledger.jsonl", hint="give the directory of a model")
    ledger = Ledger.from_text(file.read_text(encoding="utf-8"), name=str(file))
    learnt = [stage.facts["stage"] for stage in ledger if cell_type in stage.facts.get("types_added", [])]
    if not learnt:
        known = sorted({name for stage in ledger for name in stage.facts.get("types_added", [])})
        raise LabelsError(
            f"the model has no cell type `{cell_type}`", hint=f"it knows {', '.join(f'`{name}`' for name in known)}"
        )
    rows = [
        {
            "stage": stage.facts["stage"],
            "strategy": stage.facts["strategy"],
            **stage.facts["tries"][-1]["types"][cell_type],
        }
        for stage in ledger
        if stage.facts.get("verb") == "update" and cell_type in stage.facts["tries"][-1]["types"]
    ]
    worst = max(rows, key=lambda row: row["before"] - row["after"], default=None)
    fell = worst is not None and worst["after"] < worst["before"]
    lines = [f"`{cell_type}` was learnt in stage {learnt[0]}"]
    if rows:
        shown = [
            [
                f"stage {row['stage']} ({row['strategy']})",
                f"{row['cells']:,}",
                f"{row['before']:.3f}",
                f"{row['after']:.3f}",
            ]
            for row in rows
        ]
        lines.append(table(["", "sealed cells", "before", "after"], shown))
    lines.append(
        f"it fell most in stage {worst['stage']}" if worst is not None and fell else "it fell in no later stage"
    )
    data = {
        "type": cell_type,
        "learnt": learnt[0],
        "stages": rows,
        "fell_in": worst["stage"] if worst and fell else None,
    }
    context.obj.result("\n".join(lines), data, as_json=as_json)


COMMANDS = {
    update: examples(
        "evercell update model new.h5ad --labels cell_type --donor donor --output model2",
        "evercell update model new.h5ad --labels celltype --mapping labels.csv --strategy analytic --output model2",
        "evercell update model discovered.h5ad --accept clusters.csv --output model2",
    ),
    diff: examples("evercell diff model model2", "evercell diff model model2 query.h5ad --json"),
    revert: examples(
        "evercell revert model2 --stage 1 --output model1", "evercell revert model2 --stage 1 --output model1 --json"
    ),
    bisect: examples("evercell bisect model2 --type beta", "evercell bisect model2 --type 'T cell' --json"),
}

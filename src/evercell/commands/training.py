"""`train` and `pretrain`."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from evercell.commands.asking import (
    Asked,
    Backbone,
    BackboneSetting,
    Balance,
    Base,
    Batch,
    Donor,
    Finetune,
    PresetName,
    Samples,
    Tokenizer,
    asked_preset,
    check_asked,
    in_batches,
    model_settings,
    weighed,
)
from evercell.commands.console import Console, examples
from evercell.commands.options import Device, GeneColumn, Json, Labelled, Layer, Overwrite, Report, Seed, Species
from evercell.commands.paths import check_model_output, check_report, file_names
from evercell.locking import locked
from evercell.model_card import model_card, score_table, table

if TYPE_CHECKING:
    from anndata import AnnData

    from evercell.annotator import Annotator

Output = Annotated[Path, typer.Option("--output", metavar="DIR", help="Directory of the model to be made.")]
Bank = Annotated[
    str,
    typer.Option(
        "--bank",
        metavar="cells|sketch",
        help="What later updates learn again: example cells, or a sketch of the types that holds no cell.",
    ),
]
Batches = Annotated[
    int | None,
    typer.Option("--batches-a-step", metavar="K", help="Batches whose mean gradient is a step; processes share them."),
]
Store = Annotated[
    Path | None,
    typer.Option("--store", metavar="FOLDER", help="Keep counts in temporary files here, not in memory."),
]
Resume = Annotated[
    Path | None,
    typer.Option("--resume", metavar="FOLDER", help="Keep the state of the run here; the same call takes it up again."),
]


def train(
    context: typer.Context,
    *,
    files: Annotated[list[Path], typer.Argument(metavar="FILE", help="Labelled cells, raw counts.")],
    labels: Labelled,
    output: Output,
    donor: Donor = None,
    batch: Batch = None,
    base: Base = None,
    finetune: Finetune = None,
    preset: PresetName = None,
    balance: Balance = None,
    layer: Layer = None,
    species: Species = "auto",
    gene_column: GeneColumn = None,
    seed: Seed = 0,
    samples: Samples = None,
    batches_a_step: Batches = None,
    tokenizer: Tokenizer = None,
    backbone: Backbone = None,
    backbone_setting: BackboneSetting = None,
    refit: Annotated[
        bool | None,
        typer.Option("--refit/--no-refit", help="Train once more on all cells, held-out ones included (default)."),
    ] = None,
    bank: Bank = "cells",
    device: Device = "auto",
    report: Report = None,
    store: Store = None,
    resume: Resume = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Make a model from labelled cells.

    A part of the cells, whole donors where they are named, is held out to calibrate and to score the model and a linear
    baseline on.
    """
    from evercell.distributed import together
    from evercell.finetuning import train as train_model

    run = Run(context, output, overwrite=overwrite, device=device)
    console = run.console
    check_report(report)
    asked = Asked(base, tokenizer, backbone, tuple(backbone_setting or ()), samples)
    published = asked_preset(preset, console)
    check_asked(asked, published, finetune=finetune, balance=balance)
    names = file_names(files)
    given = asked.model(console)
    adatas = [read_labelled(file, console, layer=layer, store=store) for file in files]
    n_cells = sum(adata.n_obs for adata in adatas)
    settings = model_settings(asked, given, published, n_cells, refit=refit, finetune=finetune, balance=balance)
    if donor is not None and batch is not None:
        console.note(f"whole donors (`{donor}`) are held out; the batches in `{batch}` are not needed")
    settings = in_batches(settings, batches_a_step)
    with together(device, batches=settings.training.batches_a_step) as process:
        model = train_model(
            adatas,
            labels,
            groups=donor if donor is not None else batch,
            base=given,
            settings=settings,
            bank=bank,
            seed=seed,
            names=names,
            layer=layer,
            species=species,
            gene_column=gene_column,
            device=device,
            state_folder=resume,
            store=store,
            shown=console.shown,
        )
    if not process.first:
        return
    facts = run.saved(model)
    if settings.finetune == "auto" and facts["settings"]["finetune"] == "head":
        console.note("with so few labelled cells a type only a head was trained; --finetune all trains the whole model")
    if report is not None:
        training_report(model, joined_cells(adatas, names, layer=layer), report, console, labels=labels, device=device)
    text = f"on {facts['held_out']['cells']:,} held-out cells:\n{score_table(facts['metrics'])}"
    console.result(text, run.data(model) | {"report": report}, as_json=as_json)


def pretrain(
    context: typer.Context,
    *,
    files: Annotated[
        list[Path], typer.Argument(metavar="FILE|FOLDER", help="Cells, raw counts; of a folder its .h5ad and .zarr.")
    ],
    output: Output,
    labels: Annotated[
        str | None,
        typer.Option(
            "--labels", metavar="KEY", help="Column of obs with cell types; files without it are learnt from as well."
        ),
    ] = None,
    donor: Donor = None,
    batch: Batch = None,
    tissue: Annotated[
        str | None,
        typer.Option("--tissue", metavar="KEY", help="Column of obs with tissues, which then are drawn alike."),
    ] = None,
    weight: Annotated[
        list[str] | None,
        typer.Option(
            "--weight", metavar="TERM=W", help="Weight of masked (1), contrast (0.3) or types (1). Repeatable."
        ),
    ] = None,
    held_out: Annotated[
        list[str] | None,
        typer.Option("--held-out", metavar="NAME", help="Name of a file, without suffix, to hold out. Repeatable."),
    ] = None,
    base: Base = None,
    preset: PresetName = None,
    layer: Layer = None,
    species: Species = "auto",
    gene_column: GeneColumn = None,
    seed: Seed = 0,
    samples: Samples = None,
    batches_a_step: Batches = None,
    tokenizer: Tokenizer = None,
    backbone: Backbone = None,
    backbone_setting: BackboneSetting = None,
    device: Device = "auto",
    store: Store = None,
    resume: Resume = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Pretrain a model on cells of many studies.

    It knows no cell types: it is there for train --from and for embed. Some genes of a cell are hidden and asked for,
    views of a cell are told from those of others and, where labels are named, types from those of the same study. A
    part of the cells, whole files where there are at least four, is held out to score it on.
    """
    from evercell.distributed import together
    from evercell.pretraining import PretrainingSettings
    from evercell.pretraining import pretrain as pretrain_model
    from evercell.pretraining_studies import n_cells_of

    run = Run(context, output, overwrite=overwrite, device=device)
    asked = Asked(base, tokenizer, backbone, tuple(backbone_setting or ()), samples)
    settings = PretrainingSettings()
    if (published := asked_preset(preset, run.console)) is not None:
        settings = published.over(n_cells_of(files)).pretraining
    settings = weighed(replace(settings, held_out_studies=tuple(held_out or ())), weight or ())
    settings = in_batches(asked.over(settings), batches_a_step)
    with together(device, batches=settings.training.batches_a_step) as process:
        model = pretrain_model(
            files,
            labels,
            settings=settings,
            seed=seed,
            base=asked.model(run.console),
            groups=donor if donor is not None else batch,
            tissues=tissue,
            species=species,
            gene_column=gene_column,
            layer=layer,
            device=device,
            state_folder=resume,
            store=store,
            shown=run.console.shown,
        )
    if not process.first:
        return
    facts = run.saved(model)
    metrics = facts["metrics"]
    words = {
        "masked_accuracy": "pretrained model",
        "trivial_accuracy": "most frequent bin of the gene",
        "trivial_depth_accuracy": "likeliest bin by gene and depth",
    }
    rows = [[word, f"{metrics[name]:.3f}"] for name, word in words.items() if name in metrics]
    text = f"hidden genes of {facts['held_out']['cells']:,} held-out cells whose bin is found:\n"
    if "type_accuracy" in metrics:
        rows.append(["types told, of held-out studies", f"{metrics['type_accuracy']:.3f}"])
    run.console.result(text + table(["", "share"], rows), run.data(model), as_json=as_json)


COMMANDS = {
    train: examples(
        "evercell train patients.h5ad --labels cell_type --donor donor --bank sketch --output model",
        "evercell train first.h5ad second.h5ad --labels cell_type --donor donor --output model --report training.html",
        "evercell train labelled.h5ad --labels cell_type --batch batch --from pretrained --output model --json",
    ),
    pretrain: examples(
        "evercell pretrain cells/ --labels cell_type --output pretrained",
        "evercell pretrain first.h5ad second.h5ad --output pretrained --resume state",
    ),
}


def read_labelled(file: Path, console: Console, *, layer: str | None, store: Path | None) -> AnnData:
    """Cells of a file to learn from; with a store, counts stay in files of the kinds that can be read in parts."""
    from evercell.cells import STORED, read_cells

    adata = read_cells(file, layer=layer, backed=store is not None and file.suffix in STORED)
    console.note(f"`{file}`: {adata.n_obs:,} cells, {adata.n_vars:,} genes")
    return adata


class Run:
    """What `train`, `pretrain` and `update` share: checks before the work, the model directory, words after it."""

    def __init__(self, context: typer.Context, output: Path, *, overwrite: bool, device: str) -> None:
        from evercell.distributed import started
        from evercell.training import choose_device

        self.console, self.output, self.overwrite = context.obj, output, overwrite
        self.started = time.perf_counter()
        check_model_output(output, overwrite=overwrite)
        choose_device(device)
        if started().first:
            # From now on: who would update the same model meanwhile would do it without what this one teaches it.
            context.with_resource(locked(output))

    def saved(self, model: Annotator, *, previous: Path | None = None) -> Mapping[str, Any]:
        """Write the model, and in it the one it was made from; say what was done; return the last stage's facts."""
        from evercell.checkpoint import save
        from evercell.labels import listed

        save(model, self.output, card=model_card(model), overwrite=self.overwrite, previous=previous)
        console, facts = self.console, model.ledger.stages[-1].facts
        for one in facts["data"]:
            source = f", counts from {one['counts']}" if "counts" in one else ""
            console.note(f"`{one['name']}`: {one['cells']:,} cells used{source}")
            for note in one.get("notes", []):
                console.note(f"  {note}")
        held_out = facts["held_out"]
        of = f", all of {listed(held_out['groups'])}" if held_out["groups"] else ""
        if held_out["by"] == "cells":
            of = ", drawn at random: expect less of other donors (--donor KEY holds whole ones out)"
        console.note(
            f"{len(model.types):,} cell types, {len(model.vocabulary):,} genes; "
            f"{held_out['cells']:,} cells held out{of}"
        )
        if held_out["note"]:
            console.warning(f"groups of cells were not kept whole: {held_out['note']}")
        if facts.get("bank") == "sketch":
            console.note("no cell of this stage is kept in the model, only a sketch of its types")
        if facts.get("not_sketched"):
            console.note(f"too few cells to sketch, left to earlier stages: {listed(facts['not_sketched'])}")
        console.note(f"model: {self.output}")
        console.detail(f"{time.perf_counter() - self.started:.0f} seconds, {facts['steps']:,} steps")
        return facts

    def data(self, model: Annotator) -> dict[str, Any]:
        """The result as one object."""
        facts = model.ledger.stages[-1].facts
        return {
            "model": self.output,
            "fingerprint": model.fingerprint,
            "types": model.types.names,
            "genes": len(model.vocabulary),
            "cells": sum(one["cells"] for one in facts["data"]),
            **{name: facts[name] for name in ("held_out", "metrics", "data", "seed")},
            "seconds": round(time.perf_counter() - self.started, 1),
        }


def training_report(
    model: Annotator, cells: AnnData, path: Path, console: Console, *, labels: str, device: str
) -> None:
    """Write a report on a stage: its figures, and the labels that the model gives the cells that it has just learnt."""
    from evercell.annotation import annotate
    from evercell.reporting import write_report

    annotate(model, cells, inplace=True, device=device, shown=console.shown)
    seen = "These are the cells that the model was trained on; the figures under The model are those of held-out cells."
    stages = [stage.facts for stage in model.ledger]
    title = "Training report" if len(stages) == 1 else f"Report on stage {len(stages)}"
    write_report(cells, path, title=title, old_labels=labels, stages=stages, warnings=[seen])
    console.note(f"report: {path}")


def joined_cells(adatas: Sequence[AnnData], names: Sequence[str], *, layer: str | None) -> AnnData:
    """Counts and labels of all files as one AnnData."""
    import anndata as ad

    from evercell.cells import find_counts

    parts = {}
    for adata, name in zip(adatas, names, strict=True):
        counts = find_counts(adata, layer=layer, name=name)
        parts[name] = ad.AnnData(counts.to_csr(), obs=adata.obs.copy(), var=counts.genes)
        if len(adatas) == 1 and counts.shape[1] == adata.n_vars:
            # Of merged cells: which genes each source measured.
            parts[name].varm, parts[name].uns = adata.varm, adata.uns
    if len(parts) == 1:
        return next(iter(parts.values()))
    return ad.concat(parts, join="outer", label="file", index_unique="-", merge="first")

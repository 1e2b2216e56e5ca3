"""`preprocess`: from raw counts to cells that are filtered, normalised and log-transformed."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from evercell.commands.console import Console, examples
from evercell.commands.options import GeneColumn, Json, Layer, Species
from evercell.commands.paths import CELL_SUFFIXES, check_file_output, read_file
from evercell.errors import SettingsError


def preprocess(
    context: typer.Context,
    *,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Cells with raw counts somewhere in them.")],
    output: Annotated[Path, typer.Option("--output", metavar="FILE", help=".h5ad or .zarr to write.")],
    min_genes: Annotated[
        int | None, typer.Option("--min-genes", metavar="N", help="Genes that a cell must express (200).")
    ] = None,
    min_cells: Annotated[
        int | None, typer.Option("--min-cells", metavar="N", help="Cells that must express a gene (3).")
    ] = None,
    max_mito: Annotated[
        float | None,
        typer.Option("--max-mito", metavar="PERCENT", help="Most mitochondrial counts of a cell (20); 100: any."),
    ] = None,
    min_counts: Annotated[
        float | None, typer.Option("--min-counts", metavar="N", help="Counts that a cell must have.")
    ] = None,
    max_counts: Annotated[
        float | None, typer.Option("--max-counts", metavar="N", help="Most counts that a cell may have.")
    ] = None,
    mad: Annotated[
        float | None,
        typer.Option(
            "--mad",
            metavar="K",
            help="Remove cells beyond K median absolute deviations of genes, counts or mitochondrial share too, in "
            "each batch; 5 is usual.",
        ),
    ] = None,
    doublets: Annotated[
        str | None,
        typer.Option("--doublets", metavar="off|score|drop", help="Score doublets with Scrublet; drop what it calls."),
    ] = None,
    target_sum: Annotated[
        float | None, typer.Option("--target-sum", metavar="N", help="Counts of a cell after normalisation (10000).")
    ] = None,
    log: Annotated[
        str | None, typer.Option("--log", metavar="e|2|none", help="Base of the logarithm of 1 + x (e).")
    ] = None,
    variable_genes: Annotated[
        int | None, typer.Option("--variable-genes", metavar="N", help="Mark so many variable genes.")
    ] = None,
    only_variable: Annotated[
        bool, typer.Option("--only-variable", help="Keep the variable genes only; the file then trains no model well.")
    ] = False,
    batch: Annotated[
        str | None,
        typer.Option(
            "--batch", metavar="KEY", help="Column of obs with batches: outliers, doublets, variable genes in each."
        ),
    ] = None,
    training: Annotated[
        str | None,
        typer.Option(
            "--training",
            metavar="KEY[=VALUE]",
            help="Training cells, by a column of obs: medians and genes are told by these alone, and hold for all.",
        ),
    ] = None,
    like: Annotated[
        Path | None,
        typer.Option(
            "--like", metavar="FILE", help="Same steps and genes as in this output of preprocess, or --settings-out."
        ),
    ] = None,
    settings_out: Annotated[
        Path | None,
        typer.Option("--settings-out", metavar="FILE", help="Write settings and genes as .json too, for --like."),
    ] = None,
    plots: Annotated[
        Path | None,
        typer.Option(
            "--plots", metavar="FILE", help=".png, .pdf or .svg: the cells before and after, with thresholds."
        ),
    ] = None,
    layer: Layer = None,
    species: Species = "auto",
    gene_column: GeneColumn = None,
    seed: Annotated[int | None, typer.Option("--seed", metavar="N", help="Of the simulated doublets (0).")] = None,
    as_json: Json = False,
) -> None:
    """Filter cells and genes, and normalise counts.

    Then log-transform them and mark variable genes, with Scanpy's functions. The counts stay in layer counts, where
    train and annotate find them; those commands need nothing of this. The settings and genes are kept in the output:
    --like brings a later file through the same steps.
    """
    from evercell.cells import write_cells
    from evercell.model_card import table
    from evercell.preprocessing import Preprocessing
    from evercell.preprocessing import preprocess as preprocess_cells
    from evercell.preprocessing.plots import SUFFIXES
    from evercell.preprocessing.quality import check_doublets
    from evercell.preprocessing.settings import PreprocessingSettings

    console: Console = context.obj
    started = time.perf_counter()
    check_file_output(output, CELL_SUFFIXES)
    if plots is not None:
        check_file_output(plots, SUFFIXES, option="--plots")
    if settings_out is not None:
        check_file_output(settings_out, (".json",), option="--settings-out")
    asked: dict[str, Any] = {
        "min_genes": min_genes,
        "min_cells": min_cells,
        "max_mito": max_mito,
        "min_counts": min_counts,
        "max_counts": max_counts,
        "mad": mad,
        "doublets": doublets,
        "target_sum": target_sum,
        "log": log,
        "variable_genes": variable_genes,
        "only_variable": only_variable or None,
        "seed": seed,
    }
    given = {key: value for key, value in asked.items() if value is not None}
    where: dict[str, Any] = {"layer": layer, "species": species, "gene_column": gene_column, "name": str(file)}
    earlier = None
    if like is not None:
        earlier = Preprocessing.load(like)
        _check_like(given, earlier.settings.to_dict(), like, training)
    settings = replace(PreprocessingSettings(), **given) if earlier is None else earlier.settings
    if settings.doublets != "off":
        check_doublets()
    adata = read_file(file, console, layer=layer)
    if earlier is None:
        made = preprocess_cells(adata, settings, batch=batch, training=training, **where)
    else:
        made = earlier.apply(adata, batch=batch, **where)
    for note in made.notes:
        console.note(f"  {note}")
    for warning in made.warnings:
        console.warning(warning)
    write_cells(made.cells, output)
    if settings_out is not None:
        made.preprocessing.save(settings_out)
        console.note(f"settings and genes: {settings_out}")
    if plots is not None:
        made.write_plots(plots)
        console.note(f"plots: {plots}")
    cells, genes = made.cells.shape
    console.note(f"written: {output}, {cells:,} cells, {genes:,} genes")
    seconds = round(time.perf_counter() - started, 1)
    console.detail(f"{seconds:.0f} seconds")
    text = table(["step", "kept", "cells before", "after", "genes before", "after"], made.rows())
    data = {
        "output": output,
        "cells_before": adata.n_obs,
        "cells": cells,
        "genes_before": adata.n_vars,
        "genes": genes,
        "steps": [step.to_dict() for step in made.steps],
        "variable_genes": len(made.preprocessing.variable or ()),
        "notes": made.notes,
        "warnings": made.warnings,
        "settings": settings.to_dict(),
        "like": like,
        "settings_out": settings_out,
        "plots": plots,
        "seconds": seconds,
    }
    console.result(text, data, as_json=as_json)


def _check_like(given: dict[str, Any], stored: dict[str, Any], like: Path, training: str | None) -> None:
    """Nothing may be asked for beside --like that it does not say itself."""
    for name, value in given.items():
        option = f"--{name.replace('_', '-')}"
        if value != stored[name]:
            raise SettingsError(
                f"{option} is `{value}`, but `{like}` was made with `{stored[name]}`",
                hint=f"leave out {option} or --like",
            )
    if training is not None:
        raise SettingsError(
            f"--training names cells to learn from, but nothing is learnt with --like: `{like}` has it all",
            hint="leave out --training or --like",
        )


COMMANDS = {
    preprocess: examples(
        "evercell preprocess raw.h5ad --mad 5 --doublets score --batch donor --plots cells.png --output clean.h5ad",
        "evercell preprocess raw.h5ad --variable-genes 2000 --training split=train --output clean.h5ad",
        "evercell preprocess later.h5ad --like clean.h5ad --output later_clean.h5ad",
    ),
}

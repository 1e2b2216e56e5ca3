"""`merge`: files of cells brought into one."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from evercell.commands.console import Console, examples
from evercell.commands.options import GeneColumn, Json, Layer, Species
from evercell.commands.paths import CELL_SUFFIXES, check_file_output
from evercell.errors import CellsError
from evercell.model_card import table


def merge(
    context: typer.Context,
    *,
    files: Annotated[
        list[Path],
        typer.Argument(metavar="FILE", help="Cells, raw counts: .h5ad, .zarr, 10x, .loom or tables, in any mixture."),
    ],
    output: Annotated[Path, typer.Option("--output", metavar="FILE", help=".h5ad or .zarr to write.")],
    genes: Annotated[
        str,
        typer.Option("--genes", metavar="union|intersection", help="Genes that any of the files measured, or all."),
    ] = "union",
    duplicates: Annotated[
        str,
        typer.Option(
            "--duplicates",
            metavar="drop|keep|error",
            help="A cell that is there twice: drop all copies but the first, keep them, or stop.",
        ),
    ] = "drop",
    batch: Annotated[
        str | None,
        typer.Option("--batch", metavar="KEY", help="Column of obs with batches: `batch` will be source/batch."),
    ] = None,
    cells: Annotated[
        Path | None,
        typer.Option(
            "--cells", metavar="TABLE", help="Table with columns barcode, source and more, such as cell_type, for obs."
        ),
    ] = None,
    layer: Layer = None,
    species: Species = "auto",
    gene_column: GeneColumn = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that is at --output.")] = False,
    as_json: Json = False,
) -> None:
    """Bring files of cells into one file of raw counts.

    Gene names and species may differ. The file says which source a cell is from and which genes each source measured:
    train, update and pretrain take them as data sets of their own. A manifest is written beside it, and a table of
    cells that are there twice. A call that was killed goes on where it was when it is made again.
    """
    console: Console = context.obj
    check_file_output(output, CELL_SUFFIXES)
    if output.exists() and not overwrite:
        raise CellsError(
            f"`{output}` is already there", hint="choose another --output, or pass --overwrite to replace it"
        )
    from evercell.merging import beside
    from evercell.merging import merge as merge_files

    started = time.perf_counter()
    found = merge_files(
        files,
        output,
        genes=cast(Any, genes),
        duplicates=cast(Any, duplicates),
        species=species,
        layer=layer,
        gene_column=gene_column,
        batch=batch,
        cells=cells,
        shown=console.shown,
    )
    manifest = found.manifest
    pairs = beside(output, ".duplicates.csv") if len(found.duplicates) else None
    for source in manifest["sources"]:
        undone = "" if source["transform"] == "none" else f", {source['transform']}"
        console.note(f"`{source['path']}` ({source['name']}): counts from {source['counts']}{undone}")
        for note in source["notes"]:
            console.note(f"  {note}")
    for sentence in in_words(manifest):
        console.note(sentence)
    for note in manifest["notes"]:
        console.warning(note)
    if pairs is not None:
        console.note(f"pairs of cells: {pairs}")
    console.note(f"manifest: {beside(output, '.manifest.json')}")
    console.detail(f"{time.perf_counter() - started:.0f} seconds")
    numbers = ("cells", "empty_cells_left_out", "duplicates_left_out", "cells_written", "genes", "genes_in_output")
    rows = [[one["name"], one["species"], *(f"{one[key]:,}" for key in numbers)] for one in manifest["sources"]]
    head = ["source", "species", "cells", "empty", "twice", "written", "genes", "matched"]
    all_of_them = f"{manifest['genes']:,} genes, {manifest['genes_measured_by_all']:,} of them measured by all sources"
    text = f"{table(head, rows)}\n{output}: {manifest['cells']:,} cells, {all_of_them}"
    data = {"output": output, "manifest": beside(output, ".manifest.json"), "duplicates": pairs, **_facts(manifest)}
    console.result(text, data, as_json=as_json)


def _facts(manifest: Mapping[str, Any]) -> dict[str, Any]:
    keys = ("cells", "genes", "genes_measured_by_all", "species", "notes", "sources")
    return {"pairs": manifest["duplicates"], **{key: manifest[key] for key in keys}}


def in_words(manifest: Mapping[str, Any]) -> list[str]:
    """What was found about cells that are there twice, a sentence a finding."""
    same, twins, nearly, barcode_only, by_chance = manifest["duplicates"].values()
    found = []
    what = {"dropped": "the first of each is kept", "kept": "all are kept"}.get(manifest["duplicates_are"], "")
    if same:
        found.append(f"{same:,} pairs of cells of two files have the same counts: they are one cell, {what}")
    if nearly:
        found.append(
            f"{nearly:,} pairs of cells of two files have one barcode and nearly the same counts: one library counted "
            f"twice, {what}"
        )
    if twins:
        found.append(f"{twins:,} cells have the counts of another cell of their own file, {what}")
    if barcode_only:
        found.append(
            f"{barcode_only:,} pairs of cells of two files have one barcode and other counts: they are different cells "
            f"and kept (about {by_chance:,.0f} are expected of 10x barcodes, which repeat by chance)"
        )
    return found or ["no cell is there twice"]


COMMANDS = {
    merge: examples(
        "evercell merge sample1 sample2 old.h5ad --cells cells.csv --output merged.h5ad",
        "evercell merge human.h5ad mouse.h5 --genes intersection --batch sample --output merged.zarr",
        "evercell merge first.h5ad second.h5ad --duplicates error --output merged.h5ad --json",
    ),
}

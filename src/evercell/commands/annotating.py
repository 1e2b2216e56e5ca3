"""`annotate`, `embed` and `evaluate`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from evercell.commands.console import Console, examples
from evercell.commands.models import check_model, load_model, model_and_cells
from evercell.commands.options import Device, GeneColumn, Json, KeyAdded, Labelled, Layer, Model, Report, Species
from evercell.commands.parts import annotate_parts, in_parts
from evercell.commands.paths import CELL_SUFFIXES, TABLE_SUFFIXES, check_file_output, check_report, is_table, read_file
from evercell.errors import LabelsError, SettingsError
from evercell.registry import AUTO

if TYPE_CHECKING:
    from anndata import AnnData

    from evercell.annotation import Annotation
    from evercell.annotator import Annotator

FEW_GENES = 0.6  # share of the model's genes below which the user is told to expect less
File = Annotated[Path, typer.Argument(metavar="FILE", help="Cells with raw counts: .h5ad, .zarr, 10x, .loom, .csv.")]
Files = Annotated[
    Path,
    typer.Argument(
        metavar="FILE|FOLDER",
        help="Cells with raw counts: .h5ad, .zarr, 10x, .loom, .csv; or a folder of .h5ad, .zarr and 10x .h5 files.",
    ),
]
Output = Annotated[
    Path,
    typer.Option("--output", metavar="FILE", help=".h5ad or .zarr: FILE and what is new; .csv or .tsv: a table."),
]


def annotate(
    context: typer.Context,
    *,
    file: Files,
    model: Model,
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            metavar="FILE|FOLDER",
            help=".h5ad or .zarr: FILE and what is new; .csv or .tsv: a table; a folder: the labels in parts.",
        ),
    ],
    reject: Annotated[
        str | None,
        typer.Option(
            "--reject",
            metavar="off|RATE",
            help="Share of cells of known types that may be called Unknown; if not given, the one that the model chose "
            "at its training. off labels every cell.",
        ),
    ] = None,
    sets: Annotated[
        float | None,
        typer.Option(
            "--sets",
            metavar="RATE",
            help="Add evercell_set, the types that a cell may be of at this rate of errors (such as 0.1), and "
            "evercell_lineage, what all of them are.",
        ),
    ] = None,
    unknown_q: Annotated[
        bool,
        typer.Option(
            "--unknown-q",
            help="Add evercell_unknown_q: of cells with at most 0.1, a tenth are expected to be of known types.",
        ),
    ] = False,
    report: Report = None,
    truth: Annotated[
        str | None, typer.Option("--truth", metavar="KEY", help="Column of obs that the report compares with.")
    ] = None,
    layer: Layer = None,
    species: Species = "auto",
    gene_column: GeneColumn = None,
    key_added: KeyAdded = "evercell",
    compat: Annotated[
        str | None,
        typer.Option(
            "--compat",
            metavar="NAME",
            help="celltypist: add predicted_labels (never Unknown) and conf_score, with --majority over_clustering and "
            "majority_voting too.",
        ),
    ] = None,
    majority: Annotated[
        bool,
        typer.Option("--majority", help="Add evercell_majority: the most frequent label among cells that look alike."),
    ] = False,
    clusters: Annotated[
        str | None,
        typer.Option(
            "--clusters", metavar="KEY", help="Vote in the clusters of this column of obs, such as leiden, instead."
        ),
    ] = None,
    empty_cells: Annotated[
        str, typer.Option("--empty-cells", metavar="error|keep", help="keep: a cell without counts is called Unknown.")
    ] = "error",
    adapt: Annotated[
        bool,
        typer.Option("--adapt/--no-adapt", help="Fit the linear member again where FILE lacks genes it leans on."),
    ] = True,
    device: Device = "auto",
    engine: Annotated[
        str, typer.Option("--engine", metavar="local|ray", help="Who labels: this machine, or a Ray cluster.")
    ] = "local",
    workers: Annotated[
        int | None, typer.Option("--workers", metavar="N", help="Label N parts at a time, each in its own process.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Label the cells of a file. All that was in the file is kept; labels go to obs under the name evercell.

    Of a folder of files, or with --engine or --workers, the labels alone are written.
    """
    from evercell.annotation import rejection_rate
    from evercell.cells import write_cells, write_table
    from evercell.copying import extended
    from evercell.stored_cells import watch
    from evercell.training import choose_device

    console: Console = context.obj
    started = time.perf_counter()
    check_model(model)
    rejection_rate(reject)
    if in_parts(file, output, engine=engine, workers=workers):
        annotate_parts(
            file,
            output,
            console,
            for_one={"report": report, "truth": truth, "compat": compat, "majority": majority, "clusters": clusters}
            | {"unknown-q": unknown_q},
            as_json=as_json,
            model=model,
            engine=engine,
            workers=workers,
            reject=reject,
            sets=sets,
            key_added=key_added,
            layer=layer,
            species=species,
            gene_column=gene_column,
            adapt=adapt,
            empty_cells=empty_cells,
            device=device,
        )
        return
    choose_device(device)
    check_file_output(output, (*CELL_SUFFIXES, *TABLE_SUFFIXES))
    if compat not in (None, "celltypist"):
        raise SettingsError(f"--compat is `{compat}`", hint="pass --compat celltypist, or leave it out")
    _check_report(report, truth)
    table_only = is_table(output) and report is None
    streamed = is_table(output) or _can_be_extended(file, output)
    check_unchanged = watch(file)
    model, annotator, adata = _model_and_cells(
        model,
        file,
        console,
        layer=layer,
        species=species,
        gene_column=gene_column,
        device=device,
        adapt=adapt,
        backed=streamed,
    )
    if truth is not None:
        check_column(adata, truth, name=str(file), option="--truth")
    options: dict[str, Any] = {
        "reject": reject,
        "sets": sets,
        "unknown_q": unknown_q,
        "key_added": key_added,
        "adapt": adapt,
        "layer": layer,
        "species": species,
        "gene_column": gene_column,
        "empty_cells": empty_cells,
        "majority": clusters or majority,
        "name": str(file),
        "model_name": Path(model).resolve().name,
        "device": device,
        "shown": console.shown,
    }
    with _annotation(annotator, adata, file, output, streamed=streamed, arrays=not table_only, **options) as result:
        if compat == "celltypist":
            for column, values in result.celltypist().items():
                result.obs[column] = values
        _say_what_was_found(result, console)
        check_unchanged()
        if not table_only:
            result.write_into(adata)
        if is_table(output):
            write_table(result.obs.rename_axis("cell"), output)
        elif streamed:
            arrays = {name: adata.obsm[name] for name in (f"X_{key_added}", f"{key_added}_proba")}
            facts = result.facts(adata.obs[list(result.obs)])
            extended(file, output, obs=adata.obs, obsm=arrays, uns=facts, check=check_unchanged)
        else:
            write_cells(adata, output)
        console.note(f"written: {output}")
        if report is not None:
            _write_report(annotator, adata, report, key=key_added, truth=truth, file=file)
            console.note(f"report: {report}")
    seconds = time.perf_counter() - started
    console.detail(f"{seconds:.1f} seconds")
    shares = result.obs[key_added].value_counts()
    data = {
        "output": output,
        "report": report,
        "cells": len(result.obs),
        "labels": {str(name): int(number) for name, number in shares[shares > 0].items()},
        "mean_confidence": float(result.obs[f"{key_added}_confidence"].mean()),
        **result.info,
        "seconds": round(seconds, 1),
    }
    console.result(result.summary(), data, as_json=as_json)


def embed(
    context: typer.Context,
    *,
    file: File,
    model: Model,
    output: Output,
    layer: Layer = None,
    species: Species = "auto",
    gene_column: GeneColumn = None,
    key_added: KeyAdded = "evercell",
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Write the representation of each cell.

    It goes to obsm under the name X_evercell, or into a table.
    """
    import pandas as pd

    from evercell.annotation import embed as embed_cells
    from evercell.cells import write_cells, write_table
    from evercell.stored_cells import watch
    from evercell.training import choose_device

    console: Console = context.obj
    check_model(model)
    choose_device(device)
    check_file_output(output, (*CELL_SUFFIXES, *TABLE_SUFFIXES))
    check_unchanged = watch(file)
    model, annotator, adata = model_and_cells(
        model,
        file,
        console,
        layer=layer,
        species=species,
        gene_column=gene_column,
        device=device,
        backed=is_table(output),
    )
    found = embed_cells(
        annotator,
        adata,
        layer=layer,
        species=species,
        gene_column=gene_column,
        name=str(file),
        device=device,
        shown=console.shown,
    )
    check_unchanged()
    if is_table(output):
        columns = [f"{key_added}_{number}" for number in range(found.shape[1])]
        write_table(pd.DataFrame(found, index=adata.obs_names, columns=columns).rename_axis("cell"), output)
    else:
        adata.obsm[f"X_{key_added}"] = found
        write_cells(adata, output)
    console.note(f"written: {output}")
    text = f"{found.shape[0]:,} cells, {found.shape[1]} dimensions"
    console.result(text, {"output": output, "cells": found.shape[0], "width": found.shape[1]}, as_json=as_json)


def evaluate(
    context: typer.Context,
    *,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Annotated cells.")],
    labels: Labelled,
    key: Annotated[str, typer.Option("--key", metavar="NAME", help="Column of obs to score.")] = "evercell",
    as_json: Json = False,
) -> None:
    """Score labels against the true types.

    Both are columns of obs. A cell of a type that the model does not know is right when it is called Unknown.
    """
    from evercell.evaluation import evaluate as score

    console: Console = context.obj
    adata = read_file(file, console)
    check_column(adata, labels, name=str(file), option="--labels")
    check_column(adata, key, name=str(file), option="--key", hint="`evercell annotate` the file first, or ")
    info = adata.uns.get(key.removesuffix("_majority"), {})
    classes = [str(name) for name in info["classes"]] if "classes" in info else None
    truth = adata.obs[labels]
    if classes is not None and not set(truth.dropna().astype(str)) & set(classes):
        console.warning(
            f"no type in `{labels}` has the name of a type of the model: every cell counts as one of an unknown type"
        )
    confidence = adata.obs[f"{key}_confidence"].to_numpy() if f"{key}_confidence" in adata.obs else None
    found = score(truth, adata.obs[key], confidence=confidence, known_types=classes)
    console.result(found.table(), found.to_dict(), as_json=as_json)


COMMANDS = {
    annotate: examples(
        "evercell annotate query.h5ad --model model --output annotated.h5ad",
        "evercell annotate query.h5 --model auto --output annotated.h5ad --majority --report report.html --reject off",
        "evercell annotate atlas/ --model human-immune --output labels --workers 8",
    ),
    embed: examples(
        "evercell embed query.h5ad --model model --output embedded.h5ad",
        "evercell embed query.h5ad --model model --output embedding.csv",
    ),
    evaluate: examples(
        "evercell evaluate annotated.h5ad --labels cell_type",
        "evercell evaluate annotated.h5ad --labels cell_type --key evercell_majority --json",
    ),
}


def check_column(adata: AnnData, column: str, *, name: str, option: str, hint: str = "") -> None:
    """Whether `obs` has a column.

    Raises
    ------
    LabelsError
        If it has not; the message lists those that it has.
    """
    if column not in adata.obs:
        columns = ", ".join(f"`{one}`" for one in adata.obs) or "none"
        raise LabelsError(
            f"`{name}` has no column `{column}` in obs; columns: {columns}", hint=f"{hint}name the column with {option}"
        )


def _check_report(report: Path | None, truth: str | None) -> None:
    check_report(report)
    if report is None and truth is not None:
        raise SettingsError(
            "--truth is for the report", hint="pass --report FILE too; `evercell evaluate` scores the output"
        )


def _write_report(model: Annotator, adata: AnnData, path: Path, *, key: str, truth: str | None, file: Path) -> None:
    from evercell.reporting import write_report

    stages = [stage.facts for stage in model.ledger]
    write_report(adata, path, key=key, truth=truth, title=f"Cell types of {file.name}", stages=stages)


@contextmanager
def _annotation(
    model: Annotator, adata: AnnData, file: Path, output: Path, *, streamed: bool, arrays: bool, **options: Any
) -> Iterator[Annotation]:
    """The annotation of a file, part by part where `streamed`."""
    from evercell.annotation import annotate as annotate_cells
    from evercell.streaming import annotated

    if not streamed:
        yield annotate_cells(model, adata, **options)
        return
    with annotated(model, adata, file, output, arrays=arrays, **options) as result:
        yield result


def _can_be_extended(file: Path, output: Path) -> bool:
    """Whether the output can be a copy of the file with columns added; a file that is missing or damaged is no copy."""
    from evercell.copying import can_be_extended

    try:
        return can_be_extended(file, output)
    except Exception:  # reading it says what is wrong
        return False


def _model_and_cells(
    name: str, file: Path, console: Console, *, layer: str | None, backed: bool, **options: Any
) -> tuple[str, Annotator, AnnData]:
    """`model_and_cells`; where `backed`, matrices of a .zarr or a 10x .h5 stay in the file too."""
    if name == AUTO or not backed or file.suffix not in (".zarr", ".h5", ".hdf5"):
        return model_and_cells(name, file, console, layer=layer, backed=backed, **options)
    from evercell.cells import read_cells

    model = load_model(name, console)
    adata = read_cells(file, layer=layer, backed=True)
    console.note(f"`{file}`: {adata.n_obs:,} cells, {adata.n_vars:,} genes")
    return name, model, adata


def _say_what_was_found(result: Annotation, console: Console) -> None:
    info: dict[str, Any] = result.info
    undone = "" if info["counts_transform"] == "none" else f" ({info['counts_transform']})"
    console.note(f"counts from {info['counts_source']}{undone}")
    console.note(info["coverage"]["sentence"])
    if info["coverage"]["share_of_model"] < FEW_GENES:
        console.warning("few of the model's genes were measured: expect less, and look at the confidence")
    for note in info["notes"]:
        console.note(note)
    unknown = int((result.labels == "Unknown").sum())
    if unknown:
        console.note(f"{unknown:,} of {len(result.obs):,} cells ({unknown / len(result.obs):.1%}) are called Unknown")

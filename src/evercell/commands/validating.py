"""`crossval` and `compare`: how good a model of these cells is, alone and beside other methods."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from evercell.commands.asking import (
    Asked,
    Backbone,
    BackboneSetting,
    Balance,
    Base,
    Finetune,
    PresetName,
    Samples,
    Tokenizer,
    asked_preset,
    check_asked,
    model_settings,
)
from evercell.commands.console import Console, examples
from evercell.commands.options import Device, GeneColumn, Json, Labelled, Layer, Report, Seed, Species
from evercell.commands.paths import check_report, file_names, read_file
from evercell.errors import SettingsError
from evercell.model_card import table
from evercell.outputs import check_folder

if TYPE_CHECKING:
    from evercell.crossvalidation import CrossValidation

Files = Annotated[list[Path], typer.Argument(metavar="FILE", help="Labelled cells, raw counts.")]
Output = Annotated[
    Path,
    typer.Option("--output", metavar="DIR", help="Folder for tables and figures; the same call goes on from there."),
]
NumberOfFolds = Annotated[int, typer.Option("--folds", metavar="N", help="Number of folds.")]
By = Annotated[
    str,
    typer.Option(
        "--by",
        metavar="donor|batch|study|stratified",
        help="What a fold keeps whole: donors, batches or data sets. stratified: random cells, which flatters.",
    ),
]
DonorKey = Annotated[str, typer.Option("--donor", metavar="KEY", help="Column of obs with donors, for --by donor.")]
BatchKey = Annotated[str, typer.Option("--batch", metavar="KEY", help="Column of obs with batches, for --by batch.")]
Twins = Annotated[
    str,
    typer.Option(
        "--twins",
        metavar="refuse|together|apart",
        help="What to do with copies of a cell in several folds: refuse, keep them in one, or give a marked figure.",
    ),
]
BYS = ("donor", "batch", "study", "stratified")


def crossval(
    context: typer.Context,
    *,
    files: Files,
    labels: Labelled,
    by: By,
    output: Output,
    folds: NumberOfFolds = 5,
    donor: DonorKey = "donor",
    batch: BatchKey = "batch",
    twins: Twins = "refuse",
    base: Base = None,
    finetune: Finetune = None,
    preset: PresetName = None,
    balance: Balance = None,
    layer: Layer = None,
    species: Species = "auto",
    gene_column: GeneColumn = None,
    seed: Seed = 0,
    samples: Samples = None,
    tokenizer: Tokenizer = None,
    backbone: Backbone = None,
    backbone_setting: BackboneSetting = None,
    device: Device = "auto",
    report: Report = None,
    as_json: Json = False,
) -> None:
    """Train on some donors, label the others, and turn round.

    Genes, thresholds and how types are balanced are settled within each fold, on its training cells. The linear
    baseline is given the same folds.
    """
    check_report(report)
    asked = Asked(base, tokenizer, backbone, tuple(backbone_setting or ()), samples)
    options = {"layer": layer, "species": species, "gene_column": gene_column, "device": device, "seed": seed}
    made = {"preset": preset, "finetune": finetune, "balance": balance}
    found = _validated(
        context.obj, files, labels, ["evercell", "linear"], output, asked, made,
        by=by, keys={"donor": donor, "batch": batch}, n_folds=folds, twins=twins, options=options,
    )  # fmt: skip
    if report is not None:
        _fold_report(found, report, context.obj)
    text = f"{scores_table(found)}\n\n{_types_table(found)}"
    context.obj.result(text, found.to_dict() | {"output": output, "report": report}, as_json=as_json)


def compare(
    context: typer.Context,
    *,
    files: Files,
    labels: Labelled,
    by: By,
    output: Output,
    methods: Annotated[
        str | None,
        typer.Option(
            "--methods", metavar="NAME,NAME", help="evercell, linear, knn, celltypist, scanvi, singler; all installed."
        ),
    ] = None,
    folds: NumberOfFolds = 5,
    donor: DonorKey = "donor",
    batch: BatchKey = "batch",
    twins: Twins = "refuse",
    base: Base = None,
    finetune: Finetune = None,
    preset: PresetName = None,
    balance: Balance = None,
    layer: Layer = None,
    species: Species = "auto",
    gene_column: GeneColumn = None,
    seed: Seed = 0,
    samples: Samples = None,
    device: Device = "auto",
    report: Report = None,
    as_json: Json = False,
) -> None:
    """Compare evercell with other methods on the same folds.

    The others are given the genes that all files measured. Differences are tested pairwise over the folds; with few
    folds only large ones can be told from chance.
    """
    from evercell.cells import write_table
    from evercell.comparison import METHODS, available, compared_figure, significance

    console: Console = context.obj
    check_report(report)
    if methods is None:
        there = available()
        chosen = ["evercell", *there]
        if missing := [name for name in METHODS if name not in there]:
            console.note(f"not installed, left out: {', '.join(missing)} (pip install evercell[bench])")
    else:
        chosen = list(dict.fromkeys(name.strip() for name in methods.split(",") if name.strip()))
        if len(chosen) < 2:
            raise SettingsError(f"--methods names {len(chosen)} method", hint="name two or more, parted by commas")
    asked = Asked(base, None, None, (), samples)
    options = {"layer": layer, "species": species, "gene_column": gene_column, "device": device, "seed": seed}
    made = {"preset": preset, "finetune": finetune, "balance": balance}
    found = _validated(
        console, files, labels, chosen, output, asked, made,
        by=by, keys={"donor": donor, "batch": batch}, n_folds=folds, twins=twins, options=options,
    )  # fmt: skip
    tests = {figure: significance(found.scores, figure=figure) for figure in ("accuracy", "macro_f1")}
    for figure, one in tests.items():
        write_table(one, output / f"significance-{figure}.csv")
    compared_figure(found.scores, output / "compared.png")
    if report is not None:
        _fold_report(found, report, console)
    lines = [scores_table(found)]
    for figure, one in tests.items():
        rows = [
            [
                str(row["method"]),
                f"{row['mean']:.3f}",
                "" if row["difference"] is None or place == 0 else f"{row['difference']:+.3f}",
                "" if place == 0 else _p(row["p_holm"]),
            ]
            for place, row in enumerate(one.to_dict(orient="records"))
        ]
        head = [figure.replace("_", "-"), "mean", f"against {found.methods[0]}", "p (paired over folds, Holm)"]
        lines.append(table(head, rows))
    data = found.to_dict() | {"output": output, "report": report}
    data["significance"] = {figure: one.to_dict(orient="records") for figure, one in tests.items()}
    console.result("\n\n".join(lines), data, as_json=as_json)


def _fold_report(found: CrossValidation, path: Path, console: Console) -> None:
    from evercell.reporting.fold_report import write_fold_report

    write_fold_report(found, path)
    console.note(f"report: {path}")


def _p(value: Any) -> str:
    return "too few folds" if value is None else f"{value:.3f}"


def _validated(
    console: Console,
    files: list[Path],
    labels: str,
    methods: list[str],
    output: Path,
    asked: Asked,
    made: dict[str, Any],
    *,
    by: str,
    keys: dict[str, str],
    n_folds: int,
    twins: str,
    options: dict[str, Any],
) -> CrossValidation:
    """Check what was asked for, run the folds, write the tables, and say what makes the figures optimistic."""
    from evercell.crossvalidation import cross_validate
    from evercell.reporting.folds import fold_figures

    if by not in BYS:
        raise SettingsError(f"folds cannot be made by `{by}`", hint=f"choose one of: {', '.join(BYS)}")
    if output.exists() and not output.is_dir():
        raise SettingsError(f"`{output}` is a file", hint="name a folder with --output")
    check_folder(output, "--output")
    published = asked_preset(made.pop("preset"), console)
    check_asked(asked, published, **made)
    names = file_names(files)
    given = asked.model(console)
    adatas = [read_file(file, console, layer=options["layer"]) for file in files]
    n_cells = sum(adata.n_obs for adata in adatas)
    settings = model_settings(asked, given, published, n_cells, **made)
    found = cross_validate(
        adatas,
        labels,
        by=keys.get(by, by),
        n_folds=n_folds,
        methods=methods,
        twins=twins,
        base=given,
        settings=settings,
        names=names,
        state_folder=output / "folds",
        shown=console.shown,
        **options,
    )
    found.save(output)
    fold_figures(found, output)
    for warning in found.warnings:
        console.warning(warning)
    console.note(f"tables and figures: {output}")
    return found


def scores_table(found: CrossValidation) -> str:
    """Mean and spread of every method's figures, then the folds of the first method."""
    from evercell.crossvalidation import FIGURES
    from evercell.evaluation import IN_WORDS

    words = [IN_WORDS[name] for name in FIGURES]
    summary = found.summary()
    means = [
        [str(method), *(f"{row[(name, 'mean')]:.3f} ± {row[(name, 'std')]:.3f}" for name in FIGURES)]
        for method, row in summary.iterrows()
    ]
    first = found.scores[found.scores["method"] == found.methods[0]].to_dict(orient="records")
    folds = [
        [
            f"fold {row['fold']}",
            f"{row['scored']:,} of {row['n_test']:,}",
            *(f"{row[name]:.3f}" for name in FIGURES),
            _shortened(str(row["held_out"])),
        ]
        for row in first
    ]
    return f"{table(['', *words], means)}\n\n{table([found.methods[0], 'cells scored', *words, 'held out'], folds)}"


def _shortened(names: str, most: int = 60) -> str:
    return names if len(names) <= most else f"{names[: most - 3]}..."


def _types_table(found: CrossValidation) -> str:
    """Types, best figures last: what to look at first is what goes wrong."""
    per_type = found.pooled(found.methods[0]).per_type.sort_values("f1")
    rows = [
        [str(name), f"{row['cells']:,.0f}", f"{row['precision']:.3f}", f"{row['recall']:.3f}", f"{row['f1']:.3f}"]
        for name, row in per_type.iterrows()
    ]
    return table(["type, all folds together", "cells", "precision", "recall", "f1"], rows)


COMMANDS = {
    crossval: examples(
        "evercell crossval labelled.h5ad --labels cell_type --by donor --output crossval",
        "evercell crossval a.h5ad b.h5ad c.h5ad --labels cell_type --by study --folds 3 --output crossval --json",
    ),
    compare: examples(
        "evercell compare labelled.h5ad --labels cell_type --by donor --output compared",
        "evercell compare merged.h5ad --labels cell_type --by batch --methods evercell,linear,knn --output compared",
    ),
}

"""write_fold_report: one self-contained HTML page about a cross-validation."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from evercell import __version__
from evercell.colours import type_colours
from evercell.reporting import figures
from evercell.reporting.findings import FEW_CELLS, LOW_F1, Attention, listed, plural
from evercell.reporting.page import write_page

if TYPE_CHECKING:
    import pandas as pd

    from evercell.crossvalidation import CrossValidation


def write_fold_report(found: CrossValidation, path: str | Path, *, title: str | None = None) -> Path:
    """Write one HTML page about a cross-validation: figures by method and fold, types, confusion, learning curves.

    Parameters
    ----------
    found
        What `cross_validate` gave; the first method is the one whose types and confusion are shown.
    path
        The HTML file; replaced whole or not at all.
    title
        Heading of the page.

    Returns
    -------
    Path
        `path`.

    Examples
    --------
    >>> write_fold_report(found, "crossval.html")  # doctest: +SKIP
    """
    from evercell.crossvalidation import FIGURES
    from evercell.evaluation import IN_WORDS

    first = found.methods[0]
    pooled = found.pooled(first)
    per_type = pooled.per_type.sort_values("cells", ascending=False, kind="stable")
    order = [str(name) for name in per_type.index]
    points = _attention(found, per_type)
    summary = found.summary()
    return write_page(
        "folds.html",
        path,
        scripts=("page.js",),
        title=title or "Cross-validation",
        first=first,
        n_cells=len(found.cells),
        n_folds=int(found.scores["fold"].nunique()),
        by=found.by,
        figures=[IN_WORDS[name] for name in FIGURES],
        methods_table=[
            {"name": str(name), "figures": [(row[(one, "mean")], row[(one, "std")]) for one in FIGURES]}
            for name, row in summary.iterrows()
        ],
        folds=[
            row | {"figures": [row[one] for one in FIGURES]}
            for row in found.scores[found.scores["method"] == first].to_dict(orient="records")
        ],
        colours=type_colours(order, first=order),
        types=[{"type": str(name), **row} for name, row in per_type.to_dict(orient="index").items()],
        confusion=figures.shares_table(figures.in_order(pooled.confusion, order)),
        curves=_curves(found.history),
        summary=_summary(found, summary, points),
        attention=points,
        methods=_methods(found, summary),
    )


def _curves(history: pd.DataFrame) -> list[dict[str, Any]]:
    """Of each fold its learning curve."""
    if not len(history) or "held_out_loss" not in history:
        return []
    curves = []
    for fold, rows in history.groupby("fold"):
        table = rows.rename(columns={"held_out_loss": "validation"})[["step", "loss", "validation"]]
        records = [{str(name): value for name, value in row.items()} for row in table.to_dict(orient="records")]
        if (curve := figures.learning_curve(records)) is not None:
            curves.append({"fold": str(fold), "curve": curve})
    return curves


def _attention(found: CrossValidation, per_type: pd.DataFrame) -> list[Attention]:
    points = [Attention(f"{warning[:1].upper()}{warning[1:]}.") for warning in found.warnings]
    poor = per_type[(per_type["f1"] < LOW_F1) & (per_type["cells"] >= FEW_CELLS)]
    if len(poor):
        names = [f"{name} (F1 {value:.2f})" for name, value in poor["f1"].items()]
        points.append(
            Attention(
                f"Types that are told badly from others: {listed(names)}.",
                "The confusion table shows with which. Two names for one type, or a type that few donors have, show up "
                "here; so do labels that are wrong.",
            )
        )
    return points


def _mean(summary: pd.DataFrame, method: str, figure: str) -> str:
    row = summary.loc[method]
    return f"{row[(figure, 'mean')]:.3f} ± {row[(figure, 'std')]:.3f}"


def _summary(found: CrossValidation, summary: pd.DataFrame, points: list[Attention]) -> list[str]:
    first, *others = found.methods
    n = int(found.scores["fold"].nunique())
    kept = "drawn at random by type" if found.by == "stratified" else f"that keep each {found.by} whole"
    lines = [
        f"{plural(len(found.cells), 'cell')} were labelled once each, by a model that had not seen them, in {n} folds "
        f"{kept}.",
        f"The mean accuracy of {first} is {_mean(summary, first, 'accuracy')}, macro-F1 "
        f"{_mean(summary, first, 'macro_f1')} (mean and standard deviation over folds).",
    ]
    lines += [f"{other}: accuracy {_mean(summary, other, 'accuracy')} on the same folds." for other in others]
    if points:
        lines.append(f"{plural(len(points), 'point')} below {'needs' if len(points) == 1 else 'need'} attention.")
    return lines


def _methods(found: CrossValidation, summary: pd.DataFrame) -> str:
    """A paragraph to copy into a manuscript."""
    n = int(found.scores["fold"].nunique())
    kept = "random cells, by type" if found.by == "stratified" else f"whole by {found.by}"
    unscored = int((~found.cells["known"]).sum())
    figures_said = [
        f"{method}: accuracy {_mean(summary, method, 'accuracy')}, macro-F1 {_mean(summary, method, 'macro_f1')}"
        for method in found.methods
    ]
    lines = [
        f"{plural(len(found.cells), 'cell')} were labelled in {n}-fold cross-validation with evercell {__version__} "
        f"(folds {kept}, seed {found.seed}).",
        "Genes, thresholds, calibration and weights were estimated in each fold on its training cells alone.",
    ]
    if unscored:
        lines.append(f"{plural(unscored, 'cell')} of types that the training cells of their fold lack were not scored.")
    lines.append(f"Mean and standard deviation over folds: {'; '.join(figures_said)}.")
    return " ".join(lines)

"""Methods compared over folds, drawn."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from evercell.comparison.significance import significance
from evercell.errors import SettingsError
from evercell.evaluation import IN_WORDS
from evercell.outputs import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FIGURES = ("accuracy", "macro_f1")
KINDS = {".png": {}, ".pdf": {"CreationDate": None}, ".svg": {"Date": None}}  # without the time of writing
# Blue and vermilion of Okabe and Ito, which colour-blind eyes tell apart.
FIRST, OTHER, INK = "#0072B2", "#D55E00", "#333333"
ROW, HEAD, WIDTH = 0.46, 1.35, 5.6  # inches


def compared_figure(folds: pd.DataFrame, path: str | os.PathLike[str], *, first: str | None = None) -> None:
    """Draw every method's figures over folds: a dot a fold, mean and standard deviation, and p against the first.

    One panel each for accuracy and macro-F1, as far as the table has them; methods in rows, the best mean on top. The p
    values are those of `significance`, corrected by Holm over the methods.

    Parameters
    ----------
    folds
        One row a method and fold, as `significance` takes it.
    path
        File to write; the suffix says which: ``.png``, ``.pdf`` or ``.svg``.
    first
        Method that the others are compared with; that of the first row if None.

    Raises
    ------
    SettingsError
        The suffix is another, or the table has neither figure.
    CellsError
        The folder does not exist or cannot be written to.
    """
    path = Path(path)
    kind = path.suffix.lower()
    if kind not in KINDS:
        raise SettingsError(f"`{path}` does not end in {', '.join(KINDS)}", hint="give the figure one of these")
    drawn = [name for name in FIGURES if name in folds and folds[name].notna().any()]
    if not drawn:
        raise SettingsError(
            f"the table of folds has no figure to draw; found {', '.join(map(str, folds.columns))}",
            hint=f"give one of {', '.join(FIGURES)}",
        )
    tests = {name: significance(folds, name, first=first) for name in drawn}

    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    rows = max(len(table) for table in tests.values())
    figure = Figure(figsize=(WIDTH * len(drawn), HEAD + ROW * rows), layout=ConstrainedLayoutEngine(wspace=0.06))
    panels = figure.subplots(1, len(drawn), squeeze=False)[0]
    for axes, name in zip(panels, drawn, strict=True):
        _panel(axes, folds, tests[name], name)
    figure.supxlabel(_legend(pd.concat(tests.values()), 100 * len(drawn)), fontsize=8, color=INK, x=0.01, ha="left")
    metadata: dict[str, Any] = KINDS[kind]
    with atomic_path(path) as unfinished:
        figure.savefig(unfinished, format=kind[1:], dpi=200, metadata=metadata)


def _panel(axes: Axes, folds: pd.DataFrame, tests: pd.DataFrame, name: str) -> None:
    """Draw one figure: methods in rows, the best on top; the p values stand in a column on the right."""
    first = tests["method"].iloc[0]
    names = list(dict.fromkeys(folds["fold"]))
    shown = tests[tests["mean"].notna()]
    shown = shown.iloc[shown["mean"].astype(float).argsort(kind="stable")[::-1]]
    for place, row in enumerate(shown.to_dict("records")):
        colour = FIRST if row["method"] == first else OTHER
        own = folds[folds["method"].astype(str) == row["method"]]
        values = own.groupby("fold", sort=False)[name].mean().dropna()
        # Dots of like value lie on each other: each fold has its own height, the same in every row, below the mean.
        heights = [place + 0.12 + 0.26 * (names.index(fold) + 0.5) / len(names) for fold in values.index]
        axes.scatter(values.to_numpy(), heights, s=14, color=colour, alpha=0.7, linewidths=0, zorder=2)
        axes.errorbar(
            row["mean"],
            place - 0.06,
            xerr=row["sd"],
            fmt="D",
            color=colour,
            markersize=6,
            capsize=4,
            elinewidth=1.6,
            zorder=3,
        )
        text = f"{row['mean']:.3f}   {_against(row, first)}"
        axes.annotate(
            text, (1.02, place), xycoords=("axes fraction", "data"), va="center", fontsize=8, color=INK,
            annotation_clip=False,
        )  # fmt: skip
    axes.set_yticks(range(len(shown)), shown["method"].tolist())
    axes.set_ylim(len(shown) - 0.5, -0.5)
    axes.set_xlabel(IN_WORDS[name])
    axes.grid(axis="x", color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="y", length=0)


def _against(row: Mapping[Hashable, Any], first: str) -> str:
    """What is said of a method beside its row."""
    if row["method"] == first:
        return ""
    if row["p_holm"] is None:
        return "no test"
    if row["p_holm"] < 0.001:
        return "p < 0.001"
    return f"p = {row['p_holm']:.3f}" if row["p_holm"] < 0.1 else f"p = {row['p_holm']:.2f}"


def _legend(tests: pd.DataFrame, width: int) -> str:
    """What the marks mean, and why there is no p value where there is none."""
    first, folds = tests["method"].iloc[0], tests["folds"].iloc[0]
    lines = [
        f"Dots: {folds} fold{'s' * (folds != 1)}. Diamond and bar: mean and standard deviation, mean in figures.",
        f"p: against {first}, paired over folds (corrected resampled t-test, two-sided, Holm over methods).",
    ]
    for note, of_note in tests[tests["note"] != ""].groupby("note", sort=False):
        lines.append(f"No test for {', '.join(dict.fromkeys(of_note['method']))}: {note}.")
    return "\n".join(part for line in lines for part in textwrap.wrap(line, width))

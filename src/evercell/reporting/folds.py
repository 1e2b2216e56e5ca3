"""Figures of a cross-validation: figures by fold, confusion of types, learning curves."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from evercell.outputs import atomic_path

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from evercell.crossvalidation import CrossValidation

# Okabe and Ito's colours, which colour-blind eyes tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def fold_figures(found: CrossValidation, folder: Path) -> None:
    """Write ``confusion.png`` of the first method and, where evercell was trained, ``curves.png``."""
    from matplotlib.figure import Figure

    confusion = found.pooled(found.methods[0]).confusion
    height = max(3.0, 0.27 * len(confusion) + 1.8)
    width = max(4.0, 0.27 * confusion.shape[1] + 3.2)
    figure = Figure(figsize=(width, height), layout="constrained")
    _confusion(figure.add_subplot(), confusion, found.methods[0])
    _write(figure, folder / "confusion.png")
    if len(found.history) and "held_out_loss" in found.history:
        figure = Figure(figsize=(9.0, 3.4), layout="constrained")
        left, right = figure.subplots(1, 2)
        _curves(left, found.history, {"loss": "--", "held_out_loss": "-"}, "loss (dashed: of the last training batch)")
        _curves(right, found.history, {"held_out_accuracy": "-"}, "accuracy, cells held out in training")
        right.set_ylim(top=1.0)
        left.legend(fontsize="small", frameon=False)
        _write(figure, folder / "curves.png")


def _confusion(axes: Axes, confusion: pd.DataFrame, method: str) -> None:
    """Share of the cells of each true type (rows) by predicted type, the number where it is a tenth or more."""
    shares = confusion.to_numpy() / np.maximum(confusion.to_numpy().sum(axis=1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for row, column in zip(*np.nonzero(shares >= 0.1), strict=True):
        colour = "white" if shares[row, column] > 0.5 else "black"
        text = f"{shares[row, column]:.2f}".removeprefix("0")
        axes.text(column, row, text, ha="center", va="center", fontsize=7, color=colour)
    axes.set_xticks(range(confusion.shape[1]), confusion.columns, rotation=90, fontsize="small")
    sizes = confusion.sum(axis=1)
    axes.set_yticks(range(len(confusion)), [f"{name} ({sizes[name]:,})" for name in confusion.index], fontsize="small")
    axes.set_xlabel(f"label by {method}")
    axes.set_ylabel("true type (cells)")


def _curves(axes: Axes, history: pd.DataFrame, lines: dict[str, str], words: str) -> None:
    for place, (fold, rows) in enumerate(history.groupby("fold")):
        for column, style in lines.items():
            label = f"fold {fold}" if style == "-" else None
            axes.plot(rows["step"], rows[column], style, color=COLOURS[place % len(COLOURS)], lw=1.2, label=label)
    axes.set_xlabel("training step")
    axes.set_ylabel(words)
    axes.spines[["top", "right"]].set_visible(False)


def _write(figure: Figure, path: Path) -> None:
    with atomic_path(path) as unfinished:
        figure.savefig(unfinished, dpi=150)

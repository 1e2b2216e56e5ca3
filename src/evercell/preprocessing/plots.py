"""Pictures of a quality filter: the numbers of all cells and of those that were kept, side by side."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from evercell.errors import SettingsError
from evercell.outputs import atomic_path
from evercell.preprocessing.quality import COUNTS, GENES, MITO, SCORE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SUFFIXES = (".png", ".pdf", ".svg")
MOST_BATCHES = 12  # of more, all cells are drawn together
LEAST_SHAPE = 10  # cells from which a violin is drawn; of fewer, the cells themselves
BEFORE, AFTER, LIMIT = "#9aa5b1", "#2f6f9f", "#b3392f"


@dataclass(frozen=True)
class _Panel:
    """One number of a cell: column, title with its unit, logarithmic or not, thresholds of all cells and of a batch."""

    column: str
    title: str
    log: bool
    fixed: tuple[str, ...]
    batch: tuple[str, ...]


PANELS = (
    _Panel(GENES, "genes a cell", True, ("min_genes",), ("genes_low", "genes_high")),
    _Panel(COUNTS, "counts a cell", True, ("min_counts", "max_counts"), ("counts_low", "counts_high")),
    _Panel(MITO, "mitochondrial share (% of counts)", False, ("max_mito",), ("mito_high",)),
    _Panel(SCORE, "doublet score (Scrublet, 0 to 1), of cells that passed the filter", False, (), ("doublet_score",)),
)


def write_plots(
    metrics: pd.DataFrame,
    path: str | os.PathLike[str],
    *,
    settings: Mapping[str, Any],
    limits: Mapping[str, Mapping[str, float]],
) -> None:
    """Draw the numbers of the cells before and after, with the thresholds as lines.

    Parameters
    ----------
    metrics
        One row a cell: ``batch``, ``kept`` and the numbers of `quality`; numbers that no cell has are left out.
    path
        ``.png``, ``.pdf`` or ``.svg``.
    settings
        Thresholds by their names in `PreprocessingSettings`.
    limits
        Thresholds of each batch.

    Raises
    ------
    SettingsError
        The suffix is another.
    """
    # A figure of its own, without pyplot: no backend is chosen and no state of the caller's figures is touched.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise SettingsError(f"`{path}` does not end in {', '.join(SUFFIXES)}", hint="give the plots one of these")
    panels = [one for one in PANELS if one.column in metrics and metrics[one.column].notna().any()]
    batches = list(pd.unique(metrics["batch"]))
    by_batch = 1 < len(batches) <= MOST_BATCHES
    rows = max(2.0, 0.34 * len(batches) + 1.1) if by_batch else 2.2
    figure = Figure(figsize=(10, rows * len(panels) + 0.9), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(panels), 2, sharex="row", sharey="row", squeeze=False)
    for (left, right), panel in zip(axes, panels, strict=True):
        drawn = {left: metrics, right: metrics[metrics["kept"]]}
        for axis, cells in drawn.items():
            colour = BEFORE if axis is left else AFTER
            if by_batch:
                _violins(axis, cells, panel, batches, colour)
            else:
                _histogram(axis, metrics[panel.column], cells[panel.column], panel, colour)
            _thresholds(axis, panel, settings, limits, batches, by_batch=by_batch)
            axis.set_xlabel(panel.title)
            axis.tick_params(labelleft=axis is left)
            for side in ("top", "right"):
                axis.spines[side].set_visible(False)
        left.set_ylabel("batch" if by_batch else "cells")
    before, after = len(metrics), int(metrics["kept"].sum())
    axes[0, 0].set_title(f"before: {before:,} cells")
    axes[0, 1].set_title(f"after: {after:,} cells")
    lines = "red: thresholds, dashed of all cells, solid of a batch"
    if by_batch:
        lines += "; white: quartiles"
    elif len(batches) > 1:
        lines = f"red: thresholds of all cells; {len(batches)} batches drawn together, without their own"
    figure.supxlabel(lines, fontsize=9, color="#555555")
    with atomic_path(path) as unfinished:
        # Without a date inside, the same cells give the same file.
        dates = {".pdf": {"CreationDate": None}, ".svg": {"Date": None}}.get(path.suffix.lower(), {})
        figure.savefig(unfinished, dpi=130, metadata=dates)


def _scaled(values: np.ndarray, panel: _Panel) -> np.ndarray:
    """Values as they are drawn: the logarithm of 1 + x, so that a cell without counts has a place."""
    return np.log10(1 + values) if panel.log else values


def _ticks(axis: Axes, panel: _Panel, most: float) -> None:
    """Round numbers on a logarithmic axis."""
    if not panel.log:
        return
    low, high = axis.get_xlim()
    high = max(high, float(np.log10(1 + most)))
    shown: list[int] = []
    for steps in ((1,), (1, 3), (1, 2, 5), range(1, 10)):  # the coarsest that leaves enough to read the axis by
        marks = sorted({0, *(10**power * step for power in range(8) for step in steps)})
        shown = [one for one in marks if low <= np.log10(1 + one) <= high]
        if len(shown) >= 3:
            break
    axis.set_xticks([float(np.log10(1 + one)) for one in shown], [f"{one:,}" for one in shown])


def _histogram(axis: Axes, everything: pd.Series, cells: pd.Series, panel: _Panel, colour: str) -> None:
    """Cells a bin; the bins are those of all cells on both sides."""
    of_all = _scaled(everything.dropna().to_numpy(dtype=float), panel)
    edges = np.histogram_bin_edges(of_all, bins=25 if panel.column == SCORE else 60)  # scores come in few steps
    axis.hist(_scaled(cells.dropna().to_numpy(dtype=float), panel), bins=list(edges), color=colour)
    _ticks(axis, panel, float(everything.max()))


def _violins(axis: Axes, cells: pd.DataFrame, panel: _Panel, batches: list[str], colour: str) -> None:
    """A lying violin a batch, the first on top, with its quartiles."""
    from scipy.stats import gaussian_kde

    for place, batch in enumerate(batches):
        values = _scaled(cells.loc[cells["batch"] == batch, panel.column].dropna().to_numpy(dtype=float), panel)
        if len(values) < LEAST_SHAPE or np.ptp(values) == 0:
            axis.plot(values, np.full(len(values), place), "|", color=colour, markersize=8)
            continue
        heights = np.linspace(values.min(), values.max(), 100)
        density = gaussian_kde(values)(heights)
        half = 0.42 * density / density.max()
        axis.fill_between(heights, place - half, place + half, color=colour, alpha=0.85, linewidth=0)
        quartiles = np.percentile(values, [25, 50, 75])
        axis.vlines(quartiles, place - 0.18, place + 0.18, colors="white", linewidths=[0.8, 1.8, 0.8])
    axis.set_yticks(range(len(batches)), [_short(str(batch)) for batch in batches])
    axis.set_ylim(len(batches) - 0.4, -0.6)
    _ticks(axis, panel, float(cells[panel.column].max()))


def _short(name: str, most: int = 24) -> str:
    return name if len(name) <= most else f"{name[: most - 1]}…"


def _thresholds(
    axis: Axes,
    panel: _Panel,
    settings: Mapping[str, Any],
    limits: Mapping[str, Mapping[str, float]],
    batches: list[str],
    *,
    by_batch: bool,
) -> None:
    """Fixed thresholds across the picture, those of a batch across its row."""
    for name in panel.fixed:
        if settings.get(name):
            axis.axvline(
                float(_scaled(np.array(float(settings[name])), panel)), color=LIMIT, linestyle="--", linewidth=1
            )
    if len(batches) > 1 and not by_batch:
        return
    for place, batch in enumerate(batches):
        for name in panel.batch:
            value = limits.get(str(batch), {}).get(name, float("nan"))
            if not np.isfinite(value):
                continue
            at = float(_scaled(np.array(value), panel))
            if by_batch:
                axis.vlines(at, place - 0.45, place + 0.45, colors=LIMIT, linewidths=1.2)
            else:
                axis.axvline(at, color=LIMIT, linewidth=1)

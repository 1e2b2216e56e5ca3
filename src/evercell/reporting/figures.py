"""The figures of a report as plain values, which the page draws with tables, bars and paths: no script is needed.

All sizes are shares (0 to 1) or, where said, pixels; colours of the theme are left to the style sheet. Text is
escaped by the templates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from evercell.colours import UNKNOWN

BINS = 40
MOST_GENES = 44
"""Genes beside each other in one panel of the dot plot; more go into further panels below."""
MOST_NODES = 30
"""Old or new labels of the flow; the rest is drawn together."""
REST = "other labels"
ROW, GAP = 20, 3
"""Least height of a label of the flow, and the space between two, in pixels."""


def composition(counts: pd.DataFrame) -> list[dict[str, Any]]:
    """Stacked bars: one row a sample, with the share of each type.

    Parameters
    ----------
    counts
        Cells, (samples, types).

    Returns
    -------
    list
        Of each sample its `name`, `cells` and `parts`: `type`, `cells`, `share`, largest types first as in `counts`.
    """
    rows = []
    for name, row in counts.iterrows():
        total = int(row.sum())
        parts = [
            {"type": str(kind), "cells": int(cells), "share": cells / max(total, 1)} for kind, cells in row.items()
        ]
        rows.append({"name": str(name), "cells": total, "parts": [part for part in parts if part["cells"]]})
    return rows


@dataclass(frozen=True)
class Histogram:
    """Cells over a score, labelled and unknown cells stacked.

    Parameters
    ----------
    bars
        Of each bin: `left` and `width` (shares of the axis), `labelled` and `unknown` (shares of the tallest bar),
        `text`.
    low, high
        Ends of the axis.
    line
        Place of the threshold (share of the axis), or None.
    most
        Cells in the tallest bar.
    text
        What it shows, for those who cannot see it.
    """

    bars: list[dict[str, Any]]
    low: float
    high: float
    line: float | None
    most: int
    text: str


def histogram(
    values: np.ndarray, rejected: np.ndarray, *, name: str, limits: tuple[float, float], line: float | None = None
) -> Histogram:
    """Cells over a score (B,); `rejected` (B,) marks unknown cells, missing values are left out."""
    edges = np.linspace(*limits, BINS + 1)
    finite = np.isfinite(values)
    labelled, unknown = (np.histogram(values[cells & finite], bins=edges)[0] for cells in (~rejected, rejected))
    most = max(int((labelled + unknown).max()), 1)
    bars = [
        {
            "left": place / BINS,
            "width": 1 / BINS,
            "labelled": known / most,
            "unknown": other / most,
            "text": f"{name} {edges[place]:.2f} to {edges[place + 1]:.2f}: {known:,} cells labelled"
            + (f", {other:,} unknown" if other else ""),
        }
        for place, (known, other) in enumerate(zip(labelled.tolist(), unknown.tolist(), strict=True))
        if known or other
    ]
    low, middle, high = np.quantile(values[finite], [0.1, 0.5, 0.9]) if finite.any() else (np.nan,) * 3
    text = f"Histogram of the {name}: half of the cells lie above {middle:.2f}, 80% between {low:.2f} and {high:.2f}."
    span = limits[1] - limits[0]
    place = None if line is None else float(np.clip((line - limits[0]) / span, 0, 1))
    return Histogram(bars, limits[0], limits[1], place, most, text)


def shares_table(counts: pd.DataFrame) -> dict[str, Any]:
    """A table of cells, each also as a share of its row: `columns`, and `rows` of `name`, `cells` and `entries`."""
    rows = []
    for name, row in counts.iterrows():
        total = int(row.sum())
        entries = [{"cells": int(cells), "share": cells / max(total, 1)} for cells in row]
        rows.append({"name": str(name), "cells": total, "entries": entries})
    return {"columns": [str(name) for name in counts.columns], "rows": rows}


def dot_plot(
    means: pd.DataFrame, shares: pd.DataFrame, groups: Mapping[str, Sequence[tuple[str, bool]]]
) -> list[dict[str, Any]]:
    """Marker genes (columns) in cell types (rows), in panels that fit a page.

    Parameters
    ----------
    means
        Mean log expression, (types, genes).
    shares
        Share of cells with a count, (types, genes).
    groups
        Type to its genes, each with whether the literature knows it as a marker of the type. No gene twice.

    Returns
    -------
    list
        Panels: `groups` (`type`, `genes`: `name`, `known`) and `rows` (`type`, `dots`: `share`, `relative` mean,
        `mean`, `gene`).
    """
    relative = means / means.max(axis=0).replace(0, 1)
    panels: list[list[str]] = [[]]
    for name, genes in groups.items():
        if genes:
            if sum(len(groups[one]) for one in panels[-1]) + len(genes) > MOST_GENES and panels[-1]:
                panels.append([])
            panels[-1].append(name)
    found = []
    for names in filter(None, panels):
        columns = [gene for name in names for gene, _ in groups[name]]
        tables = [one[columns].to_numpy() for one in (shares, relative, means)]
        rows = [
            {
                "type": str(kind),
                "dots": [
                    {"gene": gene, "share": float(share), "relative": float(strength), "mean": float(mean)}
                    for gene, share, strength, mean in zip(columns, *(one[row] for one in tables), strict=True)
                ],
            }
            for row, kind in enumerate(means.index)
        ]
        heads = [
            {"type": kind, "genes": [{"name": gene, "known": known} for gene, known in groups[kind]]} for kind in names
        ]
        found.append({"groups": heads, "rows": rows})
    return found


def flow(table: pd.DataFrame, order: Sequence[str]) -> dict[str, Any]:
    """Bands from old labels (left) to new labels (right), as wide as the cells are many.

    Parameters
    ----------
    table
        Cells, (old, new).
    order
        New labels from top to bottom. Old labels are placed where most of their cells go.

    Returns
    -------
    dict
        `height` (pixels), `left` and `right` (`name`, `cells`, `top`, `bar`, `height`: pixels), `bands` (`old`,
        `new`, `cells`, `path` in a field 100 wide).
    """
    table = _with_rest(_with_rest(table).T).T
    new = [name for name in order if name in table.columns]
    new += [name for name in table.columns if name not in new]
    table = table[new]
    table = table.iloc[np.argsort(table.to_numpy().argmax(axis=1), kind="stable")]
    cells = int(table.to_numpy().sum())
    room = max(ROW * max(table.shape), 260)  # pixels for all cells
    heights = [table.to_numpy().sum(axis=axis) / cells * room for axis in (1, 0)]
    slots = [np.maximum(one, ROW) for one in heights]
    height = max(float(one.sum() + GAP * (len(one) - 1)) for one in slots)
    tops, sides = [], []
    for axis, names in enumerate((table.index, table.columns)):
        spare = (height - slots[axis].sum() - GAP * (len(names) - 1)) / max(len(names), 1)
        starts = np.concatenate([[0], np.cumsum(slots[axis] + GAP + spare)[:-1]]) + spare / 2
        top = starts + (slots[axis] - heights[axis]) / 2
        tops.append(top)
        total = table.to_numpy().sum(axis=1 - axis)
        sides.append(
            [
                {"name": str(name), "cells": int(n), "top": float(y), "bar": float(h), "middle": float(y + h / 2)}
                for name, n, y, h in zip(names, total, top, heights[axis], strict=True)
            ]
        )
    bands, numbers = [], table.to_numpy()
    left, right = tops[0].copy(), tops[1].copy()
    for i, old in enumerate(table.index):
        for j, name in enumerate(table.columns):
            n = int(numbers[i, j])
            if n:
                tall = n / cells * room
                a, b = left[i], right[j]
                path = (
                    f"M0 {a:.1f}C50 {a:.1f} 50 {b:.1f} 100 {b:.1f}V{b + tall:.1f}"
                    f"C50 {b + tall:.1f} 50 {a + tall:.1f} 0 {a + tall:.1f}Z"
                )
                bands.append({"old": str(old), "new": str(name), "cells": n, "path": path})
                left[i] += tall
                right[j] += tall
    return {"height": round(height), "left": sides[0], "right": sides[1], "bands": bands, "cells": cells}


def _with_rest(table: pd.DataFrame) -> pd.DataFrame:
    """The table with its smallest rows as one, where there are too many to draw."""
    if len(table) <= MOST_NODES:
        return table
    large = table.sum(axis=1).nlargest(MOST_NODES - 1).index
    rest = table.drop(index=large).sum().to_frame(REST).T
    return pd.concat([table.loc[[name for name in table.index if name in large]], rest])


@dataclass(frozen=True)
class Curve:
    """Loss over training steps.

    Parameters
    ----------
    lines
        `name`, `style` (the first is solid, others are dashed) and `points` of each line, in a field of 100 x 100.
    low, high, steps
        Ends of the axes.
    """

    lines: list[dict[str, str]]
    low: float
    high: float
    steps: int


def learning_curve(curve: Sequence[Mapping[str, Any]]) -> Curve | None:
    """Training and held-out loss over steps; records of `step` and `loss`, `validation` or both."""
    titles = {"validation": "held-out cells", "loss": "training cells"}
    values = [float(row[name]) for row in curve for name in titles if row.get(name) is not None]
    values = [value for value in values if np.isfinite(value)]
    if not values:
        return None
    low, high = min(*values, 0.0), max(values)
    steps = max(float(row["step"]) for row in curve)
    lines = []
    for name, title in titles.items():
        points = [
            f"{100 * float(row['step']) / max(steps, 1):.2f},"
            f"{100 * (high - float(row[name])) / max(high - low, 1e-9):.2f}"
            for row in curve
            if row.get(name) is not None and np.isfinite(float(row[name]))
        ]
        if len(points) > 1:  # a single point is no line
            lines.append({"name": title, "style": name, "points": " ".join(points)})
    return Curve(lines, low, high, int(steps)) if lines else None


def flow_words(table: pd.DataFrame, *, most: int = 8) -> list[dict[str, Any]]:
    """The largest moves from an old label to a new one: `old`, `new`, `cells`, `share` of the old label."""
    numbers = table.to_numpy()
    totals = numbers.sum(axis=1)
    found = []
    for place in np.argsort(-numbers, axis=None, kind="stable")[:most]:
        i, j = divmod(int(place), numbers.shape[1])
        if n := int(numbers[i, j]):
            move = {"old": str(table.index[i]), "new": str(table.columns[j]), "cells": n, "share": n / totals[i]}
            found.append(move)
    return found


def in_order(table: pd.DataFrame, order: Sequence[str]) -> pd.DataFrame:
    """Rows and columns of a table of labels in an order; names that it lacks follow, Unknown is last."""
    places = {name: place for place, name in enumerate(order)}

    def key(name: object) -> tuple[bool, int, str]:
        return str(name) == UNKNOWN, places.get(str(name), len(places)), str(name)

    return table.loc[sorted(table.index, key=key), sorted(table.columns, key=key)]

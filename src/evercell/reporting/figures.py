"""The figures of a report, as plotly.js specifications in plain dictionaries.

Colours that follow the reader's light or dark theme are written as tokens (``"@ink"``, ``"@accent"``, ``"@grid"``,
``"@muted"``, ``"@surface"``, ``"@sequential"``, ``"@scores"``) and are filled in by the page, so that one
specification serves both themes and print. Text that comes from the data passes through :func:`plot_text`, because
plotly.js reads markup in it.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from evercell.colours import UNKNOWN, UNKNOWN_COLOUR

# A fixed length at the top: beside a tall figure a bar in proportion to it would be out of sight.
COLOUR_BAR = {"thickness": 10, "lenmode": "pixels", "len": 170, "y": 1, "yanchor": "top", "outlinewidth": 0}

Figure = dict[str, Any]


def plot_text(text: object, *, longest: int | None = None) -> str:
    """Text of the data as plotly.js shows it literally: no tag, link or entity in it takes effect.

    Parameters
    ----------
    text
        Any value; written with ``str``.
    longest
        Longer texts are cut and end in an ellipsis.
    """
    line = " ".join(str(text).split())
    if longest is not None and len(line) > longest:
        line = line[: longest - 1].rstrip() + "…"
    return html.escape(line, quote=False)


def rounded(values: np.ndarray, decimals: int = 2) -> list[float | None]:
    """Numbers short enough for a page of 50,000 cells; what is not finite becomes ``None``."""
    values = np.asarray(values, dtype=float)
    return [round(float(value), decimals) if np.isfinite(value) else None for value in values]


def _named_axis(names: Sequence[str], **settings: Any) -> dict[str, Any]:
    """An axis with one place for each name. Places are numbers, so names cut alike cannot fall together."""
    ticks = [plot_text(name, longest=30) for name in names]
    edges = [-0.5, len(names) - 0.5]
    return {
        "tickmode": "array",
        "tickvals": list(range(len(names))),
        "ticktext": ticks,
        "range": edges,
        "automargin": True,
        "showgrid": False,
        "zeroline": False,
    } | settings


def cell_map(
    points: np.ndarray,
    cells: pd.DataFrame,
    colours: Mapping[str, str],
    *,
    order: Sequence[str],
) -> dict[str, Any]:
    """The cells of the map, by type, for the page to draw and recolour.

    Parameters
    ----------
    points
        (B, 2) coordinates.
    cells
        (B, ...) rows in the order of `points`: `label` and, where known, `confidence`, `unknown`, `truth`, `group`.
    colours
        Type to colour.
    order
        Types, most cells first and Unknown last; each entry's `place` is its place here and in the legend.

    Returns
    -------
    dict
        `types` (one entry a type, unknown and frequent first, so that rare types are drawn on top), `modes` (what the
        points may be coloured by), `truth` and `group` levels that the entries refer to by number.
    """
    coded = {column: pd.Categorical(cells[column]) for column in ("truth", "group") if column in cells}
    types = []
    for name in sorted(order, key=lambda name: name != UNKNOWN):
        here = np.flatnonzero(cells["label"].to_numpy() == name)
        xy = points[here]
        entry: dict[str, Any] = {
            "place": list(order).index(name),
            "name": plot_text(name),
            "short": plot_text(name, longest=26),
            "colour": colours[name],
            "x": rounded(xy[:, 0]),
            "y": rounded(xy[:, 1]),
            "centre": rounded(_densest(xy)),
        }
        for score in ("confidence", "unknown"):
            if score in cells:
                entry[score] = rounded(cells[score].to_numpy()[here])
        for column, values in coded.items():
            entry[column] = values.codes[here].tolist()
        types.append(entry)
    modes = [{"id": "label", "text": "Cell type"}]
    modes += [
        {"id": name, "text": text}
        for name, text in (("confidence", "Confidence"), ("unknown", "Unknown score"), ("truth", "Given label"))
        if name in cells
    ]
    result: dict[str, Any] = {
        "types": types,
        "modes": modes,
    }
    for column, values in coded.items():
        levels = [str(level) for level in values.categories]
        result[column] = {"levels": [plot_text(level) for level in levels]}
        if column == "truth":
            result[column]["colours"] = [colours[level] for level in levels]
    return result


def _densest(points: np.ndarray) -> np.ndarray:
    """(2,) median of the points in the fullest of 12 x 12 fields: on the largest island, never in a gap."""
    low, span = points.min(axis=0), np.ptp(points, axis=0)
    fields = np.floor(11.99 * (points - low) / np.where(span > 0, span, 1)).astype(int) @ np.array([12, 1])
    return np.median(points[fields == np.bincount(fields).argmax()], axis=0)


def composition(counts: pd.DataFrame, colours: Mapping[str, str]) -> Figure:
    """Stacked bars: the share of each type (columns) in each sample (rows).

    Parameters
    ----------
    counts
        Cells, (samples, types).
    colours
        Type to colour.
    """
    shares = counts.div(counts.sum(axis=1), axis=0)
    rows = [f"{name} ({total:,})" for name, total in counts.sum(axis=1).items()]
    data = [
        {
            "type": "bar",
            "orientation": "h",
            "name": plot_text(name),
            "y": list(range(len(rows))),
            "x": rounded(100 * shares[name].to_numpy()),
            "customdata": counts[name].tolist(),
            "text": plot_text(name),
            "textposition": "none",
            "marker": {"color": colours[name], "line": {"color": "@surface", "width": 0.5}},
            "hovertemplate": "%{text}<br>%{x:.1f}% · %{customdata:,} cells<extra></extra>",
        }
        for name in counts.columns
    ]
    layout = {
        "barmode": "stack",
        "bargap": 0.28,
        "height": 90 + 30 * len(rows),
        "margin": {"l": 8, "r": 26, "t": 8, "b": 44},
        "xaxis": {"range": [0, 100], "ticksuffix": "%", "title": {"text": "share of cells"}},
        "yaxis": _named_axis(rows, autorange="reversed"),
    }
    return {"data": data, "layout": layout}


def histogram(
    values: np.ndarray, rejected: np.ndarray, *, name: str, limits: tuple[float, float], line: float | None = None
) -> Figure:
    """Cells over a score, labelled cells and unknown cells stacked; a dashed line marks the threshold.

    Parameters
    ----------
    values
        (B,) scores; missing values are left out.
    rejected
        (B,) true for unknown cells.
    name
        Title of the axis.
    limits
        First and last edge.
    line
        Threshold, where there is one.
    """
    edges = np.linspace(*limits, 31)
    finite = np.isfinite(values)
    data = []
    for title, chosen, colour in (("labelled", ~rejected, "@accent"), (UNKNOWN, rejected, UNKNOWN_COLOUR)):
        if (chosen & finite).any():
            cells, _ = np.histogram(values[chosen & finite], bins=edges)
            data.append(
                {
                    "type": "bar",
                    "name": title,
                    "x": rounded((edges[1:] + edges[:-1]) / 2, 4),
                    "y": cells.tolist(),
                    "marker": {"color": colour},
                    "hovertemplate": f"{name} about %{{x:.2f}}<br>%{{y:,}} cells, {title}<extra></extra>",
                }
            )
    layout: dict[str, Any] = {
        "barmode": "stack",
        "bargap": 0.06,
        "height": 260,
        "margin": {"l": 8, "r": 14, "t": 26, "b": 44},
        "showlegend": len(data) > 1,
        "legend": {"orientation": "h", "x": 0, "y": 1.16, "traceorder": "normal"},
        "xaxis": {"title": {"text": name}, "range": list(limits)},
        "yaxis": {"title": {"text": "cells"}, "automargin": True},
    }
    if line is not None:
        vertical = {"type": "line", "x0": line, "x1": line, "y0": 0, "y1": 1, "yref": "paper"}
        layout["shapes"] = [vertical | {"line": {"color": "@ink", "width": 1.5, "dash": "dash"}}]
    return {"data": data, "layout": layout}


def confusion(table: pd.DataFrame) -> Figure:
    """Heat map of given labels (rows) against predicted labels (columns): shares of the row, with counts.

    Parameters
    ----------
    table
        Cells, (given, predicted).
    """
    counts = table.to_numpy()
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    rows, columns = [str(name) for name in table.index], [str(name) for name in table.columns]
    hover = [
        [
            f"given: {plot_text(row)}<br>predicted: {plot_text(column)}<br>"
            f"{counts[i, j]:,} cells, {100 * shares[i, j]:.1f}%"
            for j, column in enumerate(columns)
        ]
        for i, row in enumerate(rows)
    ]
    data: list[dict[str, Any]] = [
        {
            "type": "heatmap",
            "z": [rounded(100 * row, 1) for row in shares],
            "text": [[f"{count:,}" if count else "" for count in row] for row in counts.tolist()],
            "hovertext": hover,
            "hovertemplate": "%{hovertext}<extra></extra>",
            "hoverinfo": "text",
            "coloraxis": "coloraxis",
            "xgap": 1,
            "ygap": 1,
        }
    ]
    if len(columns) <= 30:
        data[0] |= {"texttemplate": "%{text}", "textfont": {"size": 11}}
    layout = {
        "height": 210 + 26 * len(rows),
        "minWidth": 240 + 27 * len(columns),
        "margin": {"l": 8, "r": 8, "t": 10, "b": 8},
        "xaxis": _named_axis(columns, tickangle=-45, title={"text": "predicted", "standoff": 8}),
        "yaxis": _named_axis(rows, autorange="reversed", title={"text": "given", "standoff": 8}),
        "coloraxis": {
            "cmin": 0,
            "cmax": 100,
            "colorscale": "@sequential",
            "colorbar": {"title": {"text": "% of row"}} | COLOUR_BAR,
        },
    }
    return {"data": data, "layout": layout}


def dot_plot(means: pd.DataFrame, shares: pd.DataFrame) -> Figure:
    """Marker genes (columns) in cell types (rows): area is the share of cells expressing, colour the relative mean.

    Parameters
    ----------
    means
        Mean log expression, (types, genes).
    shares
        Share of cells with a count, (types, genes), 0 to 1.
    """
    types, genes = [str(name) for name in means.index], [str(name) for name in means.columns]
    y, x = (axis.ravel() for axis in np.indices(means.shape))
    mean, share = means.to_numpy().ravel(), shares.to_numpy().ravel()
    relative = (means / means.max(axis=0).replace(0, 1)).to_numpy().ravel()
    data = [
        {
            "type": "scatter",
            "mode": "markers",
            "x": x.tolist(),
            "y": y.tolist(),
            "text": [
                f"{plot_text(genes[i])} in {plot_text(types[j])}<br>{100 * s:.0f}% of cells, mean {m:.2f}"
                for i, j, s, m in zip(x, y, share, mean, strict=True)
            ],
            "hovertemplate": "%{text}<extra></extra>",
            "marker": {
                "size": rounded(15 * np.sqrt(share), 1),
                "color": rounded(relative),
                "coloraxis": "coloraxis",
                "line": {"width": 0.5, "color": "@muted"},
                "opacity": 1,
            },
        }
    ]
    layout = {
        "height": 150 + 24 * len(types),
        "minWidth": 230 + 14 * len(genes),
        "margin": {"l": 8, "r": 8, "t": 10, "b": 8},
        "xaxis": _named_axis(genes, tickangle=-90, tickfont={"size": 11}),
        "yaxis": _named_axis(types, autorange="reversed", showgrid=True),
        "coloraxis": {
            "cmin": 0,
            "cmax": 1,
            "colorscale": "@sequential",
            "colorbar": {"title": {"text": "relative<br>mean"}} | COLOUR_BAR,
        },
    }
    return {"data": data, "layout": layout}


def learning_curve(curve: Sequence[Mapping[str, Any]]) -> Figure:
    """Training and validation loss over steps.

    Parameters
    ----------
    curve
        Records with `step` and `loss`, `validation` or both.
    """
    data = []
    for field, title, colour in (("loss", "training", "@accent"), ("validation", "validation", "@contrast")):
        rows = [row for row in curve if row.get(field) is not None]
        if rows:
            data.append(
                {
                    "type": "scatter",
                    "mode": "lines+markers" if len(rows) < 40 else "lines",
                    "name": title,
                    "x": [float(row["step"]) for row in rows],
                    "y": rounded(np.array([row[field] for row in rows], dtype=float), 4),
                    "line": {"color": colour, "width": 2},
                    "marker": {"size": 5, "color": colour},
                    "hovertemplate": f"step %{{x:,}}<br>{title} %{{y:.3f}}<extra></extra>",
                }
            )
    layout = {
        "height": 260,
        "margin": {"l": 8, "r": 14, "t": 26, "b": 44},
        "showlegend": True,
        "legend": {"orientation": "h", "x": 0, "y": 1.16, "traceorder": "normal"},
        "xaxis": {"title": {"text": "step"}},
        "yaxis": {"title": {"text": "loss"}, "automargin": True},
    }
    return {"data": data, "layout": layout}

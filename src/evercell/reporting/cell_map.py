"""The map of a report: cells as packed numbers, which the page draws, colours and lets the reader draw around.

Every array is quantised, compressed (zlib) and written as base64, so that 100,000 cells with a hundred genes are a few
megabytes; the page unpacks a gene when it is asked for.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from evercell.colours import UNKNOWN
from evercell.reporting.markers import Block, log_values

MOST_VALUES = 12_000_000
"""Values of genes in a page: of 60,000 cells and more there are fewer genes than `MOST_GENES`."""
MOST_GENES, LEAST_GENES = 200, 60
MOST_NAMES = 4_000_000
"""Characters of all names of cells together, above which a page leaves them out."""
MISSING = 255
"""Stands for a score that is not there; the steps of a score are 0 to 254."""


def stratified_sample(labels: np.ndarray, most: int, *, seed: int) -> np.ndarray:
    """Places of at most about `most` cells: the same share of every label, but never fewer than 50 cells of one.

    Parameters
    ----------
    labels
        (B,) labels.
    most
        All cells are taken where there are no more than this.
    seed
        Seed of the draw.

    Returns
    -------
    numpy.ndarray
        Ascending places.
    """
    if len(labels) <= most:
        return np.arange(len(labels))
    generator = np.random.default_rng(seed)
    chosen = []
    for name in np.unique(labels):
        here = np.flatnonzero(labels == name)
        wanted = max(int(len(here) * most / len(labels)), min(len(here), 50))
        chosen.append(generator.choice(here, wanted, replace=False))
    return np.sort(np.concatenate(chosen))


def drawing_order(labels: np.ndarray) -> np.ndarray:
    """Places of cells (B,) as they are drawn: unknown cells first, then frequent and last rare labels, on top."""
    sizes = pd.Series(labels).map(pd.Series(labels).value_counts()).to_numpy()
    return np.lexsort((np.arange(len(labels)), -sizes, labels != UNKNOWN))


def n_genes(n_cells: int) -> int:
    """How many genes of so many cells a page holds."""
    return int(np.clip(MOST_VALUES // max(n_cells, 1), LEAST_GENES, MOST_GENES))


def packed(values: np.ndarray) -> str:
    """An array of small whole numbers as base64 of its compressed bytes, little-endian."""
    plain = values.astype(values.dtype.newbyteorder("<"), copy=False)
    return base64.b64encode(zlib.compress(plain.tobytes(), 6)).decode("ascii")


def packed_map(
    points: np.ndarray,
    cells: pd.DataFrame,
    *,
    columns: Mapping[str, str],
    scores: Mapping[str, str],
    colours: Mapping[str, Mapping[str, str]],
    names: Sequence[str],
) -> dict[str, Any]:
    """What the page needs to draw the cells.

    Parameters
    ----------
    points
        (B, 2) coordinates.
    cells
        (B, ...) rows in the order of `points` and of drawing.
    columns
        Columns of `cells` with labels, each with its title; the first is shown first.
    scores
        Columns of `cells` with numbers, each with its title. Confidence runs from 0 to 1, others as they do.
    colours
        Column to the colour of each of its labels.
    names
        (B,) names of the cells; left out where they would make the page too large.

    Returns
    -------
    dict
        `cells`, `x`, `y` (0 to 65535, both in the same unit), `columns` (`levels`, `colours`, `codes`; the code after
        the last level is a missing label), `scores` (`low`, `high`, `values`), `names`.
    """
    finite = np.where(np.isfinite(points), points, 0.0)
    low, span = finite.min(axis=0), max(float(np.ptp(finite, axis=0).max()), 1e-9)
    xy = np.round(65535 * (finite - low) / span).astype(np.uint16)
    found: dict[str, Any] = {"cells": len(cells), "x": packed(xy[:, 0]), "y": packed(xy[:, 1])}
    found["columns"] = []
    for column, title in columns.items():
        coded = pd.Categorical(cells[column])
        levels = [str(level) for level in coded.categories]
        kind = np.uint8 if len(levels) < MISSING else np.uint16
        codes = np.where(coded.codes < 0, len(levels), coded.codes).astype(kind)
        shades = [colours[column][level] for level in levels]
        found["columns"].append(
            {"id": column, "title": title, "levels": levels, "colours": shades, "codes": packed(codes)}
        )
    found["scores"] = []
    for column, title in scores.items():
        values = cells[column].to_numpy(dtype=float)
        there = values[np.isfinite(values)]
        ends = (0.0, 1.0) if column == "confidence" else (float(there.min()), float(there.max()))
        found["scores"].append(
            {"id": column, "title": title, "low": ends[0], "high": ends[1], "values": packed(steps(values, *ends))}
        )
    text = "\n".join(" ".join(name.split()) for name in names)
    if len(text) <= MOST_NAMES:
        found["names"] = packed(np.frombuffer(text.encode(), dtype=np.uint8))
    return found


def steps(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Numbers as steps 0 to 254 of the way from `low` to `high`; `MISSING` where there is none."""
    there = np.isfinite(values)
    share = np.clip((np.where(there, values, low) - low) / max(high - low, 1e-12), 0, 1)
    return np.where(there, np.round(share * (MISSING - 1)), MISSING).astype(np.uint8)


def packed_genes(blocks: Iterable[Block], genes: Sequence[str], chosen: Sequence[str], cells: np.ndarray) -> list[Any]:
    """Log expression of some genes in the drawn cells.

    Parameters
    ----------
    blocks
        Start, stop and raw counts of the cells between.
    genes
        (G,) names of the columns.
    chosen
        Names of the genes that are packed.
    cells
        (B,) places of the drawn cells among all, in the order of drawing.

    Returns
    -------
    list
        Of each gene its `name`, `high` (largest value) and `values`: steps 0 to 254 of the way from 0 to it.
    """
    places = pd.Index(genes).get_indexer(pd.Index(chosen))
    order = np.argsort(cells, kind="stable")
    ascending = cells[order]
    values = np.zeros((len(chosen), len(cells)), dtype=np.float32)
    for start, stop, counts in blocks:
        here = slice(*np.searchsorted(ascending, [start, stop]))
        rows = ascending[here] - start
        if len(rows):
            values[:, order[here]] = log_values(counts)[rows][:, places].toarray().T
    found = []
    for name, row in zip(chosen, values, strict=True):
        high = max(float(row.max(initial=0)), 1e-6)
        # A gene that is there at all is shown as there.
        shade = np.where(row > 0, np.maximum(steps(row, 0, high), 1), 0).astype(np.uint8)
        found.append({"name": name, "high": round(high, 3), "values": packed(shade)})
    return found

"""Marker genes of labels: Welch's t test of each label against all other cells, from sums over sparse counts."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

# High in every cell and moved by quality more than by type; human, mouse and others by the case of the letters.
HOUSEKEEPING = re.compile(r"^(mt-|mt\.|rp[sl]\d|rp[sl]p\d|mrp[sl]\d)", re.IGNORECASE)
FEWEST_CELLS = 10
LEAST_SHARE = 0.1


@dataclass(frozen=True)
class Markers:
    """Expression of genes by label.

    Parameters
    ----------
    means, shares, scores
        (K, G) mean of log(1 + counts per 10,000), share of cells with a count, and t statistic.
    top
        Label to its marker genes, the strongest first.
    """

    means: pd.DataFrame
    shares: pd.DataFrame
    scores: pd.DataFrame
    top: dict[str, list[str]]

    @property
    def genes(self) -> list[str]:
        """The genes of the dot plot, label by label, each once."""
        return list(dict.fromkeys(gene for genes in self.top.values() for gene in genes))


def rank_markers(
    counts: csr_matrix,
    labels: np.ndarray,
    genes: Sequence[str],
    *,
    order: Sequence[str],
    each: int = 3,
    chosen: Mapping[str, Sequence[str]] | None = None,
) -> Markers:
    """Means, shares and marker genes of every label with at least ten cells.

    Parameters
    ----------
    counts
        (B, G) raw counts; not changed.
    labels
        (B,) label of each cell.
    genes
        (G,) unique names.
    order
        Labels in the order of the plot; others are left out, but still count among the other cells.
    each
        Marker genes a label.
    chosen
        Label to genes that are shown instead of the highest ranked.
    """
    from scipy.sparse import csr_matrix as csr

    depth = np.asarray(counts.sum(axis=1), dtype=float).ravel()
    scale = np.divide(1e4, depth, out=np.zeros_like(depth), where=depth > 0)
    values = np.log1p(counts.data * np.repeat(scale, np.diff(counts.indptr)))
    logs = csr((values, counts.indices, counts.indptr), shape=counts.shape)
    sizes = pd.Series(labels).value_counts()
    names = [name for name in order if sizes.get(name, 0) >= FEWEST_CELLS]
    member = csr(np.array([labels == name for name in names], dtype=np.float64).reshape(len(names), len(labels)))

    def by_label(matrix: csr_matrix) -> np.ndarray:
        return np.asarray((member @ matrix).todense())

    inside = np.array([sizes[name] for name in names], dtype=float)[:, None]  # (K, 1) cells
    outside = len(labels) - inside
    squares = csr((values**2, counts.indices, counts.indptr), shape=counts.shape)
    detected = csr(((counts.data > 0).astype(np.float64), counts.indices, counts.indptr), shape=counts.shape)
    total, total_squares = (np.asarray(matrix.sum(axis=0)).ravel() for matrix in (logs, squares))
    sums, sums_squares = by_label(logs), by_label(squares)

    def moments(total: np.ndarray, total_squares: np.ndarray, cells: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        mean = total / np.maximum(cells, 1)
        # Cells are many, so a rounded sum of squares may fall a little below zero.
        return mean, np.maximum(total_squares - cells * mean**2, 0) / np.maximum(cells - 1, 1)

    mean, variance = moments(sums, sums_squares, inside)
    rest_mean, rest_variance = moments(total - sums, total_squares - sums_squares, outside)
    error = np.sqrt(variance / inside + rest_variance / np.maximum(outside, 1))
    score = np.divide(mean - rest_mean, error, out=np.zeros_like(mean), where=(error > 0) & (outside > 1))
    share = by_label(detected) / inside

    means, shares, scores = (pd.DataFrame(table, names, list(genes)) for table in (mean, share, score))
    if chosen is not None:
        measured = set(genes)
        top = {name: [gene for gene in chosen.get(name, ()) if gene in measured] for name in names}
    else:
        usable = np.array([HOUSEKEEPING.match(gene) is None for gene in genes])
        rest_share = (np.asarray(detected.sum(axis=0)) - share * inside) / np.maximum(outside, 1)
        # A gene of every cell can have a large t in a large data set; a marker is there more often, or much more of it.
        marks = (share - rest_share >= 0.1) | (mean - rest_mean >= 1)
        top = {}
        for row, name in enumerate(names):
            score_here = np.where(usable & marks[row] & (share[row] >= LEAST_SHARE), score[row], -np.inf)
            best = np.argsort(-score_here, kind="stable")[:each]
            top[name] = [genes[i] for i in best if score_here[i] > 0]
    return Markers(means, shares, scores, top)

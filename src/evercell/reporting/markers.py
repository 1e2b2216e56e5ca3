"""Marker genes of labels: Welch's t test of each label against all other cells, from sums over sparse counts."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
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
RAISED = 2.0
"""A known marker speaks for a label from this t on; below, chance would often do it."""

Block = tuple[int, int, "csr_matrix"]


@dataclass(frozen=True)
class Markers:
    """Expression of genes by label.

    Parameters
    ----------
    means, shares, scores
        (K, G) mean of log(1 + counts per 10,000), share of cells with a count, and t statistic.
    variance
        (G,) of the log values over all cells.
    top
        Label to its marker genes, the strongest first.
    """

    means: pd.DataFrame
    shares: pd.DataFrame
    scores: pd.DataFrame
    variance: pd.Series
    top: dict[str, list[str]]

    def variable(self, most: int) -> list[str]:
        """Genes whose log values vary most over the cells, housekeeping genes left out."""
        usable = [gene for gene in self.variance.index if HOUSEKEEPING.match(gene) is None]
        found = self.variance[usable].nlargest(most)
        return list(found[found > 0].index)

    def raised(self, label: str, genes: Sequence[str]) -> dict[str, bool]:
        """Of measured `genes`, whether each is higher in the cells of a label than in the others."""
        scores = self.scores.loc[label]
        return {gene: bool(scores[gene] >= RAISED) for gene in genes if gene in scores.index}


def log_values(counts: csr_matrix) -> csr_matrix:
    """log(1 + counts per 10,000) of (B, G) counts; not in place."""
    from scipy.sparse import csr_matrix as csr

    depth = np.asarray(counts.sum(axis=1), dtype=float).ravel()
    scale = np.divide(1e4, depth, out=np.zeros_like(depth), where=depth > 0)
    values = np.log1p(counts.data * np.repeat(scale, np.diff(counts.indptr)))
    return csr((values, counts.indices, counts.indptr), shape=counts.shape)


def rank_markers(
    blocks: Iterable[Block],
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
    blocks
        Start, stop and raw counts of the cells between, one block after the other; not changed.
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

    sizes = pd.Series(labels).value_counts()
    names = [name for name in order if sizes.get(name, 0) >= FEWEST_CELLS]
    codes = pd.Index(names).get_indexer(pd.Index(labels))
    sums, squared, detected = np.zeros((3, len(names), len(genes)))
    total, total_squared, total_detected = np.zeros((3, len(genes)))
    for start, stop, counts in blocks:
        logs = log_values(counts)
        squares = csr((logs.data**2, logs.indices, logs.indptr), shape=logs.shape)
        there = csr(((counts.data > 0).astype(float), logs.indices, logs.indptr), shape=logs.shape)
        rows = np.flatnonzero(codes[start:stop] >= 0)
        places = (codes[start:stop][rows], rows)
        member = csr((np.ones(len(rows)), places), shape=(len(names), stop - start))
        for matrix, by_label, over_all in (
            (logs, sums, total),
            (squares, squared, total_squared),
            (there, detected, total_detected),
        ):
            np.add(by_label, (member @ matrix).toarray(), out=by_label)
            np.add(over_all, np.asarray(matrix.sum(axis=0)).ravel(), out=over_all)

    inside = np.array([sizes[name] for name in names], dtype=float)[:, None]  # (K, 1) cells
    outside = len(labels) - inside

    def moments(total: np.ndarray, squares: np.ndarray, cells: np.ndarray | float) -> tuple[np.ndarray, np.ndarray]:
        mean = total / np.maximum(cells, 1)
        # Cells are many, so a rounded sum of squares may fall a little below zero.
        return mean, np.maximum(squares - cells * mean**2, 0) / np.maximum(np.asarray(cells) - 1, 1)

    mean, variance = moments(sums, squared, inside)
    rest_mean, rest_variance = moments(total - sums, total_squared - squared, outside)
    error = np.sqrt(variance / np.maximum(inside, 1) + rest_variance / np.maximum(outside, 1))
    score = np.divide(mean - rest_mean, error, out=np.zeros_like(mean), where=(error > 0) & (outside > 1))
    share = detected / np.maximum(inside, 1)

    means, shares, scores = (pd.DataFrame(table, names, list(genes)) for table in (mean, share, score))
    varied = pd.Series(moments(total, total_squared, float(len(labels)))[1], list(genes))
    if chosen is not None:
        measured = set(genes)
        top = {name: [gene for gene in chosen.get(name, ()) if gene in measured] for name in names}
        return Markers(means, shares, scores, varied, top)
    usable = np.array([HOUSEKEEPING.match(gene) is None for gene in genes])
    rest_share = (total_detected - detected) / np.maximum(outside, 1)
    # A gene of every cell can have a large t in a large data set; a marker is there more often, or much more of it.
    marks = (share - rest_share >= 0.1) | (mean - rest_mean >= 1)
    top = {}
    for row, name in enumerate(names):
        score_here = np.where(usable & marks[row] & (share[row] >= LEAST_SHARE), score[row], -np.inf)
        best = np.argsort(-score_here, kind="stable")[:each]
        top[name] = [genes[i] for i in best if score_here[i] > 0]
    return Markers(means, shares, scores, varied, top)

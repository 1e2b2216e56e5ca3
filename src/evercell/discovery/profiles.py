"""What marks a cluster of unknown cells, and whether it looks like damaged cells or doublets rather than a type."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

MITOCHONDRIAL = re.compile(r"^mt[-.]", re.IGNORECASE)
RIBOSOMAL = re.compile(r"^m?rp[sl]p?\d", re.IGNORECASE)
LEAST_SHARE = 0.25  # of a cluster's cells that express a marker gene
PSEUDOCOUNT = 0.1  # counts per 10,000
FEWEST_KNOWN = 10  # cells of a type, for its profile to be trusted
LOW_TOTAL = 0.4  # of the median total of known cells
HIGH_MITOCHONDRIAL = 0.1
OWN_GENES = 3
MORE_COUNTS = 1.2  # of a doublet, than the mean of its two types
CLOSER = 0.6  # distance of a doublet to the sum of two types, as a share of that to the nearest one


@dataclass(frozen=True)
class Profiles:
    """Expression of the cells of a file, with a group for each.

    Parameters
    ----------
    logs
        (B, G) log(1 + counts per 10,000).
    totals
        (B,) counts of each cell.
    symbols
        (G,) gene symbols.
    groups
        (B,) name of each cell's type or cluster, empty for cells that are left out.
    """

    logs: csr_matrix
    totals: np.ndarray
    symbols: np.ndarray
    groups: np.ndarray

    def markers(self, group: str, most: int = 10) -> list[tuple[str, float]]:
        """Genes higher in a group than in all other cells, with their log2 fold change, by Welch's t times that change.

        The t statistic alone puts genes that every cell has much of before those that few others have. Mitochondrial
        and ribosomal genes, which follow a cell's state more than its type, are left out.
        """
        inside = self.groups == group
        mean, variance, share = self._moments(inside)
        rest_mean, rest_variance, rest_share = self._moments(~inside & (self.groups != ""))
        error = np.sqrt(variance + rest_variance)
        score = np.divide(mean - rest_mean, error, out=np.zeros_like(mean), where=error > 0)
        change = self._log_level(inside) - self._log_level(~inside & (self.groups != ""))
        usable = (share >= LEAST_SHARE) & (change > 1) & (share > rest_share) & ~self._housekeeping
        best = np.argsort(-np.where(usable, score * change, -np.inf), kind="stable")[:most]
        return [(str(self.symbols[i]), float(change[i])) for i in best if usable[i]]

    def doubt(self, group: str, known: Sequence[str]) -> str:
        """A sign that a cluster is no type, in words; empty where there is none."""
        inside = self.groups == group
        of_known = np.isin(self.groups, known)
        if not of_known.any():
            return ""
        levels = {name: self._level(self.groups == name) for name in known if self._size(name) >= FEWEST_KNOWN}
        own_genes = self._own_genes(inside, list(levels.values()))
        signs = []
        total, usual = (float(np.median(self.totals[rows])) for rows in (inside, of_known))
        if (
            total < LOW_TOTAL * usual and own_genes < OWN_GENES
        ):  # small cells have few counts too, but genes of their own
            signs.append(f"low total counts ({total:,.0f}; known cells {usual:,.0f}) and no genes of its own")
        share, usual = (float(np.median(self._mitochondrial[rows])) for rows in (inside, of_known))
        if share > max(HIGH_MITOCHONDRIAL, 2 * usual):
            signs.append(f"high mitochondrial share ({share:.0%}; known cells {usual:.0%})")
        if signs:
            return f"{', '.join(signs)}: probably damaged cells"
        pair = self._mixture(inside, levels)
        return f"looks like a mixture of {pair[0]} and {pair[1]}: probably doublets" if pair else ""

    def _mixture(self, inside: np.ndarray, levels: Mapping[str, np.ndarray]) -> tuple[str, str] | None:
        """The two known types whose sum explains a cluster: better than one, with no gene left over, and more counts.

        `levels` are the mean counts per 10,000 of the types.
        """
        if len(levels) < 2:
            return None
        own = np.log1p(self._level(inside))
        genes = ~self._housekeeping & (np.maximum.reduce([own, *(np.log1p(level) for level in levels.values())]) > 1)

        def distance(level: np.ndarray) -> float:
            return float(np.square(own - np.log1p(level))[genes].mean())

        one = min(distance(level) for level in levels.values())
        pair = min(combinations(levels, 2), key=lambda pair: distance((levels[pair[0]] + levels[pair[1]]) / 2))
        both = [levels[name] for name in pair]
        apart = distance((both[0] + both[1]) / 2)
        single = np.mean([np.median(self.totals[self.groups == name]) for name in pair])
        heavy = np.median(self.totals[inside]) > MORE_COUNTS * single
        return pair if heavy and apart < CLOSER * one and self._own_genes(inside, both) < OWN_GENES else None

    def _own_genes(self, inside: np.ndarray, levels: Sequence[np.ndarray]) -> int:
        """Number of genes that many cells of a cluster express, and more than any of some types."""
        if not levels:
            return len(self.symbols)
        above = np.log1p(self._level(inside)) - np.log1p(np.maximum.reduce(list(levels)))
        often = np.bincount(self.logs[inside].indices, minlength=self.logs.shape[1]) >= LEAST_SHARE * inside.sum()
        return int(((above > 1) & often & ~self._housekeeping).sum())

    def _size(self, group: str) -> int:
        return int((self.groups == group).sum())

    def _moments(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Mean (G,), variance of the mean (G,) and share of cells with a count (G,)."""
        some = self.logs[rows]
        n = max(some.shape[0], 1)
        mean = np.asarray(some.mean(axis=0)).ravel()
        squares = np.asarray(some.multiply(some).sum(axis=0)).ravel()
        variance = np.maximum(squares - n * mean**2, 0) / max(n - 1, 1)
        # Few cells that all lack a gene say little: no variance below that of one cell with one count in 10,000.
        share = np.bincount(some.indices, minlength=some.shape[1]) / n
        return mean, (variance + np.log(2) ** 2 / n) / n, share

    def _level(self, rows: np.ndarray) -> np.ndarray:
        """Mean counts per 10,000 (G,)."""
        some = self.logs[rows].copy()
        some.data = np.expm1(some.data)
        found: np.ndarray = np.asarray(some.mean(axis=0)).ravel()
        return found

    def _log_level(self, rows: np.ndarray) -> np.ndarray:
        found: np.ndarray = np.log2(self._level(rows) + PSEUDOCOUNT)
        return found

    @cached_property
    def _housekeeping(self) -> np.ndarray:
        found = [MITOCHONDRIAL.match(one) or RIBOSOMAL.match(one) for one in self.symbols]
        return np.array([one is not None for one in found])

    @cached_property
    def _mitochondrial(self) -> np.ndarray:
        """Share of mitochondrial counts of each cell (B,)."""
        genes = np.array([MITOCHONDRIAL.match(one) is not None for one in self.symbols])
        some = self.logs[:, genes].copy()
        some.data = np.expm1(some.data) / 1e4
        found: np.ndarray = np.asarray(some.sum(axis=1)).ravel()
        return found

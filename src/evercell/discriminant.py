"""Closed-form classifier on representations, from running sums: stages add up to joint training.

The head is that of linear discriminant analysis with equal priors (one covariance within all types, shrunk towards a
multiple of the identity). It needs the sums ``x'x``, ``x'y`` and the number of cells of each type, which simply add up
over stages, in any order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

SHRINKAGE = 0.1
GAP = 8.0
"""Median difference of logits between a type and its nearest one, at the type's mean; on the scale of trained heads."""


@dataclass(frozen=True)
class RunningSums:
    """Sums over cells, float64.

    Parameters
    ----------
    squares
        ``x'x`` (W, W).
    totals
        ``x'y`` (W, K): sum of the representations of each type.
    counts
        Cells of each type (K,).
    """

    squares: np.ndarray
    totals: np.ndarray
    counts: np.ndarray

    @classmethod
    def of(cls, features: np.ndarray, codes: np.ndarray, n_types: int) -> RunningSums:
        """Sums over cells with `features` (N, W) and type `codes` (N,)."""
        x = features.astype(np.float64)
        one_hot = np.zeros((len(codes), n_types))
        one_hot[np.arange(len(codes)), codes] = 1.0
        return cls(x.T @ x, x.T @ one_hot, one_hot.sum(axis=0))

    def __add__(self, other: RunningSums) -> RunningSums:
        n_types = max(len(self.counts), len(other.counts))
        one, two = self.widened(n_types), other.widened(n_types)
        return RunningSums(one.squares + two.squares, one.totals + two.totals, one.counts + two.counts)

    def widened(self, n_types: int) -> RunningSums:
        """The sums with further types, of which there are no cells yet."""
        more = n_types - len(self.counts)
        return RunningSums(self.squares, np.pad(self.totals, ((0, 0), (0, more))), np.pad(self.counts, (0, more)))

    def arrays(self) -> dict[str, np.ndarray]:
        """As a model stores them."""
        return {"sums.squares": self.squares, "sums.totals": self.totals, "sums.counts": self.counts}

    @classmethod
    def stored(cls, arrays: Mapping[str, np.ndarray]) -> RunningSums | None:
        """Sums that `arrays` gave; None where there are none."""
        if "sums.squares" not in arrays:
            return None
        return cls(arrays["sums.squares"], arrays["sums.totals"], arrays["sums.counts"])

    def classifier(self) -> tuple[np.ndarray, np.ndarray]:
        """Weights (K, W) and biases (K,), float64; a type without cells is made improbable.

        ``w_k = S^-1 mu_k`` and ``b_k = -mu_k' S^-1 mu_k / 2``, divided by one number so that types lie as far apart as
        `GAP` says: within the collapsed spread of training cells the plain discriminant is far too sure of itself.
        """
        seen = np.flatnonzero(self.counts > 0)
        means = (self.totals[:, seen] / self.counts[seen]).T  # (K, W)
        within = self.squares - (means * self.counts[seen, None]).T @ means
        within /= max(self.counts.sum(), 1.0)
        within = (within + within.T) / 2
        width = len(within)
        spread = max(np.trace(within) / width, 1e-9)
        within = (1.0 - SHRINKAGE) * within + SHRINKAGE * spread * np.eye(width)
        weight = np.linalg.solve(within, means.T).T
        bias = -0.5 * (weight * means).sum(axis=1)
        logits = means @ weight.T + bias  # of each type's mean (K, K)
        gaps = np.diag(logits)[:, None] - logits
        np.fill_diagonal(gaps, np.inf)
        scale = GAP / max(float(np.median(gaps.min(axis=1))), GAP) if len(seen) > 1 else 1.0
        all_weight, all_bias = np.zeros((len(self.counts), width)), np.full(len(self.counts), -30.0)
        all_weight[seen], all_bias[seen] = scale * weight, scale * bias
        return all_weight, all_bias

"""`combined`, the default: a weighted sum of `markers`, `prototypes` and `confidence`, on the scale of known cells.

The three find different unknown cells: markers those whose genes fit no known type although the head is sure,
prototypes those whose representation lies apart, confidence those between two types. Weights were chosen on cell types
withheld from training studies (`benchmarks/novelty.py`, docs/log.md).
"""

from __future__ import annotations

from typing import ClassVar, Self

import numpy as np

from evercell.rejection.base import Outputs, Rejector
from evercell.rejection.confidence import ConfidenceRejector
from evercell.rejection.markers import MarkersRejector
from evercell.rejection.prototypes import PrototypesRejector

WEIGHTS = np.array([0.3, 0.5, 1.0], dtype=np.float32)  # of confidence, prototypes, markers
LEAST_SPREADS = np.array([0.1, 0.1, 0.02], dtype=np.float32)
"""Where all held-out cells are alike, no score may drown the others."""


class CombinedRejector(Rejector):
    """``sum_i w_i s_i / spread_i`` with s the logarithms of `confidence` and `prototypes`, and `markers`.

    The first two scores are positive with long tails, so logarithms are what can be added. The spreads are not taken
    over training cells: a model is sure of all of those, and what it says of its confidence in them has next to none.
    `another_study` is about the mean over pairs of training studies of how much higher thresholds must be for a model
    of the first to keep nine in ten of the rightly labelled cells of the second (docs/log.md).
    Models saved before `markers` came hold two spreads, and their score stays the plain sum of the two logarithms.
    """

    name: ClassVar[str] = "combined"
    another_study: ClassVar[float] = 1.5
    calibration: ClassVar[tuple[str, ...]] = (*MarkersRejector.calibration, "spread")
    of_genes: ClassVar[tuple[str, ...]] = MarkersRejector.of_genes

    @classmethod
    def fitted(cls, outputs: Outputs, codes: np.ndarray) -> Self:
        """Fit `prototypes` and `markers`; the spreads are 1 until `calibrated` sets them."""
        parts = [part.fitted(outputs, codes).arrays for part in (PrototypesRejector, MarkersRejector)]
        return cls({**parts[0], **parts[1], "spread": np.ones(3)})

    def calibrated(self, outputs: Outputs) -> Self:
        """The same rejector with the spreads and the quantiles of held-out cells of known types."""
        arrays = {**self.arrays, **MarkersRejector(self.arrays).calibrated(outputs).arrays}
        spread = np.maximum(type(self)(arrays)._scores(outputs).std(axis=0), LEAST_SPREADS)
        return Rejector.calibrated(type(self)({**arrays, "spread": spread}), outputs)

    def calibrated_as(self, other: Self) -> Self:
        """The same rejector with the calibration of another; without `markers` where the other had none."""
        if "genes" in other.arrays:
            return super().calibrated_as(other)
        old = {name: self.arrays[name] for name in ("whitening", "whitened_means")}
        return Rejector.calibrated_as(type(self)(old), other)

    def score(self, outputs: Outputs) -> np.ndarray:
        """Score of each cell (B,)."""
        spread = self.arrays["spread"]
        weights = WEIGHTS if "genes" in self.arrays else np.ones(2, dtype=np.float32)
        total = np.zeros(len(outputs), dtype=np.float32)
        for column, weight in zip(self._scores(outputs).T, weights / spread, strict=True):
            total += weight * column
        return total

    def _scores(self, outputs: Outputs) -> np.ndarray:
        """Logarithms of `confidence` and `prototypes`, and `markers` (B, 3); of old models the first two."""
        scores = [
            np.log(ConfidenceRejector({}).score(outputs) + 1e-3),
            np.log(PrototypesRejector(self.arrays).score(outputs) + 1e-3),
        ]
        if "genes" in self.arrays:
            scores.append(MarkersRejector(self.arrays).score(outputs))
        found: np.ndarray = np.stack(scores, axis=1)
        return found

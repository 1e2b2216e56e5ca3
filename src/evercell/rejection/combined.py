"""`combined`: low confidence and a representation far from every type, each on the scale of known cells."""

from __future__ import annotations

from typing import ClassVar, Self

import numpy as np

from evercell.rejection.base import Outputs, Rejector
from evercell.rejection.confidence import ConfidenceRejector
from evercell.rejection.prototypes import PrototypesRejector

LEAST_SPREAD = 0.1  # where all held-out cells are alike, no score may drown the other


class CombinedRejector(Rejector):
    """Sum of the logarithms of `confidence` and `prototypes` scores, each divided by its spread over held-out cells.

    Both scores are positive with long tails, so logarithms are what can be added. The spread is not taken over training
    cells: a model is sure of all of those, and what it says of its confidence in them has next to none.
    """

    name: ClassVar[str] = "combined"
    calibration: ClassVar[tuple[str, ...]] = ("known_quantiles", "spread")

    @classmethod
    def fitted(cls, outputs: Outputs, codes: np.ndarray) -> Self:
        """Fit `prototypes`; the spreads are 1 until `calibrated` sets them."""
        return cls({**PrototypesRejector.fitted(outputs, codes).arrays, "spread": np.ones(2)})

    def calibrated(self, outputs: Outputs) -> Self:
        """The same rejector with the spreads and the quantiles of held-out cells of known types."""
        spread = np.maximum(self._logs(outputs).std(axis=0), LEAST_SPREAD)
        return Rejector.calibrated(type(self)({**self.arrays, "spread": spread}), outputs)

    def _logs(self, outputs: Outputs) -> np.ndarray:
        """Logarithms of both scores (B, 2)."""
        scores = (ConfidenceRejector({}).score(outputs), PrototypesRejector(self.arrays).score(outputs))
        found: np.ndarray = np.log(np.stack(scores, axis=1) + 1e-3)
        return found

    def score(self, outputs: Outputs) -> np.ndarray:
        """Score of each cell (B,)."""
        return (self._logs(outputs) / self.arrays["spread"]).sum(axis=1).astype(np.float32)

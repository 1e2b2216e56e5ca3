"""`combined`: low confidence and a representation far from every type, each on the scale of known cells."""

from __future__ import annotations

from typing import ClassVar, Self

import numpy as np

from evercell.rejection.base import Outputs, Rejector
from evercell.rejection.confidence import ConfidenceRejector
from evercell.rejection.prototypes import PrototypesRejector


class CombinedRejector(Rejector):
    """Sum of the logarithms of `confidence` and `prototypes` scores, each divided by its spread over training cells.

    Both scores are positive with long tails, so logarithms are what can be added.
    """

    name: ClassVar[str] = "combined"

    @classmethod
    def fitted(cls, outputs: Outputs, codes: np.ndarray) -> Self:
        """Fit `prototypes` and the spreads."""
        prototypes = PrototypesRejector.fitted(outputs, codes)
        rejector = cls({**prototypes.arrays, "spread": np.ones(2)})
        spread = rejector._logs(outputs).std(axis=0)
        return cls({**prototypes.arrays, "spread": np.maximum(spread, 1e-3)})

    def _logs(self, outputs: Outputs) -> np.ndarray:
        """Logarithms of both scores (B, 2)."""
        scores = (ConfidenceRejector({}).score(outputs), PrototypesRejector(self.arrays).score(outputs))
        found: np.ndarray = np.log(np.stack(scores, axis=1) + 1e-3)
        return found

    def score(self, outputs: Outputs) -> np.ndarray:
        """Score of each cell (B,)."""
        return (self._logs(outputs) / self.arrays["spread"]).sum(axis=1).astype(np.float32)

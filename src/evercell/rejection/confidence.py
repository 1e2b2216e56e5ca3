"""`confidence`: one minus the calibrated probability of the best type."""

from __future__ import annotations

from typing import ClassVar, Self

import numpy as np

from evercell.rejection.base import Outputs, Rejector


class ConfidenceRejector(Rejector):
    """``1 - max_k p_k``."""

    name: ClassVar[str] = "confidence"

    @classmethod
    def fitted(cls, outputs: Outputs, codes: np.ndarray) -> Self:
        """Nothing to fit."""
        return cls({})

    def score(self, outputs: Outputs) -> np.ndarray:
        """Score of each cell (B,)."""
        return (1.0 - outputs.confidence).astype(np.float32)

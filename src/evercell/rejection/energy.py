"""`energy`: how little evidence there is for any type.

Source: Liu et al., NeurIPS 2020; CANAL uses it with temperature 0.8.
"""

from __future__ import annotations

from typing import ClassVar, Self

import numpy as np

from evercell.rejection.base import Outputs, Rejector

TEMPERATURE = 0.8


class EnergyRejector(Rejector):
    """``-T log sum_k exp(logit_k / T)``."""

    name: ClassVar[str] = "energy"

    @classmethod
    def fitted(cls, outputs: Outputs, codes: np.ndarray) -> Self:
        """Nothing to fit."""
        return cls({})

    def score(self, outputs: Outputs) -> np.ndarray:
        """Score of each cell (B,)."""
        scaled = outputs.logits / TEMPERATURE
        peak = scaled.max(axis=1)
        return (-TEMPERATURE * (peak + np.log(np.exp(scaled - peak[:, None]).sum(axis=1)))).astype(np.float32)

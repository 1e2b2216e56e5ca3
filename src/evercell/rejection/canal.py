"""`canal`: CANAL's own rule, which judges a cell by the other cells of the query. For comparison only.

Source: Wan et al., Briefings in Bioinformatics 2024, bbae047. The energy is stretched to 0..1 over the cells at hand
and averaged with ``1 - confidence``. The threshold is taken from mixtures of each cell with another one of the query,
drawn at random: the mean of their confidence and of one minus their stretched energy. So the same cell may be called
unknown beside some cells and not beside others, and no rate can be asked for.
"""

from __future__ import annotations

from typing import ClassVar, Self

import numpy as np

from evercell.rejection.base import Outputs, Rejector
from evercell.rejection.energy import EnergyRejector

SEED = 0  # of the mixtures


class CanalRejector(Rejector):
    """``(stretched energy + 1 - confidence) / 2`` of the transformer, with a threshold from mixed cells."""

    name: ClassVar[str] = "canal"
    per_cell: ClassVar[bool] = False

    @classmethod
    def fitted(cls, outputs: Outputs, codes: np.ndarray) -> Self:
        """The way from representation to logits: affine, and found exactly, where the head has no hidden layers."""
        x = np.pad(outputs.representation, ((0, 0), (0, 1)), constant_values=1.0).astype(np.float64)
        return cls({"classifier": np.linalg.lstsq(x, outputs.logits.astype(np.float64), rcond=None)[0]})

    def score(self, outputs: Outputs) -> np.ndarray:
        """Score of each cell (B,) among these cells."""
        energy = EnergyRejector({}).score(outputs)
        found: np.ndarray = ((_stretched(energy) + 1.0 - _confidence(outputs.logits)) / 2).astype(np.float32)
        return found

    def threshold_among(self, outputs: Outputs, rate: float) -> float:
        """Threshold for these cells, from mixtures of them; no rate can be asked for."""
        if not len(outputs.representation):
            return self.threshold(rate)
        rng = np.random.default_rng(SEED)
        own = outputs.representation
        other = own[rng.integers(0, len(own), len(own))]
        share = rng.random(own.shape)  # Beta(1, 1) for each place of the representation
        mixed = np.pad(share * own + (1 - share) * other, ((0, 0), (0, 1)), constant_values=1.0)
        logits = (mixed @ self.arrays["classifier"]).astype(np.float32)
        energy = EnergyRejector({}).score(Outputs(own, logits, logits))
        return float((np.mean(1.0 - _stretched(energy)) + np.mean(_confidence(logits))) / 2)


def _confidence(logits: np.ndarray) -> np.ndarray:
    """Probability of the best type (B,), uncalibrated as in the paper."""
    found: np.ndarray = 1.0 / np.exp(logits - logits.max(axis=1, keepdims=True)).sum(axis=1)
    return found


def _stretched(energy: np.ndarray) -> np.ndarray:
    """Energies (B,) moved and scaled to 0..1 over the cells at hand."""
    lowest, highest = energy.min(initial=np.inf), energy.max(initial=-np.inf)
    if highest <= lowest:
        return np.zeros_like(energy)
    found: np.ndarray = (energy - lowest) / (highest - lowest)
    return found

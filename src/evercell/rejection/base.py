"""What every rejector shares."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np

QUANTILES = 1001  # resolution of the stored scores: thresholds in steps of 0.1 %


@dataclass(frozen=True)
class Outputs:
    """What a model says of some cells.

    Parameters
    ----------
    representation
        (B, D), float32.
    logits
        Of the transformer's head (B, K), float32.
    log_proba
        Calibrated log-probabilities of the whole model (B, K), float32.
    """

    representation: np.ndarray
    logits: np.ndarray
    log_proba: np.ndarray

    @classmethod
    def joined(cls, parts: Sequence[Outputs]) -> Outputs:
        """Outputs of several blocks of cells as one."""
        return cls(
            np.concatenate([part.representation for part in parts]),
            np.concatenate([part.logits for part in parts]),
            np.concatenate([part.log_proba for part in parts]),
        )

    def taken(self, rows: np.ndarray) -> Outputs:
        """Only the cells `rows`."""
        return Outputs(self.representation[rows], self.logits[rows], self.log_proba[rows])

    @property
    def proba(self) -> np.ndarray:
        """Calibrated probabilities (B, K)."""
        found: np.ndarray = np.exp(self.log_proba)
        return found

    @property
    def codes(self) -> np.ndarray:
        """Most probable type of each cell (B,)."""
        found: np.ndarray = self.log_proba.argmax(axis=1)
        return found

    @property
    def confidence(self) -> np.ndarray:
        """Calibrated probability of that type (B,)."""
        found: np.ndarray = np.exp(self.log_proba.max(axis=1))
        return found


class Rejector(ABC):
    """Scores cells; higher means less like the known types. Its state is named arrays, which the model stores."""

    name: ClassVar[str]
    calibration: ClassVar[tuple[str, ...]] = ("known_quantiles",)
    """Arrays that `calibrated` sets, from held-out cells."""

    def __init__(self, arrays: Mapping[str, np.ndarray]) -> None:
        self.arrays = {name: np.asarray(value, dtype=np.float32) for name, value in arrays.items()}

    @classmethod
    @abstractmethod
    def fitted(cls, outputs: Outputs, codes: np.ndarray) -> Self:
        """Rejector fitted on training cells of known type (codes (B,))."""

    @abstractmethod
    def score(self, outputs: Outputs) -> np.ndarray:
        """Score of each cell (B,), float32; depends on that cell and the model only."""

    def calibrated(self, outputs: Outputs) -> Self:
        """The same rejector with the scores of held-out cells of known types stored as quantiles."""
        quantiles = np.quantile(self.score(outputs), np.linspace(0.0, 1.0, QUANTILES))
        return type(self)({**self.arrays, "known_quantiles": quantiles})

    def calibrated_as(self, other: Self) -> Self:
        """The same rejector with the calibration of another, for a model trained again on all cells."""
        return type(self)({**self.arrays, **{name: other.arrays[name] for name in self.calibration}})

    def moved(self, by: float) -> Self:
        """The same rejector with every threshold moved by `by`."""
        return type(self)({**self.arrays, "known_quantiles": self.arrays["known_quantiles"] + by})

    def threshold(self, rate: float) -> float:
        """Score above which a share `rate` of held-out known cells lay."""
        quantiles = self.arrays["known_quantiles"]
        return float(np.interp(1.0 - rate, np.linspace(0.0, 1.0, len(quantiles)), quantiles))

"""What every rejector shares."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import numpy as np

from evercell.tokenizers.base import View

QUANTILES = 1001  # resolution of the stored scores: thresholds in steps of 0.1 %

DEFAULT_RATE = 0.01
"""Share of cells of known types that may be called unknown, where a model stores no rate of its own."""

CALIBRATION = ("known_quantiles", "known_medians", "known_cells")
"""Arrays that every rejector sets on held-out cells of known types: of all scores, and of those called each type."""

LEAST_CELLS = 5
"""Held-out cells and cells of a query from which on the medians of a type's scores are compared."""

MOST_SHIFT = 5.0
"""Largest shift of a query's known cells that is believed; between training studies it was up to 6."""

IMPOSSIBLE = -1e4  # logit and log-probability of a type that is left out


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
    view
        The cells themselves, for rejectors that look at genes; None where they are not at hand.
    """

    representation: np.ndarray
    logits: np.ndarray
    log_proba: np.ndarray
    view: View | None = None

    def __len__(self) -> int:
        return len(self.representation)

    @classmethod
    def joined(cls, parts: Sequence[Outputs]) -> Outputs:
        """Outputs of several blocks of cells as one."""
        views = [part.view for part in parts if part.view is not None]
        return cls(
            np.concatenate([part.representation for part in parts]),
            np.concatenate([part.logits for part in parts]),
            np.concatenate([part.log_proba for part in parts]),
            View.joined(views) if len(views) == len(parts) else None,
        )

    def taken(self, rows: np.ndarray) -> Outputs:
        """Only the cells `rows` (row numbers or a mask)."""
        view = None if self.view is None else self.view.taken(rows)
        return Outputs(self.representation[rows], self.logits[rows], self.log_proba[rows], view)

    def without(self, code: int) -> Outputs:
        """As a head without the type `code` would say it: that type is impossible, the others share its probability."""
        logits, log_proba = self.logits.copy(), self.log_proba.copy()
        logits[:, code] = log_proba[:, code] = IMPOSSIBLE
        peak = log_proba.max(axis=1, keepdims=True)
        log_proba -= peak + np.log(np.exp(log_proba - peak).sum(axis=1, keepdims=True))
        return replace(self, logits=logits, log_proba=log_proba)

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
    per_cell: ClassVar[bool] = True
    """Whether the verdict on a cell depends on that cell and the model only; not so for `canal`."""
    another_study: ClassVar[float] = 0.0
    """How much higher known cells of a study that the model has not learnt score, where the model has not seen one."""
    calibration: ClassVar[tuple[str, ...]] = CALIBRATION
    """Arrays that `calibrated` sets, from held-out cells."""
    of_genes: ClassVar[tuple[str, ...]] = ()
    """Those of them that hold for the genes measured: a query with other genes needs them anew."""

    def __init__(self, arrays: Mapping[str, np.ndarray]) -> None:
        self.arrays = {name: np.asarray(value, dtype=np.float32) for name, value in arrays.items()}

    @classmethod
    @abstractmethod
    def fitted(cls, outputs: Outputs, codes: np.ndarray) -> Self:
        """Rejector fitted on training cells of known type (codes (B,))."""

    @abstractmethod
    def score(self, outputs: Outputs) -> np.ndarray:
        """Score of each cell (B,), float32; depends on that cell and the model only, where `per_cell`."""

    def calibrated(self, outputs: Outputs) -> Self:
        """The same rejector with the scores of held-out cells of known types stored."""
        scores = self.score(outputs)
        quantiles = np.quantile(scores, np.linspace(0.0, 1.0, QUANTILES))
        found = {
            "known_quantiles": quantiles,
            "known_medians": _medians(scores, outputs.codes, outputs.logits.shape[1]),
            "known_cells": np.bincount(outputs.codes, minlength=outputs.logits.shape[1]),
        }
        return type(self)({**self.arrays, **found})

    def calibrated_as(self, other: Self) -> Self:
        """The same rejector with the calibration of another, for a model trained again on all cells."""
        names = [name for name in (*self.calibration, "default_rate", "allowance") if name in other.arrays]
        return type(self)({**self.arrays, **{name: other.arrays[name] for name in names}})

    def adapted_as(self, other: Self, outputs: Outputs) -> Self:
        """The same rejector with the calibration of another, but for `of_genes`, which cells of known types give."""
        if any(name not in other.arrays for name in self.of_genes):
            return self.calibrated_as(other)
        anew = self.calibrated(outputs).arrays
        return type(self)({**self.calibrated_as(other).arrays, **{name: anew[name] for name in self.of_genes}})

    def with_default_rate(self, rate: float) -> Self:
        """The same rejector with the rate of false rejections that it is used at, where none is asked for."""
        return type(self)({**self.arrays, "default_rate": np.array([rate])})

    @property
    def default_rate(self) -> float:
        """Rate of false rejections where none is asked for; set at training by leaving types out."""
        stored = self.arrays.get("default_rate")
        return DEFAULT_RATE if stored is None else round(float(stored[0]), 6)

    def moved(self, by: float) -> Self:
        """The same rejector for cells that all score higher by `by`."""
        names = [name for name in ("known_quantiles", "known_medians") if name in self.arrays]
        return type(self)({**self.arrays, **{name: self.arrays[name] + by for name in names}})

    def allowing(self, more: float) -> Self:
        """The same rejector with thresholds higher by `more`, for known cells of studies that were not learnt."""
        return type(self)({**self.arrays, "allowance": np.array([more])})

    @property
    def allowance(self) -> float:
        """What thresholds are higher by for known cells of studies that were not learnt; 0 in models of format 4."""
        stored = self.arrays.get("allowance")
        return 0.0 if stored is None else float(stored[0])

    def threshold(self, rate: float) -> float:
        """Score above which a share `rate` of held-out known cells lay, and the allowance for other studies."""
        quantiles = self.arrays["known_quantiles"]
        return float(np.interp(1.0 - rate, np.linspace(0.0, 1.0, len(quantiles)), quantiles)) + self.allowance

    @property
    def gives_p_values(self) -> bool:
        """Whether `p_values` can be asked for: not of models of format 4 and below, nor where not `per_cell`."""
        return self.per_cell and "known_medians" in self.arrays

    def p_values(self, scores: np.ndarray, codes: np.ndarray) -> np.ndarray:
        """Conformal p-values (B,) of the cells of one query, float64: ``(1 + n_higher) / (1 + n)``.

        For a cell of a known type that scores like a held-out one, the probability of a value of at most ``p`` is at
        most ``p`` (Bates et al., Annals of Statistics 2023). Cells of another study score higher; by how much is told
        by the medians of the types in the query (Efron's empirical null, JASA 2004), so unlike `score` these depend on
        the other cells.

        Parameters
        ----------
        scores, codes
            Of all cells of the query (B,): what `score` gives, and the most probable types.
        """
        n, quantiles = float(self.arrays["known_cells"].sum()), self.arrays["known_quantiles"]
        own = scores - self._shift(scores, codes)
        below = np.maximum(np.searchsorted(quantiles, own, side="left") - 1, 0) / (len(quantiles) - 1)
        return np.where(own > quantiles[-1], 1 / (1 + n), (1 + n * (1 - below)) / (1 + n))

    def _shift(self, scores: np.ndarray, codes: np.ndarray) -> float:
        """How much higher the types' medians are in a query than in held-out cells, mean over its cells; at least 0."""
        medians = self.arrays["known_medians"]
        n_cells = np.bincount(codes, minlength=len(medians))
        seen = (n_cells >= LEAST_CELLS) & (self.arrays["known_cells"] >= LEAST_CELLS)
        if not seen.any():
            return 0.0
        more = _medians(scores, codes, len(medians)) - medians
        return float(np.clip(np.average(more[seen], weights=n_cells[seen]), 0.0, MOST_SHIFT))

    def threshold_among(self, outputs: Outputs, rate: float) -> float:
        """Threshold for these cells: the stored one, whatever the cells are, where `per_cell`."""
        return self.threshold(rate)


def _medians(scores: np.ndarray, codes: np.ndarray, n_types: int) -> np.ndarray:
    """Median score of the cells called each type (K,); 0 for a type of which there are none."""
    found = np.zeros(n_types)
    for code in np.unique(codes):
        found[code] = np.median(scores[codes == code])
    return found

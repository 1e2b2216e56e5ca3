"""Label sets: the types that a cell may be of, at a chosen rate of errors.

A type is in the set of a cell where the model's surprise at that type, ``-log p``, is no larger than in all but a share
`rate` of held-out cells that are of it. If a cell and the held-out cells of its type could have been drawn in any
order, its type is in its set with a probability of at least ``1 - rate``, whatever the model: class-conditional
conformal prediction (Vovk, ACML 2012; Sadinle et al., JASA 2019). That holds for further cells of the donors or
studies that the model was calibrated on. Cells of another study are no such draw: how
often their sets are right was measured (docs/guarantees.md), and is not guaranteed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from evercell.celltypes import CellTypes
from evercell.ontology import common_parent, term

LEVELS = 201
"""Stored quantiles of the surprise at the right type: rates of errors in steps of half a percent."""
SEPARATOR = " | "
CELL = "CL:0000000"
"""What every cell is: the lowest common parent where a type has no Cell Ontology id."""


@dataclass(frozen=True)
class LabelSets:
    """Surprise of held-out cells at their own type.

    Parameters
    ----------
    quantiles
        Of ``-log p`` of the right type among the held-out cells of each type (K, LEVELS), float32, rounded upwards; 0
        for a type without held-out cells.
    together
        The same of the held-out cells of all types (LEVELS,).
    cells
        Held-out cells of each type (K,), int64.
    shift
        What is added to the thresholds at each level where a query lacks genes (`adaptation`; LEVELS,).
    """

    quantiles: np.ndarray
    together: np.ndarray
    cells: np.ndarray
    shift: np.ndarray

    @classmethod
    def calibrated(cls, log_proba: np.ndarray, codes: np.ndarray, n_types: int) -> LabelSets:
        """From calibrated log-probabilities (N, K) of held-out cells and the codes of their types (N,)."""
        quantiles = np.zeros((n_types, LEVELS), dtype=np.float32)
        for code in np.unique(codes):
            quantiles[code] = surprise_quantiles(log_proba[codes == code], codes[codes == code])
        cells = np.bincount(codes, minlength=n_types)
        return cls(quantiles, surprise_quantiles(log_proba, codes), cells, np.zeros(LEVELS, dtype=np.float32))

    @classmethod
    def of_arrays(cls, arrays: Mapping[str, np.ndarray]) -> LabelSets:
        """From what `arrays` gave."""
        return cls(arrays["quantiles"], arrays["together"], arrays["cells"].astype(np.int64), arrays["shift"])

    def arrays(self) -> dict[str, np.ndarray]:
        """As a model stores them."""
        return {"quantiles": self.quantiles, "together": self.together, "cells": self.cells, "shift": self.shift}

    def shifted(self, shift: np.ndarray) -> LabelSets:
        """The same with another shift (LEVELS,)."""
        return replace(self, shift=shift.astype(np.float32))

    def conditional(self, rate: float) -> np.ndarray:
        """Whether there are held-out cells enough for a threshold of the type's own (K,), bool."""
        found: np.ndarray = np.ceil((self.cells + 1) * (1 - rate)) <= self.cells
        return found

    def thresholds(self, rate: float) -> np.ndarray:
        """Largest surprise at which a type is in the set of a cell (K,), float64.

        A type with too few held-out cells for the rate takes the threshold of all cells together, or what its own
        cells showed at most, if that is more.
        """
        total = int(self.cells.sum())
        rest = _at(self.together, total, rate)
        own = [
            _at(row, int(n), rate) if enough else max(rest, float(row[-1]) if n else rest)
            for row, n, enough in zip(self.quantiles, self.cells, self.conditional(rate), strict=True)
        ]
        return np.asarray(own) + float(np.interp(1 - rate, np.linspace(0, 1, LEVELS), self.shift))

    def members(self, log_proba: np.ndarray, rate: float) -> np.ndarray:
        """Which types are in the set of each cell (B, K), bool; the most probable one always is."""
        found: np.ndarray = -log_proba <= self.thresholds(rate)
        found[np.arange(len(found)), log_proba.argmax(axis=1)] = True
        return found


def set_names(members: np.ndarray, types: CellTypes) -> list[str]:
    """Sets (S, K) in words: the types, in the order of the model."""
    return [SEPARATOR.join(types.names[code] for code in np.flatnonzero(row)) for row in members]


def lineages(members: np.ndarray, types: CellTypes) -> list[tuple[str, str]]:
    """What all types of each set (S, K) are: a name and a Cell Ontology id, which may be empty.

    Of a set of one type, that type under the model's name. Of several, the lowest common parent in the Cell Ontology;
    "cell" where one of them has no place in it.
    """
    return [_lineage(np.flatnonzero(row), types) for row in members]


def _lineage(codes: Sequence[int] | np.ndarray, types: CellTypes) -> tuple[str, str]:
    ids = [types.ontology_ids[code] for code in codes]
    if len(codes) == 1:
        return types.names[codes[0]], ids[0] or ""
    parent = common_parent([one for one in ids if one]) if all(ids) else term(CELL)
    return parent.label, parent.id


def surprise_quantiles(log_proba: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Quantiles of the surprise at the right type (LEVELS,), rounded upwards, from log-probabilities (N, K)."""
    surprise = -log_proba[np.arange(len(codes)), codes]
    found: np.ndarray = np.quantile(surprise, np.linspace(0, 1, LEVELS), method="inverted_cdf").astype(np.float32)
    return found


def _at(quantiles: np.ndarray, n_cells: int, rate: float) -> float:
    """The ``ceil((n + 1) (1 - rate))``-th smallest of `n_cells` values, or the next stored one above it."""
    level = min(math.ceil((n_cells + 1) * (1 - rate)) / max(n_cells, 1), 1.0)
    return float(quantiles[math.ceil(level * (len(quantiles) - 1) - 1e-9)])

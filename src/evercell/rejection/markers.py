"""`markers`: how little a cell's expression of the types' marker genes looks like its own type.

The representation holds what parts the known types from each other; what an unknown type has of its own may be lost
in it. So this score is taken in gene space: the correlation of a cell with the mean profile of its most probable type,
over the markers of all types. Comparing cells with profiles over marker genes is the idea of SingleR (Aran et al.,
Nature Immunology 2019).
"""

from __future__ import annotations

from typing import ClassVar, Self

import numpy as np
from scipy.sparse import csr_matrix

from evercell.profiles import correlations
from evercell.rejection.base import CALIBRATION, Outputs, Rejector
from evercell.tokenizers.base import View

MARKERS = 30  # a type
BORROWED = 10  # cells' weight of the mean over types in the mean of one type
LEAST_SPREAD = 0.02  # of correlations


class MarkersRejector(Rejector):
    """``-corr(cell, profile of its type)``, less what a known cell of that type and depth would have.

    Expression is ``log(1 + 10^4 count / total)`` less its mean over the types. The correlation is about that mean, so a
    cell that has nothing of its type scores 0 and a perfect one -1. It falls with depth and differs between types;
    both are taken off by a line fitted on held-out cells.
    """

    name: ClassVar[str] = "markers"
    calibration: ClassVar[tuple[str, ...]] = (*CALIBRATION, "expected", "slope")
    of_genes: ClassVar[tuple[str, ...]] = ("expected", "slope")

    @classmethod
    def fitted(cls, outputs: Outputs, codes: np.ndarray) -> Self:
        """Markers and profiles of the types, from training cells."""
        view = _cells(outputs)
        logged = view.logged()
        types, n_types = np.unique(codes), outputs.logits.shape[1]
        members = csr_matrix(
            (np.ones(len(codes), dtype=np.float32), (np.searchsorted(types, codes), np.arange(len(codes))))
        )
        means = (members @ logged).toarray() / np.bincount(codes)[types][:, None]  # (T, G)
        others = (means.sum(axis=0) - means) / max(len(types) - 1, 1)
        above = np.where(view.measured, means - others, -np.inf)
        best = np.argsort(-above, axis=1, kind="stable")[:, :MARKERS]
        genes = np.unique(best[np.take_along_axis(above, best, axis=1) > 0])
        centre = means[:, genes].mean(axis=0)
        profiles = np.zeros((len(genes), n_types))
        centred = means[:, genes] - centre
        profiles[:, types] = (centred / np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-9)).T
        return cls(
            {
                "genes": genes,
                "centre": centre,
                "profiles": profiles,
                "expected": np.zeros(n_types),
                "slope": np.zeros(1),
            }
        )

    def calibrated(self, outputs: Outputs) -> Self:
        """The same rejector with what known cells score, from held-out cells of known types."""
        raw, depth, codes = self._raw(outputs), _depth(_cells(outputs)), outputs.codes
        n_cells = np.bincount(codes, minlength=len(self.arrays["expected"]))

        def of_types(values: np.ndarray) -> np.ndarray:
            sums = np.bincount(codes, values, minlength=len(n_cells))
            return (sums + BORROWED * values.mean()) / (n_cells + BORROWED)

        scores, depths = of_types(raw), of_types(depth)
        x, y = depth - depths[codes], raw - scores[codes]
        slope = float(x @ y / (x @ x + BORROWED * depth.var() + 1e-9))
        fitted = type(self)({**self.arrays, "expected": scores - slope * depths, "slope": np.array([slope])})
        return Rejector.calibrated(fitted, outputs)

    def score(self, outputs: Outputs) -> np.ndarray:
        """Score of each cell (B,)."""
        expected = self.arrays["expected"][outputs.codes] + self.arrays["slope"][0] * _depth(_cells(outputs))
        return (self._raw(outputs) - expected).astype(np.float32)

    def _raw(self, outputs: Outputs) -> np.ndarray:
        """Minus the correlation of each cell with its most probable type (B,)."""
        genes = self.arrays["genes"].astype(np.int64)
        found = correlations(_cells(outputs), genes, self.arrays["centre"], self.arrays["profiles"])
        own: np.ndarray = -found[np.arange(len(outputs)), outputs.codes]
        return own


def _cells(outputs: Outputs) -> View:
    if outputs.view is None:
        raise ValueError("markers are scored on the cells themselves, which these outputs do not hold")
    return outputs.view


def _depth(view: View) -> np.ndarray:
    """Logarithm of the number of expressed genes (B,), float32."""
    found: np.ndarray = np.log1p(np.diff(view.counts.indptr)).astype(np.float32)
    return found

"""`prototypes`: Mahalanobis distance of the representation to the nearest type.

Source: Lee et al., NeurIPS 2018; one covariance for all types, shrunk as by Ledoit and Wolf.
"""

from __future__ import annotations

from typing import ClassVar, Self

import numpy as np

from evercell.rejection.base import Outputs, Rejector


class PrototypesRejector(Rejector):
    """``min_k (x - mu_k)' S^-1 (x - mu_k) / D`` over the types that have training cells."""

    name: ClassVar[str] = "prototypes"

    @classmethod
    def fitted(cls, outputs: Outputs, codes: np.ndarray) -> Self:
        """Means of the types and the shared covariance, from training cells."""
        from sklearn.covariance import LedoitWolf

        x = outputs.representation.astype(np.float64)
        types = np.unique(codes)
        means = np.stack([x[codes == code].mean(axis=0) for code in types])
        centred = x - means[np.searchsorted(types, codes)]
        covariance = LedoitWolf(assume_centered=True, store_precision=False).fit(centred).covariance_
        # A thousandth of a percent more on the diagonal: with one cell a type there is no spread to invert.
        covariance += (1e-5 * np.trace(covariance) / len(covariance) + 1e-9) * np.eye(len(covariance))
        whitening = np.linalg.cholesky(np.linalg.inv(covariance))  # S^-1 = W W'
        return cls({"whitening": whitening, "whitened_means": means @ whitening})

    def score(self, outputs: Outputs) -> np.ndarray:
        """Score of each cell (B,)."""
        # Summed term by term: a matrix product rounds a cell differently with the number of cells beside it.
        whitened = np.zeros_like(outputs.representation)  # (B, D)
        for place, row in enumerate(self.arrays["whitening"]):
            whitened += outputs.representation[:, place, None] * row
        means = self.arrays["whitened_means"]
        nearest = np.full(len(whitened), np.inf, dtype=np.float32)
        for mean in means:
            np.minimum(nearest, np.square(whitened - mean).mean(axis=1), out=nearest)
        return nearest

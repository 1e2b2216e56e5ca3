"""Linear model on log-normalised counts: the baseline of every training run, and a member of the model.

Published comparisons put multinomial logistic regression on a par with far larger models, so each training run fits one
on the same cells and reports both. Its errors differ from the transformer's, so the model also asks it (see
`annotator`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_matrix

from evercell.bank import kinds_of
from evercell.tokenizers.base import View

FEW_CELLS = 1200
"""Most cells whose logistic regression is fitted in the space they span; of more, finding it costs what it saves."""

RANK = 1e-10
"""Directions in which cells vary less than this share of the most are noise of the arithmetic."""


@dataclass(frozen=True)
class LinearModel:
    """Multinomial logistic regression.

    Parameters
    ----------
    weight
        (G, K), float32; zero for genes that no type is told by.
    bias
        (K,), float32.
    centre
        Taken off the expression of every gene that was measured (G,), float32, so that a gene which was not measured
        says nothing; None for 0. Imported models have it (`evercell.importing`).
    ceiling
        Expression of a gene counts up to here (G,), float32, before the centre is taken off; None for no limit.
    """

    weight: np.ndarray
    bias: np.ndarray
    centre: np.ndarray | None = None
    ceiling: np.ndarray | None = None

    @property
    def n_types(self) -> int:
        """Number of types K."""
        return int(self.weight.shape[1])

    @property
    def scaled(self) -> bool:
        """Whether expression is cut off and centred before it is weighed."""
        return self.centre is not None or self.ceiling is not None

    def features(self, view: View) -> csr_matrix:
        """Log-normalised expression (B, G), CSR, cut off at the ceiling."""
        logged = view.logged()
        if self.ceiling is not None:
            logged.data = np.minimum(logged.data, self.ceiling[logged.indices])
        return logged

    def offset(self, measured: np.ndarray) -> np.ndarray:
        """What every cell is given of each type (K,), float32, where the genes `measured` (G,) were."""
        if self.centre is None:
            return self.bias
        rows = np.flatnonzero(measured & (self.centre != 0))
        found: np.ndarray = self.bias - self.centre[rows].astype(np.float64) @ self.weight[rows]
        return found.astype(np.float32)

    def log_proba(self, view: View) -> np.ndarray:
        """Log-probabilities of the types (B, K), float32. Each row depends on its own cell alone."""
        logits = self.features(view) @ self.weight + self.offset(view.measured)
        logits -= logits.max(axis=1, keepdims=True)
        found: np.ndarray = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        return found

    def arrays(self) -> dict[str, np.ndarray]:
        """As a model stores them."""
        found = {"weight": self.weight, "bias": self.bias, "centre": self.centre, "ceiling": self.ceiling}
        return {name: array for name, array in found.items() if array is not None}

    def widened(self, n_genes: int) -> LinearModel:
        """The same model over a longer gene list; the new genes weigh nothing."""
        more = n_genes - len(self.weight)
        return LinearModel(
            np.pad(self.weight, ((0, more), (0, 0))),
            self.bias,
            None if self.centre is None else np.pad(self.centre, (0, more)),
            None if self.ceiling is None else np.pad(self.ceiling, (0, more), constant_values=np.inf),
        )


def fit_linear(
    counts: csr_matrix,
    codes: np.ndarray,
    *,
    n_types: int,
    strength: float = 1.0,
    balanced: bool = False,
    stages: np.ndarray | None = None,
    max_cells: int = 5000,
    max_iterations: int = 80,
    seed: int = 0,
) -> LinearModel:
    """Fit logistic regression on ``log(1 + 10^4 count / total)``.

    Parameters
    ----------
    counts
        Counts (N, G), CSR.
    codes
        Type codes (N,), below `n_types`. A type without cells gets weight 0 and a bias that makes it improbable.
    n_types
        Number of types K.
    strength
        Inverse of the L2 penalty, scikit-learn's ``C``.
    balanced
        Weigh every type alike, however many cells it has.
    stages
        Stage of each cell (N,): within a type, every stage weighs alike too, if `balanced`.
    max_cells
        At most this many cells are used, drawn at random with every type (of every stage) kept in proportion to the
        root of its size.
    max_iterations
        Of L-BFGS.
    seed
        Of the draw.

    Returns
    -------
    LinearModel
    """
    kinds = codes if stages is None else kinds_of(codes, stages)
    rows = sampled(kinds, max_cells, np.random.default_rng(seed))
    used, codes, kinds = counts[rows], codes[rows], kinds[rows]
    seen = np.flatnonzero(np.bincount(used.indices, minlength=counts.shape[1]) >= min(3, len(rows)))
    logged = View.whole(used).logged()[:, seen]
    weight = np.zeros((counts.shape[1], n_types), dtype=np.float32)
    weight[seen], bias = logistic_regression(
        logged,
        codes,
        n_types=n_types,
        strength=strength,
        weights=alike(codes, kinds) if balanced else None,
        max_iterations=max_iterations,
    )
    return LinearModel(weight, bias)


def alike(codes: np.ndarray, kinds: np.ndarray) -> np.ndarray:
    """Weights of cells (N,), 1 on average, that are equal in sum over types and, within a type, over its kinds."""
    sizes = np.bincount(kinds)
    of_types = np.bincount(codes, 1.0 / sizes[kinds])  # number of kinds of each type
    weights: np.ndarray = 1.0 / (sizes[kinds] * of_types[codes])
    return weights * len(codes) / weights.sum()


def linear_member(
    counts: csr_matrix, codes: np.ndarray, n_types: int, seed: int, *, stages: np.ndarray | None = None
) -> LinearModel:
    """The linear model that a transformer is averaged with.

    It differs from the plain baseline in two ways that help across studies: every type weighs alike, because a query
    is seldom composed as the training cells are, and the penalty is ten times as strong. In an update the stages of a
    type weigh alike: a few bank cells stand for a whole earlier study.
    """
    return fit_linear(counts, codes, n_types=n_types, strength=0.1, balanced=True, stages=stages, seed=seed)


def logistic_regression(
    features: csr_matrix | np.ndarray,
    codes: np.ndarray,
    *,
    n_types: int,
    strength: float,
    weights: np.ndarray | None = None,
    max_iterations: int = 200,
) -> tuple[np.ndarray, np.ndarray]:
    """Weights (F, K) and biases (K,), float32, of multinomial logistic regression on features (N, F).

    Of a type without cells the weights are 0 and the bias makes it improbable. `weights` (N,) are those of the cells.
    """
    import warnings
    from contextlib import ExitStack

    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits

    weight = np.zeros((features.shape[1], n_types), dtype=np.float32)
    bias = np.full(n_types, -30.0, dtype=np.float32)
    types = np.unique(codes)
    if len(types) == 1:
        bias[types] = 0.0
        return weight, bias
    model = LogisticRegression(C=strength, max_iter=max_iterations)
    with warnings.catch_warnings(), ExitStack() as stack:
        warnings.simplefilter("ignore", ConvergenceWarning)  # stopping early is a setting here
        if len(codes) <= min(FEW_CELLS, features.shape[1] / 2):
            stack.enter_context(threadpool_limits(1, user_api="blas"))  # the last bits may not depend on threads
            coordinates, back = _span(features)
            model.fit(coordinates, codes, sample_weight=weights)
            coefficients = np.asarray(features.T @ (back @ model.coef_.T)).T
        else:
            coefficients = model.fit(features, codes, sample_weight=weights).coef_
    intercepts = model.intercept_
    if len(types) == 2:  # scikit-learn keeps one row for two classes; half to each side gives the same odds
        coefficients, intercepts = np.vstack([-coefficients, coefficients]) / 2, np.array([-1, 1]) * intercepts / 2
    weight[:, types] = coefficients.T
    bias[types] = intercepts
    return weight, bias


def _span(features: csr_matrix | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Features of cells (N, F) in the space that the cells span: coordinates (N, R), and what leads back (N, R).

    With an L2 penalty the weights of a linear model are sums of its cells, so of few cells and many genes a fit on the
    coordinates is the same fit, with R <= N columns in place of F. `features.T @ (back @ weights)` are weights of F.
    """
    wide = features.astype(np.float64)
    wide = wide if isinstance(wide, np.ndarray) else wide.toarray()  # sparse rows take several times as long
    values, vectors = np.linalg.eigh(wide @ wide.T)
    kept = values > RANK * values[-1]
    lengths = np.sqrt(values[kept])
    return vectors[:, kept] * lengths, vectors[:, kept] / lengths


def sampled(codes: np.ndarray, n_cells: int, rng: np.random.Generator) -> np.ndarray:
    """Sorted row numbers of at most `n_cells` cells, types drawn in proportion to the square root of their size."""
    if len(codes) <= n_cells:
        return np.arange(len(codes))
    sizes = np.bincount(codes)
    weight = 1.0 / np.sqrt(np.maximum(sizes, 1))[codes]
    return np.sort(rng.choice(len(codes), n_cells, replace=False, p=weight / weight.sum()))

"""Linear model: the baseline of every run."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.sparse import csr_matrix
from sklearn.linear_model import LogisticRegression

from evercell.linear import LinearModel, fit_linear, sampled
from evercell.testing import synthetic_cells
from evercell.tokenizers import View


def labelled(n_cells: int, seed: int, n_types: int = 4) -> tuple[csr_matrix, np.ndarray]:
    cells = synthetic_cells(n_cells, n_genes=200, n_types=n_types, seed=seed)
    return cells.X.astype(np.float32), cells.obs["cell_type"].cat.codes.to_numpy().astype(np.int64)


@pytest.fixture(scope="module")
def linear() -> LinearModel:
    return fit_linear(*labelled(200, seed=1), n_types=4)


def test_types_are_told(linear: LinearModel) -> None:
    counts, codes = labelled(200, seed=2)
    assert (linear.log_proba(View.whole(counts)).argmax(axis=1) == codes).mean() > 0.95
    assert linear.n_types == 4


def test_probabilities_sum_to_one_and_are_float32(linear: LinearModel) -> None:
    found = linear.log_proba(View.whole(labelled(50, seed=2)[0]))
    assert found.dtype == np.float32
    np.testing.assert_allclose(np.exp(found).sum(axis=1), 1, rtol=1e-5)


@pytest.mark.parametrize("n_types", [4, 11])
def test_a_cell_depends_on_that_cell_only(n_types: int) -> None:
    """Invariant 1, to the last bit."""
    counts, codes = labelled(60, seed=2, n_types=n_types)
    linear = fit_linear(counts, codes, n_types=n_types)
    found = linear.log_proba(View.whole(counts))
    for rows in (np.arange(60)[::-1], np.array([7]), np.array([3, 50, 4])):
        np.testing.assert_array_equal(linear.log_proba(View.whole(counts[rows])), found[rows])


def test_types_without_cells_are_improbable() -> None:
    counts, codes = labelled(100, seed=1)
    linear = fit_linear(counts, codes * 2, n_types=9)
    found = np.exp(linear.log_proba(View.whole(counts)))
    assert found[:, 1::2].max() < 1e-6
    assert (found.argmax(axis=1) == codes * 2).mean() > 0.95


def test_two_types_have_the_odds_of_logistic_regression() -> None:
    counts, codes = labelled(80, seed=1, n_types=2)
    view = View.whole(counts)
    logged = csr_matrix((view.log_normalised(), counts.indices, counts.indptr), shape=counts.shape)
    reference = LogisticRegression(C=0.1, max_iter=80).fit(logged, codes)
    linear = fit_linear(counts, codes, n_types=2, strength=0.1)
    np.testing.assert_allclose(np.exp(linear.log_proba(view)), reference.predict_proba(logged), atol=0.01)


def test_one_type_is_certain() -> None:
    counts, _ = labelled(20, seed=1)
    linear = fit_linear(counts, np.full(20, 2), n_types=3)
    np.testing.assert_allclose(np.exp(linear.log_proba(View.whole(counts)))[:, 2], 1, rtol=1e-6)


def test_genes_seen_in_fewer_than_three_cells_weigh_nothing() -> None:
    counts, codes = labelled(100, seed=1)
    dense = counts.toarray()
    dense[:, 5] = 0
    dense[:2, 5] = 9
    assert (fit_linear(csr_matrix(dense), codes, n_types=4).weight[5] == 0).all()


def test_the_draw_keeps_rare_types_and_follows_the_seed() -> None:
    codes = np.repeat([0, 1, 2], [9000, 900, 100])
    rows = sampled(codes, 500, np.random.default_rng(0))
    assert len(rows) == len(np.unique(rows)) == 500
    assert (np.diff(rows) > 0).all()
    kept = np.bincount(codes[rows], minlength=3)
    assert kept[2] > 25  # 1 % of the cells, more than 5 % of the draw
    assert kept[0] > kept[1] > kept[2]
    assert rows.tolist() == sampled(codes, 500, np.random.default_rng(0)).tolist()
    assert sampled(codes, 20_000, np.random.default_rng(0)).tolist() == list(range(10_000))


def test_the_same_seed_gives_the_same_model_and_global_random_state_stays() -> None:
    counts, codes = labelled(100, seed=1)
    state = np.random.get_state()[1].tolist()  # noqa: NPY002 (the global state is what is looked at)
    first, same, other = (fit_linear(counts, codes, n_types=4, max_cells=60, seed=seed) for seed in (0, 0, 1))
    assert np.random.get_state()[1].tolist() == state  # noqa: NPY002
    np.testing.assert_array_equal(first.weight, same.weight)
    assert not np.array_equal(first.weight, other.weight)


def test_stages_of_a_type_weigh_alike_however_few_cells_they_have() -> None:
    """Repeating the cells of one stage five times changes nothing, but it does without stages."""
    counts, codes = labelled(90, seed=1, n_types=3)
    stages = np.arange(90) % 2
    rows = np.concatenate([np.arange(90), *4 * [np.flatnonzero(stages == 1)]])
    settings = {"n_types": 3, "balanced": True, "strength": 0.1, "max_iterations": 500}
    once = fit_linear(counts, codes, stages=stages, **settings)
    view = View.whole(counts)
    # The penalty weighs against the sum of the weights, which grows with the cells.
    settings["strength"] = 0.1 * 90 / len(rows)
    repeated = fit_linear(counts[rows], codes[rows], stages=stages[rows], **settings)
    blind = fit_linear(counts[rows], codes[rows], **settings)
    np.testing.assert_allclose(np.exp(repeated.log_proba(view)), np.exp(once.log_proba(view)), atol=0.005)
    assert np.abs(np.exp(blind.log_proba(view)) - np.exp(once.log_proba(view))).max() > 0.02


@pytest.mark.parametrize("n_types", [2, 5])
def test_few_cells_of_many_genes_are_fitted_as_in_all_genes(n_types: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The space that the cells span holds all that the penalty leaves."""
    counts, codes = labelled(60, seed=1, n_types=n_types)
    counts = counts[[*range(60), 0]]  # a cell twice: one direction fewer than cells
    codes = np.append(codes, codes[0])
    found = fit_linear(counts, codes, n_types=n_types, strength=0.1, max_iterations=1000)
    monkeypatch.setattr("evercell.linear.FEW_CELLS", 0)
    reference = fit_linear(counts, codes, n_types=n_types, strength=0.1, max_iterations=1000)
    np.testing.assert_allclose(found.weight, reference.weight, atol=2e-3 * np.abs(reference.weight).max())
    np.testing.assert_allclose(found.bias, reference.bias, atol=2e-3 * np.abs(reference.bias).max())

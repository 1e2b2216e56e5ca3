"""What every rejector promises; a new file in the registry is tested unseen."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy.sparse import csr_matrix
from scipy.special import log_softmax

from evercell.rejection import REJECTORS, Outputs, Rejector
from evercell.tokenizers import View

WIDTH, N_TYPES = 12, 4
MEANS = 6.0 * np.eye(N_TYPES, WIDTH)


def outputs_of(x: np.ndarray) -> Outputs:
    """Outputs of a model that knows the types' means, and where between them a cell lies; a gene for every place."""
    logits = -0.25 * np.square(x[:, None, :N_TYPES] - MEANS[:, :N_TYPES]).sum(axis=2) + 4.0
    log_proba = log_softmax(logits, axis=1).astype(np.float32)
    return Outputs(x.astype(np.float32), logits.astype(np.float32), log_proba, view_of(x))


def view_of(x: np.ndarray) -> View:
    """Counts that rise with `x` (B, D), and of 100 genes that tell nothing."""
    others = np.random.default_rng(13).poisson(50.0, size=(len(x), 100))
    counts = np.hstack([20.0 + np.round(20 * np.maximum(x, 0.0)), others])
    return View.whole(csr_matrix(counts.astype(np.float32)))


def known(n_cells: int, seed: int) -> tuple[Outputs, np.ndarray]:
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, N_TYPES, n_cells)
    return outputs_of(MEANS[codes] + 0.8 * rng.normal(size=(n_cells, WIDTH))), codes


def far() -> Outputs:
    """Cells in a direction that no type has; the nearest type is clear."""
    outputs, _ = known(60, seed=11)
    x = outputs.representation.copy()
    x[:, N_TYPES:] += 4.0
    moved = outputs_of(x)
    return Outputs(moved.representation, outputs.logits, outputs.log_proba, moved.view)


def torn() -> Outputs:
    """Cells between two types, and not farther from the types' plane than known cells."""
    rng = np.random.default_rng(12)
    return outputs_of((MEANS[0] + MEANS[1]) / 2 + 0.1 * rng.normal(size=(60, WIDTH)))


def fitted(name: str) -> Rejector:
    return REJECTORS[name].fitted(*known(400, seed=1)).calibrated(known(1000, seed=2)[0])


PER_CELL = [name for name in REJECTORS if REJECTORS[name].per_cell]


@pytest.fixture(params=list(REJECTORS))
def any_rejector(request: pytest.FixtureRequest) -> Rejector:
    return fitted(request.param)


@pytest.fixture(params=PER_CELL)
def rejector(request: pytest.FixtureRequest) -> Rejector:
    """All but those that say of themselves that they judge cells by one another."""
    return fitted(request.param)


def test_score_of_a_cell_depends_on_that_cell_only(rejector: Rejector) -> None:
    """Invariant 1, to the last bit."""
    outputs, _ = known(300, seed=3)
    score = rejector.score(outputs)
    assert score.shape == (300,)
    assert score.dtype == np.float32
    assert np.isfinite(score).all()
    order = np.random.default_rng(0).permutation(300)
    for rows in (order, order[:7], order[:1], np.array([299, 0])):
        np.testing.assert_array_equal(rejector.score(outputs.taken(rows)), score[rows])


def test_the_threshold_does_not_depend_on_the_cells_at_hand(rejector: Rejector) -> None:
    for rate in (0.0, 0.05):
        assert rejector.threshold_among(known(30, seed=6)[0], rate) == rejector.threshold(rate)
        assert rejector.threshold_among(far(), rate) == rejector.threshold(rate)


def test_only_canal_judges_cells_by_one_another() -> None:
    assert set(REJECTORS) - set(PER_CELL) == {"canal"}


def test_false_rejections_are_as_many_as_asked(rejector: Rejector) -> None:
    score = rejector.score(known(1000, seed=2)[0])
    for rate in (0.0, 0.01, 0.05, 0.2):
        assert (score > rejector.threshold(rate)).mean() == pytest.approx(rate, abs=0.005)
    fresh = rejector.score(known(2000, seed=4)[0])
    assert (fresh > rejector.threshold(0.1)).mean() == pytest.approx(0.1, abs=0.04)


def test_a_higher_rate_never_raises_the_threshold(any_rejector: Rejector) -> None:
    thresholds = [any_rejector.threshold(rate) for rate in np.linspace(0, 1, 57)]
    assert (np.diff(thresholds) <= 0).all()


def test_arrays_hold_the_whole_state(any_rejector: Rejector) -> None:
    assert all(array.dtype == np.float32 for array in any_rejector.arrays.values())
    again = type(any_rejector)({name: array.copy() for name, array in any_rejector.arrays.items()})
    outputs, _ = known(50, seed=5)
    np.testing.assert_array_equal(again.score(outputs), any_rejector.score(outputs))
    assert again.threshold(0.03) == any_rejector.threshold(0.03)


def test_cells_unlike_every_type_are_rejected(rejector: Rejector) -> None:
    between = torn()
    x = between.representation.copy()
    x[:, N_TYPES:] += 4.0
    score = rejector.score(outputs_of(x))
    assert (score > rejector.threshold(0.05)).mean() > 0.9


@pytest.mark.parametrize("name", ["prototypes", "markers", "combined"])
def test_cells_far_from_every_type_score_higher(name: str) -> None:
    rejector = fitted(name)
    assert rejector.score(far()).min() > rejector.threshold(0.05)


@pytest.mark.parametrize("name", ["confidence", "energy", "combined"])
def test_cells_of_low_confidence_score_higher(name: str) -> None:
    rejector = fitted(name)
    assert rejector.score(torn()).mean() > rejector.threshold(0.05)


def test_energy_is_the_equation() -> None:
    outputs, _ = known(20, seed=6)
    expected = -0.8 * np.log(np.exp(outputs.logits.astype(np.float64) / 0.8).sum(axis=1))
    rejector = REJECTORS["energy"].fitted(outputs, outputs.codes)
    np.testing.assert_allclose(rejector.score(outputs), expected, rtol=1e-5)


def test_prototypes_are_mahalanobis_distances() -> None:
    outputs, codes = known(3000, seed=7)
    score = REJECTORS["prototypes"].fitted(outputs, codes).score(outputs)
    x = outputs.representation
    means = np.stack([x[codes == code].mean(axis=0) for code in range(N_TYPES)])
    expected = (np.square(x[:, None] - means).sum(axis=2) / 0.64 / WIDTH).min(axis=1)  # the noise is 0.8 in all places
    np.testing.assert_allclose(score, expected, rtol=0.15)


def test_calibration_is_taken_from_the_first_model_as_one(rejector: Rejector) -> None:
    """A model trained again on all cells keeps quantiles and scale together; one without the other means nothing."""
    again = type(rejector).fitted(*known(500, seed=8)).calibrated_as(rejector)
    for name in rejector.calibration:
        np.testing.assert_array_equal(again.arrays[name], rejector.arrays[name])
    fresh = again.score(known(1000, seed=9)[0])
    assert (fresh > again.threshold(0.1)).mean() == pytest.approx(0.1, abs=0.05)


def test_a_model_sure_of_all_its_training_cells_still_rejects_by_both_scores() -> None:
    outputs, codes = known(400, seed=1)
    sure = np.full((400, N_TYPES), -20.0, dtype=np.float32)
    sure[np.arange(400), codes] = 0.0
    rejector = REJECTORS["combined"].fitted(replace(outputs, log_proba=sure), codes)
    rejector = rejector.calibrated(known(1000, seed=2)[0])
    assert rejector.score(far()).min() > rejector.threshold(0.05)


def test_one_cell_a_type_is_enough_to_fit(any_rejector: Rejector) -> None:
    alone = type(any_rejector).fitted(outputs_of(MEANS), np.arange(N_TYPES)).calibrated(known(100, seed=2)[0])
    assert np.isfinite(alone.score(known(50, seed=3)[0])).all()
    assert np.isfinite(alone.threshold(0.05))


def test_a_wide_representation_scores_to_the_last_bit_too(rejector: Rejector) -> None:
    """Matrix products of 192 columns are summed in another order for one cell than for many."""
    rng = np.random.default_rng(10)
    x = rng.normal(size=(400, 192)).astype(np.float32)
    log_proba = log_softmax(3 * rng.normal(size=(400, N_TYPES)), axis=1).astype(np.float32)
    outputs = Outputs(x, log_proba, log_proba, view_of(x))
    wide = type(rejector).fitted(outputs, outputs.codes).calibrated(outputs)
    score = wide.score(outputs)
    for rows in (*np.arange(40)[:, None], np.array([3, 399]), np.arange(50, 113)):
        np.testing.assert_array_equal(wide.score(outputs.taken(rows)), score[rows])

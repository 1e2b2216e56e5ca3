"""Unknown cells: scores in gene space, default rates by leaving types out, CANAL's rule, models of before."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
from scipy.sparse import csr_matrix

import evercell as ec
from evercell.adaptation import fitted_to
from evercell.rejection import DEFAULT_RATE, REJECTORS, Outputs, best_rate
from evercell.rejection.canal import CanalRejector
from evercell.rejection.combined import CombinedRejector
from evercell.rejection.confidence import ConfidenceRejector
from evercell.rejection.leaving_out import RATES
from evercell.rejection.markers import MARKERS, MarkersRejector
from evercell.rejection.prototypes import PrototypesRejector
from evercell.testing import synthetic_cells
from evercell.tokenizers import View

if TYPE_CHECKING:
    from anndata import AnnData

    from evercell.annotator import Annotator

N_TYPES, N_GENES = 3, 120


def cells_of(codes: np.ndarray, seed: int, *, measured: np.ndarray | None = None) -> Outputs:
    """Cells whose type expresses 20 genes of its own ten times as much; the model is sure of the type (0, 1 or 2)."""
    rng = np.random.default_rng(seed)
    rates = np.ones((N_TYPES + 1, N_GENES))
    for code in range(N_TYPES + 1):
        rates[code, 20 * code : 20 * code + 20] = 10.0
    counts = csr_matrix(rng.poisson(rates[codes]).astype(np.float32))
    log_proba = np.full((len(codes), N_TYPES), -5.0, dtype=np.float32)
    log_proba[np.arange(len(codes)), codes % N_TYPES] = -0.02
    return Outputs(
        rng.normal(size=(len(codes), 4)).astype(np.float32), log_proba, log_proba, View.whole(counts, measured)
    )


def old_rejector(model: Annotator) -> CombinedRejector:
    """`combined` as models stored it before it looked at genes."""
    assert model.rejector is not None
    names = ("whitening", "whitened_means", "known_quantiles")
    return CombinedRejector({name: model.rejector.arrays[name] for name in names} | {"spread": np.array([0.5, 2.0])})


def test_markers_score_is_the_correlation_with_the_profile_of_the_type() -> None:
    codes = np.repeat(np.arange(N_TYPES), 50)
    outputs = cells_of(codes, seed=1)
    score = MarkersRejector.fitted(outputs, codes).score(outputs)
    assert outputs.view is not None
    counts = outputs.view.counts.toarray()
    logged = np.log1p(1e4 * counts / counts.sum(axis=1, keepdims=True))
    means = np.stack([logged[codes == code].mean(axis=0) for code in range(N_TYPES)])
    above = [means[code] - np.delete(means, code, axis=0).mean(axis=0) for code in range(N_TYPES)]
    genes = np.unique([np.argsort(-one)[:MARKERS] for one in above])
    centred, profiles = (logged - means.mean(axis=0))[:, genes], (means - means.mean(axis=0))[:, genes]
    lengths = np.linalg.norm(centred, axis=1) * np.linalg.norm(profiles, axis=1)[codes]
    np.testing.assert_allclose(score, -(centred * profiles[codes]).sum(axis=1) / lengths, rtol=2e-3, atol=2e-4)


def test_markers_find_cells_whose_genes_are_of_no_type_although_the_model_is_sure() -> None:
    codes = np.repeat(np.arange(N_TYPES), 50)
    rejector = MarkersRejector.fitted(cells_of(codes, seed=1), codes).calibrated(cells_of(codes, seed=2))
    assert (rejector.score(cells_of(codes, seed=3)) > rejector.threshold(0.05)).mean() < 0.15
    assert (rejector.score(cells_of(np.full(40, N_TYPES), seed=4)) > rejector.threshold(0.05)).all()


def test_genes_that_were_not_measured_are_no_markers() -> None:
    codes = np.repeat(np.arange(N_TYPES), 50)
    measured = np.arange(N_GENES) % 2 == 0
    rejector = MarkersRejector.fitted(cells_of(codes, seed=1, measured=measured), codes)
    assert measured[rejector.arrays["genes"].astype(int)].all()


def test_depth_of_a_known_cell_is_taken_off_its_score() -> None:
    codes = np.tile(np.arange(N_TYPES), 400)
    outputs = cells_of(codes, seed=1)
    assert outputs.view is not None
    thin = outputs.view.counts.copy()
    share = np.repeat(np.random.default_rng(0).uniform(0.05, 0.3, len(codes)), np.diff(thin.indptr))
    thin.data = np.random.default_rng(1).binomial(thin.data.astype(int), share).astype(np.float32)
    thin.eliminate_zeros()
    outputs = replace(outputs, view=View.whole(thin))
    depth = np.log(thin.getnnz(axis=1))
    fitted = MarkersRejector.fitted(outputs, codes)
    before, after = (abs(np.corrcoef(depth, one.score(outputs))[0, 1]) for one in (fitted, fitted.calibrated(outputs)))
    assert before > 0.5
    assert after < 0.1


def test_without_a_type_the_others_share_its_probability() -> None:
    outputs = cells_of(np.arange(3), seed=1)
    left = outputs.without(1)
    expected = outputs.proba[:, [0, 2]] / outputs.proba[:, [0, 2]].sum(axis=1, keepdims=True)
    np.testing.assert_allclose(left.proba[:, [0, 2]], expected, rtol=1e-5)
    assert not left.proba[:, 1].any()
    assert 1 not in left.codes
    assert (outputs.logits[:, 1] > -10).all()  # the outputs themselves stay as they are


@pytest.mark.parametrize(("apart", "expected"), [(True, min(RATES)), (False, max(RATES))])
def test_default_rate_is_low_where_types_left_out_stand_out_and_high_where_they_hide(
    apart: bool, expected: float
) -> None:
    rng = np.random.default_rng(0)
    codes = np.repeat(np.arange(4), 300)

    def made(seed: int) -> tuple[Outputs, np.ndarray]:
        centres = 30.0 * np.eye(4) if apart else np.zeros((4, 4))
        x = centres[codes] + np.random.default_rng(seed).normal(size=(len(codes), 4))
        logits = 5.0 * np.eye(4)[codes] + 0.01 * rng.normal(size=(len(codes), 4))
        return Outputs(x.astype(np.float32), logits.astype(np.float32), logits.astype(np.float32)), codes

    assert best_rate(PrototypesRejector, made(1), made(2)) == expected


def test_default_rate_falls_back_where_few_types_can_be_left_out() -> None:
    outputs = cells_of(np.array([0] * 20 + [1] * 20), seed=1)
    assert best_rate(ConfidenceRejector, (outputs, outputs.codes), (outputs, outputs.codes)) == DEFAULT_RATE
    assert best_rate(CanalRejector, (outputs, outputs.codes), (outputs, outputs.codes)) == DEFAULT_RATE


def test_a_model_stores_its_rate_and_annotate_takes_it(model: Annotator, query: AnnData) -> None:
    assert model.rejector is not None
    assert model.rejector.default_rate in RATES
    chosen = replace(model, rejector=model.rejector.with_default_rate(0.2))
    assert ec.annotate(chosen, query).info["rejection_rate"] == pytest.approx(0.2)
    assert ec.annotate(chosen, query).info["threshold"] == ec.annotate(model, query, reject=0.2).info["threshold"]
    assert ec.annotate(chosen, query, reject=0.05).info["rejection_rate"] == 0.05


def test_a_model_of_before_scores_as_it_did(model: Annotator, query: AnnData) -> None:
    old = replace(model, rejector=old_rejector(model))
    assert old.rejector is not None
    assert old.rejector.default_rate == DEFAULT_RATE
    result = ec.annotate(old, query)
    outputs = Outputs(result.representation, np.log(result.probabilities), np.log(result.probabilities))
    parts = [ConfidenceRejector({}).score(outputs), PrototypesRejector(old.rejector.arrays).score(outputs)]
    expected = np.log(parts[0] + 1e-3) / 0.5 + np.log(parts[1] + 1e-3) / 2.0
    np.testing.assert_allclose(result.obs["evercell_unknown_score"], expected, atol=2e-3)


def test_a_model_of_before_is_fitted_to_a_panel_as_it_was(model: Annotator) -> None:
    panel = fitted_to(replace(model, rejector=old_rejector(model)), np.arange(len(model.vocabulary)) % 3 == 0)
    assert panel.rejector is not None
    assert "genes" not in panel.rejector.arrays
    np.testing.assert_array_equal(panel.rejector.arrays["spread"], [0.5, 2.0])


def test_canal_finds_the_way_from_representation_to_logits() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 8)).astype(np.float32)
    weight, bias = rng.normal(size=(8, 3)), rng.normal(size=3)
    logits = (x @ weight + bias).astype(np.float32)
    rejector = CanalRejector.fitted(Outputs(x, logits, logits), np.zeros(60, dtype=int))
    np.testing.assert_allclose(rejector.arrays["classifier"], np.vstack([weight, bias]), atol=1e-4)


def test_canal_judges_a_cell_by_its_company_and_says_so(model: Annotator, query: AnnData) -> None:
    view = View.whole(model.bank.counts)
    training = model.outputs(view)
    canal = REJECTORS["canal"].fitted(training, model.bank.codes).calibrated(training)
    judging = replace(model, rejector=canal)
    whole = ec.annotate(judging, query)
    part = ec.annotate(judging, query[:40].copy())
    assert any("other cells of the query" in note for note in whole.info["notes"])
    assert whole.info["threshold"] != part.info["threshold"]
    scores = [one.obs["evercell_unknown_score"].to_numpy()[:40] for one in (whole, part)]
    assert not np.allclose(scores[0], scores[1])
    np.testing.assert_array_equal(whole.best_labels[:40], part.best_labels)


def test_unknown_types_are_found_by_the_default(model: Annotator) -> None:
    cells = synthetic_cells(200, seed=6, n_types=6)
    result = ec.annotate(model, cells)
    unknown = ~cells.obs["cell_type"].isin(model.types.names).to_numpy()
    rejected = result.labels == "Unknown"
    assert rejected[unknown].mean() > rejected[~unknown].mean() + 0.3


def test_scores_do_not_depend_on_how_many_cells_are_read_at_a_time(model: Annotator, query: AnnData) -> None:
    scores = [ec.annotate(model, query, chunk=size).obs["evercell_unknown_score"] for size in (7, 4096)]
    np.testing.assert_array_equal(scores[0], scores[1])

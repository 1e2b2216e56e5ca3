"""Fitting the linear member again on the genes that a query measured."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from scipy.sparse import vstack

import evercell as ec
from evercell import adaptation
from evercell.adaptation import LOST, familiar, fitted_to, lost_share
from evercell.annotator import Annotator
from evercell.genes import align
from evercell.testing import synthetic_cells
from evercell.tokenizers import View


@pytest.fixture(scope="module")
def panel() -> object:
    """Cells of another study that measured every third gene."""
    return synthetic_cells(150, seed=5, study_shift=0.3)[:, ::3].copy()


def measured_by(model: Annotator, panel) -> np.ndarray:  # type: ignore[no-untyped-def]
    return align(panel.var, model.vocabulary).measured


def test_lost_share_is_the_share_of_the_banks_counts_on_genes_that_are_missing(model: Annotator) -> None:
    everything = np.ones(len(model.vocabulary), dtype=bool)
    assert lost_share(model, everything) == pytest.approx(0.0, abs=1e-6)
    assert lost_share(model, ~everything) == pytest.approx(1.0)
    gene = int(np.argmax(model.bank.counts.sum(axis=0)))
    without = everything.copy()
    without[gene] = False
    totals = np.asarray(model.bank.counts.sum(axis=1)).ravel()
    by_hand = np.mean(model.bank.counts[:, [gene]].toarray().ravel() / totals)
    assert lost_share(model, without) == pytest.approx(by_hand, rel=1e-5)


def test_adapted_linear_member_leans_on_measured_genes_only(model: Annotator, panel) -> None:  # type: ignore[no-untyped-def]
    measured = measured_by(model, panel)
    adapted = fitted_to(model, measured)
    assert adapted.linear is not None
    assert model.linear is not None
    assert not adapted.linear.weight[~measured].any()
    assert model.linear.weight[~measured].any()
    assert adapted.backbone is model.backbone  # the transformer stays


def test_a_panel_is_told_and_labelled_well(model: Annotator, panel) -> None:  # type: ignore[no-untyped-def]
    result = ec.annotate(model, panel)
    truth = panel.obs["cell_type"].astype(str).to_numpy()
    assert result.info["adapted"]
    assert result.info["lost_share"] >= LOST
    assert any("did not measure" in note for note in result.info["notes"])
    assert np.mean(result.best_labels == truth) > 0.9
    assert np.mean(result.labels == "Unknown") < 0.25


def test_a_whole_transcriptome_is_not_adapted_and_adapt_can_be_switched_off(model: Annotator, panel) -> None:  # type: ignore[no-untyped-def]
    assert not ec.annotate(model, synthetic_cells(40, seed=5)).info["adapted"]
    assert not ec.annotate(model, panel, adapt=False).info["adapted"]


def test_adapted_labels_depend_on_the_cell_alone(model: Annotator, panel) -> None:  # type: ignore[no-untyped-def]
    whole = ec.annotate(model, panel)
    part = ec.annotate(model, panel[20:31].copy())
    np.testing.assert_array_equal(whole.probabilities[20:31], part.probabilities)
    np.testing.assert_array_equal(
        whole.obs["evercell_unknown_score"].to_numpy()[20:31], part.obs["evercell_unknown_score"].to_numpy()
    )


def test_a_panel_like_that_of_a_training_study_is_not_adapted(model: Annotator, panel) -> None:  # type: ignore[no-untyped-def]
    measured = measured_by(model, panel)
    assert not familiar(model, measured)
    bank = model.bank
    through = bank.counts.multiply(measured).tocsr()  # as if half of the cells came from a study with this panel
    half = np.arange(len(bank)) % 2
    two = dataclasses.replace(
        bank,
        counts=vstack([through[half == 1], bank.counts[half == 0]], format="csr"),
        codes=np.concatenate([bank.codes[half == 1], bank.codes[half == 0]]),
        studies=np.repeat([0, 1], [half.sum(), (1 - half).sum()]),
        measured=np.stack([measured, np.ones_like(measured)]),
    )
    mixed = dataclasses.replace(model, bank=two)
    assert familiar(mixed, measured)
    assert not ec.annotate(mixed, panel).info["adapted"]
    other = np.roll(measured, 1)
    assert not familiar(mixed, other)
    one_type = dataclasses.replace(mixed, bank=two.taken(np.flatnonzero((two.studies == 1) | (two.codes == 0))))
    assert not familiar(one_type, measured)


def test_the_refitted_linear_member_weighs_the_same_whatever_share_the_model_gives_it(model: Annotator) -> None:
    measured = np.arange(len(model.vocabulary)) % 3 == 0
    one, other = (fitted_to(dataclasses.replace(model, linear_share=share), measured) for share in (0.5, 0.2))
    view = View.whole(model.bank.counts.multiply(measured).tocsr(), measured)
    np.testing.assert_array_equal(one.outputs(view).log_proba, other.outputs(view).log_proba)


def test_a_fit_is_made_once(model: Annotator, monkeypatch: pytest.MonkeyPatch) -> None:
    """For the same model read twice and the same genes; only the last fits are kept."""
    fits: list[int] = []
    fit = adaptation._fit
    monkeypatch.setattr(adaptation, "_fit", lambda *asked: fits.append(1) or fit(*asked))
    monkeypatch.setattr(adaptation, "_FITS", {})
    panels = [np.arange(len(model.vocabulary)) % step != 0 for step in (2, 3, 4)]
    first = fitted_to(model, panels[0])
    assert fitted_to(dataclasses.replace(model), panels[0]) is first
    assert fitted_to(model, panels[1]) is not first
    assert fitted_to(dataclasses.replace(model, temperature=2 * model.temperature), panels[0]) is not first
    assert len(fits) == 3
    monkeypatch.setattr(adaptation, "REMEMBERED", 2)
    fitted_to(model, panels[2])
    assert len(adaptation._FITS) == 2
    assert fitted_to(model, panels[0]) is not first

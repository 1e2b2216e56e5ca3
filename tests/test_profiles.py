"""Profiles of the types: means and markers, what a cell is told by, studies that measured other genes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.sparse import csr_matrix, vstack

import evercell as ec
from evercell.checkpoint import FORMAT, load, save
from evercell.finetuning import quick_settings
from evercell.profiles import MARKERS, NEVER, ProfileModel, fit_profiles
from evercell.testing import synthetic_cells
from evercell.tokenizers import View

N_TYPES, N_GENES = 4, 200


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def cells(n_cells: int, rng: np.random.Generator, types: int = N_TYPES) -> tuple[csr_matrix, np.ndarray]:
    """Counts of cells in which each type has ten genes of its own, and their codes."""
    codes = np.arange(n_cells) % types
    level = np.full((n_cells, N_GENES), 0.5)
    for code in range(types):
        level[codes == code, 10 * code : 10 * code + 10] = 6.0
    return csr_matrix(rng.poisson(level).astype(np.float32)), codes


def fitted(counts: csr_matrix, codes: np.ndarray, *, n_types: int = N_TYPES) -> ProfileModel:
    return fit_profiles(
        counts, codes, np.zeros(len(codes), dtype=int), np.ones((1, counts.shape[1]), dtype=bool), n_types=n_types
    )


def test_markers_are_the_genes_of_the_types_and_means_those_of_their_cells(rng: np.random.Generator) -> None:
    counts, codes = cells(400, rng)
    found = fitted(counts, codes)
    assert set(found.genes) == set(range(40))
    logged = View.whole(counts).logged().toarray()
    for code in range(N_TYPES):
        np.testing.assert_allclose(found.means[:, code], logged[codes == code][:, found.genes].mean(axis=0), rtol=1e-4)


def test_two_cells_of_a_type_are_enough(rng: np.random.Generator) -> None:
    counts, codes = cells(400, rng)
    rows = np.concatenate([np.flatnonzero(codes != 3), np.flatnonzero(codes == 3)[:2]])
    found = fitted(counts[rows], codes[rows])
    other, truth = cells(400, rng)
    right = found.log_proba(View.whole(other)).argmax(axis=1) == truth
    assert right[truth == 3].mean() > 0.9


def test_log_probabilities_are_those_of_the_correlations(rng: np.random.Generator) -> None:
    counts, codes = cells(100, rng)
    found = fitted(counts, codes)
    centre = found.means.mean(axis=1, keepdims=True)
    one = View.whole(counts).logged().toarray()[7, found.genes] - centre[:, 0]
    about = found.means - centre
    expected = found.sharpness * (one @ about) / np.linalg.norm(one) / np.linalg.norm(about, axis=0)
    expected -= np.log(np.exp(expected).sum())
    np.testing.assert_allclose(found.log_proba(View.whole(counts))[7], expected, atol=1e-4)
    np.testing.assert_allclose(np.exp(found.log_proba(View.whole(counts))).sum(axis=1), 1.0, atol=1e-5)


def test_a_cell_is_told_alike_in_any_company(rng: np.random.Generator) -> None:
    counts, codes = cells(100, rng)
    found, order = fitted(counts, codes), rng.permutation(100)
    whole = found.log_proba(View.whole(counts))
    np.testing.assert_array_equal(found.log_proba(View.whole(counts[order])), whole[order])
    np.testing.assert_array_equal(found.log_proba(View.whole(counts[3:4])), whole[3:4])


def test_a_type_without_cells_is_improbable(rng: np.random.Generator) -> None:
    counts, codes = cells(100, rng)
    found = fitted(counts, codes, n_types=N_TYPES + 1).log_proba(View.whole(counts))
    assert found[:, N_TYPES].max() < NEVER / 2


def test_genes_that_were_not_measured_say_nothing(rng: np.random.Generator) -> None:
    """Hidden genes are left out of the correlation; were they zeros, the type that they mark would lose its cells."""
    counts, codes = cells(400, rng)
    found = fitted(counts, codes)
    measured = np.ones(N_GENES, dtype=bool)
    measured[:8] = False
    hidden = View.whole(csr_matrix(counts.multiply(measured)), measured)
    assert (found.log_proba(hidden).argmax(axis=1) == codes).mean() > 0.95
    nothing = View.whole(csr_matrix(counts.shape, dtype=np.float32), np.zeros(N_GENES, dtype=bool))
    np.testing.assert_allclose(np.exp(found.log_proba(nothing)), 1 / N_TYPES, atol=1e-6)


def test_a_gene_is_judged_by_the_studies_that_measured_it(rng: np.random.Generator) -> None:
    """A second study lacks the markers of type 0: that is no sign against type 0."""
    (counts, codes), (others, more) = cells(400, rng), cells(400, rng)
    measured = np.ones((2, N_GENES), dtype=bool)
    measured[1, :10] = False
    others = csr_matrix(others.multiply(measured[1]))
    studies = np.repeat([0, 1], 400)
    both = fit_profiles(
        vstack([counts, others], format="csr"), np.concatenate([codes, more]), studies, measured, n_types=N_TYPES
    )
    alone = fitted(counts, codes)
    rows, columns = np.isin(both.genes, np.arange(10)), np.isin(alone.genes, np.arange(10))
    np.testing.assert_allclose(both.means[rows], alone.means[columns], rtol=1e-5)


def test_a_gene_of_a_study_with_one_type_marks_nothing(rng: np.random.Generator) -> None:
    counts, codes = cells(400, rng)
    only = np.zeros(50, dtype=int)
    more = csr_matrix(rng.poisson(np.where(np.arange(N_GENES) >= 150, 9.0, 0.5), (50, N_GENES)).astype(np.float32))
    measured = np.ones((2, N_GENES), dtype=bool)
    measured[0, 150:] = False
    counts = csr_matrix(counts.multiply(measured[0]))
    studies = np.repeat([0, 1], [400, 50])
    found = fit_profiles(
        vstack([counts, more], format="csr"), np.concatenate([codes, only]), studies, measured, n_types=N_TYPES
    )
    assert found.genes.max() < 150


def test_a_large_study_does_not_drown_a_small_one(rng: np.random.Generator) -> None:
    counts, codes = cells(840, rng)
    studies = (np.arange(840) < 40).astype(int)  # ten cells of each type against two hundred
    found = fit_profiles(counts, codes, studies, np.ones((2, N_GENES), dtype=bool), n_types=N_TYPES)
    logged = View.whole(counts).logged().toarray()[:, found.genes]
    means = [logged[(codes == 2) & (studies == study)].mean(axis=0) for study in (0, 1)]
    np.testing.assert_allclose(found.means[:, 2], np.mean(means, axis=0), rtol=1e-4)


def test_what_a_study_adds_to_all_its_types_is_taken_off(rng: np.random.Generator) -> None:
    """A study with a shift of its own alone shows type 3: the shift is no mark of that type."""
    counts, codes = cells(1600, rng)
    studies = np.where(codes == 3, 1, np.arange(1600) // 4 % 2)
    shift = np.where(np.arange(N_GENES) >= 120, rng.poisson(4.0, (1600, N_GENES)), 0) * (studies == 1)[:, None]
    counts = csr_matrix(counts + shift.astype(np.float32))
    found = fit_profiles(counts, codes, studies, np.ones((2, N_GENES), dtype=bool), n_types=N_TYPES)
    shifted = found.genes >= 120
    about = found.means[:, 3] - found.means[:, :3].mean(axis=1)
    assert np.abs(about[shifted]).max(initial=0.0) < 0.5 * about[~shifted].max()
    here = (codes < 3) & (studies == 1)
    assert (found.log_proba(View.whole(counts[here])).argmax(axis=1) == codes[here]).mean() > 0.95


def test_few_genes_are_compared(rng: np.random.Generator) -> None:
    counts, codes = cells(400, rng)
    assert len(fitted(counts, codes).genes) <= 2 * MARKERS * N_TYPES


@pytest.fixture(scope="module")
def model() -> ec.Annotator:
    return ec.train(synthetic_cells(seed=1), "cell_type", groups="donor", settings=quick_settings(), shown=False)


def test_a_model_asks_them_and_stores_them(model: ec.Annotator, tmp_path: Path) -> None:
    assert model.profiles is not None
    again = load(save(model, tmp_path / "model"))
    assert again.profiles is not None
    assert again.fingerprint == model.fingerprint
    assert again.profiles.settings == model.profiles.settings
    view = View.whole(model.bank.counts)
    np.testing.assert_array_equal(again.outputs(view).log_proba, model.outputs(view).log_proba)
    assert not np.array_equal(replace(model, profiles=None).outputs(view).log_proba, model.outputs(view).log_proba)


def test_without_profiles_a_model_is_stored_as_before(tmp_path: Path) -> None:
    settings = replace(quick_settings(), profiles=False)
    plain = ec.train(synthetic_cells(seed=1), "cell_type", groups="donor", settings=settings, shown=False)
    assert plain.profiles is None
    assert "profiles" not in plain.parts()
    save(replace(plain, sets=None), tmp_path / "model")
    assert json.loads((tmp_path / "model" / "annotator.json").read_text())["format"] == FORMAT


def test_an_update_takes_the_profiles_of_old_and_new_types(model: ec.Annotator) -> None:
    new = synthetic_cells(300, n_types=5, seed=3)
    later = ec.update(
        model,
        new[new.obs["cell_type"].isin(new.obs["cell_type"].cat.categories[[1, 4]])].copy(),
        "cell_type",
        shown=False,
    )
    assert later.profiles is not None
    assert later.profiles.known.all()
    assert later.profiles.n_types == len(later.types) == 5


def test_half_precision_holds_them(model: ec.Annotator) -> None:
    means = model.halved().profiles.means  # type: ignore[union-attr]
    np.testing.assert_array_equal(means, means.astype(np.float16).astype(np.float32))

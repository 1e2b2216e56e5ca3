"""Annotating a query: what is written, and what it does not depend on."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData

import evercell as ec
from evercell.annotation import DEFAULT_REJECTION, UNKNOWN, Annotation, annotate, embed, rejection_rate
from evercell.annotator import Annotator
from evercell.errors import CellsError, GenesError, ModelError, SettingsError
from evercell.testing import synthetic_cells


def accuracy(result: Annotation, query: AnnData) -> float:
    return float((result.best_labels == query.obs["cell_type"].astype(str).to_numpy()).mean())


def same(result: Annotation, reference: Annotation, names: pd.Index) -> None:
    rows = reference.obs.index.get_indexer(names)
    np.testing.assert_array_equal(result.probabilities, reference.probabilities[rows])
    np.testing.assert_array_equal(result.representation, reference.representation[rows])
    pd.testing.assert_frame_equal(result.obs, reference.obs.loc[names], check_exact=True, check_categorical=False)


@pytest.fixture(scope="module")
def study() -> AnnData:
    return synthetic_cells(150, seed=2)


@pytest.fixture(scope="module")
def panel(study: AnnData) -> AnnData:
    """Half of the genes, and some that no model knows."""
    half = study[:, ::2].copy()
    half.var_names = [f"ERCC-{i:05d}" if i % 30 == 0 else name for i, name in enumerate(half.var_names)]
    return half


@pytest.fixture(scope="module", params=["study", "panel"])
def given(request: pytest.FixtureRequest) -> AnnData:
    found: AnnData = request.getfixturevalue(request.param)
    return found


@pytest.fixture(scope="module")
def reference(model: Annotator, given: AnnData) -> Annotation:
    return annotate(model, given)


def test_permuted_cells_get_the_same_annotation(model: Annotator, given: AnnData, reference: Annotation) -> None:
    """Invariant 1: permute."""
    shuffled = given[np.random.default_rng(0).permutation(given.n_obs)].copy()
    same(annotate(model, shuffled), reference, shuffled.obs_names)


@pytest.mark.parametrize("n_cells", [1, 31])
def test_a_subset_gets_the_same_annotation(
    model: Annotator, given: AnnData, reference: Annotation, n_cells: int
) -> None:
    """Invariant 1: subset."""
    part = given[np.random.default_rng(1).permutation(given.n_obs)[:n_cells]].copy()
    same(annotate(model, part), reference, part.obs_names)


@pytest.mark.parametrize("chunk", [1, 64, 149, 10_000])
def test_any_chunk_gives_the_same_annotation(
    model: Annotator, given: AnnData, reference: Annotation, chunk: int
) -> None:
    """Invariant 1: rebatch. One cell a chunk only for a part of them, for time."""
    part = given[:20] if chunk == 1 else given
    same(annotate(model, part.copy(), chunk=chunk), reference, part.obs_names)


def test_genes_in_another_order_get_the_same_annotation(
    model: Annotator, given: AnnData, reference: Annotation
) -> None:
    shuffled = given[:, np.random.default_rng(2).permutation(given.n_vars)].copy()
    same(annotate(model, shuffled), reference, given.obs_names)


def test_a_file_read_from_disk_gets_the_same_annotation(
    model: Annotator, given: AnnData, reference: Annotation, tmp_path: Path
) -> None:
    given.write_h5ad(tmp_path / "cells.h5ad")
    backed = ad.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    same(annotate(model, backed, chunk=40), reference, given.obs_names)


def test_a_working_model_is_right(model: Annotator, study: AnnData) -> None:
    """Quality floor: another study of the same types."""
    result = annotate(model, study, reject="off")
    assert accuracy(result, study) > 0.95
    assert (result.labels == result.best_labels).all()


def test_the_transformer_alone_is_right_too(model: Annotator, study: AnnData) -> None:
    assert accuracy(annotate(replace(model, linear=None), study, adapt=False), study) > 0.9


def test_a_panel_of_half_the_genes_is_annotated(model: Annotator, panel: AnnData) -> None:
    result = annotate(model, panel, reject="off")
    assert accuracy(result, panel) > 0.85
    assert result.info["coverage"]["n_matched"] == 145
    assert result.info["coverage"]["share_of_model"] == pytest.approx(145 / 300)


def test_mouse_cells_are_annotated_by_a_human_model(model: Annotator) -> None:
    mouse = synthetic_cells(100, seed=3, species="mouse")
    result = annotate(model, mouse, reject="off")
    assert accuracy(result, mouse) > 0.95
    assert result.info["species"] == "mouse"
    assert result.info["coverage"]["through_orthologues"]


def test_annotating_changes_neither_query_nor_model_nor_global_state(model: Annotator, query: AnnData) -> None:
    """Invariants 3 and 6."""
    before, fingerprint = query.copy(), replace(model).fingerprint
    state = (
        torch.random.get_rng_state().tolist(),
        np.random.get_state()[1].tolist(),  # noqa: NPY002 (the global state is what is looked at)
        random.getstate(),
        torch.get_num_threads(),
        torch.is_grad_enabled(),
        torch.are_deterministic_algorithms_enabled(),
    )
    annotate(model, query)
    embed(model, query)
    assert state == (
        torch.random.get_rng_state().tolist(),
        np.random.get_state()[1].tolist(),  # noqa: NPY002
        random.getstate(),
        torch.get_num_threads(),
        torch.is_grad_enabled(),
        torch.are_deterministic_algorithms_enabled(),
    )
    assert replace(model).fingerprint == fingerprint
    pd.testing.assert_frame_equal(query.obs, before.obs)
    pd.testing.assert_frame_equal(query.var, before.var)
    assert query.X.dtype == before.X.dtype
    assert (query.X != before.X).nnz == 0
    assert not query.obsm
    assert not query.uns


def test_in_place_adds_and_keeps_what_was_there(model: Annotator, query: AnnData) -> None:
    query.obs["mine"] = np.arange(query.n_obs)
    query.uns["mine"] = {"a": 1}
    result = annotate(model, query, inplace=True)
    assert list(query.obs) == [
        "cell_type", "donor", "mine",
        "evercell", "evercell_confidence", "evercell_unknown_score", "evercell_ontology_term_id",
    ]  # fmt: skip
    assert query.obs["mine"].tolist() == list(range(query.n_obs))
    assert query.uns["mine"] == {"a": 1}
    assert query.obsm["evercell_proba"].shape == (150, 4)
    np.testing.assert_array_equal(query.obsm["X_evercell"], result.representation)
    query.uns["evercell"]["model"] = "changed"
    assert result.info["model"] == ""


def test_names_follow_key_added(model: Annotator, query: AnnData) -> None:
    annotate(model, query, inplace=True, key_added="first")
    annotate(model, query, inplace=True, key_added="second")
    assert {"first", "first_confidence", "second", "second_confidence"} <= set(query.obs)
    assert set(query.obsm) == {"X_first", "first_proba", "X_second", "second_proba"}
    assert set(query.uns) == {"first", "first_colors", "second", "second_colors"}


@pytest.mark.parametrize("reject", [None, "off"])
def test_what_is_written_can_be_saved_and_read_back(
    model: Annotator, query: AnnData, tmp_path: Path, reject: str | None
) -> None:
    result = annotate(model, query, inplace=True, reject=reject, model_name="mine")
    query.write_h5ad(tmp_path / "annotated.h5ad")
    again = ad.read_h5ad(tmp_path / "annotated.h5ad")
    assert again.obs["evercell"].tolist() == result.labels.tolist()
    np.testing.assert_array_equal(again.obs["evercell_confidence"], result.obs["evercell_confidence"])
    np.testing.assert_array_equal(again.obsm["X_evercell"], result.representation)
    info = again.uns["evercell"]
    assert set(info) == set(result.info)
    assert info["model_fingerprint"] == model.fingerprint
    assert list(info["classes"]) == list(model.types.names)
    assert info["coverage"]["sentence"] == result.info["coverage"]["sentence"]
    assert float(info["threshold"]) == result.info["threshold"]


def test_a_result_is_not_written_to_other_cells(model: Annotator, query: AnnData) -> None:
    result = annotate(model, query)
    with pytest.raises(SettingsError, match="not the cells that were annotated"):
        result.write_into(query[::-1].copy())


def test_rejection_off_labels_every_cell(model: Annotator, query: AnnData) -> None:
    result = annotate(model, query, reject="off")
    assert UNKNOWN not in set(result.labels)
    assert result.info["rejection_rate"] == "off"
    assert math.isinf(result.info["threshold"])


def test_a_higher_rate_rejects_more_and_changes_no_label(model: Annotator, query: AnnData) -> None:
    assert model.rejector is not None
    model = replace(model, rejector=model.rejector.allowing(0.0))  # for cells of the study that it was trained on
    results = [annotate(model, query, reject=rate) for rate in (0.0, 0.05, 0.3, 0.9)]
    rejected = [set(np.flatnonzero(result.labels == UNKNOWN)) for result in results]
    assert all(less <= more for less, more in pairwise(rejected))
    assert len(rejected[0]) < 0.2 * query.n_obs
    assert len(rejected[3]) > 0.6 * query.n_obs
    for result in results:
        np.testing.assert_array_equal(result.best_labels, results[0].best_labels)
        score, threshold = result.obs["evercell_unknown_score"], result.info["threshold"]
        assert ((score > threshold).to_numpy() == (result.labels == UNKNOWN)).all()
        assert (result.obs.loc[result.labels == UNKNOWN, "evercell_ontology_term_id"] == "").all()


def test_unseen_types_are_rejected_more_often(model: Annotator) -> None:
    cells = synthetic_cells(240, n_types=8, seed=4)
    result = annotate(model, cells, reject=0.05)
    seen = cells.obs["cell_type"].isin(model.types.names).to_numpy()
    unknown = result.labels == UNKNOWN
    assert unknown[~seen].mean() > unknown[seen].mean() + 0.3


@pytest.mark.parametrize(
    ("asked", "rate"), [(None, DEFAULT_REJECTION), ("off", None), ("0.2", 0.2), (0, 0.0), (0.99, 0.99)]
)
def test_rates_that_can_be_asked_for(asked: str | float | None, rate: float | None) -> None:
    assert rejection_rate(asked) == rate


@pytest.mark.parametrize("asked", ["on", "", -0.1, 1, 1.5, float("nan"), "nan", [0.1]])
def test_rates_that_cannot(asked: object) -> None:
    with pytest.raises(SettingsError, match="reject is") as caught:
        rejection_rate(asked)  # type: ignore[arg-type]
    assert "--reject off" in (caught.value.hint or "")


def test_empty_cells_are_an_error_or_unknown(model: Annotator, query: AnnData) -> None:
    counts = query.X.tolil()
    counts[4] = 0
    query.X = counts.tocsr()
    with pytest.raises(CellsError, match="no counts in cell"):
        annotate(model, query)
    result = annotate(model, query, empty_cells="keep", reject="off")
    assert result.labels[4] == UNKNOWN
    assert result.obs["evercell_confidence"].iloc[4] == 0
    assert (result.labels == UNKNOWN).sum() == 1
    assert any("called unknown" in note for note in result.info["notes"])
    assert np.isfinite(result.probabilities).all()


def test_counts_are_found_in_a_layer_or_turned_back(model: Annotator, query: AnnData) -> None:
    reference = annotate(model, query)
    logged = query.copy()
    logged.layers["counts"] = query.X.copy()
    totals = np.asarray(query.X.sum(axis=1)).ravel()
    logged.X = query.X.astype(np.float64).multiply(1e4 / totals[:, None]).tocsr().log1p()
    found = annotate(model, logged)
    same(found, reference, query.obs_names)
    assert found.info["counts_source"] == "layers['counts']"
    del logged.layers["counts"]
    turned = annotate(model, logged)
    same(turned, reference, query.obs_names)
    assert turned.info["counts_transform"] != "none"


def test_genes_of_another_kind_are_refused(model: Annotator, query: AnnData) -> None:
    query.var_names = [f"probe{i}" for i in range(query.n_vars)]
    with pytest.raises(GenesError, match="shares"):
        annotate(model, query, name="query.h5ad")


def test_a_pretrained_model_embeds_and_does_not_annotate(model: Annotator, query: AnnData) -> None:
    pretrained = replace(model, rejector=None)
    with pytest.raises(ModelError, match="pretrained only"):
        annotate(pretrained, query)
    np.testing.assert_array_equal(embed(pretrained, query), annotate(model, query).representation)


def test_the_summary_counts_every_cell(model: Annotator, query: AnnData) -> None:
    lines = annotate(model, query, reject=0.2).summary().splitlines()
    assert lines[0].split() == ["type", "cells", "share", "confidence"]
    assert sum(int(line.split()[1]) for line in lines[1:]) == query.n_obs


def test_cells_keep_the_order_of_the_file(model: Annotator, query: AnnData) -> None:
    result = annotate(model, query)
    assert result.obs.index.tolist() == query.obs_names.tolist()
    assert result.obs["evercell"].cat.categories.tolist() == [*model.types.names, UNKNOWN]
    assert result.types == model.types.names


def test_merged_cells_are_labelled_by_the_genes_of_their_source(model: Annotator, tmp_path: Path) -> None:
    first, second = synthetic_cells(40, seed=2), synthetic_cells(50, seed=3)[:, :170].copy()
    second.obs_names = [f"other-{name}" for name in second.obs_names]
    for name, cells in {"a": first, "b": second}.items():
        cells.write_h5ad(tmp_path / f"{name}.h5ad")
    merged = ec.merge([tmp_path / "a.h5ad", tmp_path / "b.h5ad"], tmp_path / "merged.h5ad").path
    cells = ec.read_cells(merged)
    mixed = cells[np.random.default_rng(0).permutation(cells.n_obs)].copy()
    found = ec.annotate(model, mixed, inplace=True, majority=True, shown=False)
    place = pd.Series(range(mixed.n_obs), index=pd.MultiIndex.from_frame(mixed.obs[["source", "barcode"]].astype(str)))
    made = ec.embed(model, mixed)
    for name, alone in {"a": first, "b": second}.items():
        expected = ec.annotate(model, alone, shown=False)
        rows = place.loc[[(name, str(cell)) for cell in alone.obs_names]].to_numpy()
        assert found.obs["evercell"].astype(str).to_numpy()[rows].tolist() == expected.labels.tolist()
        np.testing.assert_allclose(found.probabilities[rows], expected.probabilities, atol=1e-5)
        np.testing.assert_allclose(made[rows], expected.representation, atol=1e-5)
        own = found.info["sources"][f"the data/{name}"]
        assert own["coverage"]["n_matched"] == expected.info["coverage"]["n_matched"]
    assert "evercell_majority" in mixed.obs
    assert list(found.obs.index) == list(mixed.obs_names)


def test_genes_that_a_column_calls_not_measured_are_not_zeros(model: Annotator) -> None:
    cells = synthetic_cells(30, seed=4)
    expected = ec.annotate(model, cells[:, :200].copy(), shown=False)
    padded = cells.copy()
    padded.X[:, 200:] = 0
    padded.var["measured"] = np.arange(padded.n_vars) < 200
    found = ec.annotate(model, padded, shown=False)
    np.testing.assert_allclose(found.probabilities, expected.probabilities, atol=1e-6)


def test_a_species_that_the_names_deny_is_told(model: Annotator) -> None:
    """Mouse symbols are looked up without regard to case, so human ones are found among them, but not all."""
    human = synthetic_cells(30, seed=3)
    given = annotate(model, human, species="mouse", shown=False).info["notes"]
    assert any("--species says" in note and "pass --species human, or leave it out" in note for note in given)
    for species in ("human", "auto"):
        assert not any(
            "--species" in note for note in annotate(model, human, species=species, shown=False).info["notes"]
        )

"""CellTypist's calls: the names, columns and files that scripts written for CellTypist read."""

from __future__ import annotations

from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from evercell import celltypist
from evercell.annotation import annotate
from evercell.annotator import Annotator
from evercell.errors import CellsError, SettingsError


def test_the_result_has_celltypists_parts(model: Annotator, query: ad.AnnData) -> None:
    result = celltypist.annotate(query, model=model, majority_voting=True, over_clustering="donor")
    assert list(result.predicted_labels) == ["predicted_labels", "over_clustering", "majority_voting"]
    assert result.cell_count == query.n_obs and result.adata is query
    proba = result.probability_matrix
    assert list(proba) == sorted(model.types.names) and proba.index.tolist() == query.obs_names.tolist()
    np.testing.assert_allclose(1 / (1 + np.exp(-result.decision_matrix)), proba, atol=1e-6)
    assert (proba.idxmax(axis=1) == result.predicted_labels["predicted_labels"].astype(str)).all()
    counts = result.summary_frequency(by="majority_voting")
    assert list(counts) == ["celltype", "counts"] and counts["counts"].sum() == query.n_obs
    assert counts["counts"].is_monotonic_decreasing
    assert repr(result).startswith(f"CellTypist prediction result for {query.n_obs} query cells")


def test_to_adata_inserts_what_is_asked_for(model: Annotator, query: ad.AnnData) -> None:
    result = celltypist.annotate(query, model=model, majority_voting=True, over_clustering="donor")
    adata = result.to_adata(insert_labels=True, insert_conf=True, insert_prob=True, prefix="ct_")
    assert adata is query
    assert {"ct_predicted_labels", "ct_majority_voting", "ct_conf_score", *(f"ct_{t}" for t in model.types.names)} <= {
        *adata.obs
    }
    np.testing.assert_allclose(adata.obs["ct_conf_score"], result.probability_matrix.max(axis=1))
    assert len(adata.uns["ct_predicted_labels_colors"]) == len(adata.obs["ct_predicted_labels"].cat.categories)
    result.to_adata(insert_labels=False, insert_conf_by="majority_voting")
    assert "predicted_labels" not in adata.obs
    voted = result.predicted_labels["majority_voting"].astype(str)
    cell = voted.index[0]
    assert adata.obs.loc[cell, "conf_score"] == result.probability_matrix.loc[cell, voted[cell]]


def test_clusters_may_be_given_as_a_list(model: Annotator, query: ad.AnnData) -> None:
    given = celltypist.annotate(query, model, majority_voting=True, over_clustering=query.obs["donor"].tolist())
    named = celltypist.annotate(query, model, majority_voting=True, over_clustering="donor")
    pd.testing.assert_frame_equal(given.predicted_labels, named.predicted_labels)
    with pytest.raises(SettingsError, match="2 entries for 150 cells"):
        celltypist.annotate(query, model, majority_voting=True, over_clustering=["a", "b"])


def test_tables_and_plots_have_celltypists_names(model: Annotator, query: ad.AnnData, tmp_path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    result = celltypist.annotate(query, model)
    result.to_table(tmp_path, prefix="a_")
    assert {one.name for one in tmp_path.iterdir()} == {
        f"a_{name}.csv" for name in ("predicted_labels", "decision_matrix", "probability_matrix")
    }
    stored = pd.read_csv(tmp_path / "a_probability_matrix.csv", index_col=0)
    pd.testing.assert_frame_equal(stored, result.probability_matrix)
    query.obsm["X_umap"] = query.obsm["X_evercell"][:, :2]
    result.to_plots(tmp_path, format="png")
    assert (tmp_path / "predicted_labels.png").stat().st_size > 1000
    with pytest.raises(CellsError, match="does not exist"):
        result.to_table(tmp_path / "absent")


def test_unknown_cells_are_told_beside_the_best_match(model: Annotator, query: ad.AnnData) -> None:
    result = celltypist.annotate(query, model)
    assert "Unknown" not in set(result.predicted_labels["predicted_labels"])
    assert query.obs["evercell"].tolist() == annotate(model, query).obs["evercell"].tolist()
    with pytest.raises(SettingsError, match="prob match"):
        celltypist.annotate(query, model, mode="prob match")

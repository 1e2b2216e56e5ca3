"""Calls in Scanpy's way: they write into the AnnData, and nothing else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import anndata as ad
import numpy as np
import pytest

import evercell as ec
from evercell.annotation import annotate
from evercell.annotator import Annotator
from evercell.checkpoint import save
from evercell.errors import LabelsError, ModelError


def test_annotate_writes_what_the_function_finds(model: Annotator, query: ad.AnnData, tmp_path: Path) -> None:
    save(model, tmp_path / "mine")
    before = query.copy()
    assert ec.tl.annotate(query, model=tmp_path / "mine", reject=0.1, key_added="mine") is None
    expected = annotate(model, before, reject=0.1, key_added="mine")
    assert query.obs["mine"].tolist() == expected.obs["mine"].tolist()
    assert query.uns["mine"]["model"] == "mine"
    np.testing.assert_array_equal(query.obsm["X_mine"], expected.representation)
    assert list(query.obs)[:2] == list(before.obs) and (query.X != before.X).nnz == 0
    query.write_h5ad(tmp_path / "written.h5ad")
    stored = ad.read_h5ad(tmp_path / "written.h5ad")
    assert list(stored.uns["mine_colors"]) == query.uns["mine_colors"]


def test_a_copy_leaves_the_argument_as_it_was(model: Annotator, query: ad.AnnData) -> None:
    copy = ec.tl.annotate(query, model, copy=True)
    assert copy is not None and "evercell" in copy.obs and list(query.obs) == ["cell_type", "donor"]
    embedded = ec.tl.embed(query, model, copy=True)
    assert embedded is not None and not query.obsm
    np.testing.assert_allclose(embedded.obsm["X_evercell"], copy.obsm["X_evercell"], atol=1e-6)


def test_the_vote_after_the_annotation_is_that_of_the_annotation(model: Annotator, query: ad.AnnData) -> None:
    query.obs["leiden"] = np.arange(query.n_obs) % 7
    ec.tl.annotate(query, model, reject=0.1)
    for clusters in (None, "leiden"):
        expected = annotate(model, query, reject=0.1, majority=clusters or True)
        ec.tl.majority(query, clusters)
        assert query.obs["evercell_majority"].tolist() == expected.obs["evercell_majority"].tolist()
        assert query.uns["evercell"]["majority"] == expected.info["majority"]
        assert len(query.uns["evercell_majority_colors"]) == len(query.obs["evercell_majority"].cat.categories)
    del query.uns["evercell"]
    with pytest.raises(LabelsError, match="no labels `evercell`"):
        ec.tl.majority(query)


def test_discover_writes_clusters_and_their_table(model: Annotator, query: ad.AnnData, tmp_path: Path) -> None:
    """A fifth type, which the model does not know."""
    from evercell.testing import synthetic_cells

    cells = synthetic_cells(200, n_types=5, seed=3)
    ec.tl.discover(cells, model, reject=0.2, least_cells=10)
    table = cells.uns["evercell_clusters"]
    assert set(cells.obs["evercell_cluster"].dropna()) == set(table["cluster"])
    cells.write_h5ad(tmp_path / "discovered.h5ad")
    assert list(ad.read_h5ad(tmp_path / "discovered.h5ad").uns["evercell_clusters"]) == list(table)


def test_evaluate_scores_by_the_types_of_the_model(model: Annotator, query: ad.AnnData) -> None:
    ec.tl.annotate(query, model, reject="off")
    found = ec.tl.evaluate(query, "cell_type")
    assert found.accuracy == (query.obs["evercell"].astype(str) == query.obs["cell_type"].astype(str)).mean()
    with pytest.raises(LabelsError, match="no column `truth`"):
        ec.tl.evaluate(query, "truth")


def test_joined_files_get_their_colours_back(model: Annotator, query: ad.AnnData) -> None:
    ec.tl.annotate(query, model, reject="off")
    of = dict(zip(query.obs["evercell"].cat.categories, query.uns["evercell_colors"], strict=True))
    both = ad.concat([query[query.obs["evercell"] == one] for one in reversed(list(of))])
    assert "evercell_colors" not in both.uns
    ec.tl.colours(both, model, columns=["evercell", "cell_type"])
    for column in ("evercell", "cell_type"):
        categories = both.obs[column].cat.categories
        assert dict(zip(categories, both.uns[f"{column}_colors"], strict=True)).items() <= of.items()
    with pytest.raises(LabelsError, match="`donor1`"):
        ec.tl.colours(both, model, columns="donor")


def test_a_model_that_is_not_there_is_named(query: ad.AnnData) -> None:
    with pytest.raises(ModelError, match="no-such-model"):
        ec.tl.annotate(query, "no-such-model")


def test_importing_evercell_is_light_and_its_tools_are_there() -> None:
    code = "import sys, evercell as ec; assert 'torch' not in sys.modules and 'tl' in dir(ec); ec.tl.annotate"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_start_does_not_wait_for_compilers(model: Annotator, query: ad.AnnData, tmp_path: Path) -> None:
    """Neither torch's, which is imported where weights are drawn without memory, nor that of umap-learn."""
    save(model, tmp_path / "model")
    query.write_h5ad(tmp_path / "query.h5ad")
    words = [str(tmp_path / "query.h5ad"), "--model", str(tmp_path / "model"), "--output", str(tmp_path / "out.h5ad")]
    code = f"""
import sys
from evercell.cli import main
assert main(["annotate", *{words!r}, "--report", {str(tmp_path / "report.html")!r}]) == 0
for module in ("torch._dynamo", "umap", "pynndescent"):
    assert module not in sys.modules, module
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "report.html").exists()

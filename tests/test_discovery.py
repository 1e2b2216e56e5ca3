"""Unknown cells in clusters, clusters accepted as types, cells worth a label."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from scipy import sparse

import evercell as ec
from evercell.annotator import Annotator
from evercell.discovery import Discovery, clusters
from evercell.discovery.clusters import clustered, components, positions
from evercell.discovery.profiles import Profiles
from evercell.errors import LabelsError, SettingsError
from evercell.finetuning import quick_settings
from evercell.testing import synthetic_cells

NEW = ("acinar", "ductal")


def logs_of(adata: AnnData) -> sparse.csr_matrix:
    counts = sparse.csr_matrix(adata.X, dtype=np.float64)
    counts = sparse.diags(1e4 / np.asarray(counts.sum(axis=1)).ravel()) @ counts
    return sparse.csr_matrix(counts.log1p())


@pytest.fixture(scope="module")
def query() -> AnnData:
    """Cells of the model's four types and of two that it does not know."""
    return synthetic_cells(300, n_types=6, seed=2)


@pytest.fixture(scope="module")
def found(model: Annotator, query: AnnData) -> Discovery:
    return ec.discover(model, query, reject=0.1, shown=False)


@pytest.fixture(scope="module")
def true_types(found: Discovery, query: AnnData) -> pd.Series:
    """Most frequent true type of each cluster."""
    inside = found.clusters != ""
    return pd.crosstab(found.clusters[inside], query.obs["cell_type"].astype(str).to_numpy()[inside]).idxmax(axis=1)


@pytest.fixture
def discovered(found: Discovery, query: AnnData) -> AnnData:
    adata = query.copy()
    found.write_into(adata)
    return adata


@pytest.fixture
def table(found: Discovery, true_types: pd.Series) -> pd.DataFrame:
    """The table with the two largest clusters named and accepted."""
    table = found.table.copy()
    for row, yes in ((0, "yes"), (1, "YES")):
        table.loc[row, ["name", "accept"]] = true_types[table["cluster"][row]], yes
    return table


# --- discover


def test_each_new_type_is_a_cluster(found: Discovery, query: AnnData, true_types: pd.Series) -> None:
    truth = query.obs["cell_type"].astype(str).to_numpy()
    assert set(true_types[found.table["cluster"][:2]]) == set(NEW)
    to_find = np.isin(truth, NEW) & (found.annotation.labels == "Unknown")
    assert to_find.sum() > 50
    own = pd.Series(found.clusters[to_find]).map(true_types) == truth[to_find]
    assert own.mean() > 0.8


def test_what_the_table_says(found: Discovery, query: AnnData, model: Annotator, true_types: pd.Series) -> None:
    table = found.table
    assert table["cluster"].tolist() == [f"unknown {i + 1}" for i in range(len(table))]
    sizes = [int((found.clusters == name).sum()) for name in table["cluster"]]
    assert table["cells"].tolist() == sizes == sorted(sizes, reverse=True)
    assert (table[["name", "accept"]] == "").all(axis=None)
    assert set(table["nearest_type"]) <= set(model.types.names)
    assert table["nearest_share"].between(0, 1).all()
    # all four known types are endocrine cells of the pancreas, and so are all pairs of them
    assert set(table["ontology_parent_id"]) == {"CL:0008024"}
    first = table["markers"][0].split(", ")
    truth = query.obs["cell_type"].astype(str).to_numpy()
    kind = true_types["unknown 1"]
    mean = pd.DataFrame(logs_of(query).toarray(), columns=query.var_names).groupby(truth).mean()
    for gene in (one.split(" ")[0] for one in first[:5]):
        assert mean.loc[kind, gene] > mean[gene].drop(kind).mean()
    assert set(found.clusters[found.annotation.labels != "Unknown"]) == {""}
    assert found.n_unknown == (found.annotation.labels == "Unknown").sum()


def test_the_file_gets_labels_and_clusters(found: Discovery, discovered: AnnData, query: AnnData) -> None:
    assert "evercell" not in query.obs
    column = discovered.obs["evercell_cluster"]
    assert column.cat.categories.tolist() == found.table["cluster"].tolist()
    assert (column.isna() == (found.clusters == "")).all()
    assert discovered.obsm["X_evercell"].shape[0] == 300


def test_labels_of_the_same_model_are_taken_as_they_are(
    model: Annotator, discovered: AnnData, found: Discovery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evercell.discovery.annotated.annotate", None)
    again = ec.discover(model, discovered, reject=0.1)
    assert again.in_file
    assert (again.clusters == found.clusters).all()
    pd.testing.assert_frame_equal(again.table, found.table)


def test_labels_of_another_model_or_rate_are_not(model: Annotator, discovered: AnnData) -> None:
    assert not ec.discover(model, discovered, reject=0.05, shown=False).in_file
    discovered.uns["evercell"]["model_fingerprint"] = "of another model"
    assert not ec.discover(model, discovered, reject=0.1, shown=False).in_file


def test_without_unknown_cells_there_is_nothing_to_discover(model: Annotator) -> None:
    known = synthetic_cells(60, seed=2)
    result = ec.annotate(model, known, shown=False)
    known = known[result.labels != "Unknown"].copy()
    found = ec.discover(model, known, shown=False)
    assert (len(found.table), found.n_unknown, set(found.clusters)) == (0, 0, {""})
    assert found.notes == ("no cell is called Unknown: a higher --reject calls more so",)
    assert list(found.table.columns)[:4] == ["cluster", "cells", "name", "accept"]
    found.write_into(known)
    assert known.obs["evercell_cluster"].isna().all()


def test_small_groups_stay_unclustered(model: Annotator, query: AnnData) -> None:
    found = ec.discover(model, query, reject=0.1, least_cells=250, shown=False)
    assert (len(found.table), set(found.clusters)) == (0, {""})
    assert "too few alike for a cluster of 250" in found.notes[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"resolution": 0}, "resolution is 0"),
        ({"least_cells": 1}, "least_cells is 1"),
        ({"reject": "off"}, "with reject off no cell is unknown"),
        ({"reject": 2}, "reject is `2`"),
    ],
)
def test_settings_that_cannot_be(
    model: Annotator, query: AnnData, arguments: dict[str, float | str], message: str
) -> None:
    with pytest.raises(SettingsError, match=message):
        ec.discover(model, query, **arguments)  # type: ignore[arg-type]


def test_packaged_cells_of_a_type_that_stage_1_lacks_are_found() -> None:
    model = ec.train(ec.load_example("baron_stage1"), groups="donor", settings=quick_settings(), shown=False)
    new = ec.load_example("fasolino_stage2")
    found = ec.discover(model, new, shown=False)
    truth = new.obs["cell_type"].astype(str).to_numpy()
    endothelial = [(truth[found.clusters == one] == "endothelial").mean() > 0.9 for one in found.table["cluster"]]
    clusters = found.table[endothelial]
    assert clusters["cells"].sum() >= 12  # of 42
    vessel = {"PLVAP", "PECAM1", "VWF", "FLT1", "ESAM", "CLDN5", "CD34", "KDR", "RAMP2", "RGCC"}
    for markers in clusters["markers"]:
        assert vessel & {one.split(" ")[0] for one in markers.split(", ")}


# --- clusters and profiles


def test_clusters_do_not_depend_on_seed_where_they_are_clear_and_come_by_size() -> None:
    adata = synthetic_cells(200, n_types=3, seed=3)
    adata = adata[
        np.r_[np.flatnonzero(adata.obs["cell_type"] != "beta"), np.flatnonzero(adata.obs["cell_type"] == "beta")[:20]]
    ]
    codes = [clustered(components(logs_of(adata)), resolution=0.5, least_cells=10, seed=seed) for seed in (0, 0, 1)]
    assert (codes[0] == codes[1]).all()
    assert np.bincount(codes[0]).tolist() == sorted(np.bincount(codes[0]), reverse=True)
    assert pd.crosstab(codes[0], codes[2]).gt(0).sum(axis=1).eq(1).all()
    table = pd.crosstab(codes[0], adata.obs["cell_type"].astype(str).to_numpy())
    assert (table.max(axis=1) / table.sum(axis=1)).min() > 0.9


def test_many_cells_are_clustered_by_some_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    adata = synthetic_cells(240, n_types=3, seed=3)
    whole = clustered(components(logs_of(adata)), resolution=0.5, least_cells=10, seed=0)
    monkeypatch.setattr(clusters, "MOST", 120)
    some = clustered(components(logs_of(adata)), resolution=0.5, least_cells=10, seed=0)
    assert len(some) == 240
    assert pd.crosstab(whole, some).max(axis=1).sum() > 0.95 * 240


@pytest.mark.parametrize("n", [1, 2, 3, 5, 12])
def test_few_cells_are_no_trouble(n: int) -> None:
    logs = logs_of(synthetic_cells(12, seed=3))[:n]
    codes = clustered(positions(np.ones((n, 4)), components(logs)), resolution=0.5, least_cells=3, seed=0)
    assert codes.shape == (n,)
    assert n >= 3 or (codes == -1).all()


def test_markers_are_genes_of_the_group_with_their_fold_change() -> None:
    rng = np.random.default_rng(0)
    counts = rng.poisson(1.0, (60, 50)).astype(float)
    counts[:20, 7] += 8  # 9 against 1
    counts[:20, 0] += 30  # mitochondrial: of no account
    adata = AnnData(sparse.csr_matrix(counts))
    symbols = np.array(["MT-CO1", "RPL3", *(f"GENE{i}" for i in range(2, 50))])
    totals = np.full(60, 1e4)
    logs = sparse.csr_matrix(np.log1p(adata.X.toarray()))
    profiles = Profiles(logs, totals, symbols, np.array(["unknown 1"] * 20 + ["alpha"] * 40))
    markers = profiles.markers("unknown 1")
    assert markers[0][0] == "GENE7"
    inside, outside = counts[:20, 7].mean(), counts[20:, 7].mean()
    assert markers[0][1] == pytest.approx(np.log2((inside + 0.1) / (outside + 0.1)))
    assert "MT-CO1" not in {gene for gene, _ in markers}


def test_doubts_name_damaged_cells_and_doublets() -> None:
    known = synthetic_cells(200, n_types=3, seed=3)
    types = known.obs["cell_type"].astype(str).to_numpy()
    counts = known.X.toarray().astype(float)
    both = counts[types == "alpha"][:30] + counts[types == "beta"][:30]
    other = synthetic_cells(200, n_types=5, seed=3)
    new = other.X.toarray()[(other.obs["cell_type"] == "acinar").to_numpy()][:30].astype(float)
    low = np.random.default_rng(0).binomial(counts[types == "delta"][:30].astype(int), 0.2).astype(float)
    dying = new.copy()
    dying[:, 0] += 0.3 * dying.sum(axis=1)
    everything = np.vstack([counts, both, new, low, dying])
    names = np.concatenate([types, *([name] * 30 for name in ("both", "new", "low", "dying"))])
    totals = everything.sum(axis=1)
    logs = sparse.csr_matrix(np.log1p(everything * 1e4 / totals[:, None]))
    profiles = Profiles(logs, totals, np.array(["MT-CO1", *known.var_names[1:]]), names)
    kinds = ["alpha", "beta", "delta"]
    assert profiles.doubt("both", kinds) == "looks like a mixture of alpha and beta: probably doublets"
    assert profiles.doubt("new", kinds) == ""
    assert profiles.doubt("low", kinds).startswith("low total counts (")
    assert "high mitochondrial share (" in profiles.doubt("dying", kinds)
    assert profiles.doubt("dying", kinds).endswith("probably damaged cells")


# --- accepted


def test_accepted_cells_carry_the_names_of_the_user(
    discovered: AnnData, table: pd.DataFrame, found: Discovery, true_types: pd.Series
) -> None:
    cells = ec.accepted(discovered, table)
    assert cells.n_obs == table["cells"][:2].sum()
    expected = pd.Series(found.clusters, index=discovered.obs_names)[cells.obs_names]
    assert (cells.obs["cell_type"].astype(str) == expected.map(true_types)).all()
    assert (cells.obs["donor"] == discovered.obs["donor"][cells.obs_names]).all()
    merged = table.assign(name="exocrine cell")
    assert set(ec.accepted(discovered, merged, labels="kind").obs["kind"]) == {"exocrine cell"}


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_tables_as_spreadsheets_write_them(
    discovered: AnnData, table: pd.DataFrame, tmp_path: Path, separator: str
) -> None:
    path = tmp_path / "clusters.csv"
    empty = pd.DataFrame([dict.fromkeys(table.columns, "")])
    pd.concat([table, empty]).to_csv(path, sep=separator, index=False, encoding="utf-8-sig")
    assert ec.accepted(discovered, path).n_obs == table["cells"][:2].sum()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cluster": "unknown 99"}, "line 2 of the table: `q.h5ad` has no cluster `unknown 99`; it has `unknown 1`"),
        ({"cluster": "unknown 2"}, "line 3 of the table: `unknown 2` is there twice"),
        ({"name": ""}, "line 2 of the table: `unknown 1` is accepted, but it has no name"),
        ({"name": "Unknown"}, "line 2 of the table: `unknown 1` is accepted, but the name `Unknown` says"),
        ({"accept": "perhaps"}, "line 2 of the table: accept is `perhaps` for `unknown 1`"),
        ({"cells": 3}, "line 2 of the table: `unknown 1` has 3 cells, in `q.h5ad` it has"),
    ],
)
def test_a_row_that_cannot_be_used(
    discovered: AnnData, table: pd.DataFrame, changes: dict[str, object], message: str
) -> None:
    if "cluster" in changes:
        table = table.drop(columns="cells")
    for column, value in changes.items():
        table.loc[0, column] = value
    with pytest.raises(LabelsError) as caught:
        ec.accepted(discovered, table, name="q.h5ad")
    assert message in caught.value.message
    assert caught.value.hint


def test_a_table_that_cannot_be_used(discovered: AnnData, found: Discovery, tmp_path: Path) -> None:
    with pytest.raises(LabelsError, match=f"accepts none of the {len(found.table)} clusters"):
        ec.accepted(discovered, found.table)
    with pytest.raises(LabelsError, match="has no column `name`"):
        ec.accepted(discovered, found.table.drop(columns="name"))
    with pytest.raises(LabelsError, match="there is no table"):
        ec.accepted(discovered, tmp_path / "none.csv")
    (tmp_path / "bad.csv").write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(LabelsError, match="cannot be read as a table"):
        ec.accepted(discovered, tmp_path / "bad.csv")
    del discovered.obs["evercell_cluster"]
    with pytest.raises(LabelsError, match="has no column `evercell_cluster`"):
        ec.accepted(discovered, found.table)


def test_an_updated_model_labels_what_was_discovered(
    model: Annotator, discovered: AnnData, table: pd.DataFrame
) -> None:
    cells = ec.accepted(discovered, table)
    new = ec.update(model, cells, strategy="analytic", mapping={name: name for name in NEW}, shown=False)
    assert new.types.names == (*model.types.names, *NEW)
    third = synthetic_cells(240, n_types=6, seed=5)
    truth = third.obs["cell_type"].astype(str).to_numpy()
    before, after = (ec.annotate(one, third, reject="off", shown=False).labels for one in (model, new))
    of_new = np.isin(truth, NEW)
    assert (after[of_new] == truth[of_new]).mean() > 0.8
    assert (after[~of_new] == truth[~of_new]).mean() > (before[~of_new] == truth[~of_new]).mean() - 0.1


# --- select


def test_selected_cells_are_uncertain_and_spread(model: Annotator, query: AnnData) -> None:
    found = ec.select(model, query, 30, shown=False)
    again = ec.select(model, query, 30, shown=False)
    pd.testing.assert_frame_equal(found, again)
    truth = query.obs["cell_type"].astype(str)
    chosen = truth[found["cell"]]
    assert chosen.isin(NEW).mean() > 0.5  # a third of the file
    assert set(NEW) <= set(chosen)
    result = ec.annotate(model, query, shown=False)
    rows = query.obs_names.get_indexer(found["cell"])
    top = np.argsort(-result.obs["evercell_unknown_score"].to_numpy())[:30]
    apart = [
        np.linalg.norm(x[:, None] - x[None], axis=2).mean() for x in map(result.representation.__getitem__, (rows, top))
    ]
    assert apart[0] > apart[1]
    assert (found["label"] == result.best_labels[rows]).all()
    assert (found["label"] != found["runner_up"]).all()
    assert found["confidence"].mean() < result.obs["evercell_confidence"].mean()


def test_selected_cells_have_counts_and_are_as_many_as_there_are(model: Annotator, query: AnnData) -> None:
    few = query[:20].copy()
    few.X = sparse.csr_matrix(few.X.toarray() * (np.arange(20) != 3)[:, None])
    found = ec.select(model, few, 19, shown=False)
    assert set(found["cell"]) == set(few.obs_names) - {few.obs_names[3]}
    with pytest.raises(SettingsError, match="20 cells were asked for; `the data` has 19"):
        ec.select(model, few, 20, shown=False)

"""Majority vote: who votes, who wins, what the clusters depend on."""

from __future__ import annotations

import warnings
from itertools import pairwise
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from anndata import AnnData

from evercell.annotation import UNKNOWN, annotate
from evercell.annotator import Annotator
from evercell.errors import LabelsError, SettingsError
from evercell.majority import clusters_in, made_clusters, majority_vote, over_clusters


def islands(n_islands: int, each: int, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Points around well separated centres (B, 3), float32, and the centre of each."""
    generator = np.random.default_rng(seed)
    centres = 20.0 * generator.permutation(n_islands**3)[:n_islands]
    places = np.stack([centres % 7, centres // 7, centres], axis=1)
    truth = generator.permutation(np.repeat(np.arange(n_islands), each))
    return (places[truth] + generator.normal(size=(len(truth), 3))).astype(np.float32), truth


def partition(codes: np.ndarray) -> set[frozenset[int]]:
    return {frozenset(np.flatnonzero(codes == code).tolist()) for code in np.unique(codes)}


# --- the vote


def test_every_cell_of_a_cluster_gets_its_most_frequent_label() -> None:
    voted = majority_vote(["b", "b", "nk", "t", "nk", "t", "t"], [0, 0, 0, 1, 1, 1, 2])
    assert list(voted) == ["b", "b", "b", "t", "t", "t", "t"]
    assert list(voted.categories) == ["b", "nk", "t"]


def test_of_equally_many_the_first_category_wins_whatever_the_order_of_cells() -> None:
    labels = pd.Categorical(["nk", "b", "b", "nk"], categories=["t", "nk", "b", UNKNOWN])
    for order in ([0, 1, 2, 3], [1, 0, 3, 2], [2, 1, 0, 3]):
        assert set(majority_vote(labels[order], [0, 0, 0, 0])) == {"nk"}
    assert set(majority_vote(["nk", "b", "b", "nk"], [0, 0, 0, 0])) == {"b"}  # no categories: the alphabet
    # a type goes before Unknown, which is the last category of an annotation
    assert set(majority_vote(pd.Categorical([UNKNOWN, "b"], categories=["b", UNKNOWN]), [3, 3])) == {"b"}


def test_unknown_votes_as_any_label() -> None:
    labels = pd.Categorical(["b", UNKNOWN, "b", UNKNOWN, UNKNOWN, "b"], categories=["b", "t", UNKNOWN])
    voted = majority_vote(labels, [0, 0, 0, 1, 1, 1])
    assert list(voted) == ["b", "b", "b", UNKNOWN, UNKNOWN, UNKNOWN]
    assert list(voted.categories) == ["b", "t", UNKNOWN]


def test_cells_without_a_cluster_keep_their_label() -> None:
    assert list(majority_vote(["b", "t", "t", "b"], [0, 0, 0, -1])) == ["t", "t", "t", "b"]
    assert list(majority_vote(["b", "t"], [-1, -1])) == ["b", "t"]
    assert list(majority_vote([], np.zeros(0, dtype=int))) == []


@pytest.mark.parametrize(("least", "voted"), [(0.6, "bbbbb"), (0.61, "bbntb"), (1.0, "bbntb")])
def test_clusters_that_agree_too_little_are_left_alone(least: float, voted: str) -> None:
    labels = list("bbntb")
    assert list(majority_vote(labels, [0] * 5, least_share=least)) == list(voted)
    mixed = majority_vote(labels, [0] * 5, least_share=least, below="Heterogeneous")
    if voted == "bbbbb":
        assert list(mixed) == list(voted)
        assert "Heterogeneous" not in mixed.categories
    else:
        assert set(mixed) == {"Heterogeneous"}
        assert list(mixed.categories) == ["b", "n", "t", "Heterogeneous"]


def test_left_alone_is_the_cluster_not_the_file() -> None:
    voted = majority_vote(list("aabbcd"), [0, 0, 0, 1, 1, 1], least_share=0.5, below="mixed")
    assert list(voted) == ["a", "a", "a", "mixed", "mixed", "mixed"]


@pytest.mark.parametrize(
    ("labels", "clusters", "least", "said"),
    [
        (["b", "t"], [0], 0.0, "2 labels and clusters of shape"),
        (["b", None], [0, 0], 0.0, "1 cells have no label"),
        (["b", "t"], [0, 0], 1.5, "least_share is 1.5"),
        (["b", "t"], [0, 0], float("nan"), "least_share is nan"),
    ],
)
def test_votes_that_cannot_be_held(labels: list[str | None], clusters: list[int], least: float, said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        majority_vote(labels, clusters, least_share=least)


# --- clusters that are made


@pytest.mark.parametrize(("n_islands", "each"), [(6, 40), (20, 260)])
def test_clusters_do_not_mix_what_lies_apart(n_islands: int, each: int) -> None:
    """Below and above the number of cells from which on they are cut in two steps."""
    points, truth = islands(n_islands, each)
    codes = over_clusters(points)
    assert codes.dtype == np.int64
    assert set(codes) == set(range(codes.max() + 1))
    assert 0.5 * len(points) / 10 < codes.max() + 1 < 1.5 * len(points) / 10
    assert pd.Series(truth).groupby(codes).nunique().eq(1).mean() > 0.97


@pytest.mark.parametrize("each", [40, 900])
def test_clusters_depend_on_the_cells_not_on_their_order(each: int) -> None:
    points, _ = islands(6, each)
    codes = over_clusters(points)
    np.testing.assert_array_equal(over_clusters(points.copy()), codes)
    order = np.random.default_rng(5).permutation(len(points))
    np.testing.assert_array_equal(over_clusters(points[order]), codes[order])


def test_the_seed_is_the_only_chance() -> None:
    points, _ = islands(4, 60)
    state = np.random.get_state()[1].tolist()  # noqa: NPY002 (the global state is what is looked at)
    first, again, other = (over_clusters(points, seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert partition(first) != partition(other)
    assert np.random.get_state()[1].tolist() == state  # noqa: NPY002


def test_more_clusters_than_cells_or_different_cells() -> None:
    points, _ = islands(3, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert sorted(over_clusters(points, cells_per_cluster=1)) == [0, 1, 2, 3, 4, 5]
        assert over_clusters(points, cells_per_cluster=100).tolist() == [0] * 6
        assert over_clusters(points[:1]).tolist() == [0]
        assert over_clusters(points[:0]).tolist() == []
        same = np.repeat(points[:2], 30, axis=0)
        assert partition(over_clusters(same, cells_per_cluster=5)) == {frozenset(range(30)), frozenset(range(30, 60))}
    with pytest.raises(SettingsError, match="cells_per_cluster is 0"):
        over_clusters(points, cells_per_cluster=0)


def test_smaller_clusters_are_more() -> None:
    points, _ = islands(5, 80)
    numbers = [over_clusters(points, cells_per_cluster=size).max() for size in (100, 30, 10, 3)]
    assert all(fewer < more for fewer, more in pairwise(numbers))


def test_made_clusters_are_a_column_that_a_file_can_hold() -> None:
    points, _ = islands(3, 40)
    found = made_clusters(points)
    np.testing.assert_array_equal(found.codes, over_clusters(points))
    assert list(found.categories) == [str(code) for code in range(len(found.categories))]


# --- clusters of the user


@pytest.mark.parametrize(
    "column",
    [
        pd.Series(["x", None, "y", "x"]),
        pd.Series(["x", "nan", "y", "x"]),
        pd.Categorical(["x", None, "y", "x"], categories=["z", "y", "x"]),
        pd.Series([3.0, np.nan, 1.0, 3.0]),
        pd.Series([3, pd.NA, 1, 3], dtype="Int64"),
    ],
)
def test_clusters_of_any_column_with_missing_values(column: pd.Series) -> None:
    found = clusters_in(pd.DataFrame({"leiden": column}), "leiden")
    assert found.isna().tolist() == [False, True, False, False]
    assert found.codes[0] == found.codes[3] != found.codes[2]
    assert list(majority_vote(["a", "b", "c", "a"], found.codes)) == ["a", "b", "c", "a"]
    assert len(found.categories) == 2


def test_a_column_that_is_not_there_or_empty() -> None:
    obs = pd.DataFrame({"donor": ["a"], "leiden": [None]})
    with pytest.raises(
        LabelsError, match=r"`q\.h5ad` has no column `louvain` in obs; columns: `donor`, `leiden`"
    ) as caught:
        clusters_in(obs, "louvain", name="q.h5ad")
    assert "--clusters" in (caught.value.hint or "")
    with pytest.raises(LabelsError, match="no cell of `the data` has a cluster in `leiden`"):
        clusters_in(obs, "leiden")


# --- in an annotation


def test_the_vote_is_a_column_of_its_own(model: Annotator, query: AnnData) -> None:
    """Invariant 1: what a cell gets of the model does not depend on the vote."""
    plain, voted = annotate(model, query, reject=0.1), annotate(model, query, reject=0.1, majority=True)
    assert "evercell_majority" not in plain.obs
    assert "majority" not in plain.info
    assert plain.clusters is None
    assert list(voted.obs) == [*plain.obs, "evercell_majority"]
    pd.testing.assert_frame_equal(voted.obs[list(plain.obs)], plain.obs)
    column = voted.obs["evercell_majority"]
    assert column.cat.categories.tolist() == [*model.types.names, UNKNOWN]
    assert voted.clusters is not None
    for name in voted.clusters.categories:
        rows = np.asarray(voted.clusters == name)
        own = plain.obs["evercell"][rows].value_counts()
        if own.iloc[0] >= 0.5 * rows.sum():
            assert len(set(column[rows])) == 1
            assert own[column[rows].iloc[0]] == own.iloc[0]
        else:
            assert column[rows].tolist() == plain.obs["evercell"][rows].tolist()
    assert voted.info["majority"]["changed"] == (voted.labels != column.astype(str)).sum() > 0
    assert any("depends on the other cells" in note for note in voted.info["notes"])
    assert (column.astype(str) == query.obs["cell_type"].astype(str)).mean() > 0.95


def test_shuffled_cells_get_the_same_majority(model: Annotator, query: AnnData) -> None:
    reference = annotate(model, query, majority=True)
    shuffled = query[np.random.default_rng(0).permutation(query.n_obs)].copy()
    found = annotate(model, shuffled, majority=True)
    pd.testing.assert_frame_equal(found.obs, reference.obs.loc[shuffled.obs_names])


def test_clusters_of_the_user_decide(model: Annotator, query: AnnData) -> None:
    types = query.obs["cell_type"].astype(str)
    few = np.arange(query.n_obs) % 3 == 0
    query.obs["leiden"] = types.map({"alpha": 7, "gamma": 8}).mask((types == "delta") & few, 7)
    result = annotate(model, query, reject="off", majority="leiden")
    own, voted = result.obs["evercell"].astype(str), result.obs["evercell_majority"].astype(str)
    assert (own[(types == "delta") & few] == "delta").any()
    assert set(voted[query.obs["leiden"] == 7]) == {"alpha"}
    assert set(voted[query.obs["leiden"] == 8]) == {"gamma"}
    left = query.obs["leiden"].isna()
    assert left.any()
    assert (voted[left] == own[left]).all()
    assert result.info["majority"]["clusters"] == "leiden"
    assert result.info["majority"]["n_clusters"] == 2


def test_a_cluster_without_a_majority_is_left_alone(model: Annotator, query: AnnData) -> None:
    query.obs["all"] = "one"
    result = annotate(model, query, reject="off", majority="all")
    assert result.obs["evercell"].value_counts().iloc[0] < 0.5 * query.n_obs
    assert result.obs["evercell_majority"].tolist() == result.obs["evercell"].tolist()
    assert result.info["majority"]["changed"] == 0


def test_a_wrong_column_is_told_before_the_work(model: Annotator, query: AnnData) -> None:
    query.X = None
    with pytest.raises(LabelsError, match="no column `leiden`"):
        annotate(model, query, majority="leiden")


def test_one_cell_is_its_own_majority(model: Annotator, query: AnnData) -> None:
    result = annotate(model, query[:1].copy(), majority=True)
    assert result.obs["evercell_majority"].tolist() == result.obs["evercell"].tolist()


def test_a_new_annotation_takes_an_old_majority_away(model: Annotator, query: AnnData) -> None:
    annotate(model, query, majority=True, inplace=True)
    annotate(model, query, majority=True, inplace=True, key_added="other")
    annotate(model, query, inplace=True)
    assert "evercell_majority" not in query.obs
    assert "other_majority" in query.obs


def test_the_columns_of_celltypist(model: Annotator, query: AnnData) -> None:
    result = annotate(model, query, reject=0.5, majority=True)
    table = result.celltypist()
    assert list(table) == ["predicted_labels", "over_clustering", "majority_voting", "conf_score"]
    assert table.index.equals(query.obs_names)
    assert (result.labels == UNKNOWN).any()
    assert table["predicted_labels"].tolist() == result.best_labels.tolist()  # best match: no cell is unknown
    assert result.clusters is not None
    assert table["over_clustering"].tolist() == list(result.clusters)
    expected = majority_vote(pd.Categorical(result.best_labels, categories=result.types), result.clusters.codes)
    assert table["majority_voting"].tolist() == list(expected)
    np.testing.assert_allclose(table["conf_score"], result.probabilities.max(axis=1), rtol=1e-6)
    query.obs["all"] = "one"
    whole = annotate(model, query, majority="all")
    assert set(whole.celltypist(least_share=0.9)["majority_voting"]) == {"Heterogeneous"}
    assert len(set(whole.celltypist()["majority_voting"])) == 1
    assert list(annotate(model, query).celltypist()) == ["predicted_labels", "conf_score"]


def test_what_is_written_can_be_read_back(model: Annotator, query: AnnData, tmp_path: Path) -> None:
    query.obs["leiden"] = [None, *["a", "b"] * 74, None]
    for majority in (True, "leiden"):
        result = annotate(model, query, majority=majority, inplace=True)
        full = query.copy()
        for name, column in result.celltypist().items():
            full.obs[name] = column
        full.write_h5ad(tmp_path / "a.h5ad")
        again = ad.read_h5ad(tmp_path / "a.h5ad")
        for name in ("evercell_majority", "majority_voting", "predicted_labels"):
            assert again.obs[name].tolist() == full.obs[name].tolist()
        assert again.obs["over_clustering"].isna().sum() == (2 if majority == "leiden" else 0)
        assert again.uns["evercell"]["majority"]["n_clusters"] == result.info["majority"]["n_clusters"]

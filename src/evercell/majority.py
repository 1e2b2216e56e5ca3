"""Majority vote: every cell of a cluster gets the label that most cells of the cluster have.

After the majority voting of CellTypist (Domínguez Conde et al., Science 2022): the query is cut into many small
clusters of cells that look alike, and each cluster takes its most frequent label, which evens out single odd cells.
Unlike all else in an annotation, what a cell gets here depends on the other cells of the query.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from evercell.errors import LabelsError, SettingsError
from evercell.labels import is_unassigned, listed
from evercell.progress import progress

CELLS_PER_CLUSTER = 10
LEAST_SHARE = 0.5
"""Share of a cluster's cells that must agree, as `annotate` votes; where fewer do, each keeps its own label."""

_AT_ONCE = 5000  # cells that one k-means cuts; more are parted first, or the time would grow with their square


def over_clusters(
    representation: np.ndarray, *, seed: int = 0, cells_per_cluster: int = CELLS_PER_CLUSTER
) -> np.ndarray:
    """Cut cells into many small clusters by k-means on their representation.

    The clusters depend on the cells, not on their order: k-means sees them sorted. Many cells are cut into a few coarse
    clusters first, and these into small ones.

    Parameters
    ----------
    representation
        (B, D), finite.
    seed
        Seed of k-means.
    cells_per_cluster
        Cells in a cluster, on average.

    Returns
    -------
    numpy.ndarray
        Code of each cell's cluster (B,), int64, from 0 without gaps.

    Raises
    ------
    SettingsError
        If `cells_per_cluster` is less than 1.

    Examples
    --------
    >>> import numpy as np
    >>> over_clusters(np.array([[0.0, 1.0], [9.0, 9.0], [0.1, 1.0], [9.0, 9.1]]), cells_per_cluster=2).tolist()
    [0, 1, 0, 1]
    """
    from sklearn.cluster import MiniBatchKMeans

    if cells_per_cluster < 1:
        raise SettingsError(f"cells_per_cluster is {cells_per_cluster}", hint="give at least 1")
    n_cells = len(representation)
    # In float64: threads add up in any order, and with so many digits that changes no cluster.
    order = np.lexsort(representation.T)
    cells = np.asarray(representation, dtype=np.float64)[order]
    parts = np.zeros(n_cells, dtype=np.int64)
    if n_cells > _AT_ONCE:
        n_parts = round((n_cells / cells_per_cluster) ** 0.5)
        parts = MiniBatchKMeans(n_parts, n_init=1, batch_size=1024, random_state=seed).fit_predict(cells)
    found, used = np.empty(n_cells, dtype=np.int64), 0
    for part in np.unique(parts):
        rows = np.flatnonzero(parts == part)
        found[rows] = used + _cut(cells[rows], max(1, round(len(rows) / cells_per_cluster)), seed=seed)
        used = found[rows].max() + 1
    codes = np.empty(n_cells, dtype=np.int64)
    codes[order] = pd.factorize(found)[0]
    return codes


def _cut(cells: np.ndarray, n_clusters: int, *, seed: int) -> np.ndarray:
    """Clusters (B,) of some cells; at most as many as there are different cells, above which k-means would warn."""
    from sklearn.cluster import KMeans

    different = 1 + int((cells[1:] != cells[:-1]).any(axis=1).sum())  # cells are sorted
    found: np.ndarray = KMeans(min(n_clusters, different), n_init=1, random_state=seed).fit_predict(cells)
    return found


@progress("making clusters for the vote")
def made_clusters(representation: np.ndarray, *, seed: int = 0) -> pd.Categorical:
    """`over_clusters` as a column of `obs`: clusters (B,) named ``"0"``, ``"1"`` and so on."""
    codes = over_clusters(representation, seed=seed)
    return pd.Categorical(codes.astype(str), categories=[str(code) for code in range(codes.max(initial=-1) + 1)])


def clusters_in(obs: pd.DataFrame, key: str, *, name: str = "the data") -> pd.Categorical:
    """Clusters of the user's own, from a column of `obs`.

    Parameters
    ----------
    obs
        One row a cell.
    key
        Column with the cluster of each cell, for example ``leiden``.
    name
        File or data set, for messages.

    Returns
    -------
    pandas.Categorical
        Cluster of each cell (B,), as text; missing where there is none.

    Raises
    ------
    LabelsError
        If there is no such column, or no cell has a cluster.
    """
    if key not in obs:
        raise LabelsError(
            f"`{name}` has no column `{key}` in obs; columns: {listed(map(str, obs), most=50) or 'none'}",
            hint="name the column of clusters with --clusters, or leave it out: clusters are made then",
        )
    found = [None if is_unassigned(one) else str(one) for one in obs[key]]
    if not any(found):
        raise LabelsError(f"no cell of `{name}` has a cluster in `{key}`", hint="name another column with --clusters")
    return pd.Categorical(found)


def majority_vote(
    labels: pd.Categorical | ArrayLike,
    clusters: ArrayLike,
    *,
    least_share: float = 0.0,
    below: str | None = None,
) -> pd.Categorical:
    """Give every cell of a cluster the label that most of its cells have.

    Each cell has one vote, and "Unknown" is a label as any other: a cluster of unknown cells stays unknown, and a
    single unknown cell takes the label of its cluster. Of labels with equally many cells the one that stands first in
    the categories of `labels` wins (for labels that are not categorical, the first in the alphabet).

    Parameters
    ----------
    labels
        Label of each cell (B,).
    clusters
        Code of each cell's cluster (B,), whole numbers; a cell with a code below zero keeps its label.
    least_share
        Clusters in which a smaller share of the cells (0 to 1) has the most frequent label are left alone; CellTypist
        calls it ``min_prop``.
    below
        Label for the cells of such clusters, as CellTypist's "Heterogeneous". By default each keeps its own.

    Returns
    -------
    pandas.Categorical
        Label of each cell (B,), with the categories of `labels`, and `below` where a cell got it.

    Raises
    ------
    SettingsError
        If lengths differ, a label is missing, or `least_share` is no share.

    Examples
    --------
    >>> list(majority_vote(["b", "b", "nk", "nk", "b"], [0, 0, 0, 1, 1]))
    ['b', 'b', 'b', 'b', 'b']
    >>> list(majority_vote(["b", "b", "nk", "nk", "b"], [0, 0, 0, 1, 1], least_share=0.6))
    ['b', 'b', 'b', 'nk', 'b']
    """
    own = labels if isinstance(labels, pd.Categorical) else pd.Categorical(np.asarray(labels, dtype=object))
    codes = np.asarray(clusters, dtype=np.int64)
    if codes.shape != (len(own),):
        raise SettingsError(f"{len(own):,} labels and clusters of shape {codes.shape}: one cluster a cell is needed")
    if (own.codes < 0).any():
        raise SettingsError(f"{int((own.codes < 0).sum()):,} cells have no label", hint="vote with labelled cells only")
    if not 0 <= least_share <= 1:
        raise SettingsError(f"least_share is {least_share}", hint="give a share from 0 to 1")
    voted = np.array(own.codes, dtype=np.int64)
    rows = np.flatnonzero(codes >= 0)
    if not len(rows):
        return own.copy()
    places, inside = np.unique(codes[rows], return_inverse=True)
    n_labels = len(own.categories)
    votes = np.bincount(inside * n_labels + voted[rows], minlength=len(places) * n_labels).reshape(-1, n_labels)
    winner, share = votes.argmax(axis=1), votes.max(axis=1) / votes.sum(axis=1)
    decided = share[inside] >= least_share
    voted[rows[decided]] = winner[inside[decided]]
    result = pd.Categorical.from_codes(voted, categories=own.categories)
    if below is None or decided.all():
        return result
    text = np.array(result, dtype=object)
    text[rows[~decided]] = below
    return pd.Categorical(text, categories=list(dict.fromkeys([*own.categories, below])))

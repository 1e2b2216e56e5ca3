"""UMAP of a representation: near neighbours, a graph of how near they are, and places in two dimensions.

The method is that of McInnes, Healy and Melville 2018 (arXiv:1802.03426), begun at the principal components. umap-learn
gives maps as good, but what it needs is compiled in every process anew: twenty seconds of each report.
"""

from __future__ import annotations

import numba
import numpy as np
import scipy.sparse as sp

NEIGHBOURS = 15
"""Nearest cells that are held together, the cell itself among them; no map is made of fewer cells."""
_COMPONENTS = 30
_A, _B = 0.583, 1.334  # the curve 1 / (1 + a d^2b) that falls off from a distance of 0.5, as Scanpy's maps do
_AGAINST = 5  # cells drawn at random that a cell is pushed away from, for each neighbour that it is drawn to
_MOST_STEP = 4.0


def umap(space: np.ndarray, *, seed: int) -> np.ndarray:
    """Places of cells on a map on which near cells are near.

    Parameters
    ----------
    space
        (B, D) representation, at least `NEIGHBOURS` cells.
    seed
        Seed of the layout: the same cells in the same order and the same seed give the same map.

    Returns
    -------
    numpy.ndarray
        (B, 2) float64.
    """
    components = _principal(space)
    graph = _graph(components)
    start = components[:, :2] if components.shape[1] > 1 else np.repeat(components, 2, axis=1)
    points = 10 * start / max(float(np.abs(start).max()), 1e-12)
    points = points + np.random.default_rng(seed).normal(0, 1e-4, points.shape)  # cells that are alike lie apart
    epochs = 500 if len(space) <= 10_000 else 200
    heads, tails = graph.row.astype(np.int64), graph.col.astype(np.int64)
    _lay_out(points, heads, tails, graph.data.max() / graph.data, epochs, np.uint64(seed))
    return points


def _principal(space: np.ndarray) -> np.ndarray:
    """(B, at most `_COMPONENTS`) principal components, each with its largest weight positive."""
    centred = np.asarray(space, dtype=np.float64) - np.mean(space, axis=0, dtype=np.float64)
    _, axes = np.linalg.eigh(centred.T @ centred)
    axes = axes[:, ::-1][:, :_COMPONENTS]
    return centred @ (axes * np.sign(axes[np.abs(axes).argmax(axis=0), np.arange(axes.shape[1])]))


def _graph(space: np.ndarray) -> sp.coo_matrix:
    """(B, B) symmetric memberships in (0, 1]: how near a cell is, by the distances that the other has around it."""
    from sklearn.neighbors import NearestNeighbors

    n_cells, others = len(space), NEIGHBOURS - 1
    distances, neighbours = NearestNeighbors(n_neighbors=others, algorithm="brute").fit(space).kneighbors()
    nearest = np.where(distances > 0, distances, np.inf).min(axis=1, keepdims=True)
    beyond = np.maximum(distances - np.where(np.isfinite(nearest), nearest, 0), 0)
    low, high = np.full((n_cells, 1), 1e-9), np.full((n_cells, 1), max(float(beyond.max()), 1e-6) * 64)
    for _ in range(48):  # the width at which the memberships of a cell add up to log2(NEIGHBOURS)
        middle = np.sqrt(low * high)
        many = np.exp(-beyond / middle).sum(axis=1, keepdims=True) > np.log2(NEIGHBOURS)
        low, high = np.where(many, low, middle), np.where(many, middle, high)
    near = np.exp(-beyond / high).ravel()
    directed = sp.csr_matrix((near, (np.repeat(np.arange(n_cells), others), neighbours.ravel())), (n_cells, n_cells))
    both = (directed + directed.T - directed.multiply(directed.T)).tocoo()
    kept = both.data > 1 / 500  # what is farther would not be drawn once
    return sp.coo_matrix((both.data[kept], (both.row[kept], both.col[kept])), both.shape)


@numba.njit(cache=True, nogil=True)
def _lay_out(points, heads, tails, every, epochs, seed):  # type: ignore[no-untyped-def]
    """Move `points` (B, 2): neighbours together, a pair once in `every` (E,) epochs; any two cells apart."""
    n_cells = np.uint64(len(points))
    due = every.copy()
    state = seed * np.uint64(2) + np.uint64(1)
    for epoch in range(epochs):
        rate = 1.0 - epoch / epochs
        for edge in range(len(heads)):
            if due[edge] > epoch + 1:
                continue
            due[edge] += every[edge]
            one, other = heads[edge], tails[edge]
            for draw in range(_AGAINST + 1):
                if draw:
                    state = state * np.uint64(6364136223846793005) + np.uint64(1442695040888963407)
                    other = np.int64((state >> np.uint64(33)) % n_cells)
                    if other == one:
                        continue
                x, y = points[one, 0] - points[other, 0], points[one, 1] - points[other, 1]
                apart = x * x + y * y
                if apart == 0.0:
                    continue
                power = apart**_B
                if draw:
                    force = 2.0 * _B / ((0.001 + apart) * (1.0 + _A * power))
                else:
                    force = -2.0 * _A * _B * power / (apart * (1.0 + _A * power))
                x = rate * min(max(force * x, -_MOST_STEP), _MOST_STEP)
                y = rate * min(max(force * y, -_MOST_STEP), _MOST_STEP)
                points[one, 0] += x
                points[one, 1] += y
                if not draw:
                    points[other, 0] -= x
                    points[other, 1] -= y

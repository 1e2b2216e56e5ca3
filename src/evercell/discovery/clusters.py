"""Groups of alike cells: Louvain communities of nearest neighbours, in what the model sees and in what genes say."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from evercell.progress import progress

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

VARIABLE_GENES = 2000
COMPONENTS = 30
NEIGHBOURS = (5, 15)  # fewest and most; between them the square root of the number of cells
FEWEST = 3  # cells that express a gene, for it to be looked at
MOST = 8000  # cells that communities are found in; the others join the nearest of them


def positions(representation: np.ndarray, components: np.ndarray) -> np.ndarray:
    """Where cells lie, to be clustered (N, D + C): representation and components, each brought to a total variance.

    Cells of a type that the model never saw may lie close together in its representation, or apart; the genes tell
    them apart, but donors and depth too. Together they were better than either.
    """
    scaled = [part - part.mean(axis=0) for part in (representation, components)]
    spreads = [max(float(np.sqrt(part.var(axis=0).sum())), 1e-9) for part in scaled]
    return np.hstack([part / spread for part, spread in zip(scaled, spreads, strict=True)])


@progress("clustering unknown cells")
def clustered(where: np.ndarray, *, resolution: float, least_cells: int, seed: int) -> np.ndarray:
    """Cluster of each cell (N,), 0 for the largest; -1 for cells of groups below `least_cells`.

    Parameters
    ----------
    where
        (N, D) positions of the cells.
    resolution
        Of the modularity: more gives more and smaller clusters.
    least_cells
        Cells of the smallest cluster.
    seed
        Order in which Louvain's method looks at the cells.
    """
    codes = np.full(len(where), -1)
    if len(where) < max(least_cells, FEWEST):
        return codes
    some = np.linspace(0, len(codes) - 1, min(len(codes), MOST)).astype(int)
    found = _communities(where[some], resolution, seed)
    if len(some) < len(codes):
        from sklearn.neighbors import KNeighborsClassifier

        found = KNeighborsClassifier(NEIGHBOURS[1]).fit(where[some], found).predict(where)
    sizes = np.bincount(found)
    kept = [code for code in np.argsort(-sizes, kind="stable") if sizes[code] >= least_cells]
    for number, code in enumerate(kept):
        codes[found == code] = number
    return codes


def components(logs: csr_matrix) -> np.ndarray:
    """Principal components (N, C) of the genes that vary most among the cells, from log-normalised counts (N, G)."""
    from sklearn.decomposition import PCA

    dense = logs[:, variable_genes(logs)].astype(np.float32).toarray()
    n = min(COMPONENTS, *(side - 1 for side in dense.shape))
    if n < 1:
        return np.zeros((len(dense), 1), dtype=np.float32)
    found: np.ndarray = PCA(n, svd_solver="covariance_eigh").fit_transform(dense)
    return found


def variable_genes(logs: csr_matrix) -> np.ndarray:
    """Columns of the genes with most variance beyond what genes of like mean have."""
    import pandas as pd

    mean = np.asarray(logs.mean(axis=0)).ravel()
    variance = np.maximum(np.asarray(logs.multiply(logs).mean(axis=0)).ravel() - mean**2, 0)
    genes = np.flatnonzero((np.bincount(logs.indices, minlength=logs.shape[1]) >= FEWEST) & (variance > 0))
    if len(genes) <= 1:
        return np.arange(logs.shape[1])
    dispersion = pd.Series(np.log(variance[genes] / mean[genes]))
    bins = pd.Series(mean[genes]).rank(method="first", pct=True).mul(20).round().to_numpy()
    above = dispersion - dispersion.groupby(bins).transform("median")
    spread = above.abs().groupby(bins).transform("median")
    order = np.argsort(-(above / (spread + 1e-3)).to_numpy(), kind="stable")
    chosen: np.ndarray = np.sort(genes[order[:VARIABLE_GENES]])
    return chosen


def _communities(where: np.ndarray, resolution: float, seed: int) -> np.ndarray:
    """Louvain communities (N,) of the graph of neighbours, edges weighted by the neighbours that two cells share."""
    import networkx as nx
    from scipy.sparse import identity
    from sklearn.neighbors import NearestNeighbors

    n = len(where)
    k = min(int(np.clip(np.sqrt(n), *NEIGHBOURS)), n - 1)
    near = NearestNeighbors(n_neighbors=k).fit(where).kneighbors_graph() + identity(n, format="csr")
    shared = (near @ near.T).tocoo()
    overlap = shared.data / (2 * (k + 1) - shared.data)  # Jaccard's index
    edges = (shared.row < shared.col) & (overlap > 1 / 15)
    graph = nx.Graph()
    graph.add_nodes_from(range(n))
    graph.add_weighted_edges_from(
        zip(shared.row[edges].tolist(), shared.col[edges].tolist(), overlap[edges].tolist(), strict=True)
    )
    codes = np.zeros(n, dtype=np.int64)
    for code, members in enumerate(nx.community.louvain_communities(graph, resolution=resolution, seed=seed)):
        codes[sorted(members)] = code
    return codes

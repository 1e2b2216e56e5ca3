"""Made-up cells for tests and examples that need no real data."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import numpy as np
from scipy.sparse import csr_matrix

from evercell.errors import SettingsError
from evercell.gene_names import Species, canonical_genes, current_symbol, orthologue_table

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["TYPES", "synthetic_cells", "with_ambient", "with_doublets", "with_empty_droplets"]

TYPES = (
    "alpha", "beta", "delta", "gamma", "acinar", "ductal", "endothelial", "macrophage", "mast", "stellate", "epsilon",
    "schwann",
)  # fmt: skip
"""Names of the types, in the order in which `synthetic_cells` uses them."""

_BIOLOGY = 2016  # what a type expresses is the same for every `seed`, so that made-up studies agree on it
_MARKERS = 0.06  # share of the genes that mark a type
_TOTAL = 1500.0  # median counts of a cell
_DISPERSION = 0.3  # of the gamma that a cell's expression is drawn from: variance = mean + 0.3 mean^2
_DONOR = 0.15  # standard deviation of a donor's log fold changes


@cache
def _symbols(species: Species) -> tuple[str, ...]:
    """Symbols of the genes with a one-to-one orthologue, in the order of the human ids, the same place in both species.

    Left out are genes whose symbol is not read back as themselves in either species.
    """
    table = orthologue_table("mouse")
    human = np.array(sorted(table))
    mouse = np.array([table[name] for name in human])
    names: dict[Species, list[str]] = {
        "human": [current_symbol(name) for name in human],
        "mouse": [current_symbol(name) for name in mouse],
    }
    good = (canonical_genes(names["human"], species="human").names == human) & (
        canonical_genes(names["mouse"], species="mouse").names == mouse
    )
    return tuple(np.array(names[species])[good].tolist())


def _log_means(n_genes: int, n_types: int) -> np.ndarray:
    """Log expression of each type (K, G); a type or gene keeps its values however many others there are."""
    base = np.random.default_rng(_BIOLOGY).normal(0.0, 1.0, n_genes)
    means = np.tile(base, (n_types, 1))
    for code in range(n_types):
        draws = np.random.default_rng([_BIOLOGY, code]).random((n_genes, 2))
        means[code] += np.where(draws[:, 0] < _MARKERS, 1.5 + draws[:, 1], 0.0)
    return means


def synthetic_cells(
    n_cells: int = 200,
    *,
    n_genes: int = 300,
    n_types: int = 4,
    n_donors: int = 3,
    seed: int = 0,
    species: str = "human",
    study_shift: float = 0.0,
) -> AnnData:
    """Made-up cells whose types can be learnt from their counts.

    Counts are negative binomial, a gamma-Poisson mixture. A type raises its marker genes by 1.5 to 2.5 log units; what
    marks a type does not depend on `seed`, so cells made with another seed are another study of the same types.

    Parameters
    ----------
    n_cells
        Number of cells, spread evenly over types and donors in random order.
    n_genes
        Number of genes. Symbols are real ones of genes with a one-to-one orthologue; gene j of human cells is the
        orthologue of gene j of mouse cells, with the same expression.
    n_types
        Number of types, the first of `TYPES`.
    n_donors
        Number of donors; each shifts every gene a little.
    seed
        Seed of cells, donors and study. Cell names hold it, so two studies share none.
    species
        ``"human"`` or ``"mouse"``.
    study_shift
        Standard deviation of the log fold changes of the whole study; 0.5 is a change of technology.

    Returns
    -------
    anndata.AnnData
        Counts (n_cells, n_genes), CSR, uint16; ``cell_type`` and ``donor`` in ``obs``.

    Raises
    ------
    SettingsError
        If there are not so many types, genes or cells to be made.

    Examples
    --------
    >>> synthetic_cells(50, n_types=2).obs["cell_type"].cat.categories.tolist()
    ['alpha', 'beta']
    """
    import pandas as pd
    from anndata import AnnData
    from scipy import sparse

    if species not in ("human", "mouse"):
        raise SettingsError(f"`{species}` is no species of evercell", hint="pass species='human' or 'mouse'")
    symbols = _symbols("mouse" if species == "mouse" else "human")
    for argument, value, most in (
        ("n_genes", n_genes, len(symbols)),
        ("n_types", n_types, len(TYPES)),
        ("n_donors", n_donors, n_cells),
    ):
        if not 1 <= value <= most:
            raise SettingsError(f"{value:,} was asked for; 1 to {most:,} can be made", hint=f"change {argument}")

    rng = np.random.default_rng(seed)
    types = rng.permutation(np.arange(n_cells, dtype=np.int64) % n_types)
    donors = np.empty(n_cells, dtype=np.int64)
    for code in range(n_types):  # each type from every donor
        rows = np.flatnonzero(types == code)
        donors[rows] = (np.arange(len(rows)) + code) % n_donors
    log_means = _log_means(n_genes, n_types)[types]  # (B, G)
    log_means += rng.normal(0.0, _DONOR, (n_donors, n_genes))[donors]
    log_means += study_shift * rng.standard_normal(n_genes)
    shares = np.exp(log_means)
    shares /= shares.sum(axis=1, keepdims=True)
    means = shares * (_TOTAL * np.exp(rng.normal(0.0, 0.3, (n_cells, 1))))
    counts = rng.poisson(rng.gamma(1 / _DISPERSION, means * _DISPERSION))
    return AnnData(
        sparse.csr_matrix(counts.astype(np.uint16)),
        obs=pd.DataFrame(
            {
                "cell_type": pd.Categorical([TYPES[code] for code in types], categories=TYPES[:n_types]),
                "donor": pd.Categorical([f"donor{code + 1}" for code in donors]),
            },
            index=[f"study{seed}_cell{row:05d}" for row in range(n_cells)],
        ),
        var=pd.DataFrame(index=list(symbols[:n_genes])),
    )


def with_ambient(cells: AnnData, share: float, *, seed: int = 0) -> AnnData:
    """Cells (N, G) of whose counts a share is replaced by draws from the mean of all cells: ambient RNA."""
    rng = np.random.default_rng(seed)
    found = cells.copy()
    counts = found.X.tocsr().astype(np.int64)
    soup = np.asarray(counts.sum(axis=0), dtype=np.float64).ravel()
    soup /= soup.sum()
    before = np.asarray(counts.sum(axis=1)).ravel()
    counts.data = rng.binomial(counts.data, 1 - share)
    lost = before - np.asarray(counts.sum(axis=1)).ravel()
    found.X = (counts + csr_matrix(rng.multinomial(lost, soup))).astype(np.float32)
    return found


def with_doublets(cells: AnnData, share: float, *, seed: int = 0) -> AnnData:
    """Cells (N, G) of which a share has the counts of another, drawn at random, added to its own."""
    rng = np.random.default_rng(seed)
    found = cells.copy()
    counts = found.X.tocsr().astype(np.float32)
    first = rng.permutation(cells.n_obs)[: round(share * cells.n_obs)]
    other = rng.integers(0, cells.n_obs, len(first))
    choice = csr_matrix((np.ones(len(first)), (first, other)), shape=(cells.n_obs, cells.n_obs))
    found.X = (counts + choice @ counts).astype(np.float32).tocsr()
    return found


def with_empty_droplets(cells: AnnData, share: float, *, depth: int = 30, seed: int = 0) -> AnnData:
    """Cells (N, G) and, to be a share of all, droplets of about `depth` counts from the mean of all cells."""
    import anndata as ad

    rng = np.random.default_rng(seed)
    counts = cells.X.tocsr().astype(np.float32)
    soup = np.asarray(counts.sum(axis=0), dtype=np.float64).ravel()
    n = round(share / (1 - share) * cells.n_obs)
    drops = csr_matrix(rng.multinomial(1 + rng.poisson(depth - 1, n), soup / soup.sum()), dtype=np.float32)
    empty = ad.AnnData(drops, var=cells.var)
    empty.obs_names = [f"droplet{i}" for i in range(n)]
    return ad.concat([cells, empty], merge="same")

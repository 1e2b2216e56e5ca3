"""What the cells of a file look like: depth, droplets without a cell, copies, damage, nuclei, ambient RNA, doublets.

All of it is told from the counts alone. Clusters are made of a sample of the cells; a sign that needs cells of several
kinds is left open where there is one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp

from evercell.cells import Counts
from evercell.doctor.genes import fits_its_names
from evercell.genes import CanonicalGenes
from evercell.stored_counts import cell_digests
from evercell.tokenizers import View

FAINT = 150  # counts; droplets without a cell hold tens
SAMPLED = 2000  # cells that are clustered
COMPONENTS, CLUSTERS, LEAST_CELLS = 10, 8, 10
VARIABLE = 1000  # genes that clusters are made of
SPECIFIC = 50  # genes that one cluster has and most others lack, by which ambient RNA is told
FEW_SPECIFIC = 10  # with fewer of them there are no clusters to tell it by
TIMES = 5  # how much more of such a gene its cluster has than the median one
LEAST_COUNTS = 200  # of a gene in the sample: of fewer a tenth may be none in a cluster of tens of cells
SIMULATED, NEIGHBOURS = 2, 30  # doublets simulated for each cell; neighbours by which a cell is told from them
AMONG_DOUBLETS = 0.85  # share of simulated neighbours above which a cell is where only doublets are expected
LEAST_TOLD = 100  # cells, below which shares of cells say little
LEAST_UBIQUITOUS = 10

UBIQUITOUS = (
    "ACTB", "ACTG1", "B2M", "BTF3", "CALM1", "CALM2", "CFL1", "COX4I1", "COX7C", "DDX5", "EEF1A1", "EEF2", "EIF1",
    "EIF4A2", "FAU", "FTH1", "FTL", "GAPDH", "H3-3B", "H3F3B", "HNRNPA1", "HNRNPA2B1", "HSP90AB1", "HSPA8", "MALAT1",
    "MYL6", "NACA", "NPM1", "OAZ1", "PFN1", "PPIA", "PTMA", "RACK1", "SERF2", "SLC25A6", "SRP14", "TMSB10", "TMSB4X",
    "TPT1", "TUBA1B", "UBA52", "UBC", "YWHAZ",
)  # fmt: skip
"""Genes that cells of every kind express."""

RIBOSOMAL = re.compile(r"RP(?:L|S|LP)\d+[AXYL]?")  # without pseudogenes, of which an annotation has hundreds

NUCLEAR = ("MALAT1", "NEAT1", "MEG3")
"""Transcripts that stay in the nucleus."""


@dataclass(frozen=True)
class Signs:
    """Numbers of the cells of a file; None where they cannot be told.

    Parameters
    ----------
    n_cells, empty, copies
        Cells; those without a count; those with the very counts of another cell.
    depth, n_genes
        Median counts and genes of a cell that is not empty.
    faint
        Share of cells with less than `FAINT` counts and a twentieth of those of the deepest tenth.
    mito, ribo, nuclear
        Share of all counts that are of mitochondrial genes, of ribosomal proteins, of `NUCLEAR`.
    damaged
        Share of cells of which a quarter of the counts or more are mitochondrial.
    fit
        See `evercell.doctor.genes.fits_its_names`.
    ambient
        Median over `SPECIFIC` genes of their share in the cluster that has least of them, over that in all cells.
    doublets
        Share of cells that lie among simulated doublets of unlike cells.
    """

    n_cells: int
    empty: int
    copies: int
    depth: float
    n_genes: float
    faint: float
    mito: float | None
    ribo: float | None
    nuclear: float | None
    damaged: float | None
    fit: float | None
    ambient: float | None
    doublets: float | None


def signs(counts: Counts, genes: CanonicalGenes, *, seed: int = 0) -> Signs:
    """Measure the cells of a file in one pass over its counts, and a sample of them in memory."""
    symbols = np.char.upper(np.asarray(genes.symbols, dtype=str))
    mitochondrial = np.char.startswith(symbols, "MT-")
    n_cells = counts.shape[0]
    drawn = np.unique(np.linspace(0, n_cells - 1, min(SAMPLED, n_cells)).round().astype(int))
    totals, n_genes, mito, prints, taken = [], [], [], [], []
    sums = np.zeros(counts.shape[1])
    for start, stop, block in counts.chunks():
        totals.append(np.asarray(block.sum(axis=1)).ravel())
        n_genes.append(np.diff(block.indptr))
        mito.append(np.asarray(block[:, np.flatnonzero(mitochondrial)].sum(axis=1)).ravel())
        prints += cell_digests(block)
        sums += np.asarray(block.sum(axis=0)).ravel()
        here = drawn[np.searchsorted(drawn, start) : np.searchsorted(drawn, stop)] - start
        taken.append(block[here])
    total, number, of_mito = np.concatenate(totals), np.concatenate(n_genes), np.concatenate(mito)
    filled = number > 0
    sample = sp.vstack(taken, format="csr")
    sample = sample[np.diff(sample.indptr) > 0]
    ambient, doublets = (None, None) if sample.shape[0] < LEAST_TOLD else _of_clusters(sample, seed)
    measured = {
        "mito": mitochondrial,
        "ribo": np.array([RIBOSOMAL.fullmatch(one) is not None for one in symbols], dtype=bool),
        "nuclear": np.isin(symbols, NUCLEAR),
    }
    shares = {
        name: float(sums[which].sum() / max(sums.sum(), 1)) if which.any() else None for name, which in measured.items()
    }
    everywhere = np.isin(symbols, UBIQUITOUS) | measured["ribo"]
    told = LEAST_UBIQUITOUS <= everywhere.sum() < len(everywhere) and filled.any()
    high = of_mito[filled] >= 0.25 * total[filled]
    return Signs(
        n_cells=n_cells,
        empty=int((~filled).sum()),
        copies=int(filled.sum()) - len({one for one, there in zip(prints, filled, strict=True) if there}),
        depth=float(np.median(total[filled])) if filled.any() else 0.0,
        n_genes=float(np.median(number[filled])) if filled.any() else 0.0,
        faint=float(np.mean(total[filled] < min(np.quantile(total[filled], 0.9) / 20, FAINT))) if filled.any() else 0.0,
        **shares,
        damaged=float(high.mean()) if mitochondrial.any() and filled.any() else None,
        fit=fits_its_names(sums, everywhere) if told else None,
        ambient=ambient,
        doublets=doublets,
    )


def _of_clusters(sample: sp.csr_matrix, seed: int) -> tuple[float | None, float | None]:
    """Signs of ambient RNA and of doublets in cells (N, G), none of them empty."""
    from sklearn.cluster import KMeans
    from sklearn.decomposition import TruncatedSVD

    logged = View.whole(sample).logged()
    mean = np.asarray(logged.mean(axis=0)).ravel()
    variance = np.asarray(logged.multiply(logged).mean(axis=0)).ravel() - mean**2
    columns = np.sort(np.argsort(-variance, kind="stable")[:VARIABLE])
    if len(columns) <= COMPONENTS:
        return None, None
    svd = TruncatedSVD(COMPONENTS, n_iter=2, random_state=seed)
    points = svd.fit_transform(logged[:, columns])
    clusters = KMeans(CLUSTERS, n_init=1, random_state=seed).fit_predict(points)
    rng = np.random.default_rng(seed)
    pairs = rng.integers(0, sample.shape[0], size=(2, SIMULATED * sample.shape[0]))
    made = svd.transform(View.whole(sample[pairs[0]] + sample[pairs[1]]).logged()[:, columns])
    return _ambient(sample, clusters), _among(points, made)


def _ambient(sample: sp.csr_matrix, clusters: np.ndarray) -> float | None:
    """Level of cluster-specific genes where they should not be, as a share of their level in all cells.

    If a share r of every cell's counts is drawn from the mean of all cells, a gene that a cluster does not express is
    there at r times its mean. That is the idea of SoupX (Young and Behjati, GigaScience 2020).
    """
    sizes = np.bincount(clusters)
    kept = np.flatnonzero(sizes >= LEAST_CELLS)
    sums = np.stack([np.asarray(sample[clusters == one].sum(axis=0)).ravel() for one in kept])
    if len(kept) < 3:
        return None
    levels = sums / sums.sum(axis=1, keepdims=True)
    times = np.where(sums.sum(axis=0) >= LEAST_COUNTS, levels.max(axis=0), 0) / np.maximum(np.median(levels, 0), 1e-9)
    specific = np.argsort(-times, kind="stable")[:SPECIFIC]
    specific = specific[times[specific] > TIMES]
    if len(specific) < FEW_SPECIFIC:
        return None
    overall = sums.sum(axis=0) / sums.sum()
    return float(np.median(levels.min(axis=0)[specific] / overall[specific]))


def _among(points: np.ndarray, made: np.ndarray) -> float:
    """Share of the cells whose neighbours are simulated doublets almost only.

    Doublets of like cells fall among cells of their kind, so what is left are places where only doublets of unlike
    cells come to lie. That is the idea of Scrublet (Wolock et al., Cell Systems 2019) without its threshold.
    """
    from sklearn.neighbors import NearestNeighbors

    every = np.concatenate([points, made])
    neighbours = min(NEIGHBOURS, len(points) // 3)
    near = NearestNeighbors(n_neighbors=neighbours + 1).fit(every).kneighbors(points, return_distance=False)[:, 1:]
    return float(((near >= len(points)).mean(axis=1) > AMONG_DOUBLETS).mean())

"""Profiles of the types over their marker genes: a member of the model beside transformer and linear model.

A cell is compared with the mean expression of each type over a few genes that mark one type or another. Nothing is
learnt but means, so a type of two cells is told about as well as one of two thousand, and what a study shifts in all of
its genes alike is divided out. A cell's depth is counted over the genes that all studies measured, because counts of a
panel, scaled to the panel's total, would be higher than those of whole transcriptomes. That is the idea of SingleR
(Aran et al., Nature Immunology 2019); this member takes correlations about the mean over the types rather than of
ranks, and one round of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_matrix

from evercell.bank import kinds_of
from evercell.stored_counts import CellCounts
from evercell.tokenizers.base import View

MARKERS = 10
"""Genes a type by which it stands above the mean of the others, and as many by which it stands above the next one."""
ENOUGH = 10
"""Cells of a type from which on a study weighs no more in its profile."""
SHARED, ROUNDS = 2, 10
"""Types that count against what a study adds, as if it added nothing to them; rounds in which it is found."""
LEAST_SHARED = 200
"""Genes that all studies measured, from which on a cell's depth is counted over these alone."""
LEAST = 1e-9
NEVER = -30.0  # log-probability of a type without cells, as in the linear model


@dataclass(frozen=True)
class ProfileModel:
    """Mean expression of each type over marker genes.

    Parameters
    ----------
    genes
        Columns of the marker genes (M,), int64.
    means
        Mean of ``log(1 + 10^4 count / depth)`` in each type (M, K), float32; for a type without cells, or without
        cells in which the gene was measured, the mean over the other types.
    depth
        What a count of each gene adds to a cell's depth (G,), float32: the same for genes that all studies measured,
        so that the depth of a cell is about its total count, and 0 for others.
    known
        Types with cells (K,), bool; the others are held to be improbable.
    sharpness
        What correlations are multiplied by to be log-odds.
    share
        Weight of these log-probabilities in the model's average; transformer and linear model have the rest.
    """

    genes: np.ndarray
    means: np.ndarray
    depth: np.ndarray
    known: np.ndarray
    sharpness: float = 20.0
    share: float = 1 / 3

    @property
    def n_types(self) -> int:
        """Number of types K."""
        return int(self.means.shape[1])

    @property
    def settings(self) -> dict[str, float]:
        """What is not in `arrays`."""
        return {"sharpness": self.sharpness, "share": self.share}

    def arrays(self) -> dict[str, np.ndarray]:
        """As a model stores them."""
        return {"genes": self.genes, "means": self.means, "depth": self.depth, "known": self.known}

    def compared(self, measured: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Marker genes among those measured (G,): their columns (M,), the mean over types (M,) and what each type has
        about it, of length 1 (M, K), float32.
        """
        rows = np.flatnonzero(measured[self.genes])
        return self.genes[rows], *directions(self.means[rows])

    def log_proba(self, view: View) -> np.ndarray:
        """Log-probabilities of the types (B, K), float32. Each row depends on its own cell alone."""
        view = deep(view.counts, self.depth, view.measured)
        logits = self.sharpness * correlations(view, *self.compared(view.measured))
        logits[:, ~self.known] = NEVER
        logits -= logits.max(axis=1, keepdims=True)
        found: np.ndarray = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        return found.astype(np.float32)


def deep(counts: csr_matrix, depth: np.ndarray, measured: np.ndarray) -> View:
    """Cells whose totals are their depths."""
    return View(counts, counts @ depth, measured)


def directions(means: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean over the types (M,), and the means of the types (M, K) about it, each of length 1, or 0."""
    centre = means.mean(axis=1)
    about = means - centre[:, None]
    return centre, about / np.maximum(np.linalg.norm(about, axis=0), LEAST)


def correlations(view: View, genes: np.ndarray, centre: np.ndarray, profiles: np.ndarray) -> np.ndarray:
    """Correlation of each cell with profiles (M, K) over some genes (M,), about a centre (M,): (B, K)."""
    logged = View(view.counts[:, genes], view.totals, view.measured).logged()
    # Sparse products go gene by gene in each cell's own row, so that a cell is rounded alike in any company.
    along = logged @ np.column_stack([profiles, centre])  # (B, K + 1)
    squares = logged.multiply(logged).tocsr() @ np.ones(len(genes), dtype=np.float32)
    length = np.sqrt(np.maximum(squares - 2 * along[:, -1] + (centre**2).sum(), LEAST))
    found: np.ndarray = (along[:, :-1] - centre @ profiles) / length[:, None]
    return found


def fit_profiles(
    counts: csr_matrix | CellCounts, codes: np.ndarray, studies: np.ndarray, measured: np.ndarray, *, n_types: int
) -> ProfileModel:
    """Take the means of the types and choose marker genes.

    Within a type, studies with cells enough weigh alike: the bank's few cells of a study stand for all of it.

    Parameters
    ----------
    counts
        Counts (N, G).
    codes, studies
        Type and study of each cell (N,).
    measured
        Genes that each study measured (S, G), bool.
    n_types
        Number of types K.
    """
    if not isinstance(counts, CellCounts):
        counts = CellCounts.of(counts)
    kinds = kinds_of(codes, studies)
    sizes = np.bincount(kinds)
    first = np.unique(kinds, return_index=True)[1]
    depth = depth_of(counts, studies, measured)
    sums, start = np.zeros((len(sizes), measured.shape[1]), dtype=np.float32), 0
    for block in counts.blocks():
        rows = np.arange(block.shape[0])
        own = kinds[start : start + len(rows)]
        members = csr_matrix((np.ones(len(rows), dtype=np.float32), (own, rows)), (len(sizes), len(rows)))
        sums += (members @ deep(block, depth, measured[0]).logged()).toarray()
        start += len(rows)
    means, seen = _of_types(sums / sizes[:, None], sizes, codes[first], studies[first], measured, n_types)
    overall = means.sum(axis=0) / np.maximum(seen.sum(axis=0), 1)
    genes = _markers(means, seen)
    found = np.where(seen, means, overall)[:, genes].T
    means = np.ascontiguousarray(found, dtype=np.float32)
    return ProfileModel(genes, means, depth, np.bincount(codes, minlength=n_types) > 0)


def depth_of(counts: CellCounts, studies: np.ndarray, measured: np.ndarray) -> np.ndarray:
    """`ProfileModel.depth` (G,) from counts (N, G), the study of each cell (N,) and the genes that each study measured
    (S, G).
    """
    present = np.unique(studies)
    shared = measured[present].all(axis=0)
    widest = present[measured[present].sum(axis=1).argmax()]
    if shared.sum() < LEAST_SHARED or shared[measured[widest]].all():
        return np.ones(measured.shape[1], dtype=np.float32)
    counted, start, sums = shared.astype(np.float32), 0, np.zeros(2)
    for block in counts.blocks():
        own = block[studies[start : start + block.shape[0]] == widest]
        sums += (own @ counted).sum(), own.sum()
        start += block.shape[0]
    return counted * np.float32(sums[1] / max(sums[0], 1.0))


def _of_types(
    means: np.ndarray, sizes: np.ndarray, types: np.ndarray, studies: np.ndarray, measured: np.ndarray, n_types: int
) -> tuple[np.ndarray, np.ndarray]:
    """Means of the types (K, G), 0 where they were not seen, and where they were, from means of kinds (N, G).

    A kind's mean is held to be that of its type and what its study adds to all of its types alike. What a study adds is
    told by the types that others show too; else cells of that study would look like the types that it alone shows.
    """
    weights = np.minimum(sizes, ENOUGH)[:, None] * measured[studies].astype(np.float32)
    of_types = csr_matrix(
        (np.ones(len(types), dtype=np.float32), (types, np.arange(len(types)))), (n_types, len(types))
    )
    of_studies = csr_matrix((np.ones(len(types), dtype=np.float32), (studies, np.arange(len(types)))))
    total = of_types @ weights
    telling = weights * ((of_types @ (weights > 0).astype(np.float32)) > 1)[types]
    told = of_studies @ telling + SHARED * ENOUGH
    added = np.zeros((of_studies.shape[0], means.shape[1]), dtype=np.float32)
    for _ in range(ROUNDS):
        found = of_types @ (weights * (means - added[studies])) / np.maximum(total, LEAST)
        added = of_studies @ (telling * (means - found[types])) / told
    return found, total > 0


def _markers(means: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """Columns of marker genes (M,), from means (K, G) that are 0 where they were not `seen`."""
    seen = seen & (seen.sum(axis=0) > 1)  # what one type alone was measured in parts it from none
    others = (means.sum(axis=0) - means) / np.maximum(seen.sum(axis=0) - seen, 1)
    highest = np.sort(means, axis=0)[::-1]
    next_best = np.where(means == highest[0], highest[min(1, len(highest) - 1)], highest[0])
    found = [np.zeros(0, dtype=np.int64)]
    for below in (others, next_best):
        above = np.where(seen, means - below, -np.inf)
        best = np.argsort(-above, axis=1, kind="stable")[:, :MARKERS]
        found.append(best[np.take_along_axis(above, best, axis=1) > 0])
    return np.unique(np.concatenate(found))

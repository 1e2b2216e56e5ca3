"""Example bank: raw counts of a few cells of every type, kept with the model.

The bank is what an update replays so that old types are not forgotten, and what the model's light parts are fitted on
again when a query measures only a part of the genes. It holds raw counts, so a later model with more genes can use it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.sparse import csr_matrix, vstack

BANKS = ("cells", "sketch")
"""What a stage may leave behind for later ones: example cells, or a sketch of its types (`evercell.sketches`)."""


@dataclass(frozen=True)
class ExampleBank:
    """Example cells.

    Parameters
    ----------
    counts
        Raw counts (N, G), CSR, over the model's genes.
    codes
        Type code of each cell (N,).
    stages
        Stage in which each cell was added (N,), from 1.
    studies
        Row of `measured` for each cell (N,).
    measured
        Genes that each study measured (S, G), bool.
    """

    counts: csr_matrix
    codes: np.ndarray
    stages: np.ndarray
    studies: np.ndarray
    measured: np.ndarray

    def __len__(self) -> int:
        return len(self.codes)

    def taken(self, rows: np.ndarray) -> ExampleBank:
        """The bank with only the cells `rows`, studies without cells dropped."""
        studies, renumbered = np.unique(self.studies[rows], return_inverse=True)
        return ExampleBank(self.counts[rows], self.codes[rows], self.stages[rows], renumbered, self.measured[studies])

    def joined(self, other: ExampleBank) -> ExampleBank:
        """Cells of both banks; `other` may know more genes, appended behind those of this one."""
        this = self.widened(other.counts.shape[1])
        return ExampleBank(
            vstack([this.counts, other.counts], format="csr"),
            np.concatenate([this.codes, other.codes]),
            np.concatenate([this.stages, other.stages]),
            np.concatenate([this.studies, other.studies + len(this.measured)]),
            np.vstack([this.measured, other.measured]),
        )

    def over_genes(self, n_genes: int) -> ExampleBank:
        """The bank over the first `n_genes` genes."""
        return replace(self, counts=self.counts[:, :n_genes].tocsr(), measured=self.measured[:, :n_genes])

    def widened(self, n_genes: int) -> ExampleBank:
        """The bank over a longer gene list; the new genes were not measured."""
        more = n_genes - self.counts.shape[1]
        if more == 0:
            return self
        counts = csr_matrix((self.counts.data, self.counts.indices, self.counts.indptr), shape=(len(self), n_genes))
        return replace(self, counts=counts, measured=np.pad(self.measured, ((0, 0), (0, more))))


def quotas(sizes: Sequence[int], total: int) -> np.ndarray:
    """How many cells each type may keep (K,): equal shares of `total`; what a small type leaves goes to larger ones.

    The sum is exactly ``min(total, sum(sizes))``, and no type with cells is left without one as long as `total` is at
    least the number of types.
    """
    left = np.asarray(sizes, dtype=np.int64).copy()
    kept = np.zeros_like(left)
    remaining = min(int(total), int(left.sum()))
    while remaining > 0:
        open_types = np.flatnonzero(left > 0)
        share = max(remaining // len(open_types), 1)
        for code in open_types[:remaining] if share == 1 else open_types:
            step = min(share, int(left[code]), remaining)
            kept[code] += step
            left[code] -= step
            remaining -= step
    return kept


def kinds_of(codes: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Number of each cell's kind (N,), from 0: cells of one type in one group, such as a study or a stage."""
    found: np.ndarray = np.unique(np.stack([groups, codes]), axis=1, return_inverse=True)[1].ravel()
    return found


def balanced_rows(codes: np.ndarray, total: int, rng: np.random.Generator) -> np.ndarray:
    """Sorted rows of a class-balanced random choice of at most `total` cells."""
    kept = quotas(np.bincount(codes).tolist(), total)
    rows = [rng.permutation(np.flatnonzero(codes == code))[:number] for code, number in enumerate(kept)]
    return np.sort(np.concatenate(rows)) if rows else np.zeros(0, dtype=np.int64)

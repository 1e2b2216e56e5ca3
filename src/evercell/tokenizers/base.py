"""What every tokenizer shares: the batch of tokens, and the padding of ragged cells."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from scipy.sparse import csr_matrix, vstack

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

TOTAL = 1e4  # counts a cell is scaled to before the logarithm, as in Scanpy's usual recipe


@dataclass(frozen=True)
class TokenBatch:
    """Tokens of a batch of cells.

    Parameters
    ----------
    gene_ids
        Code of each token's gene in the model's vocabulary (B, L), int64; 0 where padded.
    values
        Value of each token (B, L), float32; 0 where padded.
    mask
        True where there is a token, False where padded (B, L), bool.
    totals
        Counts of each cell over the genes that were measured (B,), float32, for backbones that look at the depth; None
        where tokens are made of something else than counts.
    """

    gene_ids: torch.Tensor
    values: torch.Tensor
    mask: torch.Tensor
    totals: torch.Tensor | None = None

    def __len__(self) -> int:
        return int(self.gene_ids.shape[0])

    def taken(self, cells: slice) -> TokenBatch:
        """Some of the cells, padded as they are."""
        totals = None if self.totals is None else self.totals[cells]
        return TokenBatch(self.gene_ids[cells], self.values[cells], self.mask[cells], totals)

    def to(self, device: torch.device | str) -> TokenBatch:
        """Copy on another device."""
        totals = None if self.totals is None else self.totals.to(device)
        return TokenBatch(self.gene_ids.to(device), self.values.to(device), self.mask.to(device), totals)


@dataclass(frozen=True)
class View:
    """Counts of some cells as a model is to see them: all of them, or a random part of them in training.

    Parameters
    ----------
    counts
        Counts (B, G), CSR, sorted indices, without explicit zeros.
    totals
        Counts of each cell over the genes that were measured (B,), float32. Kept apart from `counts` because gene
        dropout hides genes without changing how deeply the cell was sequenced.
    measured
        Genes that the study measured (G,), bool.
    """

    counts: csr_matrix
    totals: np.ndarray
    measured: np.ndarray

    @classmethod
    def whole(cls, counts: csr_matrix, measured: np.ndarray | None = None) -> View:
        """Every count of the cells, as at annotation."""
        totals = np.asarray(counts.sum(axis=1), dtype=np.float32).ravel()
        if measured is None:
            measured = np.ones(counts.shape[1], dtype=bool)
        return cls(counts, totals, measured)

    def taken(self, rows: np.ndarray) -> View:
        """Only the cells `rows`."""
        return View(self.counts[rows], self.totals[rows], self.measured)

    @classmethod
    def joined(cls, views: Sequence[View]) -> View:
        """Cells of several views, one after the other; genes are measured where any of them measured them."""
        counts = vstack([view.counts for view in views], format="csr")
        measured = np.any([view.measured for view in views], axis=0)
        return cls(counts, np.concatenate([view.totals for view in views]), measured)

    def log_normalised(self) -> np.ndarray:
        """``log(1 + 10^4 count / total)`` of every stored count (nnz,), float32."""
        scale = TOTAL / np.maximum(self.totals, 1.0)
        per_count = np.repeat(scale.astype(np.float32), np.diff(self.counts.indptr))
        return np.log1p(self.counts.data * per_count)

    def logged(self) -> csr_matrix:
        """`log_normalised` as a matrix (B, G), CSR."""
        counts = self.counts
        return csr_matrix((self.log_normalised(), counts.indices, counts.indptr), shape=counts.shape)


class Tokenizer(ABC):
    """Turns counts into tokens. Stateless but for its settings, which `settings` names and the model stores."""

    name: ClassVar[str]
    n_bins: ClassVar[int | None] = None
    """Number of value classes where values are bin codes, None where they are real numbers."""
    mask_value: ClassVar[int | None] = None
    """Bin code of a masked token, where values are bin codes; no token has it and it is not the 0 of padding."""

    @abstractmethod
    def tokenize(self, view: View) -> TokenBatch:
        """Tokens of the cells of a view; depends on each cell alone."""

    @property
    def settings(self) -> dict[str, Any]:
        """Arguments that make the same tokenizer again."""
        return {}


def padded(
    indptr: np.ndarray, gene_ids: np.ndarray, values: np.ndarray, totals: np.ndarray | None = None
) -> TokenBatch:
    """Pad ragged rows to the longest one.

    Parameters
    ----------
    indptr
        Start of every row (B + 1,).
    gene_ids, values
        Codes and values of all tokens, row after row (nnz,).
    totals
        Counts of each cell (B,), where the tokens are of a view.
    """
    import torch

    lengths = np.diff(indptr)
    longest = max(int(lengths.max(initial=0)), 1)
    mask = np.arange(longest) < lengths[:, None]
    ids = np.zeros(mask.shape, dtype=np.int64)
    filled = np.zeros(mask.shape, dtype=np.float32)
    ids[mask] = gene_ids
    filled[mask] = values
    depth = None if totals is None else torch.from_numpy(totals.astype(np.float32))
    return TokenBatch(torch.from_numpy(ids), torch.from_numpy(filled), torch.from_numpy(mask), depth)

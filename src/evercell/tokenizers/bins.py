"""`bins`: expression in classes, as scBERT and CANAL have it.

Source: Yang et al., Nature Machine Intelligence 2022 (scBERT); Wan et al., Briefings in Bioinformatics 2024 (CANAL).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from evercell.tokenizers.base import TokenBatch, Tokenizer, View, padded

if TYPE_CHECKING:
    from typing import ClassVar

N_BINS = 7  # zero, five levels of expression, mask


def expression_bins(view: View, lowest: int = 1) -> np.ndarray:
    """Bin of every stored count (nnz,), float32: its log-normalised value (base 2) floored, from `lowest` to 5."""
    bins: np.ndarray = np.clip(np.floor(view.log_normalised() / np.log(2.0)), lowest, N_BINS - 2).astype(np.float32)
    return bins


class BinsTokenizer(Tokenizer):
    """Log-normalised counts (base 2) floored into bins: 0 for none, 1 to 5 for expressed, 6 for masked.

    Parameters
    ----------
    zeros
        Give measured genes without a count a token of bin 0, as the published systems do. Without, only expressed
        genes have tokens. An expressed gene is never in bin 0: values below one are raised to bin 1.
    """

    name: ClassVar[str] = "bins"
    n_bins: ClassVar[int | None] = N_BINS
    mask_value: ClassVar[int | None] = N_BINS - 1

    def __init__(self, zeros: bool = False, raised: bool = True) -> None:
        self.zeros, self.raised = zeros, raised

    @property
    def settings(self) -> dict[str, Any]:
        """Arguments that make the same tokenizer again."""
        # Named only where it is chosen: what older models store of their settings stays as it is.
        return {"zeros": self.zeros} | ({} if self.raised else {"raised": False})

    def tokenize(self, view: View) -> TokenBatch:
        """Tokens (B, L), L the number of measured genes with `zeros`, else the most genes that one cell expresses."""
        bins = expression_bins(view, lowest=int(self.raised))
        counts = view.counts
        if not self.zeros:
            return padded(counts.indptr, counts.indices, bins, view.totals)
        measured = np.flatnonzero(view.measured)
        place = np.full(counts.shape[1], -1)
        place[measured] = np.arange(len(measured))
        rows = np.repeat(np.arange(counts.shape[0]), np.diff(counts.indptr))
        kept = place[counts.indices] >= 0
        dense = np.zeros((counts.shape[0], len(measured)), dtype=np.float32)
        dense[rows[kept], place[counts.indices[kept]]] = bins[kept]
        starts = np.arange(counts.shape[0] + 1) * len(measured)
        return padded(starts, np.tile(measured, counts.shape[0]), dense.ravel(), view.totals)

"""`performer`: linear attention over gene tokens by positive random features, in scBERT's size.

Source: Choromanski et al., ICLR 2021 (FAVOR+); width 200, depth 6 and 10 heads as in scBERT and CANAL.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from evercell.backbones.base import FeedForward, TokenBackbone, ValueEncoder, heads, joined


def orthogonal_features(n_features: int, size: int, generator: torch.Generator) -> Tensor:
    """Random projection (n_features, size), orthogonal in blocks, rows with the norms of Gaussian vectors."""
    blocks = []
    for _ in range(math.ceil(n_features / size)):
        orthogonal, _ = torch.linalg.qr(torch.randn(size, size, generator=generator))
        blocks.append(orthogonal.T)
    norms = torch.randn(n_features, size, generator=generator).norm(dim=1, keepdim=True)
    return torch.cat(blocks)[:n_features] * norms


class LinearAttention(nn.Module):
    """Softmax attention approximated in time linear in the tokens.

    The projection is drawn once and stored with the weights, so a frozen model always gives the same numbers.
    """

    projection: Tensor

    def __init__(self, width: int, n_heads: int, generator: torch.Generator) -> None:
        super().__init__()
        self.n_heads = n_heads
        size = width // n_heads
        n_features = max(int(size * math.log(size)), 1)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)
        self.register_buffer("projection", orthogonal_features(n_features, size, generator))

    def features(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Positive features exp(w'x - |x|^2 / 2) (B, H, S, F); those of padded tokens are 0 where a mask is given."""
        x = x * x.shape[-1] ** -0.25
        projected = x @ self.projection.T - x.square().sum(dim=-1, keepdim=True) / 2
        if mask is None:  # queries: any factor a row cancels in the normalisation
            return torch.exp(projected - projected.amax(dim=-1, keepdim=True)) + 1e-4
        projected = projected.masked_fill(~mask[:, None, :, None], -torch.inf)
        peak = projected.amax(dim=(-1, -2), keepdim=True)  # keys: one factor a head and cell cancels
        return (torch.exp(projected - peak) + 1e-4) * mask[:, None, :, None]

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """(B, S, D) -> (B, S, D)."""
        query, key, value = heads(self.query_key_value(x), self.n_heads)
        query, key = self.features(query, None), self.features(key, mask)
        context = key.transpose(-1, -2) @ value  # (B, H, F, D / H)
        weight = (query * key.sum(dim=2, keepdim=True)).sum(dim=-1, keepdim=True)
        out: Tensor = self.output(joined(query @ context / weight))
        return out


class PerformerBlock(nn.Module):
    """Pre-norm block with linear attention."""

    def __init__(self, width: int, n_heads: int, expansion: int, generator: torch.Generator) -> None:
        super().__init__()
        self.norm_attention = nn.LayerNorm(width)
        self.norm_feed_forward = nn.LayerNorm(width)
        self.attention = LinearAttention(width, n_heads, generator)
        self.feed_forward = FeedForward(width, expansion)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """(B, S, D) -> (B, S, D)."""
        x = x + self.attention(self.norm_attention(x), mask)
        out: Tensor = x + self.feed_forward(self.norm_feed_forward(x))
        return out


class PerformerBackbone(TokenBackbone):
    """Gene plus value embeddings, blocks of linear attention, mean over the tokens.

    Parameters
    ----------
    n_genes
        Size of the vocabulary; scBERT has 16,906 genes, CANAL keeps 1,000 variable ones.
    n_bins
        Value classes of the tokenizer, None for real values.
    width, depth, n_heads, expansion
        D, number of blocks, heads, and feed-forward expansion.
    """

    name: ClassVar[str] = "performer"

    def __init__(
        self,
        n_genes: int,
        *,
        n_bins: int | None = None,
        width: int = 200,
        depth: int = 6,
        n_heads: int = 10,
        expansion: int = 4,
    ) -> None:
        super().__init__()
        self.width = width
        self._settings = {"width": width, "depth": depth, "n_heads": n_heads, "expansion": expansion}
        # The projections are part of the architecture, not of a run: a fixed seed makes two new models comparable.
        generator = torch.Generator().manual_seed(0)
        self.gene_embedding = nn.Embedding(n_genes, width)
        self.value_encoder = ValueEncoder(width, n_bins)
        self.blocks = nn.ModuleList(PerformerBlock(width, n_heads, expansion, generator) for _ in range(depth))
        self.final_norm = nn.LayerNorm(width)

    @property
    def settings(self) -> dict[str, Any]:
        """Arguments, besides the number of genes, that make the same architecture again."""
        return dict(self._settings)

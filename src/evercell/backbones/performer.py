"""`performer`: linear attention over gene tokens by positive random features, in scBERT's size.

Source: Choromanski et al., ICLR 2021 (FAVOR+); width 200, depth 6 and 10 heads as in scBERT and CANAL. With
`published_kernel`, `extra_token` and `head_width` 64 it gives the numbers of their checkpoints (`evercell.importing`).
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from evercell.backbones.base import FeedForward, TokenBackbone, ValueEncoder, heads, joined
from evercell.errors import SettingsError
from evercell.tokenizers.base import TokenBatch


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

    def __init__(
        self,
        width: int,
        n_heads: int,
        generator: torch.Generator,
        *,
        head_width: int | None = None,
        n_features: int | None = None,
        published_kernel: bool = False,
    ) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.published_kernel = published_kernel
        size = width // n_heads if head_width is None else head_width
        n_features = max(int(size * math.log(size)), 1) if n_features is None else n_features
        inner = width if head_width is None else n_heads * size
        self.query_key_value = nn.Linear(width, 3 * inner)
        self.output = nn.Linear(inner, width)
        self.register_buffer("projection", orthogonal_features(n_features, size, generator))

    def features(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Positive features exp(w'x - |x|^2 / 2) (B, H, S, F); those of padded tokens are 0 where a mask is given."""
        x = x * x.shape[-1] ** -0.25
        if self.published_kernel:
            return self._published_features(x, mask)
        projected = x @ self.projection.T - x.square().sum(dim=-1, keepdim=True) / 2
        if mask is None:  # queries: any factor a row cancels in the normalisation
            return torch.exp(projected - projected.amax(dim=-1, keepdim=True)) + 1e-4
        projected = projected.masked_fill(~mask[:, None, :, None], -torch.inf)
        peak = projected.amax(dim=(-1, -2), keepdim=True)  # keys: one factor a head and cell cancels
        return (torch.exp(projected - peak) + 1e-4) * mask[:, None, :, None]

    def _published_features(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """As performer-pytorch has them: the largest w'x is taken off without |x|^2 / 2.

        So a query or key of large norm is lost in the 1e-4 that is added. Of keys it is the largest of the batch there;
        here that of the cell, as if each cell were a batch of its own.
        """
        projected = x @ self.projection.T
        norm = x.square().sum(dim=-1, keepdim=True) / 2
        if mask is None:
            return torch.exp(projected - norm - projected.amax(dim=-1, keepdim=True)) + 1e-4
        real = mask[:, None, :, None]
        peak = projected.masked_fill(~real, -torch.inf).amax(dim=(1, 2, 3), keepdim=True)
        return (torch.exp((projected - norm - peak).masked_fill(~real, -torch.inf)) + 1e-4) * real

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

    def __init__(self, width: int, n_heads: int, expansion: int, generator: torch.Generator, **attention: Any) -> None:
        super().__init__()
        self.norm_attention = nn.LayerNorm(width)
        self.norm_feed_forward = nn.LayerNorm(width)
        self.attention = LinearAttention(width, n_heads, generator, **attention)
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
    head_width
        Width of a head; by default that of the tokens is shared out. scBERT has 10 heads of 64 at width 200.
    n_features
        Random features of a head; by default ``d log d`` of its width d.
    published_kernel
        The random features as performer-pytorch computes them, for weights that were trained so.
    extra_token
        Every cell has one token more, of value 0 and of no gene, as scBERT's cells have.
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
        head_width: int | None = None,
        n_features: int | None = None,
        published_kernel: bool = False,
        extra_token: bool = False,
    ) -> None:
        super().__init__()
        if extra_token and n_bins is None:
            raise SettingsError("the extra token has the value 0 of a bin", hint="use it with the tokenizer bins")
        self.width = width
        self._settings = {"width": width, "depth": depth, "n_heads": n_heads, "expansion": expansion}
        attention = {"head_width": head_width, "n_features": n_features, "published_kernel": published_kernel}
        # Named only where they are chosen: what older models store of their settings stays as it is.
        chosen = {**attention, "extra_token": extra_token}
        self._settings |= {name: value for name, value in chosen.items() if value not in (None, False)}
        # The projections are part of the architecture, not of a run: a fixed seed makes two new models comparable.
        generator = torch.Generator().manual_seed(0)
        self.gene_embedding = nn.Embedding(n_genes, width)
        self.value_encoder = ValueEncoder(width, n_bins)
        self.blocks = nn.ModuleList(
            PerformerBlock(width, n_heads, expansion, generator, **attention) for _ in range(depth)
        )
        self.final_norm = nn.LayerNorm(width)
        self.extra_embedding = nn.Parameter(torch.zeros(width)) if extra_token else None

    @property
    def settings(self) -> dict[str, Any]:
        """Arguments, besides the number of genes, that make the same architecture again."""
        return dict(self._settings)

    def embedded(self, tokens: TokenBatch) -> tuple[Tensor, Tensor]:
        """Embedded tokens (B, L, D) and their mask (B, L), the extra token as the last."""
        states, mask = super().embedded(tokens)
        if self.extra_embedding is None:
            return states, mask
        n_cells = states.shape[0]  # not `len`, which would make it a constant where the model is traced
        extra = self.extra_embedding + self.value_encoder(torch.zeros(n_cells, 1, device=states.device))
        return torch.cat([states, extra], dim=1), torch.cat([mask, mask.new_ones(n_cells, 1)], dim=1)

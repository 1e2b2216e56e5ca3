"""What every backbone shares: the interface, the value encoding, the transformer block."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from evercell.tokenizers.base import TokenBatch


class Backbone(nn.Module, ABC):
    """Turns tokens into one representation a cell.

    Every backbone embeds genes in `gene_embedding` (G, D), which grows when a model learns of new genes, and splits its
    way into `states` (what a decoder may ask) and `pool`.
    """

    name: ClassVar[str]
    gene_embedding: nn.Embedding
    width: int
    threaded: ClassVar[bool] = False
    """Whether the backbone spreads its own work over the cores of the CPU (see `threads`)."""
    members: int = 1
    """Networks that are trained side by side, each on its own loss; equal parts of the representation are theirs."""

    @abstractmethod
    def states(self, tokens: TokenBatch) -> tuple[Tensor, Tensor | None]:
        """States (B, S, D) and which of them are real (B, S), None where all are."""

    @abstractmethod
    def pool(self, states: Tensor, mask: Tensor | None) -> Tensor:
        """Representation (B, D) of the states (B, S, D)."""

    def forward(self, tokens: TokenBatch) -> Tensor:
        """Representation of each cell (B, D)."""
        return self.pool(*self.states(tokens))

    def last_layers(self) -> list[nn.Module]:
        """Modules that a light fine-tuning trains: the last block and the final norm, as in CANAL."""
        return [module for name, module in self.named_children() if name in ("final_norm",)] + [self.blocks[-1]]

    blocks: nn.ModuleList

    @property
    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Arguments, besides the number of genes, that make the same architecture again."""


class ValueEncoder(nn.Module):
    """Embeds token values (B, L) -> (B, L, D): a table for bins, a small network for real values."""

    def __init__(self, width: int, n_bins: int | None) -> None:
        super().__init__()
        self.n_bins = n_bins
        if n_bins is not None:
            self.table = nn.Embedding(n_bins, width)
        else:
            self.network = nn.Sequential(nn.Linear(1, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, values: Tensor) -> Tensor:
        """Embedded values (B, L, D)."""
        encoded: Tensor = self.table(values.long()) if self.n_bins is not None else self.network(values.unsqueeze(-1))
        return encoded


class TokenBackbone(Backbone):
    """A backbone with one state a token: gene plus value embeddings, blocks over the tokens, their mean."""

    value_encoder: ValueEncoder
    final_norm: nn.LayerNorm

    def embedded(self, tokens: TokenBatch) -> tuple[Tensor, Tensor]:
        """What the blocks are given: embedded tokens (B, L, D) and their mask (B, L)."""
        return self.gene_embedding(tokens.gene_ids) + self.value_encoder(tokens.values), tokens.mask.clone()

    def states(self, tokens: TokenBatch) -> tuple[Tensor, Tensor | None]:
        """Token states (B, L, D) and the token mask (B, L)."""
        states, mask = self.embedded(tokens)
        mask[:, 0] |= ~mask.any(dim=1)  # a cell without tokens attends to one padded token instead of to none
        for block in self.blocks:
            states = block(states, mask)
        return states, mask

    def pool(self, states: Tensor, mask: Tensor | None) -> Tensor:
        """Mean over the tokens (B, D), normed."""
        out: Tensor = self.final_norm(masked_mean(states, mask))
        return out


class FeedForward(nn.Module):
    """Position-wise network of a transformer block."""

    def __init__(self, width: int, expansion: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, expansion * width)
        self.down = nn.Linear(expansion * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, D) -> (B, S, D)."""
        out: Tensor = self.down(F.gelu(self.up(x)))
        return out


class TransformerBlock(nn.Module):
    """Pre-norm transformer block with softmax attention."""

    def __init__(self, width: int, n_heads: int, expansion: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.norm_attention = nn.LayerNorm(width)
        self.norm_feed_forward = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)
        self.feed_forward = FeedForward(width, expansion)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, S, D) -> (B, S, D); attention only to states where `mask` (B, S) is True."""
        query, key, value = heads(self.query_key_value(self.norm_attention(x)), self.n_heads)
        bias = None if mask is None else mask[:, None, None, :]
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        x = x + self.output(joined(mixed))
        out: Tensor = x + self.feed_forward(self.norm_feed_forward(x))
        return out


def heads(query_key_value: Tensor, n_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Split (B, S, 3D) into query, key and value, each (B, H, S, D / H)."""
    batch, length, width = query_key_value.shape
    split = query_key_value.view(batch, length, 3, n_heads, width // (3 * n_heads)).permute(2, 0, 3, 1, 4)
    return split[0], split[1], split[2]


def joined(mixed: Tensor) -> Tensor:
    """Join heads (B, H, S, D / H) -> (B, S, D)."""
    batch, n_heads, length, width = mixed.shape
    return mixed.transpose(1, 2).reshape(batch, length, n_heads * width)


def masked_mean(states: Tensor, mask: Tensor | None) -> Tensor:
    """Mean of the real states (B, S, D) -> (B, D); zeros where a cell has none."""
    if mask is None:
        return states.mean(dim=1)
    weights = mask.unsqueeze(-1).to(states.dtype)
    return (states * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1.0)

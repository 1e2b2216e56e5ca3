"""`transformer`: softmax attention over the tokens of the expressed genes."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from evercell.backbones.base import TokenBackbone, TransformerBlock, ValueEncoder


class TransformerBackbone(TokenBackbone):
    """Gene plus value embeddings, blocks of full attention, mean over the tokens.

    Parameters
    ----------
    n_genes
        Size of the vocabulary.
    n_bins
        Value classes of the tokenizer, None for real values.
    width, depth, n_heads, expansion
        D, number of blocks, heads, and feed-forward expansion.
    """

    name: ClassVar[str] = "transformer"

    def __init__(
        self,
        n_genes: int,
        *,
        n_bins: int | None = None,
        width: int = 64,
        depth: int = 2,
        n_heads: int = 4,
        expansion: int = 2,
    ) -> None:
        super().__init__()
        self.width = width
        self._settings = {"width": width, "depth": depth, "n_heads": n_heads, "expansion": expansion}
        self.gene_embedding = nn.Embedding(n_genes, width)
        self.value_encoder = ValueEncoder(width, n_bins)
        self.blocks = nn.ModuleList(TransformerBlock(width, n_heads, expansion) for _ in range(depth))
        self.final_norm = nn.LayerNorm(width)

    @property
    def settings(self) -> dict[str, Any]:
        """Arguments, besides the number of genes, that make the same architecture again."""
        return dict(self._settings)

"""`latent`: a few latents gather the expressed genes by gated sums, and a small transformer runs over the latents.

The default. Its cost is linear in the expressed genes. Attention from learned latents to genes is usually a softmax over a cell's
genes, which makes each gene's weight depend on what else is expressed or measured; a sigmoid gate weighs each gene by itself,
so the gather is steadier between studies that measure different genes.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from evercell.backbones.base import Backbone, TransformerBlock, masked_mean
from evercell.tokenizers.base import TokenBatch


class LatentBackbone(Backbone):
    """Gated sums of gene embeddings into latents, then transformer blocks over the latents.

    With gene code g and value v of a token, latent m gathers ``z_m = sum_t sigmoid(a[g, m] + w_m v + b_m) v e[g]``,
    where ``a`` (G, M) are gene gates and ``e`` (G, D) gene embeddings. Layer norm makes z_m independent of depth.

    Parameters
    ----------
    n_genes
        Size of the vocabulary.
    n_bins
        Value classes of the tokenizer, None for real values; bin codes are taken as numbers here.
    width, n_latents, depth, n_heads, expansion
        D, M, number of blocks, heads, and feed-forward expansion.
    """

    name: ClassVar[str] = "latent"

    def __init__(
        self,
        n_genes: int,
        *,
        n_bins: int | None = None,
        width: int = 128,
        n_latents: int = 8,
        depth: int = 2,
        n_heads: int = 4,
        expansion: int = 2,
    ) -> None:
        super().__init__()
        self.width, self.n_latents, self.n_bins = width, n_latents, n_bins
        self._settings = {
            "width": width, "n_latents": n_latents, "depth": depth, "n_heads": n_heads, "expansion": expansion
        }  # fmt: skip
        self.gene_embedding = nn.Embedding(n_genes, width)
        self.gene_gate = nn.Embedding(n_genes, n_latents)
        self.gate_slope = nn.Parameter(torch.empty(n_latents))
        self.gate_bias = nn.Parameter(torch.zeros(n_latents))
        self.latent_embedding = nn.Parameter(torch.empty(n_latents, width))
        self.gather_norm = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(TransformerBlock(width, n_heads, expansion) for _ in range(depth))
        self.final_norm = nn.LayerNorm(width)
        nn.init.normal_(self.gene_embedding.weight, std=0.05)
        nn.init.normal_(self.gene_gate.weight, std=0.5)
        nn.init.normal_(self.gate_slope, std=0.5)
        nn.init.normal_(self.latent_embedding, std=0.02)

    @property
    def settings(self) -> dict[str, Any]:
        """Arguments, besides the number of genes, that make the same architecture again."""
        return dict(self._settings)

    def gather(self, tokens: TokenBatch) -> Tensor:
        """Gated sums (B, M, D); padded tokens have value 0 and add nothing."""
        if tokens.values.device.type == "cpu" and self.gene_embedding.weight.dtype == torch.float32:
            from evercell.backbones.gated_sum import GatedSum

            gate = (self.gene_gate.weight, self.gate_slope, self.gate_bias)
            lengths = tokens.mask.sum(dim=1)
            sums: Tensor = GatedSum.apply(tokens.gene_ids, tokens.values, lengths, self.gene_embedding.weight, *gate)  # type: ignore[no-untyped-call]
            return sums
        values = tokens.values.unsqueeze(-1)  # (B, L, 1)
        gates = torch.sigmoid(self.gene_gate(tokens.gene_ids) + values * self.gate_slope + self.gate_bias) * values
        return gates.transpose(1, 2) @ self.gene_embedding(tokens.gene_ids)  # (B, M, L) @ (B, L, D)

    def states(self, tokens: TokenBatch) -> tuple[Tensor, Tensor | None]:
        """Latents (B, M, D); all are real."""
        latents = self.gather_norm(self.gather(tokens)) + self.latent_embedding
        for block in self.blocks:
            latents = block(latents)
        return latents, None

    def pool(self, states: Tensor, mask: Tensor | None) -> Tensor:
        """Mean over the latents (B, D), normed."""
        out: Tensor = self.final_norm(masked_mean(states, mask))
        return out

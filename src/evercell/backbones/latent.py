"""`latent`: a few latents gather the expressed genes by gated sums, and a small transformer runs over the latents.

The default. Its cost is linear in the expressed genes. Attention from learned latents to genes is usually a softmax
over a cell's genes, which makes each gene's weight depend on what else is expressed or measured; a sigmoid gate weighs
each gene by itself, so the gather is steadier between studies that measure different genes.

Several small members run side by side, each with its own embeddings, latents and blocks, and are trained each on its
own loss. Across studies one such network differs from the next by several points of accuracy with nothing but its seed;
their mean is steadier than any of them, and than one network of the same size.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from evercell.backbones.base import Backbone, TransformerBlock
from evercell.backbones.gated_sum import GatedSum, gated_sums
from evercell.tokenizers.base import TokenBatch

USUAL_DEPTH = 3.5  # decimal logarithm of the counts of a usual cell


class LatentBackbone(Backbone):
    """Gated sums of gene embeddings into latents, then transformer blocks over the latents.

    With gene code g and value v of a token, latent m gathers ``z_m = sum_t sigmoid(a[g, m] + w_m v + b_m) v e[g]``,
    where ``a`` are gene gates and ``e`` gene embeddings. Layer norm makes z_m independent of depth.

    Parameters
    ----------
    n_genes
        Size of the vocabulary.
    n_bins
        Value classes of the tokenizer, None for real values; bin codes are taken as numbers here.
    members
        Networks side by side (S).
    member_width, n_latents, depth, n_heads, expansion
        Of each member: width (D / S), latents (M), blocks, heads, and feed-forward expansion.
    library_size
        A further state of each member tells the blocks (and a decoder) how deeply the cell was sequenced, which the
        layer norm hides from the latents; it is not in the representation's mean.
    """

    name: ClassVar[str] = "latent"
    threaded: ClassVar[bool] = True
    compiled: bool = True
    """Gather by compiled loops on a CPU; False for the plain tensor operations, which can be traced."""

    def __init__(
        self,
        n_genes: int,
        *,
        n_bins: int | None = None,
        members: int = 3,
        member_width: int = 64,
        n_latents: int = 8,
        depth: int = 2,
        n_heads: int = 4,
        expansion: int = 2,
        library_size: bool = False,
    ) -> None:
        super().__init__()
        self.members, self.n_latents, self.n_bins = members, n_latents, n_bins
        self.width = members * member_width
        self._settings = {
            "members": members, "member_width": member_width, "n_latents": n_latents, "depth": depth,
            "n_heads": n_heads, "expansion": expansion,
        }  # fmt: skip
        if library_size:  # named only where it is chosen: what older models store of their settings stays as it is
            self._settings["library_size"] = True
        self.gene_embedding = nn.Embedding(n_genes, self.width)
        self.gene_gate = nn.Embedding(n_genes, members * n_latents)
        self.gate_slope = nn.Parameter(torch.empty(members * n_latents))
        self.gate_bias = nn.Parameter(torch.zeros(members * n_latents))
        self.latent_embedding = nn.Parameter(torch.empty(members, n_latents, member_width))
        self.gather_norm = nn.LayerNorm(member_width)
        self.blocks = nn.ModuleList(
            nn.ModuleList(TransformerBlock(member_width, n_heads, expansion) for _ in range(members))
            for _ in range(depth)
        )
        self.final_norm = nn.LayerNorm(member_width)
        nn.init.normal_(self.gene_embedding.weight, std=0.05)
        nn.init.normal_(self.gene_gate.weight, std=0.5)
        nn.init.normal_(self.gate_slope, std=0.5)
        nn.init.normal_(self.latent_embedding, std=0.02)
        self.library_embedding = nn.Parameter(torch.empty(2, members, member_width)) if library_size else None
        if self.library_embedding is not None:
            nn.init.normal_(self.library_embedding, std=0.5)

    @property
    def settings(self) -> dict[str, Any]:
        """Arguments, besides the number of genes, that make the same architecture again."""
        return dict(self._settings)

    def gather(self, tokens: TokenBatch) -> Tensor:
        """Gated sums (B, S, M, D / S); padded tokens have value 0 and add nothing."""
        weight = self.gene_embedding.weight
        if self.compiled and weight.device.type == "cpu" and weight.dtype == torch.float32:
            arguments = (
                tokens.gene_ids, tokens.values, tokens.mask.sum(dim=1), weight, self.gene_gate.weight, self.gate_slope,
                self.gate_bias, self.members,
            )  # fmt: skip
            sums: Tensor = GatedSum.apply(*arguments) if torch.is_grad_enabled() else gated_sums(*arguments)
            return sums
        values = tokens.values.unsqueeze(-1)  # (B, L, 1)
        gates = torch.sigmoid(self.gene_gate(tokens.gene_ids) + values * self.gate_slope + self.gate_bias) * values
        gates = gates.unflatten(2, (self.members, -1))  # (B, L, S, M)
        genes = self.gene_embedding(tokens.gene_ids).unflatten(2, (self.members, -1))  # (B, L, S, D / S)
        return torch.einsum("blsm,blsd->bsmd", gates, genes)

    def states(self, tokens: TokenBatch) -> tuple[Tensor, Tensor | None]:
        """Latents (B, M, D), the members' beside each other, and the state of the library size behind; all are real."""
        latents = self.gather_norm(self.gather(tokens)) + self.latent_embedding
        if self.library_embedding is not None:
            latents = torch.cat([latents, self._library(tokens, latents.shape[0])], dim=2)
        members = list(latents.unbind(dim=1))  # S of (B, M, D / S)
        for layer in self.blocks:
            members = [block(member) for block, member in zip(layer, members, strict=True)]  # type: ignore[call-overload]
        return torch.cat(members, dim=2), None

    def _library(self, tokens: TokenBatch, n_cells: int) -> Tensor:
        """State of the library size of each member (B, S, 1, D / S)."""
        if tokens.totals is None or self.library_embedding is None:
            raise ValueError("a backbone with library_size needs the total counts of the cells")
        depth = torch.log10(tokens.totals.clamp(min=1.0)) - USUAL_DEPTH  # (B,)
        slope, offset = self.library_embedding  # (S, D / S)
        return (depth[:, None, None] * slope + offset).unsqueeze(2).expand(n_cells, -1, -1, -1)

    def pool(self, states: Tensor, mask: Tensor | None) -> Tensor:
        """Mean over the latents, normed member by member (B, D)."""
        means = states[:, : self.n_latents].mean(dim=1).unflatten(1, (self.members, -1))
        out: Tensor = self.final_norm(means).flatten(1)
        return out

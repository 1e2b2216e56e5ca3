"""Heads: the growing classifier, and the decoder of masked expression."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evercell.backbones.base import Backbone
from evercell.tokenizers.base import TokenBatch


class GrowingHead(nn.Module):
    """Classifier over the types known so far; new types add rows and leave the old rows as they are.

    Parameters
    ----------
    width
        Width of the representation D.
    n_types
        Number of types K.
    hidden
        Widths of hidden layers between representation and classifier; CANAL has (128, 64).
    dropout
        Dropout before the classifier.
    """

    def __init__(self, width: int, n_types: int, *, hidden: Sequence[int] = (), dropout: float = 0.1) -> None:
        super().__init__()
        self.hidden = tuple(hidden)
        layers: list[nn.Module] = []
        for size in self.hidden:
            layers += [nn.Linear(width, size), nn.ReLU()]
            width = size
        self.layers = nn.Sequential(*layers)
        self.dropout = nn.Dropout(dropout)
        with warnings.catch_warnings():
            # A pretrained model has no types yet, so there is nothing to initialise.
            warnings.filterwarnings("ignore", message="Initializing zero-element")
            self.classifier = nn.Linear(width, n_types)

    @property
    def n_types(self) -> int:
        """Number of types K."""
        return int(self.classifier.out_features)

    def features(self, representation: Tensor) -> Tensor:
        """Input of the classifier (B, W), on which distillation acts."""
        out: Tensor = self.layers(representation)
        return out

    def forward(self, representation: Tensor) -> Tensor:
        """(B, D) -> logits (B, K)."""
        out: Tensor = self.classifier(self.dropout(self.features(representation)))
        return out

    def member_logits(self, representation: Tensor, members: int) -> Tensor:
        """Logits of each member of a backbone (B, S, K), from its part of the representation alone.

        Their mean over the members is what `forward` gives, so that at annotation members cost nothing.
        """
        if members == 1 or self.hidden:
            return self(representation).unsqueeze(1)
        parts = self.dropout(representation).unflatten(1, (members, -1))  # (B, S, D / S)
        rows = self.classifier.weight.unflatten(1, (members, -1))  # (K, S, D / S)
        return members * torch.einsum("bsd,ksd->bsk", parts, rows) + self.classifier.bias

    def grow(self, n_types: int, *, seed: int = 0) -> None:
        """Add rows up to `n_types`; the old rows stay bit-equal."""
        old = self.classifier
        if n_types < old.out_features:
            raise ValueError(f"a head cannot shrink from {old.out_features} types to {n_types}")
        # Without nn.Linear's own draw, which would move torch's global random state.
        new = nn.utils.skip_init(nn.Linear, old.in_features, n_types, device=old.weight.device, dtype=old.weight.dtype)
        generator = torch.Generator().manual_seed(seed)
        bound = old.in_features**-0.5
        with torch.no_grad():
            new.weight.copy_(torch.empty(new.weight.shape).uniform_(-bound, bound, generator=generator))
            new.bias.zero_()
            new.weight[: old.out_features] = old.weight
            new.bias[: old.out_features] = old.bias
        self.classifier = new


class MaskedExpressionHead(nn.Module):
    """Decodes hidden genes: each asks the states of a backbone with its own embedding and is given a bin.

    Parameters
    ----------
    width
        Width of the backbone D.
    n_bins
        Classes of expression, 0 for none.
    """

    def __init__(self, width: int, n_bins: int) -> None:
        super().__init__()
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        # Each by itself: gene embeddings are small at first, and beside the answers would not be seen.
        self.norm_genes = nn.LayerNorm(width)
        self.norm_answer = nn.LayerNorm(width)
        self.network = nn.Sequential(nn.Linear(3 * width, width), nn.GELU(), nn.Linear(width, n_bins))

    def forward(self, backbone: Backbone, tokens: TokenBatch, asked: Tensor) -> Tensor:
        """Logits over bins (B, Q, n_bins) for the gene codes `asked` (B, Q)."""
        return self.decoded(*backbone.states(tokens), backbone.gene_embedding(asked))

    def decoded(self, states: Tensor, mask: Tensor | None, genes: Tensor) -> Tensor:
        """Logits (B, Q, n_bins) from states (B, S, D), their mask (B, S) and embeddings of genes (B, Q, D)."""
        genes = self.norm_genes(genes)
        bias = None if mask is None else mask[:, None, :]
        answer = F.scaled_dot_product_attention(self.query(genes), self.key(states), self.value(states), attn_mask=bias)
        answer = self.norm_answer(answer)
        logits: Tensor = self.network(torch.cat([answer, genes, answer * genes], dim=-1))
        return logits

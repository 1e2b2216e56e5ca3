"""Masked expression: hide genes of cells, ask for them, and judge the answers.

Source: Yang et al., Nature Machine Intelligence 2022 (scBERT): 15 % of the expressed genes, nine in ten of them
replaced by a mask token, cross-entropy over bins of log-normalised expression. Where a backbone has no mask token, a
hidden gene has no token at all, and measured genes without a count are asked for too, so that presence has to be
learnt as well.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy.sparse import csr_matrix
from torch import Tensor, nn
from torch.nn import functional as F

from evercell.backbones.base import Backbone, ValueEncoder
from evercell.heads import MaskedExpressionHead
from evercell.tokenizers.base import TokenBatch, Tokenizer, View, padded
from evercell.tokenizers.bins import N_BINS, BinsTokenizer, expression_bins

if TYPE_CHECKING:
    from evercell.pretraining_cells import PretrainingCells

LEVELS = N_BINS - 1  # answers: not expressed, and the levels of expression
TEMPERATURE = 0.1  # of the contrast
PROJECTED = 64  # width in which views are compared


@dataclass(frozen=True)
class Question:
    """Cells with hidden genes, and what is asked of them.

    Parameters
    ----------
    tokens
        What the backbone sees.
    genes
        Codes of the genes asked for (B, Q), int64.
    bins
        Their bins, the answers (B, Q), int64; 0 not expressed, -1 where a row is filled up.
    units
        Bin of a single count in each cell (B,), int64: how deeply the cell was sequenced, and the least that an
        expressed gene can have.
    """

    tokens: TokenBatch
    genes: Tensor
    bins: Tensor
    units: Tensor

    def to(self, device: torch.device) -> Question:
        """Copy on another device."""
        return Question(self.tokens.to(device), self.genes.to(device), self.bins.to(device), self.units.to(device))


@dataclass(frozen=True)
class Masking:
    """How genes are hidden.

    Parameters
    ----------
    share
        Share of a cell's expressed genes that is hidden.
    most
        Of the hidden genes of a cell this many, at random, are asked for.
    zeros
        Measured genes without a count that are asked for, for each expressed one.
    mask
        Bin that stands for a hidden gene; None where hidden genes are left out.
    replaced
        Share of the hidden genes that really get the mask bin; the others keep theirs.
    """

    share: float = 0.15
    most: int = 32
    zeros: float = 1.0
    mask: int | None = None
    replaced: float = 0.9

    def ask(self, view: View, counts: csr_matrix, tokenizer: Tokenizer, rng: np.random.Generator) -> Question:
        """Hide genes of the cells of a view.

        Parameters
        ----------
        view
            What is to be seen of the cells before genes are hidden.
        counts
            All counts of the same cells (B, G), CSR: what a random view does not show is not unexpressed.
        tokenizer
            Makes the tokens.
        rng
            Source of randomness.
        """
        n_cells = view.counts.shape[0]
        bins = expression_bins(view)
        rows, indices = _rows(view.counts), view.counts.indices
        draw = rng.random(len(bins))
        hidden = draw < self.share
        asked = hidden.copy()
        asked[_beyond(rows, draw, hidden, self.most)] = False
        n_asked = np.bincount(rows[asked], minlength=n_cells)
        starts = np.concatenate([[0], np.cumsum(n_asked)])
        expressed = padded(starts, indices[asked], bins[asked])
        genes, unexpressed = self._unexpressed(view, counts, n_asked, rng)

        if self.mask is None:
            kept = np.concatenate([[0], np.cumsum(np.bincount(rows[~hidden], minlength=n_cells))])
            seen = csr_matrix((view.counts.data[~hidden], indices[~hidden], kept), shape=counts.shape)
            tokens = tokenizer.tokenize(View(seen, view.totals, view.measured))
        else:
            tokens = tokenizer.tokenize(view)
            ids, cells = tokens.gene_ids.numpy(), np.arange(n_cells)[:, None]
            of_gene = np.zeros((2, *counts.shape), dtype=bool)
            of_gene[0][cells.repeat(ids.shape[1], axis=1)[tokens.mask.numpy()], ids[tokens.mask.numpy()]] = True
            # A gene without a token is seen to be unexpressed: nothing to be asked.
            unexpressed &= of_gene[0][cells, genes]
            of_gene[1][rows[hidden], indices[hidden]] = True
            of_gene[1][cells.repeat(genes.shape[1], axis=1)[unexpressed], genes[unexpressed]] = True
            masked = of_gene[1][cells, ids] & tokens.mask.numpy() & (rng.random(ids.shape) < self.replaced)
            values = torch.where(torch.from_numpy(masked), float(self.mask), tokens.values)
            tokens = replace(tokens, values=values)
        return Question(
            tokens=tokens,
            genes=torch.cat([expressed.gene_ids, torch.from_numpy(genes)], dim=1),
            bins=torch.cat(
                [
                    torch.where(expressed.mask, expressed.values.long(), -1),
                    torch.from_numpy(np.where(unexpressed, 0, -1)),
                ],
                dim=1,
            ),
            units=torch.from_numpy(unit_bins(view)),
        )

    def _unexpressed(
        self, view: View, counts: csr_matrix, n_asked: np.ndarray, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Random measured genes (B, Q) and which of them are to be asked: those without a count in all of the cell."""
        wanted = np.round(self.zeros * n_asked).astype(np.int64)
        pool = np.flatnonzero(view.measured)
        genes = pool[rng.integers(len(pool), size=(len(wanted), int(wanted.max(initial=0))))]
        has = np.zeros(counts.shape, dtype=bool)
        has[_rows(counts), counts.indices] = True
        return genes, (np.arange(genes.shape[1]) < wanted[:, None]) & ~has[np.arange(len(wanted))[:, None], genes]


def _rows(counts: csr_matrix) -> np.ndarray:
    """Row of every stored count (nnz,)."""
    return np.repeat(np.arange(counts.shape[0]), np.diff(counts.indptr))


def _beyond(rows: np.ndarray, draw: np.ndarray, chosen: np.ndarray, most: int) -> np.ndarray:
    """Places of the chosen entries beyond the `most` with the smallest draws of each row."""
    places = np.flatnonzero(chosen)
    places = places[np.lexsort((draw[places], rows[places]))]
    first = np.searchsorted(rows[places], rows[places])
    return places[np.arange(len(places)) - first >= most]


def mask_code(tokenizer: Tokenizer, backbone: Backbone) -> int | None:
    """Bin that hides a gene, or None: a backbone that takes bins as numbers would read the mask as high expression."""
    embeds_bins = any(isinstance(part, ValueEncoder) and part.n_bins is not None for part in backbone.modules())
    return BinsTokenizer.mask_value if embeds_bins and isinstance(tokenizer, BinsTokenizer) else None


def unit_bins(view: View) -> np.ndarray:
    """Bin of a single count in each cell (B,), int64."""
    one = csr_matrix(np.ones((len(view.totals), 1), dtype=np.float32))
    return expression_bins(View(one, view.totals, np.ones(1, dtype=bool))).astype(np.int64)


@dataclass(frozen=True)
class Levels:
    """How often training cells have a gene at each level: what can be said of a hidden gene without a model.

    Parameters
    ----------
    genes
        Cells at each level of each gene (G, levels), float64; level 0 counts cells of studies that measured the gene.
    units
        The same over all genes, by the bin of a single count in the cell (levels, levels).
    """

    genes: np.ndarray
    units: np.ndarray

    @classmethod
    def of(cls, cells: PretrainingCells, *, most: int = 20_000) -> Levels:
        """Levels in about `most` evenly spaced cells at most."""
        n_genes = cells.measured.shape[1]
        genes, units = np.zeros((n_genes, LEVELS)), np.zeros((LEVELS, LEVELS))
        for study, _, counts in cells.spread(most):
            view = View.whole(counts)
            bins, unit, rows = expression_bins(view).astype(np.int64), unit_bins(view), _rows(counts)
            part = np.bincount(counts.indices * np.int64(LEVELS) + bins, minlength=n_genes * LEVELS)
            genes += part.reshape(n_genes, LEVELS)
            units += np.bincount(unit[rows] * LEVELS + bins, minlength=LEVELS**2).reshape(LEVELS, LEVELS)
            measured = cells.measured[study]
            genes[:, 0] += measured * (counts.shape[0] - np.bincount(counts.indices, minlength=n_genes))
            units[:, 0] += np.bincount(unit, measured.sum() - np.diff(counts.indptr), minlength=LEVELS)
        return cls(genes, units)

    def usual(self) -> np.ndarray:
        """Most frequent bin of each gene in the cells that express it (G,); that of most genes where none does."""
        expressed = self.genes[:, 1:]
        found: np.ndarray = 1 + np.where(
            expressed.any(axis=1), expressed.argmax(axis=1), expressed.sum(axis=0).argmax()
        )
        return found

    def log_shares(self, zeros: float) -> tuple[np.ndarray, np.ndarray]:
        """Log-probability of each level given the gene (G, levels), and what the depth adds to it (levels, levels).

        Their sum takes gene and depth as independent. `zeros` unexpressed genes are asked for to each expressed one.
        """
        scale = np.ones(LEVELS)
        # Genes are drawn to be asked as unexpressed, and are not asked if the cell expresses them.
        scale[0] = zeros * self.genes[:, 1:].sum() / max(self.genes.sum(), 1.0)
        genes, units = self.genes * scale, self.units * scale
        overall = (genes.sum(axis=0) + 1.0) / (genes.sum() + LEVELS)

        def shares(counted: np.ndarray) -> np.ndarray:  # a row with few counts is like all genes
            found: np.ndarray = (counted + overall) / (counted.sum(axis=1, keepdims=True) + 1.0)
            return found

        return np.log(shares(genes)), np.log(shares(units)) - np.log(overall)


class MaskedExpression(nn.Module):
    """What is trained beside a backbone and thrown away: decoder and projection of each of its members.

    Parameters
    ----------
    backbone
        Tells number and width of the members.
    levels, zeros
        Answers start from what gene and depth say (see `Levels.log_shares`), so what is learnt is what a cell tells
        beyond them.
    """

    def __init__(self, backbone: Backbone, levels: Levels, zeros: float) -> None:
        super().__init__()
        genes, units = (torch.from_numpy(shares).float() for shares in levels.log_shares(zeros))
        self.gene_levels = nn.Embedding.from_pretrained(genes)  # frozen: a step sees too few cells to better them
        self.unit_levels = nn.Parameter(units)
        self.members = backbone.members
        width = backbone.width // self.members
        self.heads = nn.ModuleList(MaskedExpressionHead(width, LEVELS) for _ in range(self.members))
        self.projections = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, PROJECTED)) for _ in range(self.members)
        )
        for head in self.heads:
            nn.init.zeros_(head.network[-1].weight)  # type: ignore[union-attr, index]
            nn.init.zeros_(head.network[-1].bias)  # type: ignore[union-attr, index]

    def logits(self, backbone: Backbone, states: Tensor, mask: Tensor | None, question: Question) -> Tensor:
        """Answer of each member (S, B, Q, levels), from states (B, N, D) and their mask (B, N)."""
        asked = backbone.gene_embedding(question.genes).chunk(self.members, dim=-1)
        parts = states.chunk(self.members, dim=-1)
        answers = [head.decoded(part, mask, one) for head, part, one in zip(self.heads, parts, asked, strict=True)]  # type: ignore[operator]
        return torch.stack(answers) + self.known(question)

    def known(self, question: Question) -> Tensor:
        """Logits that do not look at the cell's genes (B, Q, levels)."""
        of_genes: Tensor = self.gene_levels(question.genes)
        return of_genes + self.unit_levels[question.units].unsqueeze(1)

    def loss(self, logits: Tensor, bins: Tensor) -> Tensor:
        """Cross-entropy of the members' answers (S, B, Q, levels), a mean over the genes asked for."""
        truth = bins.expand(logits.shape[:-1]).flatten()
        total = F.cross_entropy(logits.float().flatten(0, 2), truth, ignore_index=-1, reduction="sum")
        return total / (truth >= 0).sum().clamp(min=1)

    def contrast(self, first: Tensor, second: Tensor) -> Tensor:
        """InfoNCE between two views' representations (B, D) of the same cells, a mean over members and directions."""
        losses = []
        views = first.chunk(self.members, dim=-1), second.chunk(self.members, dim=-1)
        for projection, *parts in zip(self.projections, *views, strict=True):
            one, other = (F.normalize(projection(part).float(), dim=1) for part in parts)
            likeness = one @ other.T / TEMPERATURE  # (B, B), a cell's own views on the diagonal
            cells = torch.arange(len(likeness), device=likeness.device)
            losses += [F.cross_entropy(likeness, cells), F.cross_entropy(likeness.T, cells)]
        return torch.stack(losses).mean()

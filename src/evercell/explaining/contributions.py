"""What each gene of a cell adds to the log odds of one type against another, for the whole model.

The model averages the log-probabilities of its members and divides them by the temperature; in a difference of two of
them whatever normalises the probabilities cancels, so the log odds are a weighted sum of differences of the members'
logits, and the contributions of the members add up. The linear member's are exact. Those of transformer and profiles
are integrated gradients (Sundararajan et al., ICML 2017) on the way from a cell without expression to the cell.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evercell.annotator import Annotator
from evercell.backbones.base import Backbone, TokenBackbone
from evercell.backbones.latent import LatentBackbone
from evercell.profiles import LEAST, NEVER, deep
from evercell.tokenizers import TokenBatch, View

METHODS = ("integrated", "gradient")
"""``integrated``: the mean gradient on the way; ``gradient``: that at the cell, faster, and not complete."""

NODES = (32, 64, 128, 256)
"""Places on the way at which the gradient is taken: more where fewer do not add up to what they should."""

TOLERANCE = 0.005  # of the move from start to end, or of 1 where that is more
ONSET = 3e-4
"""Strength of expression about which layer norm begins to see a cell: from there on it takes out the scale."""

MOST_TOKENS = 40_000  # a forward pass: bounds the memory


@dataclass(frozen=True)
class Contributions:
    """Contributions of genes to log odds of cells, in natural logarithms.

    Parameters
    ----------
    transformer, linear, profiles
        Of the members (B, G), float32; their sum is the model's.
    base
        Log odds without any expression (B,).
    log_odds
        Log odds of the cells (B,). With `integrated` they are ``base`` plus the sum over the genes.
    """

    transformer: np.ndarray
    linear: np.ndarray
    profiles: np.ndarray
    base: np.ndarray
    log_odds: np.ndarray

    @property
    def total(self) -> np.ndarray:
        """Contributions of all members (B, G)."""
        return self.transformer + self.linear + self.profiles


def contributions(
    model: Annotator, view: View, first: int, second: int, *, method: str = "integrated"
) -> Contributions:
    """Contributions of genes to the log odds of type `first` against type `second` (codes).

    Each cell is worked on alone, so what is found does not depend on the cells beside it.
    """
    others = 1.0 if model.profiles is None else 1.0 - model.profiles.share
    share = 0.0 if model.linear is None else model.linear_share
    members = (
        (others * (1 - share), _of_transformer),
        (others * share, _of_linear),
        (1 - others, _of_profiles),
    )
    found, base, log_odds = [], np.zeros(view.counts.shape[0]), np.zeros(view.counts.shape[0])
    for weight, member in members:
        if weight == 0:
            found.append(np.zeros(view.counts.shape, dtype=np.float32))
            continue
        of_genes, start, end = member(model, view, first, second, method)
        scale = weight / model.temperature
        found.append((of_genes * scale).astype(np.float32))
        base += start * scale
        log_odds += end * scale
    transformer, linear, profiles = found
    return Contributions(transformer, linear, profiles, base, log_odds)


Found = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Of a member: contributions (B, G), difference of the two logits without expression (B,) and of the cells (B,)."""


def _of_transformer(model: Annotator, view: View, first: int, second: int, method: str) -> Found:
    found = np.zeros(view.counts.shape, dtype=np.float32)
    base, end = np.zeros((2, view.counts.shape[0]))
    path = _Path(model, first, second, method)
    for row in range(view.counts.shape[0]):
        found[row], base[row], end[row] = path.walked(view.taken(np.array([row])))
    return found, base, end


def _of_linear(model: Annotator, view: View, first: int, second: int, method: str) -> Found:
    """Where expression is centred, a measured gene without a count contributes too."""
    linear = model.linear
    if linear is None:
        raise ValueError("the model has no linear member")
    expression = linear.features(view).toarray()
    if linear.centre is not None:
        expression -= linear.centre * view.measured
    found = expression * (linear.weight[:, first] - linear.weight[:, second])
    bias = np.full(len(found), float(linear.bias[first]) - float(linear.bias[second]))
    return found, bias, bias + found.sum(axis=1, dtype=np.float64)


def _of_profiles(model: Annotator, view: View, first: int, second: int, method: str) -> Found:
    """With expression x, centre c and directions p: the path of ``p (a x - c) / |a x - c|`` for a from 0 to 1."""
    profiles = model.profiles
    if profiles is None:
        raise ValueError("the model has no profiles")
    genes, centre, directions = profiles.compared(view.measured)
    sharp = np.where(profiles.known, profiles.sharpness, 0.0)
    apart = (directions[:, first] * sharp[first] - directions[:, second] * sharp[second]).astype(np.float64)
    constant = NEVER * (float(profiles.known[second]) - float(profiles.known[first]))
    scaled = deep(view.counts, profiles.depth, view.measured)
    expression = View(scaled.counts[:, genes], scaled.totals, scaled.measured).logged().toarray().astype(np.float64)

    def along(strength: float) -> tuple[np.ndarray, np.ndarray]:
        """Difference of the two logits (B,) and its gradient (B, M)."""
        about = strength * expression - centre
        length = np.sqrt(np.maximum((about**2).sum(axis=1, keepdims=True), LEAST))
        value = (about * apart).sum(axis=1, keepdims=True) / length
        return value[:, 0] + constant, (apart - value * about / length) / length

    if method == "gradient":
        gradient = along(1.0)[1]
    else:
        nodes, weights = np.polynomial.legendre.leggauss(NODES[-1])
        gradient = np.zeros_like(expression)
        for node, weight in zip(nodes, weights, strict=True):
            gradient += along((node + 1) / 2)[1] * weight / 2
    found = np.zeros(view.counts.shape, dtype=np.float32)
    found[:, genes] = gradient * expression
    return found, along(0.0)[0], along(1.0)[0]


class _Path:
    """The way from a cell without expression to a cell, for the transformer alone.

    Along it the values of all tokens are multiplied by a strength from 0 to 1; in a backbone that embeds every token by
    itself, where a value of 0 would leave the gene, its embedded tokens are.

    Layer norm makes a network jump at the first trace of expression and hardly move from there on, so evenly spaced
    strengths would miss most of the way. They are ``ONSET sinh(u)`` with Gauss-Legendre nodes for u: in even steps
    below the onset, in even ratios above it.
    """

    def __init__(self, model: Annotator, first: int, second: int, method: str) -> None:
        self.tokenizer, self.device = model.tokenizer, model.device
        self.backbone: Backbone = copy.deepcopy(model.backbone).eval().requires_grad_(False)
        self.head = copy.deepcopy(model.head).eval().requires_grad_(False)
        if isinstance(self.backbone, LatentBackbone):
            self.backbone.compiled = False  # its loops give values no gradient
        self.first, self.second, self.method = first, second, method

    def walked(self, cell: View) -> tuple[np.ndarray, float, float]:
        """Contributions (G,) to the difference of two logits of one cell, that difference at the start and the end."""
        tokens = self.tokenizer.tokenize(cell).to(self.device)
        n_tokens = tokens.values.shape[1]
        with torch.no_grad():
            ends = torch.tensor([[0.0], [1.0]], device=self.device).expand(-1, n_tokens)
            begin, end = self._difference(tokens, ends).double().tolist()
        for strengths, weights in map(_places, (0,) if self.method == "gradient" else NODES):
            gradient = self._gradient(tokens, strengths, weights)
            if abs(gradient.sum() - (end - begin)) <= TOLERANCE * max(abs(end - begin), 1.0):
                break
        of_genes = np.zeros(cell.counts.shape[1])
        real = tokens.mask[0].cpu().numpy()
        np.add.at(of_genes, tokens.gene_ids[0].cpu().numpy()[real], gradient[real])
        return of_genes, begin, end

    def _gradient(self, tokens: TokenBatch, strengths: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """Weighted sum of the gradients (L,) at some strengths."""
        n_tokens = tokens.values.shape[1]
        gradient = np.zeros(n_tokens)
        at_once = max(MOST_TOKENS // n_tokens, 1)
        for start in range(0, len(strengths), at_once):
            part = slice(start, start + at_once)
            strength = torch.tensor(strengths[part], dtype=torch.float32, device=self.device)
            strength = strength[:, None].expand(-1, n_tokens).clone().requires_grad_()
            (found,) = torch.autograd.grad(self._difference(tokens, strength).sum(), strength)
            gradient += weights[part] @ found.double().cpu().numpy()
        return gradient

    def _difference(self, tokens: TokenBatch, strength: Tensor) -> Tensor:
        """Difference of the two logits (N,) of one cell (1, L), at several strengths of its tokens (N, L)."""
        with _weakened(self.backbone, strength) as embedded:
            # Gene codes stay one row: what is looked up by them is looked up once.
            values = tokens.values.expand_as(strength) if embedded else tokens.values * strength
            shared = replace(tokens, values=values, mask=tokens.mask.expand_as(strength))
            logits = self.head(self.backbone(shared))
        difference: Tensor = logits[:, self.first] - logits[:, self.second]
        return difference


@cache
def _places(number: int) -> tuple[np.ndarray, np.ndarray]:
    """Strengths and weights of so many places on the way; 0 for the end of it alone."""
    if number == 0:
        return np.ones(1), np.ones(1)
    nodes, weights = np.polynomial.legendre.leggauss(number)
    end = np.arcsinh(1 / ONSET)
    u = end * (nodes + 1) / 2
    return ONSET * np.sinh(u), weights * end / 2 * ONSET * np.cosh(u)


@contextmanager
def _weakened(backbone: Backbone, strength: Tensor) -> Iterator[bool]:
    """Multiply embedded tokens by `strength` where a backbone has a state a token; gives whether it does."""
    if not isinstance(backbone, TokenBackbone):
        yield False
        return

    def weaken(_: Any, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        states, *others = arguments
        more = states.shape[1] - strength.shape[1]  # tokens of no gene stand behind the others
        kept = torch.cat([strength, strength.new_ones(len(strength), more)], dim=1)
        return states * kept.unsqueeze(-1), *others

    handle = backbone.blocks[0].register_forward_pre_hook(weaken)
    try:
        yield True
    finally:
        handle.remove()

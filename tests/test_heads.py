"""Heads: the classifier that grows, and the decoder of masked expression."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix

from evercell.backbones import BACKBONES
from evercell.heads import GrowingHead, MaskedExpressionHead
from evercell.tokenizers import TOKENIZERS, View
from evercell.training import seeded


def head_of(n_types: int = 3, **settings: object) -> GrowingHead:
    with seeded(0):
        return GrowingHead(8, n_types, **settings).eval()  # type: ignore[arg-type]


X = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("hidden", [(), (7,), (128, 64)])
def test_growing_leaves_the_old_rows_bit_equal(hidden: tuple[int, ...]) -> None:
    """Invariant 3: a type's code means the same for ever."""
    head = head_of(hidden=hidden)
    before = {name: t.clone() for name, t in head.state_dict().items()}
    logits = head(X)
    head.grow(5, seed=3)
    assert head.n_types == 5
    assert torch.equal(head.classifier.weight[:3], before["classifier.weight"])
    assert torch.equal(head.classifier.bias[:3], before["classifier.bias"])
    assert all(torch.equal(t, before[name]) for name, t in head.state_dict().items() if "classifier" not in name)
    torch.testing.assert_close(head(X)[:, :3], logits)
    assert head(X).shape == (5, 5)


def test_new_rows_come_from_the_seed_and_global_random_state_stays() -> None:
    """Invariant 6."""
    before = torch.random.get_rng_state()
    grown = []
    for seed in (1, 1, 2):
        head = head_of()
        head.grow(6, seed=seed)
        grown.append(head.classifier.weight.detach()[3:])
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(grown[0], grown[1])
    assert not torch.equal(grown[0], grown[2])
    assert (grown[0].norm(dim=1) > 0).all()
    assert (head.classifier.bias[3:] == 0).all()
    assert head.classifier.weight.requires_grad


def test_a_head_never_shrinks() -> None:
    head = head_of()
    head.grow(3)
    assert head.n_types == 3
    with pytest.raises(ValueError, match="cannot shrink from 3 types to 2"):
        head.grow(2)


@pytest.mark.parametrize("hidden", [(), (4,)])
@pytest.mark.parametrize("members", [1, 2, 4])
def test_logits_are_the_mean_of_the_members(hidden: tuple[int, ...], members: int) -> None:
    head = head_of(hidden=hidden)
    torch.testing.assert_close(head.member_logits(X, members).mean(dim=1), head(X), atol=1e-5, rtol=1e-5)


def test_a_member_speaks_from_its_own_part_alone() -> None:
    head = head_of()
    other = X.clone()
    other[:, 4:] = 0
    assert torch.equal(head.member_logits(other, 2)[:, 0], head.member_logits(X, 2)[:, 0])
    assert not torch.allclose(head.member_logits(other, 2)[:, 1], head.member_logits(X, 2)[:, 1])


def test_features_are_what_the_classifier_sees() -> None:
    head = head_of(hidden=(6, 4))
    assert head.features(X).shape == (5, 4)
    torch.testing.assert_close(head.classifier(head.features(X)), head(X))
    assert torch.equal(head_of().features(X), X)


def test_dropout_acts_in_training_only() -> None:
    head = head_of(dropout=0.5)
    assert torch.equal(head(X), head(X))
    with seeded(0):
        assert not torch.equal(head.train()(X), head.eval()(X))


@pytest.mark.parametrize("name", list(BACKBONES))
def test_masked_genes_are_decoded_with_any_backbone(name: str) -> None:
    counts = np.random.default_rng(0).poisson(1.0, (4, 30)).astype(np.float32)
    counts[2] = 0  # a cell without tokens
    tokens = TOKENIZERS["values"]().tokenize(View.whole(csr_matrix(counts)))
    with seeded(0):
        backbone = BACKBONES[name](30, n_bins=None)
        head = MaskedExpressionHead(backbone.width, 6)
    asked = torch.tensor([[0, 5, 9]] * 4)
    logits = head(backbone, tokens, asked)
    assert logits.shape == (4, 3, 6)
    assert torch.isfinite(logits).all()
    assert torch.pdist(logits[0]).min() > 1e-4  # genes get answers of their own
    logits.square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in head.parameters())
    assert backbone.gene_embedding.weight.grad is not None

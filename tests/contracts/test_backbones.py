"""What every backbone promises, with every tokenizer; a new file in a registry is tested unseen."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix

from evercell.backbones import BACKBONES, Backbone
from evercell.backbones.gated_sum import GatedSum, gated_sums, shared_out
from evercell.finetuning import ModelSettings
from evercell.tokenizers import TOKENIZERS, TokenBatch, Tokenizer, View
from evercell.training import seeded

N_GENES = 60


LIBRARY_SIZE = "latent, library size"  # an option that changes what the blocks are given


def made(name: str, tokenizer: Tokenizer, seed: int = 0) -> Backbone:
    with seeded(seed):
        if name == LIBRARY_SIZE:
            return BACKBONES["latent"](N_GENES, n_bins=tokenizer.n_bins, library_size=True).eval()
        return BACKBONES[name](N_GENES, n_bins=tokenizer.n_bins).eval()


@pytest.fixture(params=list(TOKENIZERS))
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return TOKENIZERS[request.param]()


@pytest.fixture(params=[*BACKBONES, LIBRARY_SIZE])
def backbone(request: pytest.FixtureRequest, tokenizer: Tokenizer) -> Backbone:
    return made(request.param, tokenizer)


@pytest.fixture
def view() -> View:
    """Six cells that express 2 to 15 genes, then one that expresses none."""
    rng = np.random.default_rng(5)
    counts = np.zeros((7, N_GENES))
    for cell, n_genes in enumerate((2, 5, 7, 10, 12, 15)):
        counts[cell, rng.choice(N_GENES, n_genes, replace=False)] = rng.integers(1, 30, n_genes)
    return View.whole(csr_matrix(counts.astype(np.float32)))


def with_rich_cells(view: View) -> View:
    """The same cells and then three that express every gene."""
    rich = np.random.default_rng(6).integers(1, 50, (3, N_GENES))
    return View.whole(csr_matrix(np.vstack([view.counts.toarray(), rich]).astype(np.float32)))


def test_shape_and_finite_values(backbone: Backbone, tokenizer: Tokenizer, view: View) -> None:
    found = backbone(tokenizer.tokenize(view))
    assert found.shape == (7, backbone.width)
    assert backbone.width % backbone.members == 0
    assert torch.isfinite(found).all()  # that of the cell without tokens too
    states, mask = backbone.states(tokenizer.tokenize(view))
    assert states.ndim == 3
    assert states.shape[2] == backbone.width
    assert mask is None or (mask.shape == states.shape[:2] and mask.any(dim=1).all())


def test_cells_differ(backbone: Backbone, tokenizer: Tokenizer, view: View) -> None:
    found = backbone(tokenizer.tokenize(view))
    assert torch.pdist(found).min() > 1e-3


def test_gradient_reaches_every_parameter(backbone: Backbone, tokenizer: Tokenizer, view: View) -> None:
    found = backbone(tokenizer.tokenize(view))
    weight = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
    (found * weight).sum().backward()
    without = [name for name, p in backbone.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not without
    assert all(torch.isfinite(p.grad).all() for p in backbone.parameters() if p.grad is not None)


def test_a_cell_depends_on_no_other_cell_and_no_padding(backbone: Backbone, tokenizer: Tokenizer, view: View) -> None:
    """Invariant 1, to rounding; the default backbone to the last bit in the batches that an annotator makes."""
    with torch.inference_mode():
        alone = backbone(tokenizer.tokenize(view))
        among = backbone(tokenizer.tokenize(with_rich_cells(view)))[: len(alone)]
    torch.testing.assert_close(among, alone, atol=1e-6, rtol=1e-5)


def test_permuting_cells_permutes_representations(backbone: Backbone, tokenizer: Tokenizer, view: View) -> None:
    order = [4, 0, 6, 2, 5, 1, 3]
    with torch.inference_mode():
        found = backbone(tokenizer.tokenize(view))
        permuted = backbone(tokenizer.tokenize(View(view.counts[order], view.totals[order], view.measured)))
    torch.testing.assert_close(permuted, found[order], atol=1e-6, rtol=1e-5)


def test_the_order_of_the_tokens_means_nothing(backbone: Backbone, tokenizer: Tokenizer, view: View) -> None:
    tokens = tokenizer.tokenize(View(view.counts[5], view.totals[5:6], view.measured))
    back = replace(tokens, gene_ids=tokens.gene_ids.flip(1), values=tokens.values.flip(1), mask=tokens.mask.flip(1))
    with torch.inference_mode():
        torch.testing.assert_close(backbone(back), backbone(tokens), atol=2e-6, rtol=1e-5)


def test_values_count(backbone: Backbone, tokenizer: Tokenizer, view: View) -> None:
    tokens = tokenizer.tokenize(view)
    other = replace(tokens, values=tokens.values.flip(1) * 0 + tokens.mask * 3.0)
    with torch.inference_mode():
        assert not torch.allclose(backbone(other)[:6], backbone(tokens)[:6], atol=1e-4)


def test_a_second_look_gives_the_same_bits(backbone: Backbone, tokenizer: Tokenizer, view: View) -> None:
    """No projection is drawn anew (a fault of the published systems)."""
    with torch.inference_mode():
        assert torch.equal(backbone(tokenizer.tokenize(view)), backbone(tokenizer.tokenize(view)))


def test_settings_and_state_make_the_same_backbone(backbone: Backbone, tokenizer: Tokenizer, view: View) -> None:
    stored = json.loads(json.dumps(backbone.settings))
    with seeded(99):
        again = BACKBONES[backbone.name](N_GENES, n_bins=tokenizer.n_bins, **stored).eval()
    assert again.settings == backbone.settings
    shapes = {name: tuple(t.shape) for name, t in backbone.state_dict().items()}
    assert {name: tuple(t.shape) for name, t in again.state_dict().items()} == shapes
    with torch.inference_mode():
        assert not torch.equal(again(tokenizer.tokenize(view)), backbone(tokenizer.tokenize(view)))
        again.load_state_dict(backbone.state_dict())
        assert torch.equal(again(tokenizer.tokenize(view)), backbone(tokenizer.tokenize(view)))


@pytest.mark.parametrize("name", list(BACKBONES))
def test_the_seed_decides_the_weights(name: str) -> None:
    tokenizer = TOKENIZERS["values"]()
    first, same, other = (made(name, tokenizer, seed).gene_embedding.weight for seed in (1, 1, 2))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_light_training_has_something_to_train(backbone: Backbone) -> None:
    inner = {id(p) for module in backbone.last_layers() for p in module.parameters()}
    assert 0 < len(inner) < len(list(backbone.parameters()))
    assert inner <= {id(p) for p in backbone.parameters()}
    assert id(backbone.gene_embedding.weight) not in inner


def test_the_default_backbone_is_bit_equal_whatever_stands_beside_a_cell(view: View) -> None:
    """Invariant 1 to the last bit: padding and the other cells of a batch of one size change nothing."""
    settings = ModelSettings()
    tokenizer = TOKENIZERS[settings.tokenizer]()
    backbone = made(settings.backbone, tokenizer)
    rich = with_rich_cells(view)
    with torch.inference_mode():
        first = backbone(tokenizer.tokenize(View(rich.counts[[0, 1, 2, 3, 4, 5]], rich.totals[:6], rich.measured)))
        other = [5, 8, 7, 0, 4, 6]
        beside = backbone(tokenizer.tokenize(View(rich.counts[other], rich.totals[other], rich.measured)))
    assert torch.equal(beside[[0, 3, 4]], first[[5, 0, 4]])


@pytest.mark.parametrize(("name", "sees"), [("latent", False), (LIBRARY_SIZE, True)])
def test_depth_is_seen_where_the_library_size_is_asked_for(name: str, sees: bool, view: View) -> None:
    """Ten times the counts are the same log-normalised values: all that differs is the total."""
    tokenizer = TOKENIZERS["values"]()
    deep = View.whole(view.counts * 10)
    backbone = made(name, tokenizer)
    with torch.inference_mode():
        found, deeper = (backbone(tokenizer.tokenize(one))[:6] for one in (view, deep))
        assert torch.allclose(found, deeper, atol=1e-5) != sees
        if sees:
            with pytest.raises(ValueError, match="total counts"):
                backbone(replace(tokenizer.tokenize(view), totals=None))


# The compiled gather of `latent`.

Gathered = tuple[torch.Tensor, ...]


def gathered(members: int = 2) -> tuple[TokenBatch, Gathered]:
    """Tokens of four cells (one without any) and random parameters: embedding, gene gate, slope, bias."""
    rng = np.random.default_rng(8)
    counts = rng.poisson(0.4, (4, N_GENES)).astype(np.float32)
    counts[1] = 0
    tokens = TOKENIZERS["values"]().tokenize(View.whole(csr_matrix(counts)))
    random = torch.Generator().manual_seed(4)
    shapes = ((N_GENES, members * 6), (N_GENES, members * 3), (members * 3,), (members * 3,))
    return tokens, tuple(torch.randn(shape, generator=random).requires_grad_() for shape in shapes)


def plain(tokens: TokenBatch, parameters: Gathered, members: int) -> torch.Tensor:
    """The equation in float64: sum over tokens of sigmoid(a + w v + b) v e."""
    embedding, gene_gate, slope, bias = parameters
    values = tokens.values.double().unsqueeze(-1)
    gates = torch.sigmoid(gene_gate.double()[tokens.gene_ids] + slope.double() * values + bias.double()) * values
    gates, genes = (x.unflatten(2, (members, -1)) for x in (gates, embedding.double()[tokens.gene_ids]))
    return torch.einsum("blsm,blsd->bsmd", gates, genes)


@pytest.mark.parametrize("members", [1, 2])
@pytest.mark.parametrize("n_threads", [1, 3])
def test_the_compiled_sum_is_the_equation_and_its_gradient(
    members: int, n_threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: n_threads)
    tokens, parameters = gathered(members)
    sums = GatedSum.apply(tokens.gene_ids, tokens.values, tokens.mask.sum(dim=1), *parameters, members)
    expected = plain(tokens, parameters, members)
    torch.testing.assert_close(sums, expected.float(), atol=2e-5, rtol=1e-5)
    assert (sums[1] == 0).all()  # no tokens
    weight = torch.randn(sums.shape, generator=torch.Generator().manual_seed(7))
    found = torch.autograd.grad((sums * weight).sum(), parameters)
    wanted = torch.autograd.grad((expected * weight).sum(), parameters)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_the_compiled_sum_has_the_same_bits_for_any_batch_padding_and_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, parameters = gathered()

    def sums(rows: list[int], padding: int, n_threads: int) -> torch.Tensor:
        monkeypatch.setattr(torch, "get_num_threads", lambda: n_threads)
        ids, values = (torch.nn.functional.pad(x[rows], (0, padding)) for x in (tokens.gene_ids, tokens.values))
        return GatedSum.apply(ids, values, tokens.mask[rows].sum(dim=1), *parameters, 2).detach()

    whole = sums([0, 1, 2, 3], 0, 1)
    assert torch.equal(sums([0, 1, 2, 3], 40, 4), whole)
    assert torch.equal(sums([3, 0], 9, 2), whole[[3, 0]])
    assert torch.equal(sums([2], 1, 1), whole[[2]])


@pytest.mark.parametrize("n", [1, 2, 7, 100])
def test_work_is_shared_out_whole(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    done: list[int] = []
    shared_out(n, lambda start, stop: done.extend(range(start, stop)))
    assert sorted(done) == list(range(n))


def test_errors_of_shared_work_are_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)

    def fails(start: int, stop: int) -> None:
        raise IndexError(f"{start} {stop}")

    with pytest.raises(IndexError):
        shared_out(10, fails)


@pytest.mark.parametrize("members", [1, 3])
def test_the_gather_of_annotation_is_the_gather_of_training(members: int) -> None:
    generator = torch.Generator().manual_seed(0)
    gene_ids = torch.randint(0, N_GENES, (5, 40), generator=generator)
    lengths = torch.tensor([0, 1, 13, 39, 40])
    counts = torch.randint(1, 6, (5, 40), generator=generator)  # values repeat, as they do in cells
    values = torch.log1p(counts * 3.0) * (torch.arange(40) < lengths[:, None])
    embedding, gate = torch.randn(N_GENES, 12, generator=generator), torch.randn(N_GENES, 6, generator=generator)
    gate[3] = 200.0  # a gate that is wide open, and one that is shut
    gate[4] = -200.0
    slope, bias = torch.randn(6, generator=generator), torch.randn(6, generator=generator)
    arguments = (gene_ids, values, lengths, embedding, gate, slope, bias, members)
    torch.testing.assert_close(gated_sums(*arguments), GatedSum.apply(*arguments), rtol=1e-5, atol=1e-5)

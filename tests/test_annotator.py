"""The model as one object: what it says of a cell depends on that cell and the model only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from anndata import AnnData
from scipy.sparse import csr_matrix

import evercell as ec
from evercell.annotator import BATCH, Annotator, empty_bank, tempered
from evercell.celltypes import CellTypes
from evercell.errors import ModelError
from evercell.genes import align
from evercell.pretraining import quick_settings as quick_pretraining
from evercell.testing import synthetic_cells
from evercell.tokenizers import View


@pytest.fixture
def view(model: Annotator, query: AnnData) -> View:
    alignment = align(query.var, model.vocabulary)
    return View.whole(alignment.apply(query.X), alignment.measured)


def taken(view: View, rows: np.ndarray) -> View:
    return View(view.counts[rows], view.totals[rows], view.measured)


def same(model: Annotator, view: View, rows: np.ndarray) -> None:
    whole, part = model.outputs(view), model.outputs(taken(view, rows))
    np.testing.assert_array_equal(part.log_proba, whole.log_proba[rows])
    np.testing.assert_array_equal(part.logits, whole.logits[rows])
    np.testing.assert_array_equal(part.representation, whole.representation[rows])


def test_permuted_cells_have_the_same_bits(model: Annotator, view: View) -> None:
    """Invariant 1: permute."""
    same(model, view, np.random.default_rng(0).permutation(len(view.totals)))


@pytest.mark.parametrize("n_cells", [1, 2, 127, 128, 129])
def test_a_subset_has_the_same_bits(model: Annotator, view: View, n_cells: int) -> None:
    """Invariant 1: subset."""
    same(model, view, np.random.default_rng(1).permutation(len(view.totals))[:n_cells])


def test_repeated_cells_have_the_same_bits(model: Annotator, view: View) -> None:
    same(model, view, np.repeat(np.arange(0, 150, 7), 20))


def test_an_empty_cell_among_others_changes_nothing(model: Annotator, view: View) -> None:
    counts = view.counts.tolil()
    counts[3] = 0
    with_empty = View.whole(counts.tocsr(), view.measured)
    whole, found = model.outputs(view), model.outputs(with_empty)
    others = np.arange(150) != 3
    np.testing.assert_array_equal(found.log_proba[others], whole.log_proba[others])
    assert np.isfinite(found.log_proba).all()


@pytest.mark.parametrize("linear", [True, False])
def test_probabilities_sum_to_one(model: Annotator, view: View, linear: bool) -> None:
    outputs = (model if linear else replace(model, linear=None)).outputs(view)
    assert outputs.log_proba.dtype == outputs.representation.dtype == outputs.logits.dtype == np.float32
    np.testing.assert_allclose(outputs.proba.sum(axis=1), 1, rtol=1e-4)
    np.testing.assert_array_equal(outputs.codes, outputs.proba.argmax(axis=1))
    np.testing.assert_array_equal(outputs.confidence, outputs.proba.max(axis=1))
    assert outputs.representation.shape == (150, model.backbone.width)


def test_all_members_are_asked(model: Annotator, view: View) -> None:
    assert model.linear is not None
    assert model.profiles is not None
    together = replace(model, temperature=1.0).outputs(view)
    alone = replace(model, linear=None, profiles=None, temperature=1.0).outputs(view)
    mean = (alone.log_proba + model.linear.log_proba(view) + model.profiles.log_proba(view)) / 3
    np.testing.assert_allclose(together.log_proba, tempered(mean, 1.0), atol=1e-5)


def test_temperature_flattens_and_keeps_the_order() -> None:
    log_proba = np.log(np.array([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1]], dtype=np.float32))
    np.testing.assert_allclose(tempered(log_proba, 1.0), log_proba, atol=1e-6)
    roots = np.sqrt([0.7, 0.2, 0.1])
    np.testing.assert_allclose(np.exp(tempered(log_proba, 2.0)[0]), roots / roots.sum(), rtol=1e-5)
    assert np.isfinite(tempered(log_proba * 1e6, 0.2)).all()


def test_annotating_changes_no_random_state(model: Annotator, view: View) -> None:
    """Invariant 6."""
    before = torch.random.get_rng_state()
    first = model.outputs(view)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.rand(5)
    np.testing.assert_array_equal(model.outputs(view).log_proba, first.log_proba)


def test_every_batch_is_of_one_size(model: Annotator, view: View, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    original = type(model.tokenizer).tokenize

    def tokenize(self: object, part: View) -> object:
        sizes.append(part.counts.shape[0])
        return original(self, part)  # type: ignore[arg-type]

    monkeypatch.setattr(type(model.tokenizer), "tokenize", tokenize)
    model.represent(view)
    assert sizes == [BATCH, BATCH]


def test_the_fingerprint_tells_every_change(model: Annotator) -> None:
    """Two models with one fingerprint say the same."""
    weight = model.head.classifier.weight.detach().clone()
    types = model.types
    assert model.linear is not None
    others = [
        replace(model, temperature=model.temperature * 1.01),
        replace(model, linear=None),
        replace(model, rejector=None),
        replace(model, linear=replace(model.linear, bias=model.linear.bias + 1e-3)),
        replace(model, bank=model.bank.taken(np.arange(len(model.bank) - 1))),
        replace(model, types=CellTypes((*types.names[:-1], "renamed"), types.stages, types.ontology_ids)),
        replace(model, types=CellTypes(types.names, types.stages, ("CL:0000000", *types.ontology_ids[1:]))),
    ]
    prints = {model.fingerprint, *(other.fingerprint for other in others)}
    assert len(prints) == len(others) + 1
    assert replace(model).fingerprint == model.fingerprint
    assert torch.equal(model.head.classifier.weight, weight)


def test_a_model_on_its_device_is_itself(model: Annotator) -> None:
    assert model.on(torch.device("cpu")) is model


def test_an_empty_bank_holds_nothing() -> None:
    bank = empty_bank(7)
    assert len(bank) == 0
    assert bank.counts.shape == (0, 7)
    assert bank.measured.shape == (0, 7)


@pytest.mark.parametrize("columns_of", [lambda n: np.arange(0, n, 3), lambda n: np.arange(n)[::-1]], ids=["few", "all"])
def test_a_pretrained_model_over_fewer_genes_says_of_these_what_it_said(
    columns_of: Callable[[int], np.ndarray],
) -> None:
    base = ec.pretrain([synthetic_cells(120, seed=1)], settings=quick_pretraining())
    columns = columns_of(len(base.vocabulary))
    smaller = base.over_genes(columns)
    counts = csr_matrix(np.random.default_rng(0).poisson(1.0, (6, len(columns))).astype(np.float32))
    placed = csr_matrix((6, len(base.vocabulary)), dtype=np.float32).tolil()
    placed[:, columns] = counts
    one, other = smaller.represent(View.whole(counts))[0], base.represent(View.whole(placed.tocsr()))[0]
    np.testing.assert_allclose(one, other, atol=1e-6)
    assert smaller.vocabulary.symbols == tuple(base.vocabulary.symbols[i] for i in columns)


def test_a_model_with_types_keeps_its_genes(model: Annotator) -> None:
    with pytest.raises(ModelError, match="cannot lose genes"):
        model.over_genes(np.arange(10))

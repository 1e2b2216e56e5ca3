"""What every tokenizer promises; a new file in the registry is tested unseen."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix

from evercell.tokenizers import TOKENIZERS, TokenBatch, Tokenizer, View

N_GENES = 40


def variants(name: str) -> list[Tokenizer]:
    """The tokenizer with its own settings, and with each yes-or-no setting turned."""
    default = TOKENIZERS[name]()
    turned = [{key: not value} for key, value in default.settings.items() if isinstance(value, bool)]
    return [default, *(TOKENIZERS[name](**settings) for settings in turned)]


@pytest.fixture(params=[(name, i) for name in TOKENIZERS for i in range(len(variants(name)))], ids=str)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    name, place = request.param
    return variants(name)[place]


@pytest.fixture
def view() -> View:
    """Cells of every kind: many genes, few, none, one gene alone; gene 0 expressed in some; five genes not measured."""
    rng = np.random.default_rng(3)
    counts = rng.poisson(rng.gamma(0.4, 5.0, (7, N_GENES)))
    counts[2] = 0
    counts[3] = 0
    counts[3, 0] = 1000
    measured = np.ones(N_GENES, dtype=bool)
    measured[[5, 11, 12, 30, 39]] = False
    counts[:, ~measured] = 0
    return View.whole(csr_matrix(counts.astype(np.float32)), measured)


def cells_of(tokens: TokenBatch) -> list[dict[int, float]]:
    """Gene code -> value of each cell."""
    return [
        dict(zip(ids[mask].tolist(), values[mask].tolist(), strict=True))
        for ids, values, mask in zip(tokens.gene_ids, tokens.values, tokens.mask, strict=True)
    ]


def taken(view: View, rows: list[int]) -> View:
    return View(view.counts[rows], view.totals[rows], view.measured)


def test_each_expressed_gene_has_one_token_and_no_unmeasured_gene_has_any(tokenizer: Tokenizer, view: View) -> None:
    tokens = tokenizer.tokenize(view)
    assert len(tokens) == 7
    for cell, found in enumerate(cells_of(tokens)):
        expressed = set(view.counts[cell].indices.tolist())
        assert expressed <= found.keys() <= set(np.flatnonzero(view.measured).tolist())
        assert len(found) == int(tokens.mask[cell].sum())  # none twice
        assert all(found[gene] > 0 for gene in expressed)
        assert all(value == 0 for gene, value in found.items() if gene not in expressed)


def test_padding_is_masked_zero_and_last(tokenizer: Tokenizer, view: View) -> None:
    tokens = tokenizer.tokenize(view)
    lengths = tokens.mask.sum(dim=1, keepdim=True)
    assert torch.equal(tokens.mask, torch.arange(tokens.mask.shape[1]) < lengths)
    assert (tokens.gene_ids[~tokens.mask] == 0).all()
    assert (tokens.values[~tokens.mask] == 0).all()


def test_types_and_range_of_codes(tokenizer: Tokenizer, view: View) -> None:
    tokens = tokenizer.tokenize(view)
    assert (tokens.gene_ids.dtype, tokens.values.dtype, tokens.mask.dtype) == (torch.int64, torch.float32, torch.bool)
    assert tokens.gene_ids.shape == tokens.values.shape == tokens.mask.shape
    assert tokens.gene_ids.min() >= 0
    assert tokens.gene_ids.max() < N_GENES
    assert torch.isfinite(tokens.values).all()


def test_tokens_of_a_cell_depend_on_that_cell_only(tokenizer: Tokenizer, view: View) -> None:
    """Invariant 1: permuting cells permutes tokens; a cell alone has the tokens it has among others."""
    found = cells_of(tokenizer.tokenize(view))
    order = [4, 0, 6, 2, 5, 1, 3]
    assert cells_of(tokenizer.tokenize(taken(view, order))) == [found[cell] for cell in order]
    for cell in range(7):
        assert cells_of(tokenizer.tokenize(taken(view, [cell]))) == [found[cell]]


def test_values_are_over_the_total_that_the_view_states(tokenizer: Tokenizer, view: View) -> None:
    """Gene dropout hides genes; what is left keeps its value, because the cell was sequenced as deeply as before."""
    whole = cells_of(tokenizer.tokenize(view))[0]
    hidden = view.counts.copy()
    hidden.data[hidden.indptr[0] : hidden.indptr[1] : 2] = 0
    hidden.eliminate_zeros()
    part = cells_of(tokenizer.tokenize(View(hidden, view.totals, view.measured)))[0]
    kept = set(hidden[0].indices.tolist())
    assert kept
    assert {gene: part[gene] for gene in kept} == {gene: whole[gene] for gene in kept}


def test_mask_value_is_neither_padding_nor_an_expression(tokenizer: Tokenizer, view: View) -> None:
    if tokenizer.n_bins is None:
        assert tokenizer.mask_value is None
        return
    assert tokenizer.mask_value is not None
    assert 0 < tokenizer.mask_value < tokenizer.n_bins
    values = tokenizer.tokenize(view).values
    assert torch.equal(values, values.round())
    assert 0 <= values.min() < values.max() < tokenizer.n_bins
    assert (values != tokenizer.mask_value).all()


def test_settings_make_the_same_tokenizer_again(tokenizer: Tokenizer, view: View) -> None:
    stored = json.loads(json.dumps(tokenizer.settings))
    again = TOKENIZERS[tokenizer.name](**stored)
    assert again.settings == tokenizer.settings
    assert cells_of(again.tokenize(view)) == cells_of(tokenizer.tokenize(view))


def test_the_name_is_the_registered_one_and_counts_stay(tokenizer: Tokenizer, view: View) -> None:
    before = view.counts.copy()
    tokenizer.tokenize(view)
    assert type(tokenizer) is TOKENIZERS[tokenizer.name]
    assert (before != view.counts).nnz == 0


def test_values_are_the_published_ones() -> None:
    """By hand: counts 1, 3, 96 of 100 are 100, 300, 9,600 of 10,000; log2 of 101, 301, 9,601 is 6.7, 8.2, 13.2."""
    view = View.whole(csr_matrix(np.array([[1, 3, 0, 96]], dtype=np.float32)))
    values = TOKENIZERS["values"]().tokenize(view).values[0]
    np.testing.assert_allclose(values, np.log([101, 301, 9601]), rtol=1e-6)
    assert TOKENIZERS["bins"]().tokenize(view).values[0].tolist() == [5, 5, 5]
    deep = View(view.counts, np.array([4000.0], dtype=np.float32), view.measured)  # 2.5, 7.5, 240 of 10,000
    assert TOKENIZERS["bins"]().tokenize(deep).values[0].tolist() == [1, 3, 5]
    assert TOKENIZERS["bins"](zeros=True).tokenize(deep).values[0].tolist() == [1, 3, 0, 5]
    shallow = View(view.counts, np.array([40_000.0], dtype=np.float32), view.measured)  # 0.25: below the first bin
    assert TOKENIZERS["bins"]().tokenize(shallow).values[0].tolist() == [1, 1, 4]

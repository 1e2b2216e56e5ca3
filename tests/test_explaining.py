"""Genes behind a label: exact where they can be, complete, checked by deletion, the same for a cell in any company."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from scipy.sparse import csr_matrix

import evercell as ec
from evercell.annotator import Annotator
from evercell.backbones import BACKBONES
from evercell.errors import CellsError, LabelsError, ModelError, SettingsError
from evercell.explaining import rejected
from evercell.explaining.contributions import contributions
from evercell.explaining.removal import alike
from evercell.genes import align
from evercell.heads import GrowingHead
from evercell.linear import LinearModel
from evercell.profiles import fit_profiles
from evercell.rejection import REJECTORS
from evercell.reporting.explanation import write_explanation
from evercell.testing import _log_means, synthetic_cells
from evercell.tokenizers import TOKENIZERS, View

SMALL = {
    "latent": {"members": 2, "member_width": 8, "n_latents": 2, "depth": 1, "n_heads": 2},
    "performer": {"width": 16, "depth": 1, "n_heads": 2},
    "transformer": {"width": 16, "depth": 1, "n_heads": 2},
}


def view_of(model: Annotator, adata: AnnData) -> View:
    alignment = align(adata.var, model.vocabulary)
    return View.whole(alignment.apply(csr_matrix(adata.X)), alignment.measured)


def log_odds(model: Annotator, view: View, first: int, second: int) -> np.ndarray:
    log_proba = model.outputs(view).log_proba
    return log_proba[:, first] - log_proba[:, second]


@pytest.fixture(scope="module")
def found(model: Annotator) -> ec.Explanation:
    return ec.explain(model, synthetic_cells(150, seed=2), groups="cell_type", max_cells=8, shown=False)


# --- contributions


def test_contributions_of_the_trained_model_add_up_to_its_log_odds(model: Annotator, query: AnnData) -> None:
    view = view_of(model, query[:12])
    parts = contributions(model, view, 0, 2)
    np.testing.assert_allclose(parts.log_odds, log_odds(model, view, 0, 2), atol=1e-3)
    np.testing.assert_allclose(parts.base + parts.total.sum(axis=1), parts.log_odds, atol=0.05)
    assert np.abs(parts.log_odds - parts.base).max() > 1  # or there was nothing to add up
    assert not parts.total[view.counts.toarray() == 0].any()


@pytest.mark.parametrize("tokenizer", ["values", "bins", "bins with zeros"])
@pytest.mark.parametrize("backbone", sorted(SMALL))
def test_every_backbone_and_tokenizer_is_complete(
    backbone: str, tokenizer: str, model: Annotator, query: AnnData
) -> None:
    assert set(BACKBONES) == set(SMALL)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tokens = TOKENIZERS["values"]() if tokenizer == "values" else TOKENIZERS["bins"](zeros="zeros" in tokenizer)
        made = BACKBONES[backbone](len(model.vocabulary), n_bins=tokens.n_bins, **SMALL[backbone]).eval()
        head = GrowingHead(made.width, 4).eval()
    other = replace(model, tokenizer=tokens, backbone=made, head=head, linear=None)
    view = view_of(model, query[:3])
    parts = contributions(other, view, 1, 3)
    np.testing.assert_allclose(parts.log_odds, log_odds(other, view, 1, 3), atol=1e-4)
    moved = np.abs(parts.log_odds - parts.base)
    assert moved.max() > 1e-3
    np.testing.assert_allclose(parts.base + parts.total.sum(axis=1), parts.log_odds, atol=0.02 * moved.max())


@pytest.mark.parametrize("scaled", [False, True])
def test_a_purely_linear_model_is_explained_exactly(model: Annotator, query: AnnData, scaled: bool) -> None:
    rng = np.random.default_rng(0)
    n_genes = len(model.vocabulary)
    linear = LinearModel(rng.normal(size=(n_genes, 4)).astype(np.float32), np.arange(4, dtype=np.float32))
    if scaled:
        linear = replace(linear, centre=rng.random(n_genes).astype(np.float32), ceiling=np.full(n_genes, 2, np.float32))
    only = replace(model, linear=linear, linear_share=1.0, profiles=None, temperature=2.0)
    view = view_of(model, query[:5])
    parts = contributions(only, view, 3, 1)
    logged = np.log1p(view.counts.toarray() * 1e4 / view.totals[:, None])
    expected = (np.minimum(logged, 2) - linear.centre if scaled else logged) * (
        linear.weight[:, 3] - linear.weight[:, 1]
    )
    np.testing.assert_allclose(parts.total, expected / 2, atol=1e-4)
    np.testing.assert_allclose(parts.base, 1.0)
    np.testing.assert_allclose(parts.base + parts.total.sum(axis=1), log_odds(only, view, 3, 1), atol=1e-3)


def test_profiles_are_a_member_like_the_others(model: Annotator, query: AnnData) -> None:
    codes = query.obs["cell_type"].cat.codes.to_numpy().astype(np.int64)
    view = view_of(model, query)
    measured = view.measured[None]
    fitted = fit_profiles(view.counts, codes, np.zeros(len(codes), dtype=np.int64), measured, n_types=4)
    with_profiles = replace(model, profiles=replace(fitted, known=np.array([True, True, True, False])))
    for first, second in ((0, 1), (2, 3)):
        parts = contributions(with_profiles, view.taken(np.arange(6)), first, second)
        expected = log_odds(with_profiles, view.taken(np.arange(6)), first, second)
        np.testing.assert_allclose(parts.log_odds, expected, atol=2e-3)
        np.testing.assert_allclose(parts.base + parts.total.sum(axis=1), parts.log_odds, atol=0.05)
        assert np.abs(parts.profiles).max() > 0.1
        alone = contributions(with_profiles, view.taken(np.array([3])), first, second)
        assert np.array_equal(parts.total[3], alone.total[0])


def test_a_cell_has_the_same_contributions_in_any_company(model: Annotator, query: AnnData) -> None:
    view = view_of(model, query[:9])
    together = contributions(model, view, 0, 1).total
    alone = contributions(model, view.taken(np.array([4])), 0, 1).total
    assert np.array_equal(together[4], alone[0])


# --- reasons


def test_planted_markers_carry_the_labels_and_deletion_beats_random_genes(found: ec.Explanation) -> None:
    means = _log_means(300, 4)
    symbols = synthetic_cells(10).var_names
    names = [one.label for one in found.reasons]
    for code, one in enumerate(found.reasons):
        assert one.name == f"cell_type {one.label}"
        planted = set(symbols[means[code] - means[names.index(one.runner_up)] > 1])
        first = one.for_label()[:5]
        assert len(planted & set(first)) >= 4, (one.label, first)
        assert one.faithful
        last = one.deletion.iloc[-1]
        assert last["log_odds_drop"] > last["random_log_odds_drop"] + 1
        means_of = one.genes.set_index("gene").loc[first]
        assert means_of["expression"].mean() > means_of["elsewhere"].mean() + 0.5
        np.testing.assert_allclose(one.base + one.genes["contribution"].sum() + one.rest, one.log_odds, atol=0.05)


def test_what_would_flip_a_label_is_verified_on_the_model(model: Annotator, query: AnnData) -> None:
    found = ec.explain(model, query, cells=list(query.obs_names[:12]), shown=False)
    flipped = [one for one in found.reasons if one.flip is not None]
    assert flipped
    for one in flipped:
        assert one.flip is not None
        view = view_of(model, query[one.name])
        codes = [model.vocabulary.symbols.index(gene) for gene in one.flip.genes]
        counts = view.counts.toarray()
        counts[:, codes] = 0
        without = model.outputs(replace(view, counts=csr_matrix(counts)))
        assert model.types.names[without.codes[0]] == one.flip.becomes != one.label
        assert without.confidence[0] == pytest.approx(one.flip.probability, abs=1e-5)
        counts = view.counts.toarray()
        counts[:, codes[:-1]] = 0
        fewer = model.outputs(replace(view, counts=csr_matrix(counts)))
        assert model.types.names[fewer.codes[0]] != one.flip.becomes
        assert f"would be `{one.flip.becomes}`" in one.sentence()


def test_a_label_that_no_genes_flip_is_said_so(model: Annotator, query: AnnData) -> None:
    assert model.linear is not None
    bias = np.array([100.0, 0, 0, 0], dtype=np.float32)
    stubborn = replace(model, linear=replace(model.linear, bias=bias))
    (one,) = ec.explain(stubborn, query, cells=[query.obs_names[0]], shown=False).reasons
    assert one.flip is None
    assert one.sentence().endswith("no set of 50 genes flips it")


def test_the_same_seed_gives_the_same_bits_and_another_other_cells(model: Annotator, query: AnnData) -> None:
    asked = {"groups": "cell_type", "group": ["beta"], "max_cells": 5, "shown": False}
    first, again, other = (ec.explain(model, query, seed=seed, **asked) for seed in (3, 3, 4))  # type: ignore[arg-type]
    assert first.to_dict() == again.to_dict()
    assert not first.genes.equals(other.genes)


def test_one_cell_does_not_depend_on_the_others(model: Annotator, query: AnnData) -> None:
    name = str(query.obs_names[7])
    asked = {"cells": [name], "shown": False}
    among, alone = (ec.explain(model, cells, **asked)[name] for cells in (query, query[5:9]))  # type: ignore[arg-type]
    several = ec.explain(model, query, cells=list(query.obs_names[3:9]), shown=False)[name]
    for one in (alone, several):
        own = "elsewhere"  # the one thing that is about other cells
        pd.testing.assert_frame_equal(one.genes.drop(columns=own), among.genes.drop(columns=own), check_exact=True)
        pd.testing.assert_frame_equal(one.deletion, among.deletion, check_exact=True)
        assert (one.flip, one.probability) == (among.flip, among.probability)


def test_labels_in_the_file_are_taken_and_missing_ones_made(
    model: Annotator, query: AnnData, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh = ec.explain(model, query, types=["delta"], max_cells=4, shown=False)
    annotated = query.copy()
    ec.annotate(model, annotated, inplace=True, shown=False)
    monkeypatch.setattr("evercell.discovery.annotated.annotate", lambda *_, **__: pytest.fail("annotated again"))
    again = ec.explain(model, annotated, types=["delta"], max_cells=4, shown=False)
    assert again.to_dict() == fresh.to_dict()
    assert (again["delta"].label, again.kind) == ("delta", "type")
    every = ec.explain(model, annotated, max_cells=2, shown=False)
    assert {one.name for one in every.reasons} == set(annotated.obs["evercell"].astype(str))


def test_against_another_type_than_the_runner_up(model: Annotator, query: AnnData) -> None:
    usual = ec.explain(model, query, types=["beta"], max_cells=4, shown=False)["beta"]
    other = next(one for one in model.types.names if one not in ("beta", usual.runner_up))
    asked = ec.explain(model, query, types=["beta"], against=other, max_cells=4, shown=False)["beta"]
    assert asked.runner_up == other
    assert set(asked.genes["direction"]) == {"beta", other}
    assert not asked.genes.equals(usual.genes)


def test_gradient_at_the_cell_is_another_method(model: Annotator, query: AnnData) -> None:
    one = ec.explain(model, query, cells=[query.obs_names[0]], method="gradient", shown=False).reasons[0]
    two = ec.explain(model, query, cells=[query.obs_names[0]], shown=False).reasons[0]
    assert one.genes["linear"].abs().sum() > 0
    assert one.genes["gene"].tolist() != two.genes["gene"].tolist()


def test_merged_cells_are_explained_by_the_genes_of_their_source(model: Annotator, tmp_path: Path) -> None:
    first, second = synthetic_cells(40, seed=5), synthetic_cells(40, seed=6)[:, :200].copy()
    first.write_h5ad(tmp_path / "a.h5ad")
    second.write_h5ad(tmp_path / "b.h5ad")
    ec.merge([tmp_path / "a.h5ad", tmp_path / "b.h5ad"], tmp_path / "both.h5ad", shown=False)
    merged = ec.read_cells(tmp_path / "both.h5ad")
    (name,) = merged.obs_names[merged.obs["barcode"] == second.obs_names[3]]
    among = ec.explain(model, merged, cells=[name], shown=False)[name]
    alone = ec.explain(model, second, cells=[second.obs_names[3]], shown=False).reasons[0]
    assert not set(among.genes["gene"]) & set(first.var_names[200:])
    pd.testing.assert_series_equal(among.genes["contribution"], alone.genes["contribution"], atol=1e-4)
    both = ec.explain(model, merged, groups="cell_type", group=["beta"], max_cells=12, shown=False).reasons[0]
    assert both.explained == 12


# --- unknown cells


def test_parts_of_the_unknown_score_add_up(model: Annotator, query: AnnData) -> None:
    outputs = model.outputs(view_of(model, query))
    assert model.rejector is not None
    parts = rejected.score_parts(model.rejector, outputs)
    assert set(parts) == {"confidence", "prototypes", "markers"}
    np.testing.assert_allclose(sum(parts.values()), model.rejector.score(outputs), rtol=1e-5)
    energy = REJECTORS["energy"].fitted(outputs, outputs.codes)
    assert list(rejected.score_parts(energy, outputs)) == ["energy"]


def test_unknown_cells_have_a_part_that_decides_and_genes_that_do_not_fit(model: Annotator) -> None:
    strange = synthetic_cells(300, n_types=6, seed=2)
    found = ec.explain(model, strange, types=["Unknown"], reject=0.1, max_cells=20, shown=False)["Unknown"]
    assert found.rejected and found.unknown is not None
    assert "Unknown, nearest `" in found.sentence()
    unknown = found.unknown
    assert unknown.cells == found.explained == 20
    assert unknown.score > unknown.threshold
    assert unknown.parts["value"].sum() == pytest.approx(unknown.score, abs=1e-4)
    assert unknown.parts["surplus"].iloc[0] > 0 and unknown.parts["surplus"].is_monotonic_decreasing
    without = unknown.score - unknown.parts["surplus"]
    assert (unknown.parts["decisive"] == (without <= unknown.threshold)).all()
    assert len(unknown.unexpected) and (unknown.unexpected["loss"] > 0).all()
    assert str(unknown.unexpected["gene"].iloc[0]) in unknown.sentence()
    off = ec.explain(model, strange, groups="cell_type", group=["acinar"], reject="off", max_cells=5, shown=False)
    assert off.reasons[0].unknown is None


def test_a_missing_and_an_unexpected_marker_gene_are_named(model: Annotator) -> None:
    cells = synthetic_cells(40, seed=2)
    rejector = model.rejector
    assert rejector is not None
    code = model.types.names.index("beta")
    genes, profiles = rejector.arrays["genes"].astype(int), rejector.arrays["profiles"]
    own, foreign = genes[profiles[:, code].argmax()], genes[profiles[:, code].argmin()]
    beta = cells[(cells.obs["cell_type"] == "beta").to_numpy()][:1].copy()
    symbols = model.vocabulary.symbols
    counts = np.asarray(beta.X.todense()).astype(np.int64)
    counts[0, beta.var_names.get_loc(symbols[own])] = 0
    counts[0, beta.var_names.get_loc(symbols[foreign])] = 200
    changed = AnnData(csr_matrix(counts), obs=beta.obs[[]], var=beta.var)
    found = ec.explain(model, changed, cells=[changed.obs_names[0]], reject=0.99, shown=False).reasons[0]
    assert found.unknown is not None and found.label == "beta"
    assert symbols[own] in found.unknown.missing["gene"].tolist()
    assert found.unknown.unexpected["gene"].iloc[0] == symbols[foreign]


# --- random genes, page, errors


def test_random_genes_are_of_like_expression_and_never_the_first_ones() -> None:
    rng = np.random.default_rng(0)
    expression = np.concatenate([np.zeros(100), np.sort(rng.gamma(1.0, 1.0, 900))])
    genes = np.array([990, 500, 120, 700])
    drawn = alike(expression, genes, rng)
    assert len(set(drawn.tolist())) == 4 and not set(drawn) & set(genes)
    assert (expression[drawn] > 0).all()
    assert np.abs(drawn - genes).max() <= 25
    assert len(alike(expression[98:103], np.array([2, 3]), rng)) == 1


class Text(HTMLParser):
    """Tags and visible text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        assert not [name for name, value in attrs if name.startswith("on") or (value or "").startswith("http")]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_escapes_names_and_holds_every_gene(found: ec.Explanation, tmp_path: Path) -> None:
    hostile = "</style><script>alert(1)</script>"
    one = found.reasons[0]
    genes = one.genes.assign(gene=[hostile, *one.genes["gene"].iloc[1:]], direction=hostile)
    bad = replace(one, name=hostile, label=hostile, runner_up=hostile, genes=genes)
    page = write_explanation(replace(found, reasons=(bad, *found.reasons[1:])), tmp_path / "why.html", title=hostile)
    text = page.read_text(encoding="utf-8")
    read = Text(text)
    assert "script" not in read.tags
    assert hostile in read.text
    assert all(gene in read.text for gene in found.genes["gene"])
    assert found.reasons[1].sentence().replace("`", "") in read.text  # as code
    regions = re.findall(r'role="region" aria-label="([^"]*)"', text)
    assert len(set(regions)) == len(regions) >= 4
    assert "http://" not in text and "https://" not in text


def test_tables_and_json_of_all_reasons(found: ec.Explanation) -> None:
    assert found.genes.columns.tolist() == [
        "name", "label", "runner_up", "gene", "contribution", "transformer", "linear", "profiles", "expression",
        "elsewhere", "direction",
    ]  # fmt: skip
    members = found.genes[["transformer", "linear", "profiles"]].sum(axis=1)
    np.testing.assert_allclose(members, found.genes["contribution"], atol=1e-5)
    assert set(found.deletion["name"]) == set(found.genes["name"])
    assert [one["sentence"] for one in found.to_dict()["reasons"]] == found.summary().splitlines()
    with pytest.raises(KeyError):
        found["nothing"]


@pytest.mark.parametrize(
    ("asked", "error", "message"),
    [
        ({"cells": ["study2_cell0000"]}, CellsError, "`the data` has no cell `study2_cell0000`"),
        ({"groups": "leiden"}, LabelsError, "no column `leiden` in obs; columns: `cell_type`, `donor`"),
        ({"groups": "cell_type", "group": ["betta"]}, LabelsError, "has no group `betta`\nhint: did you mean `beta`"),
        ({"types": ["Beta"]}, LabelsError, "the model knows no type `Beta`"),
        ({"types": ["beta"], "against": "T"}, LabelsError, "against: the model knows no type `T`"),
        ({"types": ["beta"], "against": "beta"}, SettingsError, "held against itself"),
        ({"types": ["beta"], "cells": ["a"]}, SettingsError, "cells and types are given"),
        ({"group": ["beta"]}, SettingsError, "pass groups too"),
        ({"method": "magic"}, SettingsError, "method is `magic`"),
        ({"top": 0}, SettingsError, "top is 0"),
    ],
)
def test_what_cannot_be_asked(
    asked: dict[str, object], error: type[Exception], message: str, model: Annotator, query: AnnData
) -> None:
    with pytest.raises(error) as caught:
        ec.explain(model, query, shown=False, **asked)  # type: ignore[arg-type]
    assert message in str(caught.value)


def test_labels_without_cells_and_cells_without_counts(model: Annotator, query: AnnData) -> None:
    beta = query[(query.obs["cell_type"] == "beta").to_numpy()].copy()
    with pytest.raises(LabelsError, match="no cell of `the data` is labelled `delta`"):
        ec.explain(model, beta, types=["delta"], reject="off", shown=False)
    counts = np.asarray(beta.X.todense())
    counts[0] = 0
    empty = AnnData(csr_matrix(counts), obs=beta.obs, var=beta.var)
    with pytest.raises(CellsError, match="no count of a gene that the model knows"):
        ec.explain(model, empty, cells=[empty.obs_names[0]], shown=False)
    with pytest.raises(ModelError, match="pretrained only"):
        ec.explain(replace(model, rejector=None), beta, shown=False)

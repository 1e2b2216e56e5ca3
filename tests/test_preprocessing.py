"""Preprocessing gives Scanpy's numbers, learns from training cells only, and does the same to a later file."""

from __future__ import annotations

import json
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import scipy.sparse as sp
from scipy.stats import median_abs_deviation

from evercell.cells import find_counts, write_cells
from evercell.errors import CellsError, GenesError, SettingsError
from evercell.examples import load_example
from evercell.gene_names import canonical_genes, current_symbol, known_genes
from evercell.preprocessing import KEY, Preprocessing, PreprocessingSettings, preprocess
from evercell.testing import synthetic_cells

MITO = ["MT-ND1", "MT-CO1", "MT-CYB"]


def cells_with_mito(n_cells: int = 240, seed: int = 0, **more: Any) -> ad.AnnData:
    """Made-up cells of three batches of different depth, with mitochondrial genes; some are poor, some are burst."""
    adata = synthetic_cells(n_cells, seed=seed, **more)
    rng = np.random.default_rng(seed)
    counts = adata.X.toarray().astype(np.int64)
    depth = np.array([0.5, 0.8, 1.0])[np.arange(n_cells) % 3]
    counts = rng.binomial(counts, depth[:, None])
    counts[:6] = rng.binomial(counts[:6], 0.05)
    mito = rng.poisson(0.03 * counts.sum(axis=1, keepdims=True) + 0.1, (n_cells, len(MITO)))
    mito[6:14] += counts[6:14].sum(axis=1, keepdims=True)
    values = np.hstack([counts, mito])
    found = ad.AnnData(
        sp.csr_matrix(values.astype(np.float32)),
        obs=adata.obs.assign(batch=[f"b{i % 3}" for i in range(n_cells)]),
        var=pd.DataFrame(index=[*adata.var_names, *MITO]),
    )
    found.obs["split"] = np.where(np.arange(n_cells) % 4 == 0, "test", "train")
    found.obs["is_training"] = found.obs["split"] == "train"
    return found


def few(**more: Any) -> PreprocessingSettings:
    return PreprocessingSettings(**({"min_genes": 20} | more))


def by_scanpy(adata: ad.AnnData, settings: PreprocessingSettings, *, batch: str | None = None) -> ad.AnnData:
    """The same with Scanpy alone, in the order of its tutorial."""
    plain = adata.copy()
    plain.X = plain.X.astype(np.float32)
    plain.var["mt"] = plain.var_names.str.startswith("MT-")
    sc.pp.calculate_qc_metrics(plain, qc_vars=["mt"], inplace=True, percent_top=None)
    sc.pp.filter_cells(plain, min_genes=settings.min_genes)
    if settings.max_mito is not None:
        plain = plain[plain.obs["pct_counts_mt"] <= settings.max_mito].copy()
    sc.pp.filter_genes(plain, min_cells=settings.min_cells)
    plain.layers["counts"] = plain.X.copy()
    sc.pp.normalize_total(plain, target_sum=settings.target_sum)
    if settings.log != "none":
        sc.pp.log1p(plain, base=2 if settings.log == "2" else None)
    if settings.variable_genes is not None:
        sc.pp.highly_variable_genes(plain, n_top_genes=settings.variable_genes, flavor="seurat", batch_key=batch)
    return plain


@pytest.mark.parametrize(
    ("settings", "batch"),
    [
        (few(), None),
        (few(log="2", variable_genes=60, target_sum=1e3, min_cells=30), None),
        (few(variable_genes=60, max_mito=30), "batch"),
        (few(log="none"), None),
    ],
)
def test_the_numbers_of_scanpy(settings: PreprocessingSettings, batch: str | None) -> None:
    adata = cells_with_mito()
    cells, _ = preprocess(adata, settings, batch=batch)
    plain = by_scanpy(adata, settings, batch=batch)
    assert 0 < cells.n_obs < adata.n_obs and cells.n_vars > 0
    assert list(cells.obs_names) == list(plain.obs_names)
    assert list(cells.var_names) == list(plain.var_names)
    assert cells.X.dtype == np.float32
    np.testing.assert_allclose(cells.X.toarray(), plain.X.toarray(), rtol=1e-5)
    np.testing.assert_array_equal(cells.layers["counts"].toarray(), plain.layers["counts"].toarray())
    for column in ("n_genes_by_counts", "total_counts", "pct_counts_mt"):
        np.testing.assert_allclose(cells.obs[column], plain.obs[column], rtol=1e-5)
    if settings.variable_genes:
        assert plain.var["highly_variable"].sum() == settings.variable_genes
        np.testing.assert_array_equal(cells.var["highly_variable"], plain.var["highly_variable"])
        np.testing.assert_allclose(cells.var["dispersions_norm"], plain.var["dispersions_norm"], rtol=1e-3, atol=1e-4)
    # Scanpy goes on from here: it undoes the logarithm by the base that it finds.
    if settings.log != "none":
        again = sc.pp.highly_variable_genes(cells, n_top_genes=50, flavor="seurat", inplace=False)
        theirs = sc.pp.highly_variable_genes(plain, n_top_genes=50, flavor="seurat", inplace=False)
        np.testing.assert_allclose(again["means"], theirs["means"], rtol=1e-4)


def test_real_cells_with_plain_scanpy() -> None:
    adata = load_example("baron_stage1")
    settings = PreprocessingSettings(min_genes=800, min_cells=10, variable_genes=500)
    cells, _ = preprocess(adata, settings, batch="donor")
    plain = by_scanpy(adata, PreprocessingSettings(**(settings.to_dict() | {"max_mito": None})), batch="donor")
    assert cells.shape == plain.shape and cells.n_obs < adata.n_obs
    np.testing.assert_allclose(cells.X.toarray(), plain.X.toarray(), rtol=1e-5)
    np.testing.assert_array_equal(cells.var["highly_variable"], plain.var["highly_variable"])


def test_the_cells_given_are_not_changed_and_nothing_of_them_is_lost() -> None:
    adata = cells_with_mito()
    n_cells, n_genes = adata.shape
    adata.obsm["X_pca"] = np.arange(n_cells * 2.0).reshape(n_cells, 2)
    adata.obsp["near"] = sp.eye(n_cells, format="csr")
    adata.varm["loadings"] = np.arange(n_genes * 2.0).reshape(n_genes, 2)
    adata.layers["spliced"] = adata.X * 2
    adata.uns["source"] = {"a": np.arange(3)}
    adata.var["chromosome"] = pd.Categorical(["1", "2"] * (n_genes // 2) + ["1"] * (n_genes % 2))
    before = adata.copy()
    cells, _ = preprocess(adata, few(variable_genes=50, only_variable=True, mad=5), batch="batch")
    for one, other in ((adata.obs, before.obs), (adata.var, before.var)):
        pd.testing.assert_frame_equal(one, other)
    assert (adata.X != before.X).nnz == 0 and set(adata.uns) == {"source"} and set(adata.layers) == {"spliced"}
    at = adata.obs_names.get_indexer(cells.obs_names)
    genes = adata.var_names.get_indexer(cells.var_names)
    assert len(genes) == 50 and len(at) < n_cells
    np.testing.assert_array_equal(cells.obsm["X_pca"], adata.obsm["X_pca"][at])
    np.testing.assert_array_equal(cells.varm["loadings"], adata.varm["loadings"][genes])
    np.testing.assert_array_equal(cells.layers["spliced"].toarray(), adata.layers["spliced"][at][:, genes].toarray())
    assert cells.obsp["near"].nnz == len(at)
    assert cells.uns["source"]["a"].tolist() == [0, 1, 2]
    assert set(adata.obs) < set(cells.obs) and "chromosome" in cells.var
    # totals were taken over all genes, so fewer genes sum to less than the target
    assert np.expm1(cells.X.toarray()).sum(axis=1).max() < 1e4 - 1


def test_outliers_as_the_best_practices_tell_them() -> None:
    """Heumos et al. 2023: log1p counts and genes on both sides, mitochondrial share above, by batch."""
    adata = cells_with_mito()
    made = preprocess(adata, few(mad=3), batch="batch")
    found = made.before
    passed = (found["n_genes_by_counts"] >= 20) & (found["pct_counts_mt"] <= 20)
    expected = passed.to_numpy().copy()
    for batch in ("b0", "b1", "b2"):
        rows = ((found["batch"] == batch) & passed).to_numpy()
        for column, upper_only in (("n_genes_by_counts", False), ("total_counts", False), ("pct_counts_mt", True)):
            values = found[column] if upper_only else np.log1p(found[column])
            middle, width = np.median(values[rows]), 3 * median_abs_deviation(values[rows])
            outside = values > middle + width
            if not upper_only:
                outside |= values < middle - width
            expected &= ~((found["batch"] == batch).to_numpy() & outside.to_numpy())
    np.testing.assert_array_equal(found["kept"], expected)
    assert expected.sum() < passed.sum()
    depth = {batch: limits["counts_low"] for batch, limits in made.limits.items()}
    assert depth["b0"] < depth["b1"] < depth["b2"]


def test_cells_that_are_all_alike_have_no_outliers() -> None:
    counts = np.tile(np.arange(1, 61), (60, 1))
    counts[:5, :40] = 0
    adata = ad.AnnData(
        sp.csr_matrix(counts.astype(np.float32)),
        obs=pd.DataFrame(index=[f"c{i}" for i in range(60)]),
        var=pd.DataFrame(index=synthetic_cells(8, n_genes=60).var_names),
    )
    made = preprocess(adata, few(min_genes=5, mad=5))
    assert made.cells.n_obs == 60
    assert any("the same number of genes" in note for note in made.notes)


@pytest.mark.parametrize("training", ["is_training", "split=train"])
def test_what_is_learnt_is_learnt_from_training_cells(training: str) -> None:
    """Other test cells change nothing but themselves (invariant 4)."""
    adata, other = cells_with_mito(), cells_with_mito()
    test = (adata.obs["split"] == "test").to_numpy()
    rng = np.random.default_rng(5)
    shuffled = other.X.toarray()
    shuffled[test] = rng.permutation(shuffled[test].ravel()).reshape(shuffled[test].shape)
    other.X = sp.csr_matrix(shuffled)
    settings = few(variable_genes=60, min_cells=60, mad=4)
    first, steps = preprocess(adata, settings, batch="batch", training=training)
    second, others = preprocess(other, settings, batch="batch", training=training)
    assert steps == others
    assert first.n_vars < adata.n_vars
    same = first.obs_names[first.obs["split"] == "train"]
    np.testing.assert_array_equal(first[same].X.toarray(), second[same].X.toarray())
    # and without naming them it is learnt from all
    assert preprocess(adata, settings, batch="batch").preprocessing != steps
    assert preprocess(other, settings, batch="batch").preprocessing.names != steps.names


@pytest.mark.parametrize(
    ("training", "words"),
    [
        ("nothing", "no column `nothing`"),
        ("split", "--training split=VALUE"),
        ("split=validation", "it holds `test`, `train`"),
        ("cell_type=alpha=1", "has `alpha=1` in `cell_type`"),
    ],
)
def test_training_cells_that_are_not_there(training: str, words: str) -> None:
    with pytest.raises(SettingsError, match="training") as caught:
        preprocess(cells_with_mito(), few(), training=training)
    assert words in str(caught.value)


def test_the_same_file_again_gives_the_same() -> None:
    adata = cells_with_mito()
    first, steps = preprocess(adata, few(mad=5, variable_genes=80, log="2"), batch="batch")
    again, same = steps.apply(adata, batch="batch")
    assert same is steps
    assert list(again.obs_names) == list(first.obs_names) and list(again.var_names) == list(first.var_names)
    np.testing.assert_array_equal(again.X.toarray(), first.X.toarray())
    np.testing.assert_array_equal(again.layers["counts"].toarray(), first.layers["counts"].toarray())
    np.testing.assert_array_equal(again.var["highly_variable"], first.var["highly_variable"])
    assert again.var["measured"].all()


def test_a_later_file_with_other_names_and_fewer_genes() -> None:
    first, steps = preprocess(cells_with_mito(), few(variable_genes=80, only_variable=True))
    later = cells_with_mito(90, seed=3)
    ids = canonical_genes(later.var).names
    whole = steps.apply(later).cells
    renamed = later.copy()
    renamed.var_names = [str(one) for one in ids]
    np.testing.assert_array_equal(steps.apply(renamed).cells.X.toarray(), whole.X.toarray())

    rng = np.random.default_rng(0)
    kept = np.sort(rng.permutation(later.n_vars)[:200])
    shuffled = renamed[:, rng.permutation(kept)].copy()
    shuffled.var["number"] = np.arange(200)
    shuffled.var["word"] = pd.Categorical(["a", "b"] * 100)
    shuffled.varm["loadings"] = np.ones((200, 2), dtype=np.float32)
    shuffled.layers["spliced"] = shuffled.X * 2
    made = steps.apply(shuffled, name="later.h5ad")
    cells = made.cells
    assert list(cells.var_names) == list(first.var_names)
    measured = np.isin(canonical_genes(cells.var).names, ids[kept])
    np.testing.assert_array_equal(cells.var["measured"], measured)
    assert 0 < measured.sum() < len(measured)
    assert cells.layers["counts"][:, np.flatnonzero(~measured)].nnz == 0
    both = whole.obs_names.intersection(cells.obs_names)
    np.testing.assert_array_equal(
        cells[both].layers["counts"][:, np.flatnonzero(measured)].toarray(),
        whole[both].layers["counts"][:, np.flatnonzero(measured)].toarray(),
    )
    missing = set(steps.names) - set(later.var_names[kept])
    note = next(note for note in made.notes if "not measured" in note and "genes were" in note)
    assert note.startswith(f"{len(missing):,} of {len(steps.names):,} genes were not measured and are zeros")
    assert next(name for name in steps.names if name in missing) in note
    # totals over the genes of the settings, whether they are variable or not
    of_settings = np.isin(later.var_names, steps.names) & np.isin(np.arange(later.n_vars), kept)
    total = later[cells.obs_names].X[:, np.flatnonzero(of_settings)].sum(axis=1).A1[0]
    gene = cells.var_names[np.flatnonzero(measured)[0]]
    column = cells.var_names.get_loc(gene)
    expected = np.log1p(cells.layers["counts"][0, column] / total * 1e4)
    assert cells.X[0, column] == pytest.approx(expected, rel=1e-5)
    np.testing.assert_array_equal(cells.layers["spliced"].toarray(), 2 * cells.layers["counts"].toarray())
    assert np.isnan(cells.varm["loadings"][~measured]).all() and (cells.varm["loadings"][measured] == 1).all()


def test_a_later_file_can_be_written_and_preprocessed_once_more(tmp_path: Path) -> None:
    _, steps = preprocess(cells_with_mito(), few())
    later = cells_with_mito(60, seed=2)[:, 40:].copy()
    later.var["text"] = "word"
    later.var["good"] = True
    cells = steps.apply(later).cells
    for suffix in (".h5ad", ".zarr"):
        write_cells(cells, tmp_path / f"later{suffix}")
        assert Preprocessing.load(tmp_path / f"later{suffix}") == steps
    again = steps.apply(ad.read_h5ad(tmp_path / "later.h5ad")).cells
    # genes that were filled with zeros are still genes that were not measured
    np.testing.assert_array_equal(again.var["measured"], cells.var["measured"])
    np.testing.assert_array_equal(again.X.toarray(), cells.X.toarray())


def test_mouse_cells_come_through_human_steps() -> None:
    _, steps = preprocess(synthetic_cells(100, n_genes=150), few(min_genes=5))
    made = steps.apply(synthetic_cells(50, n_genes=150, species="mouse", seed=2))
    assert made.cells.var["measured"].sum() > 20
    assert any("orthologues" in note for note in made.notes)
    assert canonical_genes(made.cells.var).species == "human"
    assert canonical_genes(made.cells.var).names.tolist() == list(steps.ids)


def test_a_file_of_other_genes_is_refused() -> None:
    _, steps = preprocess(synthetic_cells(100, n_genes=150), few(min_genes=5))
    strange = synthetic_cells(50, n_genes=100)
    strange.var_names = [f"strange{i}" for i in range(100)]
    with pytest.raises(GenesError, match=r"`x\.h5ad` shares 0"):
        steps.apply(strange, name="x.h5ad")


def test_two_rows_of_one_gene_stay_apart() -> None:
    """A second row under an older name of the same gene: kept as it came, and found again by its name."""
    adata = synthetic_cells(100, n_genes=60)
    gene = adata.var_names[0]
    twin = ad.concat([adata, adata[:, [0]].copy()], axis=1, merge="same")
    twin.var_names = [*adata.var_names, f"{gene}-1"]
    twin.obs = adata.obs
    assert canonical_genes(twin.var).names[0] == canonical_genes(twin.var).names[-1]
    first, steps = preprocess(twin, few(min_genes=5))
    again = steps.apply(twin).cells
    np.testing.assert_array_equal(again.layers["counts"].toarray(), first.layers["counts"].toarray())
    one = steps.apply(adata).cells
    assert one.var["measured"].tolist() == [True] * 60 + [False]


@pytest.mark.parametrize("species", ["human", "mouse"])
@pytest.mark.parametrize("named", ["symbols", "ids"])
def test_mitochondrial_genes_by_any_name(species: str, named: str) -> None:
    adata = synthetic_cells(60, n_genes=100, species=species)
    shared = {"MT-ND1", "MT-CO1", "MT-ND2"}
    ids = [one for one in known_genes(species) if current_symbol(one).upper() in shared]  # type: ignore[arg-type]
    assert len(ids) == 3
    all_ids = [*canonical_genes(adata.var).names, *ids]
    names = all_ids if named == "ids" else [current_symbol(one) for one in all_ids]
    counts = sp.hstack([adata.X, sp.csr_matrix(np.full((60, 3), 10))], format="csr")
    adata = ad.AnnData(counts.astype(np.float32), obs=adata.obs, var=pd.DataFrame(index=names))
    cells, _ = preprocess(adata, few(min_genes=5, max_mito=100))
    assert cells.var["mt"].sum() == 3
    np.testing.assert_allclose(cells.obs["pct_counts_mt"], 3000 / cells.obs["total_counts"])


def test_a_panel_without_mitochondrial_genes_says_so() -> None:
    made = preprocess(synthetic_cells(60), few())
    assert "pct_counts_mt" not in made.cells.obs and made.cells.n_obs == 60
    assert any("no mitochondrial gene was measured" in note for note in made.notes)
    assert not any(step.name == "mitochondrial share" for step in made.steps)


def merged(adata: ad.AnnData, unmeasured: np.ndarray) -> ad.AnnData:
    """As `merge` leaves it: of two sources, the second of which did not measure some genes."""
    adata = adata.copy()
    second = np.arange(adata.n_obs) % 2 == 1
    counts = adata.X.toarray()
    counts[np.ix_(second, unmeasured)] = 0
    adata.X = sp.csr_matrix(counts)
    adata.obs["source"] = np.where(second, "two", "one")
    adata.varm["measured"] = np.column_stack([np.ones(adata.n_vars, dtype=bool), ~unmeasured])
    adata.uns["evercell_merge"] = {"sources": np.array(["one", "two"], dtype=object), "manifest": "{}"}
    return adata


def test_a_merged_file_keeps_what_was_measured_and_does_not_choose_by_it() -> None:
    adata = cells_with_mito()
    chosen, _ = preprocess(adata, few(variable_genes=60))
    unmeasured = np.isin(adata.var_names, chosen.var_names[chosen.var["highly_variable"]][:20])
    unmeasured |= adata.var_names.isin(MITO)
    joined = merged(adata, unmeasured)
    made = preprocess(joined, few(variable_genes=60), batch="source")
    cells = made.cells
    of = adata.var_names.get_indexer(cells.var_names)
    np.testing.assert_array_equal(cells.varm["measured"], joined.varm["measured"][of])
    assert cells.uns["evercell_merge"]["sources"].tolist() == ["one", "two"]
    assert cells.var["highly_variable"].sum() == 60
    assert not (cells.var["highly_variable"].to_numpy() & unmeasured[of]).any()
    assert unmeasured[of].sum() == unmeasured.sum()
    # the second source has no mitochondrial share, and loses no cell by it
    two = cells.obs["source"] == "two"
    assert cells.obs["pct_counts_mt"].isna().tolist() == two.tolist()
    assert any("cells whose source measured none" in note for note in made.notes)
    # too few genes in common: all are asked, and a note says so
    many = preprocess(joined, few(variable_genes=int((~unmeasured).sum()) + 5))
    assert any("fewer than the" in note for note in many.notes)
    assert (many.cells.var["highly_variable"].to_numpy() & unmeasured[of]).any()


def test_variable_genes_of_tiny_batches() -> None:
    adata = cells_with_mito()
    adata.obs["batch"] = adata.obs["batch"].where(np.arange(adata.n_obs) >= 20, "tiny")
    made = preprocess(adata, few(variable_genes=50), batch="batch")
    assert any(note.startswith("`tiny`: fewer than 20") for note in made.notes)
    rest = adata[adata.obs["batch"] != "tiny"].copy()
    rest.obs["batch"] = rest.obs["batch"].astype(str)
    assert made.cells.var["highly_variable"].sum() == 50
    every = preprocess(adata, few(variable_genes=10_000))
    assert every.cells.var["highly_variable"].all()


def test_values_that_were_normalised_are_not_normalised_twice() -> None:
    adata = cells_with_mito()
    first, _ = preprocess(adata, few())
    assert find_counts(first).source == "layers['counts']"
    again = preprocess(first, few())
    np.testing.assert_array_equal(again.cells.X.toarray(), first.X.toarray())
    assert any("preprocessed before" in note for note in again.notes) and not again.warnings
    del first.layers["counts"]  # what others leave: values without the counts
    back, _ = preprocess(first, few())
    np.testing.assert_array_equal(back.layers["counts"].toarray(), again.cells.layers["counts"].toarray())
    fewer, _ = preprocess(adata, few(variable_genes=60, only_variable=True))
    assert any("variable genes of an earlier" in one for one in preprocess(fewer, few(min_genes=5)).warnings)


def test_counts_of_raw_with_their_own_genes() -> None:
    adata = cells_with_mito()
    whole = adata.copy()
    adata = adata[:, :100].copy()
    adata.X = np.random.default_rng(0).normal(size=adata.shape).astype(np.float32)
    adata.raw = whole
    made = preprocess(adata, few())
    expected, _ = preprocess(whole, few())
    np.testing.assert_array_equal(made.cells.X.toarray(), expected.X.toarray())
    assert made.cells.raw is None and list(made.cells.var_names) == list(expected.var_names)
    # raw that is not the source stays
    whole.raw = whole[:, :50].copy()
    whole.layers["counts"] = whole.X.copy()
    assert preprocess(whole, few()).cells.raw.shape == (expected.n_obs, 50)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (few(min_genes=5000), ["at least 5,000 genes", "--min-genes", "the median is "]),
        (few(max_mito=0.0), ["at most 0 %", "--max-mito"]),
        (few(min_counts=1e9), ["at least 1e+09 counts", "--min-counts"]),
        (few(max_counts=1), ["at most 1 counts", "--max-counts"]),
        (few(min_cells=1000), ["no gene of `a.h5ad` is left", "--min-cells", "the most that a gene has is 2"]),
    ],
)
def test_when_nothing_is_left_the_threshold_is_named(settings: PreprocessingSettings, words: list[str]) -> None:
    with pytest.raises(CellsError) as caught:
        preprocess(cells_with_mito(), settings, name="a.h5ad")
    for word in [*words, "`a.h5ad`"]:
        assert word in str(caught.value)


def test_a_threshold_that_takes_most_cells_is_warned_of() -> None:
    adata = cells_with_mito()
    median = int(np.median(np.diff(adata.X.indptr)))
    made = preprocess(adata, few(min_genes=median + 5))
    assert made.cells.n_obs < adata.n_obs / 2
    assert len(made.warnings) == 1 and "lower --min-genes" in made.warnings[0] and f"{median:,}" in made.warnings[0]
    assert not preprocess(adata, few()).warnings
    steps = made.steps
    assert [step.name for step in steps] == ["genes a cell", "mitochondrial share", "cells a gene"]
    assert steps[0].cells_before == adata.n_obs and steps[-1].cells_after == made.cells.n_obs
    assert all(one.cells_after == two.cells_before for one, two in pairwise(steps))
    assert (steps[-1].genes_before, steps[-1].genes_after) == (adata.n_vars, made.cells.n_vars)


def test_several_thresholds_together_are_warned_of() -> None:
    adata = cells_with_mito()
    totals = adata.X.sum(axis=1).A1
    made = preprocess(
        adata, few(min_counts=float(np.quantile(totals, 0.4)), max_counts=float(np.quantile(totals, 0.7)))
    )
    assert made.cells.n_obs < adata.n_obs / 2
    assert len(made.warnings) == 1 and "most of them" in made.warnings[0]


def with_doublets() -> tuple[ad.AnnData, np.ndarray]:
    """Cells of two batches, the last 20 of each of which are two cells in one; and a third batch of few cells."""
    singles = synthetic_cells(560, n_genes=400, n_types=6, seed=0)
    counts = singles.X.toarray().astype(np.float32)
    rng = np.random.default_rng(1)
    kinds = singles.obs["cell_type"].cat.codes.to_numpy()
    for row in range(40):
        other = rng.choice(np.flatnonzero(kinds != kinds[row]))
        counts[row] += counts[other]
    singles.X = sp.csr_matrix(counts)
    batch = np.where(np.arange(560) % 2 == 0, "x", "y").astype(object)
    batch[-50:] = "few"
    singles.obs["batch"] = pd.Categorical(batch)
    return singles, np.arange(560) < 40


def test_doublets_are_those_of_scrublet() -> None:
    adata, double = with_doublets()
    scored = preprocess(adata, few(doublets="score"), batch="batch")
    part = adata[adata.obs["batch"] == "x"].copy()
    part.X = part.X.astype(np.float32)
    sc.pp.scrublet(part, random_state=0)
    found = scored.cells.obs
    np.testing.assert_allclose(found.loc[part.obs_names, "doublet_score"], part.obs["doublet_score"])
    assert (found.loc[part.obs_names, "predicted_doublet"] == part.obs["predicted_doublet"]).all()
    assert found.loc[found["batch"] == "few", "doublet_score"].isna().all()
    assert not found.loc[found["batch"] == "few", "predicted_doublet"].any()
    assert any(note == "doublets of `few` were not scored: fewer than 100 cells" for note in scored.notes)
    scores = found["doublet_score"].to_numpy()
    assert np.nanmean(scores[double]) > 2 * np.nanmean(scores[~double])
    assert found["predicted_doublet"].sum() > 0 and len(found) == adata.n_obs

    dropped = preprocess(adata, few(doublets="drop"), batch="batch")
    assert list(dropped.cells.obs_names) == list(found.index[~found["predicted_doublet"]])
    assert dropped.steps[-2].name == "doublets"


def test_doublets_without_their_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "skimage", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SettingsError, match=r"pip install evercell\[doublets\]"):
        preprocess(cells_with_mito(), few(doublets="score"))


@pytest.mark.parametrize(
    "wrong",
    [
        {"min_genes": -1},
        {"min_genes": 2.5},
        {"min_cells": True},
        {"max_mito": 101},
        {"mad": 0},
        {"mad": float("nan")},
        {"target_sum": 0},
        {"log": "10"},
        {"doublets": "yes"},
        {"variable_genes": 0},
        {"only_variable": True},
        {"min_counts": 10, "max_counts": 5},
        {"seed": -1},
    ],
)
def test_settings_that_cannot_be(wrong: dict[str, Any]) -> None:
    with pytest.raises(SettingsError) as caught:
        PreprocessingSettings(**wrong)
    assert next(iter(wrong)) in caught.value.message or "variable genes" in caught.value.message


def test_settings_and_genes_are_saved_as_they_are(tmp_path: Path) -> None:
    settings = few(mad=5, variable_genes=40, log="2", seed=3)
    cells, steps = preprocess(cells_with_mito(), settings)
    steps.save(tmp_path / "steps.json")
    assert Preprocessing.load(tmp_path / "steps.json") == steps
    assert Preprocessing.from_dict(json.loads(cells.uns[KEY])) == steps
    assert PreprocessingSettings.from_dict(settings.to_dict()) == settings
    with pytest.raises(SettingsError, match="no setting `n_genes`"):
        PreprocessingSettings.from_dict({"n_genes": 3})
    run = json.loads(cells.uns[KEY])["run"]
    assert run["steps"][0]["cells_before"] == 240 and run["learnt_here"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format_version": 99}, "update evercell"),
        ({"names": ["A", "A"], "ids": ["A", "B"], "symbols": ["A", "B"], "variable": None}, "named twice"),
        ({"ids": ["A"]}, "need a name"),
        ({"variable": ["no gene"]}, "not among"),
        ({"names": "A"}, "damaged"),
        ({"bounds": {"genes_low": "x"}}, "damaged"),
        ({"species": "fly"}, "human or mouse"),
        ({"settings": None}, "no settings"),
    ],
)
def test_damaged_files_of_settings(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    steps = preprocess(cells_with_mito(), few(variable_genes=40)).preprocessing
    path = tmp_path / "steps.json"
    path.write_text(json.dumps(steps.to_dict() | change))
    with pytest.raises(SettingsError, match=words) as caught:
        Preprocessing.load(path)
    assert "steps.json" in caught.value.message


def test_files_without_settings(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{")
    cells_with_mito(20).write_h5ad(tmp_path / "a.h5ad")
    (tmp_path / "b.h5ad").write_bytes(b"no")
    for name in ("a.json", "a.h5ad", "b.h5ad", "absent.json", "a.txt"):
        with pytest.raises(SettingsError, match=name):
            Preprocessing.load(tmp_path / name)


@pytest.mark.parametrize(("suffix", "batch"), [(".png", "batch"), (".pdf", None), (".svg", "batch")])
def test_plots_leave_pyplot_alone(suffix: str, batch: str | None, tmp_path: Path) -> None:
    import matplotlib as mpl

    adata = cells_with_mito()
    adata.obs["batch"] = adata.obs["batch"].astype(str)
    adata.obs.loc[adata.obs_names[:3], "batch"] = "three cells"
    backend = mpl.rcParams._get("backend")
    made = preprocess(adata, few(mad=5), batch=batch)
    path = tmp_path / f"plots{suffix}"
    made.write_plots(path)
    first = path.read_bytes()
    assert len(first) > 5000 and mpl.rcParams._get("backend") == backend
    if suffix == ".pdf":
        made.write_plots(path)
        assert path.read_bytes() == first
    if suffix == ".svg":
        assert first.count(b"<path") > 50
    with pytest.raises(SettingsError, match=r"\.png, \.pdf, \.svg"):
        made.write_plots(tmp_path / "plots.gif")


def test_more_batches_than_can_be_told_apart_are_drawn_together(tmp_path: Path) -> None:
    adata = cells_with_mito()
    adata.obs["batch"] = [f"b{i % 13}" for i in range(adata.n_obs)]
    preprocess(adata, few(mad=5), batch="batch").write_plots(tmp_path / "plots.png")
    assert (tmp_path / "plots.png").stat().st_size > 5000

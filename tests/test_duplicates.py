"""Cells that are in several files, by counts and by barcode."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp

from evercell import duplicates as module
from evercell.duplicates import BARCODE_ONLY, NEARLY, SAME, TWINS, Duplicates, find_duplicates
from evercell.gene_names import canonical_genes
from evercell.sources import Source, stored_sources
from evercell.testing import synthetic_cells


def cells(n_cells: int = 60, *, seed: int = 1, n_genes: int = 1500, species: str = "human") -> ad.AnnData:
    """Made-up cells with barcodes of their own."""
    made = synthetic_cells(n_cells, seed=seed, n_genes=n_genes, species=species)
    rng = np.random.default_rng(100 + seed)
    made.obs_names = ["".join(rng.choice(list("ACGT"), 16)) + "-1" for _ in range(n_cells)]
    return made


def thinned(given: ad.AnnData, share: float, *, seed: int = 0) -> ad.AnnData:
    """The library counted again: each molecule is found with a probability."""
    again = given.copy()
    again.X = sp.csr_matrix(np.random.default_rng(seed).binomial(given.X.toarray().astype(int), share))
    return again


def found(folder: Path, *given: ad.AnnData) -> Duplicates:
    sources: list[Source] = []
    folder.mkdir(exist_ok=True)
    for number, one in enumerate(given):
        path = folder / f"{number}.h5ad"
        one.write_h5ad(path)
        sources.append(replace(stored_sources(path, folder)[0][0], name=f"s{number}"))
    return find_duplicates(sources)


def pairs(of: Duplicates, kind: str) -> list[tuple[str, str]]:
    table = of.table[of.table["kind"] == kind]
    return list(zip(table["cell"], table["later_cell"], strict=True))


def test_the_same_counts_are_found_in_any_order_and_under_any_names(tmp_path: Path) -> None:
    first, second = cells(seed=1), cells(seed=2)
    rng = np.random.default_rng(0)
    copies = first[rng.permutation(60)[:25], rng.permutation(1500)].copy()
    truth = {name: f"copy{row}" for row, name in enumerate(copies.obs_names)}
    copies.obs_names = list(truth.values())
    copies.var_names = canonical_genes(copies.var_names.tolist()).names  # Ensembl ids in place of symbols
    second.var_names = canonical_genes(second.var_names.tolist()).names
    both = ad.concat([second, copies])
    result = found(tmp_path, first, both)
    assert dict(pairs(result, SAME)) == truth
    assert result.counted() == {SAME: 25, TWINS: 0, NEARLY: 0, BARCODE_ONLY: 0}
    assert not result.twice[0].any()
    assert both.obs_names[result.twice[1]].tolist() == [name for name in both.obs_names if name.startswith("copy")]


def test_counts_are_compared_over_the_genes_that_both_files_measured(tmp_path: Path) -> None:
    first = cells()
    panel = first[:, ::3].copy()  # fewer genes
    other = first[:, 100:].copy()  # other genes besides, of which the first file knows nothing
    panel.obs_names, other.obs_names = ([f"{word}{i}" for i in range(60)] for word in ("p", "o"))
    result = found(tmp_path, first[:, :1200].copy(), panel, other)
    assert len(pairs(result, SAME)) == 3 * 60
    assert [int(mask.sum()) for mask in result.twice] == [0, 60, 60]
    one = first[:, :1200].copy()
    one.X = sp.csr_matrix(one.X.toarray() + (np.arange(1200) == 500))  # one molecule more in every cell
    assert found(tmp_path / "b", one, other).counted()[SAME] == 0


def test_cells_with_few_genes_in_common_are_never_called_the_same(tmp_path: Path) -> None:
    few = sp.csr_matrix(np.ones((4, 25)))
    given = cells(4)[:, :25].copy()
    given.X = few
    again = given.copy()
    again.obs_names = list("abcd")
    assert found(tmp_path, given, again).counted()[SAME] == 4
    assert found(tmp_path / "b", given, again[:, :19].copy()).counted() == {
        SAME: 0,
        TWINS: 3,
        NEARLY: 0,
        BARCODE_ONLY: 0,
    }
    assert found(tmp_path / "c", given[:, :19].copy(), again[:, :19].copy()).table.empty


def test_twins_within_a_file(tmp_path: Path) -> None:
    given = cells(20)
    twice = ad.concat([given, given[[3, 3, 7]]])
    twice.obs_names = [*given.obs_names, "x", "y", "z"]
    result = found(tmp_path, twice)
    names = given.obs_names
    assert pairs(result, TWINS) == [(names[3], "x"), (names[3], "y"), (names[7], "z")]
    assert np.flatnonzero(result.twice[0]).tolist() == [20, 21, 22]


def test_one_library_counted_twice_is_told_from_two_that_share_barcodes(tmp_path: Path) -> None:
    first, strangers = cells(seed=1), cells(seed=2)
    again = thinned(first, 0.9)
    again.obs_names = [f"run2_{name.removesuffix('-1')}" for name in first.obs_names]
    strangers.obs_names = [f"{name}_3" for name in first.obs_names]
    result = found(tmp_path, first, again, strangers)
    assert pairs(result, NEARLY) == list(zip(first.obs_names, again.obs_names, strict=True))
    assert len(pairs(result, BARCODE_ONLY)) == 120
    cosines = result.table.groupby("kind")["cosine"].agg(["min", "max"])
    assert cosines.loc[NEARLY, "min"] > module.LEAST_COSINE > cosines.loc[BARCODE_ONLY, "max"]
    assert [int(mask.sum()) for mask in result.twice] == [0, 60, 0]
    assert result.by_chance == pytest.approx(3 * 60 * 60 / 737_280)
    assert len(result.notes) == 2
    assert "`s0` and `s2` share 60 barcodes of cells whose counts differ, 0 are expected" in result.notes[0]
    # Half of the molecules are too few to be sure that it is one library.
    assert found(tmp_path / "b", first, thinned(first, 0.5)).counted()[BARCODE_ONLY] == 60


def test_a_word_before_the_barcode_that_all_cells_share_is_no_barcode(tmp_path: Path) -> None:
    given, other = cells(120, seed=1), cells(120, seed=2)
    for one in (given, other):
        one.obs_names = [f"ACGTACGTAC_cell{row}" for row in range(120)]
    assert found(tmp_path, given, other).table.empty


def test_cells_without_barcodes_are_compared_by_their_names(tmp_path: Path) -> None:
    given = synthetic_cells(10, n_genes=1500)
    assert found(tmp_path, given, thinned(given, 0.9)).counted()[NEARLY] == 10


def test_species_are_not_compared(tmp_path: Path) -> None:
    human, mouse = cells(), cells(species="mouse")
    mouse.X = human.X
    mouse.obs_names = human.obs_names
    assert found(tmp_path, human, mouse).table.empty


def test_signatures_are_the_same_on_every_machine() -> None:
    assert module._number("ENSG00000141510") == 5756750150420522607
    assert module._mixed(np.array([1, 2.5])).tolist() == [18260225238054474293, 10836047878007559923]

"""Training on counts that stay in files: the numbers of a run in memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.sparse as sp
from anndata import AnnData

import evercell as ec
from evercell import classification, stored_counts, training_cells
from evercell.annotator import BATCH, Annotator
from evercell.cells import read_cells
from evercell.checkpoint import load
from evercell.classification import CellsView, outputs_of, summed_up
from evercell.cli import main
from evercell.errors import CellsError
from evercell.finetuning import quick_settings
from evercell.rejection import Outputs
from evercell.stored_counts import CellCounts, stacked
from evercell.testing import synthetic_cells
from evercell.tokenizers import View
from evercell.training import TrainingSettings
from evercell.training_cells import TrainingCells, chosen_genes, describe, gather, read_study
from evercell.updating.base import UpdateSettings

QUICK = replace(quick_settings(), training=TrainingSettings(samples=160, batch_size=32, evaluations=2))
UPDATE = UpdateSettings(training=TrainingSettings(samples=128, batch_size=32, evaluations=2), sealed=40)
OWN_NAMES = {"acinar": "acinar", "ductal": "ductal"}


def matrix(n_cells: int, n_genes: int = 30, seed: int = 0) -> sp.csr_matrix:
    return sp.csr_matrix(np.random.default_rng(seed).poisson(0.5, (n_cells, n_genes)).astype(np.float32))


def same(one: sp.csr_matrix, other: sp.csr_matrix) -> None:
    """Equal to the bit."""
    assert one.shape == other.shape
    for name in ("data", "indices", "indptr"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that a few hundred cells are many of."""
    monkeypatch.setattr(classification, "BLOCK", BATCH)
    monkeypatch.setattr(stored_counts, "ROWS", 37)


@pytest.fixture(scope="module")
def first() -> AnnData:
    return synthetic_cells(400, seed=1)


@pytest.fixture(scope="module")
def model(first: AnnData) -> Annotator:
    return ec.train(first, groups="donor", settings=QUICK, shown=False)


@pytest.mark.parametrize("wanted", [slice(None), slice(9, 14), np.array([44, 3, 4, 5, 3, 9]), np.arange(46) > 40, []])
def test_rows_of_several_matrices_are_those_of_one(tmp_path: Path, wanted: object) -> None:
    parts = [matrix(10), matrix(0), matrix(36, 34, seed=1)]
    whole = sp.vstack([sp.csr_matrix((parts[0].data, parts[0].indices, parts[0].indptr), (10, 34)), parts[2]]).tocsr()
    rows = np.array(wanted, dtype=int) if isinstance(wanted, list) else wanted
    for store in (None, tmp_path):
        first, nothing, last = (CellCounts.of(stacked([part], store), store) for part in parts)
        counts = first.joined(nothing).joined(last)
        found = counts[rows]  # type: ignore[index]
        assert found.dtype == np.float32
        same(found, whole[rows])
        same(counts.taken(rows)[:], whole[rows])  # type: ignore[arg-type]
        np.testing.assert_array_equal(np.diff(counts.indptr), np.diff(whole.indptr))
        np.testing.assert_array_equal(counts.totals(), np.asarray(whole.sum(axis=1)).ravel())
        same(counts[:, np.array([33, 2])], whole[:, [33, 2]])
        same(counts.over_genes(np.array([2, 33]))[:], whole[:, [2, 33]])


def test_choosing_cells_copies_no_counts() -> None:
    counts = CellCounts.of(stacked([matrix(50)]))
    cells = TrainingCells(counts, np.zeros(50, int), np.zeros(50, int), np.ones((1, 30), bool), None)
    part = cells.taken(np.arange(20)).joined(cells.taken(np.arange(30)))
    assert all(one is counts.parts[0] for one in part.stored.parts)
    assert counts.parts[0].dtype == np.uint8  # counts are small whole numbers
    assert part.counts.dtype == np.float32


def test_what_is_mapped_leaves_no_file(tmp_path: Path) -> None:
    counts = stacked([matrix(50)], tmp_path)
    assert isinstance(counts.data, np.memmap)
    assert not list(tmp_path.iterdir())
    same(CellCounts.of(counts)[:], matrix(50))


@pytest.mark.parametrize("kind", [np.int32, np.int64])
def test_the_digest_is_that_of_one_matrix(first: AnnData, kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ledgers of earlier versions hold it: the bytes of values, columns and row pointers, one array after the other."""
    import hashlib

    cells = first.copy()
    cells.X = sp.csr_matrix(cells.X)
    cells.X.indices, cells.X.indptr = cells.X.indices.astype(kind), cells.X.indptr.astype(kind)
    study = read_study(cells, "cell_type")
    monkeypatch.setattr(type(study.counts).chunks, "__defaults__", (64,))
    counts, digest = study.counts.to_csr(), hashlib.sha256()
    for array in (counts.data, counts.indices, counts.indptr):
        digest.update(array.tobytes())
    digest.update("\n".join([*study.counts.genes.index, *study.labels]).encode())
    assert describe(study)["sha256"] == digest.hexdigest()


def test_variable_genes_are_those_of_one_matrix(
    model: Annotator, first: AnnData, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = gather([read_study(first, "cell_type")], model.vocabulary, model.types)
    logged, sums = View.whole(cells.counts).logged(), []
    add_at = SimpleNamespace(at=lambda into, *others: (np.add.at(into, *others), sums.append(into)))
    monkeypatch.setattr(training_cells, "np", SimpleNamespace(**{**vars(np), "add": add_at}))
    whole = chosen_genes(cells, least_cells=3, variable_genes=50)
    for found, matrix in zip(sums, (logged, logged.multiply(logged)), strict=True):
        np.testing.assert_array_equal(found, np.asarray(matrix.mean(axis=0)).ravel())
    monkeypatch.undo()
    monkeypatch.setattr(stored_counts, "ROWS", 37)
    np.testing.assert_array_equal(chosen_genes(cells, least_cells=3, variable_genes=50), whole)


def test_outputs_in_blocks_are_those_of_all_cells(model: Annotator, first: AnnData, small_blocks: None) -> None:
    cells = gather([read_study(first, "cell_type")], model.vocabulary, model.types)
    whole = model.outputs(View.whole(cells.counts))
    found = outputs_of(model, cells.stored)
    assert isinstance(found.view, CellsView)
    assert model.rejector is not None

    def alike(one: Outputs, other: Outputs) -> None:
        for name in ("representation", "logits", "log_proba"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
        np.testing.assert_array_equal(model.rejector.score(one), model.rejector.score(other))  # type: ignore[union-attr]

    alike(found, whole)
    most, few = np.arange(400) % 3 > 0, np.arange(400) % 9 == 0
    assert isinstance(found.taken(most).view, CellsView)
    assert not isinstance(found.taken(few).view, CellsView)
    for rows in (most, few):
        alike(found.taken(rows).without(1), whole.taken(rows).without(1))
    same(found.view.logged(), whole.view.logged())  # type: ignore[union-attr]


def test_sums_of_parts_are_those_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    features, codes = np.random.default_rng(0).normal(size=(100, 4)).astype(np.float32), np.arange(100) % 3
    whole = summed_up(features, codes, 3)
    monkeypatch.setattr(classification, "SUMMED", 30)
    for one, other in zip(whole.arrays().values(), summed_up(features, codes, 3).arrays().values(), strict=True):
        np.testing.assert_allclose(one, other)


def equal(one: Annotator, other: Annotator) -> None:
    """Weights, bank, sealed cells and ledger equal to the bit."""
    assert one.fingerprint == other.fingerprint
    assert one.ledger.head == other.ledger.head
    for mine, theirs in ((one.bank, other.bank), (one.sealed, other.sealed)):
        assert mine is not None
        assert theirs is not None
        same(mine.counts, theirs.counts)
        for name in ("codes", "stages", "studies", "measured"):
            np.testing.assert_array_equal(getattr(mine, name), getattr(theirs, name))


def as_h5ad(cells: AnnData, path: Path) -> Path:
    cells.write_h5ad(path.with_suffix(".h5ad"), compression="gzip")
    return path.with_suffix(".h5ad")


def as_zarr(cells: AnnData, path: Path) -> Path:
    cells.write_zarr(path.with_suffix(".zarr"))
    return path.with_suffix(".zarr")


def in_a_layer(cells: AnnData, path: Path) -> Path:
    cells = cells.copy()
    cells.layers["counts"] = cells.X
    cells.X = cells.X.log1p() / 2
    return as_h5ad(cells, path)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("written", [as_h5ad, as_zarr, in_a_layer])
def test_training_from_files_gives_the_numbers_of_memory(
    tmp_path: Path, first: AnnData, written: Callable[[AnnData, Path], Path]
) -> None:
    (tmp_path / "store").mkdir()
    second = synthetic_cells(150, n_genes=330, seed=2)[:, 30:].copy()
    second.obs["cell_type"] = second.obs["cell_type"].astype(object)
    second.obs.loc[second.obs_names[::7], "cell_type"] = "unknown"
    files = [written(first, tmp_path / "first"), written(second, tmp_path / "second")]
    settings = replace(QUICK, variable_genes=200)

    def trained(backed: bool, store: Path | None) -> Annotator:
        cells = [read_cells(file, backed=backed) for file in files]
        return ec.train(cells, groups="donor", settings=settings, shown=False, store=store)

    there = trained(True, tmp_path / "store")
    assert not list((tmp_path / "store").iterdir())
    equal(there, trained(False, None))


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("strategy", ["canal", "analytic", "joint"])
def test_updates_from_files_give_the_numbers_of_memory(
    tmp_path: Path, model: Annotator, first: AnnData, strategy: str
) -> None:
    file = as_h5ad(synthetic_cells(250, n_types=6, n_genes=320, seed=3), tmp_path / "new")
    earlier = [first] if strategy == "joint" else None

    def updated(backed: bool, store: Path | None) -> Annotator:
        new = read_cells(file, backed=backed)
        return ec.update(
            model, new, groups="donor", strategy=strategy, mapping=OWN_NAMES, joint_with=earlier,
            settings=replace(UPDATE, refit=strategy == "canal"), force=True, shown=False, store=store,
        )  # fmt: skip

    there = updated(True, tmp_path)
    assert [one.name for one in tmp_path.iterdir()] == ["new.h5ad"]
    equal(there, updated(False, None))


@pytest.mark.usefixtures("small_blocks")
def test_a_sketch_from_files_is_that_of_memory(tmp_path: Path, first: AnnData) -> None:
    one, other = (
        ec.train(first, settings=QUICK, bank="sketch", shown=False, store=store) for store in (None, tmp_path)
    )
    assert one.fingerprint == other.fingerprint
    new = synthetic_cells(400, n_types=6, seed=4)
    one, other = (
        ec.update(one, new, mapping=OWN_NAMES, settings=UPDATE, force=True, shown=False, store=store)
        for store in (None, tmp_path)
    )
    equal(one, other)


def test_merged_cells_stay_in_their_file(tmp_path: Path, first: AnnData) -> None:
    files = [as_h5ad(first, tmp_path / "one"), as_h5ad(synthetic_cells(90, n_genes=280, seed=5), tmp_path / "two")]
    merged = ec.merge(files, tmp_path / "merged.h5ad").path
    in_memory = ec.train(read_cells(merged), settings=QUICK, shown=False)
    (tmp_path / "store").mkdir()
    equal(ec.train(read_cells(merged, backed=True), settings=QUICK, shown=False, store=tmp_path / "store"), in_memory)


def test_a_store_that_is_not_there_is_told(tmp_path: Path, model: Annotator, first: AnnData) -> None:
    for make in (lambda store: ec.train(first, store=store), lambda store: ec.update(model, first, store=store)):
        with pytest.raises(CellsError, match="does not exist"):
            make(tmp_path / "not there")


def test_the_commands_take_a_store(tmp_path: Path, first: AnnData) -> None:
    file = as_h5ad(first[:200].copy(), tmp_path / "first")
    new = as_zarr(synthetic_cells(200, n_types=5, seed=2), tmp_path / "new")
    (tmp_path / "labels.csv").write_text("label,name\nacinar,acinar\n", encoding="utf-8")
    (tmp_path / "store").mkdir()

    def run(*words: str | Path) -> None:
        assert main([*map(str, words), "--labels", "cell_type", "--samples", "128", "--no-refit", "--quiet"]) == 0

    made = []
    for name, more in (("in_memory", ()), ("stored", ("--store", tmp_path / "store"))):
        first_output, output = tmp_path / f"{name}1", tmp_path / f"{name}2"
        run("train", file, "--output", first_output, "--backbone-setting", "depth=1", *more)
        run("update", first_output, new, "--mapping", tmp_path / "labels.csv", "--force", "--output", output, *more)
        made.append(load(output))
    equal(*made)
    assert not list((tmp_path / "store").iterdir())

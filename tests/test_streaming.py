"""Annotating files part by part: the result of annotating in memory, also after a kill."""

from __future__ import annotations

import gzip
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

import evercell as ec
from evercell import counts, streaming
from evercell.annotation import Annotation, annotate
from evercell.annotator import Annotator
from evercell.cells import find_counts, read_cells, write_cells, write_table
from evercell.copying import can_be_extended, extended
from evercell.counts import Chosen, Counts
from evercell.errors import CellsError, OutputError
from evercell.labelling import Labeller
from evercell.merging import merge
from evercell.streaming import annotated
from evercell.testing import synthetic_cells

Run = Callable[..., tuple[int, str, str]]
CHUNK, PART = 16, 40


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several parts, blocks and samples in a few cells."""
    monkeypatch.setattr(streaming, "PART", PART)
    monkeypatch.setattr(counts, "ROWS", 32)
    monkeypatch.setattr(counts, "SAMPLED", 24)


@pytest.fixture(scope="module")
def folder(model: Annotator, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and cells in every way in which a file can hold counts."""
    folder = tmp_path_factory.mktemp("streaming")
    ec.save(model, folder / "model")
    plain = synthetic_cells(150, seed=2)
    plain.obs["text"] = [f"cell {number}" for number in range(150)]
    plain.obsm["X_pca"] = np.arange(300.0).reshape(150, 2)
    plain.obsm["table"] = pd.DataFrame({"a": np.arange(150)}, index=plain.obs_names)
    plain.obsp["near"] = sp.random(150, 150, 0.05, format="csr", random_state=0)
    plain.varm["PCs"] = np.ones((300, 2))
    plain.uns = {"facts": {"list": ["a", "b"], "number": 3}, "evercell": {"old": "facts"}}
    plain.obs["evercell_majority"] = pd.Categorical(["old"] * 150)
    made = {"plain": plain, "dense": plain.copy(), "csc": plain.copy(), "layer": plain.copy(), "raw": plain.copy()}
    made["dense"].X = plain.X.toarray().astype(np.float32)
    made["csc"].X = sp.csc_matrix(plain.X)
    scaled = sp.csr_matrix(np.random.default_rng(0).normal(size=(150, 300)))
    made["layer"].layers["counts"], made["layer"].X = plain.X.copy(), scaled
    made["raw"].raw, made["raw"].X = plain.copy(), scaled
    made["empty"] = plain.copy()
    made["empty"].X[[3, 99]] = 0
    made["empty"].X.eliminate_zeros()
    made["panel"] = made["raw"].copy()  # as `preprocess` writes cells of earlier genes
    made["panel"].X, made["panel"].var["measured"] = plain.X.copy(), np.arange(300) % 3 > 0
    for name, cells in made.items():
        write_cells(cells, folder / f"{name}.h5ad")
    for name in ("plain", "dense", "layer", "raw"):
        write_cells(made[name], folder / f"{name}.zarr")
    sources = [synthetic_cells(90, n_genes=200, seed=3), synthetic_cells(60, seed=4)[:, 80:].copy()]
    for number, cells in enumerate(sources):
        cells.write_h5ad(folder / f"source{number}.h5ad")
    merge([folder / "source0.h5ad", folder / "source1.h5ad"], folder / "merged.h5ad")
    merged = ad.read_h5ad(folder / "merged.h5ad")
    mixed = merged[np.random.default_rng(0).permutation(150)].copy()
    write_cells(mixed, folder / "mixed.h5ad")
    mixed.raw = mixed.copy()
    mixed.X = sp.csr_matrix(np.random.default_rng(0).normal(size=mixed.shape))
    write_cells(mixed, folder / "mixed_raw.h5ad")
    write_10x(plain, folder / "tenx.h5")
    return folder


def write_10x(cells: ad.AnnData, path: Path) -> None:
    """Cell Ranger's file, with antibodies between the genes; one cell has counts of antibodies only."""
    stored = cells.X.toarray().astype(np.int32)
    stored[7] = 0
    antibodies = np.full((len(stored), 1), 5, dtype=np.int32)
    matrix = sp.csr_matrix(np.hstack([stored[:, :9], antibodies, stored[:, 9:]]))
    names = [*cells.var_names[:9], "CD3_TotalSeq", *cells.var_names[9:]]
    kinds = ["Gene Expression"] * len(names)
    kinds[9] = "Antibody Capture"
    with h5py.File(path, "w") as file:
        group = file.create_group("matrix")
        for key in ("data", "indices", "indptr"):
            group[key] = getattr(matrix, key)
        group["shape"] = matrix.shape[::-1]
        group["barcodes"] = np.array(cells.obs_names, dtype="S")
        ids = [f"ID{number}" for number in range(len(names))]
        for key, values in (("name", names), ("id", ids), ("feature_type", kinds)):
            group[f"features/{key}"] = np.array(values, dtype="S")


FILES = (
    "plain.h5ad", "plain.zarr", "dense.h5ad", "dense.zarr", "csc.h5ad", "layer.h5ad", "layer.zarr", "raw.h5ad",
    "raw.zarr", "empty.h5ad", "merged.h5ad", "mixed.h5ad", "mixed_raw.h5ad", "panel.h5ad",
    "tenx.h5",
)  # fmt: skip
IN_MEMORY = ("csc.h5ad", "panel.h5ad")  # stored by gene; not known which genes of raw were measured


def alike(one: Any, other: Any) -> None:
    """Everything in two AnnData."""
    assert type(one) is type(other)
    if isinstance(one, ad.AnnData):
        assert (one.raw is None) == (other.raw is None)
        names = ["X", "obs", "var", "layers", "obsm", "obsp", "varm", "varp", "uns"]
        for name in names:
            alike(getattr(one, name), getattr(other, name))
        for name in ("X", "var", "varm") if one.raw is not None else ():
            alike(getattr(one.raw, name), getattr(other.raw, name))
    elif isinstance(one, pd.DataFrame):
        pd.testing.assert_frame_equal(one, other, check_exact=True)
    elif isinstance(one, Mapping):
        assert set(one) == set(other)
        for name in one:
            alike(one[name], other[name])
    elif sp.issparse(one):
        assert one.dtype == other.dtype
        for array in ("data", "indices", "indptr"):
            np.testing.assert_array_equal(getattr(one, array), getattr(other, array))
    else:
        np.testing.assert_array_equal(one, other, strict=isinstance(one, np.ndarray))


def same(result: Annotation, reference: Annotation) -> None:
    pd.testing.assert_frame_equal(result.obs, reference.obs, check_exact=True)
    assert result.info == reference.info
    np.testing.assert_array_equal(result.best_labels, reference.best_labels)
    np.testing.assert_array_equal(result.probabilities, reference.probabilities)
    np.testing.assert_array_equal(result.representation, reference.representation)


@pytest.mark.parametrize("file", FILES)
def test_any_file_gives_what_it_gives_in_memory(
    file: str, model: Annotator, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also: no more cells are asked for at once than a chunk, nor read at once than a block or a sample."""
    path = folder / file
    options: dict[str, Any] = {"empty_cells": "keep", "name": file, "model_name": "m", "shown": False}
    reference = annotate(model, read_cells(path), **options)
    asked, read = [], []
    rows, block = Counts.rows, counts.csr_block

    def spied_rows(self: Counts, start: int, stop: int) -> sp.csr_matrix:
        asked.append(stop - start)
        assert file in IN_MEMORY or not sp.issparse(self._matrix)
        return rows(self, start, stop)

    def spied_block(matrix: Any, start: int, stop: int) -> sp.csr_matrix:
        found = block(matrix, start, stop)
        read.append(found.shape[0])
        return found

    monkeypatch.setattr(Counts, "rows", spied_rows)
    monkeypatch.setattr(counts, "csr_block", spied_block)
    query = read_cells(path, backed=True)
    before = query.obs.copy()
    with annotated(model, query, path, tmp_path / "out.h5ad", chunk=CHUNK, **options) as result:
        same(result, reference)
        assert isinstance(result.representation, np.memmap)
    assert max(asked) <= CHUNK and sum(asked) == 150
    assert max(read) <= 32
    pd.testing.assert_frame_equal(query.obs, before)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("file", "suffix"),
    [
        ("plain.h5ad", ".h5ad"), ("plain.zarr", ".zarr"), ("plain.zarr", ".h5ad"), ("layer.zarr", ".zarr"),
        ("raw.h5ad", ".h5ad"), ("mixed.h5ad", ".zarr"),
    ],
)  # fmt: skip
def test_the_written_file_is_that_of_the_way_through_memory(
    file: str, suffix: str, model: Annotator, folder: Path, tmp_path: Path, run: Run
) -> None:
    path = folder / file
    cells = read_cells(path)
    annotate(model, cells, inplace=True, name=str(path), model_name="model")
    write_cells(cells, tmp_path / f"old{suffix}")
    code, _, err = run("annotate", path, "--model", folder / "model", "--output", tmp_path / f"new{suffix}")
    assert code == 0, err
    new, old = read_cells(tmp_path / f"new{suffix}"), read_cells(tmp_path / f"old{suffix}")
    alike(new, old)
    assert list(new.obs) == list(old.obs) and list(new.uns) == list(old.uns)
    assert {one.name for one in tmp_path.iterdir()} == {f"old{suffix}", f"new{suffix}"}


@pytest.mark.parametrize("file", ["plain.h5ad", "layer.zarr", "mixed_raw.h5ad"])
@pytest.mark.parametrize("suffix", [".csv", ".tsv.gz"])
def test_the_written_table_has_the_bytes_of_the_way_through_memory(
    file: str, suffix: str, model: Annotator, folder: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evercell.cells.PRINTED_ROWS", 60)
    path = folder / file
    table = annotate(model, read_cells(path), name=str(path)).obs.rename_axis("cell")
    text = table.to_csv(sep="," if suffix == ".csv" else "\t").encode()
    code, _, err = run("annotate", path, "--model", folder / "model", "--output", tmp_path / f"labels{suffix}")
    assert code == 0, err
    found = (tmp_path / f"labels{suffix}").read_bytes()
    assert found == (gzip.compress(text, mtime=0) if suffix.endswith(".gz") else text)


@pytest.mark.parametrize("words", [["--majority"], ["--clusters", "donor"], ["--compat", "celltypist", "--majority"]])
def test_votes_are_those_of_the_way_through_memory(
    words: list[str], model: Annotator, folder: Path, tmp_path: Path, run: Run
) -> None:
    path = folder / "plain.h5ad"
    result = annotate(model, read_cells(path), name=str(path), majority="donor" if "--clusters" in words else True)
    if "--compat" in words:
        result.obs[list(result.celltypist())] = result.celltypist()
    write_table(result.obs.rename_axis("cell"), tmp_path / "old.csv")
    assert run("annotate", path, "--model", folder / "model", "--output", tmp_path / "new.csv", *words)[0] == 0
    assert (tmp_path / "new.csv").read_bytes() == (tmp_path / "old.csv").read_bytes()


def test_over_the_file_that_is_read(model: Annotator, folder: Path, tmp_path: Path, run: Run) -> None:
    for suffix in (".h5ad", ".zarr"):
        path = tmp_path / f"cells{suffix}"
        cells = read_cells(folder / f"plain{suffix}")
        write_cells(cells, path)
        assert run("annotate", path, "--model", folder / "model", "--output", path)[0] == 0
        assert "evercell_confidence" in read_cells(path).obs
        np.testing.assert_array_equal(read_cells(path).X.toarray(), cells.X.toarray())


class Broken(RuntimeError):
    """What ends a run in the middle."""


def breaking(monkeypatch: pytest.MonkeyPatch, after: int) -> list[tuple[int, int]]:
    """Blocks that are labelled; the one after `after` of them breaks the run off."""
    done: list[tuple[int, int]] = []
    block = Labeller.block

    def spied(self: Labeller, start: int, stop: int) -> Any:
        if len(done) == after:
            raise Broken
        done.append((start, stop))
        return block(self, start, stop)

    monkeypatch.setattr(Labeller, "block", spied)
    monkeypatch.setattr("evercell.labelling.MOST_THREADS", 1)  # with more, blocks are smaller and end in any order
    return done


@pytest.mark.parametrize("file", ["plain.h5ad", "mixed.h5ad"])
def test_a_run_that_was_broken_off_goes_on(
    file: str, model: Annotator, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, output = folder / file, tmp_path / "out.h5ad"
    options: dict[str, Any] = {"name": file, "chunk": CHUNK, "shown": False}
    reference = annotate(model, read_cells(path), **options)

    def run(**other: Any) -> None:
        with annotated(model, read_cells(path, backed=True), path, output, **{**options, **other}) as result:
            if not other:
                same(result, reference)

    def labelled() -> int:
        with pytest.MonkeyPatch.context() as patch:
            blocks = breaking(patch, 1000)
            run()
        return sum(stop - start for start, stop in blocks)

    with monkeypatch.context() as patch, pytest.raises(Broken):
        breaking(patch, 5)  # in the second part
        run()
    assert [one.name for one in tmp_path.iterdir()] == [".out.h5ad.unfinished"]
    assert 150 - labelled() == PART
    assert list(tmp_path.iterdir()) == []
    # Other options, or arrays that were not asked for before, begin anew.
    for other in ({"reject": "off"}, {"arrays": False}):
        with monkeypatch.context() as patch, pytest.raises(Broken):
            breaking(patch, 5)
            run(**other)
        assert labelled() == 150


def test_broken_off_while_writing(model: Annotator, folder: Path, tmp_path: Path) -> None:
    """All was labelled: nothing is labelled again."""
    path = folder / "plain.h5ad"

    def run() -> None:
        with annotated(model, read_cells(path, backed=True), path, tmp_path / "out.csv", shown=False):
            raise Broken

    for after in (1000, 0):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Broken):
            done = breaking(patch, after)
            run()
        assert bool(done) == (after > 0)


def test_a_file_that_changed_is_labelled_anew(model: Annotator, folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "cells.zarr"
    write_cells(synthetic_cells(60, seed=5), path)
    counted = []
    for seed in (5, 6):
        write_cells(synthetic_cells(60, seed=seed), path)
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Broken):
            done = breaking(patch, 1000)
            with annotated(model, read_cells(path, backed=True), path, tmp_path / "out.csv", shown=False):
                raise Broken
        counted.append(len(done))
    assert counted[0] == counted[1] > 0


def test_a_killed_process_leaves_no_output_and_its_work_is_kept(folder: Path, tmp_path: Path, run: Run) -> None:
    output = tmp_path / "labels.csv"
    words = ["annotate", folder / "plain.h5ad", "--model", folder / "model", "--output", output]
    code = f"""
import os, signal
from evercell import cli, labelling, streaming
streaming.PART, block = {PART}, labelling.Labeller.block
def spied(self, start, stop):
    if start >= {2 * PART}:
        os.kill(os.getpid(), signal.SIGKILL)
    return block(self, start, stop)
labelling.Labeller.block = spied
cli.main({[str(word) for word in words]!r})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not output.exists()
    with pytest.MonkeyPatch.context() as patch:
        blocks = breaking(patch, 1000)
        assert run(*words)[0] == 0
    assert blocks[0][0] == 2 * PART
    resumed = output.read_bytes()
    assert run(*words)[0] == 0
    assert output.read_bytes() == resumed
    assert [one.name for one in tmp_path.iterdir()] == ["labels.csv"]


def test_an_error_in_the_file_leaves_nothing_behind(folder: Path, tmp_path: Path, run: Run) -> None:
    cells = synthetic_cells(150, seed=2)
    cells.X = cells.X.astype(np.float32)
    cells.X[100, 0] = -1  # no cell that is looked at before
    cells.write_h5ad(tmp_path / "cells.h5ad")
    words = ["annotate", tmp_path / "cells.h5ad", "--model", folder / "model", "--output", tmp_path / "out.h5ad"]
    code, _, err = run(*words)
    assert code == 2 and f"-1 at cell `{cells.obs_names[100]}`" in err
    assert [one.name for one in tmp_path.iterdir()] == ["cells.h5ad"]


def test_one_process_an_output(model: Annotator, folder: Path, tmp_path: Path) -> None:
    path = folder / "plain.h5ad"
    pytest.importorskip("fcntl")

    def begun() -> Any:
        return annotated(model, read_cells(path, backed=True), path, tmp_path / "out.csv", shown=False)

    with begun() as result:
        with pytest.raises(OutputError, match="another process is writing"), begun():
            pass
        assert len(result.obs) == 150 and result.representation.shape[1] > 0


def test_values_that_are_not_whole_in_a_few_cells_are_judged_as_in_memory(tmp_path: Path) -> None:
    cells = synthetic_cells(150, seed=2)
    cells.X = cells.X.astype(np.float32)
    row = cells.X[100].toarray().ravel()
    row[np.flatnonzero(row)[::3]] += 0.37  # as reads shared between transcripts
    cells.X[100] = row
    cells.write_h5ad(tmp_path / "cells.h5ad")
    whole = find_counts(read_cells(tmp_path / "cells.h5ad"))
    stored = find_counts(read_cells(tmp_path / "cells.h5ad", backed=True))
    np.testing.assert_array_equal(stored.rows(90, 110).toarray(), whole.rows(90, 110).toarray())


def test_chosen_rows_and_columns_are_those_of_the_matrix() -> None:
    matrix = sp.random(500, 12, 0.3, format="csr", random_state=0)
    rng = np.random.default_rng(0)
    for rows in (np.arange(500), rng.permutation(500), rng.integers(0, 500, 700), np.arange(0, 500, 100)):
        columns = np.array([0, 3, 11])
        chosen = Chosen(matrix, rows, columns)
        assert chosen.shape == (len(rows), 3)
        for start, stop in ((0, len(rows)), (2, 5), (4, 4)):
            expected = matrix[rows[start:stop]][:, columns].toarray()
            np.testing.assert_array_equal(chosen[start:stop].toarray(), expected)


def test_what_a_copy_of_a_file_keeps_and_replaces(folder: Path, tmp_path: Path) -> None:
    """Compressed chunks stay as they are; a file of an old AnnData is not copied but read."""
    path = folder / "plain.h5ad"
    cells = read_cells(path)
    new = {"X_pca": np.zeros((150, 3), dtype=np.float32), "more": np.zeros((150, 0), dtype=np.float32)}
    extended(path, tmp_path / "out.h5ad", obs=cells.obs[["donor"]], obsm=new, uns={"facts": {"n": 1}})
    read = read_cells(tmp_path / "out.h5ad")
    assert list(read.obs) == ["donor"] and read.obsm["X_pca"].shape == (150, 3) and read.obsm["more"].shape == (150, 0)
    assert read.uns["facts"] == {"n": 1} and read.uns["evercell"] == {"old": "facts"}
    with h5py.File(path) as one, h5py.File(tmp_path / "out.h5ad") as other:
        assert one["X/data"].compression == other["X/data"].compression == "gzip"
        assert one["X/data"].id.get_storage_size() == other["X/data"].id.get_storage_size()
    assert not can_be_extended(folder / "tenx.h5", tmp_path / "out.h5ad")
    with h5py.File(tmp_path / "out.h5ad", "a") as file:
        del file.attrs["encoding-type"]
    assert not can_be_extended(tmp_path / "out.h5ad", tmp_path / "more.h5ad")
    with pytest.raises(CellsError, match=r"out\.h5ad` cannot be written"):
        extended(path, tmp_path / "out.h5ad", obs=cells.obs, obsm={}, uns={"bad": object()})
    assert os.listdir(tmp_path) == ["out.h5ad"]

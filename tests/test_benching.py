"""`bench`: the machine's own figures, and that more threads change no label."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from anndata import AnnData

from evercell import benching
from evercell.annotation import annotate
from evercell.annotator import Annotator
from evercell.benching import Bench, Pace, in_words, made_cells, paced
from evercell.cells import read_cells
from evercell.errors import SettingsError
from evercell.streaming import annotated

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """As little as can be measured."""
    for name, value in {"FEWEST": 60, "MOST": 60, "BATCH": 8, "FEW": 1, "GENES": 40, "STEPS": 1}.items():
        monkeypatch.setattr(benching, name, value)


def test_the_command_prints_json_with_every_figure(run: Run, small: None) -> None:
    threads = torch.get_num_threads()
    code, out, err = run("bench", "--seconds", "0.01", "--threads", "1", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert set(found["paces"]) == set(benching.WORDS) == set(benching.SHARES)
    assert all(one["cells_per_second"] > 0 and one["repeats"] >= 1 for one in found["paces"].values())
    assert {"forward_latent_to_performer", "train_latent_to_performer", "scanpy_to_annotate"} == set(found["ratios"])
    assert set(found["seconds_of"]) == {"100000", "1000000"}
    assert {"cores", "threads", "torch", "device", "processor"} <= set(found["machine"])
    assert found["machine"]["threads"] == 1
    assert found["bandwidth"] is None or found["machine"]["device"] != "cpu"
    assert found["model"]["name"] == "human-pancreas"
    assert "a file of 100,000 cells takes about" in found["estimate"]
    assert torch.get_num_threads() == threads


def test_the_command_refuses_what_makes_no_sense(run: Run) -> None:
    for words, said in (
        (("--model", "auto"), "name a model"),
        (("--model", "nowhere"), "there is no model `nowhere`"),
        (("--seconds", "0"), "seconds is 0"),
        (("--threads", "0"), "threads is 0"),
    ):
        code, out, err = run("bench", *words)
        assert (code, out) == (2, "")
        assert said in err


def test_the_table_in_words() -> None:
    from evercell.commands.benching import _text

    paces = {name: Pace(250.0, 10, 3) for name in benching.WORDS} | {"performer_forward": Pace(0.5, 4, 1)}
    cells = {"source": "cells", "file_cells": 10, "genes": 5, "expressed_genes": 3}
    machine = {"processor": "x", "cores": 2, "threads": 1, "load": 1.0, "device": "cpu", "torch": "2"}
    model = {"name": "m", "backbone": "latent", "genes": 5}
    found = Bench(paces, cells, machine, model, 512.0, {"gathered_gb_s": 1.0, "copy_gb_s": 4.0, "share": 0.25})
    text = _text(found)
    assert "500 times as fast as performer" in text
    assert "peak 512 MB" in text
    assert "25% of the memory bandwidth" in text
    assert "100,000 cells takes about 6.7 minutes here, one of a million about 67 minutes" in text


@pytest.mark.parametrize(
    ("seconds", "words"), [(1, "1 second"), (40, "40 seconds"), (150, "2.5 minutes"), (9000, "2.5 hours")]
)
def test_a_time_in_words(seconds: float, words: str) -> None:
    assert in_words(seconds) == words


def test_work_is_done_once_at_least_and_ends_in_time() -> None:
    calls: list[int] = []
    assert paced(lambda: calls.append(1), 10, seconds=0).repeats == len(calls) == 1
    assert paced(lambda: None, 10, seconds=5, most=7).repeats == 7


def test_made_cells_are_counts_of_which_no_two_are_alike() -> None:
    cells = made_cells(3000)
    counts = cells.X
    assert (counts.data >= 1).all()
    assert np.array_equal(counts.data, np.floor(counts.data))
    assert cells.obs_names.is_unique
    totals = np.asarray(counts.sum(axis=1)).ravel()
    weights = np.random.default_rng(0).random(counts.shape[1])
    assert len(np.unique(np.round(counts @ weights, 6))) > 0.95 * len(totals)
    assert np.array_equal(counts.data, made_cells(3000).X.data)


@pytest.mark.parametrize("chunk", [7, 100, 4096])
def test_threads_change_no_label(model: Annotator, query: AnnData, tmp_path: Path, chunk: int) -> None:
    """Blocks that several threads label at once are the blocks of one (invariant 1)."""
    file, output, before = tmp_path / "query.h5ad", tmp_path / "labels.csv", torch.get_num_threads()
    query.write_h5ad(file)
    one = annotate(model, query, shown=False)
    torch.set_num_threads(3)
    try:
        with annotated(model, read_cells(file, backed=True), file, output, chunk=chunk, shown=False) as found:
            assert found.obs.equals(one.obs)
            assert np.array_equal(found.probabilities, one.probabilities)
            assert np.array_equal(found.representation, one.representation)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_an_error_in_a_thread_ends_all(model: Annotator, query: AnnData, tmp_path: Path) -> None:
    from evercell.errors import CellsError

    broken = query.copy()
    broken.X = broken.X.astype(np.float32).tocsr()
    broken.X.data[broken.X.indptr[100]] = -1.0
    file, before = tmp_path / "query.h5ad", torch.get_num_threads()
    broken.write_h5ad(file)
    torch.set_num_threads(2)
    try:
        cells = read_cells_unchecked(file)
        with pytest.raises(CellsError, match="negative"), annotated(model, cells, file, tmp_path / "o.csv", chunk=20):
            pass
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def read_cells_unchecked(file: Path) -> AnnData:
    from evercell.stored_cells import open_h5ad

    return open_h5ad(file)


def test_seconds_have_to_be_given_in_reason(model: Annotator) -> None:
    with pytest.raises(SettingsError, match="seconds"):
        benching.bench(model, name="m", seconds=-1.0)

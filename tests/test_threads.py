"""Who may use the threads of the CPU."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from anndata import AnnData

from evercell.annotation import annotate
from evercell.annotator import Annotator
from evercell.backbones import BACKBONES
from evercell.errors import SettingsError
from evercell.finetuning import quick_settings, train
from evercell.testing import synthetic_cells
from evercell.threads import limited, shared_out, threads_of
from evercell.training import TrainingSettings

Run = Callable[..., tuple[int, str, str]]


def test_parts_cover_everything_once() -> None:
    seen: list[int] = []
    lock = threading.Lock()

    def work(start: int, stop: int) -> None:
        with lock:
            seen.extend(range(start, stop))

    for n in (0, 1, 2, 7, 100):
        seen.clear()
        shared_out(n, work)
        assert sorted(seen) == list(range(n))


def test_torch_keeps_to_one_thread_beside_compiled_loops_and_gets_its_own_back() -> None:
    before = torch.get_num_threads()
    for name in BACKBONES:
        backbone = BACKBONES[name](20)  # type: ignore[call-arg]
        with threads_of(backbone):
            assert torch.get_num_threads() == (1 if backbone.threaded else before)
        assert torch.get_num_threads() == before
    assert BACKBONES["latent"].threaded


def test_threads_are_given_back() -> None:
    before = torch.get_num_threads()
    with limited(2):
        assert torch.get_num_threads() == 2
    assert torch.get_num_threads() == before
    with pytest.raises(SettingsError, match="0 threads"), limited(0):
        pass


def test_the_command_line_takes_threads_anywhere(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    before, seen = torch.get_num_threads(), []
    monkeypatch.setattr("evercell.registry.available", lambda: seen.append(torch.get_num_threads()) or ())
    assert run("models", "list", "--threads", "2")[0] == 0
    assert run("--threads=3", "models", "list")[0] == 0
    assert run("models", "list")[0] == 0
    assert (seen, torch.get_num_threads()) == ([2, 3, before], before)
    code, _, err = run("models", "list", "--threads", "0")
    assert code == 2 and "--threads" in err


def test_numbers_do_not_depend_on_threads() -> None:
    """Training and annotation, with the members that use torch, scikit-learn and compiled loops."""
    found = []
    settings = replace(quick_settings(), training=TrainingSettings(samples=320, batch_size=64, evaluations=2))
    for threads in (1, 2):
        with limited(threads):
            made = train(synthetic_cells(150, seed=1), groups="donor", settings=settings, shown=False)
            result = annotate(made, synthetic_cells(300, seed=2), shown=False)
        found.append((made.fingerprint, result.probabilities.tobytes(), result.obs["evercell_unknown_score"].tolist()))
    assert found[0] == found[1]


def test_one_thread_uses_one_core(model: Annotator) -> None:
    query = synthetic_cells(2000, seed=3)
    with limited(1):
        wall, cpu = time.perf_counter(), time.process_time()
        annotate(model, query, shown=False)
        assert time.process_time() - cpu <= 1.1 * (time.perf_counter() - wall)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's own counts")
def test_many_annotations_leave_nothing_behind(model: Annotator, query: AnnData) -> None:
    """Memory, open files and threads after 20 calls; 100 of a real model are in benchmarks/leaks.py."""

    def held() -> tuple[int, int, int]:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * 4096, len(os.listdir("/proc/self/fd")), threading.active_count()

    for _ in range(5):
        annotate(model, query, shown=False)
    memory, files, threads = held()
    for _ in range(20):
        annotate(model, query, shown=False)
    memory_after, files_after, threads_after = held()
    assert memory_after - memory < 20e6
    assert (files_after, threads_after) == (files, threads)

"""Who may use the threads of the CPU."""

from __future__ import annotations

import threading

import torch

from evercell.backbones import BACKBONES
from evercell.threads import shared_out, threads_of


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

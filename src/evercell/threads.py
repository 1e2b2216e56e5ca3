"""Threads of the CPU: who may use them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

import numpy as np
import torch

from evercell.errors import SettingsError

if TYPE_CHECKING:
    from evercell.backbones.base import Backbone

MOST_THREADS = 8  # a batch has a few milliseconds of work

_threads: ContextVar[int | None] = ContextVar("threads", default=None)


@contextmanager
def threads_of(backbone: Backbone) -> Iterator[None]:
    """Keep torch to one thread inside where a backbone spreads its own work over the cores.

    Two pools of threads that take turns on the same cores wait for each other at every small operation: a training step
    of `latent` took five times as long. The caller's number of threads is given back at the end.
    """
    before = torch.get_num_threads()
    token = _threads.set(before)
    try:
        if backbone.threaded:
            torch.set_num_threads(1)
        yield
    finally:
        torch.set_num_threads(before)
        _threads.reset(token)


@contextmanager
def limited(n: int) -> Iterator[None]:
    """Let torch, and the linear algebra below numpy and scikit-learn, use `n` threads inside, and what they had after.

    Numbers do not depend on it where each cell meets the same arithmetic, as under `threads_of` and `shared_out`.

    Raises
    ------
    SettingsError
        If `n` is below 1.
    """
    from threadpoolctl import threadpool_limits

    if n < 1:
        raise SettingsError(f"{n} threads were asked for", hint="pass --threads 1 or more")
    before = torch.get_num_threads()
    try:
        with threadpool_limits(n):
            torch.set_num_threads(n)
            yield
    finally:
        torch.set_num_threads(before)


def shared_out(n: int, work: Callable[[int, int], None]) -> None:
    """Call ``work(start, stop)`` on parts of ``range(n)``, one part a thread.

    `work` must release the interpreter's lock. They are plain threads: numba's own would set the number of OpenMP
    threads of all of torch, and two callers at once would end the process.
    """
    n_threads = min(_threads.get() or torch.get_num_threads(), MOST_THREADS, n)
    if n_threads <= 1:
        work(0, n)
        return
    bounds = np.linspace(0, n, n_threads + 1).astype(int).tolist()
    with ThreadPoolExecutor(n_threads) as pool:
        list(pool.map(work, bounds[:-1], bounds[1:]))

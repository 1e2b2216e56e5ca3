"""Threads of the CPU: who may use them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from evercell.backbones.base import Backbone


@contextmanager
def threads_of(backbone: Backbone) -> Iterator[None]:
    """Keep torch to one thread inside where a backbone spreads its own work over the cores.

    Two pools of threads that take turns on the same cores wait for each other at every small operation: a training step of
    `latent` took five times as long. The caller's number of threads is given back at the end.
    """
    import torch

    before = torch.get_num_threads()
    try:
        if backbone.threaded:
            torch.set_num_threads(1)
        yield
    finally:
        torch.set_num_threads(before)

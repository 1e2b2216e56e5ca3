"""Progress bar with loss and time left; silent where the output is not a terminal and nobody else watches."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

Step = Callable[[int, int, float | None], None]
Watcher = Callable[[str, int, int], None]

_watcher: ContextVar[Watcher | None] = ContextVar("watcher", default=None)


@contextmanager
def watched(watcher: Watcher) -> Iterator[None]:
    """Call `watcher` with words, step and number of steps instead of showing bars inside."""
    token = _watcher.set(watcher)
    try:
        yield
    finally:
        _watcher.reset(token)


@contextmanager
def progress(words: str, *, shown: bool | None = None) -> Iterator[Step]:
    """Give a function to be called with step, number of steps and loss (or None).

    Parameters
    ----------
    words
        What is being done.
    shown
        Show the bar; by default where standard error is a terminal.
    """
    if (watcher := _watcher.get()) is not None:
        yield lambda step, steps, loss: watcher(words, step, steps)
        return
    if not (sys.stderr.isatty() if shown is None else shown):
        yield lambda step, steps, loss: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        "{task.description}",
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[loss]}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(words, total=None, loss="")

        def step(done: int, steps: int, loss: float | None) -> None:
            bar.update(task, completed=done, total=steps, loss="" if loss is None else f"loss {loss:.3f}")

        yield step

"""Progress bar with loss and time left; silent where the output is not a terminal and nobody else watches."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress

Step = Callable[[int, int, float | None], None]
Watcher = Callable[[str, int, int], None]

_watcher: ContextVar[Watcher | None] = ContextVar("watcher", default=None)
_silent: ContextVar[bool] = ContextVar("silent", default=False)
_bars: ContextVar[Progress | None] = ContextVar("bars", default=None)


@contextmanager
def watched(watcher: Watcher) -> Iterator[None]:
    """Call `watcher` with words, step and number of steps instead of showing bars inside."""
    token = _watcher.set(watcher)
    try:
        yield
    finally:
        _watcher.reset(token)


@contextmanager
def silenced(silent: bool) -> Iterator[None]:
    """Show no bars inside, whoever asks for one, where `silent`."""
    token = _silent.set(silent)
    try:
        yield
    finally:
        _silent.reset(token)


@contextmanager
def progress(words: str, *, shown: bool | None = None) -> Iterator[Step]:
    """Give a function to be called with step, number of steps and loss (or None).

    Where it is not called, the bar tells the time that has passed instead of the time left. A bar inside another one
    is a line below it.

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
    if _silent.get() or not (sys.stderr.isatty() if shown is None else shown):
        yield lambda step, steps, loss: None
        return
    outer = _bars.get()
    if outer is not None:
        with _line(outer, words) as step:
            yield step
        return
    with _drawn() as bars, _line(bars, words) as step:
        yield step


@contextmanager
def _drawn() -> Iterator[Progress]:
    """Bars at the foot of the terminal, which are gone afterwards."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, ProgressColumn, Task
    from rich.text import Text

    class Figures(ProgressColumn):
        """Steps, time left and loss; where the number of steps is not known, the time that has passed."""

        def render(self, task: Task) -> Text:
            if task.total is None:
                return Text(f"{timedelta(seconds=int(task.elapsed or 0))} so far")
            left = "" if task.time_remaining is None else f"  {timedelta(seconds=int(task.time_remaining))} left"
            return Text(f"{int(task.completed):,} of {int(task.total):,}{left}{task.fields['loss']}")

    columns = ("{task.description}", BarColumn(), Figures())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        token = _bars.set(bars)
        try:
            yield bars
        finally:
            _bars.reset(token)


@contextmanager
def _line(bars: Progress, words: str) -> Iterator[Step]:
    task = bars.add_task(words, total=None, loss="")

    def step(done: int, steps: int, loss: float | None) -> None:
        bars.update(task, completed=done, total=steps, loss="" if loss is None else f"  loss {loss:.3f}")

    try:
        yield step
    finally:
        bars.remove_task(task)

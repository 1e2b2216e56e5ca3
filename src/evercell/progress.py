"""Progress bar with loss and time left; silent where the output is not a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Step = Callable[[int, int, float | None], None]


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

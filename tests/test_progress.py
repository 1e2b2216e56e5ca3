"""Bars: seen in a terminal, silent in pipes and where they are not wanted, one below the other."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from contextlib import suppress

import pytest

from evercell.progress import progress, silenced, watched

SCRIPT = """
import time
from evercell.progress import progress, silenced
with silenced({silent}), progress("reading") as step:
    for done in range(1, 5):
        time.sleep(0.15)
        step(done, 8, 0.25)
    with progress("calibrating"):
        time.sleep(0.15)
print("end")
"""


def in_terminal(*, silent: bool) -> str:
    """What somebody at a terminal sees."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    words = [sys.executable, "-c", SCRIPT.format(silent=silent)]
    with subprocess.Popen(words, stderr=theirs, stdout=subprocess.DEVNULL, env=environment) as done:
        os.close(theirs)
        seen = b""
        with suppress(OSError):  # the other side was closed
            while part := os.read(ours, 4096):
                seen += part
        assert done.wait(60) == 0, seen
    os.close(ours)
    return seen.decode()


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")
def test_a_bar_tells_steps_time_left_and_loss() -> None:
    seen = in_terminal(silent=False)
    assert "reading" in seen and "of 8" in seen and "left" in seen and "loss 0.250" in seen
    assert "calibrating" in seen and "so far" in seen  # inside the other, without a number of steps


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")
def test_nothing_is_drawn_where_it_is_not_wanted() -> None:
    assert in_terminal(silent=True) == ""


def test_a_pipe_stays_clean(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("reading") as step:
        step(1, 2, None)
    with silenced(True), progress("reading", shown=True) as step:
        step(1, 2, None)
    assert capsys.readouterr() == ("", "")


def test_a_watcher_hears_instead() -> None:
    heard = []
    with watched(lambda words, step, steps: heard.append((words, step, steps))), progress("reading") as step:
        step(1, 2, None)
    assert heard == [("reading", 1, 2)]

"""What a worker process does from its start to its end: hear of a job, do it, say what came of it."""

from __future__ import annotations

import json
import multiprocessing as mp
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evercell.errors import EvercellError, FullDiskError, GateError, class_and_words
from evercell.outputs import full_disk_told
from evercell.progress import watched

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

EVERY = 0.2  # seconds between two words on progress
NO_ROOM = "try a smaller file, or later"


def work(pipe: Connection, threads: int) -> None:
    """Do jobs until the server closes the pipe or ends this process.

    Parameters
    ----------
    pipe
        Jobs come and words go, as JSON.
    threads
        Threads of this process: several workers share the cores.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the server, which then ends this process
    threading.Thread(target=_end_with_the_server, daemon=True).start()
    with suppress(OSError):  # where memory runs out, the system is to end this process and not the server
        Path("/proc/self/oom_score_adj").write_text("1000")
    from evercell.serving import tasks

    tasks.set_threads(threads)
    while True:
        try:
            task = json.loads(pipe.recv_bytes())
        except (EOFError, OSError):
            return
        said = _done(task, pipe)
        try:
            pipe.send_bytes(json.dumps(said).encode())
        except (BrokenPipeError, OSError):
            return


def _end_with_the_server() -> None:
    """End this process when the server is gone, however it went: nobody waits for the work any more."""
    server = mp.parent_process()
    if server is not None:
        server.join()
        os._exit(1)


def _done(task: dict[str, Any], pipe: Connection) -> dict[str, Any]:
    """What came of a job: its facts, or what was wrong."""
    from evercell.serving import tasks

    last = 0.0

    def say(step: str, done: int = 0, total: int = 0) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= EVERY or total == 0:
            last = now
            pipe.send_bytes(json.dumps({"step": step, "done": done, "total": total}).encode())

    folder, name = task["folder"], task["name"]
    hint: str | None
    try:
        with watched(say), full_disk_told(name):
            return {"facts": tasks.TASKS[task["kind"]](task, say)}
    except FullDiskError:
        message, hint = f"there is no room on the server's disk for what comes of `{name}`", NO_ROOM
    except EvercellError as error:
        message, hint = error.message, error.hint
        if isinstance(error, GateError):
            hint = "correct more cells of these types, or add the cells that the model is sure of"
    except MemoryError:
        message, hint = "memory ran out", "give fewer cells at a time, or use `evercell annotate`"
    except Exception as error:
        message = class_and_words(error)
        hint = "this is a bug: report what it says"
        print(f"evercell: job failed: {message}", file=sys.stderr, flush=True)
    # The user knows the file by the name that it has there.
    for path in sorted(Path(folder).glob("upload.*")) or [Path(folder) / "upload"]:
        message = message.replace(str(path), name)
    return {"error": message.replace(f"{folder}/", ""), "hint": hint}

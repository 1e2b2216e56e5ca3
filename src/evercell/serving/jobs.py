"""Jobs of users: a queue, a few processes that work it off, and a folder each.

A process does one job at a time and is kept for the next one, because it takes seconds to import torch and to compile
what draws maps. To cancel a job its process is ended; another takes its place. What a process says comes back as JSON,
never as pickled objects: it has read files of strangers.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing as mp
import os
import secrets
import shutil
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from evercell.errors import EvercellError
from evercell.serving.corrections import Correction
from evercell.serving.guard import Refused
from evercell.serving.settings import ServerSettings

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

T = TypeVar("T")
TERM_SECONDS = 2.0
CANCELLED = "the job was cancelled"


class State(StrEnum):
    """Where a job is."""

    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def ended(self) -> bool:
        """Whether nothing more will come of it."""
        return self in (State.DONE, State.FAILED, State.CANCELLED)


@dataclass(eq=False)
class Job:
    """One piece of work.

    Parameters
    ----------
    id
        Cannot be guessed: who knows it may see the job.
    kind
        ``annotate``, ``teach`` or ``files``: what of `work` does it.
    name
        Name that the user's file has; text only, never a path.
    folder
        Where its files are.
    options
        What `work` is given, JSON values.
    about
        The annotation that it teaches from or makes files of.
    facts
        What `work` gave back.
    step, done, total
        What is being done, and how far it is.
    """

    id: str
    kind: str
    name: str
    folder: Path
    options: dict[str, Any]
    about: Job | None = None
    state: State = State.QUEUED
    error: EvercellError | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    step: str = ""
    done: int = 0
    total: int = 0
    made_at: float = field(default_factory=time.monotonic)
    ended_at: float = 0.0
    corrections: list[Correction] = field(default_factory=list)
    files: dict[str, Job] = field(default_factory=dict)
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    worker: Worker | None = None

    def end(self, state: State, error: EvercellError | None = None) -> None:
        """Bring the job to its end, once."""
        if not self.state.ended:
            self.state, self.error, self.ended_at = state, error, time.monotonic()


class Worker:
    """A process that works, from this side."""

    def __init__(self, settings: ServerSettings) -> None:
        from evercell.serving.work import work

        # Of a fork server a new process has all imports at once; elsewhere than on Linux a fork is not safe.
        context: Any = mp.get_context("forkserver" if sys.platform == "linux" else "spawn")
        if sys.platform == "linux":
            context.set_forkserver_preload(["evercell.serving.tasks"])
        self.pipe: Connection
        self.pipe, other = context.Pipe()
        threads = max(1, (os.cpu_count() or 1) // settings.jobs)
        self.process = context.Process(target=work, args=(other, threads), daemon=True)
        self.process.start()
        other.close()
        self._stopped = False
        self._lock = threading.Lock()  # two threads that ask at once how a process ended get two answers

    @property
    def alive(self) -> bool:
        """Whether it can take a job."""
        return not self._stopped and bool(self.process.is_alive())

    def tell(self, message: Mapping[str, Any]) -> None:
        """Give it a job."""
        self.pipe.send_bytes(json.dumps(message).encode())

    def heard(self) -> dict[str, Any]:
        """The next thing that it says; waits for it.

        Raises
        ------
        EOFError, OSError
            If the process has ended.
        """
        found: dict[str, Any] = json.loads(self.pipe.recv_bytes())
        return found

    def stop(self) -> None:
        """End the process, whatever it is doing."""
        self._stopped = True
        with self._lock:
            self.process.terminate()
            self.process.join(TERM_SECONDS)
            if self.process.is_alive():
                self.process.kill()
                self.process.join()

    def dismiss(self) -> None:
        """End the process, which has nothing to do, in its own way."""
        self.pipe.close()
        with self._lock:
            self.process.join(TERM_SECONDS)
        self.stop()

    def why(self) -> str:
        """How the process ended, in words."""
        with self._lock:
            self.process.join(TERM_SECONDS)
            code = self.process.exitcode
        return f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"


class Jobs:
    """All jobs of a server.

    Parameters
    ----------
    settings
        Of the server.
    folder
        A temporary folder, in which each job has one of its own.
    """

    def __init__(self, settings: ServerSettings, folder: Path) -> None:
        self.settings, self.folder = settings, folder
        self._jobs: dict[str, Job] = {}
        self._waiting: asyncio.Queue[Job] = asyncio.Queue()
        self._tasks: list[asyncio.Task[None]] = []
        self._workers: set[Worker] = set()

    def start(self) -> None:
        """Begin to work; in a running event loop."""
        self._tasks = [asyncio.create_task(self._lane()) for _ in range(self.settings.jobs)]
        self._tasks.append(asyncio.create_task(self._sweep()))

    async def close(self) -> None:
        """End all work, answer those who wait for it, and remove all files."""
        for task in self._tasks:
            task.cancel()
        busy = {job.worker for job in self._jobs.values() if job.worker is not None}
        for job in self._jobs.values():
            job.end(State.CANCELLED)
            job.ended.set()
        for worker in list(self._workers):
            await _aside(worker.stop if worker in busy else worker.dismiss)
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await _aside(shutil.rmtree, self.folder, ignore_errors=True)

    def room(self) -> None:
        """Whether one more job may come.

        Raises
        ------
        Refused
        """
        if sum(job.kind != "files" for job in self._jobs.values()) >= self.settings.kept:
            raise Refused(
                503,
                f"the server keeps {self.settings.kept} jobs, and has as many",
                hint="remove jobs that you do not need any more, or try later",
            )

    def new(self, kind: str, name: str, options: dict[str, Any], *, about: Job | None = None) -> Job:
        """A job with a folder; it does not wait for its turn before `queue`."""
        word = secrets.token_urlsafe(18)
        job = Job(word, kind, name, self.folder / secrets.token_hex(12), options, about)
        job.folder.mkdir(mode=0o700)
        self._jobs[word] = job
        return job

    def queue(self, job: Job) -> Job:
        """Have a job wait for its turn."""
        self._waiting.put_nowait(job)
        return job

    def find(self, word: str) -> Job:
        """The job of an id.

        Raises
        ------
        Refused
            If there is none, or none any more.
        """
        job = self._jobs.get(word)
        if job is None:
            hours = self.settings.keep_seconds / 3600
            raise Refused(
                404, "there is no such job", hint=f"jobs are removed {hours:g} hours after their end; begin a new one"
            )
        return job

    def before(self, job: Job) -> int:
        """How many jobs wait before a job that waits."""
        waiting = [one for one in self._jobs.values() if one.state is State.QUEUED]
        return waiting.index(job) if job in waiting else 0

    async def cancel(self, job: Job) -> None:
        """End a job, if it has not ended; its process is gone when this returns."""
        if job.state.ended:
            return
        job.end(State.CANCELLED)
        if job.worker is not None:
            await _aside(job.worker.stop)
            await job.ended.wait()
        job.ended.set()
        await _aside(shutil.rmtree, job.folder, ignore_errors=True)

    async def remove(self, job: Job) -> None:
        """Forget a job and remove its files, and those that are about it."""
        for other in [one for one in self._jobs.values() if one.about is job]:
            await self.remove(other)
        await self.cancel(job)
        self._jobs.pop(job.id, None)
        await _aside(shutil.rmtree, job.folder, ignore_errors=True)

    async def file(self, job: Job, kind: str, digest: str) -> Path:
        """A file of an annotation with its corrections, made where it is not there yet.

        Raises
        ------
        EvercellError
            If it cannot be made.
        """
        path = job.folder / f"{digest}-{kind}"
        maker = job.files.get(path.name)
        if maker is None or (maker.state.ended and maker.state is not State.DONE):
            maker = self.new("files", job.name, {"kind": kind, "output": str(path)}, about=job)
            maker.corrections = list(job.corrections)
            job.files[path.name] = self.queue(maker)
        await maker.ended.wait()
        if maker.error is not None:
            raise maker.error
        if maker.state is not State.DONE:
            raise Refused(410, CANCELLED, hint="ask for the file again")
        for other in [name for name in job.files if name.endswith(f"-{kind}") and name != path.name]:
            if job.files[other].state.ended:  # of earlier corrections
                await self.remove(job.files.pop(other))
                (job.folder / other).unlink(missing_ok=True)
        return path

    async def _lane(self) -> None:
        """Work off the queue, one job after the other."""
        worker: Worker | None = None
        while True:
            if worker is None or not worker.alive:
                worker = await self._hired(worker)
            job = await self._waiting.get()
            if job.state is not State.QUEUED:
                continue
            if not worker.alive:  # ended while it had nothing to do
                worker = await self._hired(worker)
            if job.state is State.QUEUED:
                job.state, job.worker = State.RUNNING, worker
                await self._followed(job, worker)

    async def _hired(self, gone: Worker | None) -> Worker:
        if gone is not None:
            self._workers.discard(gone)
        worker = await _aside(Worker, self.settings)
        self._workers.add(worker)
        return worker

    async def _followed(self, job: Job, worker: Worker) -> None:
        """Give a job to a worker and follow it to its end."""
        try:
            async with asyncio.timeout(self.settings.job_seconds):
                await _aside(worker.tell, _task(job))
                while not job.state.ended:
                    heard = await _aside(worker.heard)
                    if "step" in heard:
                        job.step, job.done, job.total = heard["step"], heard["done"], heard["total"]
                    elif "error" in heard:
                        job.end(State.FAILED, EvercellError(heard["error"], hint=heard["hint"]))
                    else:
                        job.facts = heard["facts"]
                        job.end(State.DONE)
            if job.state is State.CANCELLED:  # said something more; the next job must not go to a process that ends
                await _aside(worker.stop)
        except TimeoutError:
            limit = EvercellError(
                f"the job was ended after {self.settings.job_seconds:,.0f} seconds", hint="give fewer cells at a time"
            )
            job.end(State.FAILED, limit)
            await _aside(worker.stop)
        except (EOFError, OSError, ValueError):
            gone = EvercellError(
                f"the process that worked on the job ended ({await _aside(worker.why)})",
                hint="perhaps memory ran out: give fewer cells at a time, or use `evercell annotate`",
            )
            job.end(State.FAILED, gone)
            await _aside(worker.stop)
        finally:
            job.worker = None
            job.ended.set()
            if job.state is not State.DONE:
                await _aside(shutil.rmtree, job.folder, ignore_errors=True)

    async def _sweep(self) -> None:
        """Remove jobs whose time is over."""
        while True:
            await asyncio.sleep(min(60.0, self.settings.keep_seconds / 4))
            now = time.monotonic()
            for job in list(self._jobs.values()):
                alone = not any(one.about is job and not one.state.ended for one in self._jobs.values())
                if job.state.ended and alone and now - job.ended_at > self.settings.keep_seconds:
                    await self.remove(job)


async def _aside(work: Callable[..., T], *given: object, **named: object) -> T:
    """Wait for work in a thread that does not keep the server from ending, as those of `asyncio.to_thread` do."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(value: T | None, error: BaseException | None) -> None:
        if future.done():
            return
        if error is None:
            future.set_result(cast(T, value))
        else:
            future.set_exception(error)

    def run() -> None:
        value, error = None, None
        try:
            value = work(*given, **named)
        except BaseException as raised:
            error = raised
        with suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(settle, value, error)

    threading.Thread(target=run, daemon=True).start()
    return await future


def _task(job: Job) -> dict[str, Any]:
    """A job as `work` is told of it."""
    about = job.about or job
    return {
        "kind": job.kind,
        "name": job.name,
        "folder": str(about.folder),
        "options": job.options,
        "facts": about.facts,
        "corrections": [[one.label, one.rows, one.was] for one in job.corrections],
    }

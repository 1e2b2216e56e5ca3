"""Who does the parts of a long work: this process, processes of this machine, or a Ray cluster.

The only module that uses Ray. A part is done anew when its process dies, at most `RETRIES` times; so parts must be such
that it does no harm to do one twice. What work gives back must be small: it travels between processes.

Ray's tasks are used, not Ray Data: nothing is streamed from one stage to the next, a part is read, labelled and written
where it is, and a task is started anew on another machine when its own is lost.
"""

from __future__ import annotations

import logging
import os
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any, TypeVar, cast

from evercell.errors import EvercellError, SettingsError, words_of

if TYPE_CHECKING:
    from multiprocessing.context import SpawnProcess

RETRIES = 3
ENGINES = ("local", "ray")
STORE_BYTES = 100 << 20  # of a Ray started here: what parts give back is small
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # under `uv run`, Ray would send the working directory to all machines
}

Task = TypeVar("Task")
Result = TypeVar("Result")
Done = Iterator[tuple[Task, Result | EvercellError]]


def each(
    work: Callable[[Task], Result],
    tasks: Sequence[Task],
    *,
    engine: str = "local",
    workers: int | None = None,
    gpu: bool = False,
) -> Done[Task, Result]:
    """Do work on every task, in no order.

    Parameters
    ----------
    work
        A function of a module, or a `functools.partial` of one, that raises nothing.
    tasks
        What it is called with; hashable, and small enough to be sent.
    engine
        ``"local"``: processes of this machine; with one worker, this process. ``"ray"``: the cluster that
        ``RAY_ADDRESS`` names, or one that is started on this machine and ended afterwards.
    workers
        How many tasks are done at a time; by default one, or with Ray as many as there are CPUs.
    gpu
        Whether each task of Ray needs a GPU.

    Yields
    ------
    tuple
        A task, and what work said of it; an `EvercellError` where the processes that did it died.

    Raises
    ------
    SettingsError
        No such engine, or it is not installed or cannot be reached.

    Examples
    --------
    >>> sorted(each(abs, [-2, 1]))
    [(-2, 2), (1, 1)]
    """
    check_engine(engine, workers)
    if engine == "ray":
        return _by_ray(work, tasks, workers, gpu)
    if workers is None or workers == 1:
        return ((task, work(task)) for task in tasks)
    return _by_processes(work, tasks, workers)


def check_engine(engine: str, workers: int | None) -> None:
    """Whether there is such an engine.

    Raises
    ------
    SettingsError
    """
    if engine not in ENGINES:
        raise SettingsError(f"`{engine}` is no engine", hint=f"pass --engine {' or --engine '.join(ENGINES)}")
    if workers is not None and workers < 1:
        raise SettingsError(f"{workers} workers cannot label cells", hint="pass --workers with 1 or more")
    if engine == "ray" and find_spec("ray") is None:
        raise SettingsError("Ray is not installed", hint='pip install "evercell[ray]"')


def _lost(why: str) -> EvercellError:
    return EvercellError(
        f"{1 + RETRIES} processes died over it: {why}",
        hint="memory may have run out: give fewer workers; the same call does what is missing",
    )


def _by_processes(work: Callable[[Task], Result], tasks: Sequence[Task], workers: int) -> Done[Task, Result]:
    """Processes that live as long as there are tasks, each handed one at a time through a pipe of its own."""
    context = get_context("spawn")  # threads of torch do not outlive a fork
    waiting, deaths = deque(tasks), Counter[Task]()
    running: dict[Connection, tuple[SpawnProcess, Task]] = {}

    def begin() -> None:
        mine, its = context.Pipe()
        process = context.Process(target=_serve, args=(its, work), daemon=True)
        process.start()
        its.close()
        hand(mine, process)

    def hand(connection: Connection, process: SpawnProcess) -> None:
        task = waiting.popleft()
        running[connection] = process, task
        with suppress(OSError):  # one that is dead is found when its answer is awaited
            connection.send(task)

    try:
        while waiting and len(running) < workers:
            begin()
        while running:
            for connection in cast("list[Connection]", wait(list(running))):
                process, task = running.pop(connection)
                try:
                    found = connection.recv()
                except (EOFError, OSError):
                    connection.close()
                    process.join()
                    deaths[task] += 1
                    found = _lost(f"the last ended with code {process.exitcode}") if deaths[task] > RETRIES else None
                    if found is None:
                        waiting.append(task)
                    if waiting:
                        begin()
                    if found is not None:
                        yield task, found
                    continue
                if waiting:
                    hand(connection, process)
                else:
                    connection.close()  # it ends by itself
                    process.join()
                yield task, found
    finally:
        for connection, (process, _) in running.items():
            process.kill()
            process.join()
            connection.close()


def _serve(connection: Connection, work: Callable[[Any], Any]) -> None:
    """Do tasks until there is nobody who hands them."""
    try:
        while True:
            connection.send(work(connection.recv()))
    except (EOFError, OSError, KeyboardInterrupt):
        return


def _by_ray(
    work: Callable[[Task], Result], tasks: Sequence[Task], workers: int | None, gpu: bool
) -> Done[Task, Result]:
    with _ray(workers) as ray:

        def run(task: Any) -> Any:
            return work(task)

        remote = ray.remote(num_cpus=1, num_gpus=int(gpu), max_retries=RETRIES)(run)
        waiting = deque(tasks)
        running: dict[Any, Task] = {}
        most = workers or len(tasks)
        while waiting or running:
            while waiting and len(running) < most:
                task = waiting.popleft()
                running[remote.remote(task)] = task
            (done, *_), _ = ray.wait(list(running))
            task = running.pop(done)
            try:
                found = ray.get(done)
            except ray.exceptions.RayTaskError as error:  # before the work began
                found = EvercellError(
                    f"a worker of Ray cannot begin: {' '.join(str(error.cause).split())[:200]}",
                    hint="install the same Python, evercell and Ray on all machines of the cluster",
                )
            except ray.exceptions.RayError as error:
                found = _lost(words_of(error))
            yield task, found


@contextmanager
def _ray(workers: int | None) -> Iterator[Any]:
    """Ray, connected; left as it is where this process was connected before.

    Ray reads some settings from the environment only, and writes others there: it is put back.
    """
    before = dict(os.environ)
    try:
        os.environ.update({name: before.get(name, value) for name, value in QUIET.items()})
        import ray

        if ray.is_initialized():
            yield ray
            return
        address = before.get("RAY_ADDRESS") or "local"
        # A cluster has its own CPUs; one that is started here is as large as is asked for.
        own: dict[str, Any] = {"num_cpus": workers, "include_dashboard": False, "object_store_memory": STORE_BYTES}
        try:
            ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **(own if address == "local" else {}))
        except Exception as error:  # connections, tokens and versions fail in ways of their own
            raise SettingsError(
                f"Ray at `{address}` cannot be used: {words_of(error)}",
                hint="check RAY_ADDRESS and that this machine has the token of the cluster; unset RAY_ADDRESS to start "
                "Ray here",
            ) from error
        try:
            yield ray
        finally:
            ray.shutdown()
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)

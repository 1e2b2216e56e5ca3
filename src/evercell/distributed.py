"""Several processes that train one model: which batches each does, and how their gradients are summed.

The only module that uses torch.distributed. Processes are started from outside (``torchrun``) and join with
`together`; without it every function here is that of a process alone. What is exchanged are sums of gradients and a few
numbers: data, weights and optimiser are the same in every process because each makes them in the same way.
"""

from __future__ import annotations

import atexit
import hashlib
import os
import signal
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING

from evercell.errors import EvercellError, ModelError, SettingsError, words_of

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor
    from torch.distributed import Store

PATH_BYTES = 4096


@dataclass(frozen=True)
class Process:
    """One of the processes that train a model together.

    Parameters
    ----------
    rank, size
        Its number, from 0, and how many there are.
    local_rank, local_size
        The same among those of its machine.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def first(self) -> bool:
        """Whether it is the one that writes and speaks."""
        return self.rank == 0


_here: ContextVar[Process] = ContextVar("process", default=Process())  # noqa: B039 -- frozen


def here() -> Process:
    """This process; one alone outside of `together`."""
    return _here.get()


def started() -> Process:
    """This process as ``torchrun`` started it, whether or not it has joined the others yet."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    told = [os.environ.get(name, "") for name in names]
    if "MASTER_ADDR" not in os.environ or not all(word.isdecimal() for word in told):
        return Process()
    return Process(*map(int, told))


@contextmanager
def together(device: str = "auto", *, batches: int | None = None) -> Iterator[Process]:
    """Join the processes that ``torchrun`` started beside this one: what is trained inside, all of them train.

    Parameters
    ----------
    device
        As asked for; GPUs are used where the machine has one for each of its processes.
    batches
        Batches a step, to be told before the work where they cannot be shared out.

    Yields
    ------
    Process
        This one. The others hold the same model at the end; only the `first` should write it.

    Raises
    ------
    SettingsError
        If `batches` cannot be shared out.

    Examples
    --------
    >>> from evercell.distributed import together
    >>> with together() as process:  # alone, where torchrun started nothing
    ...     process.size
    1
    """
    process = started()
    if process.size == 1 or here().size > 1:
        yield here()
        return
    import torch
    import torch.distributed as dist

    token = _here.set(process)
    try:
        if batches is not None:
            share(batches)
        with ExitStack() as stack:
            own_gpu = device != "cpu" and torch.cuda.is_available() and torch.cuda.device_count() >= process.local_size
            if own_gpu:
                stack.enter_context(torch.cuda.device(process.local_rank))
            if not dist.is_initialized():
                with _told():
                    store, *_ = next(dist.rendezvous("env://"))
                    dist.init_process_group(
                        "cpu:gloo,cuda:nccl" if own_gpu else "gloo",
                        store=dist.PrefixStore(_meeting(store, process), store),
                        rank=process.rank,
                        world_size=process.size,
                    )
                atexit.register(dist.destroy_process_group)
            stack.enter_context(_ended_in_order())
            yield process
    finally:
        _here.reset(token)


def _meeting(store: Store, process: Process) -> str:
    """A name that only the processes of this start share.

    torchrun keeps one store over its restarts: under a fixed name, processes that were restarted find the addresses of
    those that were ended, and wait for them. So each shows a word of its own, the first tells all words that it sees,
    and a meeting counts when every process has answered to the words told last: the ended ones do not.
    """
    mine = uuid.uuid4().hex
    store.set(f"answer/{process.rank}", "none")
    store.set(f"word/{process.rank}", mine)
    while True:
        if process.first:
            store.set("words", " ".join(store.get(f"word/{rank}").decode() for rank in range(process.size)))
        words = store.get("words").decode()
        name = hashlib.sha256(words.encode()).hexdigest()
        if mine in words:
            store.set(f"answer/{process.rank}", name)
        if process.first and all(store.get(f"answer/{rank}").decode() == name for rank in range(process.size)):
            store.set("meeting", name)
            return name
        # A name in which there is the own word is of this start; so is a meeting of that name.
        if mine in words and store.check(["meeting"]) and store.get("meeting").decode() == name:
            return name
        time.sleep(0.02)


@contextmanager
def _ended_in_order() -> Iterator[None]:
    """Leave through every ``finally`` when torchrun ends this process because another failed: files are removed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _told() -> Iterator[None]:
    """Say what it means that an exchange failed."""
    try:
        yield
    except RuntimeError as error:
        raise EvercellError(
            f"process {here().rank} lost the others: {words_of(error)}",
            hint="see what they said; with --resume the same call goes on from the last look at the held-out cells",
        ) from error


def share(batches: int) -> range:
    """Those of the batches of a step that this process does: neighbours, so that they can be summed in pairs.

    Raises
    ------
    SettingsError
        If the number of batches is no multiple of the number of processes.
    """
    process = here()
    if batches % process.size:
        fitting = -(-batches // process.size) * process.size
        raise SettingsError(
            f"{process.size} processes cannot share a step of {batches} {'batch' if batches == 1 else 'batches'}",
            hint=f"pass --batches-a-step {fitting} or another multiple of {process.size}, or start fewer processes",
        )
    part = batches // process.size
    return range(process.rank * part, (process.rank + 1) * part)


class PairedSum:
    """Sum of vectors in pairs, pairs of pairs and so on, as they come.

    Sums of floats depend on their order. This one can be split: the sums of equal parts, whose size is a power of two,
    are terms of the whole, so `summed` over processes has the bits of one process that adds everything.
    """

    def __init__(self) -> None:
        self._parts: list[tuple[int, Tensor]] = []  # number of terms and their sum; numbers fall

    def add(self, vector: Tensor) -> None:
        """Take a term; it must not be changed afterwards."""
        terms = 1
        while self._parts and self._parts[-1][0] == terms:
            vector, terms = self._parts.pop()[1] + vector, 2 * terms
        self._parts.append((terms, vector))

    def total(self) -> Tensor:
        """Sum of all terms, at least one."""
        (_, found), *rest = reversed(self._parts)
        for _, part in rest:
            found = part + found
        return found


def summed(vector: Tensor) -> Tensor:
    """Sum of the vectors of all processes, the same bits in each.

    On CPUs, for a power of two of processes, neighbours exchange their sums, then pairs of neighbours and so on, as
    `PairedSum` adds; otherwise the order is that of the library.
    """
    process = here()
    if process.size == 1:
        return vector
    import torch
    import torch.distributed as dist

    by_gpu = vector.is_cuda and "nccl" in str(dist.get_backend_config())
    total = vector if by_gpu else vector.cpu()
    with _told():
        if by_gpu or process.size & (process.size - 1):
            total = total.clone()
            dist.all_reduce(total)
            return total.to(vector.device)
        distance = 1
        while distance < process.size:
            other, beside = torch.empty_like(total), process.rank ^ distance
            exchange = [dist.P2POp(dist.isend, total, beside), dist.P2POp(dist.irecv, other, beside)]
            for work in dist.batch_isend_irecv(exchange):
                work.wait()
            total = total + other
            distance *= 2
    return total.to(vector.device)


def of_all(values: np.ndarray) -> np.ndarray:
    """Arrays of one shape and type of all processes, by rank (processes, ...)."""
    if here().size == 1:
        return values[None]
    import numpy as np
    import torch
    import torch.distributed as dist

    mine = torch.from_numpy(np.array(values, order="C"))
    found = [torch.empty_like(mine) for _ in range(here().size)]
    with _told():
        dist.all_gather(found, mine)
    return torch.stack(found).numpy()


def of_first(figures: Mapping[str, float]) -> dict[str, float]:
    """Figures as the first process has them, so that all decide alike; all must have the same names."""
    if here().size == 1:
        return dict(figures)
    import numpy as np

    return dict(zip(figures, of_all(np.array(list(figures.values()), dtype=np.float64))[0].tolist(), strict=True))


def of_machine(path: str) -> str:
    """The path that the first process of this machine names."""
    process = here()
    if process.size == 1:
        return path
    import numpy as np

    mine = np.zeros(PATH_BYTES, dtype=np.uint8)
    text = np.frombuffer(path.encode(), dtype=np.uint8)
    mine[: len(text)] = text
    return of_all(mine)[process.rank - process.local_rank].tobytes().rstrip(b"\0").decode()


def wait() -> None:
    """Go on when all processes have come here."""
    if here().size > 1:
        import numpy as np

        of_all(np.zeros(1))


def agree(what: bytes, words: str) -> None:
    """Check that all processes hold the same.

    Raises
    ------
    ModelError
        In every process, if one holds something else.
    """
    if here().size == 1:
        return
    import numpy as np

    digests = of_all(np.frombuffer(hashlib.sha256(what).digest(), dtype=np.uint8))
    if (other := np.flatnonzero((digests != digests[0]).any(axis=1))).size:
        raise ModelError(
            f"process {other[0]} has other {words} than process 0",
            hint="give all the same files, options and --resume folder, and run them on machines of one kind",
        )

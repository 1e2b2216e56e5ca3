"""One writer at a time: a lock file beside what is written.

The lock is the system's (``flock``), so it ends with its process, however that ends: what a killed process leaves is an
empty claim that nobody has to remove. The file says who holds it, for the one who has to wait.
"""

from __future__ import annotations

import glob
import os
import platform
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from evercell.errors import OutputError

PATIENCE = 60.0  # seconds to wait for another process that is writing: less than a run takes, more than a write does
EVERY = 0.1  # seconds between two tries

_held: dict[tuple[str, int], int] = {}  # by path and thread: how often it was taken


@contextmanager
def locked(path: str | os.PathLike[str], *, patience: float = 0.0, again: bool = False) -> Iterator[None]:
    """Be the only one that writes `path` inside the block.

    Parameters
    ----------
    path
        The file or folder that will be written; the lock lies beside it, as ``.NAME.lock``.
    patience
        Seconds to wait for another that holds it.
    again
        Let the thread in that holds it already.

    Raises
    ------
    OutputError
        If another still holds it then; the message says who. Or if no lock can be made there.
    """
    ends = time.monotonic() + patience
    mine = bool(_held.get((str(_place(path)), threading.get_ident())))
    while again or not mine:
        with claimed(path) as alone:
            if alone:
                yield
                return
        if time.monotonic() >= ends:
            break
        time.sleep(EVERY)
    raise OutputError(
        f"another process is writing `{path}`{_holder(path)}", hint="wait until it has ended, or choose another output"
    )


@contextmanager
def claimed(path: str | os.PathLike[str]) -> Iterator[bool]:
    """Try to be the only one that writes `path`; gives whether that is so, as it is for a thread that holds the lock.

    Where there are no locks, it is taken to be so.

    Raises
    ------
    OutputError
        If no lock can be made there: nothing else could be written either.
    """
    place = _place(path)
    key = (str(place), threading.get_ident())
    if _held.get(key):
        _held[key] += 1
        try:
            yield True
        finally:
            _held[key] -= 1
        return
    try:
        file = _taken(place)
    except BlockingIOError:
        yield False
        return
    except OSError as error:
        raise OutputError(
            f"`{path}` cannot be written: {error.strerror}", hint="make room, or choose another output"
        ) from error
    _held[key] = 1
    try:
        yield True
    finally:
        del _held[key]
        if file is not None:
            with suppress(OSError):  # while it is still held: nobody can have taken it
                place.unlink()
            os.close(file)


@contextmanager
def temporary_folder(parent: Path, prefix: str) -> Iterator[Path]:
    """A folder in `parent`, removed afterwards, as are those that processes which are no more could not remove.

    A process holds a lock beside its folder as long as it lives, however it ends: a folder with a lock file that can be
    taken belongs to none. Only folders of the same user are looked at.
    """
    for lock in parent.glob(f".{glob.escape(prefix)}*.lock"):
        left = lock.with_name(lock.name[1:].removesuffix(".lock"))
        with suppress(OSError, OutputError):  # it is another user's, or just being removed
            if left.lstat().st_uid == os.getuid() and not left.is_symlink():
                with claimed(left) as alone:
                    if alone:
                        shutil.rmtree(left)
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    with claimed(folder):
        folder.mkdir(mode=0o700, exist_ok=True)  # who began at the same time may have found the lock not yet held
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _place(path: str | os.PathLike[str]) -> Path:
    target = Path(os.path.realpath(path))
    return target.with_name(f".{target.name}.lock")


def _taken(place: Path) -> int | None:
    """Number of the lock file, open and held; None where there are no locks (Windows, some network drives)."""
    try:
        import fcntl
    except ImportError:
        return None
    while True:
        file = os.open(place, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            raise
        except OSError:
            os.close(file)
            with suppress(OSError):
                place.unlink()
            return None
        with suppress(OSError):  # who held it before may have removed the file that was opened
            if os.path.samestat(os.fstat(file), os.stat(place)):
                break
        os.close(file)
    words = f"process {os.getpid()} on {platform.node()}, since {datetime.now():%Y-%m-%d %H:%M:%S}"
    with suppress(OSError):  # a full disk holds the lock, only not the words
        os.truncate(file, 0)
        os.write(file, words.encode())
    return file


def _holder(path: str | os.PathLike[str]) -> str:
    """Who holds a lock, in brackets; empty where the file does not say."""
    with suppress(OSError, UnicodeDecodeError):
        if words := _place(path).read_text(encoding="utf-8")[:200]:
            return f" ({words})"
    return ""

"""What is written appears whole or not at all: a place beside it, a lock, and one step at the end.

A process that is killed leaves the old file or the new one, and perhaps hidden files beside it, which the next process
that writes the same output removes.
"""

from __future__ import annotations

import ctypes
import errno
import glob
import os
import re
import shutil
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from evercell.errors import FullDiskError, ModelError, OutputError
from evercell.locking import claimed

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
REFUSED = (errno.EROFS, errno.EACCES, errno.EPERM)


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a path beside ``path`` to write a file or a folder to, renamed when the block ends, removed when it fails.

    Both a file and a folder are replaced in one step (a folder on Linux and macOS; elsewhere the old one is set aside,
    and put back by whoever writes there or loads it next).

    Raises
    ------
    OutputError
        The folder to write in does not exist or cannot be written to, or the disk is full.
    """
    check_folder(path)
    target = Path(os.path.realpath(path))  # a link stays a link
    token = uuid.uuid4().hex[:8]
    unfinished = target.with_name(f".{token}.{target.name}")  # the suffix stays: writers choose by it
    aside = target.with_name(f".{token}.old.{target.name}")
    with claimed(target) as alone:
        if alone:
            _tidy(target)
        try:
            with full_disk_told(path, unfinished):
                yield unfinished
                if not (target.exists() and (target.is_dir() or unfinished.is_dir())):
                    unfinished.replace(target)
                elif not _exchanged(unfinished, target):
                    target.rename(aside)
                    unfinished.replace(target)
        finally:
            if aside.exists() and not target.exists():
                aside.rename(target)
            for left in (unfinished, aside):
                with suppress(OSError):  # what cannot be removed now is removed by whoever writes there next
                    _remove(left)


@contextmanager
def full_disk_told(path: str | os.PathLike[str], written: Path | None = None) -> Iterator[None]:
    """Say of a disk that is full what it means for `path`; the system and HDF5 name no file.

    Parameters
    ----------
    path
        What the user knows it by.
    written
        What is written in fact, where it is not `path`: if this is what may not be written, that is said too.

    Raises
    ------
    OutputError
    """
    try:
        yield
    except OutputError:  # told already, of something else that is written meanwhile
        raise
    except Exception as error:
        number, place = _system_error(error)
        full = number in FULL
        if not full and (number not in REFUSED or not Path(place).is_relative_to(written or path)):
            raise
        mend = "make room on the disk, or choose another place" if full else "choose another place"
        kind = FullDiskError if full else OutputError
        raise kind(
            f"`{path}` cannot be written: {os.strerror(number)}", hint=f"{mend}; what was there before is as it was"
        ) from error


def check_folder(path: str | os.PathLike[str], option: str = "the output") -> None:
    """Whether the folder that something is to be written in is there and can be written to.

    Raises
    ------
    OutputError
    """
    folder = Path(os.path.realpath(path)).parent
    if not folder.is_dir():
        raise OutputError(
            f"the folder `{folder}` of `{path}` does not exist", hint=f"make it first, or change {option}"
        )
    if not os.access(folder, os.W_OK):
        raise OutputError(f"the folder `{folder}` of `{path}` cannot be written to", hint=f"change {option}")


def is_model(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a model directory."""
    return (Path(path) / "annotator.json").is_file()


def check_model_output(path: str | os.PathLike[str], *, overwrite: bool, mend: str = "choose another --output") -> None:
    """Whether a model may be written at a path: where nothing is, in an empty folder, or over a model if that is asked.

    Raises
    ------
    ModelError
        `mend` begins its hint.
    """
    path = Path(path)
    there = is_model(path)
    if path.exists() and not (there and overwrite) and not (path.is_dir() and not any(path.iterdir())):
        what, also = ("", ", or pass --overwrite to replace it") if there else (", and is no model", "")
        raise ModelError(f"`{path}` is already there{what}", hint=f"{mend}{also}")


def remove_whole(folder: Path) -> None:
    """Remove a folder in one step, as far as anyone sees who looks for it; what a kill leaves goes the next time."""
    _tidy(folder)
    gone = folder.with_name(f".{uuid.uuid4().hex[:8]}.{folder.name}")
    with suppress(OSError):
        folder.rename(gone)
        _remove(gone)


def put_back(path: str | os.PathLike[str]) -> None:
    """Put back a folder that a killed process had set aside, unless it is there or somebody is writing it."""
    target = Path(os.path.realpath(path))
    if not target.exists() and _left(target) and os.access(target.parent, os.W_OK):
        with claimed(target) as alone:
            if alone:
                _tidy(target)


def _tidy(target: Path) -> None:
    """Undo what processes that were killed had begun; only while nobody else writes."""
    for left in _left(target):
        if ".old." in left.name[:14] and not target.exists():
            left.rename(target)
        else:
            _remove(left)


def _left(target: Path) -> list[Path]:
    """Hidden files and folders beside an output that `atomic_path` has made."""
    name = re.compile(rf"\.[0-9a-f]{{8}}\.(old\.)?{re.escape(target.name)}")
    found = target.parent.glob(f".*.{glob.escape(target.name)}")
    return [one for one in found if name.fullmatch(one.name)]


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _system_error(error: BaseException | None) -> tuple[int, str]:
    """Number and file of the system's error behind an error; 0 where there is none."""
    while error is not None:
        if isinstance(error, OSError) and error.errno:
            return error.errno, str(error.filename or "")
        if found := re.search(r"\b(?:errno =|os error) (\d+)", str(error)):
            return int(found[1]), ""  # HDF5 and safetensors tell it in words
        error = error.__cause__ or error.__context__
    return 0, ""


def _exchanged(first: Path, second: Path) -> bool:
    """Swap two paths in one step; False where the system or the file system cannot."""
    library, names = ctypes.CDLL(None, use_errno=True), (os.fsencode(first), os.fsencode(second))
    try:
        if sys.platform == "darwin":
            return library.renamex_np(*names, 2) == 0  # RENAME_SWAP
        here = -100  # AT_FDCWD
        return library.renameat2(here, names[0], here, names[1], 2) == 0  # RENAME_EXCHANGE
    except AttributeError:  # no such function
        return False

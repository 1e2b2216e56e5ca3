"""What is promised when something goes wrong: kills, full disks, files that change, memory that runs out, two at once.

`benchmarks/kills.py` kills whole commands by the hundred; here the one thing that all of them write through is killed
at each of its operations.
"""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from anndata import AnnData

from evercell import checkpoint, copying, locking, outputs, streaming
from evercell.annotation import annotate
from evercell.annotator import BATCH, Annotator
from evercell.cells import read_cells, write_cells, write_table
from evercell.checkpoint import load, save
from evercell.errors import CellsError, MemoryWarning, ModelError, OutputError, SettingsError
from evercell.locking import locked, temporary_folder
from evercell.outputs import atomic_path
from evercell.registry import add
from evercell.testing import synthetic_cells
from evercell.training import TrainingSettings, fit

Run = Callable[..., tuple[int, str, str]]
CHANGING = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "ctypes.dlsym"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, model: Annotator) -> Path:
    """A model and a file of cells."""
    place = tmp_path_factory.mktemp("faults")
    save(model, place / "model", card="# card\n")
    synthetic_cells(150, seed=2).write_h5ad(place / "cells.h5ad")
    return place


@pytest.fixture(scope="module")
def other(model: Annotator) -> Annotator:
    """Another model than `model`."""
    return replace(model, temperature=model.temperature * 2)


def names(place: Path) -> list[str]:
    return sorted(one.name for one in place.iterdir())


# --- kills


def killed(work: Callable[[], object], at: int) -> bool:
    """Whether work in a process of its own is killed before its operation number `at`; False where it has fewer."""
    child = os.fork()
    if child == 0:
        number = 0

        def watched(event: str, given: tuple[Any, ...]) -> None:
            nonlocal number
            writes = event == "open" and isinstance(given[2], int) and given[2] & (os.O_WRONLY | os.O_RDWR)
            counted = bool(writes) or event in CHANGING
            number += counted
            if counted and number == at:  # the kill is an event too
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(watched)
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL)
    return status != 0


def at_each_operation(work: Callable[[], object]) -> Iterator[int]:
    """Numbers of operations, each after work was killed before it."""
    number = 1
    while killed(work, number):
        yield number
        number += 1
    assert number > 3  # or nothing was looked at


@pytest.mark.parametrize("swaps", [True, False])
def test_a_model_that_is_killed_while_it_replaces_another(
    model: Annotator, other: Annotator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, swaps: bool
) -> None:
    """Invariant 8: the old model or the new one, whole; also where folders cannot be swapped in one step."""
    if not swaps:
        monkeypatch.setattr(outputs, "_exchanged", lambda *_: False)
    save(model, tmp_path / "model")
    found = set()
    for _ in at_each_operation(lambda: save(other, tmp_path / "model", overwrite=True)):
        assert (tmp_path / "model").exists() or not swaps
        found.add(load(tmp_path / "model").fingerprint)
        save(model, tmp_path / "model", overwrite=True)
        assert names(tmp_path) == ["model"]
    assert found == {model.fingerprint, other.fingerprint} and len(found) == 2


def test_a_file_that_is_killed_while_it_replaces_another(tmp_path: Path) -> None:
    """Invariant 8, of files of cells."""
    old, new = synthetic_cells(20, seed=1), synthetic_cells(30, seed=2)
    place = tmp_path / "cells.h5ad"
    write_cells(old, place)
    for _ in at_each_operation(lambda: write_cells(new, place)):
        assert read_cells(place).n_obs in (20, 30)
        write_cells(old, place)
        assert names(tmp_path) == ["cells.h5ad"]


def test_what_a_killed_process_left_is_removed_by_the_next_only(tmp_path: Path) -> None:
    for left in (".0123abcd.a.csv", ".0123abcd.old.a.csv", ".0123abcd.b.csv", ".mine.a.csv"):
        (tmp_path / left).write_text("left")
    with locked(tmp_path / "b.csv"), atomic_path(tmp_path / "a.csv") as unfinished:
        unfinished.write_text("new")
    assert names(tmp_path) == [".0123abcd.b.csv", ".mine.a.csv", "a.csv"]
    assert (tmp_path / "a.csv").read_text() == "left" or (tmp_path / "a.csv").read_text() == "new"


# --- two at once


@contextmanager
def another(place: Path, *, seconds: float = 60.0) -> Iterator[int]:
    """A process that writes `place` for some time."""
    told, tells = os.pipe()
    child = os.fork()
    if child == 0:
        with locked(place):
            os.write(tells, b".")
            time.sleep(seconds)
        os._exit(0)
    os.read(told, 1)
    try:
        yield child
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(told)
        os.close(tells)


def test_a_second_update_is_refused_and_told_who_the_first_is(folder: Path, tmp_path: Path, run: Run) -> None:
    shutil.copytree(folder / "model", tmp_path / "model")
    words = ["update", tmp_path / "model", tmp_path / "no such file.h5ad", "--labels", "cell_type", "--overwrite"]
    with another(tmp_path / "model") as process:
        code, _, err = run(*words, "--output", tmp_path / "model")
        assert code == 2
        assert f"error: another process is writing `{tmp_path / 'model'}` (process {process} on " in err
        assert "hint: wait until it has ended" in err
    code, _, err = run(*words, "--output", tmp_path / "model")  # it was killed, and holds nothing any more
    assert code == 2 and "no such file.h5ad` does not exist" in err
    assert names(tmp_path) == ["model"]


def test_short_writes_wait_for_each_other(
    folder: Path, model: Annotator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EVERCELL_MODELS", str(tmp_path))
    with another(tmp_path / "mine", seconds=0.3):
        assert add(folder / "model", "mine").name == "mine"
    for module in (checkpoint, sys.modules["evercell.registry"]):
        monkeypatch.setattr(module, "PATIENCE", 0.2)
    with another(tmp_path / "mine"):
        with pytest.raises(OutputError, match="another process is writing"):
            add(folder / "model", "mine", overwrite=True)
        with pytest.raises(OutputError, match="another process is writing"):
            save(model, tmp_path / "mine", overwrite=True)


def test_two_processes_never_hold_a_lock_at_once(tmp_path: Path) -> None:
    """Each adds 1 to a number by reading and writing it; the lock file comes and goes meanwhile."""
    number = tmp_path / "number"
    number.write_text("0")
    words = (
        "import sys, pathlib; from evercell.locking import locked; n = pathlib.Path(sys.argv[1])\n"
        "for _ in range(50):\n"
        "    with locked(n, patience=60): n.write_text(str(int(n.read_text()) + 1))"
    )
    both = [subprocess.Popen([sys.executable, "-c", words, str(number)]) for _ in range(2)]
    assert [one.wait() for one in both] == [0, 0]
    assert number.read_text() == "100" and names(tmp_path) == ["number"]


def test_an_update_of_a_model_that_was_updated_meanwhile_is_refused(
    model: Annotator, other: Annotator, tmp_path: Path
) -> None:
    """Where there are no locks, or from Python: the second would be written without what the first has taught."""
    save(model, tmp_path / "model")
    first, second = (
        replace(one, ledger=one.ledger.appended({"verb": "update", "n": n})) for n, one in enumerate((model, other))
    )
    save(first, tmp_path / "model", overwrite=True, previous=tmp_path / "model")
    third = replace(second, ledger=second.ledger.appended({"verb": "update", "n": 3}))
    with pytest.raises(ModelError, match="has changed since this one was made from it: stage 2 is another"):
        save(third, tmp_path / "model", overwrite=True, previous=tmp_path / "model")
    assert load(tmp_path / "model").fingerprint == first.fingerprint


# --- disks


@contextmanager
def small_files(limit: int) -> Iterator[None]:
    """Files cannot grow beyond `limit` bytes: to who writes, as if the disk were full, in C libraries too."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


def commands(folder: Path, place: Path) -> dict[str, tuple[list[str], str]]:
    """Commands that write, and what they write."""
    cells, model = str(folder / "cells.h5ad"), str(folder / "model")
    annotating = ["annotate", cells, "--model", model, "--output"]
    return {
        "annotate": ([*annotating, f"{place}/out.h5ad"], "out.h5ad"),
        "annotate to a zarr": ([*annotating, f"{place}/out.zarr"], "out.zarr"),
        "annotate to a table": ([*annotating, f"{place}/out.csv"], "out.csv"),
        "annotate in parts": ([*annotating, f"{place}/out"], "out"),
        "embed": (["embed", cells, "--model", model, "--output", f"{place}/out.h5ad"], "out.h5ad"),
        "merge": (["merge", cells, "--output", f"{place}/out.h5ad", "--overwrite"], "out.h5ad"),
        "export": (["models", "export", model, "--output", f"{place}/out", "--overwrite"], "out"),
        "export to a zip": (["models", "export", model, "--output", f"{place}/out.zip", "--overwrite"], "out.zip"),
    }


COMMANDS = list(commands(Path(), Path()))


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("limit", [0, 3000])
def test_a_full_disk(folder: Path, tmp_path: Path, run: Run, name: str, limit: int) -> None:
    words, _ = commands(folder, tmp_path)[name]
    with small_files(limit):
        code, out, err = run(*words)
    assert (code, out) == (2, "")
    assert err.count("error: ") == 1 and os.strerror(errno.EFBIG) in err and str(tmp_path) in err
    assert "hint: make room on the disk" in err and "Traceback" not in err
    left = names(tmp_path)
    assert left == [] or (name == "annotate in parts" and left == ["out"])  # which says itself that it is not complete
    assert run(*words)[0] == 0  # with room again


def test_a_full_disk_leaves_what_was_there(folder: Path, tmp_path: Path, run: Run) -> None:
    shutil.copy(folder / "cells.h5ad", tmp_path / "out.h5ad")
    before = (tmp_path / "out.h5ad").read_bytes()
    with small_files(3000):
        assert (
            run("annotate", tmp_path / "out.h5ad", "--model", folder / "model", "--output", tmp_path / "out.h5ad")[0]
            == 2
        )
    assert (tmp_path / "out.h5ad").read_bytes() == before and names(tmp_path) == ["out.h5ad"]


@contextmanager
def mounted(place: Path, options: str) -> Iterator[None]:
    """A file system in memory; skips where that is not allowed."""
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip("may not mount")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(place)], check=False)


@pytest.mark.skipif(not shutil.which("mount"), reason="needs mount")
def test_a_disk_that_is_full_indeed(folder: Path, tmp_path: Path, run: Run) -> None:
    with mounted(tmp_path, "size=24k"):
        for words, _ in commands(folder, tmp_path).values():
            code, _, err = run(*words)
            if code == 0:  # it is small enough
                continue
            assert code == 2 and os.strerror(errno.ENOSPC) in err and err.count("error: ") == 1, err
            shutil.rmtree(tmp_path / "out", ignore_errors=True)
            for one in tmp_path.glob("out.*"):
                shutil.rmtree(one) if one.is_dir() else one.unlink()
            assert names(tmp_path) == []


@pytest.mark.parametrize("name", COMMANDS)
def test_a_folder_that_is_read_only(folder: Path, tmp_path: Path, run: Run, name: str) -> None:
    words, _ = commands(folder, tmp_path / "shut")[name]
    (tmp_path / "shut").mkdir()
    (tmp_path / "shut").chmod(0o500)

    def refused() -> None:
        code, out, err = run(*words)
        assert (code, out) == (2, "")
        assert err.startswith("error: ") or "\nerror: " in err
        assert "cannot be written to\nhint: " in err

    if os.geteuid():
        refused()
    else:  # permissions are not for root
        with mounted(tmp_path / "shut", "ro"):
            refused()


def test_an_output_that_is_the_input(folder: Path, tmp_path: Path, run: Run) -> None:
    """Annotated in place: the file is its own copy with labels; merged into itself it may not be."""
    shutil.copy(folder / "cells.h5ad", tmp_path / "cells.h5ad")
    before = read_cells(tmp_path / "cells.h5ad")
    code, _, err = run("merge", tmp_path / "cells.h5ad", "--output", tmp_path / "cells.h5ad", "--overwrite")
    assert code == 2 and "is one of the files to be merged" in err
    code, _, err = run("models", "export", folder / "model", "--output", folder / "model")
    assert code == 2 and "is already there" in err
    words = ["annotate", tmp_path / "cells.h5ad", "--model", folder / "model", "--output", tmp_path / "cells.h5ad"]
    assert run(*words)[0] == 0
    found = read_cells(tmp_path / "cells.h5ad")
    assert (found.X != before.X).nnz == 0 and "evercell" in found.obs
    assert names(tmp_path) == ["cells.h5ad"]


# --- files that change, are cut off or vanish


@pytest.mark.parametrize("change", ["grows", "replaced", "vanishes"])
@pytest.mark.parametrize("moment", ["labelling", "copying"])
@pytest.mark.parametrize("output", ["out.h5ad", "out.csv"])
def test_a_file_that_changes_while_it_is_read(
    folder: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch, change: str, moment: str, output: str
) -> None:
    if (moment, output) == ("copying", "out.csv"):
        pytest.skip("a table is no copy")
    file = tmp_path / "cells.h5ad"
    shutil.copy(folder / "cells.h5ad", file)
    where, what = (streaming, "_label") if moment == "labelling" else (copying, "_fill")
    work = getattr(where, what)

    def changing(*given: Any, **how: Any) -> None:
        work(*given, **how)
        if change == "grows":
            with file.open("ab") as open_file:
                open_file.write(b"more")
        elif change == "replaced":
            synthetic_cells(150, seed=3).write_h5ad(tmp_path / "new")
            (tmp_path / "new").replace(file)
        else:
            file.unlink()

    monkeypatch.setattr(where, what, changing)
    code, out, err = run("annotate", file, "--model", folder / "model", "--output", tmp_path / output)
    assert (code, out) == (2, "")
    assert f"error: `{file}` has changed while it was read\nhint: wait until it is written" in err
    assert names(tmp_path) == (["cells.h5ad"] if change != "vanishes" else [])


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.9, 0.9999])
def test_a_file_that_is_cut_off(folder: Path, tmp_path: Path, run: Run, share: float) -> None:
    content = (folder / "cells.h5ad").read_bytes()
    (tmp_path / "cells.h5ad").write_bytes(content[: int(share * len(content))])
    for output in ("out.h5ad", "out.csv", "out.zarr"):  # read in parts, and at once
        code, out, err = run(
            "annotate", tmp_path / "cells.h5ad", "--model", folder / "model", "--output", tmp_path / output
        )
        assert (code, out) == (2, "")
        assert "cells.h5ad` cannot be read as .h5ad: it is damaged, cut off or of another kind" in err
    assert names(tmp_path) == ["cells.h5ad"]


def test_counts_that_are_damaged_far_into_the_file(folder: Path, tmp_path: Path, run: Run) -> None:
    """What opening does not see is told when it is read."""
    import h5py

    cells = synthetic_cells(5000, seed=2)
    cells.write_h5ad(tmp_path / "cells.h5ad", compression="gzip")
    with h5py.File(tmp_path / "cells.h5ad") as file:
        data = file["X/data"]
        chunk = data.id.get_chunk_info(data.id.get_num_chunks() - 1)
    with (tmp_path / "cells.h5ad").open("r+b") as raw:
        raw.seek(chunk.byte_offset)
        raw.write(b"\xff" * min(chunk.size, 200))
    code, out, err = run(
        "annotate", tmp_path / "cells.h5ad", "--model", folder / "model", "--output", tmp_path / "out.csv"
    )
    assert (code, out) == (2, "")
    assert "is damaged or cut off" in err and "hint: copy or download the file again" in err
    assert names(tmp_path) == ["cells.h5ad"]


# --- memory


class NoRoom:
    """A backbone on a GPU without room for more than so many cells at a time. (No GPU is needed for this.)"""

    def __init__(self, model: Annotator, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[int] = []
        forward = type(model.backbone).forward

        def limited(module: Any, tokens: Any) -> Any:
            if module is model.backbone:
                self.seen.append(len(tokens))
                if len(tokens) > most:
                    raise torch.cuda.OutOfMemoryError("tried to allocate 20 MiB")
            return forward(module, tokens)

        monkeypatch.setattr(type(model.backbone), "forward", limited)


@pytest.mark.parametrize(("most", "said"), [(64, "64 cells at a time"), (16, "16 cells at a time"), (8, "on the CPU")])
def test_a_gpu_without_room_gets_smaller_batches(
    model: Annotator, query: AnnData, monkeypatch: pytest.MonkeyPatch, most: int, said: str
) -> None:
    """The labels are the same; numbers may differ in their last bits, except on the CPU."""
    expected = annotate(model, query, shown=False)
    gpu = NoRoom(model, most, monkeypatch)
    with pytest.warns(MemoryWarning, match=f"the memory of the GPU ran out; it goes on with .*{said}"):
        found = annotate(model, query, shown=False)
    assert gpu.seen[0] == BATCH and min(gpu.seen) == max(most, 16)
    assert (found.labels == expected.labels).all()
    np.testing.assert_allclose(found.probabilities, expected.probabilities, atol=1e-6)
    if most == 8:
        assert np.array_equal(found.representation, expected.representation)


def test_the_command_says_that_a_gpu_has_no_room(
    folder: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(folder / "model")
    NoRoom(model, 64, monkeypatch)
    monkeypatch.setattr("evercell.commands.models.load_model", lambda *_: model)
    monkeypatch.setattr("evercell.commands.annotating.load_model", lambda *_: model)
    words = ["annotate", folder / "cells.h5ad", "--model", folder / "model", "--output", tmp_path / "out.csv"]
    code, _, err = run(*words)
    assert code == 0 and err.count("warning: the memory of the GPU ran out; it goes on with 64 cells at a time") == 1


def test_training_on_a_gpu_without_room_ends_with_a_mend() -> None:
    module = torch.nn.Linear(2, 2)

    def loss(_: np.random.Generator) -> torch.Tensor:
        raise torch.cuda.OutOfMemoryError("tried to allocate 20 MiB")

    with pytest.raises(SettingsError, match=r"memory of the GPU ran out at step 1, 128 cells a batch") as caught:
        fit(module, loss, TrainingSettings(samples=256, batch_size=128))
    assert "--device cpu" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["train", "{cells}", "--labels", "cell_type", "--output", "{t}/out"], "--store FOLDER"),
        (["annotate", "{cells}", "--model", "{model}", "--output", "{t}/out.zarr"], "read in parts"),
    ],
)
@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 8 bytes")]
)
def test_memory_that_runs_out_is_one_error(
    folder: Path,
    tmp_path: Path,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    hint: str,
    error: Exception,
) -> None:
    def full(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("evercell.counts.csr_block", full)
    places = {"cells": folder / "cells.h5ad", "model": folder / "model", "t": tmp_path}
    code, out, err = run(*(word.format(**places) for word in words))
    assert (code, out) == (2, "")
    assert "error: memory ran out" in err and hint in err
    assert names(tmp_path) == []


# --- the folder of a server


def test_the_folder_of_a_killed_server_is_removed_by_the_next(tmp_path: Path) -> None:
    """And that of a training whose counts are in files (`--store`)."""

    def room() -> AbstractContextManager[Path]:
        return temporary_folder(tmp_path, "evercell-serve-")

    (tmp_path / "evercell-serve-notmine").mkdir()  # without a lock: whoever made it
    (tmp_path / "data").mkdir()
    (tmp_path / "evercell-serve-link").symlink_to(tmp_path / "data")
    (tmp_path / ".evercell-serve-link.lock").touch()
    told, tells = os.pipe()
    child = os.fork()
    if child == 0:
        with room() as folder:
            (folder / "upload.h5ad").write_text("cells of a user")
            os.write(tells, folder.name.encode())
            time.sleep(60)
        os._exit(0)
    name = os.read(told, 100).decode()
    with room():  # it lives
        assert (tmp_path / name / "upload.h5ad").exists()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert (tmp_path / name).exists()
    with room() as folder:
        assert folder.is_dir() and not (tmp_path / name).exists()
    assert names(tmp_path) == [".evercell-serve-link.lock", "data", "evercell-serve-link", "evercell-serve-notmine"]


def test_a_full_disk_of_counts_and_of_the_state_of_a_run(folder: Path, tmp_path: Path, run: Run) -> None:
    words = ["train", folder / "cells.h5ad", "--labels", "cell_type", "--samples", "128", "--output", tmp_path / "out"]
    for option in ("--store", "--resume"):
        (tmp_path / "state").mkdir()
        with small_files(3000):
            code, out, err = run(*words, option, tmp_path / "state")
        assert (code, out) == (2, "")
        assert f"error: `{tmp_path / 'state'}" in err and os.strerror(errno.EFBIG) in err
        assert not list((tmp_path / "state").rglob(".*")) and names(tmp_path) == ["state"]
        shutil.rmtree(tmp_path / "state")


def test_a_table_too_is_whole_or_absent(tmp_path: Path) -> None:
    with small_files(10), pytest.raises(OutputError, match="cannot be written"):
        write_table(synthetic_cells(20, seed=1).obs, tmp_path / "table.csv.gz")
    with pytest.raises(CellsError, match="does not end in"):
        write_table(synthetic_cells(20, seed=1).obs, tmp_path / "table.x")
    assert names(tmp_path) == [] and locking._held == {}

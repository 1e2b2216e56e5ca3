"""Is anything half written when a command is killed? Every command that writes is killed, over and over.

    python benchmarks/kills.py [--most 24] [--random 8] [--seed 0] [--only NAME ...] [--inputs FOLDER] [--json FILE]

Each command of `SCENARIOS` works on cells of the packaged pancreas, with small settings. It is killed (SIGKILL)

- `at`: just before each operation on the file system below its folder (open for writing, rename, remove, make a folder,
  swap of two folders), the first to the last, or `--most` of them evenly spread where there are more;
- `after`: some random milliseconds after such an operation, so amid writing, also inside HDF5;
- `time`: at a random moment of the whole run, three in ten in the last 15 % of it.

After each kill it is asked: is the output the old one, whole, or the new one, whole, or absent where nothing was? Is
nothing else to be seen in the folder? Then the same command is run again: does it succeed, are the numbers those of an
uninterrupted run, and is nothing hidden left in the folder? (Where the output was new already and the command does not
overwrite, it has to say so; where a command replaces its own input, it is not run on the new one.)

Exit code 1 if any answer is no. The process that is killed is forked from one that has the libraries loaded.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import select
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd

import evercell as ec
import evercell.atlas
import evercell.commands.annotating
import evercell.crossvalidation
import evercell.finetuning
import evercell.merging
import evercell.pretraining
import evercell.updating.update
from evercell.checkpoint import load, load_stage, stages_kept
from evercell.cli import main
from evercell.label_store import manifest_of, read_labels

CHANGING = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"}
LAST, IN_LAST = 0.85, 0.3  # of the random moments, this share lies in what comes after this part of a run
SMALL = ["--samples", "128", "--backbone-setting", "n_latents=4", "--backbone-setting", "depth=1"]
TRAIN = ["train", "first.h5ad", "--labels", "cell_type", "--donor", "donor", *SMALL]
UPDATE = ["second.h5ad", "--labels", "cell_type", "--samples", "128", "--force"]

Check = Callable[[Path], str | None]


@dataclass(frozen=True)
class Scenario:
    """A command, and what of it is looked at.

    Parameters
    ----------
    words
        The command, run in a folder of its own.
    target
        What it writes there.
    state
        What is at the target: a digest, or None where nothing is.
    old
        Of what there is before: the file in the folder of all inputs that is put at the target.
    in_place
        Whether the target is an input too.
    partial
        Whether the target is made bit by bit, and says itself when it is whole (then its state is None before).
    slow
        Learns, or starts processes of its own: killed a third as often.
    """

    words: list[str]
    target: str
    state: Check
    old: str | None = None
    in_place: bool = False
    partial: bool = False
    slow: bool = False


def of_model(path: Path) -> str | None:
    """Fingerprint of a model and its stages, all hashes checked."""
    if not path.exists():
        return None
    model = load(path)
    stages = [load_stage(path, one, now=model).fingerprint for one in stages_kept(path)]
    return f"{model.fingerprint} {len(model.ledger)} {stages}"


def of_bytes(path: Path) -> str | None:
    """Digest of a file or a folder, of all that is in it."""
    if not path.exists():
        return None
    files = [path] if path.is_file() else sorted(one for one in path.rglob("*") if one.is_file())
    return hashlib.sha256(b"".join(one.name.encode() + one.read_bytes() for one in files)).hexdigest()


def of_h5ad(path: Path) -> str | None:
    """Digest of everything in an .h5ad, whatever the time written into it."""
    if not path.exists():
        return None
    found = hashlib.sha256()

    def add(name: str, one: Any) -> None:
        attributes = sorted((key, str(value)) for key, value in one.attrs.items())
        value = one[()] if isinstance(one, h5py.Dataset) else b""
        data = (
            value.tobytes() if getattr(value, "dtype", np.dtype("O")).kind != "O" else str(np.asarray(value).tolist())
        )
        found.update(f"{name}{attributes}".encode() + (data if isinstance(data, bytes) else str(data).encode()))

    with h5py.File(path) as file:
        file.visititems(add)
    return found.hexdigest()


def of_store(path: Path) -> str | None:
    """Digest of a store of labels that says it is whole."""
    manifest = manifest_of(path) if path.exists() else None
    if manifest is None or not manifest["ended"]:
        return None
    return hashlib.sha256(read_labels(path).to_csv().encode()).hexdigest()


def of_folds(path: Path) -> str | None:
    """Digest of the scores of a cross-validation whose last table is there; seconds differ."""
    file = path / "folds.csv"
    scores = pd.read_csv(file) if file.exists() else None
    if scores is None or not all((path / f"confusion-{method}.csv").exists() for method in scores["method"]):
        return None
    kept = scores[[name for name in scores if "seconds" not in name]]
    return hashlib.sha256(kept.to_csv().encode()).hexdigest()


ANNOTATE = ["--model", "model", "--output"]
SCENARIOS: dict[str, Scenario] = {
    "train": Scenario([*TRAIN, "--output", "out"], "out", of_model, slow=True),
    "train over a model": Scenario([*TRAIN, "--output", "out", "--overwrite"], "out", of_model, old="model", slow=True),
    "update": Scenario(["update", "model", *UPDATE, "--output", "out"], "out", of_model, slow=True),
    "update in place": Scenario(
        ["update", "out", *UPDATE, "--output", "out", "--overwrite"],
        "out",
        of_model,
        old="model",
        in_place=True,
        slow=True,
    ),
    "revert": Scenario(["revert", "two", "--stage", "1", "--output", "out"], "out", of_model),
    "revert in place": Scenario(
        ["revert", "out", "--stage", "1", "--output", "out", "--overwrite"], "out", of_model, old="two", in_place=True
    ),
    "pretrain": Scenario(
        ["pretrain", "first.h5ad", "second.h5ad", *SMALL, "--resume", "state", "--output", "out"],
        "out",
        of_model,
        slow=True,
    ),
    "annotate in memory": Scenario(["annotate", "cells.csv", *ANNOTATE, "out.h5ad"], "out.h5ad", of_h5ad),
    "annotate streamed": Scenario(
        ["annotate", "second.h5ad", *ANNOTATE, "out.h5ad"], "out.h5ad", of_h5ad, old="first.h5ad"
    ),
    "annotate in place": Scenario(
        ["annotate", "out.h5ad", *ANNOTATE, "out.h5ad"], "out.h5ad", of_h5ad, old="second.h5ad", in_place=True
    ),
    "annotate zarr": Scenario(
        ["annotate", "second.zarr", *ANNOTATE, "out.zarr"], "out.zarr", of_bytes, old="second.zarr"
    ),
    "annotate to a table": Scenario(["annotate", "second.h5ad", *ANNOTATE, "out.csv"], "out.csv", of_bytes),
    "annotate in parts": Scenario(["annotate", "many", *ANNOTATE, "out"], "out", of_store, partial=True),
    "annotate by workers": Scenario(
        ["annotate", "many", *ANNOTATE, "out", "--workers", "2"], "out", of_store, partial=True, slow=True
    ),
    "embed": Scenario(["embed", "second.h5ad", *ANNOTATE, "out.h5ad"], "out.h5ad", of_h5ad, old="first.h5ad"),
    "merge": Scenario(["merge", "first.h5ad", "second.h5ad", "--output", "out.h5ad"], "out.h5ad", of_h5ad),
    "merge over a file": Scenario(
        ["merge", "first.h5ad", "second.h5ad", "--output", "out.h5ad", "--overwrite"],
        "out.h5ad",
        of_h5ad,
        old="first.h5ad",
    ),
    "models add": Scenario(["models", "add", "two", "--name", "mine"], "own/mine", of_model),
    "models add of a zip": Scenario(["models", "add", "two.zip", "--name", "mine"], "own/mine", of_model),
    "models add over a model": Scenario(
        ["models", "add", "two", "--name", "mine", "--overwrite"], "own/mine", of_model, old="model"
    ),
    "models export": Scenario(["models", "export", "two", "--output", "out"], "out", of_model),
    "models export to a zip": Scenario(["models", "export", "two", "--output", "out.zip"], "out.zip", of_bytes),
    "crossval": Scenario(
        [
            "crossval",
            "first.h5ad",
            "--labels",
            "cell_type",
            "--by",
            "stratified",
            "--folds",
            "2",
            *SMALL,
            "--output",
            "out",
        ],
        "out",
        of_folds,
        partial=True,
        slow=True,
    ),
}


@dataclass
class Tally:
    """What came of the kills of a scenario."""

    kills: Counter[str] = field(default_factory=Counter)
    found: Counter[str] = field(default_factory=Counter)
    left: Counter[str] = field(default_factory=Counter)
    operations: int = 0
    faults: list[str] = field(default_factory=list)


def inputs(folder: Path) -> None:
    """Everything that the commands read, made once."""
    from anndata.io import write_zarr

    rng = np.random.default_rng(0)
    for number, name in enumerate(("baron_stage1", "fasolino_stage2")):
        cells = ec.load_example(name)
        kept = cells.obs["cell_type"].value_counts().index[: 3 + number]
        cells = cells[cells.obs["cell_type"].isin(kept).to_numpy()]
        cells = cells[np.sort(rng.choice(cells.n_obs, 120, replace=False)), :300].copy()
        cells.obs["cell_type"] = cells.obs["cell_type"].astype(str).astype("category")
        cells.write_h5ad(folder / ("first.h5ad", "second.h5ad")[number], compression="gzip")
    write_zarr(folder / "second.zarr", cells)
    table = pd.DataFrame(cells.X.toarray().astype(int), index=cells.obs_names, columns=cells.var_names)
    table.to_csv(folder / "cells.csv")
    (folder / "many").mkdir()
    for name in ("a", "b", "c"):
        shutil.copy(folder / "second.h5ad", folder / "many" / f"{name}.h5ad")
    for words in (
        [*TRAIN, "--output", "model"],
        ["update", "model", *UPDATE, "--output", "two"],
        ["models", "export", "two", "--output", "two.zip"],
    ):
        if (code := Run(words, folder).ended()[0]) != 0:
            raise SystemExit(f"{' '.join(words)} ended with {code}: {(folder / 'log').read_text()}")
    (folder / "log").unlink()


class Run:
    """A command in a process of its own, forked from this one; `stop` (kind, operation) has it killed there."""

    def __init__(self, words: list[str], folder: Path, *, kill_at: int = 0, tell_at: int = 0) -> None:
        self.began, self.log = time.monotonic(), folder / "log"
        self.told, write = os.pipe()
        self.pid = os.fork()
        if self.pid:
            os.close(write)
            return
        code = 3
        try:
            os.setsid()
            os.chdir(folder)
            os.environ["EVERCELL_MODELS"] = str(folder / "own")
            with self.log.open("wb") as log:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
            watched = Operations(folder, kill_at, tell_at, write)
            sys.addaudithook(watched)
            code = main(words)
            watched.done = True
            os.write(write, f" {watched.number}".encode())
            sys.stdout.flush()
        finally:
            os._exit(code)

    def ended(self) -> tuple[int, float, int]:
        """Exit code (less than 0: the signal), seconds, operations."""
        status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        seconds = time.monotonic() - self.began
        words = b"".join(iter(lambda: os.read(self.told, 100), b"")).split() if status >= 0 else []
        os.close(self.told)
        return status, seconds, int(words[-1]) if words else 0

    def killed_after(self, seconds: float, *, told: bool) -> int:
        """Kill it and what it has started, so long after its begin or after it told; its exit code."""
        if told:
            select.select([self.told], [], [])
        time.sleep(seconds)
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        os.close(self.told)
        return status


class Operations:
    """Counts what changes the file system below a folder; kills its own process, or tells, just before one of them."""

    def __init__(self, folder: Path, kill_at: int, tell_at: int, pipe: int) -> None:
        self.folder, self.kill_at, self.tell_at, self.pipe = os.path.realpath(folder), kill_at, tell_at, pipe
        self.number, self.done = 0, False

    def __call__(self, event: str, given: tuple[Any, ...]) -> None:
        if self.done or not self.counts(event, given):
            return
        self.number += 1
        if self.number == self.kill_at:
            os.killpg(os.getpid(), signal.SIGKILL)
        if self.number == self.tell_at:
            os.write(self.pipe, b".")

    def counts(self, event: str, given: tuple[Any, ...]) -> bool:
        if event == "ctypes.dlsym":
            return given[1] == "renameat2"
        if event == "open":
            flags = given[2] if isinstance(given[2], int) else 0
            if not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND):
                return False
        elif event not in CHANGING:
            return False
        if not isinstance(given[0], str | bytes | os.PathLike):
            return False
        if event in ("os.remove", "os.rmdir") and given[-1] not in (None, -1):
            return True  # within a folder that is open, as `rmtree` does it
        place = os.path.abspath(os.fsdecode(given[0]))
        return place.startswith(self.folder) and place != f"{self.folder}/log"


def prepared(scenario: Scenario, source: Path, folder: Path) -> Path:
    """A folder with the inputs (links would do, but for those that are replaced) and what is at the target before."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / "own").mkdir()
    needed = {word for word in scenario.words if (source / word).exists()}
    for name in needed:
        copied(source / name, folder / name)
    if scenario.old is not None:
        copied(source / scenario.old, folder / scenario.target)
    return folder


def copied(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target)
    else:
        shutil.copy2(source, target)


def names(folder: Path) -> set[str]:
    """What is in a folder and in that of the user's own models."""
    return {one.name for one in folder.iterdir()} | {f"own/{one.name}" for one in (folder / "own").iterdir()} - {"log"}


def kinds(hidden: set[str]) -> Iterator[str]:
    """Hidden names with what differs from run to run left out."""
    for name in hidden:
        parts = name.removeprefix("own/").split(".")
        random = len(parts[1]) == 8 and set(parts[1]) <= set("0123456789abcdef")
        yield ".".join(["", "TOKEN" if random else parts[1], *parts[2:]])


def moments(n_operations: int, seconds: float, asked: argparse.Namespace, rng: np.random.Generator, slow: bool) -> Any:
    """Kind, operation and delay of every kill."""
    most = max(asked.most // (3 if slow else 1), 2)
    at = np.unique(np.linspace(1, n_operations, min(most, n_operations)).round().astype(int))
    yield from (("at", int(one), 0.0) for one in at)
    for _ in range(max(asked.random // (3 if slow else 1), 1)):
        yield "after", int(rng.integers(1, n_operations + 1)), float(rng.uniform(0, 0.03))
    for _ in range(max(asked.random // (3 if slow else 1), 1)):
        part = rng.uniform(LAST, 1.0) if rng.uniform() < IN_LAST else rng.uniform(0, 1.0)
        yield "time", 0, float(part * seconds)


def tried(scenario: Scenario, source: Path, work: Path, asked: argparse.Namespace, rng: np.random.Generator) -> Tally:
    tally = Tally()
    whole = Run(scenario.words, prepared(scenario, source, work))
    code, seconds, tally.operations = whole.ended()
    if code != 0:
        tally.faults.append(f"uninterrupted it ended with {code}: {(work / 'log').read_text()[-500:]}")
        return tally
    new, after = scenario.state(work / scenario.target), names(work)
    prepared(scenario, source, work)
    old, before = (None if scenario.partial else scenario.state(work / scenario.target)), names(work)
    if new is None or new == old:
        tally.faults.append("uninterrupted it changed nothing that is looked at")
        return tally
    for kind, operation, delay in moments(tally.operations, seconds, asked, rng, scenario.slow):
        prepared(scenario, source, work)
        if kind == "at":
            code = Run(scenario.words, work, kill_at=operation).ended()[0]
        else:
            code = Run(scenario.words, work, tell_at=operation).killed_after(delay, told=kind == "after")
        if code != -signal.SIGKILL:
            tally.found["ended before the kill"] += 1
            continue
        tally.kills[kind] += 1
        moment = f"{kind} {operation} {delay:.3f}"
        try:
            looked_at(scenario, work, old, new, before, after, tally)
        except Exception as error:  # whatever it is, it is what the user would meet
            tally.faults.append(f"{moment}: {type(error).__name__}: {error}")
            continue
        tally.faults = [one if ": " in one else f"{moment}: {one}" for one in tally.faults]
    return tally


def looked_at(
    scenario: Scenario, work: Path, old: str | None, new: str, before: set[str], after: set[str], tally: Tally
) -> None:
    """What a kill has left, and what the same command makes of it."""
    state = scenario.state(work / scenario.target)
    word = "new" if state == new else "old" if state == old else "other"
    tally.found["absent" if state is None and word == "old" else word] += 1
    if word == "other":
        tally.faults.append(f"the target is neither the old one nor the new one ({state})")
    seen = names(work)
    hidden = {one for one in seen if one.removeprefix("own/").startswith(".")}
    if strange := seen - hidden - before - after:
        tally.faults.append(f"to be seen in the folder: {sorted(strange)}")
    tally.left.update(kinds(hidden))
    if scenario.in_place and word == "new":
        return
    code = Run(scenario.words, work).ended()[0]
    said = (work / "log").read_text(errors="replace")
    if code == 2 and word == "new" and "already" in said:
        tally.found["said to be done already"] += 1
        return
    if code != 0:
        tally.faults.append(f"the same command then ended with {code}, {said[-300:]!r}")
    elif scenario.state(work / scenario.target) != new:
        tally.faults.append("the same command then gave other numbers")
    elif (left := names(work)) != after:
        tally.faults.append(f"left behind after the same command, {sorted(left ^ after)}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--most", type=int, default=24, help="operations of a command before which it is killed")
    parser.add_argument("--random", type=int, default=8, help="kills at random moments, of either kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", choices=list(SCENARIOS), default=list(SCENARIOS), metavar="NAME")
    parser.add_argument(
        "--inputs", type=Path, metavar="FOLDER", help="keep what the commands read here, for later calls"
    )
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def run_all() -> int:
    asked = arguments()
    rng = np.random.default_rng(asked.seed)
    tallies: dict[str, Tally] = {}
    with tempfile.TemporaryDirectory(prefix="evercell-kills-") as folder:
        source, work = (asked.inputs or Path(folder, "inputs")).absolute(), Path(folder, "work")
        if not source.is_dir():
            source.mkdir()
            inputs(source)
        print(f"{'':<26}{'operations':>11}{'at':>5}{'after':>6}{'time':>5}  found after the kill; hidden; faults")
        for name in asked.only:
            tally = tallies[name] = tried(SCENARIOS[name], source, work, asked, rng)
            kills = "".join(f"{tally.kills[kind]:>{width}}" for kind, width in (("at", 5), ("after", 6), ("time", 5)))
            found, left = (", ".join(f"{n} {word}" for word, n in of.most_common()) for of in (tally.found, tally.left))
            print(
                f"{name:<26}{tally.operations:>11}{kills}  {found}; {left or 'nothing'}; {len(tally.faults)}",
                flush=True,
            )
            for fault in tally.faults:
                print(f"    {fault}", flush=True)
    n_kills = sum(sum(one.kills.values()) for one in tallies.values())
    n_faults = sum(len(one.faults) for one in tallies.values())
    print(f"\n{n_kills:,} kills, {n_faults:,} faults")
    if asked.json:
        asked.json.write_text(json.dumps({name: vars(one) for name, one in tallies.items()}, indent=1))
    return int(n_faults > 0)


if __name__ == "__main__":
    sys.exit(run_all())

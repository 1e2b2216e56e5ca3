"""The mouse lung, whole studies held out: evercell, from nothing and pretrained, beside every other method.

    python benchmarks/mouse_lung.py --base NAME=DIR --seeds 0 1 2
    python benchmarks/mouse_lung.py --write FOLDER     the labelled studies under one set of names, for the commands

Four labelled studies of adult lungs (`tasks.py`, `mouse-lung`) are trained on; the atlas of lung development is tested.
It was measured over 2,000 genes and at ages from E12 to P70, so this is a shift of age and of panel. The training
studies show AT1 cells twice only, and the atlas has 82 of them: at the level of the types they are out of reach for
every method. At major types epithelium is one type, as are all cells of the stroma; the atlas' own names are brought to
them by `tasks.LUNG_DEVELOPMENT`. `--species` runs the human and the mouse pancreas, each from the other, instead.

A base is a model of `evercell pretrain` that has not seen the test study. Rows go to one CSV file; a row that is there
is not run again.
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from baselines import BASELINES, DETERMINISTIC
from cross_study import _commit, score
from tasks import DATA, MOUSE_PANCREAS, TASKS, Study, Task, build
from transfer import evercell

import evercell as ec
from evercell.comparison import available

RESULTS = Path(__file__).resolve().parent / "results" / "mouse_lung.csv"
KEY = ["task", "method", "seed"]
COLUMNS = [*KEY, "n_train", "n_test", "accuracy", "macro_f1", "major_accuracy", "major_macro_f1", "seconds", "commit"]
EPITHELIUM = dict.fromkeys(["at1", "at2", "ciliated cell", "club cell", "basal cell"], "epithelial")

LUNG = {"mouse-lung": TASKS["mouse-lung"]}
SPECIES: dict[str, Callable[[], Task]] = {
    "human pancreas -> mouse": TASKS["pancreas-4"],
    "mouse pancreas -> human": lambda: build(
        "mouse-human", [Study("baron_mouse_pancreas", MOUSE_PANCREAS)], Study("baron_human")
    ),
}
"""Both of one laboratory and one method. The mouse study is a test study: what is trained on it is shipped nowhere."""


VARIANTS = {"all": "evercell, {}", "head": "evercell, {}, head alone"}


def methods_of(bases: dict[str, ec.Annotator], variants: list[str], others: list[str]) -> dict[str, Callable[..., Any]]:
    """Name -> method on (training studies, test study, seed)."""
    found: dict[str, Callable[..., Any]] = {}
    if "scratch" in variants:
        found["evercell"] = evercell("scratch", None, {})
    for name, base in bases.items():
        found |= {VARIANTS[one].format(name): evercell(one, base, {}) for one in variants if one in VARIANTS}
    return found | {name: BASELINES[name] for name in others}


def row_of(task: Task, label: Callable[..., Any], seed: int) -> dict[str, Any]:
    """Figures at the level of the task and at major types."""
    test = task.test.copy()
    truth = test.obs["label"].astype(str).to_numpy()
    test.obs = test.obs[["study", "group"]]  # no label reaches a method
    found = label(task.train, test, seed)
    fine = score(truth, task.comparable(found.labels), task.known, found)
    major = [np.array([EPITHELIUM.get(one, one) for one in names]) for names in (truth, task.comparable(found.labels))]
    shown = {EPITHELIUM.get(one, one) for cells in task.train for one in task.comparable(cells.obs["label"].unique())}
    coarse = score(*major, np.isin(major[0], list(shown)), found)
    return {
        "n_train": sum(cells.n_obs for cells in task.train),
        "n_test": int(task.known.sum()),
        "accuracy": round(fine["accuracy"], 4),
        "macro_f1": round(fine["macro_f1"], 4),
        "major_accuracy": round(coarse["accuracy"], 4),
        "major_macro_f1": round(coarse["macro_f1"], 4),
        "seconds": round(found.seconds_train + found.seconds_annotate, 1),
    }


def write(folder: Path, data: Path) -> None:
    """The labelled studies of the task as files, `cell_type` under one set of names, and the held-out one."""
    task = TASKS["mouse-lung"](data=data)
    folder.mkdir(parents=True, exist_ok=True)
    for cells in [*task.train, task.test]:
        cells.obs["cell_type"] = cells.obs["label"].astype(str)
        study = str(cells.obs["study"].iloc[0])
        cells.obs["animal"] = cells.obs["animal" if "animal" in cells.obs else "group"].astype(str)
        kept = cells.obs[["cell_type", "animal", "tissue", "technology"]].astype(str)
        cells.obs = kept
        del cells.uns["species"]
        held_out = cells is task.test
        ec.write_cells(cells, folder / f"{'held_out_' if held_out else ''}{study}.h5ad")


def main() -> None:
    """Run what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", action="append", default=[], metavar="NAME=DIR", help="pretrained model; repeatable")
    parser.add_argument("--variants", nargs="*", default=["scratch", *VARIANTS], choices=["scratch", *VARIANTS])
    parser.add_argument("--methods", nargs="*", default=None, help="other methods; all that are installed if not given")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--species", action="store_true", help="the pancreas across species in place of the lung")
    parser.add_argument("--write", type=Path, metavar="FOLDER", help="write the lung studies as files, and stop")
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the studies, for --write")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--tables", action="store_true", help="print the table only")
    asked = parser.parse_args()
    if asked.write:
        write(asked.write, asked.data)
        return
    path: Path = asked.results
    if not asked.tables:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            path.write_text(",".join(COLUMNS) + "\n")
        done = set(pd.read_csv(path, dtype=str)[KEY].itertuples(index=False, name=None))
        bases = {one.split("=")[0]: ec.load(one.split("=", 1)[1]) for one in asked.base}
        methods = methods_of(bases, asked.variants, available() if asked.methods is None else asked.methods)
        for task_name, make in (SPECIES if asked.species else LUNG).items():
            task = make()
            for method, label in methods.items():
                for seed in asked.seeds[:1] if method in DETERMINISTIC else asked.seeds:
                    if (task_name, method, str(seed)) in done:
                        continue
                    row = {"task": task_name, "method": method, "seed": seed} | row_of(task, label, seed)
                    with path.open("a", newline="") as file:
                        csv.DictWriter(file, COLUMNS).writerow(row | {"commit": _commit()})
                    print(*row.values(), file=sys.stderr, flush=True)
    rows = pd.read_csv(path)
    rows = rows[rows["task"].isin(SPECIES if asked.species else LUNG)]
    figures = ["accuracy", "macro_f1", "major_accuracy", "major_macro_f1"]
    means = rows.groupby(["task", "method"], sort=False)[figures].mean().round(3)
    means["sd of accuracy"] = rows.groupby(["task", "method"], sort=False)["accuracy"].std().round(4)
    means["seeds"] = rows.groupby(["task", "method"], sort=False)["seed"].nunique()
    print(means.sort_values(["task", "major_accuracy"], ascending=[True, False]).to_string())


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()

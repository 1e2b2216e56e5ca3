"""What pretraining is worth: the tasks of `cross_study.py` with few and with all labelled cells, into one CSV file.

    bash runs/pretrain.sh --without-tasks DIR
    python benchmarks/transfer.py --base DIR --cells 30 0 --seeds 0 1 2

The pretrained model must have seen no cell of a task, and not the labels of those that are to be few:
`runs/pretrain.sh --without-tasks` leaves out every study that a task trains on or labels. Of each training study so
many cells a type are drawn (0: all of them), the same ones for every method of a seed. Methods: `scratch`, evercell
without pretraining; `all`, `last` and `head`, from the base with that much of it trained (by default `train` takes
`head` for fewer than 50 cells a type, else `all`); and those of `baselines.py`. Tasks with the same training cells
share a model.

Scores are those of `cross_study.py`; in a mean a family counts once. A row that is in the file is not run again.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import hashlib
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from baselines import BASELINES, DETERMINISTIC, Prediction
from cross_study import _commit, score
from tasks import TASKS

import evercell as ec
from evercell.finetuning import settings_for

if TYPE_CHECKING:
    import anndata as ad

RESULTS = Path(__file__).resolve().parent / "results" / "transfer.csv"
KEY = ["task", "method", "cells", "seed"]
FIGURES = ["accuracy", "macro_f1"]
COLUMNS = [*KEY, "family", "n_train", *FIGURES, "seconds_train", "base", "commit", "date"]
DEPTHS = ("all", "last", "head")
METHODS = ("scratch", *DEPTHS, *BASELINES)


def drawn(cells: ad.AnnData, most: int, seed: int) -> ad.AnnData:
    """At most so many cells of each type (0: all), drawn at random."""
    if not most:
        return cells
    rng = np.random.default_rng(seed)
    labels = cells.obs["label"].astype(str).to_numpy()
    rows = [
        rng.choice(of, min(most, len(of)), replace=False)
        for of in (np.flatnonzero(labels == one) for one in np.unique(labels))
    ]
    return cells[np.sort(np.concatenate(rows))].copy()


def evercell(
    method: str, base: ec.Annotator | None, models: dict[str, Any], **changes: Any
) -> Callable[..., Prediction]:
    """Method that trains evercell, from nothing or from `base`, and labels a query; `changes` are of its settings."""
    settings = replace(settings_for(None if method == "scratch" else base), sealed=0, **changes)
    if method in DEPTHS:
        settings = replace(settings, finetune=method)

    def label(train: Sequence[ad.AnnData], test: ad.AnnData, seed: int) -> Prediction:
        named = [(str(one.obs["study"].iloc[0]), list(one.obs_names)) for one in train]
        key = hashlib.sha256(repr((method, seed, named)).encode()).hexdigest()
        if key not in models:
            models.clear()  # tasks with the same training cells follow each other
            start = time.perf_counter()
            model = ec.train(
                list(train),
                "label",
                groups="group",
                base=None if method == "scratch" else base,
                settings=settings,
                seed=seed,
                shown=False,
            )
            models[key] = model, time.perf_counter() - start
        model, seconds = models[key]
        return annotated(model, test, seconds)

    return label


def annotated(model: ec.Annotator, test: ad.AnnData, seconds: float = 0.0) -> Prediction:
    """The best label of every cell."""
    start = time.perf_counter()
    result = ec.annotate(model, test, shown=False)
    return Prediction(
        labels=np.asarray(result.best_labels, dtype=object),
        confidence=result.obs["evercell_confidence"].to_numpy(),
        seconds_train=seconds,
        seconds_annotate=time.perf_counter() - start,
        rejected=(result.obs["evercell"].astype(str) == "Unknown").to_numpy(),
    )


def ordered(names: Sequence[str]) -> list[str]:
    """Tasks with the same training cells one after the other."""
    return sorted(names, key=lambda name: (name.split("/")[0] not in ("pancreas-2", "pancreas-3", "pancreas-4"), name))


def table(rows: pd.DataFrame) -> str:
    """Means over families by number of cells and method, and what pretraining adds to each task."""
    families = rows.groupby(["cells", "method", "family", "task"])[FIGURES].mean().groupby(level=[0, 1, 2]).mean()
    parts = []
    for cells, part in families.groupby(level=0):
        of_all = part["accuracy"].unstack("method").dropna().index  # noqa: PD010
        shared = part[part.index.isin(of_all.get_level_values("family"), level="family")]
        means = shared.groupby("method").mean().sort_values("accuracy", ascending=False).round(3)
        parts.append(f"{cells or 'all'} cells a type, mean over {len(of_all)} families:\n{means.to_string()}")
    tasks = rows.groupby(["task", "cells", "method"])[FIGURES].mean().unstack("method")  # noqa: PD010
    return "\n\n".join([tasks.round(3).to_string(), *parts])


def main() -> None:
    """Run what is missing, then print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, help="directory of the pretrained model")
    parser.add_argument("--tasks", nargs="+", default=[""], metavar="PREFIX")
    parser.add_argument("--methods", nargs="+", default=["scratch", "all", "head", "linear"], choices=METHODS)
    parser.add_argument("--cells", nargs="+", type=int, default=[30, 0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--tables", action="store_true", help="print the tables only")
    asked = parser.parse_args()
    path: Path = asked.results
    if not asked.tables:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            path.write_text(",".join(COLUMNS) + "\n")
        base = ec.load(asked.base) if asked.base else None
        if base is None and set(asked.methods) & set(DEPTHS):
            parser.error("name the pretrained model with --base")
        run(asked, base)
    rows = pd.read_csv(path)
    print(table(rows[rows["seed"].isin(asked.seeds)]))


def run(asked: argparse.Namespace, base: ec.Annotator | None) -> None:
    """Append the rows that are missing."""
    done = set(pd.read_csv(asked.results, dtype=str)[KEY].itertuples(index=False, name=None))
    names = [name for name in ordered(list(TASKS)) if name.startswith(tuple(asked.tasks))]
    facts = {
        "base": base.fingerprint[:12] if base is not None else "",
        "commit": _commit(),
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
    }
    for seed in asked.seeds:
        for cells in asked.cells:
            for method in asked.methods:
                models: dict[str, Any] = {}
                label = BASELINES[method] if method in BASELINES else evercell(method, base, models)
                for name in names:
                    again = seed != asked.seeds[0] and method in DETERMINISTIC and cells == 0
                    if (name, method, str(cells), str(seed)) in done or again:
                        continue
                    row = scored(name, method, label, cells, seed) | facts
                    with asked.results.open("a", newline="") as file:
                        csv.DictWriter(file, COLUMNS).writerow(row)
                    print(name, method, cells, seed, row["accuracy"], row["macro_f1"], file=sys.stderr, flush=True)


def scored(name: str, method: str, label: Callable[..., Prediction], cells: int, seed: int) -> dict[str, Any]:
    """One row."""
    task = TASKS[name]()
    train = [drawn(one, cells, seed) for one in task.train]
    test = task.test.copy()
    truth = test.obs["label"].astype(str).to_numpy()
    test.obs = test.obs[["study", "group"]]  # no label reaches a method
    prediction = label(train, test, seed)
    figures = score(truth, task.comparable(prediction.labels), task.known, prediction)
    return {
        "task": name,
        "method": method,
        "cells": cells,
        "seed": seed,
        "family": task.family,
        "n_train": sum(one.n_obs for one in train),
        **{figure: round(figures[figure], 4) for figure in FIGURES},
        "seconds_train": round(prediction.seconds_train, 1),
    }


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()

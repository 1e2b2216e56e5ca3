"""What label sets, thresholds of unknown cells and false-discovery rates hold on cells that no training has seen.

    MODELS=models python benchmarks/guarantees.py                   models trained on the tasks' studies
    python benchmarks/guarantees.py --annotators                    the models that come with evercell

Three kinds of queries, by how far they are from what a model was calibrated on: `random` cells of the same donors,
whole `donor`s of the same study, and whole other `study`s (the tasks of `cross_study.py`, whose models are shared by
way of the folder `MODELS`; the packaged annotators on their test studies). Over cells of known types:

- `covered_5`, `covered_10`: cells whose type is in their set at a rate of errors of 5 and 10 %; `worst_10`: of the type
  with ten cells or more that is covered least; `size_10`: types in a set; `single_10`: sets of one type.
- `parent_right_10`: cells whose `evercell_lineage` is their type or above it in the Cell Ontology, of those with a
  term.
- `rejected_known`, `rejected_unknown`: cells called Unknown at the default threshold.
- `false_discoveries`, `found`: of the cells with a q-value of at most 0.1, those of known types; of the cells of
  unknown types, those among them. Unknown cells are thinned to a tenth of a query at most (`--seeds` draws them).

A name at the level of the query counts as covered if any member of the set is brought to it by the task's table.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
from annotators import QUERIES, SHIPPED
from cross_study import _commit, evercell_model
from tasks import BARON, DATA, PBMC4K, TASKS, Study, Task, take

import evercell as ec
from evercell.label_sets import SEPARATOR
from evercell.ontology import find, is_a

RESULTS = Path(__file__).resolve().parent / "results" / "guarantees.csv"
MIN_CELLS = 10
SHARE_UNKNOWN = 0.1
KEY = ["kind", "query", "seed"]
FIGURES = [
    *("covered_5", "covered_10", "worst_10", "size_10", "single_10", "parent_right_10"),
    *("accuracy", "rejected_known", "rejected_unknown", "discoveries", "false_discoveries", "found"),
]
COLUMNS = [*KEY, "model", "n_known", "n_unknown", *FIGURES, "commit"]
DONORS = ("pancreas-1", "lung-2")


def randomly_split(study: Study, seed: int) -> Task:
    """Seven tenths of the cells of a study to train on, the others to test on, whatever their donors."""
    cells = take(study, DATA)
    order = np.random.default_rng(seed).permutation(cells.n_obs)
    cut = int(0.7 * len(order))
    train, test = cells[np.sort(order[:cut])].copy(), cells[np.sort(order[cut:])].copy()
    known = test.obs["label"].isin(train.obs["label"].unique()).to_numpy()
    return Task(f"random/{study.file}", [train], test, "human", known)


def figures(model: ec.Annotator, query: ad.AnnData, coarsen: Callable[[str], str], seed: int) -> dict[str, float]:
    """Figures of a model on a query, whose types are in ``obs["label"]``."""
    truth = query.obs["label"].astype(str).to_numpy()
    known = np.isin(truth, [*model.types.names, *map(coarsen, model.types.names)])
    result = ec.annotate(model, query, sets=0.1, shown=False)
    narrow = ec.annotate(model, query, sets=0.05, shown=False)
    members, covered = {}, {}
    for name, obs in (("10", result.obs), ("5", narrow.obs)):
        members[name] = [str(one).split(SEPARATOR) for one in obs["evercell_set"]]
        told = zip(truth, members[name], strict=True)
        covered[name] = np.array([label in {*one, *map(coarsen, one)} for label, one in told])
    best = np.array([coarsen(str(one)) for one in result.best_labels])
    unknown = result.obs["evercell"].astype(str).to_numpy() == "Unknown"
    size = np.array([len(one) for one in members["10"]])
    types, numbers = np.unique(truth[known], return_counts=True)
    found = {
        "n_known": int(known.sum()),
        "n_unknown": int((~known).sum()),
        "covered_5": covered["5"][known].mean(),
        "covered_10": covered["10"][known].mean(),
        "worst_10": min(covered["10"][truth == one].mean() for one in types[numbers >= MIN_CELLS]),
        "size_10": size[known].mean(),
        "single_10": (size[known] == 1).mean(),
        "parent_right_10": _parents_right(result.obs, truth, known),
        "accuracy": (best == truth)[known].mean(),
        "rejected_known": unknown[known].mean(),
        "rejected_unknown": unknown[~known].mean() if not known.all() else np.nan,
    }
    return found | discoveries(model, query, known, seed)


def _parents_right(obs: pd.DataFrame, truth: np.ndarray, known: np.ndarray) -> float:
    terms = {label: find(label) for label in set(truth)}
    right = []
    for label, lineage, one in zip(truth, obs["evercell_lineage_ontology_term_id"].astype(str), known, strict=True):
        term = terms[label]
        if one and term is not None and lineage:
            right.append(is_a(term.id, lineage))
    return float(np.mean(right)) if right else np.nan


def discoveries(model: ec.Annotator, query: ad.AnnData, known: np.ndarray, seed: int) -> dict[str, float]:
    """Cells called unknown at a false-discovery rate of 0.1, among known cells and a few unknown ones."""
    rng = np.random.default_rng(seed)
    n_unknown = min(int((~known).sum()), int(SHARE_UNKNOWN / (1 - SHARE_UNKNOWN) * known.sum()))
    rows = np.concatenate([np.flatnonzero(known), rng.choice(np.flatnonzero(~known), n_unknown, replace=False)])
    q = ec.annotate(model, query[rows].copy(), unknown_q=True, shown=False).obs["evercell_unknown_q"].to_numpy()
    called = q <= 0.1
    false = called[: int(known.sum())].sum()
    return {
        "discoveries": float(called.sum()),
        "false_discoveries": float(false / max(called.sum(), 1)),
        "found": float(called[int(known.sum()) :].mean()) if n_unknown else np.nan,
    }


def cases(options: argparse.Namespace) -> Iterator[tuple[str, str, int, Callable[[], dict[str, Any]]]]:
    """Kind, name and seed of every query, and what measures it."""

    def of_task(make: Callable[[], Task], seed: int) -> dict[str, Any]:
        task = make()
        model, _ = evercell_model(task.train, seed)
        return {"model": "trained", **figures(model, task.test, lambda one: task.coarsen.get(one, one), seed)}

    def of_annotator(name: str, place: str, seed: int) -> dict[str, Any]:
        query = QUERIES[name][place]
        cells = take(query.study, DATA)
        return {"model": name, **figures(ec.load(SHIPPED / name), cells, lambda o: query.coarsen.get(o, o), seed)}

    for seed in options.seeds:
        if options.annotators:
            for name, queries in QUERIES.items():
                for place in queries:
                    yield "annotator", place, seed, partial(of_annotator, name, place, seed)
            continue
        for study in (BARON, PBMC4K):
            yield "random", f"random/{study.file}", seed, partial(of_task, partial(randomly_split, study, seed), seed)
        for name, make in TASKS.items():
            yield "donor" if name.startswith(DONORS) else "study", name, seed, partial(of_task, make, seed)


def table(rows: pd.DataFrame) -> str:
    """A line a query, then means over families and over kinds."""
    shown = rows.set_index(["kind", "query"])[["n_known", "n_unknown", *FIGURES]]
    family = rows["query"].str.rsplit("/", n=1).str[0].where(rows["kind"] == "study", rows["query"])
    families = rows.assign(family=family)
    means = families.groupby(["kind", "family"])[FIGURES].mean().groupby("kind").mean()
    return f"{shown.round(3).to_string()}\n\nmeans, a family counting once\n{means.round(3).to_string()}"


def main() -> int:
    """Run what is not in the file yet, then print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--annotators", action="store_true", help="the packaged models, on studies they have not seen")
    parser.add_argument("--queries", nargs="+", metavar="PREFIX", default=[""], help="names or beginnings of names")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    new = not options.out.is_file()
    done = set() if new else set(pd.read_csv(options.out)[KEY].itertuples(index=False, name=None))
    names = []
    with options.out.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if new:
            writer.writeheader()
        for kind, query, seed, measure in cases(options):
            if not query.startswith(tuple(options.queries)):
                continue
            names.append((kind, query, seed))
            if (kind, query, seed) in done:
                continue
            start = time.perf_counter()
            row = {"kind": kind, "query": query, "seed": seed, **measure(), "commit": _commit()}
            writer.writerow({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()})
            file.flush()
            print(f"{query} {seed}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    rows = pd.read_csv(options.out)
    print(table(rows[[tuple(one) in names for one in rows[KEY].itertuples(index=False)]]))
    return 0


if __name__ == "__main__":
    sys.exit(main())

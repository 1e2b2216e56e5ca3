"""Learn a stream of studies stage by stage, with every strategy, and keep every figure in one CSV file.

    python benchmarks/stream.py --streams pancreas --strategies canal replay analytic --seeds 0 1 2 --orders forward
    python benchmarks/stream.py --tables

Each (stream, order, seed, strategy) is a run: the first stage by `train`, which all strategies of a seed share, every
further one by `update` with the settings of the strategy. After every stage the model labels the part kept for test of
every stage and the unseen studies. `joint` gets all data sets of earlier stages again. Beside them stand, fitted once
on all training cells: `together` (evercell trained on all stages at once) and `linear` (logistic regression, over the
genes that the test part measured). A run that is in the file is not run again.

Accuracy and macro-F1 are over the cells of types that the model knows by then, with the best label of every cell:
rejection is off. Macro-F1 is over types with at least five test cells. `--force` of `update` is on, so that a strategy
is measured as it is; whether the gate would have let the stage through is a column, and the strategy `default` is
`canal` with the gate and its safer settings, as users have it. `canal-paper` is CANAL as it was published (`--preset
canal`: a Performer on the bins of 1,000 variable genes, its head, bank and rates) but for `PAPER_EPOCHS`, and without
the weights that it starts from, which are not to be had: so its backbone is trained in the first stage.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from streams import STREAMS, Part, Stream

import evercell as ec
from evercell.celltypes import CellTypes
from evercell.errors import GateError
from evercell.evaluation import stream_metrics
from evercell.genes import align
from evercell.linear import fit_linear
from evercell.presets import Preset, preset
from evercell.tokenizers import View
from evercell.training_cells import gather, read_studies, vocabulary_of
from evercell.updating import UpdateSettings

RESULTS = Path(__file__).resolve().parent / "results" / "stream.csv"
KEY = ["stream", "order", "seed", "strategy", "bank", "selection"]
COLUMNS = [
    *KEY,
    *("stage", "stage_name", "part", "part_name", "part_kind", "split_by"),
    *("cells", "accuracy", "macro_f1", "new_cells", "seconds", "made_with", "gate_holds", "threads", "commit", "date"),
]
LEAST_CELLS = 5
PAPER = "canal-paper"
PAPER_EPOCHS = 8
STRATEGIES = ("default", "canal", "replay", "analytic", "lwf", "ewc", "naive", "joint")
CEILINGS = ("together", "linear")


@dataclass(frozen=True)
class Run:
    """One run of the benchmark."""

    stream: str
    order: str
    seed: int
    strategy: str
    bank: int = 1000
    selection: str = "herding"

    @property
    def key(self) -> tuple[str, ...]:
        """As the rows of the file name it."""
        return tuple(str(getattr(self, name)) for name in KEY)


def score(stream: Stream, part: Part, labels: np.ndarray, known: Sequence[str]) -> dict[str, Any]:
    """Accuracy and macro-F1 over the cells of known types; NaN where there are none."""
    from sklearn.metrics import f1_score

    truth = stream.comparable(part.test.obs["label"].astype(str).to_numpy(), part.name)
    guess = stream.comparable(labels, part.name)
    scored = np.isin(truth, stream.comparable(known, part.name))
    truth, guess = truth[scored], guess[scored]
    if not len(truth):
        return {"cells": 0, "accuracy": np.nan, "macro_f1": np.nan}
    types, sizes = np.unique(truth, return_counts=True)
    counted = types[sizes >= LEAST_CELLS].tolist()
    f1 = f1_score(truth, guess, labels=counted, average="macro", zero_division=0) if counted else np.nan
    return {"cells": len(truth), "accuracy": float((truth == guess).mean()), "macro_f1": float(f1)}


def learnt(run: Run, models: Path) -> Iterator[dict[str, Any]]:
    """Rows of one run, stage by stage."""
    stream = STREAMS[run.stream]
    stages, unseen = stream.parts(run.order, run.seed)
    parts = [(part, "stage") for part in stages] + [(part, "unseen") for part in unseen]
    if run.strategy in CEILINGS:
        start = time.perf_counter()
        label, known = (_together if run.strategy == "together" else _linear)(stages, run.seed)
        seconds = time.perf_counter() - start
        for place, (part, kind) in enumerate(parts):
            facts = {"stage": len(stages) - 1, "stage_name": "all", "seconds": seconds, "made_with": run.strategy}
            yield _row(run, facts, place, part, kind) | score(stream, part, label(part), known)
        return
    model = None
    for number, stage in enumerate(stages):
        start = time.perf_counter()
        holds, made_with = "", "train"
        if model is None:
            model = _first(stage, run, models)
        else:
            try:
                model = _updated(model, stage, stages[:number], run)
                tries = model.ledger.stages[-1].facts["tries"]
                holds, made_with = tries[0]["holds"], tries[-1]["strategy"]
            except GateError:
                holds, made_with = False, "refused"
        seconds = time.perf_counter() - start
        for place, (part, kind) in enumerate(parts):
            facts = {"stage": number, "stage_name": stage.name, "new_cells": len(stage.train.obs_names)}
            facts |= {"seconds": seconds, "made_with": made_with, "gate_holds": holds}
            labels = ec.annotate(model, part.test, reject="off", shown=False).best_labels
            yield _row(run, facts, place, part, kind) | score(stream, part, labels, model.types.names)


def _row(run: Run, facts: dict[str, Any], place: int, part: Part, kind: str) -> dict[str, Any]:
    named = {"part": place, "part_name": part.name, "part_kind": kind, "split_by": part.split_by}
    return {name: getattr(run, name) for name in KEY} | named | facts


def _first(stage: Part, run: Run, models: Path) -> ec.Annotator:
    """The model of the first stage; runs of one stream, order and seed share it."""
    paper = run.strategy == PAPER
    kept = models / f"{run.stream}-{run.order}-{run.seed}{'-paper' if paper else ''}"
    if kept.is_dir():
        return ec.load(kept)
    settings = replace(_published(stage).model, finetune="all") if paper else None
    model = ec.train(
        stage.train, "label", groups="group", settings=settings, seed=run.seed, names=[stage.name], shown=False
    )
    kept.parent.mkdir(parents=True, exist_ok=True)
    ec.save(model, kept)
    return model


def _published(stage: Part) -> Preset:
    canal = preset("canal")
    fewer = replace(canal.model.training, evaluations=PAPER_EPOCHS)
    parts = {part: replace(getattr(canal, part), training=fewer) for part in ("model", "update")}
    return replace(canal, epochs=PAPER_EPOCHS, **parts).over(stage.train.n_obs)


def _updated(model: ec.Annotator, stage: Part, earlier: Sequence[Part], run: Run) -> ec.Annotator:
    labels = stage.train.obs["label"].astype(str).unique()
    settings = _published(stage).update if run.strategy == PAPER else UpdateSettings(selection=run.selection)
    return ec.update(
        model,
        stage.train,
        "label",
        groups="group",
        strategy="canal" if run.strategy in ("default", PAPER) else run.strategy,
        mapping={name: name for name in labels},
        joint_with=[part.train for part in earlier] if run.strategy == "joint" else None,
        bank_size=run.bank,
        settings=settings,
        seed=run.seed,
        force=run.strategy != "default",
        names=[stage.name],
        shown=False,
    )


def _together(stages: Sequence[Part], seed: int) -> tuple[Any, Sequence[str]]:
    """evercell trained on the training cells of all stages at once; no cells are sealed, as no update follows."""
    cells = [part.train for part in stages]
    settings = ec.ModelSettings(sealed=0)
    model = ec.train(cells, "label", groups="group", settings=settings, seed=seed, shown=False)
    return lambda part: ec.annotate(model, part.test, reject="off", shown=False).best_labels, model.types.names


def _linear(stages: Sequence[Part], seed: int) -> tuple[Any, Sequence[str]]:
    """Logistic regression on the training cells of all stages, fitted over the genes that a test part measured."""
    studies = read_studies([part.train for part in stages], "label", names=[p.name for p in stages], least_types=1)
    types = CellTypes(tuple(sorted({name for study in studies for name in study.labels})))
    vocabulary = vocabulary_of(studies)
    cells = gather(studies, vocabulary, types)
    names = np.asarray(types.names, dtype=object)

    def label(part: Part) -> np.ndarray:
        alignment = align(part.test.var, vocabulary, name=part.name)
        columns = np.flatnonzero(alignment.measured)
        seen = cells.over_genes(columns)
        kept = np.flatnonzero(seen.counts.getnnz(axis=1))
        model = fit_linear(seen.counts[kept], seen.codes[kept], n_types=len(types), max_cells=20_000, seed=seed)
        counts = alignment.apply(part.test.X)[:, columns].tocsr()
        return names[model.log_proba(View.whole(counts)).argmax(axis=1)]

    return label, types.names


def table(rows: pd.DataFrame) -> pd.DataFrame:
    """Figures of every strategy: means over seeds and orders of each stream, as `stream_metrics` defines them."""
    found = []
    for key, run in rows.groupby(KEY, sort=False):
        facts = dict(zip(KEY, key, strict=True))
        last = run["stage"].max()
        final = run[run["stage"] == last]
        learnt_parts = final[final["part_kind"] == "stage"]
        if not (run["stage"] == 0).any():  # a ceiling: no stages
            unseen = final[final["part_kind"] == "unseen"]["accuracy"].mean()
            figures = {"final_mean_accuracy": learnt_parts["accuracy"].mean(), "unseen_mean_accuracy": unseen}
        else:
            matrix = run.pivot_table(index="stage", columns="part", values="accuracy", dropna=False).to_numpy()
            figures = stream_metrics(matrix)
        updates = run[run["stage"] > 0].drop_duplicates("stage")
        found.append(
            facts
            | figures
            | {
                "macro_f1": learnt_parts["macro_f1"].mean(),
                "seconds": updates["seconds"].mean(),
                "held": updates["gate_holds"].astype(str).eq("True").mean(),
            }
        )
    return pd.DataFrame(found)


def _print_tables(path: Path) -> None:
    figures = table(pd.read_csv(path))
    pd.set_option("display.width", 200, "display.max_rows", 500)
    shown = ["final_mean_accuracy", "macro_f1", "forgetting", "backward_transfer", "forward_transfer"]
    shown += ["unseen_mean_accuracy", "seconds", "held"]
    means = figures.groupby(["stream", "order", "strategy", "bank", "selection"], sort=False)[shown].mean()
    print(means.round(4).to_string())
    plain = figures[figures["bank"] == 1000]
    named = plain.assign(name=plain["strategy"] + " (" + plain["selection"] + ")")
    by_stream = named.groupby(["stream", "name"], sort=False)[shown].mean()
    n_streams = by_stream.groupby("name").size()
    print(f"\nmean over streams, of what was run on all {n_streams.max()}")
    means = by_stream.groupby("name").mean()
    print(means[n_streams == n_streams.max()].round(4).to_string())


def _runs(arguments: argparse.Namespace) -> list[Run]:
    return [
        Run(stream, order, seed, strategy, bank, selection)
        for seed in arguments.seeds
        for order in arguments.orders
        for stream in arguments.streams
        for strategy in arguments.strategies
        for bank in arguments.banks
        for selection in arguments.selections
    ]


def main() -> None:
    """Run what is missing, then print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", nargs="+", default=list(STREAMS), choices=list(STREAMS))
    parser.add_argument("--strategies", nargs="+", default=[*STRATEGIES, PAPER, *CEILINGS])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--orders", nargs="+", default=["forward"], choices=["forward", "reversed"])
    parser.add_argument("--banks", nargs="+", type=int, default=[1000])
    parser.add_argument("--selections", nargs="+", default=["herding"])
    parser.add_argument("--models", type=Path, default=Path(tempfile.gettempdir()) / "evercell-stream-models")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--tables", action="store_true", help="print the tables only")
    arguments = parser.parse_args()
    path: Path = arguments.results
    if not arguments.tables:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            path.write_text(",".join(COLUMNS) + "\n")
        done = set(pd.read_csv(path, dtype=str)[KEY].itertuples(index=False, name=None))
        commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], check=False, capture_output=True, text=True
        ).stdout.strip()
        shared = {
            "threads": os.environ.get("OMP_NUM_THREADS", os.cpu_count()),
            "commit": commit,
            "date": datetime.date.today().isoformat(),
        }
        for run in _runs(arguments):
            if run.key in done:
                continue
            start = time.perf_counter()
            rows = [shared | row for row in learnt(run, arguments.models)]
            with path.open("a", newline="") as file:
                csv.DictWriter(file, COLUMNS, restval="").writerows(rows)
            last = [row["accuracy"] for row in rows if row["part_kind"] == "stage"][-len(STREAMS[run.stream].stages) :]
            final = " ".join(f"{one:.3f}" for one in last)
            print(*run.key, f"{time.perf_counter() - start:.0f} s", final, file=sys.stderr, flush=True)
    _print_tables(path)


if __name__ == "__main__":
    main()

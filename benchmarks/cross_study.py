"""Annotate one study from others, with evercell and with other methods, and keep every figure in one CSV file.

    python benchmarks/cross_study.py --methods evercell linear --tasks immune pancreas-1 --seeds 0 1 2

Each (task, method, seed) runs in a process of its own, so that its peak memory is its own, and appends its row at once:
a run that is interrupted goes on where it stopped. `--dev` takes the tasks built from training studies, the only ones
to tune on.

How a row is scored. Accuracy, balanced accuracy and macro-F1 are over the test cells of types that the training studies
know, with the method's best label of every cell: rejection is off. Macro-F1 and balanced accuracy are over types with
at least ten test cells. Where a method rejects, `rejected_unknown` and `rejected_known` are the shares of cells of
unknown and known types that it rejects; `unknown_auroc` ranks unknown above known cells by the method's score, or by 1
- confidence. Predictions are brought to the level of the test labels by the task's table. In a mean over tasks a family
(`pancreas-3/...`) counts once.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import os
import platform
import resource
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from baselines import BASELINES, DETERMINISTIC, Method, Prediction
from tasks import DEV_TASKS, TASKS

from evercell.comparison import METHODS as COMPARED

if TYPE_CHECKING:
    from collections.abc import Sequence

    import anndata as ad

RESULTS = Path(__file__).resolve().parent / "results" / "cross_study.csv"
MIN_CELLS = 10
KEY = ["task", "method", "seed"]
COLUMNS = [
    *KEY,
    *("family", "n_train", "n_test", "n_unknown", "n_types"),
    *("accuracy", "balanced_accuracy", "macro_f1", "rejected_unknown", "rejected_known", "unknown_auroc"),
    *("seconds_train", "seconds_annotate", "peak_mb", "threads", "commit", "date", "machine", "package"),
]
# The distribution behind each method, for the version column.
PACKAGES = {"evercell": "evercell", **{name: COMPARED[name].needs[0] for name in BASELINES}}


def evercell_model(train: Sequence[ad.AnnData], seed: int = 0) -> tuple[Any, float]:
    """A model of evercell, trained from the studies as they are, and the seconds that took.

    Tasks with the same training cells share one model a seed, kept in the folder `MODELS` of the environment where that
    is set; the seconds of its training are kept beside it.
    """
    import hashlib
    import json
    import time

    import evercell

    described = [(str(cells.obs["study"].iloc[0]), cells.shape, sorted(cells.obs["group"].unique())) for cells in train]
    described += [sorted(cells.obs["label"].unique()) for cells in train]
    key = hashlib.sha256(repr((described, seed)).encode()).hexdigest()[:16]
    kept = Path(os.environ["MODELS"]) / key if "MODELS" in os.environ else None
    if kept is not None and kept.is_dir():
        model = evercell.load(kept)
        trained = json.loads(kept.with_suffix(".json").read_text())
    else:
        start = time.perf_counter()
        # No update follows, so no labelled cells are sealed for one: all train the model, as they do the other methods.
        settings = evercell.ModelSettings(sealed=0)
        model = evercell.train(list(train), labels="label", groups="group", settings=settings, seed=seed, shown=False)
        trained = time.perf_counter() - start
        if kept is not None:
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.with_suffix(".json").write_text(json.dumps(trained))
            evercell.save(model, kept)
    return model, trained


def evercell_method(train: Sequence[ad.AnnData], test: ad.AnnData, seed: int = 0) -> Prediction:
    """evercell; the best label of every cell is scored, rejected or not."""
    import time

    import evercell

    model, trained = evercell_model(train, seed)
    start = time.perf_counter()
    result = evercell.annotate(model, test, shown=False)
    annotated = time.perf_counter() - start
    return Prediction(
        labels=np.asarray(result.best_labels, dtype=object),
        confidence=result.obs["evercell_confidence"].to_numpy(),
        seconds_train=trained,
        seconds_annotate=annotated,
        rejected=(result.obs["evercell"].astype(str) == "Unknown").to_numpy(),
        unknown_score=result.obs["evercell_unknown_score"].to_numpy(),
    )


METHODS: dict[str, Method] = {"evercell": evercell_method, **BASELINES}


def score(
    truth: np.ndarray, labels: np.ndarray, known: np.ndarray, prediction: Prediction, min_cells: int = MIN_CELLS
) -> dict[str, float]:
    """Figures of one run; see the module's head for what each counts.

    Parameters
    ----------
    truth, labels
        True labels and predicted labels at the level of the true ones (n_cells,).
    known
        Mask of the cells whose type the training studies know (n_cells,).
    """
    from sklearn.metrics import f1_score, recall_score, roc_auc_score

    y, guess = truth[known], labels[known]
    types, sizes = np.unique(y, return_counts=True)
    scored = types[sizes >= min_cells].tolist()
    figures = {
        "n_types": len(scored),
        "accuracy": float((y == guess).mean()),
        "balanced_accuracy": float(recall_score(y, guess, labels=scored, average="macro", zero_division=0)),
        "macro_f1": float(f1_score(y, guess, labels=scored, average="macro", zero_division=0)),
        "rejected_unknown": np.nan,
        "rejected_known": np.nan,
        "unknown_auroc": np.nan,
    }
    if prediction.rejected is not None:
        figures["rejected_known"] = float(prediction.rejected[known].mean())
        if not known.all():
            figures["rejected_unknown"] = float(prediction.rejected[~known].mean())
    if not known.all():
        unsure = 1 - prediction.confidence if prediction.unknown_score is None else prediction.unknown_score
        figures["unknown_auroc"] = float(roc_auc_score(~known, unsure))
    return figures


def run_one(task_name: str, method: str, seed: int, out: Path) -> None:
    """Run one method on one task in this process and append its row."""
    task = {**TASKS, **DEV_TASKS}[task_name]()
    test = task.test.copy()
    truth = test.obs["label"].astype(str).to_numpy()
    test.obs = test.obs[["study", "group"]]  # no label reaches a method
    prediction = METHODS[method](task.train, test, seed)
    figures = score(truth, task.comparable(prediction.labels), task.known, prediction)
    row: dict[str, Any] = {
        "task": task_name,
        "method": method,
        "seed": seed,
        "family": task.family,
        "n_train": sum(cells.n_obs for cells in task.train),
        "n_test": test.n_obs,
        "n_unknown": int((~task.known).sum()),
        **{name: value if isinstance(value, int) else round(value, 4) for name, value in figures.items()},
        "seconds_train": round(prediction.seconds_train, 2),
        "seconds_annotate": round(prediction.seconds_annotate, 2),
        "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "threads": os.environ.get("OMP_NUM_THREADS", ""),
        "commit": _commit(),
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "machine": f"{platform.machine()} {_cpu()}".strip(),
        "package": f"{PACKAGES[method]} {metadata.version(PACKAGES[method])}",
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    new = not out.is_file()
    with out.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if new:
            writer.writeheader()
        writer.writerow(row)


def _commit() -> str:
    """Commit of the code, with a `+` where the package's own files differ from it."""
    root = Path(__file__).resolve().parents[1]

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "src", "benchmarks/*.py") else "")


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")


def read_results(out: Path) -> pd.DataFrame:
    """Rows of the results file, the latest of each task, method and seed."""
    if not out.is_file():
        return pd.DataFrame(columns=COLUMNS)
    return pd.read_csv(out).drop_duplicates(KEY, keep="last")


def summary(rows: pd.DataFrame) -> str:
    """Tables of one results file: every task, the means over families, and the differences between methods."""
    figures = ["accuracy", "macro_f1", "balanced_accuracy", "rejected_unknown", "rejected_known", "unknown_auroc"]
    costs = ["seconds_train", "seconds_annotate", "peak_mb"]
    tasks = rows.groupby(["family", "task", "method"], sort=False)[figures + costs].mean()
    families = tasks.groupby(["family", "method"], sort=False).mean()
    # Only families that every method has run can be averaged side by side.
    complete = families["accuracy"].unstack("method").dropna().index  # noqa: PD010
    shared = families[families.index.get_level_values("family").isin(complete)]
    means = shared.groupby("method").mean().sort_values("accuracy", ascending=False)
    spread = rows.groupby(["task", "method"])["accuracy"].std().groupby("method").mean()
    means.insert(1, "sd_seeds", spread)
    parts = [
        tasks.droplevel("family").round(3).to_string(),
        f"Mean over {len(complete)} task families (a family counts once):\n{means.round(3).to_string()}",
    ]
    if len(means) > 1 and len(complete):
        first = "evercell" if "evercell" in means.index else str(means.index[0])
        parts.append(_differences(shared, first))
    return "\n\n".join(parts)


def _differences(families: pd.DataFrame, first: str) -> str:
    """Paired differences of `first` to each other method over families, the best other method on top."""
    lines = [f"{first} minus each other method, paired over families:"]
    accuracy = families["accuracy"].unstack("method")  # noqa: PD010
    macro_f1 = families["macro_f1"].unstack("method")  # noqa: PD010
    for other in accuracy.drop(columns=first).mean().sort_values(ascending=False).index:
        gap, gap_f1 = accuracy[first] - accuracy[other], macro_f1[first] - macro_f1[other]
        error = gap.std() / np.sqrt(len(gap)) if len(gap) > 1 else np.nan
        lines.append(
            f"  {other:<12} accuracy {gap.mean():+.3f} (standard error {error:.3f}), better in {(gap > 0).sum()}"
            f" of {len(gap)}; macro-F1 {gap_f1.mean():+.3f}, better in {(gap_f1 > 0).sum()}"
        )
    return "\n".join(lines)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", metavar="PREFIX", default=[""], help="names or beginnings of names")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--dev", action="store_true", help="tasks from training studies only, for tuning")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--again", action="store_true", help="run what is in the file already, too; the new row counts")
    parser.add_argument("--threads", type=int, default=1, help="threads each run may use")
    parser.add_argument(
        "--models", type=Path, help="keep evercell's models here, for tasks with the same training cells"
    )
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    """Run what is asked for and not there yet, then print the tables. 1 where a run failed."""
    options = _arguments()
    if options.child:
        run_one(options.tasks[0], options.methods[0], options.seeds[0], options.out)
        return 0
    names = [name for name in (DEV_TASKS if options.dev else TASKS) if name.startswith(tuple(options.tasks))]
    done = set(read_results(options.out)[KEY].itertuples(index=False, name=None))
    threads = str(options.threads)
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": threads,
        "OPENBLAS_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        **({"MODELS": str(options.models)} if options.models else {}),
    }
    failed = []
    for method in options.methods:
        for seed in options.seeds[:1] if method in DETERMINISTIC else options.seeds:
            for name in names:
                if (name, method, seed) in done and not options.again:
                    continue
                command = [sys.executable, __file__, "--child", "--tasks", name, "--methods", method]
                command += ["--seeds", str(seed), "--out", str(options.out)]
                run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
                print(f"{name} {method} {seed}: {'done' if run.returncode == 0 else 'failed'}", flush=True)
                if run.returncode != 0:
                    failed.append((name, method, seed))
                    print(run.stderr[-2000:], file=sys.stderr, flush=True)
    rows = read_results(options.out)
    rows = rows[rows["task"].isin(names) & rows["method"].isin(options.methods) & rows["seed"].isin(options.seeds)]
    if len(rows):
        print(summary(rows))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

"""What each part of pretraining is worth: one thing changed at a time, few draws, then a head on 30 cells a type.

    python benchmarks/ablations.py --folder DIR --variants reference no-types latents-16
    python benchmarks/ablations.py --tables

Each variant is pretrained by `runs/pretrain.sh --without-tasks` with the same seed and number of draws, so that no
study of any task is seen, and all but `labelled-only` on unlabelled studies too; the model is kept in DIR, and an
interrupted run is taken up again. Then `transfer.py`'s tasks are labelled by a head on thirty labelled cells a type: by
the transformer `alone` or, with `--whole`, by the model that `transfer.py` trains with the method `head`, two thirds of
which, the linear member and the profiles of the types, are the same in all variants. Beside them `from-nothing` trains
the whole transformer on the thirty cells.

The tasks are test tasks: these figures say what helps, and choose no default.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import os
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
from cross_study import _commit
from tasks import DATA, TASKS
from transfer import FIGURES, evercell, ordered, scored
from transfer import RESULTS as TRANSFER

import evercell as ec

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "ablations.csv"
HELD_OUT = ("pbmc1k_v3_10x", "mca_stomach_intestine_small", "htan_breast_liver_met")  # of runs/pretrain.sh
FROM_NOTHING, HUMAN, LABELLED = "from-nothing", "human-only", "labelled-only"
VARIANTS: dict[str, tuple[str, ...]] = {
    FROM_NOTHING: (),
    "reference": (),
    "no-masked-expression": ("--weight", "masked=0"),
    "no-contrast": ("--weight", "contrast=0"),
    "no-types": ("--weight", "types=0"),
    "library-size": ("--backbone-setting", "library_size=1"),
    "tissues-alike": ("--tissue", "tissue"),
    "latents-16": ("--backbone-setting", "n_latents=16"),
    "latents-32": ("--backbone-setting", "n_latents=32"),
    "width-1x128": ("--backbone-setting", "members=1", "--backbone-setting", "member_width=128"),
    "width-3x128": ("--backbone-setting", "member_width=128"),
    "width-2x256": ("--backbone-setting", "members=2", "--backbone-setting", "member_width=256"),
    HUMAN: (),
    LABELLED: (),
}
KEY = ["variant", "task", "samples", "method"]
OF_PRETRAINING = ["type_accuracy", "masked_accuracy", "trivial_depth_accuracy"]
COLUMNS = [*KEY, "family", *FIGURES, *OF_PRETRAINING, "seconds_pretrain", "base", "commit", "date"]


def mixed(variant: str, folder: Path) -> Path:
    """Folder of the studies that a variant is pretrained on; those held out are in all of them."""
    if variant != HUMAN:
        return DATA
    for file in DATA.glob("*labelled/*/*.h5ad"):
        if file.parent.name == "human" or file.stem in HELD_OUT:
            link = folder / f"{variant}.data" / file.relative_to(DATA)
            link.parent.mkdir(parents=True, exist_ok=True)
            if not link.exists():
                link.symlink_to(file.resolve())
    return folder / f"{variant}.data"


def pretrained(variant: str, folder: Path, samples: int) -> tuple[Path, float]:
    """Model of a variant, and the processor seconds that making it took; one that is there is not made again."""
    output, note = folder / variant, folder / f"{variant}.seconds"
    if not output.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        before = os.times()
        script = [ROOT / "runs" / "pretrain.sh", "--without-tasks", *([] if variant == LABELLED else ["--unlabelled"])]
        subprocess.run(
            ["bash", *script, output, mixed(variant, folder), *VARIANTS[variant]],
            check=True,
            env={**os.environ, "SAMPLES": str(samples)},
        )
        after = os.times()
        spent = after.children_user + after.children_system - before.children_user - before.children_system
        note.write_text(f"{spent:.0f}")
    return output, float(note.read_text()) if note.is_file() else float("nan")


def run(variant: str, asked: argparse.Namespace) -> None:
    """Append the rows of a variant that are missing."""
    method = "whole" if asked.whole else "alone"
    done = set(pd.read_csv(asked.results, dtype=str)[KEY].itertuples(index=False, name=None))
    names = [
        name
        for name in ordered(list(TASKS))
        if name.startswith(tuple(asked.tasks)) and (variant, name, str(asked.samples), method) not in done
    ]
    if not names:
        return
    base, seconds, metrics = None, float("nan"), {}
    if variant != FROM_NOTHING:
        output, seconds = pretrained(variant, asked.folder, asked.samples)
        base = ec.load(output)
        metrics = base.ledger.stages[-1].facts["metrics"]
    training = "scratch" if base is None else "head"
    others = {} if asked.whole else {"linear": False, "profiles": False, "refit": False, "rejector": "confidence"}
    label = evercell(training, base, {}, **others)
    for name in names:
        found = scored(name, training, label, 30, 0)
        row = {
            **{"variant": variant, "task": name, "samples": asked.samples, "method": method},
            **{figure: found[figure] for figure in ("family", *FIGURES)},
            **{figure: round(metrics.get(figure, float("nan")), 4) for figure in OF_PRETRAINING},
            "seconds_pretrain": seconds,
            "base": base.fingerprint[:12] if base is not None else "",
            "commit": _commit(),
            "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        }
        with asked.results.open("a", newline="") as file:
            csv.DictWriter(file, COLUMNS).writerow(row)
        print(time.strftime("%T"), *(row[one] for one in (*KEY, *FIGURES)), file=sys.stderr, flush=True)


def table(rows: pd.DataFrame) -> str:
    """Means over families (a family counts once) of each variant, beside logistic regression of the same cells."""
    key = ["samples", "method", "variant"]
    families = rows.groupby([*key, "family"])[FIGURES].mean()
    means = families.groupby(level=[0, 1, 2]).mean().round(3)
    means["families"] = families.groupby(level=[0, 1, 2]).size()
    facts = rows.groupby(key)[[*OF_PRETRAINING, "seconds_pretrain"]].first()
    others = pd.read_csv(TRANSFER)
    others = others[(others["cells"] == 30) & (others["seed"] == 0) & others["method"].isin(["linear", "head"])]
    beside = others.groupby(["method", "family"])[FIGURES].mean().groupby(level=0).mean().round(3)
    by_family = families["accuracy"].unstack("family").round(3)  # noqa: PD010
    return "\n\n".join([means.join(facts).to_string(), "transfer.py:\n" + beside.to_string(), by_family.to_string()])


def main() -> None:
    """Run what is missing, then print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where pretrained models are kept")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS), metavar="NAME")
    parser.add_argument("--tasks", nargs="+", default=[""], metavar="PREFIX")
    parser.add_argument("--whole", action="store_true", help="with the linear member and the profiles of the types")
    parser.add_argument("--samples", type=int, default=48_000)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--tables", action="store_true", help="print the tables only")
    asked = parser.parse_args()
    if not asked.tables:
        if asked.folder is None:
            parser.error("name a folder for the models with --folder")
        if not asked.results.exists():
            asked.results.write_text(",".join(COLUMNS) + "\n")
        for variant in asked.variants:
            run(variant, asked)
    print(table(pd.read_csv(asked.results)))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()

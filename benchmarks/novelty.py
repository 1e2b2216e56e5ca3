"""Withhold cell types from training and see whether their cells are called unknown.

    python benchmarks/novelty.py --seeds 0 1 2                # the test families: each type withheld in turn
    python benchmarks/novelty.py --dev --seeds 0              # families of training studies only, the ones to tune on

Of each family (training studies, one query study) every type with at least ten query cells is withheld from training;
the query holds its cells and those of the types still known. On the `--dev` families two or three types that are told
from each other easily are withheld together, to spare models; each is scored alone, against the known cells.

One model a case serves every rejector: each is fitted on the training cells of the model and calibrated on its held-out
cells, as `train` does it. A row of the CSV is one case, type and rejector:

- `auroc`: unknown above known cells, by the score.
- `rate`: the rate of false rejections that the model chose at its training by leaving types out; so the threshold.
- `known_accuracy`: known cells with the right label, a rejected one counting as wrong; `unknown_accuracy`: unknown
  cells rejected; `h_score`: their harmonic mean; `false_rejection`: known cells rejected. `h_at_1`, `h_at_5`,
  `h_at_10`: the H-score at these rates in per cent; `h_best`: at the best threshold in hindsight, which no rule knows.
- `false_rejection_alone`, `unknown_accuracy_alone`: the same when the query holds only known or only unknown cells.

`linear` is one minus the best probability of logistic regression on the same training cells, fitted over the genes of
the query, its threshold from the same held-out cells at the rate of `combined`. `canal` is CANAL's own rule, which
judges cells by one another.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from tasks import BARON, INNATE_LIKE_T, PBMC4K, STELLATE, TASKS, TREG_IS_CD4, Study, Task, build

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from evercell.annotator import Annotator
    from evercell.rejection import Outputs, Rejector

RESULTS = Path(__file__).resolve().parent / "results" / "novelty.csv"
MIN_CELLS = 10
KEY = ["family", "withheld", "type", "rejector", "seed"]
FIGURES = [
    *("auroc", "rate", "h_score", "known_accuracy", "unknown_accuracy", "false_rejection"),
    *("h_at_1", "h_at_5", "h_at_10", "h_best", "false_rejection_alone", "unknown_accuracy_alone"),
]
COLUMNS = [*KEY, "n_known", "n_unknown", "best_label_accuracy", *FIGURES]

TEST: dict[str, Callable[[], Task]] = {
    "pancreas-2/tritschler": TASKS["pancreas-2/tritschler"],
    "pbmc4k-zheng": partial(build, "pbmc4k-zheng", [PBMC4K], Study("zheng_sorted_facs", TREG_IS_CD4)),
    "immune-4": TASKS["immune-4"],
    "pancreas-4": TASKS["pancreas-4"],
}
_FASOLINO = ([BARON, Study("muraro_pancreas")], Study("fasolino_pancreas"), STELLATE)
_FEW_GENES = Study("pbmc3k", genes=lambda cells: np.random.default_rng(0).random(cells.n_vars) < 0.3)
DEV: dict[str, tuple[Callable[[], Task], list[str]]] = {
    "pancreas-1": (TASKS["pancreas-1"], ["alpha+ductal+activated_stellate", "beta+gamma"]),
    "immune-2": (TASKS["immune-2"], ["b+cd8_t+dendritic", "nk+cd14_monocyte+megakaryocyte"]),
    "pbmc3k-pbmc4k": (
        partial(build, "pbmc3k-pbmc4k", [Study("pbmc3k")], PBMC4K),
        ["cd4_t+fcgr3a_monocyte+megakaryocyte", "nk+dendritic+b"],
    ),
    "lung-2/donor3": (TASKS["lung-2/donor3"], ["endothelial+ciliated+cd4_t", "fibroblast+macrophage+nk"]),
    "baron+muraro-fasolino": (
        partial(build, "baron+muraro-fasolino", *_FASOLINO),
        ["acinar+alpha+stellate", "endothelial+ductal+gamma"],
    ),
    # Training studies with other genes than each other, and a query with others again.
    "pbmc4k+liu-pbmc3k": (
        partial(build, "pbmc4k+liu-pbmc3k", [PBMC4K, Study("liu_covid_pbmc")], _FEW_GENES, INNATE_LIKE_T),
        ["cd14_monocyte+b", "nk+dendritic"],
    ),
}


def withheld_types(task: Task) -> list[str]:
    """Types, named as in the test study, with enough cells on both sides."""
    tested = task.test.obs["label"].astype(str).value_counts()
    trained = pd.Series(np.concatenate([_coarse(task, cells) for cells in task.train])).value_counts()
    return sorted(one for one in tested.index if min(tested[one], trained.get(one, 0)) >= MIN_CELLS)


def _coarse(task: Task, cells: Any) -> np.ndarray:
    return task.comparable(cells.obs["label"].astype(str))


@dataclass(frozen=True)
class Case:
    """A task without some of its types, and the model trained on the rest."""

    task: Task
    withheld: tuple[str, ...]
    seed: int

    def model(self, folder: Path | None) -> Annotator:
        """Trained as by default, on all cells but the held-out ones; kept in `folder` where one is given."""
        import evercell as ec

        name = repr((self.task.name, "+".join(self.withheld), self.seed)).encode()
        kept = None if folder is None else folder / hashlib.sha256(name).hexdigest()[:16]
        if kept is not None and kept.is_dir():
            return ec.load(kept)
        settings = ec.ModelSettings(sealed=0, refit=False)
        model = ec.train(self.studies(), "label", groups="group", settings=settings, seed=self.seed, shown=False)
        if kept is not None:
            kept.parent.mkdir(parents=True, exist_ok=True)
            ec.save(model, kept)
        return model

    def studies(self) -> list[Any]:
        """Training studies without the withheld types."""
        left = [cells[~np.isin(_coarse(self.task, cells), self.withheld)].copy() for cells in self.task.train]
        return [cells for cells in left if cells.n_obs]

    def parts(self, model: Annotator) -> tuple[Any, Any]:
        """Training and held-out cells of the model, as `train` split them."""
        from evercell.evaluation import split_cells
        from evercell.training_cells import gather, read_studies

        studies = read_studies(self.studies(), "label", groups="group", least_types=1)
        cells = gather(studies, model.vocabulary, model.types)
        split = split_cells(cells.codes, cells.groups, test_share=float(model.settings["held_out"]), seed=self.seed)
        return cells.taken(split.train), cells.taken(split.validation)


def rejectors_of(model: Annotator, training: Any, held_out: Any, seed: int) -> dict[str, Rejector]:
    """Every rejector, fitted and calibrated as `train` does it; the model is asked once."""
    from evercell.classification import calibrated_rejector, example_outputs
    from evercell.rejection import REJECTORS
    from evercell.tokenizers import View

    asked = example_outputs(model, training, seed)
    unseen = (model.outputs(View.whole(held_out.counts, held_out.measured_by_any)), held_out.codes)
    return {name: calibrated_rejector(REJECTORS[name], asked, unseen, seed=seed) for name in REJECTORS}


def judged(model: Annotator, rejectors: dict[str, Rejector], query: Any) -> Iterator[tuple[str, Rejector, Outputs]]:
    """Each rejector, and what the model says of the query; both fitted again where the query lacks genes."""
    from evercell.adaptation import LOST, familiar, fitted_to, lost_share
    from evercell.cells import find_counts
    from evercell.genes import align
    from evercell.tokenizers import View

    counts = find_counts(query)
    alignment = align(counts.genes, model.vocabulary)
    view = View.whole(alignment.apply(counts.to_csr()), alignment.measured)
    adapts = lost_share(model, alignment.measured) >= LOST and not familiar(model, alignment.measured)
    outputs = None
    for name, rejector in rejectors.items():
        asked = replace(model, rejector=rejector)
        if adapts:
            asked = fitted_to(asked, alignment.measured)
        outputs = asked.outputs(view) if outputs is None else outputs  # the same for every rejector
        assert asked.rejector is not None
        yield name, asked.rejector, outputs


def rows_of(case: Case, folder: Path | None) -> Iterator[dict[str, Any]]:
    """Rows of the results, for each type withheld and each rejector."""
    from evercell.linear import fit_linear
    from evercell.tokenizers import View

    model = case.model(folder)
    training, held_out = case.parts(model)
    names = np.asarray(model.types.names, dtype=object)
    truth = case.task.test.obs["label"].astype(str).to_numpy()
    known = np.isin(truth, [*names, *case.task.comparable(names)]) & ~np.isin(truth, case.withheld)
    kept = known | np.isin(truth, case.withheld)
    truth, known = truth[kept], known[kept]
    query = case.task.test[kept]
    rejectors = rejectors_of(model, training, held_out, case.seed)

    def rows(name: str, score: Any, threshold: Any, rate: float, right: np.ndarray, cells: np.ndarray) -> Any:
        for one in case.withheld:
            unknown = truth == one
            if unknown.sum() < MIN_CELLS:
                continue
            facts = {"family": case.task.name, "withheld": "+".join(case.withheld), "type": one, "rejector": name}
            facts |= {"seed": case.seed, "n_known": int(known.sum()), "n_unknown": int(unknown.sum())}
            facts |= {"best_label_accuracy": right[known].mean()}
            yield facts | figures(score, threshold, rate, right, cells[known], cells[unknown])

    outputs = None
    cells = np.arange(len(truth))
    for name, rejector, outputs in judged(model, rejectors, query):
        right = case.task.comparable(names[outputs.codes]) == truth
        among = partial(_scored, rejector, outputs)
        yield from rows(name, among, partial(_threshold, rejector, outputs), rejector.default_rate, right, cells)
    assert outputs is not None
    assert outputs.view is not None
    genes = np.flatnonzero(outputs.view.measured)  # of the query: the baseline is fitted for each
    shown = training.over_genes(genes)
    baseline = fit_linear(shown.counts, shown.codes, n_types=len(names), seed=case.seed)
    log_proba = baseline.log_proba(View.whole(outputs.view.counts[:, genes].tocsr()))
    unsure = 1 - np.exp(baseline.log_proba(View.whole(held_out.over_genes(genes).counts)).max(axis=1))
    score = 1 - np.exp(log_proba.max(axis=1))
    right = case.task.comparable(names[log_proba.argmax(axis=1)]) == truth
    rate = rejectors["combined"].default_rate

    def stored(_: np.ndarray, asked: float) -> float:
        return float(np.quantile(unsure, 1 - asked))

    yield from rows("linear", lambda some: score[some], stored, rate, right, cells)


def _scored(rejector: Rejector, outputs: Outputs, cells: np.ndarray) -> np.ndarray:
    return rejector.score(outputs.taken(cells))


def _threshold(rejector: Rejector, outputs: Outputs, cells: np.ndarray, rate: float) -> float:
    return rejector.threshold_among(outputs.taken(cells), rate)


def figures(
    score: Callable[[np.ndarray], np.ndarray],
    threshold: Callable[[np.ndarray, float], float],
    rate: float,
    right: np.ndarray,
    known: np.ndarray,
    unknown: np.ndarray,
) -> dict[str, float]:
    """Figures of one rejector on one query of known and unknown cells (row numbers); see the module's head.

    Parameters
    ----------
    score, threshold
        Score of some cells, and the threshold at a rate, among these cells.
    right
        Whether the best label of each cell is right.
    """
    from sklearn.metrics import roc_auc_score

    both = np.concatenate([known, unknown])
    is_unknown = np.arange(len(both)) >= len(known)
    scores = score(both)

    def h_score(limit: float) -> tuple[float, float, float]:
        rejected = scores > limit
        labelled = float((right[known] & ~rejected[~is_unknown]).mean())
        found = float(rejected[is_unknown].mean())
        return 2 * labelled * found / max(labelled + found, 1e-9), labelled, found

    limit = threshold(both, rate)
    h, labelled, found = h_score(limit)
    return {
        "auroc": float(roc_auc_score(is_unknown, scores)),
        "rate": rate,
        "h_score": h,
        "known_accuracy": labelled,
        "unknown_accuracy": found,
        "false_rejection": float((scores[~is_unknown] > limit).mean()),
        **{f"h_at_{percent}": h_score(threshold(both, percent / 100))[0] for percent in (1, 5, 10)},
        "h_best": max(h_score(one)[0] for one in np.quantile(scores, np.linspace(0, 1, 101))),
        "false_rejection_alone": float((score(known) > threshold(known, rate)).mean()),
        "unknown_accuracy_alone": float((score(unknown) > threshold(unknown, rate)).mean()),
    }


def table(rows: pd.DataFrame) -> str:
    """Means over the withheld types of each family, then over families, a line a rejector."""
    families = rows.groupby(["family", "rejector"], sort=False)[["best_label_accuracy", *FIGURES]].mean()
    means = families.groupby("rejector", sort=False).mean().sort_values("auroc", ascending=False)
    types = rows[rows["rejector"].isin(["combined", "linear"])]
    each = types.pivot_table(index=["family", "type"], columns="rejector", values=["auroc", "h_score"], sort=False)
    parts = [each, families, means]
    return "\n\n".join(part.round(3).to_string() for part in parts)


def main() -> int:
    """Run the cases that are not in the file yet, then print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", metavar="PREFIX", default=[""], help="names or beginnings of names")
    parser.add_argument("--dev", action="store_true", help="families of training studies only")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--models", type=Path, help="keep the models here, to compare rejectors without training again")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    new = not options.out.is_file()
    written = pd.DataFrame(columns=COLUMNS) if new else pd.read_csv(options.out)
    done = set(written[["family", "withheld", "seed"]].itertuples(index=False, name=None))
    names = [name for name in (DEV if options.dev else TEST) if name.startswith(tuple(options.families))]
    with options.out.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if new:
            writer.writeheader()
        for seed in options.seeds:
            for name in names:
                task = DEV[name][0]() if options.dev else TEST[name]()
                for withheld in DEV[name][1] if options.dev else withheld_types(task):
                    if (task.name, withheld, seed) in done:
                        continue
                    start = time.perf_counter()
                    for row in rows_of(Case(task, tuple(withheld.split("+")), seed), options.models):
                        writer.writerow({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()})
                    file.flush()
                    print(f"{name} {withheld} {seed}: {time.perf_counter() - start:.0f} s", flush=True)
    rows = pd.read_csv(options.out)
    rows = rows[rows["family"].isin(names) & rows["seed"].isin(options.seeds)]
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())

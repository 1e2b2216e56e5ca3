"""The annotators that evercell ships, on studies that none of them has seen, without a single label of these.

    python benchmarks/annotators.py                    measure what is missing, print the table
    python benchmarks/annotators.py --cards            write the figures into the models' cards

Beside each annotator stand, on the same training cells: `joint`, the same backbone trained on all its studies at once
(the ceiling of learning in stages), and `linear`, logistic regression fitted anew on the genes that the query measured.
Labels of a query are brought to major types by the tables here. Accuracy and macro-F1 (types with ten cells or more)
are over cells of types that the annotator knows, with the best label of every cell; `rejected_known` and
`rejected_unknown` are the shares of cells called Unknown at the default threshold; `major_accuracy` takes all T cells
for one type and all monocytes for one.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
from cross_study import _commit, score
from stream import _linear
from streams import Part
from tasks import (
    ALL_DENDRITIC,
    DATA,
    INNATE_LIKE_T,
    LUNG_DEVELOPMENT,
    MONOCYTE,
    MOUSE_LUNG_MACROPHAGE,
    MOUSE_PANCREAS,
    STELLATE,
    TREG_IS_CD4,
    Study,
    take,
)
from transfer import annotated

import evercell as ec
from evercell.finetuning import settings_for

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "runs"))
from make_models import MODELS

HERE = Path(__file__).resolve()
RESULTS = HERE.parent / "results" / "annotators.csv"
SHIPPED = HERE.parents[1] / "src" / "evercell" / "models"
KEY = ["annotator", "query", "method", "seed"]
FIGURES = ["accuracy", "macro_f1", "rejected_known", "rejected_unknown", "major_accuracy"]
COLUMNS = [*KEY, "cells", "n_unknown", *FIGURES, "confused", "seconds", "model", "commit"]

MAJOR = {
    **dict.fromkeys(["cd4_t", "cd8_t", "treg", "gdt", "mait"], "t"),
    **dict.fromkeys(["cd14_monocyte", "fcgr3a_monocyte"], "monocyte"),
}
"""T cells together and monocytes together: the level of `major_accuracy`."""
MAJOR_BLOOD = {**MONOCYTE, **INNATE_LIKE_T}
# Lavage is labelled broadly: T cells together, epithelium together.
MAJOR_LUNG = {
    **dict.fromkeys(["cd4_t", "cd8_t", "treg", "nkt"], "t"),
    **dict.fromkeys(
        ["ciliated", "club", "basal", "type_i_pneumocyte", "type_ii_pneumocyte", "malignant"], "epithelial"
    ),
    "monocyte": "macrophage",
}


@dataclass(frozen=True)
class Query:
    """A test study, and what brings predictions to its level."""

    study: Study
    coarsen: dict[str, str] = field(default_factory=dict)


QUERIES: dict[str, dict[str, Query]] = {
    "human-immune": {
        "zheng": Query(Study("zheng_sorted_facs", TREG_IS_CD4), INNATE_LIKE_T),
        "hao": Query(Study("hao_small_pbmc", TREG_IS_CD4), MAJOR_BLOOD),
        "symphony": Query(Study("symphony_pbmc_2tech", ALL_DENDRITIC), INNATE_LIKE_T),
        "ding drop-seq": Query(Study("ding_pbmc_drop_seq"), INNATE_LIKE_T),
        "ding in-drops": Query(Study("ding_pbmc_indrops"), INNATE_LIKE_T),
    },
    "human-pancreas": {
        "tritschler": Query(Study("tritschler_pancreas"), STELLATE),
        "panc8": Query(Study("panc8_small_5tech"), STELLATE),
        "xin": Query(Study("xin_delta_gamma_raw"), STELLATE),
        "baron mouse": Query(Study("baron_mouse_pancreas", MOUSE_PANCREAS)),
    },
    "human-lung": {"liao lavage": Query(Study("liao_balf_covid"), MAJOR_LUNG)},
    "mouse-lung": {
        "lung development": Query(Study("lung_development_atlas_subset", LUNG_DEVELOPMENT), MOUSE_LUNG_MACROPHAGE),
    },
}


def measured(name: str, folder: Path, method: str, seed: int) -> list[dict[str, Any]]:
    """Rows of one annotator by one method."""
    model = ec.load(folder / name)
    studies = {one.file.split("/")[1]: one.read(DATA / "labelled") for one in MODELS[name][1]}
    start = time.perf_counter()
    if method == "joint":
        base = ec.load(folder / "backbone")
        known = {gene: column for column, gene in enumerate(base.vocabulary.names)}
        base = base.over_genes(np.array([known[gene] for gene in model.vocabulary.names]))
        cells = list(studies.values())
        joint = ec.train(
            cells, "label", base=base, settings=replace(settings_for(base), sealed=0), seed=seed, shown=False
        )
    elif method == "linear":
        parts = [Part(study, _grouped(cells), cells[:0], "") for study, cells in studies.items()]
        label, _ = _linear(parts, seed)
    seconds = time.perf_counter() - start
    rows = []
    for place, query in QUERIES[name].items():
        test = take(query.study, DATA)
        truth = test.obs["label"].astype(str).to_numpy()
        types = {query.coarsen.get(one, one) for one in model.types.names}
        known_cells = np.isin(truth, list(types))
        if method == "linear":
            labels = label(Part(place, None, test, ""))
            figures = {}
        else:
            found = annotated(model if method == "annotator" else joint, test)
            labels, rejected = found.labels, found.rejected
            figures = {"rejected_known": rejected[known_cells].mean(), "rejected_unknown": np.nan}
            if not known_cells.all():
                figures["rejected_unknown"] = rejected[~known_cells].mean()
        guess = np.array([query.coarsen.get(str(one), str(one)) for one in labels], dtype=object)
        major = [np.array([MAJOR.get(one, one) for one in labels]) for labels in (truth, guess)]
        figures["major_accuracy"] = (major[0] == major[1])[known_cells].mean()
        figures |= {one: v for one, v in _scored(truth, guess, known_cells).items() if one in FIGURES[:2]}
        rows.append(
            {
                **dict(zip(KEY, (name, place, method, seed), strict=True)),
                "cells": len(truth),
                "n_unknown": int((~known_cells).sum()),
                **{one: round(float(v), 4) for one, v in figures.items()},
                "confused": confused(truth[known_cells], guess[known_cells]),
                "seconds": round(seconds, 1),
                "model": made_of(model, method),
                "commit": _commit(),
            }
        )
    return rows


def confused(truth: np.ndarray, guess: np.ndarray) -> str:
    """Types of ten cells or more of which a fifth or more get one other label, the largest share first."""
    found = []
    for one in np.unique(truth):
        labels, sizes = np.unique(guess[truth == one], return_counts=True)
        if sizes.sum() < 10:
            continue
        found += [
            (size / sizes.sum(), f"{size / sizes.sum():.0%} of {sizes.sum()} {one} as {label}")
            for label, size in zip(labels, sizes, strict=True)
            if label != one and size >= 0.2 * sizes.sum()
        ]
    return "; ".join(text for _, text in sorted(found, reverse=True))


def made_of(model: ec.Annotator, method: str) -> str:
    """What a row holds for: the annotator itself, the backbone over its genes, or these genes alone."""
    base = str(model.ledger.stages[0].facts["base"])
    return {"annotator": model.fingerprint, "joint": base, "linear": model.vocabulary.digest()}[method][:12]


def _grouped(cells: ad.AnnData) -> ad.AnnData:
    cells = cells.copy()
    cells.obs["group"] = "all"
    return cells


def _scored(truth: np.ndarray, guess: np.ndarray, known: np.ndarray) -> dict[str, float]:
    from baselines import Prediction

    return score(truth, guess, known, Prediction(guess, np.ones(len(guess)), 0.0, 0.0))


def table(rows: pd.DataFrame) -> str:
    """Figures of every query and method."""
    return rows.groupby(KEY[:3], sort=False)[["cells", "n_unknown", *FIGURES]].mean().round(3).to_string()


def write_cards(rows: pd.DataFrame, folder: Path) -> None:
    """Put the figures into the cards, in place of those that are there."""
    for name, of_model in rows.groupby("annotator", sort=False):
        path = folder / str(name) / "MODEL_CARD.md"
        text = path.read_text(encoding="utf-8").split("\n## On studies that it has never seen\n")[0].rstrip("\n")
        lines = [
            *("", "", "## On studies that it has never seen", ""),
            "`python benchmarks/annotators.py`. Accuracy / macro-F1 over cells of types that it knows, as finely as",
            "the study is labelled, best label of every cell; joint: trained on all its studies at once; linear:",
            "logistic regression on the query's genes. Then the share of cells called Unknown by default.",
            "",
            "| study | cells | annotator | T cells as one, monocytes as one | joint | linear | known called Unknown "
            "| others called Unknown |",
            "|---|---:|---:|---:|---:|---:|---:|---:|",
        ]
        for query, part in of_model.groupby("query", sort=False):
            by = part.groupby("method")[FIGURES].mean()
            cells = [
                f"{by.loc[one, 'accuracy']:.3f} / {by.loc[one, 'macro_f1']:.3f}" if one in by.index else "–"
                for one in ("annotator", "joint", "linear")
            ]
            cells.insert(1, f"{by.loc['annotator', 'major_accuracy']:.3f}")
            shares = [by.loc["annotator", one] for one in FIGURES[2:4]]
            shown = [f"{share:.0%}" if not np.isnan(share) else "–" for share in shares]
            lines.append(f"| {query} | {int(part['cells'].iloc[0]):,} | {' | '.join([*cells, *shown])} |")
        told = of_model[(of_model["method"] == "annotator") & of_model["confused"].notna()]
        wrong = [f"- {row.query}: {row.confused}." for row in told.drop_duplicates("query").itertuples()]
        if wrong:
            lines += [
                "",
                "Known failures: types of which a fifth or more of the cells get one other label.",
                "",
                *wrong,
            ]
        path.write_text(text + "\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    """Measure what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=SHIPPED, help="folder of models")
    parser.add_argument("--names", nargs="+", default=list(QUERIES), choices=list(QUERIES))
    parser.add_argument("--methods", nargs="+", default=["annotator", "joint", "linear"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--cards", action="store_true", help="write the figures into the cards of the models")
    asked = parser.parse_args()
    path: Path = asked.results
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        path.write_text(",".join(COLUMNS) + "\n")
    for name in asked.names:
        model, rows = ec.load(asked.models / name), pd.read_csv(path)
        done = set(rows[["annotator", "method", "seed", "model"]].itertuples(index=False, name=None))
        for method in asked.methods:
            for seed in asked.seeds:
                if (name, method, seed, made_of(model, method)) in done:
                    continue
                new = measured(name, asked.models, method, seed)
                with path.open("a", newline="") as file:
                    csv.DictWriter(file, COLUMNS, restval="").writerows(new)
    rows = pd.read_csv(path).drop_duplicates(KEY, keep="last")
    print(table(rows))
    if asked.cards:
        write_cards(rows, asked.models)


if __name__ == "__main__":
    main()

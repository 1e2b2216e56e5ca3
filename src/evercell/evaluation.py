"""How good labels are: figures of one annotation, figures of a stream of stages, and an honest split of the cells.

Pure functions of arrays. Nothing here reads files or knows of models.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import pandas as pd

from .errors import LabelsError, SettingsError
from .labels import is_unassigned, listed

__all__ = ["Evaluation", "Split", "evaluate", "expected_calibration_error", "split_cells", "stream_metrics"]


IN_WORDS = {
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "macro_f1": "macro-F1",
    "weighted_f1": "weighted F1",
    "ari": "adjusted Rand index",
    "nmi": "normalised mutual information",
    "ece": "calibration error",
    "known_accuracy": "accuracy on known cells",
    "known_macro_f1": "macro-F1 on known cells",
    "unknown_accuracy": "unknown cells called Unknown",
    "h_score": "H-score",
    "false_rejection": "known cells called Unknown",
}
"""What people call each figure."""


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Figures of an annotation against the truth; shares of cells run from 0 to 1. `evaluate` defines each.

    Attributes
    ----------
    n_cells
        Cells scored.
    accuracy, balanced_accuracy, macro_f1, weighted_f1, ari, nmi
        Over all scored cells.
    ece
        Expected calibration error; None without confidences.
    known_accuracy, known_macro_f1, false_rejection
        Over the cells of types that the model knows; None where there are none.
    unknown_accuracy, h_score
        None where no cell is of a type that the model does not know.
    per_type
        Type -> cells, precision, recall, f1.
    confusion
        (truth, predicted) counts of cells.
    """

    n_cells: int
    accuracy: float
    balanced_accuracy: float
    macro_f1: float
    weighted_f1: float
    ari: float
    nmi: float
    ece: float | None
    known_accuracy: float | None
    known_macro_f1: float | None
    unknown_accuracy: float | None
    h_score: float | None
    false_rejection: float | None
    per_type: pd.DataFrame
    confusion: pd.DataFrame

    def figures(self) -> dict[str, int | float | None]:
        """The figures that are single numbers, by name."""
        stored = {one.name: getattr(self, one.name) for one in fields(self)}
        return {name: value for name, value in stored.items() if not isinstance(value, pd.DataFrame)}

    def to_dict(self) -> dict[str, Any]:
        """All figures as JSON can hold them."""
        tables = {"per_type": self.per_type, "confusion": self.confusion}
        return {**self.figures(), **{name: table.to_dict(orient="index") for name, table in tables.items()}}

    def table(self) -> str:
        """Figures, then types, as text."""
        lines = [f"{'cells':<30}{self.n_cells:>10,}"]
        for name, value in self.figures().items():
            if name != "n_cells" and value is not None:
                lines.append(f"{IN_WORDS[name]:<30}{value:>10.4f}")
        width = max([len("type"), *(len(str(name)) for name in self.per_type.index)]) + 2
        lines += ["", f"{'type':<{width}}{'cells':>8}{'precision':>11}{'recall':>8}{'f1':>8}"]
        for one, row in self.per_type.iterrows():
            scores = f"{row['precision']:>11.3f}{row['recall']:>8.3f}{row['f1']:>8.3f}"
            lines.append(f"{one!s:<{width}}{int(row['cells']):>8,}{scores}")
        return "\n".join(lines)


def evaluate(
    truth: Sequence[Any] | np.ndarray | pd.Series,
    predicted: Sequence[Any] | np.ndarray | pd.Series,
    *,
    confidence: np.ndarray | None = None,
    known_types: Sequence[str] | None = None,
    unknown: str = "Unknown",
) -> Evaluation:
    """Score predicted labels against the truth.

    Cells without a true label (missing, empty, "unknown", "unassigned") are not scored. A cell whose true type is not
    one of `known_types` has `unknown` as its right answer. With ``t`` the right answers, ``p`` the predictions and the
    types ``c`` those that occur in ``t``:

    - accuracy = share of cells with p = t
    - recall_c = TP_c / (TP_c + FN_c), precision_c = TP_c / (TP_c + FP_c) (0 where never predicted)
    - F1_c = 2 precision_c recall_c / (precision_c + recall_c), 0 where both are 0
    - balanced accuracy = mean of recall_c;  macro F1 = mean of F1_c;  weighted F1 = sum of n_c F1_c / n
    - ARI, NMI (arithmetic mean) between t and p
    - known accuracy, known macro F1 = the same over the cells of known types only; a rejected cell counts as wrong
    - unknown accuracy = share of the cells of unknown types that were called `unknown`
    - H-score = 2 a u / (a + u), a the known and u the unknown accuracy (CANAL); 0 where both are 0
    - false rejection = share of the cells of known types that were called `unknown`
    - ECE over the scored cells that got a label, see `expected_calibration_error`

    A type that is only predicted adds no row of zeros to the macro figures: its cells already cost the recall of
    their own type. It has its column in the confusion table.

    Parameters
    ----------
    truth
        (cells,) true types.
    predicted
        (cells,) labels; a missing label counts as `unknown`.
    confidence
        (cells,) confidence in the predicted label, 0 to 1.
    known_types
        Types that the model knows; all types of the truth if None.
    unknown
        Label of rejected cells.

    Raises
    ------
    LabelsError
        Lengths differ, or no cell has a true label.
    SettingsError
        Confidences lie outside 0 to 1.
    """
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

    given, called = _as_objects(truth), _as_objects(predicted)
    if len(given) != len(called) or (confidence is not None and len(confidence) != len(given)):
        counts = [len(given), len(called)] + ([] if confidence is None else [len(confidence)])
        raise LabelsError(f"truth, predictions and confidences must have one entry a cell; found {counts} entries")
    scored = ~_without_label(given)
    if not scored.any():
        raise LabelsError("no cell has a true label, so nothing can be scored", hint="name the column of true types")
    t, p = _as_text(given[scored], unknown), _as_text(called[scored], unknown)
    known = np.ones(len(t), dtype=bool)
    if known_types is not None:
        known = pd.Series(t).isin([str(name) for name in known_types]).to_numpy()
        t[~known] = unknown
    # everything below compares codes: places in the sorted names
    codes, distinct = pd.factorize(np.concatenate([t, p, [unknown]]), sort=True)
    names = [str(name) for name in distinct]
    t, p, rejected = codes[: len(t)], codes[len(t) : -1], codes[len(t) : -1] == codes[-1]
    right = t == p

    per_type = _per_type(t, p, names)
    known_accuracy = float(right[known].mean()) if known.any() else None
    unknown_accuracy = float(rejected[~known].mean()) if not known.all() else None
    h_score = None
    if known_accuracy is not None and unknown_accuracy is not None:
        both = known_accuracy + unknown_accuracy
        h_score = 2 * known_accuracy * unknown_accuracy / both if both else 0.0
    ece = None
    if confidence is not None and not rejected.all():
        labelled = ~rejected
        ece = expected_calibration_error(np.asarray(confidence, dtype=float)[scored][labelled], right[labelled])
    return Evaluation(
        n_cells=len(t),
        accuracy=float(right.mean()),
        balanced_accuracy=float(per_type["recall"].mean()),
        macro_f1=float(per_type["f1"].mean()),
        weighted_f1=float(np.average(per_type["f1"], weights=per_type["cells"])),
        ari=float(adjusted_rand_score(t, p)),
        nmi=float(normalized_mutual_info_score(t, p)),
        ece=ece,
        known_accuracy=known_accuracy,
        known_macro_f1=float(_per_type(t[known], p[known], names)["f1"].mean()) if known.any() else None,
        unknown_accuracy=unknown_accuracy,
        h_score=h_score,
        false_rejection=float(rejected[known].mean()) if known.any() else None,
        per_type=per_type,
        confusion=_confusion(t, p, names),
    )


def _as_objects(labels: Sequence[Any] | np.ndarray | pd.Series) -> np.ndarray:
    return pd.Series(labels).astype(object).to_numpy()


def _without_label(labels: np.ndarray) -> np.ndarray:
    """Mask (cells,) of the cells without a label; each distinct label is looked at once."""
    codes, distinct = pd.factorize(labels, use_na_sentinel=True)
    without = np.array([*(is_unassigned(label) for label in distinct), True], dtype=bool)
    return without[codes]  # a missing label has code -1, the last entry


def _as_text(labels: np.ndarray, missing: str) -> np.ndarray:
    """Labels as text, `missing` where there is none."""
    codes, distinct = pd.factorize(labels, use_na_sentinel=True)
    return np.array([*map(str, distinct), missing], dtype=object)[codes]


def _per_type(t: np.ndarray, p: np.ndarray, names: list[str]) -> pd.DataFrame:
    from sklearn.metrics import precision_recall_fscore_support

    types = np.unique(t)
    precision, recall, f1, cells = precision_recall_fscore_support(t, p, labels=types, zero_division=0)
    columns = {"cells": cells.astype(int), "precision": precision, "recall": recall, "f1": f1}
    return pd.DataFrame(columns, index=pd.Index([names[code] for code in types], name="type"))


def _confusion(t: np.ndarray, p: np.ndarray, names: list[str]) -> pd.DataFrame:
    """Counts: a row for each type of the truth; a column for each of them, then for each that was only predicted."""
    counts = np.zeros((len(names), len(names)), dtype=int)
    np.add.at(counts, (t, p), 1)
    rows = np.unique(t)
    columns = np.concatenate([rows, np.setdiff1d(p, rows)])
    table = pd.DataFrame(counts[np.ix_(rows, columns)])
    table.index = pd.Index([names[code] for code in rows], name="truth")
    table.columns = pd.Index([names[code] for code in columns], name="predicted")
    return table


def expected_calibration_error(confidence: np.ndarray, correct: np.ndarray, bins: int = 15) -> float:
    """Expected calibration error: how far confidence lies from the share of right labels.

    ``ECE = sum over bins b of n_b / n * |right_b - confidence_b|``, over `bins` bins of equal width on (0, 1], each
    closed on the right (0 belongs to the first); right_b is the share of right labels and confidence_b the mean
    confidence in the bin. Guo et al. 2017, *On calibration of modern neural networks*.

    Parameters
    ----------
    confidence
        (cells,) confidence in the predicted label, 0 to 1.
    correct
        (cells,) whether the label is right.
    bins
        Number of bins.
    """
    confidence, correct = np.asarray(confidence, dtype=float), np.asarray(correct, dtype=float)
    if confidence.shape != correct.shape or confidence.ndim != 1 or not len(confidence):
        raise LabelsError(f"confidences {confidence.shape} and right labels {correct.shape} need one entry a cell each")
    wrong = ~((confidence >= 0) & (confidence <= 1))
    if wrong.any():
        raise SettingsError(f"confidence {confidence[wrong][0]:g} lies outside 0 to 1")
    bin_of = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    # n_b * |right_b - confidence_b| is the absolute value of the bin's summed differences
    gaps = np.bincount(bin_of, weights=correct - confidence, minlength=bins)
    return float(np.abs(gaps).sum() / len(confidence))


def stream_metrics(matrix: np.ndarray, *, baseline: np.ndarray | None = None) -> dict[str, float | None]:
    """Figures of learning in stages.

    ``A[s, j]`` is the accuracy after stage s on the held-out part of stage j, S stages in all. Parts beyond the S-th
    belong to data sets that were never learnt. NaN marks what was not measured.

    - final_mean_accuracy = mean over j < S of A[S-1, j]
    - forgetting = mean over j < S-1 of (max over j <= s < S-1 of A[s, j]) - A[S-1, j]; below 0 where old parts got
      better (Chaudhry et al. 2018, from the stage that learnt the part)
    - backward_transfer = mean over j < S-1 of A[S-1, j] - A[j, j] (Lopez-Paz and Ranzato 2017)
    - forward_transfer = mean over 0 < j < S of A[j-1, j] - baseline[j]: how well a part is done before its stage
    - unseen_mean_accuracy = mean over j >= S of A[S-1, j]

    A figure that needs more stages, or parts that were not measured, is None.

    Parameters
    ----------
    matrix
        (stages, parts) accuracies; at least as many parts as stages.
    baseline
        (parts,) accuracy of a model that learnt nothing, 0 if None.
    """
    accuracy = np.asarray(matrix, dtype=float)
    if accuracy.ndim != 2 or not accuracy.shape[0] or accuracy.shape[1] < accuracy.shape[0]:
        raise SettingsError(
            f"accuracies have shape {accuracy.shape}; expected (stages, parts) with a part for each stage"
        )
    stages, parts = accuracy.shape
    floor = np.zeros(parts) if baseline is None else np.asarray(baseline, dtype=float)
    if floor.shape != (parts,):
        raise SettingsError(f"baseline has shape {floor.shape}; expected ({parts},), one accuracy a part")
    final = accuracy[-1]
    best = [_largest(accuracy[part : stages - 1, part]) for part in range(stages - 1)]
    learnt = np.arange(stages - 1)
    return {
        "final_mean_accuracy": _mean(final[:stages]),
        "forgetting": _mean(np.array(best) - final[learnt]),
        "backward_transfer": _mean(final[learnt] - accuracy[learnt, learnt]),
        "forward_transfer": _mean(accuracy[learnt, learnt + 1] - floor[learnt + 1]),
        "unseen_mean_accuracy": _mean(final[stages:]),
    }


def _mean(values: np.ndarray) -> float | None:
    """Mean of what was measured; None where nothing was."""
    measured = values[~np.isnan(values)]
    return float(measured.mean()) if len(measured) else None


def _largest(values: np.ndarray) -> float:
    measured = values[~np.isnan(values)]
    return float(measured.max()) if len(measured) else float("nan")


@dataclass(frozen=True, eq=False)
class Split:
    """Cells to train on and cells kept for validation; ``train, validation = split`` works too.

    Attributes
    ----------
    train, validation
        Sorted positions of the cells, int64.
    by
        `groups` where whole groups (donors, batches) were held out, `cells` where cells were drawn at random by type.
    held_out
        Names of the groups held out.
    note
        Why groups were not kept whole, or empty.
    """

    train: np.ndarray
    validation: np.ndarray
    by: str
    held_out: tuple[str, ...] = ()
    note: str = ""

    def __iter__(self) -> Iterator[np.ndarray]:
        return iter((self.train, self.validation))


def split_cells(
    labels: Sequence[Any] | np.ndarray | pd.Series,
    groups: Sequence[Any] | np.ndarray | pd.Series | None = None,
    *,
    test_share: float,
    seed: int,
) -> Split:
    """Split cells into training and validation so that no donor is on both sides, where that can be had.

    With at least three groups, whole groups are held out: of many random choices that leave every type at least a
    quarter of its cells (and one) for training and hold out at most half of the cells, the one nearest to `test_share`.
    Otherwise cells are drawn at random in each type, at least one of each type with two cells or more. Cells without a
    label are in neither part.

    Parameters
    ----------
    labels
        (cells,) cell types.
    groups
        (cells,) donors or batches; a missing group is a group of its own that is never held out.
    test_share
        Share of cells for validation, above 0 and below 1.
    seed
        Of the choice; the same seed gives the same split.

    Raises
    ------
    SettingsError
        `test_share` is not between 0 and 1.
    LabelsError
        Lengths differ, or fewer than two cells have a label.
    """
    if not 0 < test_share < 1:
        raise SettingsError(f"the share of cells for validation is {test_share}; expected above 0 and below 1")
    given = _as_objects(labels)
    cells = np.flatnonzero(~_without_label(given))
    if len(cells) < 2:
        raise LabelsError(f"{len(cells)} cells have a label; at least two are needed for a split")
    type_of, types = pd.factorize(_as_text(given[cells], ""), sort=True)
    random = np.random.default_rng(seed)
    note = ""
    if groups is not None:
        donors = _as_objects(groups)
        if len(donors) != len(given):
            raise LabelsError(f"{len(donors)} groups for {len(given)} cells; one a cell is needed")
        codes, names = pd.factorize(donors[cells], use_na_sentinel=True)
        held = _held_out(codes, type_of, names, (test_share, random)) if len(names) >= 3 else None
        if held is not None:
            out = np.isin(codes, held)
            return Split(cells[~out], cells[out], "groups", tuple(sorted(str(names[code]) for code in held)))
        note = (
            f"only {len(names)} groups ({listed(map(str, names))}), three are needed to hold one out"
            if len(names) < 3
            else "no choice of groups to hold out leaves every type enough cells for training"
        )
    out = np.zeros(len(cells), dtype=bool)
    for code in range(len(types)):
        members = random.permutation(np.flatnonzero(type_of == code))
        wanted = max(1, round(test_share * len(members)))
        out[members[: min(wanted, len(members) - 1)]] = True
    return Split(cells[~out], cells[out], "cells", (), note)


def _held_out(
    codes: np.ndarray, type_of: np.ndarray, names: np.ndarray, wish: tuple[float, np.random.Generator]
) -> list[int] | None:
    """Groups to hold out, or None where no choice leaves every type enough cells; see `split_cells`."""
    share, random = wish
    table = np.zeros((len(names), type_of.max() + 1), dtype=int)  # cells of each type (columns) in each group
    np.add.at(table, (codes[codes >= 0], type_of[codes >= 0]), 1)
    all_cells = np.bincount(type_of)
    needed = np.maximum(1, all_cells // 4)
    best: tuple[float, int, list[int]] | None = None
    for _ in range(max(20, min(200, 4000 // len(names)))):
        chosen: list[int] = []
        held = np.zeros_like(all_cells)
        for group in random.permutation(len(names)):
            more = held + table[group]
            if more.sum() > len(type_of) / 2 or (all_cells - more < needed).any():
                continue
            if not chosen or abs(more.sum() / len(type_of) - share) < abs(held.sum() / len(type_of) - share):
                chosen.append(int(group))
                held = more
        if chosen:
            # among choices as near to the share, the one that tests most types
            found = (round(abs(held.sum() / len(type_of) - share), 2), -int((held > 0).sum()), chosen)
            best = found if best is None or found[:2] < best[:2] else best
    return None if best is None else best[2]

"""The rate of false rejections that a model is used at by default: known types play the unknown ones.

Each type in turn is left out: its column of the head and of the linear member, its prototype and its markers. Its
held-out cells are then cells of an unknown type, and the rate is taken at which these are rejected and the other cells
are labelled best, by the H-score. The backbone has still learnt from the type, so this is easier than the truth.
"""

from __future__ import annotations

import numpy as np

from evercell.rejection.base import DEFAULT_RATE, Outputs, Rejector

RATES = (0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02)
"""Not above 2 %: that is of held-out cells of the training studies; another study loses five to ten times as many."""
LEAST_CELLS = 3
"""Held-out cells that a type must have to play the unknown one."""


def best_rate(
    rejector: type[Rejector], training: tuple[Outputs, np.ndarray], held_out: tuple[Outputs, np.ndarray]
) -> float:
    """Rate of false rejections with the best mean H-score over the types left out.

    Parameters
    ----------
    rejector
        Fitted anew without each type.
    training, held_out
        Outputs of cells and their type codes.

    Returns
    -------
    float
        One of `RATES`; `DEFAULT_RATE` where fewer than two types have held-out cells enough, or where the rejector
        judges cells by one another.
    """
    scores = h_scores(rejector, training, held_out) if rejector.per_cell else {}
    return RATES[int(np.mean(list(scores.values()), axis=0).argmax())] if len(scores) > 1 else DEFAULT_RATE


def h_scores(
    rejector: type[Rejector], training: tuple[Outputs, np.ndarray], held_out: tuple[Outputs, np.ndarray]
) -> dict[int, np.ndarray]:
    """H-score at each of `RATES` (R,), by the code of the type left out."""
    (outputs, codes), (unseen, truth) = training, held_out
    types, sizes = np.unique(truth, return_counts=True)
    found = {}
    for code in types[(sizes >= LEAST_CELLS) & (sizes <= len(truth) - LEAST_CELLS)]:
        rest = codes != code
        if len(np.unique(codes[rest])) < 2:
            continue
        known, unknown = unseen.taken(truth != code).without(code), unseen.taken(truth == code).without(code)
        fitted = rejector.fitted(outputs.taken(rest).without(code), codes[rest]).calibrated(known)
        thresholds = np.array([fitted.threshold(rate) for rate in RATES])
        right = (known.codes == truth[truth != code])[:, None]
        labelled = (right & (fitted.score(known)[:, None] <= thresholds)).mean(axis=0)
        rejected = (fitted.score(unknown)[:, None] > thresholds).mean(axis=0)
        found[int(code)] = 2 * labelled * rejected / np.maximum(labelled + rejected, 1e-9)
    return found

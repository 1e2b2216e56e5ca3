"""Which cells of each type the example bank keeps.

`random` takes them as they come; `nearest` those nearest to the type's row of the classifier (CANAL); `herding` those
whose running mean follows the type's mean (Welling 2009; iCaRL); `kcentre` those that leave no cell far from an example
(greedy k-centre, Gonzalez 1985). Numbers are exact whatever the rule: a tie never empties a type.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from evercell.bank import quotas
from evercell.errors import SettingsError

Rule = Callable[[np.ndarray, np.ndarray, int, np.random.Generator], np.ndarray]


def _random(features: np.ndarray, row: np.ndarray, number: int, rng: np.random.Generator) -> np.ndarray:
    return rng.permutation(len(features))[:number]


def _nearest(features: np.ndarray, row: np.ndarray, number: int, rng: np.random.Generator) -> np.ndarray:
    norms = np.linalg.norm(features, axis=1) * max(float(np.linalg.norm(row)), 1e-12)
    return np.argsort(-(features @ row) / np.maximum(norms, 1e-12), kind="stable")[:number]


def _herding(features: np.ndarray, row: np.ndarray, number: int, rng: np.random.Generator) -> np.ndarray:
    mean = features.mean(axis=0)
    chosen: list[int] = []
    total = np.zeros_like(mean)
    left = np.ones(len(features), dtype=bool)
    for n in range(1, number + 1):
        distance = np.square((total + features) / n - mean).sum(axis=1)
        best = int(np.where(left, distance, np.inf).argmin())
        chosen.append(best)
        left[best] = False
        total = total + features[best]
    return np.array(chosen, dtype=np.int64)


def _kcentre(features: np.ndarray, row: np.ndarray, number: int, rng: np.random.Generator) -> np.ndarray:
    chosen = [int(np.square(features - features.mean(axis=0)).sum(axis=1).argmin())]
    left = np.ones(len(features), dtype=bool)
    left[chosen] = False
    distance = np.square(features - features[chosen[0]]).sum(axis=1)
    while len(chosen) < number:
        best = int(np.where(left, distance, -1.0).argmax())
        chosen.append(best)
        left[best] = False
        distance = np.minimum(distance, np.square(features - features[best]).sum(axis=1))
    return np.array(chosen, dtype=np.int64)


SELECTIONS: dict[str, Rule] = {"random": _random, "nearest": _nearest, "herding": _herding, "kcentre": _kcentre}


def selected_rows(
    codes: np.ndarray,
    stages: np.ndarray,
    total: int,
    *,
    how: str,
    features: np.ndarray,
    rows_of_types: np.ndarray,
    rng: np.random.Generator,
) -> np.ndarray:
    """Sorted rows of the cells to keep; types share `total` equally, and the stages share what a type may keep.

    Parameters
    ----------
    codes, stages
        Type and stage of each cell (N,).
    total
        Size of the bank.
    how
        A name of `SELECTIONS`.
    features
        What the classifier sees of each cell (N, W).
    rows_of_types
        The classifier's row of each type (K, W).
    rng
        Of `random`.

    Raises
    ------
    SettingsError
        If there is no such rule.
    """
    if how not in SELECTIONS:
        raise SettingsError(f"there is no selection `{how}`", hint=f"choose one of: {', '.join(SELECTIONS)}")
    kept: list[np.ndarray] = []
    for code, quota in enumerate(quotas(np.bincount(codes).tolist(), total)):
        of_type = np.flatnonzero(codes == code)
        # An earlier study's look of a type is not to be crowded out by the cells of the last one.
        learnt = np.unique(stages[of_type])
        shares = quotas([int((stages[of_type] == stage).sum()) for stage in learnt], int(quota))
        for stage, share in zip(learnt, shares, strict=True):
            if share:
                rows = of_type[stages[of_type] == stage]
                kept.append(rows[SELECTIONS[how](features[rows], rows_of_types[code], int(share), rng)])
    return np.sort(np.concatenate(kept)) if kept else np.zeros(0, dtype=np.int64)

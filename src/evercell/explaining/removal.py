"""Genes removed from cells and the model asked again: what would flip a label, and whether the genes matter at all."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from evercell.explaining.cells import Piece, proba_without
from evercell.explaining.result import MOST_GENES

CHECKED = (5, 10, 20, 50)  # genes removed in the check
DRAWS = 10
WINDOW = 20  # genes next in expression on either side, of which one is drawn
TINY = 1e-6


def flip(pieces: Sequence[Piece], order: np.ndarray, label: int, other: int) -> tuple[np.ndarray, int, float] | None:
    """The fewest genes from the front of `order` (codes) without which `label` is not the most probable type.

    Genes that leave `other` the most probable type are preferred to fewer that leave a third one; of several cells the
    mean probability counts.

    Returns
    -------
    tuple or None
        The genes, the most probable type without them and its probability; None where `MOST_GENES` are not enough.
    """
    order = order[:MOST_GENES]
    at_once = max(500 // sum(len(one.rows) for one in pieces), 10)
    third = None
    for start in range(0, len(order), at_once):
        sizes = range(start + 1, min(start + at_once, len(order)) + 1)
        means = proba_without(pieces, [order[:size] for size in sizes]).mean(axis=1)  # (sizes, K)
        for size, mean in zip(sizes, means, strict=True):
            top = int(mean.argmax())
            if top == other:
                return order[:size], top, float(mean[top])
            if top != label and third is None:
                third = order[:size], top, float(mean[top])
    return third


def deletion_check(
    pieces: Sequence[Piece],
    order: np.ndarray,
    expression: np.ndarray,
    label: int,
    other: int,
    *,
    rng: np.random.Generator,
    sizes: Sequence[int] = CHECKED,
    draws: int = DRAWS,
) -> pd.DataFrame:
    """What removing the first genes of `order` does to the cells, beside random genes of like expression.

    Parameters
    ----------
    pieces
        The cells.
    order
        Codes of genes, the largest contribution first.
    expression
        Mean expression of all genes in these cells (G,).
    label, other
        Codes of the types.
    rng
        For the draws.
    sizes, draws
        How many genes are removed, and how many random sets of each size.

    Returns
    -------
    pandas.DataFrame
        One row a size: ``genes``, ``drop`` (of the mean probability of the label), ``random`` and ``random_sd`` (mean
        and standard deviation over the draws), ``log_odds_drop`` and ``random_log_odds_drop`` (against `other`).
    """
    usable = [size for size in sizes if size <= len(order)] or ([len(order)] if len(order) else [])
    sets = [np.zeros(0, dtype=np.int64)]
    for size in usable:
        sets += [order[:size], *(alike(expression, order[:size], rng) for _ in range(draws))]
    proba = proba_without(pieces, sets)  # (1 + sizes * (1 + draws), B, K)
    mean = proba[:, :, label].mean(axis=1, dtype=np.float64)
    odds = np.log((proba[:, :, label] + TINY) / (proba[:, :, other] + TINY)).mean(axis=1, dtype=np.float64)
    drops, odds_drops = (values[0] - values[1:].reshape(len(usable), 1 + draws) for values in (mean, odds))
    return pd.DataFrame(
        {
            "genes": usable,
            "drop": drops[:, 0],
            "random": drops[:, 1:].mean(axis=1),
            "random_sd": drops[:, 1:].std(axis=1, ddof=1 if draws > 1 else 0),
            "log_odds_drop": odds_drops[:, 0],
            "random_log_odds_drop": odds_drops[:, 1:].mean(axis=1),
        }
    )


def alike(expression: np.ndarray, genes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """As many other expressed genes as `genes` (codes), each near one of them in expression (G,); fewer if there are.

    Equally expressed genes stand in random order.
    """
    expressed = np.flatnonzero(expression > 0)
    shuffled = rng.permutation(expressed)
    ranked = shuffled[np.argsort(expression[shuffled], kind="stable")]
    ordered, free = expression[ranked], ~np.isin(ranked, genes)
    found = []
    for gene in genes:
        place = int(np.searchsorted(ordered, expression[gene]))
        for window in (WINDOW, len(ranked)):
            low = max(place - window, 0)
            near = low + np.flatnonzero(free[low : place + window + 1])
            if len(near):
                break
        else:
            break
        taken = rng.choice(near)
        free[taken] = False
        found.append(ranked[taken])
    return np.array(found, dtype=np.int64)

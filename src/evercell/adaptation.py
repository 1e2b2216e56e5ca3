"""Fit the linear member again on the genes that a query measured.

A targeted panel, or a study of 2,000 deposited genes, lacks much of what the linear member leans on, and counts
normalised over what is left are on another scale. The transformer met random panels in training; the linear member is
fitted again on the example bank, seen through the query's genes. Only the query's list of genes is used, none of its
cells, so a cell's annotation still does not depend on other cells.

Fitting the transformer's head again in the same way was tried and gave no gain (docs/log.md).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from evercell.annotator import Annotator, best_temperature, tempered
from evercell.linear import linear_member
from evercell.rejection import Outputs
from evercell.tokenizers import View

LOST = 0.1
"""Share of the bank's counts on genes that the query did not measure, from which on the model is fitted again."""


def lost_share(model: Annotator, measured: np.ndarray) -> float:
    """Share of the bank's counts that are of genes which a query did not measure (G,), mean over cells."""
    bank = model.bank
    if len(bank) == 0:
        return 0.0
    totals = np.asarray(bank.counts.sum(axis=1)).ravel()
    seen = bank.counts @ measured.astype(np.float32)
    return float(np.mean(1.0 - seen / np.maximum(totals, 1.0)))


def fitted_to(model: Annotator, measured: np.ndarray, *, seed: int = 0) -> Annotator:
    """The model with linear member, temperature and rejector fitted on the bank, seen through `measured` (G,).

    Temperature and rejection threshold come from bank cells that the fit before them did not see: each half of the bank
    is scored by a fit on the other. The bank is class-balanced, so every type is held to be equally common.
    """
    counts = model.bank.counts.copy()
    counts.data = counts.data * measured[counts.indices]
    counts.eliminate_zeros()
    view = View.whole(counts, measured)
    cells = np.flatnonzero(view.totals > 0)
    codes = model.bank.codes

    def fitted(rows: np.ndarray, temperature: float = 1.0) -> Annotator:
        linear = None
        if model.linear is not None:
            linear = linear_member(view.counts[rows], codes[rows], len(model.types), seed)
        return replace(model, linear=linear, temperature=temperature)

    one, other = np.array_split(np.random.default_rng(seed).permutation(cells), 2)
    unseen = Outputs.joined([fitted(one).outputs(view.taken(other)), fitted(other).outputs(view.taken(one))])
    temperature = best_temperature(unseen.log_proba, codes[np.concatenate([other, one])])
    unseen = replace(unseen, log_proba=tempered(unseen.log_proba, temperature))
    adapted = fitted(cells, temperature)
    if model.rejector is None:
        return adapted
    rejector = type(model.rejector).fitted(adapted.outputs(view.taken(cells)), codes[cells])
    return replace(adapted, rejector=rejector.calibrated(unseen))

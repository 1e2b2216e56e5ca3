"""What the old model makes of a study before it learns it: how far thresholds of unknown cells have to move for it.

Thresholds come from held-out cells of studies that a model was trained on, and cells of any other study score higher.
Each update shows one more such study, so how much higher is measured anew, and kept in the ledger.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from evercell.adaptation import fitted_to, worth_fitting
from evercell.annotator import Annotator
from evercell.rejection import Outputs, Rejector
from evercell.tokenizers import View
from evercell.training_cells import TrainingCells

KEPT = 0.9
"""Share of the rightly labelled cells of a study which are not to be called unknown before it is learnt."""
MOST_CELLS = 4000
"""Cells of a study that are looked at, evenly spaced."""
LEAST_CELLS = 50
"""Rightly labelled cells from which on a study counts."""


def unlearnt(old: Annotator, cells: TrainingCells) -> list[dict[str, Any]]:
    """For each study of an update: cells that were looked at and labelled right, and the move of the thresholds.

    ``move`` is by how much the old model's threshold at its default rate, without what it was moved by for other
    studies, lies below the score that nine in ten rightly labelled cells stay under; None where too few are.
    """
    found = []
    for study in range(len(cells.measured)):
        rows = np.flatnonzero(cells.studies == study)
        rows = rows[np.unique(np.linspace(0, len(rows) - 1, min(len(rows), MOST_CELLS)).astype(int))]
        model, outputs = _asked(old, cells.taken(rows), cells.measured[study])
        right = outputs.codes == cells.codes[rows]
        rejector = model.rejector
        move = None
        if rejector is not None and rejector.per_cell and right.sum() >= LEAST_CELLS:
            score = np.quantile(rejector.score(outputs.taken(right)), KEPT)
            move = float(score - rejector.threshold(rejector.default_rate) + rejector.allowance)
        found.append({"cells": len(rows), "right": int(right.sum()), "move": move})
    return found


def allowance(old: Annotator, seen: Sequence[Mapping[str, Any]], rejector: type[Rejector]) -> float:
    """What thresholds are moved by: the median over all studies that met the model unlearnt, `another_study` being one.

    A study whose cells score no higher counts as 0.
    """
    stages = [stage.facts.get("unlearnt", []) for stage in old.ledger.stages]
    moves = [one["move"] for study in [*stages, seen] for one in study if one["move"] is not None]
    return float(np.median([rejector.another_study, *np.maximum(moves, 0.0)]))


def _asked(old: Annotator, cells: TrainingCells, measured: np.ndarray) -> tuple[Annotator, Outputs]:
    """The old model, fitted to the genes of a study where `annotate` would do that, and what it says of its cells."""
    n_genes = len(old.vocabulary)
    measured = measured[:n_genes]
    model = fitted_to(old, measured) if worth_fitting(old, measured) else old
    return model, model.outputs(View.whole(cells.stored[:][:, :n_genes].tocsr(), measured))

"""The gate: an update is published only if no old type fell on sealed cells, which no training has seen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import binom

from evercell.annotator import Annotator
from evercell.tokenizers import View
from evercell.updating.recall import drawn_outputs

LEAST_CELLS = 20
"""Sealed cells from which on a type is judged by itself; rarer ones are judged together."""
TRIED = 1  # seed of the draws; no training draws with it
CHANCE = 0.05
"""A fall counts only if as many cells lost, beside those won, have at most this probability by chance (sign test)."""
DRAWN = 40
"""Draws of a type of a stage that is only sketched, which stand for sealed cells."""
ALL, RARE = "all old types", "rare old types"


@dataclass(frozen=True)
class Verdict:
    """What a new model says of the sealed cells of earlier stages, beside what the old one says.

    Parameters
    ----------
    rows
        A row for each type (cells, before, after: share of right labels), then for all and for rare types together.
    fallen
        Names of the rows that fell by more than the tolerance.
    drawn_stages
        Stages that left no cells: the models were tried on draws from their sketches, counted as `drawn` in the rows.
        That is a weaker guard: both models say of draws what they would say of average cells.
    """

    rows: dict[str, dict[str, float]]
    fallen: tuple[str, ...]
    drawn_stages: tuple[int, ...] = ()

    @property
    def holds(self) -> bool:
        """Whether the update may be published."""
        return not self.fallen

    def sentence(self) -> str:
        """What fell, for the user."""
        parts = [
            f"`{name}` from {self.rows[name]['before']:.3f} to {self.rows[name]['after']:.3f} "
            f"({self.rows[name]['cells']:.0f} sealed cells)"
            for name in self.fallen
        ]
        return ", ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """As the ledger holds it."""
        found = {"holds": self.holds, "fallen": list(self.fallen), "types": self.rows}
        return found | {"drawn_stages": list(self.drawn_stages)} if self.drawn_stages else found


def tried_on_sealed(old: Annotator, new: Annotator, *, tolerance: float) -> Verdict:
    """Compare the recall of old types on the sealed cells of the old model, before and after.

    Every type with at least `LEAST_CELLS` sealed cells is judged by itself, the rarer ones together, and all together.
    A row falls if it loses more than the share `tolerance` of its cells and more than chance would have it lose: five
    cells lost and none won, for example, or twelve and three. Stages that are only sketched are tried on draws, the
    same ones before and after, moved as the sketch was with the backbone.
    """
    codes = np.zeros(0, dtype=np.int64)
    before = after = np.zeros(0, dtype=bool)
    sealed, n_drawn = old.sealed, 0
    if sealed is not None and len(sealed):
        codes = sealed.codes
        before = old.outputs(View.whole(sealed.counts)).codes == codes
        after = new.outputs(View.whole(sealed.widened(len(new.vocabulary)).counts)).codes == codes
    if old.sketch is not None and new.sketch is not None:
        numbers = np.full(len(old.sketch), DRAWN)
        outputs, drawn = drawn_outputs(old, old.sketch, numbers, seed=TRIED)
        moved, _ = drawn_outputs(new, new.sketch.taken(np.arange(len(numbers))), numbers, seed=TRIED)
        codes, n_drawn = np.concatenate([codes, drawn]), len(drawn)
        before = np.concatenate([before, outputs.codes == drawn])
        after = np.concatenate([after, moved.codes == drawn])
    if not len(codes):
        return Verdict({}, ())
    sizes = np.bincount(codes, minlength=len(old.types))
    groups = {name: codes == code for code, name in enumerate(old.types.names) if sizes[code]}
    judged = {name for code, name in enumerate(old.types.names) if sizes[code] >= LEAST_CELLS} | {ALL}
    groups[ALL] = np.ones(len(codes), dtype=bool)
    rare = (sizes < LEAST_CELLS)[codes]
    if rare.any() and not rare.all():
        groups[RARE] = rare
        judged.add(RARE)
    rows, fallen = {}, []
    for name, cells in groups.items():
        n = int(cells.sum())
        rows[name] = {"cells": n, "before": float(before[cells].mean()), "after": float(after[cells].mean())}
        if n_drawn:
            rows[name]["drawn"] = int(cells[-n_drawn:].sum())
        lost, won = int((before & ~after)[cells].sum()), int((after & ~before)[cells].sum())
        if name in judged and lost - won > tolerance * n and binom.sf(lost - 1, lost + won, 0.5) <= CHANCE:
            fallen.append(name)
    stages = () if old.sketch is None else tuple(np.unique(old.sketch.stages).tolist())
    return Verdict(rows, tuple(fallen), stages)

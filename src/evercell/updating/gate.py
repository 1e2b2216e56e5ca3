"""The gate: an update is published only if no old type fell on sealed cells, which no training has seen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from evercell.annotator import Annotator
from evercell.tokenizers import View

LEAST_CELLS = 20
"""Sealed cells from which on a type is judged by itself; rarer ones are judged together."""
LEAST_LOST = 3
"""A fall by fewer cells cannot be told from chance: three lost and none won has a probability of one in eight."""
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
    """

    rows: dict[str, dict[str, float]]
    fallen: tuple[str, ...]

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
        return {"holds": self.holds, "fallen": list(self.fallen), "types": self.rows}


def tried_on_sealed(old: Annotator, new: Annotator, *, tolerance: float) -> Verdict:
    """Compare the recall of old types on the sealed cells of the old model, before and after.

    Every type with at least `LEAST_CELLS` sealed cells is judged by itself, the rarer ones together, and all together.
    A row falls if it loses more than the share `tolerance` of its cells and at least `LEAST_LOST` cells.
    """
    sealed = old.sealed
    if sealed is None or not len(sealed):
        return Verdict({}, ())
    codes = sealed.codes
    before = old.outputs(View.whole(sealed.counts)).codes == codes
    after = new.outputs(View.whole(sealed.widened(len(new.vocabulary)).counts)).codes == codes
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
        lost = int(before[cells].sum()) - int(after[cells].sum())
        if name in judged and lost >= LEAST_LOST and lost > tolerance * n:
            fallen.append(name)
    return Verdict(rows, tuple(fallen))

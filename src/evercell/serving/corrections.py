"""Labels that a user changed: a list of corrections, the last one first to be undone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from evercell.errors import LabelsError

LONGEST = 120
MOST = 1000


@dataclass(frozen=True)
class Correction:
    """A label for cells.

    Parameters
    ----------
    label
        Their type from now on; "Unknown" where the user does not know it.
    rows
        Places of the cells in the file; empty where `was` names them.
    was
        All cells of the file that have this label at the time; empty where `rows` names them.
    """

    label: str
    rows: tuple[int, ...] = ()
    was: str = ""

    @classmethod
    def of(cls, label: str, rows: Sequence[int], was: str, *, n_cells: int) -> Correction:
        """A correction as a user asked for it.

        Raises
        ------
        LabelsError
            If the label is no name, or the cells are not in the file.
        """
        name = " ".join(label.split())
        if not name or len(name) > LONGEST or not name.isprintable():
            raise LabelsError(
                f"a label has 1 to {LONGEST} printable characters; this one has {len(name)}",
                hint="write the name of a cell type",
            )
        if bool(rows) == bool(was):
            raise LabelsError("no cells were named, or twice", hint="give either `cells` or `was`")
        if rows and not (min(rows) >= 0 and max(rows) < n_cells):
            raise LabelsError(f"the file has {n_cells:,} cells", hint="give places from 0 on, as the map names them")
        return cls(name, tuple(sorted(set(rows))), was)


def corrected(labels: np.ndarray, corrections: Sequence[Correction]) -> tuple[np.ndarray, np.ndarray]:
    """Labels after all corrections, and which cells a correction named.

    Parameters
    ----------
    labels
        (B,) labels of the model, as objects.
    corrections
        In the order in which they were made.

    Returns
    -------
    tuple
        (B,) labels and (B,) booleans.
    """
    labels, touched = labels.copy(), np.zeros(len(labels), dtype=bool)
    for one in corrections:
        here = labels == one.was if one.was else np.asarray(one.rows, dtype=np.int64)
        labels[here] = one.label
        touched[here] = True
    return labels, touched


def to_text(corrections: Sequence[Correction]) -> str:
    """Corrections as JSON."""
    return json.dumps([asdict(one) for one in corrections])


def from_text(text: str) -> list[Correction]:
    """Corrections of what `to_text` wrote."""
    found: list[dict[str, Any]] = json.loads(text)
    return [Correction(one["label"], tuple(one["rows"]), one["was"]) for one in found]


def digest(corrections: Sequence[Correction]) -> str:
    """Short name of a state of the corrections."""
    return hashlib.sha256(to_text(corrections).encode()).hexdigest()[:16] if corrections else "none"

"""Labels of a new data set settled with the types of a model, before anything is trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from evercell.annotator import Annotator
from evercell.celltypes import Reconciliation, reconcile
from evercell.classification import outputs_of
from evercell.errors import LabelsError
from evercell.stored_counts import CellCounts, stacked
from evercell.training_cells import Study

MOST_CELLS = 3000  # looked at by the old model
UNKNOWN_RATE = 0.01  # of known cells, as `annotate` has it
OPEN = ("rename", "merge", "conflict")
"""Findings that the user settles: each would else teach one type under two names, or two under one."""


@dataclass(frozen=True)
class Settlement:
    """Studies with the names of the model's types as labels.

    Parameters
    ----------
    studies
        Studies; cells may have been left out.
    reconciliation
        What was settled by name or by the user's mapping.
    evidence
        What the old model sees in the cells of each label, see `Reconciliation.evidence`; ``unknown`` is the share of
        them that it would reject, high for a type that it never saw.
    """

    studies: list[Study]
    reconciliation: Reconciliation
    evidence: pd.DataFrame

    def to_dict(self) -> list[dict[str, object]]:
        """A row a label, as the ledger holds it."""
        by = self.reconciliation.table().set_index("label")["by"]
        columns = ["label", "cells", "top_type", "share", "unknown", "finding", "to"]
        rows = self.evidence[columns].to_dict(orient="records")
        return [{**{str(k): _plain(v) for k, v in row.items()}, "by": str(by[row["label"]])} for row in rows]


def looked_at(
    model: Annotator,
    studies: Sequence[Study],
    *,
    mapping: Mapping[str, str] | None = None,
    species: str = "auto",
    column: str | None = None,
    store: Path | None = None,
) -> tuple[Reconciliation, pd.DataFrame, np.ndarray]:
    """What names and the old model say of each label, before anything is settled; `store` as in `stacked`.

    Returns
    -------
    found, evidence, proba
        Verdicts by name; `Reconciliation.evidence` with ``to`` as the mapping has it; probabilities of the old model
        for the labelled cells (N, K).

    Raises
    ------
    LabelsError
        If the mapping names a label that the data do not have.
    """
    labels = np.concatenate([study.labels for study in studies])
    found = reconcile(labels, model.types, mapping=mapping)
    if found.unused:
        raise LabelsError(
            f"the mapping names `{found.unused[0]}`, which is no label of the data",
            hint="the labels are " + ", ".join(f"`{match.label}`" for match in found.matches[:8]),
        )
    seen = [_seen(model, study, species, column, store) for study in studies]
    proba, rejected = (np.concatenate(parts) for parts in zip(*seen, strict=True))
    rows = np.linspace(0, len(labels) - 1, min(len(labels), MOST_CELLS)).astype(int)
    evidence = found.evidence(proba[rows], labels[rows], rejected=rejected[rows])
    evidence["to"] = [
        found.mapping[label] if label in found.mapped else to
        for label, to in zip(evidence["label"], evidence["to"], strict=True)
    ]
    return found, evidence, proba


def label_table(model: Annotator, studies: Sequence[Study], *, species: str, column: str | None) -> pd.DataFrame:
    """A row a label, for the user to settle: `read_mapping` reads it back.

    ``name`` is what the label would become: empty where a coarse label stands for several types of the model, so that
    it stays open until it is named or proposals are accepted.
    """
    found, evidence, _ = looked_at(model, studies, species=species, column=column)
    by = found.table().set_index("label")["by"]
    evidence = evidence.assign(name=evidence["to"].fillna(""), by=by[evidence["label"]].to_numpy())
    order = ["label", "name", "cells", "by", "finding", "top_type", "share", "next_type", "next_share", "unknown"]
    return evidence[[*order, "sentence"]].sort_values("cells", ascending=False, kind="stable", ignore_index=True)


def settled(
    model: Annotator,
    studies: Sequence[Study],
    *,
    mapping: Mapping[str, str] | None = None,
    accept_proposals: bool = False,
    species: str = "auto",
    column: str | None = None,
    store: Path | None = None,
) -> Settlement:
    """Settle every label: the user's mapping first, then by name, then by what the old model sees.

    With `accept_proposals`, a label whose cells lie on one old type takes its name (rename), a coarse label gives its
    cells the finer types that the old model tells (merge), and a label that reads like one type but lies on another
    keeps its name. `store` is for the counts that the old model looks at, as in `stacked`.

    Raises
    ------
    LabelsError
        If labels are open and neither a mapping names them nor proposals are accepted; all of them are listed.
    """
    found, evidence, proba = looked_at(model, studies, mapping=mapping, species=species, column=column, store=store)
    labels = np.concatenate([study.labels for study in studies])
    open_rows = evidence[evidence["finding"].isin(OPEN) & ~evidence["label"].isin(found.mapped)]
    if len(open_rows) and not accept_proposals:
        lines = "; ".join(
            f"{sentence} (it would call {unknown:.0%} of them unknown)"
            for sentence, unknown in zip(open_rows["sentence"], open_rows["unknown"], strict=True)
        )
        raise LabelsError(
            f"{len(open_rows)} label{'s' * (len(open_rows) > 1)} must be settled before training: {lines}",
            hint="give --mapping FILE with a line `label: name of a type` for each (its own name for a new type), "
            "or --accept-proposals to do as proposed",
        )
    names = found.mapping | {
        row["label"]: row["to"] for row in open_rows.to_dict(orient="records") if row["finding"] == "rename"
    }
    merged = set(open_rows.loc[open_rows["finding"] == "merge", "label"])
    new_labels = np.array([names[label] for label in labels], dtype=object)
    told = np.array(model.types.names, dtype=object)[proba.argmax(axis=1)]
    coarse = np.isin(labels, list(merged))
    new_labels[coarse] = told[coarse]
    parts = np.split(new_labels, np.cumsum([len(study.labels) for study in studies])[:-1])
    renamed = [replace(study, labels=part.astype(str)) for study, part in zip(studies, parts, strict=True)]
    return Settlement(renamed, found, evidence)


def _seen(
    model: Annotator, study: Study, species: str, column: str | None, store: Path | None
) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities of the old model (N, K) for the labelled cells of a study, and which it would reject (N,)."""
    blocks, measured = study.brought_to(model.vocabulary, species=species, column=column)
    outputs = outputs_of(model, CellCounts.of(stacked(blocks, store), store), measured)
    if model.rejector is None:
        return outputs.proba, np.zeros(len(study.rows), dtype=bool)
    return outputs.proba, model.rejector.score(outputs) > model.rejector.threshold(UNKNOWN_RATE)


def _plain(value: object) -> object:
    """A value of a table as JSON holds it."""
    return value.item() if isinstance(value, np.generic) else value

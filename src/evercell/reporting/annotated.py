"""The cells of an annotation as one table, and the numbers that a report is made of."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from evercell.colours import UNKNOWN
from evercell.errors import CellsError, LabelsError
from evercell.label_sets import SEPARATOR
from evercell.labels import is_unassigned
from evercell.reporting.findings import Overview

if TYPE_CHECKING:
    from anndata import AnnData

    from evercell.evaluation import Evaluation

SAMPLE_COLUMNS = ("sample", "sample_id", "donor", "donor_id", "patient", "batch", "dataset", "library", "condition")
LABEL_COLUMNS = (
    "cell_type", "celltype", "cell_types", "cell_type_original", "annotation", "predicted_labels", "leiden", "louvain",
    "seurat_clusters", "clusters", "cluster",
)  # fmt: skip
"""Where a file may hold older labels or clusters, to show beside the new ones; the first that is there is taken."""
MOST_OLD = 80


def cell_table(adata: AnnData, *, key: str, truth: str | None, old_labels: str | None) -> pd.DataFrame:
    """(B, ...) label and, where present, confidence, unknown, ontology, majority, set, lineage, truth and old label."""
    if adata.n_obs == 0:
        raise CellsError("there are no cells to report on", hint="check the filter that made this AnnData")
    for column, argument in ((key, "key"), (truth, "truth"), (old_labels, "old_labels")):
        if column is not None and column not in adata.obs:
            raise LabelsError(
                f"`obs` has no column `{column}`; it has {', '.join(f'`{name}`' for name in adata.obs) or 'none'}",
                hint=f"name the column with {argument}="
                + (", or annotate the cells first" if argument == "key" else ""),
            )
    obs = adata.obs
    cells = pd.DataFrame({"label": _text(obs[key]).fillna(UNKNOWN).to_numpy()})
    for name, suffix in (("confidence", "confidence"), ("unknown", "unknown_score")):
        if f"{key}_{suffix}" in obs:
            cells[name] = pd.to_numeric(obs[f"{key}_{suffix}"], errors="coerce").to_numpy(dtype=float)
    for name, suffix in (("ontology", "ontology_term_id"), ("set", "set"), ("lineage", "lineage")):
        if f"{key}_{suffix}" in obs:
            cells[name] = _text(obs[f"{key}_{suffix}"]).to_numpy()
    if f"{key}_majority" in obs:
        cells["majority"] = _text(obs[f"{key}_majority"]).fillna(UNKNOWN).to_numpy()
    if truth is not None:
        given = _text(obs[truth])
        cells["truth"] = given.mask(given.map(is_unassigned)).to_numpy()
    found = old_labels or truth or next((one for one in LABEL_COLUMNS if _holds_labels(obs, one, key)), None)
    if found is not None:
        cells["old"] = _text(obs[found]).to_numpy()
        cells.attrs["old"] = found
    return cells


def _holds_labels(obs: pd.DataFrame, column: str, key: str) -> bool:
    """Whether a column of a usual name holds labels of groups of cells, other than those of the annotation."""
    return column in obs and column != key and 1 < obs[column].nunique() <= min(MOST_OLD, max(len(obs) // 2, 2))


def _text(column: pd.Series) -> pd.Series:
    """Labels as text; missing and empty ones as missing."""
    text = column.astype(object).where(column.notna(), None)
    return text.map(lambda value: str(value).strip() or None, na_action="ignore")


def overview_of(
    cells: pd.DataFrame, settings: dict[str, Any], *, truth: str | None, agreement: Evaluation | None
) -> Overview:
    by_label = cells.groupby("label")
    types = pd.DataFrame({"cells": by_label.size()})
    types["share"] = types["cells"] / len(cells)
    if "confidence" in cells:
        types["confidence"] = by_label["confidence"].mean()
    if "ontology" in cells:
        types["ontology"] = by_label["ontology"].agg(lambda terms: next(iter(terms.mode()), ""))
    if "majority" in cells:
        types["majority"] = cells["majority"].value_counts().reindex(types.index, fill_value=0)
    types = types.sort_values("cells", ascending=False, kind="stable")
    types = types.loc[[*types.index.drop(UNKNOWN, errors="ignore"), *types.index.intersection([UNKNOWN])]]
    confidence = cells["confidence"].dropna() if "confidence" in cells else pd.Series(dtype=float)
    return Overview(
        types=types,
        confidence=float(confidence.mean()) if len(confidence) else None,
        confident=float((confidence >= 0.8).mean()) if len(confidence) else None,
        settings=settings,
        truth=truth,
        accuracy=None if agreement is None else float(agreement.accuracy),
        macro_f1=None if agreement is None else float(agreement.macro_f1),
        per_type=None if agreement is None else agreement.per_type,
        sets=set_sizes(cells),
        single=set_sizes(cells).get(ONE_LABEL),
    )


ONE_LABEL = "one type"


def set_sizes(cells: pd.DataFrame) -> dict[str, float]:
    """Share of the cells that have a set of types, by its size in words; empty where no sets were made."""
    if "set" not in cells or not cells["set"].notna().any():
        return {}
    sizes = cells["set"].dropna().str.count(re.escape(SEPARATOR)) + 1
    shares = {ONE_LABEL: sizes == 1, "two types": sizes == 2, "more types": sizes > 2}
    return {name: float(chosen.mean()) for name, chosen in shares.items()}


def sample_columns(adata: AnnData) -> list[str]:
    """Columns of `obs` that say where a cell comes from, without those that part the cells as an earlier one does."""
    found: dict[bytes, str] = {}
    for column in SAMPLE_COLUMNS:
        if column in adata.obs and 1 < adata.obs[column].nunique() < max(adata.n_obs // 2, 2):
            codes, _ = pd.factorize(adata.obs[column].astype(str))
            found.setdefault(codes.tobytes(), column)
    return list(found.values())[:4]


def agreement_of(cells: pd.DataFrame, column: str = "label") -> Evaluation | None:
    """Agreement of a column of labels with the given labels; None where no column of them was named."""
    from evercell.evaluation import evaluate

    if "truth" not in cells:
        return None
    confidence = cells["confidence"].to_numpy() if "confidence" in cells and column == "label" else None
    if confidence is not None and not ((confidence >= 0) & (confidence <= 1)).all():
        confidence = None  # not a probability for every cell, so there is no calibration to speak of
    return evaluate(cells["truth"], cells[column], confidence=confidence)


def sequence(value: Any) -> list[Any]:
    """A list of what may be a list, an array (as read from a file), one value or nothing."""
    if value is None:
        return []
    return [value] if isinstance(value, str) else list(np.atleast_1d(value))

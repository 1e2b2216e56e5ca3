"""Why cells are called unknown: which part of the score put them there, and which genes do not fit the nearest type."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from evercell.annotator import Annotator
from evercell.explaining.cells import Piece
from evercell.explaining.result import Unknown
from evercell.rejection import Outputs, Rejector
from evercell.rejection.combined import WEIGHTS, CombinedRejector
from evercell.rejection.markers import MarkersRejector
from evercell.tokenizers import View

KNOWN = 256  # cells of known types that unknown ones are compared with
PARTS = ("confidence", "prototypes", "markers")


def score_parts(rejector: Rejector, outputs: Outputs) -> dict[str, np.ndarray]:
    """The terms of the unknown score of cells (B,), by name; a rejector that is no sum has one."""
    if not isinstance(rejector, CombinedRejector):
        return {rejector.name: rejector.score(outputs)}
    spread = rejector.arrays["spread"]
    weights = WEIGHTS if "genes" in rejector.arrays else np.ones(2, dtype=np.float32)
    return dict(zip(PARTS, (rejector._scores(outputs) * (weights / spread)).T, strict=False))


def unknown_cells(
    pieces: Sequence[Piece], symbols: np.ndarray, known: dict[int, dict[str, float]], *, top: int
) -> Unknown | None:
    """Why those of the cells are called unknown that are; None where none is.

    `symbols` (G,) name the genes; `known` keeps the usual parts of each source from call to call.
    """
    rejected = [one.taken(np.flatnonzero(one.rejected)) for one in pieces if one.rejected.any()]
    if not rejected:
        return None
    sizes = np.array([len(one.rows) for one in rejected])
    threshold = float(np.average([one.threshold for one in rejected], weights=sizes))
    values = pd.DataFrame([_means(one) for one in rejected])
    for one in rejected:
        if id(one.labeller) not in known:
            known[id(one.labeller)] = usual_parts(one.model, one.view.measured)
    usual = pd.DataFrame([known[id(one.labeller)] for one in rejected], columns=values.columns)
    parts = pd.DataFrame({"part": values.columns})
    parts["value"] = np.average(values, axis=0, weights=sizes)
    parts["usual"] = np.average(usual, axis=0, weights=sizes)
    parts["surplus"] = parts["value"] - parts["usual"]
    score = float(parts["value"].sum())
    parts["decisive"] = score - parts["surplus"] <= threshold
    parts = parts.sort_values("surplus", ascending=False, kind="stable", ignore_index=True)
    missing, unexpected = (table.assign(gene=symbols[table["gene"]]) for table in _misfits(rejected, top))
    return Unknown(int(sizes.sum()), score, threshold, parts, missing, unexpected)


def _means(piece: Piece) -> dict[str, float]:
    parts = score_parts(piece.labeller.rejector, piece.outputs)
    return {name: float(values.mean(dtype=np.float64)) for name, values in parts.items()}


def usual_parts(model: Annotator, measured: np.ndarray) -> dict[str, float]:
    """Median of each part over cells of known types, seen through the genes `measured` (G,).

    They are cells that lie in the model, those that no training saw where there are any.
    """
    bank = model.sealed if model.sealed is not None and len(model.sealed) else model.examples
    if not len(bank) or model.rejector is None:
        return {}
    rows = np.unique(np.linspace(0, len(bank) - 1, KNOWN).astype(int))
    counts = bank.counts[rows].astype(np.float32)
    counts.data = counts.data * measured[counts.indices]
    counts.eliminate_zeros()
    view = View.whole(counts[np.flatnonzero(counts.getnnz(axis=1))], measured)
    parts = score_parts(model.rejector, model.outputs(view))
    return {name: float(np.median(values)) for name, values in parts.items()}


def _misfits(pieces: Sequence[Piece], top: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Genes (codes) that cost most of the correlation of cells with their types: too little of them, too much."""
    n_genes = len(pieces[0].view.measured)
    loss, expression, less, cells = np.zeros((4, n_genes))
    for one in pieces:
        rejector = one.labeller.rejector
        if not isinstance(rejector, CombinedRejector | MarkersRejector) or "genes" not in rejector.arrays:
            continue
        genes = rejector.arrays["genes"].astype(np.int64)
        logged = one.view.logged()[:, genes].toarray().astype(np.float64)
        deviation = logged - rejector.arrays["centre"]
        profile = rejector.arrays["profiles"][:, one.outputs.codes].T  # (B, M)
        seen = one.view.measured[genes]
        lost = _losses(deviation, profile) * seen
        np.add.at(loss, genes, lost.sum(axis=0))
        np.add.at(expression, genes, logged.sum(axis=0))
        np.add.at(less, genes, (deviation * (lost > 0)).sum(axis=0))
        np.add.at(cells, genes, float(len(logged)))
    found = []
    for sign in (less < 0, less > 0):
        order = np.argsort(-loss, kind="stable")
        order = order[(loss[order] > 0) & sign[order]][:top]
        n_cells = np.maximum(cells[order], 1)
        found.append(
            pd.DataFrame({"gene": order, "expression": expression[order] / n_cells, "loss": loss[order] / n_cells})
        )
    return found[0], found[1]


def _losses(deviation: np.ndarray, profile: np.ndarray) -> np.ndarray:
    """By how much the correlation of cells with profiles (B, M) would rise if they had the mean of a gene (B, M)."""
    along, squares = deviation * profile, deviation**2
    own, length = along.sum(axis=1, keepdims=True), np.maximum(squares.sum(axis=1, keepdims=True), 1e-9)
    found: np.ndarray = (own - along) / np.sqrt(np.maximum(length - squares, 1e-9)) - own / np.sqrt(length)
    return found

"""Learning to tell types, as the first training and every update do it: loss, look at held-out cells, calibration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import reduce
from operator import add
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_matrix
from torch import Tensor
from torch.nn import functional as F

from evercell.annotator import BATCH, Annotator, best_temperature
from evercell.augmentation import Augmentation
from evercell.bank import ExampleBank, balanced_rows
from evercell.discriminant import RunningSums
from evercell.evaluation import evaluate
from evercell.label_sets import LabelSets
from evercell.linear import LinearModel
from evercell.progress import progress
from evercell.rejection import Outputs, Rejector, best_rate
from evercell.sketches import Sketch
from evercell.stored_counts import CellCounts
from evercell.tokenizers import View
from evercell.training import TrainingSettings
from evercell.training_cells import TrainingCells

BLOCK = 32 * BATCH  # cells whose representations are made at a time
SUMMED = 1 << 16  # cells whose representations are summed up at a time
LEAST_SHARED = 200  # genes that all studies measured, from which on a rejector looks at these alone
LEFT_OUT = 1500  # training cells at most that a rejector is fitted on again where types are left out


@dataclass(frozen=True)
class Batch:
    """One training batch, as a strategy's penalty sees it.

    Parameters
    ----------
    rows
        Rows of the training cells (B,).
    view
        Random view of these cells.
    representation
        (B, D), with gradient.
    logits
        Of each member of the backbone (B, S, K), with gradient.
    """

    rows: np.ndarray
    view: View
    representation: Tensor
    logits: Tensor


def classification_loss(
    model: Annotator,
    cells: TrainingCells,
    weights: np.ndarray,
    *,
    training: TrainingSettings,
    augmentation: Augmentation,
    penalty: Callable[[Batch], Tensor | None] | None = None,
    loss_weights: np.ndarray | None = None,
) -> Callable[[np.random.Generator], Tensor]:
    """Cross-entropy with label smoothing on random views of randomly drawn cells, and what a strategy adds to it.

    `weights` (N,) say how often a cell is drawn, `loss_weights` (N,) what it counts then; None: all alike.
    """
    measured, device = cells.measured_by_any, model.device
    cumulative = np.cumsum(weights)

    def loss(rng: np.random.Generator) -> Tensor:
        rows = np.searchsorted(cumulative, rng.random(training.batch_size) * cumulative[-1])
        view = augmentation.view(cells.stored[rows], measured, rng)
        representation = model.backbone(model.tokenizer.tokenize(view).to(device))
        logits = model.head.member_logits(representation, model.backbone.members)  # (B, S, K)
        codes = torch.from_numpy(cells.codes[rows]).to(device).unsqueeze(1).expand(logits.shape[:2])
        logits_of_members, codes = logits.flatten(0, 1), codes.flatten()
        if loss_weights is None:
            value = F.cross_entropy(logits_of_members, codes, label_smoothing=training.label_smoothing)
        else:
            each = F.cross_entropy(
                logits_of_members, codes, label_smoothing=training.label_smoothing, reduction="none"
            ).unflatten(0, logits.shape[:2])  # (B, S)
            value = (torch.from_numpy(loss_weights[rows]).to(each).unsqueeze(1) * each).mean()
        more = None if penalty is None else penalty(Batch(rows, view, representation, logits))
        return value if more is None else value + more

    return loss


def held_out_loss(model: Annotator, cells: TrainingCells, most: int = 1000) -> Callable[[], dict[str, float]]:
    """Loss and accuracy of the transformer on held-out cells, at most `most` of them, evenly spaced."""
    rows = np.linspace(0, len(cells) - 1, min(most, len(cells))).astype(int)
    view = View.whole(cells.stored[rows], cells.measured_by_any)
    codes = torch.from_numpy(cells.codes[rows])

    def validate() -> dict[str, float]:
        _, logits = model.represent(view)
        found = torch.from_numpy(logits)
        accuracy = (found.argmax(dim=1) == codes).float().mean()
        return {"loss": float(F.cross_entropy(found, codes)), "accuracy": float(accuracy)}

    return validate


class CellsView(View):
    """View of more cells than should be in memory: its `counts` are `CellCounts`, for a rejector to read parts of."""

    def taken(self, rows: np.ndarray) -> View:
        """Only the cells `rows`, in memory if they are few."""
        rows = np.arange(len(self.totals))[rows]
        few = len(rows) <= BLOCK
        return (View if few else CellsView)(
            self.counts[rows] if few else self.counts.taken(rows), self.totals[rows], self.measured
        )

    def joined_with(self, few: View) -> CellsView:
        """These cells and then those of a view in memory; see `View.joined`."""
        counts, totals = self.counts.joined(CellCounts.of(few.counts)), np.concatenate([self.totals, few.totals])
        return CellsView(counts, totals, self.measured | few.measured)

    def logged(self) -> csr_matrix:
        """`log_normalised` as a matrix (B, G), CSR, of all cells in memory."""
        return View(self.counts[:], self.totals, self.measured).logged()


def outputs_of(model: Annotator, counts: CellCounts, measured: np.ndarray | None = None) -> Outputs:
    """What the model says of many cells, to the bit as `Annotator.outputs` says it, with few of them in memory."""
    if len(counts) <= BLOCK:
        return model.outputs(View.whole(counts[:], measured))
    # The model takes cells by their number of genes, `BATCH` at a time. So do the blocks, which are whole batches.
    order = np.argsort(np.diff(counts.indptr), kind="stable")
    parts = []
    for start in range(0, len(order), BLOCK):
        outputs = model.outputs(View.whole(counts[order[start : start + BLOCK]], measured))
        parts.append(replace(outputs, view=None))
    every = np.ones(counts.n_genes, dtype=bool) if measured is None else measured
    found = Outputs.joined(parts).taken(np.argsort(order))
    return replace(found, view=CellsView(counts, counts.totals(), every))


@progress("learning what unknown cells look like")
def fitted_rejector(model: Annotator, rejector: type[Rejector], cells: TrainingCells, *, seed: int) -> Rejector:
    """Rejector fitted on training cells, not calibrated yet."""
    return rejector.fitted(*example_outputs(model, cells, seed))


def example_outputs(model: Annotator, cells: TrainingCells, seed: int) -> tuple[Outputs, np.ndarray]:
    """What the model says of a class-balanced choice of training cells, and their codes."""
    rows = balanced_rows(cells.codes, 4000, np.random.default_rng(seed))
    outputs = model.outputs(View.whole(cells.stored[rows], cells.measured_by_any))
    shared = np.asarray(cells.measured.all(axis=0))
    if outputs.view is not None and shared.sum() >= LEAST_SHARED:
        # A gene that one study did not measure would be a marker against the cells of that study.
        outputs = replace(outputs, view=replace(outputs.view, measured=shared))
    return outputs, cells.codes[rows]


@progress("calibrating")
def calibrated(
    model: Annotator,
    rejector: type[Rejector],
    cells: TrainingCells,
    held_out: TrainingCells,
    *,
    seed: int,
    allowance: float | None = None,
) -> Annotator:
    """The model with temperature, rejector, default rate and label sets from held-out cells; see `with_thresholds`."""
    unseen = held_out.stored, held_out.measured_by_any
    uncalibrated = outputs_of(replace(model, temperature=1.0), *unseen)
    model = replace(model, temperature=best_temperature(uncalibrated.log_proba, held_out.codes))
    training, outputs = example_outputs(model, cells, seed), outputs_of(model, *unseen)
    return with_thresholds(model, rejector, training, (outputs, held_out.codes), seed=seed, allowance=allowance)


def with_thresholds(
    model: Annotator,
    rejector: type[Rejector],
    training: tuple[Outputs, np.ndarray],
    held_out: tuple[Outputs, np.ndarray],
    *,
    seed: int,
    allowance: float | None = None,
) -> Annotator:
    """The model with rejector and label sets from outputs of training cells and of held-out cells, with their codes.

    `allowance` is what thresholds of unknown cells are higher by for other studies; by default what `rejector` says.
    """
    outputs, codes = held_out
    more = rejector.another_study if allowance is None else allowance
    return replace(
        model,
        rejector=calibrated_rejector(rejector, training, held_out, seed=seed).allowing(more),
        sets=LabelSets.calibrated(outputs.log_proba, codes, len(model.types)),
    )


def calibrated_rejector(
    rejector: type[Rejector],
    training: tuple[Outputs, np.ndarray],
    held_out: tuple[Outputs, np.ndarray],
    *,
    seed: int,
) -> Rejector:
    """Rejector fitted on training cells (outputs, codes); thresholds and default rate from held-out ones."""
    few = balanced_rows(training[1], LEFT_OUT, np.random.default_rng(seed))  # it is fitted anew for every type
    rate = best_rate(rejector, (training[0].taken(few), training[1][few]), held_out)
    return rejector.fitted(*training).calibrated(held_out[0]).with_default_rate(rate)


def held_out_metrics(model: Annotator, baseline: LinearModel, held_out: TrainingCells) -> dict[str, Any]:
    """Figures of the model, of its transformer alone and of the linear baseline on held-out cells."""
    measured = held_out.measured_by_any
    outputs = outputs_of(model, held_out.stored, measured)
    linear = np.concatenate([baseline.log_proba(View.whole(block, measured)) for block in held_out.stored.blocks()])
    names = np.asarray(model.types.names)
    truth, transformer = names[held_out.codes], names[outputs.logits.argmax(axis=1)]
    told = evaluate(truth, names[linear.argmax(axis=1)], confidence=np.exp(linear.max(axis=1)))
    found = {
        "model": evaluate(truth, names[outputs.codes], confidence=outputs.confidence).to_dict(),
        "transformer": _short(evaluate(truth, transformer).figures()),
        "linear": _short(told.figures()),
    }
    if model.linear_only:
        del found["transformer"]
    return found


def _short(figures: dict[str, Any]) -> dict[str, Any]:
    """The figures that the report and the card print."""
    return {name: figures[name] for name in ("accuracy", "balanced_accuracy", "macro_f1", "weighted_f1", "ece")}


def features_of(model: Annotator, cells: TrainingCells | ExampleBank) -> np.ndarray:
    """What the classifier sees of each cell (N, W), float32: the representation, behind the head's hidden layers."""
    counts = cells.stored if isinstance(cells, TrainingCells) else cells.counts
    found = [np.zeros((0, model.head.classifier.in_features), dtype=np.float32)]
    for start in range(0, len(cells), BLOCK):
        representation, _ = model.represent(View.whole(counts[start : start + BLOCK]))
        with torch.inference_mode():
            found.append(model.head.features(torch.from_numpy(representation).to(model.device)).cpu().numpy())
    return np.concatenate(found)


def sums_of(model: Annotator, cells: TrainingCells | ExampleBank) -> RunningSums:
    """Running sums over cells, for the closed-form head of `analytic`."""
    if isinstance(cells, ExampleBank) or len(cells) <= SUMMED:
        return summed_up(features_of(model, cells), cells.codes, len(model.types))
    parts = [np.arange(start, min(start + SUMMED, len(cells))) for start in range(0, len(cells), SUMMED)]
    return reduce(add, (sums_of(model, cells.taken(part)) for part in parts))


def summed_up(features: np.ndarray, codes: np.ndarray, n_types: int) -> RunningSums:
    """Running sums over features (N, W) of cells with type `codes` (N,), some of them at a time."""
    parts = [slice(start, start + SUMMED) for start in range(0, max(len(codes), 1), SUMMED)]
    return reduce(add, (RunningSums.of(features[part], codes[part], n_types) for part in parts))


def sketch_of(model: Annotator, cells: TrainingCells, *, stage: int) -> Sketch:
    """Sketch of the cells of a stage; those of one type at a time are in memory."""
    stages = np.full(len(cells), stage)
    looked_at = ExampleBank(cells.stored, cells.codes, stages, cells.studies, cells.measured)
    return Sketch.of(looked_at, outputs_of(model, cells.stored).representation)


def sealed_figures(model: Annotator) -> dict[str, Any]:
    """Share of right labels on the sealed cells of each stage, by its number, and of each type (`recall`, `cells`)."""
    sealed = model.sealed
    if sealed is None or not len(sealed):
        return {"stages": {}, "types": {}}
    right = model.outputs(View.whole(sealed.counts)).codes == sealed.codes
    of_types = {model.types.names[code]: right[sealed.codes == code] for code in np.unique(sealed.codes)}
    return {
        "stages": {str(stage): float(right[sealed.stages == stage].mean()) for stage in np.unique(sealed.stages)},
        "types": {name: {"cells": len(cells), "recall": float(cells.mean())} for name, cells in of_types.items()},
    }

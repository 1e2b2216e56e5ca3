"""What updates draw from the sketches of earlier stages: representations for the head, made-up cells for the rest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from evercell.annotator import Annotator, best_temperature, tempered
from evercell.bank import balanced_rows
from evercell.classification import CellsView, outputs_of, with_thresholds
from evercell.discriminant import RunningSums
from evercell.rejection import Outputs, Rejector
from evercell.sketches import DRAWN, Sketch
from evercell.tokenizers import View
from evercell.training_cells import TrainingCells

BATCH = 64
"""Representations drawn at a training step."""
CALIBRATION = 300
"""Draws that stand for the types of sketched stages where held-out cells set temperature and thresholds."""


def recalled_loss(model: Annotator, sketch: Sketch, label_smoothing: float) -> Callable[[], Tensor]:
    """Cross-entropy of the head on Gaussian draws of the representations, types drawn alike.

    Draws come from torch's random state, which the training loop seeds and stores.
    """
    device, members = model.device, model.backbone.members
    means, factors = torch.from_numpy(sketch.means).to(device), torch.from_numpy(sketch.factors()).to(device)
    codes = torch.from_numpy(sketch.codes).to(device)
    weights = torch.from_numpy(1.0 / np.bincount(sketch.codes)[sketch.codes])

    def loss() -> Tensor:
        entries = torch.multinomial(weights, BATCH, replacement=True).to(device)
        noise = torch.randn(BATCH, means.shape[1]).to(device)
        drawn = means[entries] + torch.einsum("bij,bj->bi", factors[entries], noise)
        logits = model.head.member_logits(drawn, members)  # (B, S, K)
        of_members = codes[entries].unsqueeze(1).expand(logits.shape[:2])
        return F.cross_entropy(logits.flatten(0, 1), of_members.flatten(), label_smoothing=label_smoothing)

    return loss


def followed(sketch: Sketch, old: Annotator, new: Annotator, *, seed: int) -> Sketch:
    """The sketch with its means moved as the new backbone moves the mean of made-up cells of each entry.

    Source of the idea: Yu et al., Semantic drift compensation, CVPR 2020, who take the cells of the new data set.
    """
    numbers = sketch.numbers(DRAWN)
    cells = sketch.cells(numbers, np.random.default_rng(seed))
    before, _ = old.represent(View.whole(cells.counts[:, : len(old.vocabulary)].tocsr()))
    after, _ = new.represent(View.whole(cells.counts))
    return sketch.moved(np.add.reduceat(after - before, np.cumsum(numbers) - numbers) / numbers[:, None])


def drawn_sums(model: Annotator, sketch: Sketch, *, seed: int) -> RunningSums:
    """Running sums over as many draws as a bank would have cells."""
    numbers = sketch.numbers(DRAWN)
    representation = torch.from_numpy(sketch.representations(numbers, np.random.default_rng(seed)))
    with torch.inference_mode():
        features = model.head.features(representation.to(model.device)).cpu().numpy()
    return RunningSums.of(features, np.repeat(sketch.codes, numbers), len(model.types))


def drawn_outputs(model: Annotator, sketch: Sketch, numbers: np.ndarray, *, seed: int) -> tuple[Outputs, np.ndarray]:
    """What the model says of draws of a sketch, `numbers` of each entry (E,), and their type codes (N,).

    The head is asked of a drawn representation; what needs counts sees a made-up cell of the same type.
    """
    representation = sketch.representations(numbers, np.random.default_rng([seed, 0]))
    cells = sketch.cells(numbers, np.random.default_rng([seed, 1]))
    view = View.whole(cells.counts, np.asarray(sketch.measured.any(axis=0)))
    with torch.inference_mode():
        found = model.head(torch.from_numpy(representation).to(model.device)).float().cpu()
    log_proba = model.averaged(F.log_softmax(found, dim=1).numpy(), view)
    outputs = Outputs(representation, found.numpy(), tempered(log_proba, model.temperature), view)
    return outputs, np.repeat(sketch.codes, numbers)


def rejector_with_sketch(
    model: Annotator, rejector: type[Rejector], cells: TrainingCells, sketch: Sketch, *, seed: int
) -> Rejector:
    """Rejector fitted on training cells and draws of the sketch, not calibrated yet."""
    return rejector.fitted(*_known(model, cells, sketch, seed))


def calibrated_with_sketch(
    model: Annotator,
    rejector: type[Rejector],
    cells: TrainingCells,
    held_out: TrainingCells,
    sketch: Sketch,
    *,
    seed: int,
    allowance: float | None = None,
) -> Annotator:
    """The model with temperature and thresholds set on held-out cells and, for sketched stages, on draws."""
    plain = replace(model, temperature=1.0)
    drawn, drawn_codes = drawn_outputs(plain, sketch, sketch.numbers(CALIBRATION), seed=seed + 1)
    said = _with_draws(outputs_of(plain, held_out.stored, held_out.measured_by_any), drawn)
    codes = np.concatenate([held_out.codes, drawn_codes])
    model = replace(model, temperature=best_temperature(said.log_proba, codes))
    said = replace(said, log_proba=tempered(said.log_proba, model.temperature))
    known = _known(model, cells, sketch, seed)
    return with_thresholds(model, rejector, known, (said, codes), seed=seed, allowance=allowance)


def _with_draws(outputs: Outputs, drawn: Outputs) -> Outputs:
    """Outputs of cells, which may not all be in memory, and of draws."""
    if not isinstance(outputs.view, CellsView) or drawn.view is None:
        return Outputs.joined([outputs, drawn])
    found = Outputs.joined([replace(one, view=None) for one in (outputs, drawn)])
    return replace(found, view=outputs.view.joined_with(drawn.view))


def _known(model: Annotator, cells: TrainingCells, sketch: Sketch, seed: int) -> tuple[Outputs, np.ndarray]:
    """What the model says of a class-balanced choice of training cells and of draws of the sketch, and their codes."""
    rows = balanced_rows(cells.codes, 4000, np.random.default_rng(seed))
    outputs = model.outputs(View.whole(cells.stored[rows], cells.measured_by_any))
    drawn, codes = drawn_outputs(model, sketch, sketch.numbers(DRAWN), seed=seed)
    return Outputs.joined([outputs, drawn]), np.concatenate([cells.codes[rows], codes])

"""A head on a frozen backbone, in seconds: representations are made once, and logistic regression is fitted on them."""

from __future__ import annotations

import numpy as np
import torch

from evercell.annotator import Annotator
from evercell.augmentation import Augmentation
from evercell.linear import alike, logistic_regression, sampled
from evercell.tokenizers import View
from evercell.training_cells import TrainingCells

MOST_CELLS = 6000
VIEWS = 3
"""Random views of each cell beside the whole one; a head then holds for shallower cells and smaller panels too."""
STRENGTH = 0.01
"""Inverse of the L2 penalty on standardised representations."""
BLOCK = 128  # cells that share a random panel


def fit_head(model: Annotator, cells: TrainingCells, augmentation: Augmentation, *, seed: int) -> None:
    """Set the classifier of `model` to logistic regression on representations of the cells, types weighted alike."""
    model.backbone.eval()
    model.head.eval()
    rng = np.random.default_rng(seed)
    rows = sampled(cells.codes, MOST_CELLS, rng)
    counts, codes, measured = cells.stored[rows], cells.codes[rows], cells.measured_by_any
    found = [model.represent(View.whole(counts, measured))[0]]
    for _ in range(VIEWS):
        # Neighbours in the file are of one type or donor: a panel must not be theirs alone.
        order = rng.permutation(len(rows))
        parts = [order[i : i + BLOCK] for i in range(0, len(order), BLOCK)]
        seen = np.empty_like(found[0])
        for part in parts:
            seen[part] = model.represent(augmentation.view(counts[part], measured, rng))[0]
        found.append(seen)
    features, codes = np.concatenate(found), np.tile(codes, len(found))
    mean, spread = features.mean(axis=0), features.std(axis=0) + 1e-6
    weight, bias = logistic_regression(
        (features - mean) / spread,
        codes,
        n_types=model.head.n_types,
        strength=STRENGTH,
        weights=alike(codes, codes),
    )
    weight = weight / spread[:, None]
    with torch.no_grad():
        model.head.classifier.weight.copy_(torch.from_numpy(weight.T.astype(np.float32)))
        model.head.classifier.bias.copy_(torch.from_numpy((bias - mean @ weight).astype(np.float32)))

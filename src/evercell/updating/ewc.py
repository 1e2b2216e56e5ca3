"""`ewc`: weights that the old types depend on are held near their old values.

Source: Kirkpatrick et al., PNAS 2017.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from evercell.bank import balanced_rows
from evercell.classification import Batch
from evercell.threads import threads_of
from evercell.tokenizers import View
from evercell.updating.base import StageContext, Strategy

STRENGTH = 1000.0
MOST_CELLS = 200  # a gradient of its own each


class EwcStrategy(Strategy):
    """``strength / 2 sum F (w - w_old)^2`` with the diagonal of the Fisher information F over bank cells."""

    name: ClassVar[str] = "ewc"

    def __init__(self) -> None:
        self.old: dict[str, Tensor] = {}
        self.fisher: dict[str, Tensor] = {}

    def begin(self, stage: StageContext) -> None:
        """Squared gradients of the log-probability of the right type, averaged over cells of the bank."""
        super().begin(stage)
        model, bank = stage.model, stage.examples
        weights = self._weights(stage)
        self.old = {name: weight.detach().clone() for name, weight in weights.items()}
        self.fisher = {name: torch.zeros_like(weight) for name, weight in weights.items()}
        rows = balanced_rows(bank.codes, MOST_CELLS, np.random.default_rng(stage.seed))
        n_old = len(stage.teacher.types)
        model.head.eval()
        with threads_of(model.backbone):
            for row in rows:
                view = View.whole(bank.counts[[row]])
                logits = model.head(model.backbone(model.tokenizer.tokenize(view).to(model.device)))[:, :n_old]
                value = F.cross_entropy(logits, torch.tensor([int(bank.codes[row])], device=model.device))
                gradients = torch.autograd.grad(value, list(weights.values()), allow_unused=True)
                for name, gradient in zip(weights, gradients, strict=True):
                    if gradient is not None:
                        self.fisher[name] += gradient.square() / len(rows)

    def penalty(self, stage: StageContext, batch: Batch) -> Tensor | None:
        """Squared distance to the old weights, weighed by the Fisher information; zero for rows of new types."""
        weights = self._weights(stage)
        parts = [(self.fisher[name] * (weight - self.old[name]).square()).sum() for name, weight in weights.items()]
        return STRENGTH / 2 * torch.stack(parts).sum()

    @staticmethod
    def _weights(stage: StageContext) -> dict[str, Tensor]:
        parts = {"backbone": stage.model.backbone, "head": stage.model.head}
        return {
            f"{part}.{name}": weight
            for part, module in parts.items()
            for name, weight in module.named_parameters()
            if weight.requires_grad
        }

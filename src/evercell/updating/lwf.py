"""`lwf`: the old model's answers on the new cells are learnt beside the labels; no old cells are needed.

Source: Li and Hoiem, Learning without Forgetting, 2016.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from evercell.classification import Batch
from evercell.updating.base import StageContext, Strategy

TEMPERATURE = 2.0


class LwfStrategy(Strategy):
    """``T^2 KL(old || new)`` over the old types, answers softened by the temperature T = 2."""

    name: ClassVar[str] = "lwf"
    uses_bank: ClassVar[bool] = False

    def penalty(self, stage: StageContext, batch: Batch) -> Tensor | None:
        """Divergence from the teacher's answers, on cells that show it a gene at all."""
        _, old = stage.taught(batch.view)
        known = batch.view.counts[:, : len(stage.teacher.vocabulary)]
        seen = torch.from_numpy(np.flatnonzero(np.diff(known.indptr))).to(old.device)
        if not len(seen):
            return None
        new = batch.logits.mean(dim=1)[seen, : old.shape[1]]
        answers = F.log_softmax(old[seen] / TEMPERATURE, dim=1)
        divergence = F.kl_div(F.log_softmax(new / TEMPERATURE, dim=1), answers, log_target=True, reduction="batchmean")
        return TEMPERATURE**2 * divergence

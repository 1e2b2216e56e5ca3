"""`canal`, the default: bank cells are learnt again, and the old representation is held on to.

Source: Wan et al., CANAL, Briefings in Bioinformatics 2024, bbae047.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from evercell.classification import Batch
from evercell.updating.base import StageCells, StageContext, Strategy, replayed


class CanalStrategy(Strategy):
    """Replay and ``lambda n_old / n_types MSE(features, old features)``; last block, norms and head are trained."""

    name: ClassVar[str] = "canal"
    trained: ClassVar[Literal["everything", "last layers", "nothing"]] = "last layers"
    replays: ClassVar[bool] = True

    def training_cells(self, stage: StageContext) -> StageCells:
        """Bank and new cells."""
        return replayed(stage)

    def penalty(self, stage: StageContext, batch: Batch) -> Tensor | None:
        """Distance of the features to the teacher's, on cells that show it a gene at all."""
        n_old, n_types = len(stage.teacher.types), len(stage.model.types)
        features = stage.model.head.features(batch.representation)
        old, _ = stage.taught(batch.view)
        known = batch.view.counts[:, : len(stage.teacher.vocabulary)]
        seen = torch.from_numpy(np.flatnonzero(np.diff(known.indptr))).to(features.device)
        if not len(seen):
            return None
        return stage.settings.distillation * n_old / n_types * F.mse_loss(features[seen], old[seen])

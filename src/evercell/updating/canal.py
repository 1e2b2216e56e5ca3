"""`canal`, the default: bank cells are learnt again, and the old representation is held on to.

Source: Wan et al., CANAL, Briefings in Bioinformatics 2024, bbae047.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from evercell.classification import Batch
from evercell.updating.base import StageCells, StageContext, Strategy, replayed, trained_weights


class CanalStrategy(Strategy):
    """Replay and ``lambda n_old / n_types MSE(features, old features)``.

    CANAL trains the last block, the norms and the head alone (`UpdateSettings.trained`, ``last layers``). Without a
    backbone pretrained on many tissues that is too little to learn a new tissue by (docs/log.md), so all is trained.
    """

    name: ClassVar[str] = "canal"
    replays: ClassVar[bool] = True

    def begin(self, stage: StageContext) -> None:
        """Choose the weights to be trained as the settings say."""
        trained_weights(stage, stage.settings.trained)

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

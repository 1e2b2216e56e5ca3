"""`replay`: bank cells are learnt again beside the new ones, with all weights."""

from __future__ import annotations

from typing import ClassVar

from evercell.updating.base import StageCells, StageContext, Strategy, replayed


class ReplayStrategy(Strategy):
    """Cross-entropy on bank and new cells, nothing else."""

    name: ClassVar[str] = "replay"
    replays: ClassVar[bool] = True

    def training_cells(self, stage: StageContext) -> StageCells:
        """Bank and new cells."""
        return replayed(stage)

"""`joint`: the data sets of earlier stages are given again and learnt with the new one; the ceiling for the others."""

from __future__ import annotations

from typing import ClassVar

from evercell.errors import SettingsError
from evercell.updating.base import StageCells, StageContext, Strategy


class JointStrategy(Strategy):
    """Cross-entropy on all cells of all stages."""

    name: ClassVar[str] = "joint"

    def training_cells(self, stage: StageContext) -> StageCells:
        """Old and new data sets."""
        if stage.earlier is None:
            raise SettingsError(
                "the strategy `joint` learns from all data sets, but those of earlier stages were not given",
                hint="give them with joint_with, or choose the strategy canal",
            )
        cells = stage.earlier.joined(stage.cells)
        return StageCells(cells, cells.sampling_weights(stage.settings.balance))

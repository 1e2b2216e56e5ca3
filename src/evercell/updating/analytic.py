"""`analytic`: the backbone stays as it is, and the head is computed from running sums: exactly that of joint training.

See `evercell.discriminant`. The sums of earlier stages come with the model. After a stage of another strategy, which
moved the representation, they are those of that stage's bank and cells.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch

from evercell.annotator import Annotator
from evercell.classification import sums_of
from evercell.discriminant import RunningSums
from evercell.updating.base import StageContext, Strategy, refilled


class AnalyticStrategy(Strategy):
    """No training steps, no forgetting by construction, the same head in whatever order the data sets come."""

    name: ClassVar[str] = "analytic"
    trained: ClassVar[Literal["everything", "nothing"]] = "nothing"
    learns_genes: ClassVar[bool] = False

    def end(self, stage: StageContext) -> Annotator:
        """Add the new cells to the sums and set the head to what follows from them."""
        old = RunningSums.stored(stage.teacher.strategy_state)
        if old is None:
            old = sums_of(stage.model, stage.examples)
        sums = old + sums_of(stage.model, stage.cells)
        weight, bias = sums.classifier()
        classifier = stage.model.head.classifier
        with torch.no_grad():
            classifier.weight.copy_(torch.from_numpy(weight))
            classifier.bias.copy_(torch.from_numpy(bias))
        return refilled(stage, sums=sums)

"""One stage of learning: a strategy's hooks around the training loop, with calibration before and a refit after."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from evercell.annotator import Annotator
from evercell.augmentation import Augmentation
from evercell.bank import ExampleBank
from evercell.celltypes import CellTypes
from evercell.classification import (
    Batch,
    calibrated,
    classification_loss,
    fitted_rejector,
    held_out_loss,
    held_out_metrics,
)
from evercell.errors import ModelError
from evercell.evaluation import split_cells
from evercell.genes import GeneVocabulary
from evercell.linear import fit_linear
from evercell.progress import progress
from evercell.sketches import DRAWN, Sketch
from evercell.threads import threads_of
from evercell.training import History, fit
from evercell.training_cells import TrainingCells
from evercell.updating.base import StageContext, Strategy, UpdateSettings, of_bank
from evercell.updating.growth import grown
from evercell.updating.recall import calibrated_with_sketch, recalled_loss, rejector_with_sketch
from evercell.updating.unseen import allowance


@dataclass(frozen=True)
class Made:
    """A new model that waits for the gate, and what is to be told of its making."""

    model: Annotator
    settings: UpdateSettings
    metrics: dict[str, Any]
    history: History


@dataclass(frozen=True)
class StageMaker:
    """Makes the new model of one stage by one strategy."""

    old: Annotator
    types: CellTypes
    vocabulary: GeneVocabulary
    cells: TrainingCells
    earlier: TrainingCells | None
    train: np.ndarray
    held_out: np.ndarray
    sealed: np.ndarray
    seed: int
    shown: bool | None
    keeps_cells: bool = True
    unlearnt: Sequence[Mapping[str, Any]] = ()

    def made(self, strategy: type[Strategy], settings: UpdateSettings, folder: Path | None) -> Made:
        """The model trained with cells held out, to calibrate and score it; then, if asked for, on all unsealed."""
        if not strategy.learns_genes and len(self.vocabulary) > len(self.old.vocabulary):
            return self._over_old_genes().made(strategy, settings, folder)
        if self.old.rejector is None:
            raise ModelError("the model is not calibrated", hint="make it again with `evercell train`")
        rejector = type(self.old.rejector)
        more = allowance(self.old, self.unlearnt, rejector)
        bank, held_out = self.old.bank.widened(len(self.vocabulary)), self.cells.taken(self.held_out)
        kept, looked_at = bank, held_out
        if strategy.uses_bank and self.earlier is None and strategy.trained != "nothing" and len(bank) > 1:
            again = split_cells(bank.codes, test_share=settings.held_out, seed=self.seed)
            kept, looked_at = bank.taken(again.train), of_bank(bank.taken(again.validation)).joined(held_out)
        recalls = self._recalls(strategy)
        if recalls and (others := self._drawn(self.seed + 1)) is not None:
            looked_at = of_bank(others).joined(looked_at)
        model, history, stage = self._trained(strategy(), settings, (self.train, kept, looked_at), bank, folder)
        seen, _ = _seen(strategy, stage)

        baseline = fit_linear(seen.stored, seen.codes, n_types=len(self.types), seed=self.seed)
        unseen = held_out
        if self.old.sealed is not None and len(self.old.sealed):
            unseen = of_bank(self.old.sealed.widened(len(self.vocabulary))).joined(held_out)
        if recalls:
            real = of_bank(stage.bank).joined(stage.cells)
            model = calibrated_with_sketch(
                model, rejector, real, unseen, self._carried(model), seed=self.seed, allowance=more
            )
        else:
            model = calibrated(model, rejector, seen, unseen, seed=self.seed, allowance=more)
        metrics = held_out_metrics(model, baseline, held_out)
        if settings.refit and model.rejector is not None:
            rows = np.setdiff1d(np.arange(len(self.cells)), self.sealed)
            first, rejected_as = model, model.rejector
            model, _, stage = self._trained(strategy(), settings, (rows, bank, None), bank, folder)
            if recalls:
                real = of_bank(stage.bank).joined(stage.cells)
                fitted = rejector_with_sketch(model, rejector, real, self._carried(model), seed=self.seed)
            else:
                fitted = fitted_rejector(model, rejector, _seen(strategy, stage)[0], seed=self.seed)
            fitted = fitted.calibrated_as(rejected_as)
            model = replace(model, temperature=first.temperature, rejector=fitted, sets=first.sets)
        return Made(model, settings, metrics, history)

    def _recalls(self, strategy: type[Strategy]) -> bool:
        """Whether the strategy is to be told of earlier stages by sketches."""
        return self.old.sketch is not None and strategy.uses_bank and self.earlier is None

    def _carried(self, model: Annotator) -> Sketch:
        """The sketches of earlier stages, as the new model carries them on."""
        if self.old.sketch is None or model.sketch is None:
            raise ValueError("the old model has no sketch")
        return model.sketch.taken(np.arange(len(self.old.sketch)))

    def _drawn(self, seed: int) -> ExampleBank | None:
        """Made-up cells of earlier stages that are only sketched."""
        if self.old.sketch is None:
            return None
        sketch = self.old.sketch.widened(len(self.vocabulary))
        return sketch.cells(sketch.numbers(DRAWN), np.random.default_rng(seed))

    def _over_old_genes(self) -> StageMaker:
        columns = np.arange(len(self.old.vocabulary))
        earlier = None if self.earlier is None else self.earlier.over_genes(columns)
        return replace(self, vocabulary=self.old.vocabulary, cells=self.cells.over_genes(columns), earlier=earlier)

    def _trained(
        self,
        strategy: Strategy,
        settings: UpdateSettings,
        parts: tuple[np.ndarray, ExampleBank, TrainingCells | None],
        whole_bank: ExampleBank,
        folder: Path | None,
    ) -> tuple[Annotator, History, StageContext]:
        """One training by a strategy, its four hooks around `fit`; bank cells that were looked at stay in the bank."""
        rows, bank, looked_at = parts
        teacher = self.old.frozen_copy()
        model = grown(self.old, self.types, self.vocabulary, seed=self.seed)
        stage = StageContext(
            teacher,
            model,
            self.cells.taken(rows),
            bank,
            self.earlier,
            settings,
            self.seed,
            drawn=self._drawn(self.seed),
            keeps_cells=self.keeps_cells,
        )
        strategy.begin(stage)
        drawn = strategy.training_cells(stage)
        history = History()
        if strategy.trained != "nothing":
            recalled = None
            if strategy.replays and model.sketch is not None:
                recalled = recalled_loss(model, model.sketch, settings.training.label_smoothing)

            def penalty(batch: Batch) -> Tensor | None:
                more = strategy.penalty(stage, batch)
                if recalled is None:
                    return more
                again = settings.replay * recalled()
                return again if more is None else more + again

            loss = classification_loss(
                model,
                drawn.cells,
                drawn.weights,
                training=settings.training,
                augmentation=settings.augmentation or Augmentation(),
                penalty=penalty,
            )
            part = "try" if looked_at is not None else "all"
            words = "learning the new cells" if looked_at is not None else "learning all cells"
            with progress(words, shown=self.shown) as step, threads_of(model.backbone):
                history = fit(
                    nn.ModuleDict({"backbone": model.backbone, "head": model.head}),
                    loss,
                    settings.training,
                    seed=self.seed,
                    validate=None if looked_at is None else held_out_loss(model, looked_at),
                    state_folder=None if folder is None else folder / part,
                    on_step=step,
                )
        stage = replace(stage, bank=whole_bank)
        done = strategy.end(stage)
        # Copies, because a copy has none of the hooks by which a strategy kept gradients from some weights.
        done = replace(done, backbone=copy.deepcopy(done.backbone), head=copy.deepcopy(done.head))
        done.backbone.requires_grad_(True)
        done.head.requires_grad_(True)
        if strategy.uses_bank and (self.old.linear is not None or self.old.profiles is not None):
            seen, stages = _seen(type(strategy), stage)
            if self.old.linear is not None:
                done = replace(done, linear=strategy.linear_member(stage, seen, stages))
            if self.old.profiles is not None:
                done = replace(done, profiles=seen.profiles(len(self.types)))
        return done, history, stage


def _seen(strategy: type[Strategy], stage: StageContext) -> tuple[TrainingCells, np.ndarray]:
    """Cells of all stages that a strategy may see, made-up ones of those that are only sketched; stage of each (N,)."""
    if not strategy.uses_bank:
        return stage.cells, np.full(len(stage.cells), stage.stage)
    earlier = stage.examples.stages if stage.earlier is None else stage.earlier.studies + 1
    stages = np.concatenate([earlier, np.full(len(stage.cells), stage.stage)])
    return stage.remembered().joined(stage.cells), stages

"""One stage of learning: a strategy's hooks around the training loop, with calibration before and a refit after."""

from __future__ import annotations

import copy
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
from evercell.linear import fit_linear, linear_member
from evercell.progress import progress
from evercell.threads import threads_of
from evercell.training import History, fit
from evercell.training_cells import TrainingCells
from evercell.updating.base import StageContext, Strategy, UpdateSettings, joined_cells, of_bank
from evercell.updating.growth import grown


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

    def made(self, strategy: type[Strategy], settings: UpdateSettings, folder: Path | None) -> Made:
        """The model trained with cells held out, to calibrate and score it; then, if asked for, on all unsealed."""
        if not strategy.learns_genes and len(self.vocabulary) > len(self.old.vocabulary):
            return self._over_old_genes().made(strategy, settings, folder)
        if self.old.rejector is None:
            raise ModelError("the model is not calibrated", hint="make it again with `evercell train`")
        rejector = type(self.old.rejector)
        bank, held_out = self.old.bank.widened(len(self.vocabulary)), self.cells.taken(self.held_out)
        kept, looked_at = bank, held_out
        if strategy.uses_bank and self.earlier is None and strategy.trained != "nothing" and len(bank) > 1:
            again = split_cells(bank.codes, test_share=settings.held_out, seed=self.seed)
            kept, looked_at = bank.taken(again.train), joined_cells(of_bank(bank.taken(again.validation)), held_out)
        model, history, seen = self._trained(strategy(), settings, (self.train, kept, looked_at), folder)

        baseline = fit_linear(seen.counts, seen.codes, n_types=len(self.types), seed=self.seed)
        unseen = held_out
        if self.old.sealed is not None and len(self.old.sealed):
            unseen = joined_cells(of_bank(self.old.sealed.widened(len(self.vocabulary))), held_out)
        model = calibrated(model, rejector, seen, unseen, seed=self.seed)
        metrics = held_out_metrics(model, baseline, held_out)
        if settings.refit and model.rejector is not None:
            rows = np.setdiff1d(np.arange(len(self.cells)), self.sealed)
            temperature, first = model.temperature, model.rejector
            model, _, seen = self._trained(strategy(), settings, (rows, bank, None), folder)
            fitted = fitted_rejector(model, rejector, seen, seed=self.seed)
            model = replace(model, temperature=temperature, rejector=fitted.calibrated_as(first))
        return Made(model, settings, metrics, history)

    def _over_old_genes(self) -> StageMaker:
        columns = np.arange(len(self.old.vocabulary))
        earlier = None if self.earlier is None else self.earlier.over_genes(columns)
        return replace(self, vocabulary=self.old.vocabulary, cells=self.cells.over_genes(columns), earlier=earlier)

    def _trained(
        self,
        strategy: Strategy,
        settings: UpdateSettings,
        parts: tuple[np.ndarray, ExampleBank, TrainingCells | None],
        folder: Path | None,
    ) -> tuple[Annotator, History, TrainingCells]:
        """One training by a strategy, its four hooks around `fit`; also the cells of all stages that it could see."""
        rows, bank, looked_at = parts
        teacher = self.old.frozen_copy()
        model = grown(self.old, self.types, self.vocabulary, seed=self.seed)
        stage = StageContext(teacher, model, self.cells.taken(rows), bank, self.earlier, settings, self.seed)
        strategy.begin(stage)
        drawn = strategy.training_cells(stage)
        history = History()
        if strategy.trained != "nothing":

            def penalty(batch: Batch) -> Tensor | None:
                return strategy.penalty(stage, batch)

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
        done = strategy.end(stage)
        # Copies, because a copy has none of the hooks by which a strategy kept gradients from some weights.
        done = replace(done, backbone=copy.deepcopy(done.backbone), head=copy.deepcopy(done.head))
        done.backbone.requires_grad_(True)
        done.head.requires_grad_(True)
        seen = joined_cells(stage.remembered(), stage.cells) if strategy.uses_bank else stage.cells
        if self.old.linear is not None and strategy.uses_bank:
            # Fitted again on cells of all stages, every type weighing alike: old types stay as the bank shows them.
            done = replace(done, linear=linear_member(seen.counts, seen.codes, len(self.types), self.seed))
        return done, history, seen

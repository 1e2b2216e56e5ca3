"""What every strategy shares: the four hooks around the training loop, and what they are given."""

from __future__ import annotations

import dataclasses
from abc import ABC
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from evercell.annotator import Annotator
from evercell.augmentation import Augmentation
from evercell.bank import ExampleBank, kinds_of
from evercell.bank_selection import SELECTIONS, selected_rows
from evercell.classification import Batch, features_of, sketch_of, summed_up
from evercell.discriminant import RunningSums
from evercell.errors import SettingsError
from evercell.linear import LinearModel, linear_member
from evercell.stored_counts import CellCounts
from evercell.tokenizers import View
from evercell.training import TrainingSettings
from evercell.training_cells import TrainingCells, check_balance
from evercell.updating.recall import drawn_sums, followed


@dataclass(frozen=True)
class UpdateSettings:
    """How a model learns a new data set; the ledger stores this.

    Parameters
    ----------
    training
        See `TrainingSettings`.
    augmentation
        Random views of training cells; None takes those that the model was made with.
    replay
        Least share of the training draws that are cells of the bank (or made up from sketches), see `replayed`; also
        the weight of what the head learns of representations drawn from sketches. 0 draws every cell of bank and new
        data as often, as CANAL does.
    distillation
        Weight of keeping the old representation (CANAL's lambda).
    trained
        Weights that `canal` trains: ``everything``, or the ``last layers`` as CANAL does.
    selection
        How the bank chooses its cells: ``herding``, ``random``, ``nearest`` or ``kcentre``.
    bank
        Size of the bank afterwards; None keeps the size that the model was made with.
    balance
        How cells of the new data set are drawn: ``sqrt``, ``oversample`` or ``none``, see `ModelSettings`.
    held_out
        Share of the new cells held out to stop early, calibrate and report on.
    refit
        Train once more on all cells, held-out ones included but for those that are sealed.
    sealed
        Most cells to seal in this stage.
    new_genes
        Learn of genes that the model does not have yet.
    least_cells
        A new gene must be expressed in this many training cells.
    """

    training: TrainingSettings = field(
        default_factory=lambda: TrainingSettings(samples=12_000, learning_rate=1e-3, evaluations=6)
    )
    augmentation: Augmentation | None = None
    replay: float = 0.4
    distillation: float = 0.1
    trained: Literal["everything", "last layers"] = "everything"
    selection: str = "herding"
    bank: int | None = None
    balance: str = "sqrt"
    held_out: float = 0.15
    refit: bool = False
    sealed: int = 500
    new_genes: bool = True
    least_cells: int = 3

    def __post_init__(self) -> None:
        check_balance(self.balance)
        if self.balance == "weights":
            raise SettingsError("an update draws cells, it weights none", hint="choose sqrt, oversample or none")
        if self.selection not in SELECTIONS:
            raise SettingsError(
                f"there is no selection `{self.selection}`", hint=f"choose one of: {', '.join(SELECTIONS)}"
            )
        if self.trained not in ("everything", "last layers"):
            raise SettingsError(f"trained must be `everything` or `last layers`, not `{self.trained}`")
        if not 0 < self.held_out < 1 or not 0 <= self.replay < 1:
            raise SettingsError(f"held_out and replay must lie between 0 and 1, not {self.held_out} and {self.replay}")

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class StageContext:
    """One stage of learning.

    Parameters
    ----------
    teacher
        Frozen copy of the old model.
    model
        Model being trained: the old one, grown to the new types and genes.
    cells
        Labelled cells of the new data set to train on.
    bank
        Example cells of earlier stages, over the genes of `model`.
    earlier
        Data sets of earlier stages given again, for `joint`.
    settings, seed
        Of the update.
    drawn
        Made-up cells of earlier stages that are only sketched, over the genes of `model`.
    keeps_cells
        Whether cells of this stage may be kept; otherwise they are sketched.
    """

    teacher: Annotator
    model: Annotator
    cells: TrainingCells
    bank: ExampleBank
    earlier: TrainingCells | None
    settings: UpdateSettings
    seed: int
    drawn: ExampleBank | None = None
    keeps_cells: bool = True

    @property
    def stage(self) -> int:
        """Number of the stage."""
        return len(self.teacher.ledger) + 1

    @property
    def examples(self) -> ExampleBank:
        """The bank, and made-up cells of the stages that are only sketched."""
        return self.bank if self.drawn is None else self.bank.joined(self.drawn)

    def remembered(self) -> TrainingCells:
        """Cells of earlier stages that are at hand: the data sets given again, or else the examples."""
        return self.earlier if self.earlier is not None else of_bank(self.examples)

    def taught(self, view: View) -> tuple[Tensor, Tensor]:
        """What the teacher makes of a view: features (B, W) and logits (B, K of the teacher), without gradients."""
        n_genes = len(self.teacher.vocabulary)
        known = View(view.counts[:, :n_genes].tocsr(), view.totals, view.measured[:n_genes])
        with torch.no_grad():
            tokens = self.teacher.tokenizer.tokenize(known).to(self.model.device)
            representation = self.teacher.backbone(tokens)
            return self.teacher.head.features(representation), self.teacher.head(representation)


@dataclass(frozen=True)
class StageCells:
    """Cells that a strategy trains on, and the probability with which each is drawn (N,)."""

    cells: TrainingCells
    weights: np.ndarray


class Strategy(ABC):
    """How an update keeps what earlier stages learnt. One instance serves one training; it may keep what it needs."""

    name: ClassVar[str]
    trained: ClassVar[Literal["everything", "nothing"]] = "everything"
    """Which weights of the backbone are trained, besides the head and the rows of new genes."""
    replays: ClassVar[bool] = False
    """Whether bank cells are trained on, so that more of them is a safer setting."""
    uses_bank: ClassVar[bool] = True
    """Whether cells of earlier stages may be used at all. Without them the linear member is left out: fitted on new
    cells alone it would forbid every old type."""
    learns_genes: ClassVar[bool] = True
    """Whether genes that the model does not have yet are added."""

    def begin(self, stage: StageContext) -> None:
        """Before the training: choose the weights to be trained, estimate what the penalty needs."""
        trained_weights(stage, self.trained)

    def training_cells(self, stage: StageContext) -> StageCells:
        """Cells to train on; the new ones unless a strategy says otherwise."""
        return StageCells(stage.cells, stage.cells.sampling_weights(stage.settings.balance))

    def penalty(self, stage: StageContext, batch: Batch) -> Tensor | None:
        """Added to the cross-entropy of a batch."""
        return None

    def linear_member(self, stage: StageContext, cells: TrainingCells, stages: np.ndarray) -> LinearModel:
        """The linear member, fitted again on cells of all stages (stage of each (N,)), where cells may be used.

        Every type weighs alike: old types stay as the bank shows them.
        """
        return linear_member(cells.stored, cells.codes, len(stage.model.types), stage.seed, stages=stages)

    def end(self, stage: StageContext) -> Annotator:
        """After the training: the model with its bank filled again and its running sums brought up to date."""
        return refilled(stage, sums=None)


def trained_weights(stage: StageContext, which: str) -> None:
    """Let gradients reach only the weights to be trained."""
    backbone, head = stage.model.backbone, stage.model.head
    backbone.requires_grad_(which == "everything")
    head.requires_grad_(which != "nothing")
    if which == "last layers":
        for module in backbone.last_layers():
            module.requires_grad_(True)
        for module in backbone.modules():
            if isinstance(module, nn.LayerNorm):
                module.requires_grad_(True)
        n_old = len(stage.teacher.vocabulary)
        if len(stage.model.vocabulary) > n_old:
            for name, weight in backbone.named_parameters():
                if "gene_" in name:
                    weight.requires_grad_(True)
                    weight.register_hook(lambda gradient: torch.cat([0.0 * gradient[:n_old], gradient[n_old:]]))


def of_bank(bank: ExampleBank) -> TrainingCells:
    """Bank cells as training cells."""
    return TrainingCells(CellCounts.of(bank.counts), bank.codes, bank.studies, bank.measured, None)


def replay_share(bank: ExampleBank, settings: UpdateSettings) -> float:
    """Share of the draws that are of the bank: that of the earlier stages among all, `settings.replay` at least.

    0 with `settings.replay` 0: then no share is kept to.
    """
    if settings.replay == 0:
        return 0.0
    n_earlier = len(np.unique(bank.stages))
    return max(settings.replay, n_earlier / (n_earlier + 1))


def replayed(stage: StageContext) -> StageCells:
    """Bank and new cells. Of the bank, every type of every stage is drawn alike.

    How many draws the bank gets grows with its stages (`replay_share`): many studies are not to be drowned by one.
    """
    new, bank = stage.cells, stage.examples
    fresh = new.sampling_weights(stage.settings.balance)
    if not len(bank):
        return StageCells(new, fresh)
    both = of_bank(bank).joined(new)
    if stage.settings.replay == 0:
        return StageCells(both, both.sampling_weights("none"))
    kinds = kinds_of(bank.codes, bank.stages)
    again = 1.0 / np.bincount(kinds)[kinds]
    share = replay_share(bank, stage.settings)
    return StageCells(both, np.concatenate([share * again / again.sum(), (1.0 - share) * fresh]))


def refilled(stage: StageContext, *, sums: RunningSums | None) -> Annotator:
    """The trained model with its bank filled again from bank and new cells, quotas equal over all types.

    Where no cell of the stage may be kept, the bank is left to the earlier stages and the new cells are sketched.
    Sketches of earlier stages are carried over to the trained backbone. Without `sums` they are taken over bank, new
    cells and draws: those of earlier stages are of another representation.
    """
    model, settings, cells, n_kept = stage.model, stage.settings, stage.cells, len(stage.bank)
    pool = of_bank(stage.bank).joined(cells)
    stages = np.concatenate([stage.bank.stages, np.full(len(cells), stage.stage)])
    features = features_of(model, pool)
    sketch = None if model.sketch is None else followed(model.sketch, stage.teacher, model, seed=stage.seed)
    if sums is None:
        sums = summed_up(features, pool.codes, len(model.types))
        if sketch is not None:
            sums += drawn_sums(model, sketch, seed=stage.seed)
    if not stage.keeps_cells:
        new = sketch_of(model, cells, stage=stage.stage)
        if len(new):
            sketch = new if sketch is None else sketch.joined(new)
        pool, stages, features = pool.taken(np.arange(n_kept)), stages[:n_kept], features[:n_kept]
    total = settings.bank if settings.bank is not None else int(model.settings.get("bank", 1000))
    rows = selected_rows(
        pool.codes,
        stages,
        total,
        how=settings.selection,
        features=features,
        rows_of_types=model.head.classifier.weight.detach().cpu().numpy(),
        rng=np.random.default_rng(stage.seed),
    )
    bank = pool.taken(rows).as_bank(stage=stages[rows])
    state = sums.widened(len(model.types)).arrays()
    return replace(model, bank=bank.taken(np.arange(len(bank))), sketch=sketch, strategy_state=state)

"""Make a model from labelled cells: `train`, from nothing or from a pretrained model."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from evercell.annotator import EVEN, Annotator, empty_bank
from evercell.augmentation import Augmentation
from evercell.backbones import BACKBONES, Backbone
from evercell.bank import BANKS, balanced_rows
from evercell.celltypes import CellTypes
from evercell.circumstances import circumstances
from evercell.classification import (
    calibrated,
    classification_loss,
    fitted_rejector,
    held_out_loss,
    held_out_metrics,
    sealed_figures,
    sketch_of,
    sums_of,
)
from evercell.errors import LabelsError, SettingsError
from evercell.evaluation import split_cells
from evercell.frozen_head import fit_head
from evercell.genes import GeneVocabulary
from evercell.heads import GrowingHead
from evercell.ledger import Ledger
from evercell.linear import LinearModel, fit_linear, linear_member
from evercell.profiles import ProfileModel
from evercell.progress import progress
from evercell.rejection import REJECTORS
from evercell.sketches import refuse_rare, too_few
from evercell.stored_counts import room_in
from evercell.threads import threads_of
from evercell.tokenizers import TOKENIZERS, Tokenizer
from evercell.training import History, TrainingSettings, choose_device, fit, seeded
from evercell.training_cells import (
    TrainingCells,
    check_balance,
    chosen_genes,
    describe,
    gather,
    read_studies,
    sealed_rows,
    vocabulary_of,
)

if TYPE_CHECKING:
    from anndata import AnnData

FINETUNE = ("auto", "all", "last", "head")
FEW_CELLS = 50
"""With fewer labelled cells a type, in the mean, a head alone labels other studies better than the whole model does."""


@dataclass(frozen=True)
class ModelSettings:
    """What a new model is made of and how it is trained; the model stores this.

    Parameters
    ----------
    tokenizer, backbone, rejector
        Names in their registries.
    tokenizer_settings, backbone_settings, hidden
        Arguments of the tokenizer and the backbone; hidden layers of the head.
    finetune
        What of a pretrained model is trained: ``all``; ``last``, the last block and the head; ``head``, a head on
        representations that are made once; ``auto``, the head alone where there are fewer than `FEW_CELLS` labelled
        cells a type, else all. A trained model stores which of them it was.
    linear, linear_share
        Ask a linear model too; its weight beside the transformer.
    profiles
        Compare cells with the profiles of the types over marker genes too (`evercell.profiles`).
    variable_genes
        Keep only the most variable genes, chosen on training cells; None keeps every gene that is expressed.
    least_cells
        A gene must be expressed in this many training cells.
    balance
        How rare types are helped: cells drawn by the root of the size of their type (``sqrt``), each type as often
        (``oversample``), each cell as often (``none``), or so with a loss in which every type counts alike
        (``weights``). Only training cells are drawn again: the held-out ones are set aside first.
    held_out
        Share of cells held out to stop early, calibrate and report on.
    refit
        Train once more on all cells, held-out ones included but for those that are sealed; calibration and figures are
        those of the first training.
    bank
        Size of the example bank.
    sealed
        Most cells to seal, of the held-out ones: no training ever sees them, and updates are tried on them.
    training, augmentation
        See `TrainingSettings` and `Augmentation`.
    """

    tokenizer: str = "values"
    tokenizer_settings: Mapping[str, Any] = field(default_factory=dict)
    backbone: str = "latent"
    backbone_settings: Mapping[str, Any] = field(default_factory=dict)
    hidden: tuple[int, ...] = ()
    finetune: str = "all"
    rejector: str = "combined"
    linear: bool = True
    linear_share: float = EVEN
    profiles: bool = True
    variable_genes: int | None = None
    least_cells: int = 3
    balance: str = "sqrt"
    held_out: float = 0.15
    refit: bool = True
    bank: int = 1000
    sealed: int = 500
    training: TrainingSettings = field(default_factory=TrainingSettings)
    augmentation: Augmentation = field(default_factory=Augmentation)

    def __post_init__(self) -> None:
        check_balance(self.balance)
        if self.finetune not in FINETUNE:
            raise SettingsError(f"finetune must be one of {', '.join(FINETUNE)}, not `{self.finetune}`")
        if self.finetune == "head" and self.hidden:
            raise SettingsError("a head on frozen representations has no hidden layers", hint="leave out hidden")
        if not 0 < self.linear_share < 1:
            raise SettingsError(f"linear_share must lie between 0 and 1, not {self.linear_share}")
        if not 0 < self.held_out < 1:
            raise SettingsError(f"held_out must lie between 0 and 1, not {self.held_out}")

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return dataclasses.asdict(self)


def train(
    data: AnnData | Sequence[AnnData],
    labels: str = "cell_type",
    *,
    groups: str | None = None,
    base: Annotator | None = None,
    settings: ModelSettings | None = None,
    bank: str = "cells",
    seed: int = 0,
    names: Sequence[str] | None = None,
    layer: str | None = None,
    species: str = "auto",
    gene_column: str | None = None,
    device: str = "auto",
    state_folder: Path | None = None,
    store: str | os.PathLike[str] | None = None,
    shown: bool | None = None,
) -> Annotator:
    """Make a first model from labelled cells.

    Parameters
    ----------
    data
        One AnnData with counts, or several, each with its own genes.
    labels
        Column of ``obs`` with the cell types. Cells without a label, or called unknown, are left out.
    groups
        Column of ``obs`` with donors or batches; whole groups are held out where at least three are there.
    base
        Pretrained model whose backbone is taken up.
    settings
        See `ModelSettings`; those of `settings_for` if not given.
    bank
        What the model keeps for later updates: ``cells``, an example bank and sealed cells, or ``sketch``, means and
        covariances of the types and no cell (`evercell.sketches`), for data that must not leave its owner.
    seed
        The same seed, data and machine give the same model.
    names
        Name of each data set, for messages and the ledger.
    layer, species, gene_column
        Where the counts are; ``human``, ``mouse`` or ``auto``; column of ``var`` with gene names. Found if not given.
    device
        ``auto``, ``cpu`` or ``cuda``.
    state_folder
        Folder for the state of the run; the same call takes an interrupted run up again.
    store
        Folder on a disk with room, for more cells than fit into memory, given with their matrices in their files
        (``read_cells(file, backed=True)``): counts lie there in temporary files, eight bytes a value and twice that
        for a while. The numbers are those of a run in memory.
    shown
        Show a progress bar; by default in a terminal.

    Returns
    -------
    Annotator
        The ledger's first stage holds the figures on held-out cells, beside those of the linear baseline.

    Raises
    ------
    CellsError, GenesError, LabelsError, SettingsError

    Examples
    --------
    >>> import evercell as ec
    >>> from evercell.testing import synthetic_cells
    >>> from evercell.finetuning import quick_settings
    >>> model = ec.train(synthetic_cells(seed=1), labels="cell_type", groups="donor", settings=quick_settings())
    >>> len(model.types)
    4
    """
    settings = settings or settings_for(base)
    if base is None and settings.finetune not in ("auto", "all"):
        raise SettingsError(
            f"finetune={settings.finetune} leaves the backbone as it is, and there is none yet",
            hint="name a pretrained model to start from, or leave out finetune",
        )
    if bank not in BANKS:
        raise SettingsError(f"there is no bank `{bank}`", hint=f"choose one of: {', '.join(BANKS)}")
    adatas = [data] if not isinstance(data, Sequence) else list(data)
    # Of several studies one may hold a single type, as a sorted sample does; together they need two.
    least_types = 2 if len(adatas) == 1 else 1
    studies = read_studies(adatas, labels, groups=groups, layer=layer, names=names, least_types=least_types)
    types = CellTypes(tuple(sorted({name for study in studies for name in study.labels})))
    if len(types) < 2:
        raise LabelsError(
            f"all data sets name only `{types.names[0]}`; at least two cell types are needed",
            hint="name the column that holds the cell types with --labels",
        )
    vocabulary = base.vocabulary if base is not None else vocabulary_of(studies, species=species, column=gene_column)
    with room_in(None if store is None else Path(store)) as place:
        cells = gather(studies, vocabulary, types, species=species, column=gene_column, store=place)
        if bank == "sketch":
            refuse_rare(cells.codes, too_few(cells.codes, len(types)), types)
        split = split_cells(cells.codes, cells.groups, test_share=settings.held_out, seed=seed)
        settings = settled(settings, base, len(cells) / len(types))
        if base is None:
            columns = chosen_genes(
                cells.taken(split.train), least_cells=settings.least_cells, variable_genes=settings.variable_genes
            )
            cells = cells.over_genes(columns)
            vocabulary = vocabulary.taken(columns)
        described = [describe(study) for study in studies]
        if state_folder is not None:  # a run on other data or settings is another run
            words = [described, settings.to_dict(), seed, base.fingerprint if base is not None else None]
            run = json.dumps(words if bank == "cells" else [*words, bank])
            state_folder = Path(state_folder) / hashlib.sha256(run.encode()).hexdigest()[:12]
        maker = _Maker(cells, vocabulary, types, base, settings, seed, choose_device(device), state_folder, shown)
        first, history, metrics = maker.tried(split.train, split.validation)
        sealed = sealed_rows(cells, split.validation, settings.sealed if bank == "cells" else 0, seed=seed)
        model = maker.finished(maker.refitted(first, sealed) if settings.refit else first, sealed, bank)
    held_out = {"by": split.by, "groups": list(split.held_out), "cells": len(split.validation), "note": split.note}
    facts = {
        "verb": "train",
        "data": described,
        "types_added": list(types.names),
        "settings": settings.to_dict(),
        "seed": seed,
        "base": base.fingerprint if base is not None else None,
        "read": {"labels": labels, "groups": groups, "layer": layer, "species": species, "gene_column": gene_column},
        "circumstances": circumstances(maker.device),
        "made": model.fingerprint,
        "held_out": held_out,
        "metrics": metrics,
        "history": history.rows,
        "steps": history.best_step,
        "sealed": sealed_figures(model),
    }
    if model.sketch is not None:
        facts["bank"], facts["sketched"] = bank, model.sketch.facts(types.names)
    return replace(model, ledger=Ledger().appended(facts), settings=settings.to_dict())


def settings_for(base: Annotator | None) -> ModelSettings:
    """Settings by default: a pretrained model is trained at a lower rate, and trusted more than the linear member.

    How much of it is trained is settled by the number of labelled cells a type.
    """
    if base is None:
        return ModelSettings()
    return ModelSettings(finetune="auto", linear_share=1 / 3, training=TrainingSettings(learning_rate=2e-3))


def settled(settings: ModelSettings, base: Annotator | None, cells_a_type: float) -> ModelSettings:
    """The same, with what ``auto`` comes to for so many labelled cells a type, in the mean."""
    if settings.finetune != "auto":
        return settings
    head = base is not None and cells_a_type < FEW_CELLS and not settings.hidden
    return replace(settings, finetune="head" if head else "all")


def quick_settings() -> ModelSettings:
    """Settings for examples and tests: a small model trained for a second or two."""
    return ModelSettings(
        backbone_settings={"members": 2, "member_width": 16, "n_latents": 4, "depth": 1},
        training=TrainingSettings(samples=3200, batch_size=64, learning_rate=5e-3, evaluations=4),
    )


@dataclass(frozen=True)
class _Maker:
    """Builds, trains and calibrates a model on parts of the same cells."""

    cells: TrainingCells
    vocabulary: GeneVocabulary
    types: CellTypes
    base: Annotator | None
    settings: ModelSettings
    seed: int
    device: torch.device
    state_folder: Path | None
    shown: bool | None

    def tried(self, train: np.ndarray, held_out: np.ndarray) -> tuple[Annotator, History, dict[str, Any]]:
        """Model trained on `train` and calibrated on `held_out`, with its figures beside the linear baseline's."""
        training, validation = self.cells.taken(train), self.cells.taken(held_out)
        model = self._new()
        history = self._fit(model, training, validation, self.settings.training, "try")
        model = replace(model, linear=self._linear_member(training), profiles=self._profiles(training))
        baseline = fit_linear(training.stored, training.codes, n_types=len(self.types), seed=self.seed)
        model = calibrated(model, REJECTORS[self.settings.rejector], training, validation, seed=self.seed)
        return model, history, held_out_metrics(model, baseline, validation)

    def refitted(self, first: Annotator, sealed: np.ndarray) -> Annotator:
        """Model trained on all cells but the sealed ones; keeps what was set on held-out cells for `first`."""
        if first.rejector is None:
            raise ValueError("the first model is not calibrated")
        model, cells = self._new(), self._unsealed(sealed)
        self._fit(model, cells, None, self.settings.training, "all")
        model = replace(model, linear=self._linear_member(cells), profiles=self._profiles(cells))
        model = replace(model, temperature=first.temperature, sets=first.sets)
        rejector = fitted_rejector(model, REJECTORS[self.settings.rejector], cells, seed=self.seed)
        return replace(model, rejector=rejector.calibrated_as(first.rejector))

    def finished(self, model: Annotator, sealed: np.ndarray, bank_of: str) -> Annotator:
        """The model with its example bank and its sealed cells, or its sketch, and what later updates start from."""
        cells, sealed_cells = self._unsealed(sealed), self.cells.taken(sealed)
        if bank_of == "sketch":
            sketch = sketch_of(model, cells, stage=1)
            nothing = empty_bank(len(self.vocabulary))
            return replace(model, sketch=sketch, sealed=nothing, strategy_state=sums_of(model, cells).arrays())
        bank = cells.taken(balanced_rows(cells.codes, self.settings.bank, self._rng())).as_bank(stage=1)
        bank = bank.taken(np.arange(len(bank)))  # without the studies that it has no cell of
        sums = sums_of(model, cells).arrays()
        return replace(model, bank=bank, sealed=sealed_cells.as_bank(stage=1), strategy_state=sums)

    def _unsealed(self, sealed: np.ndarray) -> TrainingCells:
        return self.cells.taken(np.setdiff1d(np.arange(len(self.cells)), sealed))

    def _rng(self) -> np.random.Generator:
        return np.random.default_rng(self.seed)

    def _linear_member(self, cells: TrainingCells) -> LinearModel | None:
        return linear_member(cells.stored, cells.codes, len(self.types), self.seed) if self.settings.linear else None

    def _profiles(self, cells: TrainingCells) -> ProfileModel | None:
        return cells.profiles(len(self.types)) if self.settings.profiles else None

    def _new(self) -> Annotator:
        settings = self.settings
        tokenizer: Tokenizer = TOKENIZERS[settings.tokenizer](**settings.tokenizer_settings)
        with seeded(self.seed):
            backbone: Backbone
            if self.base is not None:
                import copy

                tokenizer, backbone = self.base.tokenizer, copy.deepcopy(self.base.backbone)
            else:
                backbone = BACKBONES[settings.backbone](
                    len(self.vocabulary), n_bins=tokenizer.n_bins, **settings.backbone_settings
                )
            head = GrowingHead(backbone.width, len(self.types), hidden=settings.hidden)
        backbone, head = backbone.to(self.device), head.to(self.device)
        share = settings.linear_share
        return Annotator.begun(self.vocabulary, tokenizer, backbone, head, self.types, linear_share=share)

    def _fit(
        self,
        model: Annotator,
        cells: TrainingCells,
        held_out: TrainingCells | None,
        training: TrainingSettings,
        part: str,
    ) -> History:
        depth = self.settings.finetune
        if depth == "head":
            fit_head(model, cells, self.settings.augmentation, seed=self.seed)
            return History()
        if depth == "last":
            model.backbone.requires_grad_(False)
            for layer in model.backbone.last_layers():
                layer.requires_grad_(True)
        balance = self.settings.balance
        loss = classification_loss(
            model,
            cells,
            cells.sampling_weights(balance),
            training=training,
            augmentation=self.settings.augmentation,
            loss_weights=cells.loss_weights(balance),
        )
        validate = None
        if held_out is not None:
            validate = held_out_loss(model, held_out)
        module = nn.ModuleDict({"backbone": model.backbone, "head": model.head})
        words = "training" if held_out is not None else "training on all cells"
        with progress(words, shown=self.shown) as step, threads_of(model.backbone):
            history = fit(
                module,
                loss,
                training,
                seed=self.seed,
                validate=validate,
                state_folder=None if self.state_folder is None else self.state_folder / part,
                on_step=step,
            )
        model.backbone.requires_grad_(True)
        return history

"""Settings of published systems, so that a paper's run is one command.

They are the papers' hyper-parameters on evercell's own training loop and classes, written from the papers and their
published scripts. What evercell does in another way is in `Preset.differs`: a figure that is got with a preset is not
the figure of the paper's own code.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from evercell.augmentation import Augmentation
from evercell.errors import SettingsError
from evercell.finetuning import ModelSettings
from evercell.pretraining import PretrainingSettings
from evercell.training import TrainingSettings
from evercell.updating import UpdateSettings

PLAIN = Augmentation(gene_dropout=0.0, thinning=0.0, panels=0.0, max_genes=1_000_000)
"""Cells as they are: no published system of this family varies them."""

ALL_GENES = 16_906  # of scBERT's vocabulary, and of TransAnno-Net's lung genes

_COMMON_DIFFERENCES = (
    "the head stands on the mean over the gene tokens, not on a convolution that leaves one number a gene",
    "the rate rises and falls once, as a cosine, in place of warm restarts",
    "one look at held-out cells an epoch, and looks count from the second half of the run on",
)


@dataclass(frozen=True)
class Preset:
    """Hyper-parameters of one published system.

    Parameters
    ----------
    name
        The word for ``--preset``.
    source
        Publication that they are from.
    epochs
        Passes over the training cells; `over` makes training samples of them.
    model, pretraining, update
        Settings of `train`, `pretrain` and `update`.
    differs
        What evercell does in another way than the paper.
    """

    name: str
    source: str
    epochs: int
    model: ModelSettings
    pretraining: PretrainingSettings
    update: UpdateSettings
    differs: tuple[str, ...]

    def over(self, n_cells: int) -> Preset:
        """The same, with as many training samples as its epochs are on `n_cells` cells."""

        def trained(settings: Any) -> Any:
            training: TrainingSettings = settings.training
            return replace(settings, training=replace(training, samples=max(self.epochs * n_cells, 1)))

        parts = {name: trained(getattr(self, name)) for name in ("model", "pretraining", "update")}
        return replace(self, **parts)


def preset(name: str) -> Preset:
    """Settings of a published system: ``canal``, ``scbert`` or ``transanno``.

    Parameters
    ----------
    name
        Of the system.

    Returns
    -------
    Preset
        Its samples are those of a single epoch of one cell until `Preset.over` is told the number of cells.

    Raises
    ------
    SettingsError
        There is no such preset.

    Examples
    --------
    >>> canal = preset("canal").over(n_cells=2000)
    >>> canal.model.variable_genes, canal.model.training.samples
    (1000, 200000)
    """
    if name not in PRESETS:
        raise SettingsError(f"there is no preset `{name}`", hint=f"choose one of: {', '.join(PRESETS)}")
    return PRESETS[name].over(1)


def _training(rate: float, *, batch: int, epochs: int, patience: int, smoothing: float = 0.0) -> TrainingSettings:
    """Adam without decay or averaging; gradients of so many cells are added up before a step."""
    return TrainingSettings(
        batch_size=batch,
        learning_rate=rate,
        weight_decay=0.0,
        warm_up=0.05,
        clip=1e6,
        label_smoothing=smoothing,
        averaging=0.0,
        evaluations=epochs,
        patience=patience,
    )


def _model(training: TrainingSettings, **more: Any) -> ModelSettings:
    """A Performer on binned expression alone: no linear member, no varied cells, no second training."""
    return ModelSettings(
        tokenizer="bins",
        tokenizer_settings={"zeros": True},
        backbone="performer",
        linear=False,
        profiles=False,
        refit=False,
        training=training,
        augmentation=PLAIN,
        **more,
    )


def _pretraining(training: TrainingSettings, most_genes: int) -> PretrainingSettings:
    """Masked expression alone: 15 % of the expressed genes are hidden, and those alone are asked for."""
    return PretrainingSettings(
        tokenizer="bins",
        tokenizer_settings={"zeros": True},
        backbone="performer",
        masked_share=0.15,
        most_asked=ALL_GENES,
        zero_queries=0.0,
        contrast=0.0,
        supervised=0.0,
        balance="none",
        most_genes=most_genes,
        training=training,
        augmentation=PLAIN,
    )


def _scbert() -> Preset:
    """Batches of 3 cells, gradients of 60 batches added up: 180 cells a step."""
    training = _training(1e-4, batch=180, epochs=100, patience=10)
    return Preset(
        "scbert",
        "Yang et al., scBERT, Nature Machine Intelligence 2022, 4:852-866",
        100,
        _model(training, variable_genes=ALL_GENES, hidden=(512, 100), finetune="last", balance="weights"),
        _pretraining(training, ALL_GENES),
        UpdateSettings(training=training, balance="none", trained="last layers"),
        (
            *_COMMON_DIFFERENCES,
            "its loss weighs a type by the square of one minus its share of cells; here every type counts alike",
            "it has no updates: `update` keeps evercell's strategy, with these rates",
        ),
    )


def _canal() -> Preset:
    """Batch size and epochs are those of its published class; they are not in the paper."""
    training = _training(2e-4, batch=14, epochs=100, patience=10, smoothing=0.1)
    model = _model(
        training, variable_genes=1000, hidden=(128, 64), finetune="last", balance="none", bank=1000, rejector="canal"
    )
    update = UpdateSettings(
        training=training,
        augmentation=PLAIN,
        replay=0.0,
        distillation=0.1,
        trained="last layers",
        selection="nearest",
        bank=1000,
        balance="none",
        new_genes=False,
    )
    return Preset(
        "canal",
        "Wan et al., CANAL, Briefings in Bioinformatics 2024, bbae047",
        100,
        model,
        _pretraining(training, 1000),
        update,
        (
            *_COMMON_DIFFERENCES,
            "prototypes belong to types for ever, and every old type keeps its share of the bank",
            "cells for validation are never trained on, and the validation loss is that of their own labels",
            "the variable genes are chosen on training cells only",
        ),
    )


def _transanno() -> Preset:
    """Fine-tuning: batches of 6 cells, gradients of 60 added up; pretraining: 2 cells, 60 added up."""
    training = _training(1e-4, batch=360, epochs=100, patience=20)
    return Preset(
        "transanno",
        "TransAnno-Net, Computer Methods and Programs in Biomedicine 2025",
        100,
        _model(training, variable_genes=ALL_GENES, hidden=(512, 128), finetune="last", balance="oversample"),
        _pretraining(_training(1e-5, batch=120, epochs=100, patience=100), ALL_GENES),
        UpdateSettings(training=training, balance="oversample", trained="last layers"),
        (
            *_COMMON_DIFFERENCES,
            "rare types are oversampled among training cells only, after the split",
            "early stopping looks at the loss of held-out cells, not at their accuracy",
            "it has no updates: `update` keeps evercell's strategy, with these rates",
        ),
    )


PRESETS = {one.name: one for one in (_canal(), _scbert(), _transanno())}

"""Make a model from labelled cells: `train`, from nothing or from a pretrained model."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy.sparse import csr_matrix
from torch import Tensor, nn
from torch.nn import functional as F

from evercell.annotator import Annotator, best_temperature
from evercell.augmentation import Augmentation
from evercell.backbones import BACKBONES, Backbone
from evercell.bank import ExampleBank, balanced_rows
from evercell.celltypes import CellTypes
from evercell.errors import SettingsError
from evercell.evaluation import evaluate, split_cells
from evercell.genes import GeneVocabulary
from evercell.heads import GrowingHead
from evercell.ledger import Ledger
from evercell.linear import LinearModel, fit_linear, linear_member
from evercell.progress import progress
from evercell.rejection import REJECTORS, Rejector
from evercell.threads import threads_of
from evercell.tokenizers import TOKENIZERS, Tokenizer, View
from evercell.training import History, TrainingSettings, choose_device, fit, seeded
from evercell.training_cells import Study, TrainingCells, gather, read_study, vocabulary_of

if TYPE_CHECKING:
    from anndata import AnnData


@dataclass(frozen=True)
class ModelSettings:
    """What a new model is made of and how it is trained; the model stores this.

    Parameters
    ----------
    tokenizer, backbone, rejector
        Names in their registries.
    tokenizer_settings, backbone_settings, hidden
        Arguments of the tokenizer and the backbone; hidden layers of the head.
    linear
        Ask a linear model too.
    variable_genes
        Keep only the most variable genes, chosen on training cells; None keeps every gene that is expressed.
    least_cells
        A gene must be expressed in this many training cells.
    balance
        How training cells are drawn: ``sqrt``, ``equal`` or ``none``.
    held_out
        Share of cells held out to stop early, calibrate and report on.
    refit
        Train once more on all cells, held-out ones included; calibration and figures are those of the first training.
    bank
        Size of the example bank.
    training, augmentation
        See `TrainingSettings` and `Augmentation`.
    """

    tokenizer: str = "values"
    tokenizer_settings: Mapping[str, Any] = field(default_factory=dict)
    backbone: str = "latent"
    backbone_settings: Mapping[str, Any] = field(default_factory=dict)
    hidden: tuple[int, ...] = ()
    rejector: str = "combined"
    linear: bool = True
    variable_genes: int | None = None
    least_cells: int = 3
    balance: str = "sqrt"
    held_out: float = 0.15
    refit: bool = True
    bank: int = 1000
    training: TrainingSettings = field(default_factory=TrainingSettings)
    augmentation: Augmentation = field(default_factory=Augmentation)

    def __post_init__(self) -> None:
        if self.balance not in ("sqrt", "equal", "none"):
            raise SettingsError(f"balance must be sqrt, equal or none, not `{self.balance}`")
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
    seed: int = 0,
    names: Sequence[str] | None = None,
    layer: str | None = None,
    species: str = "auto",
    gene_column: str | None = None,
    device: str = "auto",
    state_folder: Path | None = None,
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
        See `ModelSettings`.
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
    settings = settings or ModelSettings()
    adatas = [data] if not isinstance(data, Sequence) else list(data)
    names = list(names) if names is not None else [f"data set {i + 1}" for i in range(len(adatas))]
    if not adatas or len(names) != len(adatas):
        raise SettingsError(
            f"{len(adatas)} data sets with {len(names)} names were given", hint="give at least one, each with its name"
        )
    studies = [
        read_study(adata, labels, groups=_groups_of(adata, groups, adatas), layer=layer, name=name)
        for adata, name in zip(adatas, names, strict=True)
    ]
    types = CellTypes(tuple(sorted({name for study in studies for name in study.labels})))
    vocabulary = base.vocabulary if base is not None else vocabulary_of(studies, species=species, column=gene_column)
    cells = gather(studies, vocabulary, types, species=species, column=gene_column)
    split = split_cells(cells.codes, cells.groups, test_share=settings.held_out, seed=seed)
    if base is None:
        columns = _chosen_genes(cells.taken(split.train), settings)
        cells = cells.over_genes(columns)
        vocabulary = GeneVocabulary(
            tuple(vocabulary.names[i] for i in columns),
            tuple(vocabulary.symbols[i] for i in columns),
            vocabulary.species,
        )
    described = [describe(study) for study in studies]
    if state_folder is not None:  # a run on other data or settings is another run
        run = json.dumps([described, settings.to_dict(), seed, base.fingerprint if base is not None else None])
        state_folder = Path(state_folder) / hashlib.sha256(run.encode()).hexdigest()[:12]
    maker = _Maker(cells, vocabulary, types, base, settings, seed, choose_device(device), state_folder, shown)
    first, history, metrics = maker.tried(split.train, split.validation)
    model = maker.refitted(first) if settings.refit else first
    held_out = {"by": split.by, "groups": list(split.held_out), "cells": len(split.validation), "note": split.note}
    facts = {
        "verb": "train",
        "data": described,
        "types_added": list(types.names),
        "settings": settings.to_dict(),
        "seed": seed,
        "base": base.fingerprint if base is not None else None,
        "held_out": held_out,
        "metrics": metrics,
        "history": history.rows,
        "steps": history.best_step,
    }
    bank = maker.bank(stage=1)
    return replace(model, bank=bank, ledger=Ledger().appended(facts), settings=settings.to_dict())


def quick_settings() -> ModelSettings:
    """Settings for examples and tests: a small model trained for a second or two."""
    return ModelSettings(
        backbone_settings={"members": 2, "member_width": 16, "n_latents": 4, "depth": 1},
        training=TrainingSettings(samples=3200, batch_size=64, learning_rate=5e-3, evaluations=4),
    )


def describe(study: Study) -> dict[str, Any]:
    """What the ledger says of a data set; the fingerprint covers its counts, genes and labels."""
    counts = study.counts.to_csr()
    digest = hashlib.sha256()
    for array in (counts.data, counts.indices, counts.indptr):
        digest.update(np.ascontiguousarray(array).tobytes())
    digest.update("\n".join([*map(str, study.counts.genes.index), *study.labels]).encode())
    return {
        "name": study.name,
        "cells": len(study.rows),
        "genes": len(study.counts.genes),
        "counts": study.counts.source,
        "sha256": digest.hexdigest(),
        "notes": list(study.notes),
    }


def _groups_of(adata: AnnData, groups: str | None, adatas: Sequence[AnnData]) -> str | None:
    """The asked-for column; a study that lacks what another has is a group of its own."""
    return groups if groups in adata.obs or not any(groups in other.obs for other in adatas) else None


def _chosen_genes(cells: TrainingCells, settings: ModelSettings) -> np.ndarray:
    """Columns of the genes to keep, from training cells only."""
    n_cells = np.bincount(cells.counts.indices, minlength=cells.counts.shape[1])
    expressed = np.flatnonzero(n_cells >= min(settings.least_cells, max(len(cells) // 10, 1)))
    if settings.variable_genes is None or len(expressed) <= settings.variable_genes:
        return expressed
    view = View.whole(cells.counts)
    logged = csr_matrix((view.log_normalised(), cells.counts.indices, cells.counts.indptr), shape=cells.counts.shape)
    mean = np.asarray(logged.mean(axis=0)).ravel()
    spread = np.asarray(logged.multiply(logged).mean(axis=0)).ravel() - mean**2
    # Dispersion of the logarithms among genes of like mean, as Scanpy's "seurat" flavour does.
    order = np.argsort(mean[expressed], kind="stable")
    relative = np.empty(len(expressed))
    for part in np.array_split(order, min(20, len(order))):
        dispersion = spread[expressed[part]] / np.maximum(mean[expressed[part]], 1e-9)
        relative[part] = (dispersion - dispersion.mean()) / max(dispersion.std(), 1e-9)
    return np.sort(expressed[np.argsort(-relative, kind="stable")[: settings.variable_genes]])


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
        model = replace(model, linear=self._linear_member(training))
        linear = fit_linear(training.counts, training.codes, n_types=len(self.types), seed=self.seed)
        view = View.whole(validation.counts, self.cells.measured_by_any)
        uncalibrated = model.outputs(view)
        model = replace(model, temperature=best_temperature(uncalibrated.log_proba, validation.codes))
        model = replace(model, rejector=self._rejector(model, training).calibrated(model.outputs(view)))
        outputs = model.outputs(view)
        names = np.asarray(self.types.names)
        truth = names[validation.codes]
        transformer = names[outputs.logits.argmax(axis=1)]
        baseline = linear.log_proba(view)
        metrics = {
            "model": evaluate(truth, names[outputs.codes], confidence=outputs.confidence).to_dict(),
            "transformer": _short(evaluate(truth, transformer).figures()),
            "linear": _short(
                evaluate(truth, names[baseline.argmax(axis=1)], confidence=np.exp(baseline.max(axis=1))).figures()
            ),
        }
        return model, history, metrics

    def refitted(self, first: Annotator) -> Annotator:
        """Model trained on all cells; keeps the temperature and the thresholds of `first`."""
        if first.rejector is None:
            raise ValueError("the first model is not calibrated")
        model = self._new()
        self._fit(model, self.cells, None, self.settings.training, "all")
        model = replace(model, linear=self._linear_member(self.cells), temperature=first.temperature)
        return replace(model, rejector=self._rejector(model, self.cells).calibrated_as(first.rejector))

    def _linear_member(self, cells: TrainingCells) -> LinearModel | None:
        return linear_member(cells.counts, cells.codes, len(self.types), self.seed) if self.settings.linear else None

    def bank(self, *, stage: int) -> ExampleBank:
        """Class-balanced example cells."""
        rows = balanced_rows(self.cells.codes, self.settings.bank, np.random.default_rng(self.seed))
        cells = self.cells
        bank = ExampleBank(cells.counts, cells.codes, np.full(len(cells), stage), cells.studies, cells.measured)
        return bank.taken(rows)

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
        return Annotator(
            vocabulary=self.vocabulary,
            types=self.types,
            tokenizer=tokenizer,
            backbone=backbone.to(self.device),
            head=head.to(self.device),
            linear=None,
            temperature=1.0,
            rejector=None,
            bank=self.bank(stage=1),
        )

    def _fit(
        self,
        model: Annotator,
        cells: TrainingCells,
        held_out: TrainingCells | None,
        training: TrainingSettings,
        part: str,
    ) -> History:
        weights = cells.sampling_weights(self.settings.balance)
        loss = classification_loss(model, cells, weights, self.settings, self.device)
        validate = None
        if held_out is not None:
            validate = _validation(model, held_out)
        module = nn.ModuleDict({"backbone": model.backbone, "head": model.head})
        words = "training" if held_out is not None else "training on all cells"
        with progress(words, shown=self.shown) as step, threads_of(model.backbone):
            return fit(
                module,
                loss,
                training,
                seed=self.seed,
                validate=validate,
                state_folder=None if self.state_folder is None else self.state_folder / part,
                on_step=step,
            )

    def _rejector(self, model: Annotator, cells: TrainingCells) -> Rejector:
        rows = balanced_rows(cells.codes, 4000, np.random.default_rng(self.seed))
        outputs = model.outputs(View.whole(cells.counts[rows], self.cells.measured_by_any))
        return REJECTORS[self.settings.rejector].fitted(outputs, cells.codes[rows])


def classification_loss(
    model: Annotator, cells: TrainingCells, weights: np.ndarray, settings: ModelSettings, device: torch.device
) -> Callable[[np.random.Generator], Tensor]:
    """Cross-entropy with label smoothing on random views of randomly drawn cells."""
    measured = cells.measured_by_any
    cumulative = np.cumsum(weights)

    def loss(rng: np.random.Generator) -> Tensor:
        rows = np.searchsorted(cumulative, rng.random(settings.training.batch_size) * cumulative[-1])
        view = settings.augmentation.view(cells.counts[rows], measured, rng)
        representation = model.backbone(model.tokenizer.tokenize(view).to(device))
        logits = model.head.member_logits(representation, model.backbone.members)  # (B, S, K)
        codes = torch.from_numpy(cells.codes[rows]).to(device).unsqueeze(1).expand(logits.shape[:2])
        smoothing = settings.training.label_smoothing
        return F.cross_entropy(logits.flatten(0, 1), codes.flatten(), label_smoothing=smoothing)

    return loss


def _validation(model: Annotator, cells: TrainingCells, most: int = 1000) -> Callable[[], dict[str, float]]:
    """Loss and accuracy of the transformer on held-out cells, at most `most` of them, evenly spaced."""
    rows = np.linspace(0, len(cells) - 1, min(most, len(cells))).astype(int)
    view = View.whole(cells.counts[rows], cells.measured_by_any)
    codes = torch.from_numpy(cells.codes[rows])

    def validate() -> dict[str, float]:
        _, logits = model.represent(view)
        found = torch.from_numpy(logits)
        accuracy = (found.argmax(dim=1) == codes).float().mean()
        return {"loss": float(F.cross_entropy(found, codes)), "accuracy": float(accuracy)}

    return validate


def _short(figures: dict[str, Any]) -> dict[str, Any]:
    """The figures that the report and the card print."""
    return {name: figures[name] for name in ("accuracy", "balanced_accuracy", "macro_f1", "weighted_f1", "ece")}

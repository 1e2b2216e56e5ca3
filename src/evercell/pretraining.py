"""Learn from many studies at once, labelled or not: `pretrain`.

Some genes of a cell are hidden, and the backbone is asked how much of them the cell expresses (scBERT). Beside that,
two random views of a cell are told from views of other cells of the same study; from cells of other studies they would
be told by the study, and that is what would be learnt. Where studies are labelled, the type of a cell is asked for as
well, among the types that its study shows: a type has one row for all studies, so they are brought together, and what
a study calls more coarsely than another is not held against it.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from evercell import distributed
from evercell.annotator import Annotator
from evercell.augmentation import Augmentation
from evercell.backbones import BACKBONES, Backbone
from evercell.errors import ModelError, SettingsError
from evercell.genes import GeneVocabulary
from evercell.heads import GrowingHead
from evercell.ledger import Ledger
from evercell.outputs import atomic_path
from evercell.pretraining_cells import PretrainingCells, gathered, shared_vocabulary
from evercell.pretraining_objective import TERMS, Objective, validation
from evercell.pretraining_studies import PretrainingStudy, read_for_pretraining, split_studies
from evercell.progress import progress
from evercell.stored_counts import room_in
from evercell.threads import threads_of
from evercell.tokenizers import TOKENIZERS, Tokenizer
from evercell.training import TrainingSettings, choose_device, fit, seeded

if TYPE_CHECKING:
    from anndata import AnnData

LOG, RUN = "log.jsonl", "run.json"


@dataclass(frozen=True)
class PretrainingSettings:
    """What a pretrained model is made of and how it is trained; the model stores this.

    Parameters
    ----------
    tokenizer, backbone
        Names in their registries.
    tokenizer_settings, backbone_settings
        Arguments of the tokenizer and the backbone.
    masked
        Weight of masked expression.
    masked_share
        Share of a cell's expressed genes that is hidden.
    most_asked
        Of the hidden genes of a cell this many, at random, are asked for; the decoder is most of the cost of a step.
    zero_queries
        Measured genes without a count that are asked for, for each expressed one.
    contrast
        Weight of telling two views of a cell from those of other cells of its study; 0 for masked expression alone.
    supervised
        Weight of telling the type of a labelled cell among the types that its study shows.
    balance
        How studies are drawn: by the root of their number of cells (``sqrt``), ``equal`` or by that number (``none``).
    tissue_balance
        Where a column of tissues is named, how tissues are drawn: ``equal``, by the root of what their studies weigh
        together (``sqrt``), or by that (``none``).
    held_out
        Share of cells held out: whole studies where there are at least four, else whole donors where they are told.
    held_out_studies
        Names of the studies to be held out, in place of a share.
    vocabulary
        Genes of any (``union``) or of all (``intersection``) training studies.
    least_cells
        A gene must be expressed in this many training cells.
    most_genes
        Of these, the genes with the largest sum over studies of the share of cells that express them; None for all.
    training, augmentation
        See `TrainingSettings` and `Augmentation`.
    """

    tokenizer: str = "values"
    tokenizer_settings: Mapping[str, Any] = field(default_factory=dict)
    backbone: str = "latent"
    backbone_settings: Mapping[str, Any] = field(default_factory=dict)
    masked: float = 1.0
    masked_share: float = 0.15
    most_asked: int = 32
    zero_queries: float = 1.0
    contrast: float = 0.3
    supervised: float = 1.0
    balance: Literal["sqrt", "equal", "none"] = "sqrt"
    tissue_balance: Literal["equal", "sqrt", "none"] = "equal"
    held_out: float = 0.1
    held_out_studies: tuple[str, ...] = ()
    vocabulary: Literal["union", "intersection"] = "union"
    least_cells: int = 10
    most_genes: int | None = 20_000
    training: TrainingSettings = field(
        default_factory=lambda: TrainingSettings(samples=400_000, weight_decay=0.01, evaluations=20, patience=10)
    )
    augmentation: Augmentation = field(default_factory=Augmentation)

    def __post_init__(self) -> None:
        for name, one, known in (
            ("balance", self.balance, ("sqrt", "equal", "none")),
            ("tissue_balance", self.tissue_balance, ("equal", "sqrt", "none")),
            ("vocabulary", self.vocabulary, ("union", "intersection")),
        ):
            if one not in known:
                raise SettingsError(f"{name} must be one of {', '.join(known)}, not `{one}`")
        if self.most_genes is not None and self.most_genes < 1:
            raise SettingsError(f"most_genes must be at least 1, not {self.most_genes}")
        for name, share in (("masked_share", self.masked_share), ("held_out", self.held_out)):
            if not 0 < share < 1:
                raise SettingsError(f"{name} must lie between 0 and 1, not {share}")
        for name, least in (("masked", 0), ("contrast", 0), ("supervised", 0), ("zero_queries", 0), ("most_asked", 1)):
            if getattr(self, name) < least:
                raise SettingsError(f"{name} must be at least {least}, not {getattr(self, name)}")

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return dataclasses.asdict(self)


def pretrain(
    data: str | os.PathLike[str] | AnnData | Sequence[str | os.PathLike[str] | AnnData],
    labels: str | None = None,
    *,
    settings: PretrainingSettings | None = None,
    seed: int = 0,
    base: Annotator | None = None,
    names: Sequence[str] | None = None,
    groups: str | None = None,
    tissues: str | None = None,
    species: str = "auto",
    gene_column: str | None = None,
    layer: str | None = None,
    device: str = "auto",
    state_folder: str | os.PathLike[str] | None = None,
    store: str | os.PathLike[str] | None = None,
    shown: bool | None = None,
) -> Annotator:
    """Make a model without cell types from many cells, labelled or not, to be given to `train` as its base.

    Parameters
    ----------
    data
        Files, folders of .h5ad and .zarr files, or AnnData objects with counts; each is a study with genes of its own.
        Mouse genes beside human ones are brought to their one-to-one human orthologues.
    labels
        Column of ``obs`` with cell types, in those data sets that have it; labels help, and need not agree.
    settings
        See `PretrainingSettings`.
    seed
        The same seed, data and machine give the same model.
    base
        Model whose genes, tokenizer and backbone are taken up, to be trained further.
    names
        Name of each data set, for messages, held-out studies and the ledger; by default the names of the files.
    groups
        Column of ``obs`` with donors or batches, to hold out whole ones where there are fewer than four studies.
    tissues
        Column of ``obs`` with tissues, in those data sets that have it: they are drawn as `settings` say, so that many
        studies of one tissue do not crowd out the others. A study without it counts as a tissue of its own.
    species, gene_column, layer
        ``human``, ``mouse`` or ``auto``; column of ``var`` with gene names; where the counts are. Found if not given.
    device
        ``auto``, ``cpu`` or ``cuda``.
    state_folder
        Folder for the state of the run and its log (``log.jsonl``, one line a look at the held-out cells); the same
        call takes an interrupted run up again and gives the numbers of an uninterrupted one.
    store
        Folder on a disk with room, for more cells than fit into memory: counts lie there in temporary files, eight
        bytes a value. The numbers are those of a run in memory.
    shown
        Show a progress bar; by default in a terminal.

    Returns
    -------
    Annotator
        It embeds cells and is a base for `train`; it has no types. The ledger holds the share of hidden expressed genes
        of held-out cells whose bin is found (``masked_accuracy``), beside what is had without a model: each gene's
        most frequent bin among training cells (``trivial_accuracy``), and the likeliest by gene and depth of the cell
        (``trivial_depth_accuracy``). All three know that the gene is expressed; ``masked_presence`` is the share of
        genes asked for that are rightly said to be expressed or not, beside ``trivial_depth_presence``;
        ``type_accuracy`` the share of labelled held-out cells whose type is told among those of their study.

    Raises
    ------
    CellsError, GenesError, LabelsError, ModelError, SettingsError

    Examples
    --------
    >>> import evercell as ec
    >>> from evercell.testing import synthetic_cells
    >>> from evercell.pretraining import quick_settings
    >>> model = ec.pretrain([synthetic_cells(seed=1), synthetic_cells(seed=2)], settings=quick_settings())
    >>> ec.embed(model, synthetic_cells(50, seed=3)).shape
    (50, 32)
    """
    settings = settings or PretrainingSettings()
    distributed.share(settings.training.batches_a_step)
    given = list(data) if isinstance(data, Sequence) and not isinstance(data, str) else [data]
    with room_in(None if store is None else Path(store)) as place:
        studies = read_for_pretraining(
            given, names=names, groups=groups, labels=labels, tissues=tissues, layer=layer, store=place, shown=shown
        )
        split, rows = split_studies(studies, share=settings.held_out, names=settings.held_out_studies, seed=seed)
        facts = {
            "verb": "pretrain",
            "data": [study.facts for study in studies],
            "types_added": [],
            "settings": settings.to_dict(),
            "seed": seed,
            "base": base.fingerprint if base is not None else None,
            "held_out": {
                "by": split.by,
                "groups": list(split.held_out),
                "cells": len(split.validation),
                "note": split.note,
            },
        }
        vocabulary, cells, held_out = _gathered(
            studies, rows, settings, base, {"species": species, "column": gene_column}, place
        )
        del studies
        where = choose_device(device)
        model = _new(vocabulary, settings, base, seed).on(where)
        objective = Objective(model, cells, settings, seed, where)
        validate = validation(objective, held_out, seed)
        folder = None if state_folder is None else Path(state_folder)
        _claim(folder, facts)
        log = _Log(folder, objective, validate)
        with progress("pretraining", shown=shown) as step, threads_of(model.backbone):

            def on_step(done: int, steps: int, loss: float) -> None:
                log.step = done
                step(done, steps, loss)

            history = fit(
                objective.module,
                objective,
                settings.training,
                seed=seed,
                validate=log.looked,
                state_folder=folder,
                on_step=on_step,
            )
        with torch.no_grad():
            metrics = validate()
    facts |= {"metrics": metrics, "history": history.rows, "steps": history.best_step}
    return replace(model, ledger=Ledger().appended(facts), settings=settings.to_dict())


def quick_settings() -> PretrainingSettings:
    """Settings for examples and tests: a small model trained for a second or two."""
    return PretrainingSettings(
        backbone_settings={"members": 2, "member_width": 16, "n_latents": 4, "depth": 1},
        training=TrainingSettings(samples=3200, batch_size=64, learning_rate=5e-3, evaluations=4),
    )


def _gathered(
    studies: Sequence[PretrainingStudy],
    rows: tuple[list[np.ndarray], list[np.ndarray]],
    settings: PretrainingSettings,
    base: Annotator | None,
    how: Mapping[str, Any],
    store: Path | None,
) -> tuple[GeneVocabulary, PretrainingCells, PretrainingCells]:
    """Vocabulary, cells to train on, cells held out. The genes are chosen on the cells to train on."""
    if base is not None:
        vocabulary = base.vocabulary
    else:
        trained_on = [study for study, part in zip(studies, rows[0], strict=True) if len(part)]
        vocabulary = shared_vocabulary(trained_on, settings.vocabulary, **how)
    cells, held_out = (gathered(studies, part, vocabulary, store=store, **how) for part in rows)
    columns = np.arange(len(vocabulary))
    if base is None:
        least = min(settings.least_cells, max(int(cells.sizes.sum()) // 10, 1))
        expressing = cells.n_expressing()
        columns = np.flatnonzero(expressing.sum(axis=0) >= least)
        if settings.most_genes is not None and len(columns) > settings.most_genes:
            shares = (expressing / cells.sizes[:, None]).sum(axis=0)[columns]
            columns = np.sort(columns[np.argsort(-shares, kind="stable")[: settings.most_genes]])
        vocabulary = vocabulary.taken(columns)
    return vocabulary, cells.over_genes(columns, store), held_out.over_genes(columns, store)


def _new(vocabulary: GeneVocabulary, settings: PretrainingSettings, base: Annotator | None, seed: int) -> Annotator:
    tokenizer: Tokenizer = TOKENIZERS[settings.tokenizer](**settings.tokenizer_settings)
    with seeded(seed):
        backbone: Backbone
        if base is not None:
            tokenizer, backbone = base.tokenizer, copy.deepcopy(base.backbone).requires_grad_(True)
        else:
            backbone = BACKBONES[settings.backbone](
                len(vocabulary), n_bins=tokenizer.n_bins, **settings.backbone_settings
            )
        head = GrowingHead(backbone.width, 0)
    return Annotator.begun(vocabulary, tokenizer, backbone.eval(), head.eval())


def _claim(folder: Path | None, facts: Mapping[str, Any]) -> None:
    """Note in the folder which run it belongs to; all processes have to belong to the same.

    Raises
    ------
    ModelError
        If it belongs to a run with other data, settings or seed.
    """
    text = json.dumps(facts, sort_keys=True, default=str)
    distributed.agree(text.encode(), "data, settings or seed")
    if folder is None:
        return
    run = {"sha256": hashlib.sha256(text.encode()).hexdigest()}
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / RUN).is_file():
        if json.loads((folder / RUN).read_text(encoding="utf-8")) != run:
            raise ModelError(
                f"`{folder}` holds the state of a run with other data, settings or seed",
                hint="resume with those it was begun with, or choose another state_folder",
            )
        return
    if not distributed.here().first:
        return
    with atomic_path(folder / RUN) as path:
        path.write_text(json.dumps(run), encoding="utf-8")


class _Log:
    """One line of JSON a look at the held-out cells; a run taken up again goes on in the same file."""

    def __init__(self, folder: Path | None, objective: Objective, validate: Callable[[], dict[str, float]]) -> None:
        self.path = None if folder is None else folder / LOG
        self.objective, self.validate = objective, validate
        self.step = 0
        self.rows: dict[int, dict[str, float]] = {}
        if self.path is not None and self.path.is_file():
            rows = [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()]
            self.rows = {int(row["step"]): row for row in rows}
        self.began = time.monotonic()

    def looked(self) -> dict[str, float]:
        """Figures of the held-out cells, written into the log with the mean losses since the last look."""
        figures = self.validate()
        # Averaged weights are looked at without a step of training before: they have no line of their own.
        if self.objective.terms:
            means = np.mean(self._terms(), axis=0)
            self.objective.terms = []
            row = {"step": self.step, **dict(zip(TERMS, map(float, means), strict=True))}
            row |= {f"held_out_{name}": value for name, value in figures.items()}
            self.rows[self.step] = row | {"seconds": round(time.monotonic() - self.began, 1)}
            self._write()
        return figures

    def _terms(self) -> np.ndarray:
        """Losses of all batches since the last look, of all processes, in the order of one process."""
        found = distributed.of_all(np.array(self.objective.terms))  # (processes, batches, terms)
        share = len(distributed.share(self.objective.settings.training.batches_a_step))
        by_step = found.reshape(len(found), -1, share, found.shape[-1]).swapaxes(0, 1)
        return by_step.reshape(-1, found.shape[-1])

    def _write(self) -> None:
        if self.path is None or not distributed.here().first:
            return
        with atomic_path(self.path) as path:
            path.write_text("".join(json.dumps(self.rows[at]) + "\n" for at in sorted(self.rows)), encoding="utf-8")

"""`update`: a finished model learns a new labelled data set; the old model stays as it is."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from evercell.annotator import Annotator
from evercell.augmentation import Augmentation
from evercell.bank import BANKS, ExampleBank
from evercell.celltypes import CellTypes, read_mapping
from evercell.circumstances import circumstances
from evercell.classification import sealed_figures
from evercell.errors import GateError, ModelError, SettingsError
from evercell.evaluation import Split, split_cells
from evercell.genes import GeneVocabulary
from evercell.sketches import refuse_rare, too_few
from evercell.stored_counts import cell_digests, room_in
from evercell.training import choose_device
from evercell.training_cells import (
    Study,
    TrainingCells,
    chosen_genes,
    describe,
    gather,
    read_studies,
    sealed_rows,
)
from evercell.updating import STRATEGIES
from evercell.updating.base import Strategy, UpdateSettings, replay_share
from evercell.updating.gate import tried_on_sealed
from evercell.updating.growth import with_genes_of
from evercell.updating.linear import LinearStrategy
from evercell.updating.settlement import settled
from evercell.updating.stage import Made, StageMaker
from evercell.updating.unseen import unlearnt

if TYPE_CHECKING:
    from anndata import AnnData

MOST_REPLAY = 0.8


def update(
    model: Annotator,
    data: AnnData | Sequence[AnnData],
    labels: str = "cell_type",
    *,
    groups: str | None = None,
    strategy: str = "canal",
    mapping: Mapping[str, str] | str | Path | None = None,
    accept_proposals: bool = False,
    joint_with: Sequence[AnnData] | None = None,
    bank: str = "cells",
    bank_size: int | None = None,
    settings: UpdateSettings | None = None,
    seed: int = 0,
    tolerance: float = 0.02,
    force: bool = False,
    names: Sequence[str] | None = None,
    layer: str | None = None,
    species: str = "auto",
    gene_column: str | None = None,
    device: str = "auto",
    state_folder: Path | None = None,
    store: str | os.PathLike[str] | None = None,
    shown: bool | None = None,
) -> Annotator:
    """Teach a model a new labelled data set without forgetting the earlier ones.

    The new model is tried on sealed cells of every earlier stage. If an old type falls by more than `tolerance`, the
    update is tried again with twice the replay (where the strategy replays, and the bank is not of so many stages that
    it has that share already), then with `analytic`; the first that holds is returned.

    Parameters
    ----------
    model
        A model with cell types; it stays as it is.
    data, labels, groups
        As `train` takes them.
    strategy
        A name of `STRATEGIES`. A model whose linear member alone tells the types (`evercell.importing`) is always
        updated by `evercell.updating.linear`.
    mapping
        Label -> name of a type, or a file of that (`read_mapping`); goes before every other rule. A label mapped to its
        own name is a new type.
    accept_proposals
        Settle renamed and coarser labels as the old model proposes.
    joint_with
        Data sets of earlier stages, for the strategy `joint`.
    bank
        What this stage leaves behind: ``cells``, in the example bank and sealed, or ``sketch``, means and covariances
        of its types and no cell (`evercell.sketches`). What earlier stages left stays as it is.
    bank_size
        Size of the example bank afterwards; by default that of the model.
    settings
        See `UpdateSettings`.
    seed
        The same seed, model, data and machine give the same new model.
    tolerance
        Share of its sealed cells that an old type may lose.
    force
        Return what was asked for, tried once, even if an old type falls.
    names, layer, species, gene_column, device, state_folder, store, shown
        As `train` takes them.

    Returns
    -------
    Annotator
        A new model. Its last stage in the ledger holds the settled labels, the figures on held-out cells, and all tries
        with each old type's recall on sealed cells before and after.

    Raises
    ------
    LabelsError
        Labels must be settled first, or cannot be read.
    GateError
        No try kept the old types.
    CellsError, GenesError, ModelError, SettingsError

    Examples
    --------
    >>> import evercell as ec
    >>> from evercell.testing import synthetic_cells
    >>> from evercell.finetuning import quick_settings
    >>> model = ec.train(synthetic_cells(seed=1), groups="donor", settings=quick_settings())
    >>> new = synthetic_cells(n_types=5, seed=2)
    >>> model = ec.update(model, new, groups="donor", mapping={"acinar": "acinar"})
    >>> model.types.names[-1], len(model.ledger)
    ('acinar', 2)
    """
    settings = settings or UpdateSettings()
    settings = _with_bank(settings, bank_size, tolerance)
    if settings.augmentation is None:
        settings = replace(settings, augmentation=Augmentation(**model.settings.get("augmentation", {})))
    # A transformer that was never trained gives other strategies nothing to hold on to.
    asked = LinearStrategy if model.linear_only else STRATEGIES[strategy]
    strategy = asked.name
    if bank not in BANKS:
        raise SettingsError(f"there is no bank `{bank}`", hint=f"choose one of: {', '.join(BANKS)}")
    if not len(model.types):
        raise ModelError("the model knows no cell types yet", hint="make a first model with `evercell train --from`")
    old = model.on(choose_device(device))
    stage = len(old.ledger) + 1
    adatas = [data] if not isinstance(data, Sequence) else list(data)
    studies = read_studies(adatas, labels, groups=groups, layer=layer, names=names, least_types=1)
    chosen = read_mapping(mapping) if isinstance(mapping, str | Path) else mapping
    how: dict[str, Any] = {"species": species, "column": gene_column}
    keeps_cells = bank == "cells"
    with room_in(None if store is None else Path(store)) as place:
        agreed = settled(old, studies, mapping=chosen, accept_proposals=accept_proposals, store=place, **how)
        studies = agreed.studies
        types = old.types.extended(sorted({name for study in studies for name in study.labels}), stage)
        cells, vocabulary, split = _gathered(
            old, studies, types, settings=settings, seed=seed, grow=asked.learns_genes, store=place, **how
        )
        if not keeps_cells:
            _check_rare(old, cells.codes if settings.refit else cells.codes[split.train], types)
        earlier, joint = None, list[Study]()
        if joint_with is not None:
            names = [f"earlier {i + 1}" for i in range(len(joint_with))]
            joint = read_studies(joint_with, labels, layer=layer, names=names, least_types=1)
            known = settled(old, joint, accept_proposals=True, store=place, **how).studies
            earlier = without_sealed(gather(known, vocabulary, types, store=place, **how), old.sealed)

        described = [describe(study) for study in studies]
        if state_folder is not None:  # an update of other data, settings or model is another run
            words = [described, settings.to_dict(), seed, strategy, old.fingerprint, list(types.names)]
            run = json.dumps(words if keeps_cells else [*words, bank])
            state_folder = Path(state_folder) / hashlib.sha256(run.encode()).hexdigest()[:12]
        sealed = sealed_rows(cells, split.validation, settings.sealed if keeps_cells else 0, seed=seed)
        maker = StageMaker(
            old, types, vocabulary, cells, earlier, split.train, split.validation, sealed, seed, shown, keeps_cells,
            unlearnt(old, cells),
        )  # fmt: skip
        attempts = _attempts(old, strategy, settings, force=force)
        made, tries = _first_that_holds(maker, attempts, state_folder, tolerance, force)
        new_sealed = cells.taken(sealed).as_bank(stage=stage)
    if not keeps_cells and (made.model.bank.stages == stage).any():
        raise ModelError(
            f"the strategy `{strategy}` kept cells where only a sketch is allowed", hint="choose another strategy"
        )
    new_sealed = new_sealed.over_genes(len(made.model.vocabulary))  # a strategy may have learnt of no new ones
    kept = new_sealed if old.sealed is None else old.sealed.joined(new_sealed)
    published = replace(made.model, sealed=kept)
    facts = {
        "verb": "update",
        "strategy": tries[-1]["strategy"],
        "asked": strategy,
        "data": described,
        "types_added": [name for name in types.names if name not in old.types],
        "genes_added": len(published.vocabulary) - len(old.vocabulary),
        "labels": agreed.to_dict(),
        "settings": made.settings.to_dict(),
        "seed": seed,
        "base": old.fingerprint,
        "read": {
            "labels": labels,
            "groups": groups,
            "layer": layer,
            "species": species,
            "gene_column": gene_column,
            "mapping": None if chosen is None else dict(chosen),
            "accept_proposals": accept_proposals,
            "joint_with": [describe(study) for study in joint],
        },
        "circumstances": circumstances(old.device),
        "made": published.fingerprint,
        "held_out": {
            "by": split.by,
            "groups": list(split.held_out),
            "cells": len(split.validation),
            "note": split.note,
        },
        "metrics": made.metrics,
        "history": made.history.rows,
        "steps": made.history.best_step,
        "tolerance": tolerance,
        "forced": force,
        "tries": tries,
        "sealed": sealed_figures(published),
        "unlearnt": list(maker.unlearnt),
    }
    if published.sketch is not None or not keeps_cells:
        facts |= _sketch_facts(published, studies, stage, bank)
    return replace(published, ledger=old.ledger.appended(facts))


def _sketch_facts(model: Annotator, studies: Sequence[Study], stage: int, bank: str) -> dict[str, Any]:
    """What the ledger says of the sketch of a stage, and of types left to earlier stages."""
    sketched = [] if model.sketch is None else model.sketch.facts(model.types.names)
    now = [one for one in sketched if one["stage"] == stage]
    left_out = {str(label) for study in studies for label in study.labels} - {str(one["type"]) for one in now}
    return {"bank": bank, "sketched": now, "not_sketched": sorted(left_out) if bank == "sketch" else []}


def _check_rare(old: Annotator, codes: np.ndarray, types: CellTypes) -> None:
    """Refuse types of which nothing would be remembered: too few cells to sketch, and none from earlier stages."""
    known = old.bank.codes if old.sketch is None else np.concatenate([old.bank.codes, old.sketch.codes])
    refuse_rare(codes, np.setdiff1d(too_few(codes, len(types)), known), types)


def _gathered(
    old: Annotator,
    studies: Sequence[Study],
    types: CellTypes,
    *,
    settings: UpdateSettings,
    seed: int,
    species: str,
    column: str | None,
    grow: bool,
    store: Path | None,
) -> tuple[TrainingCells, GeneVocabulary, Split]:
    """New cells over the old genes and those that they express besides, and which of them are held out."""
    vocabulary = old.vocabulary
    if grow and settings.new_genes and old.settings.get("variable_genes") is None:
        vocabulary = with_genes_of(vocabulary, studies, species=species, column=column)
    cells = gather(studies, vocabulary, types, species=species, column=column, store=store)
    cells = without_sealed(cells, old.sealed)
    split = split_cells(cells.codes, cells.groups, test_share=settings.held_out, seed=seed)
    expressed = chosen_genes(cells.taken(split.train), least_cells=settings.least_cells, variable_genes=None)
    columns = np.union1d(np.arange(len(old.vocabulary)), expressed)
    return cells.over_genes(columns), vocabulary.taken(columns), split


def _strategy(name: str) -> type[Strategy]:
    """The strategy of a name; `linear` is in no registry, because it is for models that can be taught by no other."""
    return LinearStrategy if name == LinearStrategy.name else STRATEGIES[name]


def _with_bank(settings: UpdateSettings, bank_size: int | None, tolerance: float) -> UpdateSettings:
    """The settings with a bank of that size; numbers that cannot be are refused before anything is read."""
    if not 0 <= tolerance <= 1:
        raise SettingsError(f"the tolerance is {tolerance:g}", hint="pass --tolerance with a share from 0 to 1")
    if bank_size is not None and bank_size < 0:
        raise SettingsError(f"the bank cannot hold {bank_size:,} cells", hint="pass --bank-size with a number from 0")
    return settings if bank_size is None else replace(settings, bank=bank_size)


def _first_that_holds(
    maker: StageMaker,
    attempts: Sequence[tuple[str, UpdateSettings]],
    state_folder: Path | None,
    tolerance: float,
    force: bool,
) -> tuple[Made, list[dict[str, Any]]]:
    """The first new model that the gate lets through, and what was tried until then."""
    tries: list[dict[str, Any]] = []
    for number, (name, settings) in enumerate(attempts, start=1):
        folder = None if state_folder is None else state_folder / f"{number}-{name}"
        made = maker.made(_strategy(name), settings, folder)
        verdict = tried_on_sealed(maker.old, made.model, tolerance=tolerance)
        tries.append({"strategy": name, "replay": settings.replay, **verdict.to_dict()})
        if verdict.holds or force:
            return made, tries
    raise GateError(
        f"old types fell by more than {tolerance:g} on sealed cells with every setting tried: {verdict.sentence()}",
        hint="give --tolerance a larger share, give more labelled cells of these types, or --force to publish",
    )


def _attempts(
    old: Annotator, strategy: str, settings: UpdateSettings, *, force: bool
) -> list[tuple[str, UpdateSettings]]:
    """What is tried, one after the other, until the gate holds."""
    found = [(strategy, settings)]
    if force or strategy == LinearStrategy.name:
        return found
    safer = replace(settings, replay=min(2 * settings.replay or UpdateSettings().replay, MOST_REPLAY))
    # A bank of many stages has that share of the draws already: the same training would come out the same.
    more = old.sketch is not None or replay_share(old.bank, safer) > replay_share(old.bank, settings)
    if STRATEGIES[strategy].replays and more:
        found.append((strategy, safer))
    if strategy != "analytic":
        found.append(("analytic", settings))
    return found


def without_sealed(cells: TrainingCells, sealed: ExampleBank | None) -> TrainingCells:
    """The cells without those that an earlier stage sealed: the same data set may be given twice."""
    if sealed is None or not len(sealed):
        return cells
    secret = set(cell_digests(sealed.counts))
    n_genes = sealed.counts.shape[1]
    blocks = cells.stored.blocks()
    keep = [one not in secret for block in blocks for one in cell_digests(block[:, :n_genes].tocsr())]
    return cells if all(keep) else cells.taken(np.flatnonzero(keep))

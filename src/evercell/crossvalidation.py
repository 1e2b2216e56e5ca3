"""Cross-validation: what a model trained on some donors says of the others, evercell beside other methods."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from evercell.annotation import annotate
from evercell.cells import write_table
from evercell.celltypes import CellTypes
from evercell.comparison import METHODS, Prediction, Query, Reference
from evercell.errors import CellsError, LabelsError
from evercell.evaluation import Evaluation, evaluate
from evercell.finetuning import ModelSettings, settings_for, train
from evercell.folds import Folds, make_folds, twins_of
from evercell.labels import listed
from evercell.outputs import atomic_path
from evercell.progress import progress
from evercell.training_cells import Study, TrainingCells, describe, gather, read_studies, vocabulary_of

if TYPE_CHECKING:
    from anndata import AnnData
    from scipy.sparse import csr_matrix

    from evercell.annotator import Annotator

EVERCELL = "evercell"
FIGURES = ("accuracy", "balanced_accuracy", "weighted_f1", "macro_f1")
STRATIFIED, STUDY = "stratified", "study"


@dataclass(frozen=True, eq=False)
class CrossValidation:
    """What every method said of every cell when its fold was held out.

    Attributes
    ----------
    scores
        One row a method and fold: what was held out, cells trained on, tested and scored, the figures, seconds.
    cells
        One row a cell, in the order of the data sets: study, group, fold, true type, whether the training cells of its
        fold showed that type (``known``), and of every method its label and confidence.
    history
        Learning curves of evercell, one row a fold and look at the cells that its training held out for itself.
    by, warnings
        How folds were made; what makes the figures optimistic.
    seed
        Of folds and methods.
    """

    scores: pd.DataFrame
    cells: pd.DataFrame
    history: pd.DataFrame
    by: str
    warnings: tuple[str, ...]
    seed: int

    @property
    def methods(self) -> list[str]:
        """Names of the methods, in the order in which they were asked for."""
        return list(dict.fromkeys(self.scores["method"]))

    def summary(self) -> pd.DataFrame:
        """Mean and standard deviation over the folds of every figure, one row a method."""
        return self.scores.groupby("method", sort=False)[list(FIGURES)].agg(["mean", "std"])

    def pooled(self, method: str) -> Evaluation:
        """Figures over the cells of all folds together, with a row a type and the confusion table."""
        known = self.cells[self.cells["known"]]
        return evaluate(known["truth"], known[method], confidence=known[f"{method}_confidence"].to_numpy())

    def to_dict(self) -> dict[str, Any]:
        """Figures as JSON can hold them."""
        summary = self.summary()
        return {
            "by": self.by,
            "seed": self.seed,
            "warnings": list(self.warnings),
            "mean": {method: {name: row[(name, "mean")] for name in FIGURES} for method, row in summary.iterrows()},
            "sd": {method: {name: row[(name, "std")] for name in FIGURES} for method, row in summary.iterrows()},
            "folds": self.scores.to_dict(orient="records"),
            "per_type": {method: self.pooled(method).per_type.to_dict(orient="index") for method in self.methods},
        }

    def save(self, folder: Path) -> None:
        """Write ``folds.csv``, ``cells.csv``, ``history.csv``; of methods ``types-`` and ``confusion-NAME.csv``."""
        folder.mkdir(parents=True, exist_ok=True)
        write_table(self.scores, folder / "folds.csv")
        write_table(self.cells, folder / "cells.csv")
        if len(self.history):
            write_table(self.history, folder / "history.csv")
        for method in self.methods:
            pooled = self.pooled(method)
            write_table(pooled.per_type, folder / f"types-{method}.csv")
            write_table(pooled.confusion, folder / f"confusion-{method}.csv")


def cross_validate(
    data: AnnData | Sequence[AnnData],
    labels: str = "cell_type",
    *,
    by: str = STRATIFIED,
    n_folds: int = 5,
    methods: Sequence[str] = (EVERCELL,),
    twins: str = "refuse",
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
) -> CrossValidation:
    """Train on some of the cells, label the others, and turn round until every cell was labelled once.

    All that is estimated (genes, thresholds, weights, how types are balanced) is estimated on the training cells of the
    fold. A cell whose type no training cell of its fold shows cannot be labelled rightly: it is counted, not scored.

    Parameters
    ----------
    data, labels
        One AnnData with counts, or several, each with its own genes, and the column of ``obs`` with the cell types.
    by
        Column of ``obs`` with donors or batches, which are kept whole; ``study`` to keep data sets (or the sources of a
        merged one) whole; ``stratified`` to draw cells at random by type, which flatters every method.
    n_folds
        Number of folds.
    methods
        ``evercell`` and names in `evercell.comparison.METHODS`; all see the same folds. The others are given the genes
        that all data sets measured.
    twins
        What to do with copies of a cell in other folds, see `make_folds`.
    base, settings
        Of evercell, see `train`. Nothing is sealed, because no update follows.
    seed
        Of folds and methods.
    names, layer, species, gene_column, device, shown
        See `train`.
    state_folder
        Folder that keeps the labels of every fold that is done; the same call goes on from there.

    Raises
    ------
    CellsError, GenesError, LabelsError, SettingsError

    Examples
    --------
    >>> from evercell.finetuning import quick_settings
    >>> from evercell.testing import synthetic_cells
    >>> found = cross_validate(synthetic_cells(seed=1), by="donor", n_folds=2, settings=quick_settings(), shown=False)
    >>> found.scores["fold"].tolist()
    [1, 2]
    """
    chosen = {name: None if name == EVERCELL else METHODS[name]() for name in methods}
    for method in chosen.values():
        if method is not None:
            method.check()
    settings = replace(settings or settings_for(base), sealed=0)
    adatas = [data] if not isinstance(data, Sequence) else list(data)
    column = None if by in (STRATIFIED, STUDY) else by
    studies = read_studies(
        adatas, labels, groups=column, layer=layer, names=names, least_types=2 if len(adatas) == 1 else 1
    )
    types = CellTypes(tuple(sorted({name for study in studies for name in study.labels})))
    vocabulary = vocabulary_of(studies, species=species, column=gene_column)
    cells = gather(studies, vocabulary, types, species=species, column=gene_column)
    truth = np.asarray(types.names, dtype=object)[cells.codes]
    study_names = np.array([study.name for study in studies], dtype=object)[cells.studies]
    groups = {STRATIFIED: None, STUDY: study_names}.get(by, cells.groups)
    folds = make_folds(truth, groups, n_folds=n_folds, seed=seed, twins=twins_of(cells.counts), when_twins=twins)
    described = [describe(study) for study in studies]
    notes = [*folds.warnings, *_seen_before(base, described)]
    if by == STRATIFIED and (told := _told_donors(adatas)):
        notes.append(
            f"folds are random cells, though the data tell {told}: cells of one are on both sides, so the figures are "
            "too good for a new one; keep them whole with `by`"
        )
    run = _Run(studies, cells, vocabulary.symbols, truth, folds, settings, base, seed, device, species, gene_column)
    facts = [described, by, n_folds, seed, twins, species, gene_column]
    rows, looks = [], []
    table = _cells_table(studies, study_names, groups, folds, truth)
    with progress("folds", shown=shown) as step:
        for place, (method_name, method) in enumerate(chosen.items()):
            words = [*facts, method_name]
            words += [settings.to_dict(), base and base.fingerprint] if method is None else [method.version()]
            digest = hashlib.sha256(json.dumps(words).encode()).hexdigest()[:12]
            found_labels, confidence = np.full(len(cells), "", dtype=object), np.full(len(cells), np.nan)
            for fold, (training, tested) in enumerate(folds):
                step(place * n_folds + fold, len(chosen) * n_folds, None)
                kept = None if state_folder is None else Path(state_folder) / f"{method_name}-{fold + 1}-{digest}.json"
                done = _kept(kept)
                if done is None:
                    done = run.evercell(training, tested) if method is None else run.other(method, training, tested)
                    _keep(kept, done)
                found_labels[tested], confidence[tested] = done["labels"], done["confidence"]
                known = np.isin(truth[tested], truth[training])
                table.loc[tested, "known"] = known
                looks += [{"fold": fold + 1, **look} for look in done["history"]]
                rows.append(
                    {
                        "method": method_name,
                        "fold": fold + 1,
                        "held_out": ", ".join(folds.held_out[fold]) or "cells at random",
                        "n_train": len(training),
                        "n_test": len(tested),
                        "scored": int(known.sum()),
                        **_figures(truth[tested][known], found_labels[tested][known]),
                        "seconds_train": done["seconds_train"],
                        "seconds_annotate": done["seconds_annotate"],
                    }
                )
            table[method_name], table[f"{method_name}_confidence"] = found_labels, confidence
        step(len(chosen) * n_folds, len(chosen) * n_folds, None)
    table.index = pd.Index(table.pop("cell"), name="cell")
    unscored = int((~table["known"]).sum())
    if unscored:
        notes.append(
            f"{unscored:,} of {len(table):,} cells are of a type that the training cells of their fold do not show; "
            "they are not scored"
        )
    return CrossValidation(pd.DataFrame(rows), table, pd.DataFrame(looks), by, tuple(notes), seed)


@dataclass(frozen=True)
class _Run:
    """One division of the cells, and how a method is trained and asked on a fold of it."""

    studies: Sequence[Study]
    cells: TrainingCells
    symbols: Sequence[str]
    truth: np.ndarray
    folds: Folds
    settings: ModelSettings
    base: Annotator | None
    seed: int
    device: str
    species: str
    gene_column: str | None

    def evercell(self, training: np.ndarray, tested: np.ndarray) -> dict[str, Any]:
        """Train on the studies as they are, each with its own genes, and label what is left of them."""
        options: dict[str, Any] = {"species": self.species, "gene_column": self.gene_column, "device": self.device}
        parts = self._parts(training)
        start = time.perf_counter()
        model = train(
            list(parts.values()),
            "label",
            groups=None if self.cells.groups is None else "group",
            base=self.base,
            settings=self.settings,
            seed=self.seed,
            names=list(parts),
            shown=False,
            **options,
        )
        trained = time.perf_counter()
        labels, confidence = np.full(len(self.cells), "", dtype=object), np.full(len(self.cells), np.nan)
        for name, part in self._parts(tested).items():
            found = annotate(model, part, shown=False, name=name, **options)
            rows = part.obs["row"].to_numpy()
            labels[rows], confidence[rows] = found.best_labels, found.obs[f"{found.key}_confidence"].to_numpy()
        return {
            "labels": labels[tested].tolist(),
            "confidence": confidence[tested].tolist(),
            "history": model.ledger.stages[-1].facts["history"],
            "seconds_train": trained - start,
            "seconds_annotate": time.perf_counter() - trained,
        }

    def other(self, method: Any, training: np.ndarray, tested: np.ndarray) -> dict[str, Any]:
        """Train another method on the genes that all studies measured, and label what is left."""
        shared = np.flatnonzero(self.cells.measured.all(axis=0))
        if not len(shared):
            raise CellsError(
                f"{listed(study.name for study in self.studies)} share no gene: only evercell can be trained on them",
                hint="leave out the other methods, or data sets",
            )
        batches = np.full(len(self.cells), "all") if self.cells.groups is None else self.cells.groups.astype(str)
        genes = np.asarray(_unique(np.asarray(self.symbols, dtype=object)[shared]))
        counts = self.shared_counts
        reference = Reference(counts[training], self.truth[training], batches[training], genes)
        found: Prediction = method(reference, Query(counts[tested], batches[tested]), self.seed)
        return {
            "labels": [str(label) for label in found.labels],
            "confidence": np.asarray(found.confidence, dtype=float).tolist(),
            "history": [],
            "seconds_train": found.seconds_train,
            "seconds_annotate": found.seconds_annotate,
        }

    @cached_property
    def shared_counts(self) -> csr_matrix:
        """Counts of all cells over the genes that all studies measured."""
        return self.cells.counts[:, self.cells.measured.all(axis=0)].tocsr()

    @cached_property
    def own_counts(self) -> list[csr_matrix]:
        """Counts of each study over its own genes."""
        return [study.counts.to_csr() for study in self.studies]

    def _parts(self, rows: np.ndarray) -> dict[str, AnnData]:
        """Cells of every study that has any of the rows, over its own genes."""
        import anndata as ad

        parts = {}
        for number, study in enumerate(self.studies):
            own = np.flatnonzero(self.cells.studies == number)
            first, wanted = own[0], np.intersect1d(own, rows)
            if not len(wanted):
                continue
            within = study.rows[wanted - first]
            obs = pd.DataFrame({"label": self.truth[wanted], "row": wanted}, index=study.counts.cells[within])
            if self.cells.groups is not None:
                obs["group"] = self.cells.groups[wanted]
            parts[study.name] = ad.AnnData(self.own_counts[number][within], obs=obs, var=study.counts.genes.copy())
        return parts


def _cells_table(
    studies: Sequence[Study], study_names: np.ndarray, groups: np.ndarray | None, folds: Folds, truth: np.ndarray
) -> pd.DataFrame:
    names = np.concatenate([np.asarray(study.counts.cells, dtype=object)[study.rows] for study in studies])
    columns: dict[str, Any] = {"cell": names, "study": study_names}
    if groups is not None:
        columns["group"] = groups
    return pd.DataFrame({**columns, "fold": folds.of + 1, "truth": truth, "known": False})


def _figures(truth: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Figures over the cells of one fold; NaN where none could be scored."""
    if not len(truth):
        return dict.fromkeys(FIGURES, float("nan"))
    figures: Mapping[str, Any] = evaluate(truth, labels).figures()
    return {name: float(figures[name]) for name in FIGURES}


def _seen_before(base: Annotator | None, studies: Sequence[Mapping[str, Any]]) -> list[str]:
    """A warning where the pretrained model has learnt from these cells: then no cell of theirs is new to it."""
    if base is None:
        return []
    described = [one for stage in base.ledger.stages for one in stage.facts.get("data", [])]
    seen = {_stem(str(one.get("name", ""))) for one in described}
    digests = {one.get("sha256") for one in described}
    told = [one["name"] for one in studies if one["sha256"] in digests or _stem(one["name"]) in seen]
    if not told:
        return []
    labelled = any(one.get("labels_sha256") for one in described)
    with_labels = ", with their labels," if labelled else ""
    return [
        f"the pretrained model has seen the cells of {listed(told)}{with_labels} before: no fold of them is unseen, so "
        "the figures are too good for a new study"
    ]


def _stem(name: str) -> str:
    """Name of a data set without suffix: `pretrain` calls files so, `train` does not. Sources keep theirs."""
    return re.sub(r"\.(h5ad|zarr|h5|loom)(?=/|$)", "", name)


def _told_donors(adatas: Sequence[AnnData]) -> str:
    """Columns that look like those of donors or batches, as words; empty where there are none."""
    found = [
        name for name in ("donor", "batch") if any(name in a.obs and len(a.obs[name].unique()) > 1 for a in adatas)
    ]
    return " and ".join({"donor": "donors (`donor`)", "batch": "batches (`batch`)"}[name] for name in found)


def _unique(names: np.ndarray) -> list[str]:
    """Names, a number behind those that repeat."""
    seen: dict[str, int] = {}
    found = []
    for name in map(str, names):
        seen[name] = seen.get(name, 0) + 1
        found.append(name if seen[name] == 1 else f"{name}-{seen[name]}")
    return found


def _kept(path: Path | None) -> dict[str, Any] | None:
    if path is None or not path.is_file():
        return None
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise LabelsError(f"`{path}` is damaged: {error}", hint="remove it, and the fold is run again") from error
    return found


def _keep(path: Path | None, done: Mapping[str, Any]) -> None:
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as unfinished:
        unfinished.write_text(json.dumps(done), encoding="utf-8")

"""Run the stages of a model again from their data, and compare what comes out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from evercell import registry
from evercell.annotator import Annotator
from evercell.augmentation import Augmentation
from evercell.cells import read_cells
from evercell.checkpoint import is_model, load, load_stage, stages_kept
from evercell.circumstances import circumstances, differences
from evercell.errors import CellsError, EvercellError, ModelError
from evercell.finetuning import ModelSettings, train
from evercell.training import TrainingSettings
from evercell.training_cells import Study, describe, read_studies
from evercell.updating.base import UpdateSettings
from evercell.updating.linear import LinearStrategy
from evercell.updating.update import update

if TYPE_CHECKING:
    from anndata import AnnData

    from evercell.ledger import Stage

KINDS = (".h5ad", ".zarr")


@dataclass(frozen=True)
class Comparison:
    """One stage of a model, run again.

    Parameters
    ----------
    stage
        Number, from 1.
    verdict
        ``same``; ``different``; ``not run``, because something is not there; or ``unknown``, where the ledger, of an
        early version, does not hold what came out.
    expected, found
        Fingerprint of the model after the stage, as the ledger has it and as it came out now.
    why
        What is known of the reason; empty where all is the same.
    n_differing, largest
        Of the arrays of both models, where the earlier one is kept: how many differ, and the largest difference of two
        values.
    """

    stage: int
    verdict: str
    expected: str = ""
    found: str = ""
    why: str = ""
    n_differing: int | None = None
    largest: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def reproduce(
    path: str | Path, data: Iterable[str | Path], *, device: str = "auto", shown: bool | None = None
) -> tuple[list[Comparison], Annotator | None]:
    """Run the stages in the ledger of a model again, in order, until one comes out different.

    Parameters
    ----------
    path
        Directory of the model; it stays as it is.
    data
        Files of cells, and folders of which every ``.h5ad`` and ``.zarr`` is looked at. Which file a stage was trained
        on is told by the fingerprint of its counts, genes and labels, not by its name.
    device
        ``auto``, ``cpu`` or ``cuda``.
    shown
        Show progress bars; by default in a terminal.

    Returns
    -------
    list of Comparison, Annotator or None
        One for each stage that was come to, and the model after the last one that was run.

    Raises
    ------
    ModelError
        The model cannot be read, or has no stages.
    """
    model = load(path)
    if not len(model.ledger):
        raise ModelError(f"the model `{path}` has no stages", hint="its ledger is empty: there is nothing to run again")
    files = _Files(data)
    compared: list[Comparison] = []
    made: Annotator | None = None
    for stage in model.ledger:
        number = int(stage.facts["stage"])
        expected = _fingerprint_after(model, number)
        before = made
        try:
            made = _again(stage, before, files, device=device, shown=shown)
        except EvercellError as error:
            why = " ".join(filter(None, [error.message, f"({error.hint})" if error.hint else ""]))
            compared.append(Comparison(number, "not run", expected, why=why))
            return compared, before
        one = _compared(number, expected, made, stage, _kept(path, number, model))
        compared.append(one)
        if one.verdict == "different":
            break
    return compared, made


def _fingerprint_after(model: Annotator, number: int) -> str:
    """What the ledger holds of the model after a stage; of early versions the next stage tells it, or the model."""
    stages = model.ledger.stages
    if made := stages[number - 1].facts.get("made"):
        return str(made)
    if number < len(stages):
        return str(stages[number].facts.get("base") or "")
    return model.fingerprint


def _kept(path: str | Path, number: int, model: Annotator) -> Annotator | None:
    """The model as it was after a stage, if the directory keeps it."""
    if number == len(model.ledger):
        return model
    return load_stage(path, number, now=model) if number in stages_kept(path) else None


def _compared(number: int, expected: str, made: Annotator, stage: Stage, kept: Annotator | None) -> Comparison:
    found = made.fingerprint
    if not expected:
        return Comparison(number, "unknown", "", found, "the ledger does not hold what came out of this stage")
    if found == expected:
        return Comparison(number, "same", expected, found)
    if made.halved().fingerprint == expected:
        return Comparison(number, "same", expected, found, "after rounding to half precision, as it was stored")
    then, now = ([one["sha256"] for one in facts["data"]] for facts in (stage.facts, made.ledger.stages[-1].facts))
    reasons = ["the labels of the data are others"] if then != now else []
    reasons += differences(stage.facts.get("circumstances", {}), circumstances(made.device))
    if not stage.facts.get("circumstances"):
        reasons.append("versions and threads of then are not in the ledger, which an early version wrote")
    elif not reasons:
        reasons.append("data, settings, versions and threads are those of then: another machine, or a fault")
    if kept is None or kept.fingerprint != expected:
        after = "; the model was changed after this stage" if kept is not None else ""
        return Comparison(number, "different", expected, found, "; ".join(reasons) + after)
    n_differing, largest = _distance(kept.weights(), made.weights())
    return Comparison(number, "different", expected, found, "; ".join(reasons), n_differing, largest)


def _distance(then: Mapping[str, np.ndarray], now: Mapping[str, np.ndarray]) -> tuple[int, float]:
    """How many arrays differ, and the largest difference of two values; infinite where shapes or names do."""
    n_differing, largest = 0, 0.0
    for name in then.keys() | now.keys():
        a, b = then.get(name), now.get(name)
        if a is None or b is None or a.shape != b.shape:
            n_differing, largest = n_differing + 1, float("inf")
        elif not np.array_equal(a, b):
            n_differing += 1
            largest = max(largest, float(np.abs(a.astype(np.float64) - b.astype(np.float64)).max()))
    return n_differing, largest


def _again(stage: Stage, before: Annotator | None, files: _Files, *, device: str, shown: bool | None) -> Annotator:
    """The model after a stage that is run again."""
    facts = stage.facts
    verb = facts.get("verb")
    if verb not in ("train", "update"):
        raise ModelError(
            f"stage {facts['stage']} was made by `{verb}`", hint="stages of `train` and `update` can be run again"
        )
    read = dict(facts.get("read") or {})
    adatas, names, labels, groups = files.of(facts, read)
    how: dict[str, Any] = {name: read[name] for name in ("layer", "species", "gene_column") if name in read}
    how |= {"names": names, "groups": groups, "seed": int(facts["seed"]), "bank": facts.get("bank", "cells")}
    how |= {"device": device, "shown": shown}
    if verb == "train":
        return train(adatas, labels, base=_base(facts.get("base")), settings=_model_settings(facts), **how)
    if before is None:
        raise ModelError(f"stage {facts['stage']} is an update, and there is no stage before it")
    mapping = read.get("mapping")
    if not read:  # of early versions: what each label became
        mapping = {row["label"]: row["to"] for row in facts.get("labels", []) if row.get("to")}
    strategy = facts["strategy"]
    if read.get("joint_with"):
        how["joint_with"] = [files.found(one, labels, read.get("layer"))[0] for one in read["joint_with"]]
    # Of several tries the one that was published is run, and by itself: it does not depend on those before.
    return update(
        before,
        adatas,
        labels,
        strategy="canal" if strategy == LinearStrategy.name else strategy,
        mapping=mapping,
        accept_proposals=bool(read.get("accept_proposals", False)),
        settings=_update_settings(facts),
        tolerance=float(facts["tolerance"]),
        force=True,
        **how,
    )


def _model_settings(facts: Mapping[str, Any]) -> ModelSettings:
    stored = dict(facts["settings"])
    stored["hidden"] = tuple(stored.get("hidden", ()))
    stored["training"] = TrainingSettings(**stored["training"])
    stored["augmentation"] = Augmentation(**stored["augmentation"])
    return ModelSettings(**stored)


def _update_settings(facts: Mapping[str, Any]) -> UpdateSettings:
    stored = dict(facts["settings"])
    stored["training"] = TrainingSettings(**stored["training"])
    stored["augmentation"] = Augmentation(**(stored.get("augmentation") or {}))
    return UpdateSettings(**stored)


def _base(fingerprint: str | None) -> Annotator | None:
    """The model of this fingerprint among those that a name leads to."""
    if fingerprint is None:
        return None
    for one in registry.available():
        if not one.problem and is_model(one.path) and (found := load(one.path)).fingerprint == fingerprint:
            return found
    raise ModelError(
        f"the model that this one was trained from, {fingerprint[:12]}, is not there",
        hint="copy it to where models are found with `evercell models add DIR`",
    )


class _Files:
    """Files of cells, found by the fingerprint that a ledger has of them."""

    def __init__(self, data: Iterable[str | Path]) -> None:
        self.paths: list[Path] = []
        for one in map(Path, data):
            inside = sorted(file for kind in KINDS for file in one.rglob(f"*{kind}")) if one.is_dir() else []
            self.paths += inside if inside and one.suffix not in KINDS else [one]

    def of(self, facts: Mapping[str, Any], read: Mapping[str, Any]) -> tuple[list[AnnData], list[str], str, str | None]:
        """Cells of a stage, their names, the column of labels and that of groups."""
        labels = str(read.get("labels", "cell_type"))
        adatas: dict[str, AnnData] = {}
        for one in facts["data"]:
            adata, whole = self.found(one, labels, read.get("layer"), facts.get("labels") or ())
            adatas.setdefault(whole, adata)
        groups = read.get("groups")
        if not read and (facts.get("held_out") or {}).get("groups"):
            groups = _column_of(list(facts["held_out"]["groups"]), adatas)
        return list(adatas.values()), list(adatas), labels, groups

    def found(
        self, wanted: Mapping[str, Any], labels: str, layer: str | None, settled: Iterable[Mapping[str, Any]] = ()
    ) -> tuple[AnnData, str]:
        """Cells of a file that holds a study of a ledger (`describe`), and the name that the file had.

        Raises
        ------
        CellsError
            No file holds it.
        """
        name, new_names = str(wanted["name"]), {row["label"]: row["to"] for row in settled if row.get("to")}
        likely = sorted(self.paths, key=lambda path: Path(name).stem not in (path.stem, path.parent.stem))
        for path in likely:
            try:
                adata = read_cells(path, layer=layer)
                studies = read_studies([adata], labels, layer=layer, names=["x"], least_types=0)
                same = [study.name for study in studies if _is(study, wanted, new_names)]
            except EvercellError:
                continue  # not a file of this stage
            if same:
                return adata, name.removesuffix(same[0].removeprefix("x"))
        among = f"none of the {len(self.paths):,} files" if self.paths else "no file was given, so none"
        raise CellsError(
            f"{among} has the cells of `{name}` ({str(wanted['sha256'])[:12]})",
            hint="pass the file, or the folder that it is in, with --data",
        )


def _is(study: Study, wanted: Mapping[str, Any], new_names: Mapping[str, str]) -> bool:
    """Whether a study is one that a ledger describes; of early versions labels have to be those after settlement."""
    if "counts_sha256" in wanted:
        return bool(describe(study)["counts_sha256"] == wanted["counts_sha256"])
    settled = np.array([new_names.get(label, label) for label in study.labels], dtype=str)
    return bool(describe(replace(study, labels=settled))["sha256"] == wanted["sha256"])


def _column_of(held_out: Sequence[str], adatas: Mapping[str, AnnData]) -> str | None:
    """The column of donors that groups such as ``file/donor`` came from; early ledgers do not name it."""
    wanted = {name: {one.removeprefix(f"{name}/") for one in held_out if one.startswith(f"{name}/")} for name in adatas}
    for name, adata in adatas.items():
        for column in adata.obs if wanted[name] else ():
            if wanted[name] <= set(adata.obs[column].astype(str)):
                return str(column)
    return None

"""Training a first model from labelled cells."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from anndata import AnnData

from evercell import finetuning
from evercell.annotation import annotate
from evercell.annotator import Annotator
from evercell.augmentation import Augmentation
from evercell.errors import LabelsError, SettingsError
from evercell.finetuning import ModelSettings, quick_settings, train
from evercell.rejection import REJECTORS
from evercell.testing import synthetic_cells
from evercell.training import TrainingSettings
from evercell.training_cells import TrainingCells

TINY = replace(
    quick_settings(),
    refit=False,
    training=TrainingSettings(samples=640, batch_size=32, learning_rate=5e-3, evaluations=4),
)


@pytest.fixture
def cells() -> AnnData:
    return synthetic_cells(160, n_genes=200, n_donors=4, seed=1)


def facts_of(model: Annotator) -> dict[str, object]:
    return dict(model.ledger.stages[0].facts)


def same_weights(first: Annotator, second: Annotator) -> bool:
    one, other = first.weights(), second.weights()
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


def test_quality_floor_of_the_transformer_alone() -> None:
    """A broken model fails here: the transformer without its linear member, on another study."""
    settings = replace(quick_settings(), linear=False)
    model = train(synthetic_cells(seed=1), groups="donor", settings=settings)
    assert model.linear is None
    query = synthetic_cells(150, seed=5)
    found = annotate(model, query, reject="off", adapt=False).best_labels
    assert (found == query.obs["cell_type"].astype(str)).mean() > 0.9


def test_the_ledger_tells_what_was_done(model: Annotator) -> None:
    facts = facts_of(model)
    assert facts["verb"] == "train"
    assert facts["stage"] == 1
    assert facts["types_added"] == ["alpha", "beta", "delta", "gamma"]
    assert facts["data"][0]["cells"] == 200  # type: ignore[index]
    assert len(facts["data"][0]["sha256"]) == 64  # type: ignore[index]
    assert facts["held_out"]["by"] == "groups"  # type: ignore[index]
    metrics = facts["metrics"]
    assert metrics["model"]["accuracy"] > 0.9  # type: ignore[index]
    assert {"accuracy", "macro_f1", "ece"} <= metrics["linear"].keys() & metrics["transformer"].keys()  # type: ignore[index]
    assert json.loads(json.dumps(facts)) == facts
    assert facts["settings"] == json.loads(json.dumps(model.settings))


def test_the_seed_decides_the_model(cells: AnnData) -> None:
    first, same, other = (train(cells, settings=TINY, seed=seed) for seed in (1, 1, 2))
    assert same_weights(first, same)
    assert first.fingerprint == same.fingerprint
    assert not same_weights(first, other)


def test_global_random_state_and_flags_stay(cells: AnnData) -> None:
    """Invariant 6."""

    def state() -> tuple[object, ...]:
        return (
            torch.random.get_rng_state().tolist(),
            np.random.get_state()[1].tolist(),  # noqa: NPY002 (the global state is what is looked at)
            random.getstate(),
            torch.get_num_threads(),
            torch.is_grad_enabled(),
            torch.get_default_dtype(),
            torch.are_deterministic_algorithms_enabled(),
        )

    before = state()
    model = train(cells, groups="donor", settings=replace(TINY, refit=True))
    assert state() == before
    torch.rand(3)
    assert same_weights(train(cells, groups="donor", settings=replace(TINY, refit=True)), model)


def test_training_leaves_its_cells_as_they_were(cells: AnnData) -> None:
    before = cells.copy()
    train(cells, groups="donor", settings=TINY)
    assert (cells.X != before.X).nnz == 0
    assert cells.obs.equals(before.obs)
    assert not cells.uns
    assert not cells.obsm


class Interrupted(Exception):
    """Stands for a killed process."""


@pytest.mark.parametrize(("part", "step"), [("try", 12), ("all", 7)])
def test_an_interrupted_training_resumed_is_an_uninterrupted_one(
    cells: AnnData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str, step: int
) -> None:
    """Invariant 8, in the training with held-out cells and in the one on all cells."""
    settings = replace(TINY, refit=True)
    expected = train(cells, groups="donor", settings=settings, seed=3)
    original = finetuning.classification_loss
    calls = {"try": 0, "all": 0}

    def breaking(model: Annotator, given: object, weights: object, **keywords: object) -> object:
        where = "try" if len(given) <= 120 else "all"  # type: ignore[arg-type]  # one of four donors is held out
        inner = original(model, given, weights, **keywords)  # type: ignore[arg-type]

        def loss(rng: np.random.Generator) -> torch.Tensor:
            calls[where] += 1
            if where == part and calls[where] > step:
                raise Interrupted
            return inner(rng)

        return loss

    monkeypatch.setattr(finetuning, "classification_loss", breaking)
    with pytest.raises(Interrupted):
        train(cells, groups="donor", settings=settings, seed=3, state_folder=tmp_path)
    monkeypatch.undo()
    resumed = train(cells, groups="donor", settings=settings, seed=3, state_folder=tmp_path)
    assert same_weights(resumed, expected)
    assert resumed.fingerprint == expected.fingerprint
    assert resumed.ledger.head == expected.ledger.head


def test_other_data_do_not_take_up_a_state(cells: AnnData, tmp_path: Path) -> None:
    train(cells, settings=TINY, state_folder=tmp_path)
    other = synthetic_cells(160, n_genes=200, seed=9)
    assert same_weights(train(other, settings=TINY, state_folder=tmp_path), train(other, settings=TINY))


def test_held_out_donors_are_whole(cells: AnnData, monkeypatch: pytest.MonkeyPatch) -> None:
    """Invariant 4: no donor is on both sides."""
    seen: list[tuple[np.ndarray, np.ndarray]] = []
    original = finetuning._Maker.tried

    def tried(self: finetuning._Maker, train: np.ndarray, held_out: np.ndarray) -> object:
        seen.append((train, held_out))
        return original(self, train, held_out)

    monkeypatch.setattr(finetuning._Maker, "tried", tried)
    model = train(cells, groups="donor", settings=TINY)
    donors = cells.obs["donor"].astype(str).to_numpy()
    training, held_out = (set(donors[rows]) for rows in seen[0])
    assert training
    assert held_out
    assert not training & held_out
    told = facts_of(model)["held_out"]
    assert told["groups"] == [f"data set 1/{donor}" for donor in sorted(held_out)]  # type: ignore[index]
    assert told["cells"] == len(seen[0][1])  # type: ignore[index]


def test_genes_are_chosen_on_training_cells_only(cells: AnnData) -> None:
    """Invariant 4: a gene that only the held-out donors express is no gene of the model."""
    first = train(cells, groups="donor", settings=TINY)
    held_out = [name.split("/")[1] for name in facts_of(first)["held_out"]["groups"]]  # type: ignore[index]
    gene = int(np.asarray(cells.X.sum(axis=0)).argmax())
    counts = cells.X.toarray()
    counts[~cells.obs["donor"].isin(held_out).to_numpy(), gene] = 0
    changed = AnnData(counts, obs=cells.obs, var=cells.var)
    model = train(changed, groups="donor", settings=TINY)
    symbol = cells.var_names[gene]
    assert facts_of(model)["held_out"] == facts_of(first)["held_out"]
    assert symbol in first.vocabulary.symbols
    assert symbol not in model.vocabulary.symbols


def test_held_out_cells_change_no_weight(cells: AnnData) -> None:
    """Invariant 4: only the choice of the step, temperature and thresholds may look at them."""
    settings = replace(TINY, bank=10, training=replace(TINY.training, evaluations=1, averaging=1.0))
    first = train(cells, groups="donor", settings=settings)
    held_out = [name.split("/")[1] for name in facts_of(first)["held_out"]["groups"]]  # type: ignore[index]
    counts = cells.X.copy()
    rows = np.flatnonzero(cells.obs["donor"].isin(held_out))
    for row in rows:  # other cells of the same genes
        part = slice(counts.indptr[row], counts.indptr[row + 1])
        counts.data[part] = counts.data[part][::-1]
    second = train(AnnData(counts, obs=cells.obs, var=cells.var), groups="donor", settings=settings)
    one, other = first.weights(), second.weights()
    learnt = [name for name in one if name.startswith(("backbone.", "head.", "linear."))]
    assert learnt
    averaged = [name for name in learnt if not np.array_equal(one[name], other[name])]
    assert not averaged
    assert not np.array_equal(one["rejector.known_quantiles"], other["rejector.known_quantiles"])


def test_calibration_is_of_held_out_cells_after_a_refit(model: Annotator) -> None:
    assert model.rejector is not None
    study = synthetic_cells(300, seed=7)
    rejected = (annotate(model, study, reject=0.1).labels == "Unknown").mean()
    assert rejected < 0.3  # the quantiles and the scale of the score belong together


@pytest.mark.parametrize("rejector", list(REJECTORS))
def test_every_rejector_can_be_chosen(cells: AnnData, rejector: str) -> None:
    model = train(cells, groups="donor", settings=replace(TINY, rejector=rejector, refit=True))
    assert model.rejector is not None
    assert model.rejector.name == rejector
    assert annotate(model, cells, reject=0.05).labels.shape == (160,)


def test_variable_genes_are_as_many_as_asked(cells: AnnData) -> None:
    model = train(cells, settings=replace(TINY, variable_genes=60))
    assert len(model.vocabulary) == 60
    assert model.bank.counts.shape[1] == 60
    query = synthetic_cells(100, n_genes=200, seed=2)
    found = annotate(model, query, reject="off").best_labels
    assert (found == query.obs["cell_type"].astype(str)).mean() > 0.8


def test_the_bank_is_balanced_and_of_the_size_asked(cells: AnnData) -> None:
    unequal = cells[(cells.obs["cell_type"] != "alpha").to_numpy() | (np.arange(160) < 40)].copy()
    model = train(unequal, settings=replace(TINY, bank=50, sealed=0))
    assert len(model.bank) == 50
    sizes = np.bincount(model.bank.codes, minlength=4)
    n_alpha = int((unequal.obs["cell_type"] == "alpha").sum())
    assert sizes[0] == min(n_alpha, 12) or sizes[0] == min(n_alpha, 13)
    assert sizes.max() - sizes[1:].min() <= 1
    assert (model.bank.stages == 1).all()


def test_several_studies_of_different_genes_make_one_model(cells: AnnData) -> None:
    second = synthetic_cells(120, n_genes=260, n_types=5, seed=2)[:, 60:].copy()
    del second.obs["donor"]
    model = train([cells, second], groups="donor", settings=TINY, names=["first", "second"])
    assert model.types.names == ("acinar", "alpha", "beta", "delta", "gamma")
    assert len(model.vocabulary) > 220
    assert model.bank.measured.shape[0] == 2
    assert [one["name"] for one in facts_of(model)["data"]] == ["first", "second"]  # type: ignore[attr-defined]
    query = synthetic_cells(100, n_genes=200, seed=3)
    assert (annotate(model, query, reject="off").best_labels == query.obs["cell_type"].astype(str)).mean() > 0.8


def test_a_backbone_is_taken_up_from_a_base(cells: AnnData, model: Annotator) -> None:
    fingerprint = replace(model).fingerprint
    new = train(cells, settings=TINY, base=model)
    assert new.vocabulary == model.vocabulary
    assert facts_of(new)["base"] == fingerprint
    assert new.backbone is not model.backbone
    assert replace(model).fingerprint == fingerprint  # invariant 3: the old one stays bit-equal


def test_cells_without_a_label_are_left_out(cells: AnnData) -> None:
    labels = cells.obs["cell_type"].astype(object)
    labels[:20] = None
    labels[20:25] = "Unknown"
    cells.obs["cell_type"] = labels
    model = train(cells, settings=TINY)
    assert "Unknown" not in model.types
    assert facts_of(model)["data"][0]["cells"] == 135  # type: ignore[index]


def test_a_group_column_that_no_study_has_is_told(cells: AnnData) -> None:
    for data in (cells, [cells, cells[:80].copy()]):
        with pytest.raises(LabelsError, match="no column `doner`"):
            train(data, groups="doner", settings=TINY)


@pytest.mark.parametrize(("data", "names"), [([], None), ("one", ["a", "b"])])
def test_data_and_names_must_fit(cells: AnnData, data: object, names: list[str] | None) -> None:
    with pytest.raises(SettingsError, match="data sets with"):
        train([cells] if data == "one" else [], settings=TINY, names=names)


@pytest.mark.parametrize("wrong", [{"balance": "sometimes"}, {"held_out": 0.0}, {"held_out": 1.0}])
def test_impossible_settings_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(SettingsError, match=next(iter(wrong))):
        ModelSettings(**wrong)  # type: ignore[arg-type]


def test_settings_are_json() -> None:
    settings = ModelSettings(hidden=(128, 64), augmentation=Augmentation(panels=0.0))
    stored = json.loads(json.dumps(settings.to_dict()))
    assert stored["hidden"] == [128, 64]
    assert stored["augmentation"]["panels"] == 0.0
    assert stored["training"]["precision"] == "float32"


@pytest.mark.parametrize("refit", [False, True])
def test_sealed_cells_are_held_out_and_trained_on_by_nothing(
    cells: AnnData, refit: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Updates are tried on them, so no training, linear member, bank or running sum may hold one."""
    trained: list[np.ndarray] = []
    original = finetuning.classification_loss

    def watched(model: Annotator, given: TrainingCells, *arguments: object, **keywords: object) -> object:
        trained.append(given.counts.toarray())
        return original(model, given, *arguments, **keywords)  # type: ignore[arg-type]

    monkeypatch.setattr(finetuning, "classification_loss", watched)
    model = train(cells, groups="donor", settings=replace(TINY, refit=refit))
    assert model.sealed is not None
    told = facts_of(model)
    assert len(model.sealed) == told["held_out"]["cells"] // 2  # type: ignore[index]
    assert np.ptp(np.bincount(model.sealed.codes, minlength=4)) <= 1
    sealed = {row.tobytes() for row in model.sealed.counts.toarray()}
    for counts in (*trained, model.bank.counts.toarray()):
        assert not sealed & {row.tobytes() for row in counts.astype(np.float32)}
    assert len(trained) == 1 + refit
    assert model.strategy_state["sums.counts"].sum() == len(cells) - len(sealed)
    assert told["sealed"]["stages"]["1"] > 0.7  # type: ignore[index]
    assert set(told["sealed"]["types"]) == set(model.types.names)  # type: ignore[index]


def test_as_many_cells_are_sealed_as_asked_at_most(cells: AnnData) -> None:
    assert len(train(cells, settings=replace(TINY, sealed=4)).sealed or ()) == 4
    none = train(cells, settings=replace(TINY, sealed=0))
    assert none.sealed is not None
    assert len(none.sealed) == 0


def test_one_of_several_studies_may_hold_a_single_type() -> None:
    whole, sorted_sample = synthetic_cells(120, seed=1), synthetic_cells(80, seed=2)
    sorted_sample = sorted_sample[sorted_sample.obs["cell_type"] == "alpha"].copy()
    model = train([whole, sorted_sample], settings=quick_settings(), shown=False)
    assert len(model.types) == whole.obs["cell_type"].nunique()
    with pytest.raises(LabelsError, match="alpha"):
        train([sorted_sample, sorted_sample.copy()], settings=quick_settings(), shown=False)
    with pytest.raises(LabelsError, match="alpha"):
        train(sorted_sample, settings=quick_settings(), shown=False)

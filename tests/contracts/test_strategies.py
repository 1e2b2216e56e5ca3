"""What every strategy of updating promises; a new file in the registry is tested unseen."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from anndata import AnnData

from evercell.annotation import annotate
from evercell.annotator import Annotator
from evercell.bank import quotas
from evercell.checkpoint import load, save
from evercell.testing import synthetic_cells
from evercell.training import TrainingSettings
from evercell.updating import STRATEGIES, UpdateSettings
from evercell.updating import stage as stage_module
from evercell.updating.update import update

SMALL = UpdateSettings(
    training=TrainingSettings(samples=640, batch_size=32, learning_rate=3e-3, evaluations=2), refit=False, bank=120
)


@pytest.fixture(scope="module")
def first() -> AnnData:
    return synthetic_cells(seed=1)


@pytest.fixture(scope="module")
def new() -> AnnData:
    """A study of one old type and two new ones, with 20 genes that the model does not have."""
    cells = synthetic_cells(180, n_types=6, n_genes=320, seed=2)
    return cells[cells.obs["cell_type"].isin(["delta", "acinar", "ductal"]).to_numpy()].copy()


def learnt(model: Annotator, new: AnnData, first: AnnData, name: str, **keywords: object) -> Annotator:
    joint_with = [first] if name == "joint" else None
    mapping = {"acinar": "acinar", "ductal": "ductal"}
    settings = keywords.pop("settings", SMALL)
    return update(
        model, new, strategy=name, mapping=mapping, settings=settings, force=True, joint_with=joint_with, **keywords
    )  # type: ignore[arg-type]


@pytest.fixture(scope="module", params=list(STRATEGIES))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def updated(model: Annotator, new: AnnData, first: AnnData, name: str) -> Iterator[tuple[Annotator, str, str]]:
    """The new model, and the old one's fingerprint before and after."""
    before = replace(model).fingerprint
    yield learnt(model, new, first, name), before, replace(model).fingerprint


def test_the_old_model_stays_bit_equal(updated: tuple[Annotator, str, str], model: Annotator) -> None:
    """Invariant 3."""
    made, before, after = updated
    assert before == after
    assert made.fingerprint != before
    assert made.backbone is not model.backbone
    assert all(weight.requires_grad for weight in made.backbone.parameters())
    assert not made.backbone.training
    assert not made.head.training


def test_codes_of_old_types_are_kept_and_new_ones_appended(
    updated: tuple[Annotator, str, str], model: Annotator
) -> None:
    made, *_ = updated
    assert made.types.names == (*model.types.names, "acinar", "ductal")
    assert made.types.stages == (1, 1, 1, 1, 2, 2)
    assert made.vocabulary.names[: len(model.vocabulary)] == model.vocabulary.names
    assert made.bank.counts.shape[1] == len(made.vocabulary)
    assert made.head.n_types == 6


def test_the_new_types_are_learnt(updated: tuple[Annotator, str, str]) -> None:
    made, *_ = updated
    query = synthetic_cells(240, n_types=6, seed=3)
    query = query[query.obs["cell_type"].isin(["acinar", "ductal"]).to_numpy()].copy()
    found = annotate(made, query, reject="off").best_labels
    assert (found == query.obs["cell_type"].astype(str)).mean() > 0.6  # after 20 steps


def test_quotas_of_the_bank_are_exact(updated: tuple[Annotator, str, str], model: Annotator, new: AnnData) -> None:
    made, *_ = updated
    assert len(made.bank) == 120
    held_out = made.ledger.stages[-1].facts["held_out"]["cells"]
    trained = new.n_obs - held_out
    pool = np.bincount(model.bank.codes, minlength=6)
    assert pool.sum() + trained >= 120
    assert np.bincount(made.bank.codes, minlength=6).tolist() == quotas([120] * 6, 120).tolist()
    assert set(made.bank.stages.tolist()) == {1, 2}


def test_sealed_cells_are_in_no_bank(updated: tuple[Annotator, str, str], model: Annotator) -> None:
    made, *_ = updated
    assert made.sealed is not None
    assert model.sealed is not None
    assert (made.sealed.stages == 1).sum() == len(model.sealed)
    assert (made.sealed.stages == 2).any()
    assert made.sealed.counts.shape[1] == len(made.vocabulary)
    sealed = {row.tobytes() for row in made.sealed.counts.toarray()}
    assert not sealed & {row.tobytes() for row in made.bank.counts.toarray()}


def test_the_ledger_tells_what_was_done(updated: tuple[Annotator, str, str], model: Annotator, name: str) -> None:
    made, before, _ = updated
    assert made.ledger.stages[0] == model.ledger.stages[0]
    facts = made.ledger.stages[1].facts
    assert (facts["verb"], facts["strategy"], facts["base"], facts["stage"]) == ("update", name, before, 2)
    assert facts["types_added"] == ["acinar", "ductal"]
    (tried,) = facts["tries"]
    assert set(tried["types"]) >= {"alpha", "beta", "delta", "gamma", "all old types"}
    assert set(facts["sealed"]["stages"]) == {"1", "2"}
    assert {row["label"]: row["by"] for row in facts["labels"]}["acinar"] == "mapping"


def test_a_model_is_read_as_it_was_written(updated: tuple[Annotator, str, str], tmp_path: Path) -> None:
    made, *_ = updated
    again = load(save(made, tmp_path / "model"))
    assert again.fingerprint == made.fingerprint
    assert again.sealed is not None
    assert made.sealed is not None
    assert (again.sealed.counts != made.sealed.counts).nnz == 0
    assert again.strategy_state.keys() == made.strategy_state.keys()
    for key, array in made.strategy_state.items():
        np.testing.assert_array_equal(again.strategy_state[key], array)


def test_the_seed_decides_the_model(
    updated: tuple[Annotator, str, str], model: Annotator, new: AnnData, first: AnnData, name: str
) -> None:
    """The same seed gives the same model, and the teacher is bit-equal after the run (invariant 7)."""
    teachers: list[tuple[Annotator, dict[str, np.ndarray]]] = []
    original = Annotator.frozen_copy

    def watched(self: Annotator) -> Annotator:
        teacher = original(self)
        teachers.append((teacher, {key: array.copy() for key, array in teacher.weights().items()}))
        return teacher

    state = torch.random.get_rng_state()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Annotator, "frozen_copy", watched)
        again = learnt(model, new, first, name)
    assert torch.equal(torch.random.get_rng_state(), state)  # invariant 6
    assert again.fingerprint == updated[0].fingerprint
    assert again.ledger.head == updated[0].ledger.head
    assert teachers
    for teacher, before in teachers:
        after = teacher.weights()
        assert all(np.array_equal(after[key], before[key]) for key in before)
        assert not any(weight.requires_grad for weight in teacher.backbone.parameters())
        assert not teacher.backbone.training


class Interrupted(Exception):
    """Stands for a killed process."""


def test_an_interrupted_update_resumed_is_an_uninterrupted_one(
    updated: tuple[Annotator, str, str], model: Annotator, new: AnnData, first: AnnData, name: str, tmp_path: Path
) -> None:
    """Invariant 8."""
    if STRATEGIES[name].trained == "nothing":
        pytest.skip("there is no training to be interrupted")
    original, calls = stage_module.classification_loss, []

    def breaking(*arguments: object, **keywords: object) -> object:
        inner = original(*arguments, **keywords)  # type: ignore[arg-type]

        def loss(rng: np.random.Generator) -> torch.Tensor:
            calls.append(1)
            if len(calls) > 13:
                raise Interrupted
            return inner(rng)

        return loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage_module, "classification_loss", breaking)
        with pytest.raises(Interrupted):
            learnt(model, new, first, name, state_folder=tmp_path)
    assert list(tmp_path.rglob("training_state.safetensors"))
    resumed = learnt(model, new, first, name, state_folder=tmp_path)
    assert resumed.fingerprint == updated[0].fingerprint
    assert resumed.ledger.head == updated[0].ledger.head

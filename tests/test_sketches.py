"""Sketches: aggregates in the place of cells, what is drawn from them, and that no cell is left in the model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
import torch
from anndata import AnnData
from safetensors.numpy import load_file
from scipy.sparse import csr_matrix

from evercell.adaptation import fitted_to, lost_share
from evercell.annotation import annotate
from evercell.annotator import Annotator
from evercell.bank import ExampleBank
from evercell.checkpoint import FORMAT_WITH_SETS, load, save
from evercell.errors import LabelsError, ModelError, SettingsError
from evercell.finetuning import quick_settings, train
from evercell.sketches import LEAST_CELLS, LEAST_EXPRESSING, PROGRAMS, Sketch
from evercell.testing import synthetic_cells
from evercell.tokenizers import View
from evercell.training import TrainingSettings
from evercell.training_cells import gather, read_study
from evercell.updating import UpdateSettings
from evercell.updating import stage as stage_module
from evercell.updating.gate import ALL, tried_on_sealed
from evercell.updating.recall import drawn_outputs, followed
from evercell.updating.update import update

SMALL = UpdateSettings(
    training=TrainingSettings(samples=960, batch_size=32, learning_rate=3e-3, evaluations=2), refit=False
)
FIRST = replace(quick_settings(), refit=False)
NEW_TYPES = ("acinar", "ductal")
OWN_NAMES = {name: name for name in NEW_TYPES}


def only(cells: AnnData, *types: str) -> AnnData:
    return cells[cells.obs["cell_type"].isin(types).to_numpy()].copy()


def made_up(n_cells: int = 400, n_genes: int = 60, seed: int = 0) -> tuple[ExampleBank, np.ndarray]:
    """Cells of two types with representations of four numbers; the first type has a program over the first 20 genes."""
    rng = np.random.default_rng(seed)
    codes = np.arange(n_cells) % 2
    shares = rng.dirichlet(np.full(n_genes, 3.0), 2)[codes]
    shares[:, :20] *= np.exp(0.8 * rng.standard_normal((n_cells, 1)) * (codes == 0)[:, None])
    shares /= shares.sum(axis=1, keepdims=True)
    counts = rng.poisson(shares * np.exp(rng.normal(7.0, 0.3, (n_cells, 1))))
    representation = rng.standard_normal((n_cells, 4)) @ np.diag([1.0, 2.0, 0.5, 1.0]) + 5.0 * codes[:, None]
    nothing = np.zeros(n_cells, dtype=np.int64)
    bank = ExampleBank(csr_matrix(counts, dtype=np.float32), codes, nothing + 3, nothing, np.ones((1, n_genes), bool))
    return bank, representation.astype(np.float32)


# --- a sketch


def test_a_sketch_is_made_of_means_and_covariances() -> None:
    cells, representation = made_up()
    sketch = Sketch.of(cells, representation)
    assert (sketch.codes.tolist(), sketch.stages.tolist(), sketch.sizes.tolist()) == ([0, 1], [3, 3], [200, 200])
    shares = cells.counts.toarray() / cells.counts.sum(axis=1)
    for code in (0, 1):
        rows = cells.codes == code
        np.testing.assert_allclose(sketch.means[code], representation[rows].mean(axis=0), rtol=1e-5)
        np.testing.assert_allclose(sketch.shares[code], np.asarray(shares[rows].mean(axis=0)).ravel(), rtol=1e-4)
        within = np.cov(representation[rows].T, bias=True)
        other = np.cov(representation[~rows].T, bias=True)
        pooled = (within + other) / 2
        np.testing.assert_allclose(sketch.covariances[code], (200 * within + 50 * pooled) / 250, atol=1e-3)


def test_draws_are_spread_as_the_cells_were() -> None:
    cells, representation = made_up()
    sketch = Sketch.of(cells, representation)
    numbers = np.array([2000, 1000])
    drawn = sketch.representations(numbers, np.random.default_rng(0))
    assert drawn.shape == (3000, 4)
    np.testing.assert_allclose(drawn[:2000].mean(axis=0), sketch.means[0], atol=0.15)
    np.testing.assert_allclose(np.cov(drawn[:2000].T), sketch.covariances[0], atol=0.35)
    others = sketch.cells(numbers, np.random.default_rng(0))
    assert others.codes.tolist() == [0] * 2000 + [1] * 1000
    assert (others.counts.data == np.floor(others.counts.data)).all()
    shares = np.asarray(others.counts.multiply(1 / others.counts.sum(axis=1)).todense())
    np.testing.assert_allclose(shares[:2000].mean(axis=0), sketch.shares[0], rtol=0.15)
    depth = np.log(np.asarray(others.counts.sum(axis=1)).ravel())
    assert depth.mean() == pytest.approx(7.0, abs=0.1)
    assert depth.std() == pytest.approx(0.3, abs=0.1)
    # genes of the program still vary together, those of the type without one do not
    joint = [
        np.corrcoef(shares[rows][:, :20].T)[np.triu_indices(20, 1)].mean() for rows in (slice(2000), slice(2000, None))
    ]
    assert joint[0] > 0.3
    assert abs(joint[1]) < 0.15


def test_few_cells_leave_no_trace_of_one() -> None:
    cells, representation = made_up()
    counts = cells.counts.toarray()
    counts[:, 0] = 0
    counts[[0, 2], 0] = 50.0  # a gene of two cells of type 0 alone
    counts[4] = 0
    counts[4, 30:40] = 500.0  # an odd cell
    cells = replace(cells, counts=csr_matrix(counts))
    sketch = Sketch.of(cells, representation)
    assert LEAST_EXPRESSING == 3
    assert sketch.shares[0, 0] == sketch.programs[0, :, 0].sum() == 0.0
    odd = counts[4] / np.linalg.norm(counts[4])
    norms = np.maximum(np.linalg.norm(sketch.programs[0], axis=1), 1e-12)
    assert np.abs(sketch.programs[0] @ odd / norms).max() < 0.9
    few = Sketch.of(cells.taken(np.arange(2 * LEAST_CELLS - 1)), representation[: 2 * LEAST_CELLS - 1])
    assert few.codes.tolist() == [0]  # the other type has one cell too few
    assert not few.programs.any()
    np.linalg.cholesky(few.covariances)  # whole, though ten cells do not span the space
    empty = Sketch.of(cells.taken(np.arange(4)), representation[:4])
    assert len(empty) == len(empty.cells(np.zeros(0, dtype=int), np.random.default_rng(0))) == 0


def test_sketches_are_joined_stored_and_read() -> None:
    cells, representation = made_up()
    sketch = Sketch.of(cells, representation)
    later = replace(sketch.widened(70), stages=sketch.stages + 1)
    both = sketch.joined(later)
    assert (len(both), both.shares.shape, both.programs.shape) == (4, (4, 70), (4, PROGRAMS, 70))
    assert not both.measured[:, 60:].any()
    assert both.numbers(400).tolist() == [100] * 4
    assert both.taken(np.array([0, 1, 2])).numbers(400).tolist() == [100, 200, 100]
    types = ("alpha", "beta")
    again = Sketch.stored(both.arrays(), json.loads(json.dumps(both.facts(types))), types)
    for field in fields(Sketch):
        np.testing.assert_array_equal(getattr(again, field.name), getattr(both, field.name))


# --- a model with a sketch


@pytest.fixture(scope="module")
def first() -> AnnData:
    return synthetic_cells(240, seed=1)


@pytest.fixture(scope="module")
def model(first: AnnData) -> Annotator:
    return train(first, settings=FIRST, bank="sketch", shown=False)


@pytest.fixture(scope="module")
def new() -> AnnData:
    """Cells of new types alone."""
    return only(synthetic_cells(360, n_types=6, seed=2), *NEW_TYPES)


@pytest.fixture(scope="module")
def updated(model: Annotator, new: AnnData) -> Annotator:
    return update(model, new, mapping=OWN_NAMES, settings=SMALL, bank="sketch", shown=False)


def share_right(model: Annotator, cells: AnnData) -> float:
    found = annotate(model, cells, reject="off", shown=False).best_labels
    return float((np.asarray(found) == cells.obs["cell_type"].astype(str).to_numpy()).mean())


def arrays_in(folder: Path) -> Iterator[np.ndarray]:
    """All arrays of a model directory as matrices, and the stages that it keeps."""
    for file in folder.rglob("*"):
        if file.suffix == ".safetensors":
            yield from load_file(file).values()
        elif file.suffix == ".h5ad":
            stored = ad.read_h5ad(file)
            yield from (stored.X.toarray(), *stored.obsm.values(), *stored.varm.values(), *stored.layers.values())


def cells_found(folder: Path, cells: AnnData, model: Annotator) -> int:
    """How many cells are in a directory: as a row of an array, as counts, shares or logarithms, up to a factor."""
    study = read_study(cells, "cell_type")
    counts = gather([study], model.vocabulary, model.types).counts
    view = View.whole(counts)
    logged = csr_matrix((view.log_normalised(), counts.indices, counts.indptr), shape=counts.shape)
    found = 0
    for array in arrays_in(folder):
        for matrix in (array.reshape(-1, array.shape[-1]), array.T) if array.ndim > 1 and array.size else ():
            n_genes = min(matrix.shape[1], counts.shape[1])
            if matrix.shape[0] and n_genes >= 300:
                rows = matrix[:, :n_genes].astype(np.float64)
                rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
                for kind in (counts, logged):
                    known = kind[:, :n_genes].toarray().astype(np.float64)
                    known /= np.maximum(np.linalg.norm(known, axis=1, keepdims=True), 1e-12)
                    found += int((known @ rows.T > 1 - 1e-6).any(axis=1).sum())
    return found


def test_no_cell_of_a_sketched_stage_is_in_the_directory(
    model: Annotator, updated: Annotator, first: AnnData, new: AnnData, tmp_path: Path
) -> None:
    """The promise of `sketch`."""
    save(model, tmp_path / "one")
    save(updated, tmp_path / "two", previous=tmp_path / "one")
    for one, folder in ((model, tmp_path / "one"), (updated, tmp_path / "two")):
        assert len(one.bank) == 0
        assert one.sealed is not None
        assert len(one.sealed) == 0
        for name in ("bank.h5ad", "sealed.h5ad"):
            assert ad.read_h5ad(folder / name).n_obs == 0
    assert (tmp_path / "two" / "stages" / "1" / "sketch.safetensors").is_file()
    assert cells_found(tmp_path / "two", first, model) == cells_found(tmp_path / "two", new, updated) == 0
    names = [*first.obs_names, *new.obs_names]
    for file in (tmp_path / "two").rglob("*.*"):
        if file.is_file():
            raw = file.read_bytes()
            assert not any(str(name).encode() in raw for name in names)
    # the search sees what it is meant to see
    save(replace(model, bank=gather_bank(first, model)), tmp_path / "cells")
    assert cells_found(tmp_path / "cells", first, model) >= 40


def gather_bank(cells: AnnData, model: Annotator) -> ExampleBank:
    return gather([read_study(cells, "cell_type")], model.vocabulary, model.types).taken(np.arange(40)).as_bank(stage=1)


def test_old_types_are_remembered_by_their_sketch(model: Annotator, updated: Annotator, new: AnnData) -> None:
    query = synthetic_cells(240, n_types=6, seed=4)
    old, late = only(query, *model.types.names), only(query, *NEW_TYPES)
    naive = update(model, new, strategy="naive", mapping=OWN_NAMES, settings=SMALL, force=True, shown=False)
    assert share_right(updated, old) > max(0.9, share_right(naive, old) + 0.3)
    assert share_right(updated, late) > 0.9
    assert updated.sketch is not None
    assert updated.sketch.stages.tolist() == [1, 1, 1, 1, 2, 2]
    rejected = annotate(updated, query, shown=False).labels
    assert (np.asarray(rejected).astype(str) == "Unknown").mean() < 0.15


def test_the_ledger_says_what_was_kept_and_what_was_tried_on_draws(model: Annotator, updated: Annotator) -> None:
    facts = updated.ledger.stages[-1].facts
    assert model.ledger.stages[0].facts["bank"] == facts["bank"] == "sketch"
    assert [one["type"] for one in facts["sketched"]] == list(NEW_TYPES)
    tried = facts["tries"][-1]
    assert (tried["holds"], tried["drawn_stages"]) == (True, [1])
    assert tried["types"][ALL]["drawn"] == tried["types"][ALL]["cells"] == 160
    assert facts["sealed"] == {"stages": {}, "types": {}}


def test_the_gate_stops_what_forgets_a_sketched_type(model: Annotator, new: AnnData) -> None:
    made = update(model, new, strategy="naive", mapping=OWN_NAMES, settings=SMALL, shown=False)
    naive, analytic = made.ledger.stages[-1].facts["tries"]
    assert (naive["strategy"], naive["holds"], analytic["strategy"], analytic["holds"]) == (
        "naive", False, "analytic", True,
    )  # fmt: skip
    assert ALL in naive["fallen"]
    assert tried_on_sealed(model, model, tolerance=0.0).holds


@pytest.mark.parametrize("order", [("cells", "sketch"), ("sketch", "cells")])
def test_stages_with_and_without_cells_go_together(
    order: tuple[str, str], first: AnnData, model: Annotator, new: AnnData
) -> None:
    one = model if order[0] == "sketch" else train(first, settings=FIRST, shown=False)
    settings = replace(SMALL, bank=60)
    two = update(one, new, mapping=OWN_NAMES, settings=settings, bank=order[1], shown=False)
    kept = 1 + order.index("cells")
    assert two.sketch is not None
    assert two.sealed is not None
    assert len(two.bank) == 60  # quotas count cells only
    assert set(two.bank.stages.tolist()) == set(two.sealed.stages.tolist()) == {kept}
    assert set(two.sketch.stages.tolist()) == {3 - kept}
    assert share_right(two, synthetic_cells(240, n_types=6, seed=4)) > 0.9
    later = synthetic_cells(150, n_types=6, n_genes=330, seed=5)
    three = update(two, later, settings=settings, bank=order[0], shown=False)
    assert share_right(three, synthetic_cells(240, n_types=6, seed=4)) > 0.9
    assert three.sketch is not None
    assert three.sketch.shares.shape[1] == three.bank.counts.shape[1] == len(three.vocabulary) > len(two.vocabulary)
    assert set(three.sketch.stages.tolist()) | set(three.bank.stages.tolist()) == {1, 2, 3}


@pytest.mark.parametrize("strategy", ["analytic", "ewc", "joint"])
def test_other_strategies_take_a_sketch(strategy: str, model: Annotator, first: AnnData, new: AnnData) -> None:
    joint_with = [first] if strategy == "joint" else None
    made = update(
        model, new, strategy=strategy, mapping=OWN_NAMES, settings=SMALL, joint_with=joint_with, bank="sketch",
        force=True, shown=False,
    )  # fmt: skip
    assert made.sketch is not None
    assert made.sketch.stages.tolist() == [1, 1, 1, 1, 2, 2]
    assert share_right(made, only(synthetic_cells(240, n_types=6, seed=4), *NEW_TYPES)) > 0.8
    if strategy == "analytic":  # its sums are those of the cells themselves
        np.testing.assert_array_equal(made.sketch.means[:4], model.sketch.means)  # type: ignore[union-attr]
        assert share_right(made, synthetic_cells(240, seed=4)) > 0.9


def test_a_sketch_follows_the_backbone(model: Annotator) -> None:
    assert model.sketch is not None
    same = followed(model.sketch, model, model, seed=0)
    np.testing.assert_array_equal(same.means, model.sketch.means)
    other = model.frozen_copy()
    with torch.no_grad():
        other.backbone.state_dict()["final_norm.bias"].add_(0.5)
    moved = followed(model.sketch, model, other, seed=0)
    np.testing.assert_allclose(moved.means - model.sketch.means, 0.5, atol=1e-4)
    outputs, codes = drawn_outputs(model, model.sketch, np.full(4, 50), seed=0)
    assert (outputs.codes == codes).mean() > 0.95


def test_the_old_model_stays_bit_equal_and_the_seed_decides(model: Annotator, updated: Annotator, new: AnnData) -> None:
    """Invariants 3 and 6."""
    before, state = replace(model).fingerprint, torch.random.get_rng_state()
    again = update(model, new, mapping=OWN_NAMES, settings=SMALL, bank="sketch", shown=False)
    assert again.fingerprint == updated.fingerprint
    assert again.ledger.head == updated.ledger.head
    assert replace(model).fingerprint == before
    assert torch.equal(torch.random.get_rng_state(), state)


def test_an_interrupted_update_resumed_is_an_uninterrupted_one(
    model: Annotator, updated: Annotator, new: AnnData, tmp_path: Path
) -> None:
    """Invariant 8, with draws at every step."""
    original, calls = stage_module.classification_loss, []

    def breaking(*arguments: object, **keywords: object) -> object:
        inner = original(*arguments, **keywords)  # type: ignore[arg-type]

        def loss(rng: np.random.Generator) -> torch.Tensor:
            calls.append(1)
            if len(calls) > 20:
                raise KeyboardInterrupt
            return inner(rng)

        return loss

    keywords = {"mapping": OWN_NAMES, "settings": SMALL, "bank": "sketch", "state_folder": tmp_path, "shown": False}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage_module, "classification_loss", breaking)
        with pytest.raises(KeyboardInterrupt):
            update(model, new, **keywords)  # type: ignore[arg-type]
    assert update(model, new, **keywords).fingerprint == updated.fingerprint  # type: ignore[arg-type]


def test_a_panel_is_met_with_made_up_cells(model: Annotator) -> None:
    query = synthetic_cells(200, seed=6)[:, :120].copy()
    measured = np.isin(model.vocabulary.symbols, query.var_names)
    assert lost_share(model, measured) > 0.3
    adapted = fitted_to(model, measured)
    assert adapted.linear is not None
    assert not adapted.linear.weight[~measured].any()
    assert share_right(model, query) > 0.85


# --- types of few cells


def test_types_of_few_cells_are_refused_before_any_training(first: AnnData, model: Annotator) -> None:
    beta = np.flatnonzero(first.obs["cell_type"] == "beta")
    few = first[np.setdiff1d(np.arange(first.n_obs), beta[7:])].copy()
    with pytest.raises(LabelsError, match=r"too few cells to sketch: `beta` \(7 cells\)") as told:
        train(few, settings=FIRST, bank="sketch")
    assert "--bank cells" in (told.value.hint or "")
    rare = only(synthetic_cells(40, n_types=6, seed=3), "alpha", "ductal")
    with pytest.raises(LabelsError, match="`ductal` "):
        update(model, rare, mapping={"ductal": "ductal"}, settings=SMALL, bank="sketch")
    with pytest.raises(SettingsError, match="no bank `notes`"):
        train(few, bank="notes")
    with pytest.raises(SettingsError, match="no bank `notes`"):
        update(model, few, bank="notes")


def test_few_cells_of_a_known_type_are_left_to_the_earlier_stage(model: Annotator) -> None:
    cells = synthetic_cells(120, seed=3)
    beta = np.flatnonzero(cells.obs["cell_type"] == "beta")
    few = cells[np.setdiff1d(np.arange(cells.n_obs), beta[5:])].copy()
    made = update(model, few, settings=SMALL, strategy="analytic", bank="sketch", shown=False)
    facts = made.ledger.stages[-1].facts
    assert facts["not_sketched"] == ["beta"]
    assert [one["type"] for one in facts["sketched"]] == ["alpha", "delta", "gamma"]
    nothing = update(model, cells[:20].copy(), settings=SMALL, strategy="analytic", bank="sketch", shown=False)
    assert nothing.ledger.stages[-1].facts["sketched"] == []
    assert nothing.sketch is not None
    assert len(nothing.sketch) == 4


# --- on disk


def test_a_sketch_is_read_as_it_was_written(updated: Annotator, model: Annotator, tmp_path: Path) -> None:
    folder = save(updated, tmp_path / "model")
    again = load(folder)
    assert again.fingerprint == updated.fingerprint
    assert again.sketch is not None
    for field in fields(Sketch):
        np.testing.assert_array_equal(getattr(again.sketch, field.name), getattr(updated.sketch, field.name))
    description = json.loads((folder / "annotator.json").read_text())
    assert description["format"] == FORMAT_WITH_SETS
    assert description["sketch"][0] == {"type": "alpha", "stage": 1, "cells": 60}
    moved = replace(updated, sketch=updated.sketch.moved(np.ones((6, 1))))  # type: ignore[union-attr]
    assert moved.fingerprint != updated.fingerprint


@pytest.mark.parametrize("damage", ["flipped", "missing", "link"])
def test_damage_to_a_sketch_is_found(updated: Annotator, tmp_path: Path, damage: str) -> None:
    file = save(updated, tmp_path / "model") / "sketch.safetensors"
    raw = bytearray(file.read_bytes())
    if damage == "flipped":
        raw[len(raw) // 2] ^= 1
        file.write_bytes(raw)
    else:
        shutil.move(file, tmp_path / "outside")
        if damage == "link":
            file.symlink_to(tmp_path / "outside")
    with pytest.raises(ModelError, match=r"sketch\.safetensors"):
        load(tmp_path / "model")


def test_the_command_line_sketches(run, first: AnnData, new: AnnData, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    first.write_h5ad(tmp_path / "first.h5ad")
    new.write_h5ad(tmp_path / "new.h5ad")
    (tmp_path / "labels.csv").write_text("label,name\nacinar,acinar\nductal,ductal\n", encoding="utf-8")
    words = ["--labels", "cell_type", "--samples", "640", "--bank", "sketch"]
    code, _, err = run("train", tmp_path / "first.h5ad", *words, "--output", tmp_path / "one", "--no-refit")
    assert code == 0, err
    assert "no cell of this stage is kept in the model" in err
    code, out, err = run(
        "update", tmp_path / "one", tmp_path / "new.h5ad", *words, "--mapping", tmp_path / "labels.csv",
        "--strategy", "analytic", "--output", tmp_path / "two",
    )  # fmt: skip
    assert code == 0, err
    assert "old types on sealed cells and, for stages that kept no cells (1), on draws" in out
    assert run("verify", tmp_path / "two")[0] == run("log", tmp_path / "two")[0] == 0
    code, _, err = run("train", tmp_path / "first.h5ad", *words[:-1], "notes", "--output", tmp_path / "no")
    assert code == 2
    assert "no bank `notes`" in err

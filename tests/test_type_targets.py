"""Types as a target of pretraining."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from anndata import AnnData

import evercell as ec
from evercell.backbones import BACKBONES
from evercell.errors import LabelsError, SettingsError
from evercell.pretraining import quick_settings
from evercell.pretraining_cells import PretrainingCells, gathered, shared_vocabulary, type_key
from evercell.pretraining_studies import read_for_pretraining
from evercell.testing import synthetic_cells
from evercell.type_targets import TypeTargets


def cells_of(*studies: AnnData) -> PretrainingCells:
    read = read_for_pretraining(list(studies), labels="cell_type")
    rows = [np.arange(len(study)) for study in read]
    return gathered(read, rows, shared_vocabulary(read, "union"))


def relabelled(cells: AnnData, names: dict[str, str]) -> AnnData:
    cells = cells.copy()
    cells.obs["cell_type"] = cells.obs["cell_type"].astype(str).map(lambda name: names.get(name, name))
    return cells


def test_studies_that_write_a_type_differently_share_its_row() -> None:
    assert type_key("T cells") == type_key("t_cell") == type_key("t cell")
    assert type_key("Some New Types") == type_key("some_new_type")
    first = relabelled(synthetic_cells(60, seed=1), {"alpha": "T cells", "beta": "unknown"})
    second = relabelled(synthetic_cells(60, seed=2), {"alpha": "t cell"})
    cells = cells_of(first, second)
    shared = cells.types.index(type_key("t cell"))
    assert cells.shown[:, shared].all()
    without = first.obs["cell_type"] == "unknown"
    assert (cells.codes[0] == -1).sum() == without.sum() > 0


def test_labelled_cells_are_drawn_by_the_root_of_their_type_and_none_twice() -> None:
    codes = np.repeat([0, 1], [360, 40])
    counts = sp.csr_matrix(np.arange(1, 401, dtype=np.float32)[:, None])  # a cell is told by its count
    cells = PretrainingCells(("a",), (counts,), np.ones((1, 1), dtype=bool), (codes,), ("x", "y"))
    rng = np.random.default_rng(0)
    rare = []
    for _ in range(300):
        drawn, told = cells.draw(0, 20, rng)
        rows = drawn.toarray().ravel().astype(int) - 1
        assert len(set(rows)) == 20
        assert (codes[rows] == told).all()
        rare.append((told == 1).mean())
    assert np.mean(rare) == pytest.approx(40**0.5 / (40**0.5 + 360**0.5), abs=0.04)


def test_types_that_a_study_does_not_show_are_no_answers() -> None:
    backbone = BACKBONES["latent"](20, members=2, member_width=8, n_heads=2)  # type: ignore[call-arg]
    cells = PretrainingCells(
        ("a", "b"),
        (sp.csr_matrix((2, 20)), sp.csr_matrix((2, 20))),
        np.ones((2, 20), dtype=bool),
        (np.array([0, 1]), np.array([1, 2])),
        ("x", "y", "z"),
    )
    targets = TypeTargets(backbone, cells).eval()
    states = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
    before = targets.loss(states, np.array([0, 1]), cells.shown[0])
    with torch.no_grad():
        targets.head.classifier.bias[2] = 50.0
    assert torch.equal(before, targets.loss(states, np.array([0, 1]), cells.shown[0]))
    assert set(targets.told(states, cells.shown[0])) <= {0, 1}
    # A cell without a label adds nothing.
    alone = targets.loss(states[:1], np.array([0]), cells.shown[0])
    assert torch.equal(alone, targets.loss(states, np.array([0, -1]), cells.shown[0]))


def test_labels_are_learnt_and_judged_on_held_out_cells(tmp_path: Path) -> None:
    studies = [synthetic_cells(300, seed=seed) for seed in (1, 2)]
    quick = quick_settings()
    settings = replace(quick, contrast=0.0, training=replace(quick.training, samples=6000))
    model = ec.pretrain(studies, "cell_type", settings=settings, state_folder=tmp_path / "state")
    facts = model.ledger.stages[0].facts
    assert facts["metrics"]["type_accuracy"] > 0.8
    assert facts["data"][0]["labelled"] == 300
    assert '"type_loss"' in (tmp_path / "state" / "log.jsonl").read_text()
    assert len(model.types) == 0


def test_studies_without_labels_are_passed_over_where_types_are_all_that_is_asked() -> None:
    labelled, unlabelled = synthetic_cells(200, seed=1), synthetic_cells(200, seed=2)
    del unlabelled.obs["cell_type"]
    quick = quick_settings()
    types_only = replace(quick, masked=0.0, contrast=0.0, training=replace(quick.training, samples=640))
    ec.pretrain([labelled, unlabelled], "cell_type", settings=types_only)
    with pytest.raises(SettingsError, match="nothing to learn"):
        ec.pretrain([unlabelled], settings=types_only)


def test_a_column_that_no_study_has_is_named() -> None:
    with pytest.raises(LabelsError, match="`kind`"):
        ec.pretrain([synthetic_cells(40)], "kind", settings=quick_settings())


def test_weights_below_zero_are_refused() -> None:
    with pytest.raises(SettingsError, match="supervised must be at least 0"):
        replace(quick_settings(), supervised=-1.0)

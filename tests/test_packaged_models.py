"""The models that come with evercell: whole, small, honest about their data, and able to label cells offline."""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
import pytest

import evercell as ec
from evercell.cli import main
from evercell.examples import load_example
from evercell.registry import available

ANNOTATORS = ("human-immune", "human-lung", "human-pancreas", "mouse-lung")
TEST_STUDIES = (
    "zheng_sorted_facs", "hao_small_pbmc", "symphony_pbmc_2tech", "ding_pbmc", "tritschler", "panc8", "xin_delta",
    "liao_balf", "baron_mouse", "lung_development", "jaitin_spleen",
)  # fmt: skip
MOST_BYTES = 40e6  # of all models, compressed as they are in the wheel

PACKAGED = {one.name: one for one in available() if one.source == "packaged"}
pytestmark = pytest.mark.skipif(not PACKAGED, reason="no models are packaged")


@pytest.fixture(scope="module")
def models() -> dict[str, ec.Annotator]:
    return {name: ec.load(one.path) for name, one in PACKAGED.items()}


def test_the_models_are_there_and_small() -> None:
    assert set(PACKAGED) == {*ANNOTATORS, "backbone"}
    files = [file for one in PACKAGED.values() for file in Path(one.path).iterdir()]
    assert sum(len(zlib.compress(file.read_bytes(), 6)) for file in files) <= MOST_BYTES
    assert all(not one.problem and one.description for one in PACKAGED.values())


@pytest.mark.parametrize("name", sorted(PACKAGED))
def test_no_test_study_was_learnt_from(name: str) -> None:
    ledger = (Path(PACKAGED[name].path) / "ledger.jsonl").read_text()
    assert not [study for study in TEST_STUDIES if study in ledger]


@pytest.mark.parametrize("name", ANNOTATORS)
def test_an_annotator_is_calibrated_and_can_be_taught(name: str, models: dict[str, ec.Annotator]) -> None:
    model = models[name]
    assert model.rejector is not None and 0 < model.rejector.default_rate <= 0.02
    assert model.temperature != 1.0
    assert len(model.ledger) >= 2
    assert sum(term is not None for term in model.types.ontology_ids) >= 0.8 * len(model.types)
    assert len(model.bank) > 0 or model.sketch is not None
    assert model.ledger.stages[0].facts["base"]


@pytest.mark.parametrize("name", ANNOTATORS)
def test_the_card_tells_data_licence_and_figures(name: str) -> None:
    card = (Path(PACKAGED[name].path) / "MODEL_CARD.md").read_text()
    for heading in ("## Data and licences", "## On studies that it has never seen", "## Limits"):
        assert heading in card


def test_unseen_pancreas_cells_are_labelled_offline_in_one_command(
    models: dict[str, ec.Annotator], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    query = load_example("tritschler_unseen")
    truth = query.obs["cell_type"].astype(str).to_numpy()
    del query.obs["cell_type"]
    query.write_h5ad(tmp_path / "query.h5ad")
    words = ["annotate", str(tmp_path / "query.h5ad"), "--model", "human-pancreas"]
    assert main([*words, "--output", str(tmp_path / "labels.h5ad")]) == 0
    labels = ec.read_cells(tmp_path / "labels.h5ad").obs["evercell"].astype(str).to_numpy()
    assert (labels == truth).mean() > 0.85
    capsys.readouterr()


def test_auto_finds_the_tissue(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load_example("tritschler_unseen").write_h5ad(tmp_path / "query.h5ad")
    words = ["annotate", str(tmp_path / "query.h5ad"), "--model", "auto", "--output", str(tmp_path / "labels.csv")]
    assert main(words) == 0
    assert "human-pancreas" in capsys.readouterr().err


def test_half_precision_is_all_that_was_lost(models: dict[str, ec.Annotator]) -> None:
    for model in models.values():
        weights = model.weights()["backbone.gene_embedding.weight"]
        assert np.array_equal(weights, weights.astype(np.float16).astype(np.float32))

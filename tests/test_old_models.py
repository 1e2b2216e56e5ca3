"""Models of every format version, as the code of their time wrote them: they load, say what they said, and learn on.

`runs/make_old_models.py` made them, each with the code of the commit that its ``.json`` names; none is made again.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pytest

from evercell import checkpoint
from evercell.annotation import annotate
from evercell.annotator import Annotator
from evercell.checkpoint import load, load_stage, revert, save, stages_kept
from evercell.training import TrainingSettings
from evercell.updating import UpdateSettings
from evercell.updating.update import update

FOLDER = Path(__file__).parent / "old_models"
NAMES = sorted(one.stem for one in FOLDER.glob("v*.json"))
VERSIONS = sorted(value for name, value in vars(checkpoint).items() if name == "FORMAT" or name.startswith("FORMAT_"))
CLOSE = 1e-5  # of probabilities: kernels and BLAS of another machine add in another order


@pytest.fixture(scope="module")
def query() -> ad.AnnData:
    return ad.read_h5ad(FOLDER / "query.h5ad")


def told(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    return found


def test_every_format_version_has_a_model_here() -> None:
    """A new format is frozen here when it is made: this test fails until it is."""
    formats = {json.loads((FOLDER / name / "annotator.json").read_text())["format"] for name in NAMES}
    assert formats == set(VERSIONS)


@pytest.mark.parametrize("name", NAMES)
def test_an_old_model_says_what_it_said(name: str, query: ad.AnnData) -> None:
    from safetensors.numpy import load_file

    model, before, arrays = load(FOLDER / name), told(name), load_file(FOLDER / f"{name}.safetensors")
    assert model.fingerprint == before["fingerprint"]
    assert list(model.types.names) == before["types"]
    assert len(model.ledger) == before["stages"]
    result = annotate(model, query, reject="off")
    assert result.obs["evercell"].tolist() == before["labels"]
    np.testing.assert_allclose(result.probabilities, arrays["probabilities"], atol=CLOSE)
    np.testing.assert_allclose(result.representation, arrays["representation"], atol=1e-4)
    rejected = annotate(model, query)
    np.testing.assert_allclose(rejected.obs["evercell_unknown_score"], arrays["unknown_score"], atol=1e-4)
    assert rejected.obs["evercell"].tolist() == before["rejected"]


@pytest.mark.parametrize("name", NAMES)
def test_an_old_model_written_again_is_the_same_model(name: str, tmp_path: Path) -> None:
    model = load(FOLDER / name)
    assert load(save(model, tmp_path / "again")).fingerprint == model.fingerprint


def taught(model: Annotator) -> Annotator:
    training = TrainingSettings(samples=128, batch_size=32, evaluations=1)
    return update(
        model,
        ad.read_h5ad(FOLDER / "second.h5ad"),
        settings=replace(UpdateSettings(), training=training, refit=False),
        mapping={"acinar": "acinar"},
        force=True,
        shown=False,
    )


@pytest.mark.parametrize("name", ["v1", "v2", "v3_scaled", "v4"])
def test_an_old_model_learns_on(name: str, query: ad.AnnData, tmp_path: Path) -> None:
    model = load(FOLDER / name)
    after = taught(model)
    assert after.types.names[: len(model.types)] == model.types.names
    assert "acinar" in after.types.names
    assert after.ledger.stages[: len(model.ledger)] == model.ledger.stages
    again = load(save(after, tmp_path / "after", previous=FOLDER / name))
    assert load_stage(tmp_path / "after", len(model.ledger), now=again).fingerprint == model.fingerprint
    assert annotate(again, query, reject="off").obs["evercell"].isin(after.types.names).all()


def test_an_old_model_goes_back_to_its_first_stage(tmp_path: Path) -> None:
    kept = FOLDER / "v1_stages"
    assert stages_kept(kept) == [1]
    assert len(revert(kept, 1, tmp_path / "first").ledger) == 1

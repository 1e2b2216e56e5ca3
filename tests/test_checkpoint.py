"""The model directory: whole or absent, self-describing, and every change to it found."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from anndata import AnnData

from evercell import checkpoint
from evercell.annotation import annotate
from evercell.annotator import Annotator, empty_bank
from evercell.backbones import BACKBONES
from evercell.checkpoint import FORMAT_WITH_SETS, load, save
from evercell.errors import ModelError, OutputError
from evercell.finetuning import quick_settings, train
from evercell.rejection import REJECTORS
from evercell.testing import synthetic_cells
from evercell.training import TrainingSettings


@pytest.fixture(scope="module")
def folder(model: Annotator, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(model, tmp_path_factory.mktemp("models") / "model", card="# A model\n")


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """A copy of the saved model to be tampered with."""
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def edited(copy: Path, change: Callable[[dict[str, object]], object]) -> None:
    file = copy / "annotator.json"
    description = json.loads(file.read_text(encoding="utf-8"))
    change(description)
    file.write_text(json.dumps(description), encoding="utf-8")


def test_a_loaded_model_says_the_same_to_the_last_bit(model: Annotator, folder: Path, query: AnnData) -> None:
    """Invariants 1 and 2: save and load."""
    before = torch.random.get_rng_state()
    again = load(folder)
    assert torch.equal(torch.random.get_rng_state(), before)  # invariant 6
    assert again.fingerprint == model.fingerprint
    first, second = annotate(model, query), annotate(again, query)
    np.testing.assert_array_equal(first.probabilities, second.probabilities)
    np.testing.assert_array_equal(first.representation, second.representation)
    assert first.obs.equals(second.obs)
    assert again.ledger.to_text() == model.ledger.to_text()
    assert again.types == model.types
    assert again.vocabulary == model.vocabulary
    assert json.dumps(again.settings) == json.dumps(model.settings)
    assert not again.backbone.training
    assert not again.head.training


def test_the_bank_comes_back_whole(model: Annotator, folder: Path) -> None:
    bank, again = model.bank, load(folder).bank
    assert (bank.counts != again.counts).nnz == 0
    assert again.counts.dtype == np.float32
    for name in ("codes", "stages", "studies", "measured"):
        np.testing.assert_array_equal(getattr(again, name), getattr(bank, name))


def test_saving_again_gives_the_same_files(folder: Path, tmp_path: Path) -> None:
    again = save(load(folder), tmp_path / "again", card="# A model\n")
    for name in ("genes.txt", "ledger.jsonl", "weights.safetensors", "MODEL_CARD.md"):
        assert (again / name).read_bytes() == (folder / name).read_bytes()
    bank = save(load(again), tmp_path / "third") / "bank.h5ad"
    assert bank.read_bytes() == (again / "bank.h5ad").read_bytes()


def test_a_directory_describes_itself_without_pickle(folder: Path) -> None:
    """Invariant 2."""
    assert {file.name for file in folder.iterdir()} == {
        "annotator.json", "genes.txt", "weights.safetensors", "bank.h5ad", "sealed.h5ad", "ledger.jsonl",
        "MODEL_CARD.md",
    }  # fmt: skip
    description = json.loads((folder / "annotator.json").read_text())
    assert description["format"] == FORMAT_WITH_SETS
    assert description["types"]["names"] == ["alpha", "beta", "delta", "gamma"]
    assert description["settings"]["training"]["samples"] == 3200
    assert all(not file.read_bytes().startswith((b"\x80\x04", b"PK\x03\x04")) for file in folder.iterdir())


@pytest.mark.parametrize(
    "name", ["annotator.json", "genes.txt", "weights.safetensors", "bank.h5ad", "sealed.h5ad", "ledger.jsonl"]
)
@pytest.mark.parametrize("damage", ["flipped", "cut", "empty", "missing", "longer", "folder"])
def test_damage_to_any_file_is_found(copy: Path, name: str, damage: str) -> None:
    """Invariant 2: every file is checked."""
    file = copy / name
    raw = bytearray(file.read_bytes())
    file.unlink()
    if damage == "flipped":
        place = raw.rindex(b"0") if name == "annotator.json" else 2 * len(raw) // 3
        raw[place] ^= 1
        file.write_bytes(raw)
    elif damage == "folder":
        file.mkdir()
    elif damage != "missing":
        file.write_bytes({"cut": raw[: len(raw) // 2], "empty": b"", "longer": raw + b"{}"}[damage])
    with pytest.raises(ModelError) as caught:
        load(copy)
    assert caught.value.hint


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.update(temperature=d["temperature"] * 2),
        lambda d: d["types"]["names"].reverse(),
        lambda d: d["types"].update(ontology_ids=[None] * 4),
        lambda d: d.update(linear=False),
        lambda d: d["tokenizer"].update(name="bins"),
        lambda d: d["head"].update(dropout=0.9),
        lambda d: d["settings"].update(balance="none"),
        lambda d: d.update(ledger_head="0" * 64),
        lambda d: d.update(more=1),
        lambda d: d.pop("sha256"),
        lambda d: d.update(sha256=[1]),
        lambda d: d.update(sha256={}),
        lambda d: d.pop("format"),
        lambda d: d.update(format="one"),
        lambda d: d.update(format=float("inf")),
    ],
)
def test_an_edited_description_is_found(copy: Path, change: Callable[[dict[str, object]], object]) -> None:
    edited(copy, change)
    with pytest.raises(ModelError):
        load(copy)


@pytest.mark.parametrize("change", [lambda d: d.update(temperature=3.0), lambda d: d["types"]["names"].reverse()])
def test_a_forged_description_does_not_fit_its_fingerprint(
    copy: Path, change: Callable[[dict[str, object]], object]
) -> None:
    def forge(description: dict[str, object]) -> None:
        change(description)
        description["sha256"]["annotator.json"] = checkpoint._own_digest(description)  # type: ignore[index]

    edited(copy, forge)
    with pytest.raises(ModelError):
        load(copy)


@pytest.mark.parametrize("text", ["[]", "3", "not json", "[" * 100_000, '{"format": 1}'])
def test_what_is_no_description_is_told(copy: Path, text: str) -> None:
    (copy / "annotator.json").write_text(text)
    with pytest.raises(ModelError):
        load(copy)


@pytest.mark.parametrize("name", ["annotator.json", "weights.safetensors", "bank.h5ad"])
def test_a_symlinked_file_is_refused(copy: Path, tmp_path: Path, name: str) -> None:
    outside = tmp_path / "outside"
    shutil.move(copy / name, outside)
    (copy / name).symlink_to(outside)
    with pytest.raises(ModelError, match=f"`{name}` is a link"):
        load(copy)


def test_a_newer_format_is_refused_with_the_way_out(copy: Path) -> None:
    edited(copy, lambda d: d.update(format=FORMAT_WITH_SETS + 1))
    with pytest.raises(ModelError, match=f"has format {FORMAT_WITH_SETS + 1}") as caught:
        load(copy)
    assert "upgrade" in (caught.value.hint or "")


def test_what_is_no_model_is_told(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="there is no model at"):
        load(tmp_path / "nowhere")
    with pytest.raises(ModelError, match=r"no annotator\.json"):
        load(tmp_path)


def files_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("step", ["_write_bank", "_digest"])
def test_an_interrupted_save_leaves_the_old_model_or_nothing(
    model: Annotator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """Invariant 9."""
    old = save(model, tmp_path / "old")
    before = files_of(old)

    def stopped(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, step, stopped)
    with pytest.raises(KeyboardInterrupt):
        save(replace(model, temperature=9.0), old, overwrite=True)
    with pytest.raises(KeyboardInterrupt):
        save(model, tmp_path / "new")
    assert files_of(old) == before
    assert [file.name for file in tmp_path.iterdir()] == ["old"]
    monkeypatch.undo()
    assert load(old).fingerprint == model.fingerprint


def test_a_model_is_replaced_when_asked_only(model: Annotator, tmp_path: Path) -> None:
    path = save(model, tmp_path / "model")
    with pytest.raises(ModelError, match="already there") as caught:
        save(model, path)
    assert "--overwrite" in (caught.value.hint or "")
    other = replace(model, temperature=2.5)
    save(other, path, overwrite=True)
    assert load(path).fingerprint == other.fingerprint
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


def test_nothing_but_a_model_is_ever_replaced(model: Annotator, tmp_path: Path) -> None:
    file = tmp_path / "cells.h5ad"
    file.write_text("precious")
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "figure.png").write_text("precious")
    for path in (file, tmp_path / "results"):
        with pytest.raises(ModelError, match="already there"):
            save(model, path, overwrite=True)
    assert file.read_text() == "precious"
    assert (tmp_path / "results" / "figure.png").is_file()


def test_an_empty_folder_may_be_filled(model: Annotator, tmp_path: Path) -> None:
    (tmp_path / "made").mkdir()
    assert load(save(model, tmp_path / "made")).fingerprint == model.fingerprint


def test_a_missing_parent_is_told(model: Annotator, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="does not exist"):
        save(model, tmp_path / "no" / "model")


@pytest.mark.parametrize("backbone", list(BACKBONES))
@pytest.mark.parametrize(("tokenizer", "rejector"), [("bins", "energy"), ("values", "prototypes")])
def test_every_architecture_is_saved(backbone: str, tokenizer: str, rejector: str, tmp_path: Path) -> None:
    assert rejector in REJECTORS
    small = {"latent": {"members": 1, "member_width": 8}}.get(backbone, {"width": 8, "depth": 1, "n_heads": 2})
    settings = replace(
        quick_settings(), backbone=backbone, backbone_settings=small, tokenizer=tokenizer, rejector=rejector,
        hidden=(6,), refit=False, linear=rejector == "energy", training=TrainingSettings(samples=64, batch_size=32),
    )  # fmt: skip
    cells = synthetic_cells(60, n_genes=120)
    made = train(cells, settings=settings)
    again = load(save(made, tmp_path / "model"))
    assert again.fingerprint == made.fingerprint
    np.testing.assert_array_equal(annotate(again, cells).probabilities, annotate(made, cells).probabilities)


def test_a_model_without_cells_in_its_bank_is_saved(model: Annotator, tmp_path: Path) -> None:
    bare = replace(model, bank=empty_bank(len(model.vocabulary)), rejector=None)
    again = load(save(bare, tmp_path / "bare"))
    assert len(again.bank) == 0
    assert again.bank.counts.shape == (0, len(model.vocabulary))
    assert again.bank.measured.shape == (0, len(model.vocabulary))
    assert again.rejector is None


def test_a_model_without_sealed_cells_or_sums_is_read(model: Annotator, tmp_path: Path) -> None:
    """Models written before updates were there, and those that keep none."""
    plain = replace(model, sealed=None, strategy_state={})
    folder = save(plain, tmp_path / "plain")
    assert not (folder / "sealed.h5ad").exists()
    again = load(folder)
    assert again.sealed is None
    assert not again.strategy_state
    assert again.fingerprint == plain.fingerprint


def test_every_file_can_be_read_by_whom_the_folder_is_shared_with(model: Annotator, tmp_path: Path) -> None:
    save(model, tmp_path / "model")
    modes = {file.name: file.stat().st_mode for file in (tmp_path / "model").iterdir()}
    assert len(set(modes.values())) == 1, modes


def test_a_halved_model_is_stored_in_half_precision_and_loses_nothing_more(
    model: Annotator, folder: Path, query: AnnData, tmp_path: Path
) -> None:
    halved = model.halved()
    save(halved, tmp_path / "half")
    again = load(tmp_path / "half")
    assert again.fingerprint == halved.fingerprint != model.fingerprint
    sizes = [(place / "weights.safetensors").stat().st_size for place in (folder, tmp_path / "half")]
    assert sizes[1] < 0.65 * sizes[0]
    assert all(array.dtype != np.float16 for array in again.weights().values())
    before, after = (annotate(one, query, reject="off").probabilities for one in (model, again))
    assert np.abs(before - after).max() < 0.02
    assert not np.array_equal(before, after)


def test_the_share_of_the_linear_member_is_stored_and_counts(model: Annotator, query: AnnData, tmp_path: Path) -> None:
    model = replace(model, profiles=None, sets=None)
    trusted = replace(model, linear_share=0.25)
    save(trusted, tmp_path / "model")
    assert json.loads((tmp_path / "model" / "annotator.json").read_text())["format"] == checkpoint.FORMAT_WITH_SCALED
    again = load(tmp_path / "model")
    assert again.linear_share == 0.25
    assert again.fingerprint == trusted.fingerprint != model.fingerprint
    alone = [annotate(replace(model, linear_share=share), query, reject="off") for share in (0.001, 0.25, 0.999)]
    gaps = [np.abs(one.probabilities - alone[1].probabilities).mean() for one in alone]
    assert gaps[0] > 0 < gaps[2]

"""Stages run again give the numbers of the first run, and what differs is named."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from evercell.checkpoint import load, save
from evercell.examples import load_example
from evercell.finetuning import quick_settings, train
from evercell.ledger import Ledger
from evercell.reproducing import reproduce
from evercell.training import TrainingSettings
from evercell.updating import UpdateSettings
from evercell.updating.update import update

Run = Callable[..., tuple[int, str, str]]
SHORT = TrainingSettings(samples=320, batch_size=64, learning_rate=5e-3, evaluations=2)


def folder_bytes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of a folder."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of two real stages in ``model``, its cells in ``studies`` under other names."""
    folder = tmp_path_factory.mktemp("reproduced")
    (folder / "studies").mkdir()
    cells = [load_example(name)[::3, ::4].copy() for name in ("baron_stage1", "fasolino_stage2")]
    for number, one in enumerate([load_example("tritschler_unseen")[::3, ::4].copy(), *cells]):
        one.write_h5ad(folder / "studies" / f"{number}.h5ad")
    settings = replace(quick_settings(), training=SHORT)
    first = train(cells[0], groups="donor", settings=settings, names=["baron.h5ad"], shown=False)
    save(first, folder / "first")
    second = update(
        first,
        cells[1],
        groups="donor",
        mapping={"endothelial": "endothelial", "stellate": "activated_stellate"},
        settings=UpdateSettings(training=SHORT),
        force=True,
        names=["fasolino.h5ad"],
        shown=False,
    )
    save(second, folder / "model", previous=folder / "first")
    return folder


def test_a_model_is_made_again_from_its_data(made: Path, run: Run) -> None:
    code, out, err = run("reproduce", made / "model", "--data", made / "studies", "--output", made / "again", "--json")
    assert code == 0, out + err
    assert [one["verdict"] for one in json.loads(out)["stages"]] == ["same", "same"]
    then, again = load(made / "model"), load(made / "again")
    assert again.fingerprint == then.fingerprint
    # The ledgers are alike but for the words for how labels were settled and that one try was made.
    assert again.ledger.stages[0] == then.ledger.stages[0]
    bytes_then, bytes_again = folder_bytes(made / "model"), folder_bytes(made / "again")
    same = ("weights.safetensors", "bank.h5ad", "sealed.h5ad", "genes.txt")
    assert [bytes_then[name] for name in same] == [bytes_again[name] for name in same]


def test_a_stage_whose_data_are_not_there_is_not_run(made: Path, run: Run) -> None:
    (made / "empty").mkdir()
    code, out, _ = run("reproduce", made / "model", "--data", made / "empty")
    assert code == 1
    assert out.startswith("stage 1: not run\n")
    assert "has the cells of `baron.h5ad`" in out and "--data" in out


def test_what_differs_is_named_with_its_reason(made: Path, tmp_path: Path) -> None:
    model = load(made / "first")
    facts = dict(model.ledger.stages[0].facts)
    facts["circumstances"] = {**facts["circumstances"], "torch": "1.0"}
    facts["seed"] = 1
    save(replace(model, ledger=Ledger().appended(facts)), tmp_path / "model")
    (found,), again = reproduce(tmp_path / "model", [made / "studies"], shown=False)
    assert (found.verdict, found.stage) == ("different", 1)
    assert again is not None and found.found == again.fingerprint != found.expected == model.fingerprint
    assert found.why.startswith("torch 1.0, now ")
    assert found.n_differing and found.largest and found.largest > 0


def test_ledgers_of_early_versions_are_enough(made: Path, tmp_path: Path) -> None:
    """Where they do not say how files were read, the column of donors is found; the next stage tells what came out."""
    model, ledger = load(made / "model"), Ledger()
    for stage in model.ledger:
        facts = {k: v for k, v in stage.facts.items() if k not in ("read", "circumstances", "made")}
        data = [{k: v for k, v in one.items() if k != "counts_sha256"} for one in facts["data"]]
        ledger = ledger.appended({**facts, "data": data})
    save(replace(model, ledger=ledger), tmp_path / "model")
    found, _ = reproduce(tmp_path / "model", [made / "studies"], shown=False)
    assert [one.verdict for one in found] == ["same", "same"]


def test_the_same_run_writes_the_same_bytes(made: Path, run: Run, tmp_path: Path) -> None:
    """Model directories, labelled files and tables hold no time of day; of reports see test_reporting.py."""
    query = str(made / "studies" / "0.h5ad")
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        save(load(made / "model"), tmp_path / name / "model")
        for output in ("cells.h5ad", "cells.csv"):
            words = ["--model", str(made / "model"), "--output", str(tmp_path / name / output), "--reject", "0.05"]
            code, _, err = run("annotate", query, *words)
            assert code == 0, err
    a, b = folder_bytes(tmp_path / "a"), folder_bytes(tmp_path / "b")
    assert {name for name in a if a[name] != b[name]} == set()
    assert len(a) > 8

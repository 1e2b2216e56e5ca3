"""`evercell update`, `diff`, `revert` and `bisect`, end to end."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from evercell.checkpoint import load
from evercell.cli import main
from evercell.testing import synthetic_cells

SIZES = ("members=1", "member_width=8", "n_latents=2", "depth=1", "n_heads=2")
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, new cells with a type of their own, and the updated model."""
    folder = tmp_path_factory.mktemp("updating")
    synthetic_cells(400, seed=1).write_h5ad(folder / "first.h5ad")
    synthetic_cells(250, n_types=5, seed=2).write_h5ad(folder / "new.h5ad")
    renamed = synthetic_cells(160, seed=3)
    renamed.obs["cell_type"] = renamed.obs["cell_type"].astype(str).replace({"beta": "B-like"})
    renamed.write_h5ad(folder / "renamed.h5ad")
    lone = synthetic_cells(350, n_types=7, seed=4)
    lone[lone.obs["cell_type"].isin(["ductal", "endothelial"]).to_numpy()].copy().write_h5ad(folder / "lone.h5ad")
    (folder / "labels.csv").write_text("label,name\nacinar,acinar\n", encoding="utf-8")
    words = ["train", folder / "first.h5ad", "--labels", "cell_type", "--output", folder / "model", "--samples", "1600"]
    sizes = [word for size in SIZES for word in ("--backbone-setting", size)]
    assert main([*map(str, words), *sizes, "--quiet"]) == 0
    words = [
        "update", folder / "model", folder / "new.h5ad", "--labels", "cell_type", "--mapping", folder / "labels.csv",
        "--output", folder / "updated", "--samples", "640",
    ]  # fmt: skip
    assert main([*map(str, words), "--quiet"]) == 0
    return folder


def test_update_writes_a_new_model_and_leaves_the_old(folder: Path, run: Run, tmp_path: Path) -> None:
    before = {file.name: file.read_bytes() for file in (folder / "model").iterdir()}
    code, out, err = run(
        "update", folder / "model", folder / "new.h5ad", "--labels", "cell_type", "--donor", "donor", "--mapping",
        folder / "labels.csv", "--strategy", "analytic", "--output", tmp_path / "new", "--json",
    )  # fmt: skip
    assert code == 0, err
    assert {file.name: file.read_bytes() for file in (folder / "model").iterdir()} == before
    found = json.loads(out)
    assert found["strategy"] == "analytic"
    assert found["types_added"] == ["acinar"]
    assert found["types"] == ["alpha", "beta", "delta", "gamma", "acinar"]
    assert found["tries"][-1]["holds"]
    assert set(found["sealed"]["stages"]) == {"1", "2"}
    assert load(tmp_path / "new").fingerprint == found["fingerprint"]
    assert "label `acinar`" not in err
    assert run("verify", tmp_path / "new")[0] == 0


def test_log_shows_the_stages_and_what_was_forgotten(folder: Path, run: Run) -> None:
    code, out, _ = run("log", folder / "updated")
    assert code == 0
    assert "stage 2: update by " in out
    assert "types added: acinar" in out
    (header, *rows) = out.splitlines()[-3:]
    assert header.split() == ["sealed", "in", "1", "sealed", "in", "2"]
    assert [len(row.split()) for row in rows] == [4, 5]


def test_labels_to_be_settled_are_an_error_that_names_them(folder: Path, run: Run, tmp_path: Path) -> None:
    words = ["update", folder / "model", folder / "renamed.h5ad", "--labels", "cell_type", "--samples", "64"]
    code, out, err = run(*words, "--output", tmp_path / "no")
    assert (code, out) == (2, "")
    assert "`B-like` on `beta`" in err
    assert "--mapping FILE" in err
    assert not (tmp_path / "no").exists()
    code, out, err = run(*words, "--output", tmp_path / "yes", "--accept-proposals", "--strategy", "analytic")
    assert code == 0, err
    assert out.startswith("types added: none\n")


def test_a_model_that_forgets_is_not_written(
    folder: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [
        "update", folder / "model", folder / "lone.h5ad", "--labels", "cell_type", "--strategy", "naive", "--samples",
        "640", "--accept-proposals",
    ]  # fmt: skip
    (tmp_path / "labels.csv").write_text("label,name\nductal,ductal\nendothelial,endothelial\n", encoding="utf-8")
    words += ["--mapping", str(tmp_path / "labels.csv")]
    code, _, err = run(*words, "--output", tmp_path / "forced", "--force")
    assert code == 0
    assert "warning: old types fell, and --force was given: all old types" in err
    monkeypatch.setattr(
        "evercell.updating.update._attempts", lambda _, strategy, settings, force: [(strategy, settings)]
    )
    code, out, err = run(*words, "--output", tmp_path / "no")
    assert (code, out) == (1, "")
    assert "error: old types fell by more than 0.02" in err
    assert not (tmp_path / "no").exists()


def test_diff_tells_types_and_labels_that_change(folder: Path, run: Run) -> None:
    code, out, err = run("diff", folder / "model", folder / "updated", folder / "new.h5ad", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert (found["only_in_a"], found["only_in_b"], found["cells"]) == ([], ["acinar"], 250)
    assert set(found["types"]) == {"alpha", "beta", "delta", "gamma"}
    assert sum(one["cells"] for one in found["changes"] if one["b"] == "acinar") > 20
    code, out, _ = run("diff", folder / "model", folder / "model")
    assert code == 0
    assert "none" in out


def test_revert_gives_the_earlier_model_back(folder: Path, run: Run, tmp_path: Path) -> None:
    code, out, err = run("revert", folder / "updated", "--stage", "1", "--output", tmp_path / "back")
    assert code == 0, err
    assert out == f"{tmp_path / 'back'}: stage 1, 4 cell types\n"
    assert load(tmp_path / "back").fingerprint == load(folder / "model").fingerprint
    code, _, err = run("revert", folder / "updated", "--stage", "2", "--output", tmp_path / "no")
    assert code == 2
    assert "does not keep stage 2; earlier stages kept: 1" in err


def test_verify_looks_at_the_earlier_stages_too(folder: Path, run: Run, tmp_path: Path) -> None:
    assert run("verify", folder / "updated")[0] == 0
    copy = Path(shutil.copytree(folder / "updated", tmp_path / "copy"))
    bank = copy / "stages" / "1" / "bank.h5ad"
    bank.write_bytes(bank.read_bytes()[:-1])
    code, _, err = run("verify", copy)
    assert code == 1
    assert "`bank.h5ad` was changed or cut off" in err
    shutil.rmtree(copy / "stages" / "1")
    shutil.copytree(folder / "updated", copy / "stages" / "1", ignore=shutil.ignore_patterns("stages"))
    code, _, err = run("revert", copy, "--stage", "1", "--output", tmp_path / "no")
    assert code == 2
    assert "is not stage 1 of the model" in err


def test_bisect_tells_where_a_type_got_worse(folder: Path, run: Run, tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text("label,name\nductal,ductal\nendothelial,endothelial\n", encoding="utf-8")
    words = [
        "update", folder / "updated", folder / "lone.h5ad", "--labels", "cell_type", "--strategy", "naive", "--samples",
        "640", "--mapping", tmp_path / "labels.csv", "--force", "--output", tmp_path / "third",
    ]  # fmt: skip
    assert run(*words)[0] == 0
    code, out, _ = run("bisect", tmp_path / "third", "--type", "beta", "--json")
    found = json.loads(out)
    assert code == 0
    assert (found["learnt"], found["fell_in"]) == (1, 3)
    assert [row["stage"] for row in found["stages"]] == [2, 3]
    code, out, _ = run("bisect", tmp_path / "third", "--type", "ductal")
    assert (code, out) == (0, "`ductal` was learnt in stage 3\nit fell in no later stage\n")
    code, _, err = run("bisect", tmp_path / "third", "--type", "T cell")
    assert code == 2
    assert "no cell type `T cell`" in err


def test_reconcile_shows_where_labels_land_and_update_takes_its_table(folder: Path, run: Run, tmp_path: Path) -> None:
    labels = tmp_path / "labels.csv"
    words = ["reconcile", folder / "model", folder / "renamed.h5ad", "--labels", "cell_type", "--output", labels]
    code, out, err = run(*words)
    assert code == 0, err
    rows = pd.read_csv(labels, index_col="label")
    assert rows.loc["B-like", ["name", "finding", "top_type"]].tolist() == ["beta", "rename", "beta"]
    assert rows.loc["alpha", ["name", "finding", "by"]].tolist() == ["alpha", "agrees", "exact"]
    assert "to be settled before an update" in out and "seems the same type, renamed" in out
    code, _, err = run(*words)
    assert code == 2 and "--overwrite" in err
    update = ["update", folder / "model", folder / "renamed.h5ad", "--labels", "cell_type", "--strategy", "analytic"]
    code, out, err = run(*update, "--mapping", labels, "--output", tmp_path / "settled", "--json")
    assert code == 0, err
    assert json.loads(out)["types_added"] == []
    assert "label `B-like` is `beta` (mapping)" in err
    labels.write_text(labels.read_text().replace("B-like,beta", "B-like,"))
    code, _, err = run(*update, "--mapping", labels, "--output", tmp_path / "open")
    assert code == 2 and "`B-like`" in err

"""The page on teaching: its commands run in its order, on packaged cells, with smaller models and shorter trainings."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import anndata as ad
import pandas as pd
import pytest

from evercell.checkpoint import load
from evercell.examples import load_example

PAGE = Path(__file__).parents[1] / "docs" / "teach.md"
Run = Callable[..., tuple[int, str, str]]


def steps(text: str) -> list[str]:
    """Commands and Python blocks of a page, in order; a line is one command."""
    parts = re.split(r"(?m)^(?=    evercell |```python\n)", text)[1:]
    return [
        part.removeprefix("```python\n").split("```")[0] if part.startswith("```") else part.splitlines()[0].strip()
        for part in parts
    ]


def test_commands_and_python_are_found() -> None:
    text = PAGE.read_text(encoding="utf-8")
    found = steps(text)
    assert found[0] == "evercell demo"
    assert sum(step.startswith("evercell ") for step in found) == len(re.findall(r"(?m)^ +evercell ", text))
    assert sum(not step.startswith("evercell ") for step in found) == text.count("```python") >= 2


def test_the_page_runs_from_top_to_bottom(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("evercell.reporting.report._map_points", lambda *_, **__: (None, "There is no map in tests."))
    text = PAGE.read_text(encoding="utf-8")
    said = {}
    for step in steps(text):
        if not step.startswith("evercell "):
            exec(compile(step, PAGE.name, "exec"), {})  # noqa: S102 -- the page's own code
            continue
        words = shlex.split(step)[1:]
        short = ["--samples", "3200"] if words[0] in ("demo", "train", "update") else []
        code, out, err = run(*words, *short)
        assert code == 0, f"{' '.join(words)}\n{out}\n{err}"
        said[words[0]] = out

    assert "endothelial" in said["reconcile"]
    assert load(tmp_path / "model2").types.names[-1] == "endothelial"
    assert len(load(tmp_path / "model3").ledger) == 3
    assert said["log"].count("stage ") >= 3
    assert "it fell in no later stage" in said["bisect"] or "fell most in stage" in said["bisect"]
    assert load(tmp_path / "model1").fingerprint == load(tmp_path / "evercell-demo" / "model").fingerprint
    clusters = pd.read_csv(tmp_path / "clusters.csv", keep_default_na=False)
    assert (clusters["accept"] == "yes").any()
    taught = load(tmp_path / "taught")
    assert taught.types.names[-1] == "endothelial" and len(taught.ledger) == 2
    annotated = ad.read_h5ad(tmp_path / "annotated.h5ad").obs
    endothelial = annotated[annotated["cell_type"] == "endothelial"]
    assert (endothelial["evercell"] == "endothelial").mean() >= 0.5
    others = annotated[annotated["cell_type"] != "endothelial"]
    assert (others["evercell"] == "endothelial").mean() < 0.05
    assert load(tmp_path / "private").bank.codes.size == 0
    assert len(pd.read_csv(tmp_path / "select.csv")) == 20


def test_the_commands_of_the_models_page_run(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but those that need a model of another project, or ONNX."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("evercell.reporting.report._map_points", lambda *_, **__: (None, "There is no map in tests."))
    load_example("tritschler_unseen")[::5].copy().write_h5ad("query.h5ad")
    load_example("baron_stage1").write_h5ad("labelled.h5ad")
    page = (PAGE.parent / "models.md").read_text(encoding="utf-8")
    for line in (line.strip() for line in page.splitlines() if line.startswith("    evercell ")):
        words = shlex.split(line)[1:]
        if words[0] == "import" or "onnx" in words:
            continue
        if words[1].startswith("$("):
            assert words == ["log", "$(evercell", "models", "path", "human-immune)"]
            words = ["log", run("models", "path", "human-immune")[1].strip()]
        short = ["--samples", "640", "--no-refit"] if words[0] == "train" else []
        code, out, err = run(*words, *short)
        assert code == 0, f"{line}\n{out}\n{err}"
    assert load(tmp_path / "model").ledger.stages[0].facts["base"]
    assert (tmp_path / "weights.csv").read_text().startswith("#")


def test_the_commands_of_the_mouse_lung_page_run(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From three raw folders to a cross-validated model, with shorter trainings."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("evercell.reporting.report._map_points", lambda *_, **__: (None, "There is no map in tests."))
    page = (PAGE.parent / "mouse-lung.md").read_text(encoding="utf-8")
    said = {}
    for line in (line.strip() for line in page.splitlines() if line.startswith("    evercell ")):
        words = shlex.split(line)[1:]
        short = ["--samples", "640"] if words[0] in ("pretrain", "train", "crossval", "compare") else []
        code, out, err = run(*words, *short, *(["--no-refit"] if words[0] == "train" else []))
        assert code == 0, f"{line}\n{out}\n{err}"
        said[words[0]] = out
    assert len(said) == 8
    assert "measured by all sources" in said["merge"]
    clean = ad.read_h5ad(tmp_path / "clean.h5ad")
    assert clean.obs["source"].nunique() == 3
    assert clean.obs["cell_type"].notna().all()
    cells = pd.read_csv(tmp_path / "folds" / "cells.csv")
    assert not cells.groupby("group")["fold"].agg(lambda folds: len(set(folds)) - 1).any()
    scores = pd.read_csv(tmp_path / "compared" / "folds.csv")
    assert set(scores["method"]) == {"evercell", "linear", "knn"}
    assert scores.loc[scores["method"] == "linear", "accuracy"].mean() > 0.8
    assert load(tmp_path / "lung-model").ledger.stages[0].facts["settings"]["balance"] == "oversample"
    annotated = ad.read_h5ad(tmp_path / "annotated.h5ad")
    assert annotated.n_obs == 240


def test_the_page_on_explanations_runs(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With fewer cells a group."""
    monkeypatch.chdir(tmp_path)
    said = []
    for step in steps((PAGE.parent / "explain.md").read_text(encoding="utf-8")):
        if not step.startswith("evercell "):
            exec(compile(step.replace("max_cells=30", "max_cells=2"), "explain.md", "exec"), {})  # noqa: S102 -- its own
            continue
        words = shlex.split(step)[1:]
        short = ["--max-cells", "3"] if words[0] == "explain" else []
        code, out, err = run(*words, *short)
        assert code == 0, f"{step}\n{out}\n{err}"
        said.append(out)
    assert any("`delta`" in out and "because of SST" in out for out in said)
    assert any("called Unknown: unknown score" in out for out in said)
    assert "<h3>Genes</h3>" in (tmp_path / "why.html").read_text(encoding="utf-8")
    assert {"gene", "contribution"} <= set(pd.read_csv(tmp_path / "genes.csv"))

"""`report`, and `--report` of other commands, from the command line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import anndata as ad
import numpy as np
import pytest

from evercell.finetuning import quick_settings, train
from evercell.registry import find
from evercell.testing import synthetic_cells

Run = Callable[..., tuple[int, str, str]]
HOSTILE = "</script><script>alert(1)</script>"


@pytest.fixture
def annotated(tmp_path: Path) -> Path:
    """A file as `annotate` leaves it, by the model human-pancreas, without a representation: no map is made."""
    adata = synthetic_cells(40, seed=1)
    adata.obs["evercell"] = adata.obs["cell_type"]
    stored = json.loads((find("human-pancreas") / "annotator.json").read_text(encoding="utf-8"))
    adata.uns["evercell"] = {"model": "human-pancreas", "model_fingerprint": stored["fingerprint"]}
    adata.write_h5ad(tmp_path / "annotated.h5ad")
    return tmp_path / "annotated.h5ad"


def test_a_file_is_reported_with_the_stages_of_its_model(run: Run, annotated: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    code, out, _ = run("report", annotated, "--truth", "cell_type", "--output", page, "--json")
    assert code == 0 and json.loads(out)["stages"] == 3
    html = page.read_text(encoding="utf-8")
    assert "Agreement with cell_type" in html and "after stage 3" in html and "100.0% of the cells agree" in html


def test_stages_of_another_model_are_not_shown(run: Run, annotated: Path, tmp_path: Path) -> None:
    adata = ad.read_h5ad(annotated)
    adata.uns["evercell"]["model_fingerprint"] = "0" * 64
    adata.write_h5ad(annotated)
    code, out, err = run("report", annotated, "--output", tmp_path / "page.html", "--json")
    assert code == 0 and json.loads(out)["stages"] == 0 and "its fingerprint is another" in err
    code, _, err = run("report", annotated, "--model", "human-pancreas", "--output", tmp_path / "page.html")
    assert code == 2 and "is not the model that annotated the cells" in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--truth", "absent"], "no column `absent`"),
        (["--old-labels", "absent"], "no column `absent`"),
        (["--key", "absent"], "annotate` the file first"),
        (["--basis", "X_tsne"], "`obsm` has no `X_tsne`"),
        (["--model", "no-such-model"], "no-such-model"),
        (["--output", "page.pdf"], "does not end in .html"),
    ],
)
def test_what_is_wrong_is_said(run: Run, annotated: Path, words: list[str], said: str) -> None:
    code, _, err = run("report", annotated, *words)
    assert code == 2 and said in err and "hint:" in err


def test_a_model_is_reported(run: Run, tmp_path: Path) -> None:
    page = tmp_path / "model.html"
    code, out, _ = run("report", "human-pancreas", "--output", page, "--json")
    assert code == 0 and json.loads(out)["model"] == "human-pancreas"
    html = page.read_text(encoding="utf-8")
    for words in ("knows 10 cell types by 8,000 human genes", "Forgetting matrix", "CL:0000169", "INS", "Model card"):
        assert words in html, words
    code, _, err = run("report", "human-pancreas", "--truth", "cell_type", "--output", page)
    assert code == 2 and "is for a file of cells" in err


def test_a_card_is_text(run: Run, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(find("human-pancreas"), copy)
    (copy / "MODEL_CARD.md").write_text(HOSTILE, encoding="utf-8")
    assert run("report", copy, "--output", tmp_path / "m.html")[0] == 0
    html = (tmp_path / "m.html").read_text(encoding="utf-8")
    assert HOSTILE not in html and "&lt;script&gt;alert(1)" in html


def test_a_cross_validation_is_reported(run: Run, tmp_path: Path) -> None:
    synthetic_cells(160, seed=1, n_donors=2).write_h5ad(tmp_path / "labelled.h5ad")
    words = ["--labels", "cell_type", "--by", "donor", "--folds", "2", "--samples", "320"]
    page = tmp_path / "folds.html"
    code, _, err = run("crossval", tmp_path / "labelled.h5ad", *words, "--output", tmp_path / "cv", "--report", page)
    assert code == 0 and f"report: {page}" in err
    html = page.read_text(encoding="utf-8")
    for text in ("in 2 folds that keep each donor whole", "linear", "Confusion table", "Learning curve of fold 2"):
        assert text in html, text


def test_an_update_is_reported(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from evercell.checkpoint import save

    monkeypatch.setattr("evercell.reporting.report._map_points", lambda *_, **__: (None, "There is no map in tests."))
    save(train(synthetic_cells(200, seed=1), settings=quick_settings(), shown=False), tmp_path / "model")
    cells = synthetic_cells(120, n_types=5, seed=2)
    cells.obs["cell_type"] = cells.obs["cell_type"].astype(str).replace("acinar", HOSTILE).to_numpy()
    cells.obs["donor"] = np.where(np.arange(120) % 2, "a", "b")
    cells.write_h5ad(tmp_path / "new.h5ad")
    page = tmp_path / "update.html"
    words = ["--labels", "cell_type", "--strategy", "analytic", "--force", "--output", tmp_path / "model2"]
    code, _, err = run("update", tmp_path / "model", tmp_path / "new.h5ad", *words, "--report", page)
    assert code == 0, err
    html = page.read_text(encoding="utf-8")
    assert "Report on stage 2" in html and "The model learnt in 2 stages" in html and HOSTILE not in html
    assert "These are the cells that the model was trained on" in html and "Old against new labels" in html

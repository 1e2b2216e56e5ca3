"""`evercell explain`, end to end."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import evercell as ec
from evercell.annotator import Annotator
from evercell.testing import synthetic_cells

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def folder(model: Annotator, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and cells, with and without its labels; some of a type that it does not know."""
    folder = tmp_path_factory.mktemp("explaining")
    ec.save(model, folder / "model")
    query = synthetic_cells(120, n_types=5, seed=2)
    query.obs["leiden"] = pd.Categorical(np.where(query.obs["cell_type"] == "beta", "0", "<b>1</b>"))
    query.write_h5ad(folder / "query.h5ad")
    ec.annotate(model, query, inplace=True, reject=0.1, shown=False)
    query.write_h5ad(folder / "annotated.h5ad")
    return folder


def test_a_group_in_words_and_tables(folder: Path, run: Run, tmp_path: Path) -> None:
    words = ["explain", folder / "query.h5ad", "--model", folder / "model", "--groups", "leiden", "--max-cells", "6"]
    code, out, err = run(*words, "--group", "0", "--output", tmp_path / "genes.csv")
    assert code == 0, err
    sentence, amount, *_ = out.splitlines()
    assert sentence.startswith("leiden 0: `beta` (")
    assert "rather than `" in sentence and " because of " in sentence
    assert "6 of 24 cells explained" in amount
    assert "genes for beta  contribution  expression  elsewhere" in out
    assert "check: without its 50 first genes the probability falls by" in out
    table = pd.read_csv(tmp_path / "genes.csv")
    assert set(table["name"]) == {"leiden 0"}
    assert ", ".join(table["gene"].head(3)) in sentence
    assert (table["contribution"].diff().dropna() <= 0).all()
    assert f"written: {tmp_path / 'genes.csv'}" in err


def test_a_page_and_json_of_all_groups(folder: Path, run: Run, tmp_path: Path) -> None:
    words = ["explain", folder / "query.h5ad", "--model", folder / "model", "--groups", "leiden", "--max-cells", "3"]
    code, out, err = run(*words, "--output", tmp_path / "why.html", "--json", "--top", "7")
    assert code == 0, err
    found = json.loads(out)
    assert [one["name"] for one in found["reasons"]] == ["leiden 0", "leiden <b>1</b>"]
    assert (found["kind"], found["method"], found["output"]) == ("group", "integrated", str(tmp_path / "why.html"))
    assert len(found["reasons"][0]["genes"]) == 14
    page = (tmp_path / "why.html").read_text(encoding="utf-8")
    assert "leiden &lt;b&gt;1&lt;/b&gt;" in page and "<b>1</b>" not in page
    assert run(*words, "--output", tmp_path / "why.json")[0] == 0
    written = json.loads((tmp_path / "why.json").read_text(encoding="utf-8"))
    assert [one["sentence"] for one in written["reasons"]] == [one["sentence"] for one in found["reasons"]]


def test_unknown_cells_and_labels_of_an_annotated_file(folder: Path, run: Run) -> None:
    words = ["explain", folder / "annotated.h5ad", "--model", folder / "model", "--reject", "0.1", "--max-cells", "4"]
    code, out, err = run(*words, "--type", "Unknown", "--type", "beta")
    assert code == 0, err
    assert out.startswith("Unknown: Unknown, nearest `")
    assert "4 of them are called Unknown: unknown score " in out
    assert "\n\nbeta: `beta` (" in out


def test_cells_against_a_type(folder: Path, run: Run) -> None:
    query = synthetic_cells(120, n_types=5, seed=2)
    beta = query.obs_names[query.obs["cell_type"] == "beta"][:2]
    words = ["explain", folder / "query.h5ad", "--model", folder / "model", "--method", "gradient"]
    code, out, err = run(*words, "--cell", beta[0], "--cell", beta[1], "--against", "gamma", "--quiet")
    assert code == 0, err
    first, second = out.split("\n\n" + beta[1])
    assert first.startswith(f"{beta[0]}: ") and "rather than `gamma`" in first and "rather than `gamma`" in second
    assert err == ""


def test_what_cannot_be_asked_is_said_before_anything_is_written(folder: Path, run: Run, tmp_path: Path) -> None:
    words = ["explain", folder / "query.h5ad", "--model", folder / "model", "--output", tmp_path / "why.html"]
    for more, message in (
        (["--cell", "nobody"], "error: `" + str(folder / "query.h5ad") + "` has no cell `nobody`"),
        (["--groups", "louvain"], "has no column `louvain` in obs"),
        (["--groups", "leiden", "--group", "7"], "has no group `7`"),
        (["--type", "betta"], "hint: did you mean `beta`"),
        (["--type", "beta", "--against", "beta"], "`beta` is held against itself"),
        (["--type", "beta", "--groups", "leiden"], "groups and types are given"),
        (["--max-cells", "0"], "max_cells is 0"),
    ):
        code, out, err = run(*words, *more)
        assert (code, out) == (2, "")
        assert message in err, err
    assert "does not end in" in run(*words[:-1], tmp_path / "why.pdf")[2]
    assert not list(tmp_path.iterdir())

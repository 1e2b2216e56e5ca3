"""`evercell preprocess`, end to end."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
from anndata.io import read_zarr

from evercell.finetuning import quick_settings
from evercell.finetuning import train as train_model
from evercell.preprocessing import Preprocessing
from evercell.testing import synthetic_cells

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    adata = synthetic_cells(160, seed=1)
    adata.obs["split"] = np.where(np.arange(160) % 5 == 0, "test", "train")
    adata.write_h5ad(tmp_path / "raw.h5ad")
    return tmp_path / "raw.h5ad"


def test_a_file_and_a_later_one_like_it(raw: Path, run: Run, tmp_path: Path) -> None:
    clean, steps, plots = tmp_path / "clean.h5ad", tmp_path / "steps.json", tmp_path / "cells.png"
    code, out, err = run(
        "preprocess", raw, "--output", clean, "--min-genes", "60", "--mad", "5", "--variable-genes", "100",
        "--training", "split=train", "--batch", "donor", "--log", "2", "--settings-out", steps, "--plots", plots,
        "--json",
    )  # fmt: skip
    assert code == 0, err
    found = json.loads(out)
    cells = ad.read_h5ad(clean)
    assert [found["cells"], found["genes"]] == list(cells.shape)
    assert found["cells_before"] == 160 > cells.n_obs
    assert found["steps"][0]["rule"] == "at least 60 genes" and found["variable_genes"] == 100
    assert found["settings"]["mad"] == 5 and found["settings"]["log"] == "2"
    assert cells.var["highly_variable"].sum() == 100 and cells.uns["log1p"]["base"] == 2
    assert plots.stat().st_size > 5000 and Preprocessing.load(steps) == Preprocessing.load(clean)
    assert "no mitochondrial gene was measured" in err

    later = synthetic_cells(60, seed=2)[:, 20:].copy()
    later.write_h5ad(tmp_path / "later.h5ad")
    for like in (clean, steps):
        code, out, err = run(
            "preprocess", tmp_path / "later.h5ad", "--like", like, "--output", tmp_path / "later.zarr", "--mad", "5"
        )
        assert code == 0, err
        assert "genes were not measured and are zeros" in err
        assert "cells before" in out and "genes of the settings" in out
        made = read_zarr(tmp_path / "later.zarr")
        assert list(made.var_names) == list(cells.var_names)
        assert not made.var["measured"].all() and made.var["highly_variable"].sum() == 100


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--min-genes", "61"], "--min-genes is `61`"),
        (["--only-variable"], "--only-variable is `True`"),
        (["--training", "split=train"], "--training"),
    ],
)
def test_like_stands_alone(raw: Path, run: Run, tmp_path: Path, words: list[str], said: str) -> None:
    assert run("preprocess", raw, "--output", tmp_path / "clean.h5ad", "--min-genes", "60")[0] == 0
    code, out, err = run(
        "preprocess", raw, "--like", tmp_path / "clean.h5ad", "--output", tmp_path / "again.h5ad", *words
    )
    assert (code, out) == (2, "")
    assert said in err and "--like" in err.splitlines()[-1]
    assert not (tmp_path / "again.h5ad").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--min-genes", "5000"], "lower --min-genes, which is 5000: the median is"),
        (["--max-mito", "120"], "max_mito is `120.0`"),
        (["--doublets", "maybe"], "off, score, drop"),
        (["--batch", "no_column"], "no column `no_column`"),
        (["--plots", "cells.gif"], "--plots"),
        (["--settings-out", "steps.yaml"], "--settings-out"),
        (["--like", "raw.h5ad"], "`raw.h5ad`"),
        (["--only-variable"], "--variable-genes"),
    ],
)
def test_what_cannot_be_done_is_said_and_nothing_is_written(
    raw: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = run("preprocess", raw, "--output", "clean.h5ad", *words)
    assert (code, out) == (2, "")
    assert err.splitlines()[-2].startswith("error:") and said in err
    assert {path.name for path in tmp_path.iterdir()} == {"raw.h5ad"}


def test_a_warning_names_the_threshold_that_takes_most_cells(raw: Path, run: Run, tmp_path: Path) -> None:
    adata = ad.read_h5ad(raw)
    median = int(np.median(np.diff(adata.X.indptr)))
    code, out, err = run("preprocess", raw, "--output", tmp_path / "clean.h5ad", "--min-genes", str(median + 3))
    assert code == 0
    assert "warning: `genes a cell" in err and "--min-genes" in err
    code, out, err = run("preprocess", raw, "--output", tmp_path / "clean.h5ad", "--min-genes", "20", "--quiet")
    assert code == 0 and err == "" and "genes a cell" in out


def test_the_output_trains_as_the_raw_file_does(raw: Path, run: Run, tmp_path: Path) -> None:
    """`train` takes the counts, not the normalised values; so does another `preprocess`."""
    code, _, err = run("preprocess", raw, "--output", tmp_path / "clean.h5ad", "--min-genes", "20", "--min-cells", "0")
    assert code == 0, err
    models = [
        train_model(ad.read_h5ad(path), "cell_type", groups="donor", settings=quick_settings(), shown=False)
        for path in (raw, tmp_path / "clean.h5ad")
    ]
    facts = [model.ledger.stages[-1].facts for model in models]
    assert [one["data"][0]["counts"] for one in facts] == ["X", "layers['counts']"]
    assert facts[0]["metrics"] == facts[1]["metrics"]

    code, _, err = run(
        "preprocess", tmp_path / "clean.h5ad", "--output", tmp_path / "again.h5ad", "--min-genes", "20", "--json"
    )
    assert code == 0 and "the counts in layers['counts'] are taken" in err
    once, twice = (ad.read_h5ad(tmp_path / name) for name in ("clean.h5ad", "again.h5ad"))
    twice = twice[:, once.var_names.intersection(twice.var_names)]
    np.testing.assert_allclose(once[:, twice.var_names].X.toarray(), twice.X.toarray(), rtol=1e-5)


def test_the_help_needs_no_scanpy() -> None:
    code = (
        "import sys\nfrom evercell.cli import main\nmain(['preprocess', '--help'])\n"
        "print([name for name in ('scanpy', 'torch', 'matplotlib', 'anndata') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1] == "[]" and "--variable-genes" in done.stdout

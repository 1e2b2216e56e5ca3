"""The pages for R and pipelines do what they say; `test_docs` runs that for Python."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import anndata as ad
import pandas as pd
import pytest
from scipy.io import mmwrite

import evercell as ec
from evercell.annotator import Annotator
from evercell.checkpoint import save

DOCS = Path(__file__).parents[1] / "docs"


def blocks(page: str, language: str) -> list[str]:
    """The blocks of a page in a language."""
    text = (DOCS / page).read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def r_says(code: str) -> bool:
    """Whether there is an R in which an expression is true."""
    if shutil.which("Rscript") is None:
        return False
    asked = {**os.environ, "RETICULATE_PYTHON": sys.executable}
    words = ["Rscript", "-e", f"quit(status = !isTRUE({code}))"]
    return subprocess.run(words, capture_output=True, check=False, env=asked).returncode == 0


@pytest.fixture
def command(tmp_path: Path) -> Path:
    """The command, as this Python has it."""
    script = tmp_path / "bin" / "evercell"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m evercell "$@"\n', encoding="utf-8")
    script.chmod(0o755)
    return script


def environment(command: Path) -> dict[str, str]:
    """What R and bash are run in."""
    return {
        **os.environ,
        "PATH": f"{command.parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(Path(ec.__file__).parents[1]),
        "RETICULATE_PYTHON": sys.executable,
    }


COUNTS = """
counts <- as(readMM("counts.mtx"), "CsparseMatrix")
dimnames(counts) <- list(readLines("genes"), readLines("cells"))
"""


def run_r(parts: list[str], model: Annotator, query: ad.AnnData, folder: Path, command: Path) -> None:
    """Run R code on cells, beside a model of the name `model`."""
    save(model, folder / "model")
    mmwrite(folder / "counts.mtx", query.X.T)
    for name, names in (("genes", query.var_names), ("cells", query.obs_names)):
        (folder / name).write_text("\n".join(names) + "\n", encoding="utf-8")
    script = "\n".join(["library(Matrix)", COUNTS, *parts]).replace('model = "human-pancreas"', 'model = "model"')
    (folder / "run.R").write_text(script, encoding="utf-8")
    words, where = ["Rscript", "run.R"], environment(command)
    done = subprocess.run(words, cwd=folder, env=where, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(not r_says("requireNamespace('Matrix', quietly = TRUE)"), reason="needs R with the package Matrix")
def test_r_gets_labels_through_files(model: Annotator, query: ad.AnnData, tmp_path: Path, command: Path) -> None:
    made, used, *_ = blocks("r.md", "r")
    run_r([made, used, 'write.csv(labels, "labels.csv")'], model, query, tmp_path, command)
    found = pd.read_csv(tmp_path / "labels.csv", index_col=0, keep_default_na=False)
    assert found.index.tolist() == query.obs_names.tolist()
    assert found["evercell"].tolist() == ec.annotate(model, query).labels.tolist()


def test_r_gets_labels_through_reticulate(model: Annotator, query: ad.AnnData, tmp_path: Path, command: Path) -> None:
    if not r_says("requireNamespace('Matrix', quietly = TRUE) && reticulate::py_numpy_available(initialize = TRUE)"):
        pytest.skip("needs R with the packages Matrix and reticulate, of a version that knows this NumPy")
    _, _, made, used, _ = blocks("r.md", "r")
    ends = 'write.csv(found$labels, "labels.csv")\nwriteLines(unlist(found$colours), "colours")'
    run_r([made, used, ends], model, query, tmp_path, command)
    ec.tl.annotate(query, model)
    found = pd.read_csv(tmp_path / "labels.csv", index_col=0, keep_default_na=False)
    assert found["evercell"].tolist() == query.obs["evercell"].tolist()
    assert (tmp_path / "colours").read_text().split() == query.uns["evercell_colors"]


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_the_script_of_the_nextflow_module_runs(
    model: Annotator, query: ad.AnnData, tmp_path: Path, command: Path
) -> None:
    save(model, tmp_path / "model")
    query.write_h5ad(tmp_path / "query.h5ad")
    (process,) = blocks("nextflow.md", "groovy")
    script = process.split('"""')[1]
    filled = {"cells": "query.h5ad", "model": "model", "meta.id": "one", "args": "--reject off", "task.process": "A:B"}
    for name, value in filled.items():
        script = script.replace(f"${{{name}}}", value)
    script = re.sub(r"(?m)^    ", "", script.replace("\\$", "$"))
    assert "${" not in script
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=tmp_path,
        env=environment(command),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert json.loads((tmp_path / "one.json").read_text())["cells"] == query.n_obs
    written = ad.read_h5ad(tmp_path / "one.annotated.h5ad")
    assert written.obs["evercell"].tolist() == ec.annotate(model, query, reject="off").labels.tolist()
    assert f"evercell: {ec.__version__}" in (tmp_path / "versions.yml").read_text()


def test_a_table_is_the_same_to_the_byte(model: Annotator, query: ad.AnnData, tmp_path: Path, run) -> None:  # type: ignore[no-untyped-def]
    save(model, tmp_path / "model")
    query.write_h5ad(tmp_path / "query.h5ad")
    written = []
    for name in ("a.csv", "b.csv"):
        call = ["annotate", tmp_path / "query.h5ad", "--model", tmp_path / "model", "--output", tmp_path / name]
        code, _, err = run(*call, "--majority", "--quiet")
        assert code == 0 and err == ""
        written.append((tmp_path / name).read_bytes())
    assert written[0] == written[1]

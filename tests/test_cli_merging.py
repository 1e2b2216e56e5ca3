"""`evercell merge` from the command line."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from made_once import command_line

from evercell.sources import unmerged
from evercell.testing import synthetic_cells

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Two studies; ten cells of the second are cells of the first under other names."""
    first = synthetic_cells(60, n_genes=200, seed=1)
    second = ad.concat([synthetic_cells(30, n_genes=200, seed=2), first[:10]])[:, 40:].copy()
    second.obs_names = [f"cell{i}" for i in range(40)]
    first.X = sp.csr_matrix(first.X.multiply((np.arange(60) != 20)[:, None]))  # a cell without counts
    found = [tmp_path / "first.h5ad", tmp_path / "second.h5ad"]
    first.write_h5ad(found[0])
    second.write_h5ad(found[1])
    return found


def test_a_table_of_sources_and_what_was_found_twice(files: list[Path], run: Run, tmp_path: Path) -> None:
    code, out, err = run("merge", *files, "--output", tmp_path / "m.h5ad", "--batch", "donor")
    assert code == 0, err
    lines = [line.split() for line in out.splitlines()]
    assert lines[0] == ["source", "species", "cells", "empty", "twice", "written", "genes", "matched"]
    assert lines[1] == ["first", "human", "60", "1", "0", "59", "200", "200"]
    assert lines[2] == ["second", "human", "40", "0", "10", "30", "160", "160"]
    assert out.splitlines()[-1] == f"{tmp_path / 'm.h5ad'}: 89 cells, 200 genes, 160 of them measured by all sources"
    assert "10 pairs of cells of two files have the same counts: they are one cell, the first of each is kept" in err
    assert f"`{files[0]}` (first): counts from X" in err
    assert f"pairs of cells: {tmp_path / 'm.duplicates.csv'}" in err
    assert f"manifest: {tmp_path / 'm.manifest.json'}" in err
    assert len(pd.read_csv(tmp_path / "m.duplicates.csv")) == 10
    assert ad.read_h5ad(tmp_path / "m.h5ad").obs["batch"].notna().all()


def test_one_object_as_json(files: list[Path], run: Run, tmp_path: Path) -> None:
    words = ["merge", *files, "--output", tmp_path / "m.zarr", "--genes", "intersection", "--duplicates", "keep"]
    code, out, err = run(*words, "--json", "--quiet")
    assert (code, err) == (0, "")
    assert out.count("\n") == 1
    found = json.loads(out)
    assert (found["cells"], found["genes"], found["genes_measured_by_all"]) == (99, 160, 160)
    assert found["pairs"]["same counts"] == 10
    assert found["output"] == str(tmp_path / "m.zarr")
    assert found["duplicates"] == str(tmp_path / "m.duplicates.csv")
    assert [one["name"] for one in found["sources"]] == ["first", "second"]
    assert json.loads(Path(found["manifest"]).read_text())["sources"] == found["sources"]


def test_without_duplicates_this_is_said(files: list[Path], run: Run, tmp_path: Path) -> None:
    code, _, err = run("merge", files[0], "--output", tmp_path / "m.h5ad")
    assert code == 0
    assert "no cell is there twice" in err


def test_a_merged_file_is_trained_on_as_its_sources(files: list[Path], run: Run, tmp_path: Path) -> None:
    assert run("merge", *files, "--output", tmp_path / "m.h5ad")[0] == 0
    sizes = ("members=1", "member_width=8", "n_latents=2", "depth=1", "n_heads=2")
    small = ["--samples", "320", "--no-refit", *(w for size in sizes for w in ("--backbone-setting", size))]
    words = ["train", tmp_path / "m.h5ad", "--labels", "cell_type", "--output", tmp_path / "model", *small, "--json"]
    code, out, err = run(*words)
    assert code == 0, err
    assert [one["name"] for one in json.loads(out)["data"]] == ["m.h5ad/first", "m.h5ad/second"]


def test_help_explains_every_option_and_its_examples_can_be_parsed(run: Run) -> None:
    code, out, _ = run("merge", "--help")
    assert code == 0
    for parameter in command_line().commands["merge"].params:
        assert parameter.help, parameter.name
        assert all(option in out for option in parameter.opts if option.startswith("--"))
    shown = [line.strip() for line in out.splitlines() if line.startswith("    evercell ")]
    assert 2 <= len(shown) <= 3
    for line in shown:
        program, command, *words = shlex.split(line)
        assert (program, command) == ("evercell", "merge")
        command_line().commands["merge"].make_context("merge", list(words))


WRONG = [
    ("genes", ["{0}", "{1}", "--genes", "all"], "error: genes is `all`\nhint: pass --genes union or --genes inter"),
    ("duplicates", ["{0}", "{1}", "--duplicates", "no"], "hint: pass --duplicates drop, keep or error"),
    ("twice", ["{0}", "{1}", "{0}"], "first.h5ad` is given twice"),
    ("there twice", ["{0}", "{1}", "--duplicates", "error"], "error: 10 cells are there twice; the first is `cell30`"),
    ("missing", ["{0}", "{t}/no.h5ad"], "error: `{t}/no.h5ad` does not exist\nhint: check the path"),
    ("folder", ["{0}", "{t}"], "error: the folder `{t}` holds no 10x matrix"),
    ("layer", ["{0}", "{1}", "--layer", "umi"], "has no layer `umi`; it has `X`"),
    ("species", ["{0}", "{1}", "--species", "rat"], "hint: pass --species human, mouse or auto"),
    ("genes column", ["{0}", "{1}", "--gene-column", "id"], "the gene table has no column `id`"),
    ("batch", ["{0}", "{1}", "--batch", "run"], "error: no file has a column `run` in obs\nhint: name the column"),
    ("suffix", ["{0}", "{1}", "--output", "{t}/m.csv"], "error: `{t}/m.csv` does not end in .h5ad or .zarr"),
    ("output folder", ["{0}", "--output", "{t}/no/m.h5ad"], "error: the folder `{t}/no` of `{t}/no/m.h5ad`"),
    ("output there", ["{1}", "--output", "{0}"], "hint: choose another --output, or pass --overwrite to replace it"),
    ("output is input", ["{0}", "--output", "{0}", "--overwrite"], "first.h5ad` is one of the files to be merged"),
    ("damaged", ["{0}", "{t}/bad.h5ad"], "bad.h5ad` cannot be read as .h5ad: it is damaged, cut off or of another"),
]


@pytest.mark.parametrize(("words", "said"), [pytest.param(w, s, id=name) for name, w, s in WRONG])
def test_wrong_use_is_one_error_and_leaves_nothing(
    files: list[Path], run: Run, tmp_path: Path, words: list[str], said: str
) -> None:
    (tmp_path / "bad.h5ad").write_bytes(files[0].read_bytes()[:500])
    before = {one: one.read_bytes() for one in tmp_path.iterdir()}

    def filled(text: str) -> str:
        return text.replace("{0}", str(files[0])).replace("{1}", str(files[1])).replace("{t}", str(tmp_path))

    output = [] if "--output" in words else ["--output", "{t}/m.h5ad"]
    code, out, err = run("merge", *map(filled, [*words, *output]))
    assert (code, out) == (2, "")
    assert filled(said) in err
    assert err.count("error: ") == 1
    assert err.splitlines()[-1].startswith("hint: ")
    assert {one: one.read_bytes() for one in tmp_path.iterdir()} == before


def test_overwrite_replaces_the_file(files: list[Path], run: Run, tmp_path: Path) -> None:
    words = ["merge", *files, "--output", tmp_path / "m.h5ad"]
    assert run(*words)[0] == 0
    assert run(*words)[0] == 2
    assert run(*words, "--overwrite", "--duplicates", "keep")[0] == 0
    assert ad.read_h5ad(tmp_path / "m.h5ad").n_obs == 99


def test_a_training_report_of_merged_cells_knows_what_was_measured(run: Run, tmp_path: Path) -> None:
    from evercell.commands.training import joined_cells

    first, second = synthetic_cells(40, seed=1), synthetic_cells(40, seed=2)[:, :170].copy()
    for name, cells in {"a": first, "b": second}.items():
        cells.write_h5ad(tmp_path / f"{name}.h5ad")
    assert run("merge", tmp_path / "a.h5ad", tmp_path / "b.h5ad", "--output", tmp_path / "both.h5ad")[0] == 0
    joined = joined_cells([ad.read_h5ad(tmp_path / "both.h5ad")], ["both"], layer=None)
    assert [part.n_vars for _, part in unmerged(joined)] == [first.n_vars, 170]

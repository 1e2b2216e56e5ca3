"""`evercell discover`, `update --accept` and `select`, end to end."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path

import anndata as ad
import pandas as pd
import pytest

from evercell.cli import main
from evercell.testing import synthetic_cells

SIZES = ("members=1", "member_width=8", "n_latents=2", "depth=1", "n_heads=2")
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of four types, cells of six, and what `discover` made of them."""
    folder = tmp_path_factory.mktemp("discovering")
    synthetic_cells(400, seed=1).write_h5ad(folder / "first.h5ad")
    synthetic_cells(360, n_types=6, seed=2).write_h5ad(folder / "query.h5ad")
    words = ["train", folder / "first.h5ad", "--labels", "cell_type", "--output", folder / "model", "--samples", "1600"]
    sizes = [word for size in SIZES for word in ("--backbone-setting", size)]
    assert main([*map(str, words), *sizes, "--quiet"]) == 0
    assert main([*discover(folder, folder, "--quiet")]) == 0
    return folder


def discover(folder: Path, output: Path, *more: str) -> list[str]:
    """Words of the command."""
    return [
        "discover", str(folder / "query.h5ad"), "--model", str(folder / "model"), "--output",
        str(output / "discovered.h5ad"), "--table", str(output / "clusters.csv"), "--reject", "0.1", *more,
    ]  # fmt: skip


def edited(folder: Path, path: Path, **names: str) -> Path:
    """The table with clusters of a true type named; each word is `true type = name`."""
    table = pd.read_csv(folder / "clusters.csv", keep_default_na=False, dtype=str)
    obs = ad.read_h5ad(folder / "discovered.h5ad").obs
    truth = pd.crosstab(obs["evercell_cluster"], obs["cell_type"]).idxmax(axis=1)
    for row, cluster in enumerate(table["cluster"]):
        if truth[cluster] in names:
            table.loc[row, ["name", "accept"]] = names[truth[cluster]], "yes"
    assert set(names) <= set(truth)
    table.to_csv(path, index=False)
    return path


def test_discover_writes_an_editable_table_and_says_what_is_next(folder: Path, run: Run, tmp_path: Path) -> None:
    code, out, err = run(*discover(folder, tmp_path))
    assert code == 0, err
    table = pd.read_csv(tmp_path / "clusters.csv", keep_default_na=False)
    assert table.columns.tolist() == [
        "cluster", "cells", "name", "accept", "nearest_type", "nearest_share", "ontology_parent", "ontology_parent_id",
        "unknown_score", "markers", "note",
    ]  # fmt: skip
    assert (table[["name", "accept"]] == "").all(axis=None)
    for row in table.itertuples():
        assert f"{row.cluster}: {row.cells} cells" in out
        assert row.markers in out
    written = ad.read_h5ad(tmp_path / "discovered.h5ad")
    assert written.obs["evercell_cluster"].value_counts().to_dict() == dict(
        zip(table["cluster"], table["cells"], strict=True)
    )
    assert "cells are called Unknown" in err
    _, command, model, file, *words = shlex.split(out.splitlines()[-1])
    assert (command, model, file) == ("update", str(folder / "model"), str(tmp_path / "discovered.h5ad"))
    assert words == ["--accept", str(tmp_path / "clusters.csv"), "--output", "MODEL2"]


def test_discover_json_and_labels_of_an_earlier_run(folder: Path, run: Run, tmp_path: Path) -> None:
    words = discover(folder, tmp_path, "--json", "--resolution", "0.5", "--least-cells", "12")
    words[1] = str(folder / "discovered.h5ad")
    code, out, err = run(*words)
    assert code == 0, err
    found = json.loads(out)
    assert found["clusters"][0]["cluster"] == "unknown 1"
    assert sum(one["cells"] for one in found["clusters"]) <= found["unknown"]
    assert min(one["cells"] for one in found["clusters"]) >= 12
    assert "the labels that this model gave the file are taken as they are" in err


def test_a_table_that_was_edited_is_not_overwritten(folder: Path, run: Run, tmp_path: Path) -> None:
    (tmp_path / "clusters.csv").write_text("my names")
    code, out, err = run(*discover(folder, tmp_path))
    assert (code, out) == (2, "")
    assert "clusters.csv` is already there: names that were written into it would be lost" in err
    assert (tmp_path / "clusters.csv").read_text() == "my names"
    assert run(*discover(folder, tmp_path, "--overwrite"))[0] == 0


def test_known_cells_only_are_an_empty_table(folder: Path, run: Run, tmp_path: Path) -> None:
    obs = ad.read_h5ad(folder / "discovered.h5ad")
    obs[obs.obs["evercell"] != "Unknown"].copy().write_h5ad(tmp_path / "known.h5ad")
    words = discover(folder, tmp_path)
    words[1] = str(tmp_path / "known.h5ad")
    code, out, err = run(*words)
    assert (code, out) == (0, "no cluster of unknown cells was found\n")
    assert "no cell is called Unknown: a higher --reject calls more so" in err
    assert len(pd.read_csv(tmp_path / "clusters.csv")) == 0


def test_accepted_clusters_become_types(folder: Path, run: Run, tmp_path: Path) -> None:
    table = edited(folder, tmp_path / "clusters.csv", acinar="acinar", ductal="my duct cells")
    code, out, err = run(
        "update", folder / "model", folder / "discovered.h5ad", "--accept", table, "--output", tmp_path / "model2",
        "--strategy", "analytic", "--donor", "donor", "--json",
    )  # fmt: skip
    assert code == 0, err
    found = json.loads(out)
    assert found["types_added"] == ["acinar", "my duct cells"]
    assert "`acinar`: " in err
    third = synthetic_cells(240, n_types=6, seed=5)
    third.write_h5ad(tmp_path / "third.h5ad")
    words = ["annotate", tmp_path / "third.h5ad", "--model", tmp_path / "model2", "--output", tmp_path / "labels.csv"]
    assert run(*words, "--reject", "off")[0] == 0
    labels = pd.read_csv(tmp_path / "labels.csv", index_col="cell")["evercell"]
    truth = third.obs["cell_type"].astype(str).replace({"ductal": "my duct cells"})
    new = truth.isin(["acinar", "my duct cells"])
    assert (labels[new] == truth[new]).mean() > 0.8
    assert (labels[~new] == truth[~new]).mean() > 0.7


def test_a_name_that_reads_like_an_old_type_is_warned_about_and_kept(folder: Path, run: Run, tmp_path: Path) -> None:
    table = edited(folder, tmp_path / "clusters.csv", acinar="Beta cells")
    code, out, err = run(
        "update", folder / "model", folder / "discovered.h5ad", "--accept", table, "--output", tmp_path / "model2",
        "--strategy", "analytic", "--force", "--json",
    )  # fmt: skip
    assert code == 0, err
    assert json.loads(out)["types_added"] == ["Beta cells"]
    assert "warning: `Beta cells` becomes a type beside `beta`, which it reads like" in err


def test_what_accept_cannot_be_given_with(folder: Path, run: Run, tmp_path: Path) -> None:
    words = ["update", folder / "model", folder / "discovered.h5ad", "--output", tmp_path / "no"]
    table = folder / "clusters.csv"
    assert "error: neither of --labels and --accept given" in run(*words)[2]
    assert "error: both of --labels and --accept given" in run(*words, "--labels", "cell_type", "--accept", table)[2]
    assert "error: --mapping is for --labels" in run(*words, "--accept", table, "--mapping", table)[2]
    assert "error: --accept takes one FILE" in run(*words, folder / "query.h5ad", "--accept", table)[2]
    code, _, err = run(*words, "--accept", table)
    assert code == 2
    assert f"`{table}` accepts none of the" in err
    words[2] = folder / "query.h5ad"
    assert "`query.h5ad` has no column `evercell_cluster` in obs" in run(*words, "--accept", table)[2]
    assert not (tmp_path / "no").exists()


def test_select_names_cells_with_a_reason(folder: Path, run: Run, tmp_path: Path) -> None:
    words = ["select", folder / "query.h5ad", "--model", folder / "model", "--output", tmp_path / "select.csv"]
    code, out, err = run(*words, "--number", "25")
    assert code == 0, err
    table = pd.read_csv(tmp_path / "select.csv")
    assert table.columns.tolist() == ["cell", "label", "runner_up", "confidence", "unknown_score", "reason"]
    assert (len(table), table["cell"].is_unique) == (25, True)
    assert out.splitlines()[0].split() == ["cell", "label", "confidence", "reason"]
    assert out.splitlines()[-1] == f"and 5 more in {tmp_path / 'select.csv'}"
    truth = synthetic_cells(360, n_types=6, seed=2).obs["cell_type"][table["cell"]]
    assert truth.isin(["acinar", "ductal"]).mean() > 0.4  # a third of the file
    for row in table.itertuples():
        assert row.reason in (
            "unlike every known type", f"between {row.label} and {row.runner_up}", f"unlike most {row.label} cells"
        )  # fmt: skip
    code, out, _ = run(*words, "--number", "5", "--json")
    assert [one["cell"] for one in json.loads(out)["cells"]] == list(pd.read_csv(tmp_path / "select.csv")["cell"])
    for number, message in (("0", "--number is 0"), ("1000", "1,000 cells were asked for; ")):
        code, _, err = run(*words, "--number", number)
        assert code == 2
        assert message in err

"""`evercell annotate --majority` and what reads its columns, end to end."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import anndata as ad
import pandas as pd
import pytest

from evercell.annotator import Annotator
from evercell.checkpoint import save
from evercell.testing import synthetic_cells

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def no_map(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports without their map, which has tests of its own and is slow to compile."""
    monkeypatch.setattr("evercell.reporting.report._map_points", lambda *_, **__: (None, "There is no map in tests."))


@pytest.fixture
def words(model: Annotator, tmp_path: Path) -> list[str]:
    """Annotation of a query with two clusters of its own and a type that the model does not know."""
    save(model, tmp_path / "model")
    query = synthetic_cells(160, n_types=5, seed=4)
    query.obs["leiden"] = query.obs["cell_type"].astype(str).eq("beta").map({True: "1", False: "0"})
    query.write_h5ad(tmp_path / "query.h5ad")
    return ["annotate", str(tmp_path / "query.h5ad"), "--model", str(tmp_path / "model"), "--output"]


def test_majority_is_annotated_scored_and_reported(words: list[str], run: Run, tmp_path: Path) -> None:
    code, out, err = run(
        *words, tmp_path / "a.h5ad", "--majority", "--compat", "celltypist", "--reject", "0.05",
        "--report", tmp_path / "r.html", "--truth", "cell_type", "--json",
    )  # fmt: skip
    assert code == 0, err
    assert "which depends on the other cells of the file" in err
    obs = ad.read_h5ad(tmp_path / "a.h5ad").obs
    changed = (obs["evercell_majority"].astype(str) != obs["evercell"].astype(str)).sum()
    assert json.loads(out)["majority"]["changed"] == changed > 0
    assert len(obs[["over_clustering", "majority_voting"]].drop_duplicates()) == obs["over_clustering"].nunique() > 8
    assert "Unknown" in set(obs["evercell"])
    assert "Unknown" not in set(obs["predicted_labels"]) | set(obs["majority_voting"])

    code, out, err = run(
        "evaluate", tmp_path / "a.h5ad", "--labels", "cell_type", "--key", "evercell_majority", "--json"
    )
    found = json.loads(out)
    assert code == 0, err
    truth, voted = obs["cell_type"].astype(str), obs["evercell_majority"].astype(str)
    known = truth != "acinar"
    assert found["known_accuracy"] == pytest.approx((truth == voted)[known].mean())
    assert found["unknown_accuracy"] == pytest.approx(
        (voted[~known] == "Unknown").mean()
    )  # the model's types are found
    assert found["ece"] is None

    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert '<th scope="col" class="number">by majority vote</th>' in page
    assert "(column evercell_majority)" in page
    assert page.count("By majority vote ") == 1  # in the agreement
    for name, number in voted.value_counts().items():
        rows = re.split(rf">{re.escape(str(name))}(?:<small class=.term.>[^<]*</small>)?</span></th>", page)
        row = rows[1].split("</tr>")[0]
        assert f'<td class="number">{number}</td>' in row


def test_without_the_vote_nothing_speaks_of_it(words: list[str], run: Run, tmp_path: Path) -> None:
    code, out, err = run(
        *words, tmp_path / "a.h5ad", "--compat", "celltypist", "--report", tmp_path / "r.html", "--truth", "cell_type"
    )
    assert code == 0, err
    assert "majority" not in out + err
    obs = ad.read_h5ad(tmp_path / "a.h5ad").obs
    assert {"predicted_labels", "conf_score"} <= set(obs)
    assert not {"over_clustering", "majority_voting", "evercell_majority"} & set(obs)
    assert "majority vote" not in (tmp_path / "r.html").read_text(encoding="utf-8")


def test_clusters_of_the_file_in_a_table(words: list[str], run: Run, tmp_path: Path) -> None:
    """--clusters alone asks for the vote; cells are read from disk, not into memory."""
    code, _, err = run(*words, tmp_path / "a.csv", "--clusters", "leiden", "--key-added", "mine")
    assert code == 0, err
    assert "majority vote over 2 clusters" in err
    table = pd.read_csv(tmp_path / "a.csv", index_col="cell")
    beta = (ad.read_h5ad(tmp_path / "query.h5ad").obs["leiden"] == "1").to_numpy()
    assert set(table["mine_majority"][beta]) == {"beta"}
    # in the other cluster no type has half of the cells, so every cell keeps its label
    assert table["mine"][~beta].value_counts().iloc[0] < 0.5 * (~beta).sum()
    assert table["mine_majority"][~beta].tolist() == table["mine"][~beta].tolist()


def test_a_column_that_is_not_there(words: list[str], run: Run, tmp_path: Path) -> None:
    code, out, err = run(*words, tmp_path / "a.h5ad", "--clusters", "louvain")
    assert (code, out) == (2, "")
    assert "has no column `louvain` in obs; columns: `cell_type`, `donor`, `leiden`" in err
    assert "--clusters" in err.splitlines()[-1]
    assert not (tmp_path / "a.h5ad").exists()

"""The report: its words, its figures, and that nothing of the data or of the network gets where it must not."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy.sparse import csr_matrix

from evercell.colours import UNKNOWN_COLOUR
from evercell.doctor import Finding
from evercell.errors import CellsError, LabelsError
from evercell.reporting import figures, findings, report, write_report
from evercell.reporting.markers import rank_markers

HOSTILE = "</script><script>alert(1)</script>"
TYPES = ("alpha", "beta", HOSTILE)


def annotated_cells(n: int = 150, *, seed: int = 0) -> ad.AnnData:
    """Three types in two samples, each with five genes of its own, annotated with a few mistakes and unknown cells."""
    generator = np.random.default_rng(seed)
    true = np.arange(n) % len(TYPES)
    rate = np.full((n, 40), 0.8)
    for code in range(len(TYPES)):
        rate[true == code, 5 * code : 5 * code + 5] = 12
    genes = [*(f"{name}{i}" for name in ("AAA", "BBB", "CCC") for i in range(5)), *(f"GENE{i}" for i in range(25))]
    given = np.array(TYPES, dtype=object)[true]
    label = given.copy()
    label[:4] = "beta"
    label[4:10] = "Unknown"
    obs = pd.DataFrame(index=[f"cell{i}" for i in range(n)])
    obs["given"] = given
    obs["sample"] = np.where(np.arange(n) < n // 3, "left <b>", "right")
    obs["evercell"] = pd.Categorical(label)
    obs["evercell_confidence"] = np.where(label == given, 0.9, 0.4)
    obs["evercell_unknown_score"] = np.where(label == "Unknown", 2.0, -2.0)
    obs["evercell_ontology_term_id"] = "CL:0000169"
    adata = ad.AnnData(csr_matrix(generator.poisson(rate).astype(np.float32)), obs, pd.DataFrame(index=genes))
    adata.obsm["X_evercell"] = (np.eye(3)[true] * 4 + generator.normal(0, 0.3, (n, 3))).astype(np.float32)
    adata.uns["evercell"] = {
        "model": "islets<i>",
        "version": "0.1.0",
        "seed": 3,
        "threshold": 0.5,
        "classes": np.array(["beta", "alpha", HOSTILE], dtype=object),
        "notes": ["Counts were found in X."],
        "coverage": {"n_query": 40, "n_model": 100, "n_matched": 40, "share_of_model": 0.4},
    }
    return adata


class Page(HTMLParser):
    """Elements, scripts and visible text of a page, read as a browser reads them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text = ""
        self._inside = ""
        self.feed(html)
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag if tag in ("script", "style") else ""
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        if tag in ("script", "style"):
            self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts[-1] += data
        elif not self._inside:
            self.text += f"{data} "

    @property
    def plots(self) -> dict[str, Any]:
        def refuse(constant: str) -> None:
            raise AssertionError(f"{constant} is no JSON")  # JSON.parse of a browser would stop here

        return json.loads(self.scripts[0], parse_constant=refuse)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    path = tmp_path_factory.mktemp("report") / "report.html"
    adata = annotated_cells()
    before = adata.copy()
    training = {
        "model": {"accuracy": 0.95, "macro_f1": 0.91},
        "linear": {"accuracy": 0.93, "macro_f1": 0.88},
        "split": "by donor: two for training, one held out",
        "curve": [{"step": i, "loss": 1.0 / (i + 1), "validation": None if i % 2 else 1.2 / (i + 1)} for i in range(9)],
        "per_type": [{"type": "alpha", "cells": 1200, "f1": 0.9123}],
    }
    assert write_report(adata, path, truth="given", training=training, warnings=["Mind <the> gap."]) == path
    # The caller's cells are as they were: no neighbours, no coordinates, no log values.
    assert list(adata.obsm) == list(before.obsm) and list(adata.obsp) == [] and list(adata.uns) == list(before.uns)
    assert (adata.X != before.X).nnz == 0
    return Page(path.read_text(encoding="utf-8"))


def test_the_page_asks_no_other_machine(page: Page) -> None:
    loading = {"src", "href", "srcset", "data", "action", "poster"}
    addresses = [value for _, attrs in page.tags for name, value in attrs.items() if name in loading]
    assert addresses and all(value and value.startswith("#") for value in addresses)
    assert not {tag for tag, _ in page.tags} & {"link", "img", "iframe", "object", "embed", "base"}
    policy = next(attrs["content"] for tag, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None and "default-src 'none'" in policy and "http" not in policy
    assert [len(script) > 1e6 for script in page.scripts] == [False, True, False]  # plotly.js once, and our two


def test_labels_cannot_run(page: Page) -> None:
    # The label would end our script and start its own if it were let through once.
    assert len(page.scripts) == 3
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
    assert HOSTILE in page.text  # shown as text
    shown = json.dumps(page.plots)
    assert "<script" not in shown and "left <b>" not in shown and "&lt;script&gt;alert(1)" in shown
    assert "islets<i>" in page.text and "Mind <the> gap." in page.text


def test_the_summary_says_what_was_found(page: Page) -> None:
    assert "150 cells were annotated with the model islets<i>; 3 cell types were found." in page.text
    assert "6 cells (4.0%) resembled no type of the model" in page.text
    assert "The mean confidence is 0.87; 94.0% of the cells reach 0.80." in page.text  # 9 of 150 cells at 0.4
    assert "40 of the model's 100 genes were measured (40.0%)." in page.text
    assert "Gene coverage: " in page.text
    assert "2 points below need attention." in page.text
    for sentence in ("Counts were found in X.", "by donor: two for training", "0.9123", "1,200", "CL:0000169"):
        assert sentence in page.text
    assert "Cells with an unknown score above 0.5 were labelled Unknown (6)." in page.text


def test_every_plot_has_its_place_and_is_valid_plotly(page: Page) -> None:
    from plotly import graph_objects as go

    places = {attrs["data-plot"] for _, attrs in page.tags if "data-plot" in attrs}
    assert (
        places == set(page.plots) >= {"map", "composition-0", "confidence", "unknown", "confusion", "markers", "curve"}
    )
    tokens = {"@sequential": "Blues", "@scores": "Viridis"}
    for name, plot in page.plots.items():
        if name != "map":
            text = re.sub(r'"(@\w+)"', lambda found: json.dumps(tokens.get(found[1], "#123456")), json.dumps(plot))
            figure = json.loads(text)
            figure["layout"].pop("minWidth", None)  # ours: the page scrolls below it
            go.Figure(figure)


def test_agreement_is_counted(page: Page) -> None:
    wrong = 9  # of the first ten cells four are called beta and six Unknown; one of the four is beta
    assert f"{100 * (150 - wrong) / 150:.1f}% of the cells agree" in page.text
    heat = page.plots["confusion"]["data"][0]
    shown = sum(int(text.replace(",", "") or 0) for row in heat["text"] for text in row)
    assert shown == 150
    assert [round(sum(row)) for row in heat["z"]] == [100, 100, 100]
    assert page.plots["confusion"]["layout"]["xaxis"]["ticktext"][-1] == "Unknown"


def test_the_map_shows_every_cell_once_in_one_colour_a_type(page: Page) -> None:
    types = page.plots["map"]["types"]
    assert sum(len(entry["x"]) for entry in types) == 150
    assert types[0]["name"] == "Unknown" and types[0]["colour"] == UNKNOWN_COLOUR  # drawn first, below all
    for entry in types:
        assert len(entry["x"]) == len(entry["y"]) == len(entry["confidence"]) == len(entry["truth"])
        assert all(value == round(value, 2) for value in entry["x"])
    bars = {bar["name"]: bar["marker"]["color"] for bar in page.plots["composition-0"]["data"]}
    assert bars == {entry["name"]: entry["colour"] for entry in types}
    rows = np.sum([bar["x"] for bar in page.plots["composition-0"]["data"]], axis=0)
    np.testing.assert_allclose(rows, 100, atol=0.05)
    legend = [attrs["data-place"] for _, attrs in page.tags if "data-place" in attrs]
    assert sorted(legend) == sorted(str(entry["place"]) for entry in types)
    assert [mode["id"] for mode in page.plots["map"]["modes"]] == ["label", "confidence", "unknown", "truth"]


def test_markers_of_a_type_are_its_own_genes(page: Page) -> None:
    genes = page.plots["markers"]["layout"]["xaxis"]["ticktext"]
    rows = page.plots["markers"]["layout"]["yaxis"]["ticktext"]
    assert {gene[:3] for gene in genes[:9]} == {"AAA", "BBB", "CCC"}
    assert len(rows) == 3  # six unknown cells are too few for a row


def test_markers_agree_with_scanpy() -> None:
    import scanpy as sc

    adata = annotated_cells()
    labels = adata.obs["evercell"].astype(str).to_numpy()
    found = rank_markers(adata.X, labels, list(adata.var_names), order=["alpha", "beta"], each=3)
    logs = adata.copy()
    sc.pp.normalize_total(logs, target_sum=1e4)
    sc.pp.log1p(logs)
    sc.tl.rank_genes_groups(logs, "evercell", groups=["alpha", "beta"], method="t-test")
    for name in ("alpha", "beta"):
        table = sc.get.rank_genes_groups_df(logs, name).set_index("names")["scores"]
        np.testing.assert_allclose(found.scores.loc[name, table.index], table, rtol=1e-3)
        assert found.top[name] == list(table.index[:3])
    np.testing.assert_allclose(found.shares.loc["beta"], (adata.X[labels == "beta"] > 0).toarray().mean(axis=0))


def test_housekeeping_genes_are_no_markers() -> None:
    rates = np.array([[90, 90, 50, 1]] * 12 + [[10, 10, 1, 90]] * 12)
    counts = csr_matrix(np.random.default_rng(0).poisson(rates).astype(np.float32))
    labels = np.array(["a"] * 12 + ["b"] * 12)
    found = rank_markers(counts, labels, ["MT-CO1", "Rps4", "INS", "SST"], order=["a", "b"])
    assert found.top == {"a": ["INS"], "b": ["SST"]}


def test_markers_that_the_caller_names(tmp_path: Path) -> None:
    named = {"alpha": ["GENE3", "not measured"], "beta": ["AAA1"]}
    adata = annotated_cells(60)
    del adata.obsm["X_evercell"]
    shown = Page(write_report(adata, tmp_path / "a.html", markers=named).read_text())
    assert shown.plots["markers"]["layout"]["xaxis"]["ticktext"] == ["AAA1", "GENE3"]  # beta has more cells
    assert "map" not in shown.plots and "There is no map" in shown.text
    assert "markers" not in Page(write_report(adata, tmp_path / "b.html", markers={}).read_text()).plots


def test_the_same_cells_give_the_same_page(tmp_path: Path) -> None:
    adata = annotated_cells()
    first, second = (write_report(adata, tmp_path / name).read_bytes() for name in ("a.html", "b.html"))
    assert first == second


def test_a_bare_annotation_is_enough(tmp_path: Path) -> None:
    obs = pd.DataFrame({"mine": ["t", None, "t"]}, index=list("abc"))
    adata = ad.AnnData(np.full((3, 2), -0.5, dtype=np.float32), obs, pd.DataFrame(index=["A", "B"]))
    shown = Page(write_report(adata, tmp_path / "bare.html", key="mine", title="Bare <b>").read_text())
    assert "Bare <b>" in shown.text and "1 cell (33.3%) resembled no type" in shown.text
    assert "Marker genes are not shown" in shown.text  # negative values are no counts
    assert set(shown.plots) == {"composition-0"}


def test_missing_columns_are_named(tmp_path: Path) -> None:
    adata = annotated_cells(30)
    with pytest.raises(LabelsError, match="`obs` has no column `absent`") as caught:
        write_report(adata, tmp_path / "x.html", truth="absent")
    assert "truth=" in str(caught.value)
    with pytest.raises(LabelsError, match="key="):
        write_report(adata, tmp_path / "x.html", key="other")
    with pytest.raises(CellsError, match="no cells"):
        write_report(adata[:0].copy(), tmp_path / "x.html")
    assert list(tmp_path.iterdir()) == []


def test_a_failure_leaves_the_old_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")

    def full(*_: object, **__: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_text", full)
    adata = annotated_cells(30)
    del adata.obsm["X_evercell"]
    with pytest.raises(OSError, match="disk full"):
        write_report(adata, path)
    assert [one.name for one in tmp_path.iterdir()] == ["report.html"] and path.read_text() == "old"


def test_a_large_data_set_is_sampled_by_type() -> None:
    labels = np.array(["common"] * 9_000 + ["rare"] * 30 + ["some"] * 970)
    places = report.stratified_sample(labels, 1_000, seed=1)
    drawn = pd.Series(labels[places]).value_counts()
    assert drawn["rare"] == 30 and drawn["common"] == 900 and 90 <= drawn["some"] <= 100
    assert (np.diff(places) > 0).all()
    assert (places == report.stratified_sample(labels, 1_000, seed=1)).all()
    assert len(report.stratified_sample(labels, 10_000, seed=1)) == 10_000


def test_sampling_is_said_in_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "MOST_CELLS_DRAWN", 100)
    adata = annotated_cells(400)
    shown = Page(write_report(adata, tmp_path / "large.html").read_text())
    drawn = sum(len(entry["x"]) for entry in shown.plots["map"]["types"])
    assert drawn < 200 and f"Shown are {drawn} of 400 cells, sampled by type." in shown.text


def test_plot_text_is_literal() -> None:
    assert figures.plot_text("<b>T</b> & B") == "&lt;b&gt;T&lt;/b&gt; &amp; B"
    assert figures.plot_text("CD4-positive, alpha-beta T cell", longest=12) == "CD4-positiv…"


def overview(cells: dict[str, int], **more: Any) -> findings.Overview:
    types = pd.DataFrame({"cells": pd.Series(cells)})
    types["share"] = types["cells"] / types["cells"].sum()
    if confidence := more.pop("by_type", None):
        types["confidence"] = pd.Series(confidence)
    return findings.Overview(types=types, **more)


def test_what_the_doctor_finds_needs_attention() -> None:
    checked = [Finding("info", "depth", "fine"), Finding("warning", "entropy", "high.", "low", "doubt", "do that")]
    (found,) = findings.attention(overview({"a": 60, "b": 40}), checked=checked)
    assert (found.finding, found.mend) == ("Entropy: high (expected: low).", "Doubt. Do that.")
    assert findings.attention(overview({"a": 60, "b": 40})) == []


@pytest.mark.parametrize(
    ("share", "text"), [(0, "0.0%"), (0.00004, "<0.1%"), (0.3124, "31.2%"), (0.9999, ">99.9%"), (1, "100.0%")]
)
def test_percent(share: float, text: str) -> None:
    assert findings.percent(share) == text


@pytest.mark.shared
def test_real_cells(tmp_path: Path) -> None:
    path = Path(__file__).parents[2] / "shared/data/labelled/human/muraro_pancreas.h5ad"
    if not path.exists():
        pytest.skip("the real data sets are not beside the repository")
    adata = ad.read_h5ad(path)
    adata.obs["evercell"] = adata.obs["cell_type"]
    shown = Page(write_report(adata, tmp_path / "real.html").read_text())
    genes = set(shown.plots["markers"]["layout"]["xaxis"]["ticktext"])
    assert {"GCG", "SST", "PPY"} <= genes  # the hormones of alpha, delta and gamma cells

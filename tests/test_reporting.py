"""The report: its words, its figures, and that nothing of the data or of the network gets where it must not."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import zlib
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
from evercell.label_sets import SEPARATOR
from evercell.ontology import term
from evercell.reporting import cell_map, figures, findings, report, write_report
from evercell.reporting.known_markers import _table, known_markers
from evercell.reporting.markers import rank_markers
from evercell.reporting.page import code as as_code
from evercell.reporting.stages import history

HOSTILE = "</script><script>alert(1)</script>"
HOSTILE_GENE = "<img src=x onerror=alert(2)>"
STAGES = [
    {
        "stage": 1,
        "verb": "train",
        "data": [{"name": "first <b>", "cells": 1200, "genes": 40}],
        "types_added": ["alpha", "beta"],
        "sealed": {"stages": {"1": 0.96}, "types": {"alpha": {"cells": 20, "recall": 0.95}}},
    },
    {
        "stage": 2,
        "verb": "update",
        "strategy": "canal",
        "data": [{"name": "second", "cells": 300, "genes": 40}],
        "types_added": [HOSTILE],
        "held_out": {"cells": 90, "groups": ["first/donor2"]},
        "metrics": {
            "model": {"accuracy": 0.95, "macro_f1": 0.9123, "per_type": {"alpha": {"cells": 40, "f1": 0.8765}}},
            "linear": {"accuracy": 0.93, "macro_f1": 0.88},
        },
        "history": [{"step": 10 * i, "loss": 1 / (i + 1), "held_out_loss": 1.2 / (i + 1)} for i in range(1, 9)],
        "tries": [{"fallen": []}],
        "sealed": {"stages": {"1": 0.91, "2": 0.88}, "types": {"alpha": {"cells": 25, "recall": 0.92}}},
    },
]
TYPES = ("alpha", "beta", HOSTILE)


def annotated_cells(n: int = 150, *, seed: int = 0) -> ad.AnnData:
    """Three types in two samples, each with five genes of its own, annotated with a few mistakes and unknown cells."""
    generator = np.random.default_rng(seed)
    true = np.arange(n) % len(TYPES)
    rate = np.full((n, 40), 0.8)
    for code in range(len(TYPES)):
        rate[true == code, 5 * code : 5 * code + 5] = 12
    rate[true == 1, -1] = 30  # the hostile gene marks beta
    genes = [
        *(f"{name}{i}" for name in ("AAA", "BBB", "CCC") for i in range(5)),
        *(f"GENE{i}" for i in range(24)),
        HOSTILE_GENE,
    ]
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
    def map(self) -> dict[str, Any]:
        """What the page draws, unpacked as its script does."""

        def refuse(constant: str) -> None:
            raise AssertionError(f"{constant} is no JSON")  # JSON.parse of a browser would stop here

        (text,) = (script for script in self.scripts if script.startswith("{"))
        return json.loads(text, parse_constant=refuse)

    def all(self, tag: str, *classes: str) -> list[dict[str, str | None]]:
        """Attributes of the elements of a kind that have all of some classes."""
        return [
            attrs
            for name, attrs in self.tags
            if name == tag and set(classes) <= set((attrs.get("class") or "").split())
        ]


def unpacked(text: str, dtype: Any = np.uint8) -> np.ndarray:
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), dtype=dtype)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    path = tmp_path_factory.mktemp("report") / "report.html"
    adata = annotated_cells()
    before = adata.copy()
    assert write_report(adata, path, truth="given", stages=STAGES, warnings=["Mind <the> gap."]) == path
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
    assert "https://" not in "".join(page.scripts) and "http://" not in "".join(page.scripts)


def test_only_our_scripts_may_run(page: Page) -> None:
    # The label would end our script and start its own if it were let through once.
    assert len(page.scripts) == 4
    policy = next(attrs["content"] for tag, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy")
    allowed = set(re.findall(r"sha256-[^']+", policy or ""))
    ours = {
        "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        for script in page.scripts
        if not script.startswith("{")
    }
    assert allowed == ours and len(ours) == 3
    assert "unsafe" not in (policy or "").split("style-src")[0]
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)


def test_text_of_the_data_is_text(page: Page) -> None:
    assert HOSTILE in page.text and HOSTILE_GENE in page.text  # shown as text
    assert "islets<i>" in page.text and "Mind <the> gap." in page.text and "first <b>" in page.text
    assert "left <b>" in page.text
    shown = page.map
    assert HOSTILE in shown["columns"][0]["levels"]  # the script puts them in as text nodes
    assert HOSTILE_GENE in {gene["name"] for gene in shown["genes"]}


def test_words_in_backticks_are_code_and_escaped() -> None:
    assert as_code("see `<b>` and `x`") == "see <code>&lt;b&gt;</code> and <code>x</code>"
    assert as_code("one ` alone <i>") == "one ` alone &lt;i&gt;"


def test_a_curve_of_one_point_is_no_curve() -> None:
    assert figures.learning_curve([{"step": 1, "loss": 2.0, "validation": 1.0}]) is None
    found = figures.learning_curve([{"step": 1, "loss": 2.0, "validation": 1.0}, {"step": 2, "validation": 0.5}])
    assert found is not None and [line["style"] for line in found.lines] == ["validation"]


def test_the_summary_says_what_was_found(page: Page) -> None:
    assert "150 cells were annotated with the model islets<i>; 3 cell types were found." in page.text
    assert "6 cells (4.0%) resembled no type of the model" in page.text
    assert "The mean confidence is 0.87; 94.0% of the cells reach 0.80." in page.text  # 9 of 150 cells at 0.4
    assert "40 of the model's 100 genes were measured (40.0%)." in page.text
    assert "Gene coverage: " in page.text
    assert "3 points below need attention." in page.text
    assert "Genes that the literature knows them by" not in page.text  # made-up genes: none was measured
    assert "No known marker was measured: " in page.text
    for sentence in ("Counts were found in X.", "all of first/donor2", "0.912", "1,200 cells", "CL:0000169"):
        assert sentence in page.text
    assert "Cells with an unknown score above 0.5 were labelled Unknown (6)." in page.text


def test_every_part_has_its_place(page: Page) -> None:
    parts = [attrs.get("id") for tag, attrs in page.tags if tag == "section"]
    named = {attrs["href"] for tag, attrs in page.tags if tag == "a"}
    expected = ["types", "map", "composition", "confidence", "markers", "old", "agreement", "model", "settings"]
    assert parts == ["summary", "attention", *expected]
    assert named >= {f"#{part}" for part in expected}
    for tag in ("svg", "canvas"):  # whoever cannot see a figure is told what it shows
        told = [attrs for name, attrs in page.tags if name == tag and "flow" not in str(attrs)]
        assert told and all(attrs.get("aria-label") or attrs.get("preserveaspectratio") for attrs in told)


def test_agreement_is_counted(page: Page) -> None:
    wrong = 9  # of the first ten cells four are called beta and six Unknown; one of the four is beta
    assert f"{100 * (150 - wrong) / 150:.1f}% of the cells agree" in page.text
    table = pd.crosstab(np.array(["a", "a", "b"]), np.array(["a", "Unknown", "b"]))
    found = figures.shares_table(figures.in_order(table, ["b", "a"]))
    assert found["columns"] == ["b", "a", "Unknown"]  # Unknown is last
    assert [row["name"] for row in found["rows"]] == ["b", "a"]
    assert [entry["share"] for entry in found["rows"][1]["entries"]] == [0, 0.5, 0.5]


def test_the_map_holds_every_cell_once(page: Page) -> None:
    found, adata = page.map, annotated_cells()
    assert found["cells"] == 150
    label = found["columns"][0]
    names = bytes(unpacked(found["names"])).decode().split("\n")
    assert sorted(names) == sorted(adata.obs_names)
    levels = np.array([*label["levels"], None], dtype=object)[unpacked(label["codes"])]
    assert dict(zip(names, levels, strict=True)) == dict(adata.obs["evercell"])
    assert levels[0] == "Unknown"  # drawn first, below all
    assert dict(zip(label["levels"], label["colours"], strict=True))["Unknown"] == UNKNOWN_COLOUR
    assert [column["id"] for column in found["columns"]] == ["label", "old", "sample-0"]
    assert [score["id"] for score in found["scores"]] == ["confidence", "unknown"]
    confidence = unpacked(found["scores"][0]["values"]) / 254
    np.testing.assert_allclose(confidence, adata.obs.loc[names, "evercell_confidence"], atol=0.002)
    x, y = (unpacked(found[axis], "<u2").astype(float) for axis in "xy")
    assert max(np.ptp(x), np.ptp(y)) == 65535 and len(x) == len(y) == 150


def test_genes_of_the_map_are_log_counts(page: Page) -> None:
    import scanpy as sc

    adata = annotated_cells()
    sc.pp.normalize_total(adata, target_sum=1e4)
    sc.pp.log1p(adata)
    found = page.map
    names = bytes(unpacked(found["names"])).decode().split("\n")
    assert {gene["name"] for gene in found["genes"]} == set(adata.var_names)  # forty are few enough to hold all
    for gene in found["genes"][:5]:
        values = unpacked(gene["values"]) * gene["high"] / 254
        expected = np.asarray(adata[names, gene["name"]].X.todense()).ravel()
        np.testing.assert_allclose(values, expected, atol=gene["high"] / 250)


def test_samples_add_up(page: Page) -> None:
    tracks = [attrs["title"] for attrs in page.all("i") if attrs.get("title", "").startswith(("left", "right"))]
    assert sum(int(re.search(r"\((\d+) cell", str(title))[1]) for title in tracks) == 150  # type: ignore[index]
    widths = {"left": 0.0, "right": 0.0}
    for attrs in page.all("i"):
        if (title := attrs.get("title") or "").startswith(("left", "right")):
            widths[title.split()[0].rstrip(":")] += float(re.search(r"width:([\d.]+)%", attrs["style"] or "")[1])  # type: ignore[index]
    assert all(abs(total - 100) < 0.05 for total in widths.values())


def test_the_flow_keeps_every_cell() -> None:
    table = pd.DataFrame([[8, 2, 0], [0, 0, 5]], index=["x", "y"], columns=["a", "Unknown", "b"])
    found = figures.flow(table, ["a", "b", "Unknown"])
    assert [node["name"] for node in found["right"]] == ["a", "b", "Unknown"]
    assert sum(band["cells"] for band in found["bands"]) == 15 == found["cells"]
    for side in ("left", "right"):
        assert sum(node["cells"] for node in found[side]) == 15
        ends = [(node["top"], node["top"] + node["bar"]) for node in found[side]]
        assert all(low >= -0.01 and high <= found["height"] + 1 for low, high in ends)
        assert all(ends[i][1] < ends[i + 1][0] for i in range(len(ends) - 1))  # bars do not touch
    assert figures.flow_words(table)[0] == {"old": "x", "new": "a", "cells": 8, "share": 0.8}
    many = pd.DataFrame(
        np.eye(50, dtype=int) * 3, index=[f"o{i}" for i in range(50)], columns=[f"n{i}" for i in range(50)]
    )
    many_found = figures.flow(many, list(many.columns))
    assert len(many_found["left"]) == figures.MOST_NODES and many_found["cells"] == 150


def test_the_forgetting_matrix_is_that_of_the_ledger(page: Page) -> None:
    found = history(STAGES)
    assert found["matrix"]["columns"] == [1, 2]
    assert [row["shares"] for row in found["matrix"]["rows"]] == [[0.96, None], [0.91, 0.88]]
    assert found["matrix"]["lost"] == {1: pytest.approx(-0.05)}
    assert found["types"]["rows"] == [{"name": "alpha", "cells": 25, "shares": [0.95, 0.92]}]
    assert "on its sealed cells 5.0 of 100 labels fewer are right" in page.text
    for figure in ("0.960", "0.910", "0.880", "-0.050"):
        assert figure in page.text
    assert history([]) == {} and history(STAGES[:1])["matrix"] == {}


def test_markers_of_a_type_are_its_own_genes(page: Page) -> None:
    assert page.text.count("AAA") >= 3 and page.text.count("BBB") >= 2
    assert "top marker genes" in page.text


def test_markers_agree_with_scanpy() -> None:
    import scanpy as sc

    adata = annotated_cells()
    labels = adata.obs["evercell"].astype(str).to_numpy()
    blocks = [(start, start + 50, adata.X[start : start + 50]) for start in (0, 50, 100)]
    found = rank_markers(blocks, labels, list(adata.var_names), order=["alpha", "beta"], each=3)
    logs = adata.copy()
    sc.pp.normalize_total(logs, target_sum=1e4)
    sc.pp.log1p(logs)
    sc.tl.rank_genes_groups(logs, "evercell", groups=["alpha", "beta"], method="t-test")
    for name in ("alpha", "beta"):
        table = sc.get.rank_genes_groups_df(logs, name).set_index("names")["scores"]
        np.testing.assert_allclose(found.scores.loc[name, table.index], table, rtol=1e-3)
        assert found.top[name] == list(table.index[:3])
    variance = np.var(np.asarray(logs.X.todense()), axis=0, ddof=1)
    np.testing.assert_allclose(found.variance, variance, rtol=1e-3)
    np.testing.assert_allclose(found.shares.loc["beta"], (adata.X[labels == "beta"] > 0).toarray().mean(axis=0))


def test_housekeeping_genes_are_no_markers() -> None:
    rates = np.array([[90, 90, 50, 1]] * 12 + [[10, 10, 1, 90]] * 12)
    counts = csr_matrix(np.random.default_rng(0).poisson(rates).astype(np.float32))
    labels = np.array(["a"] * 12 + ["b"] * 12)
    found = rank_markers([(0, 24, counts)], labels, ["MT-CO1", "Rps4", "INS", "SST"], order=["a", "b"])
    assert found.top == {"a": ["INS"], "b": ["SST"]}


def test_known_markers_are_genes_and_types_of_the_tables() -> None:
    for name, by_species in _table().items():
        assert term(name).id == name
        for species in ("human", "mouse"):
            genes = by_species[species]
            assert genes and len(set(genes)) == len(genes)
            assert not set(genes) - current(species), (name, species)


def current(species: str) -> set[str]:
    """Symbols as the packaged table of a species writes them."""
    import gzip
    from importlib.resources import files

    text = gzip.decompress((files("evercell") / "data" / "genes" / f"{species}_genes.tsv.gz").read_bytes()).decode()
    return {line.split("\t")[1] for line in text.splitlines()}


def test_a_kind_of_a_type_has_its_known_markers() -> None:
    assert known_markers("CL:0000895") == known_markers("CL:0000624")  # naive CD4 T cells are CD4 T cells, then T cells
    assert known_markers("CL:0000169", species="mouse")[0] == "Ins1"
    assert known_markers(None) == known_markers("CL:9999999") == ()


def test_known_markers_are_held_against_the_labels(tmp_path: Path) -> None:
    adata = annotated_cells()
    adata.obs["evercell_ontology_term_id"] = np.where(adata.obs["evercell"] == "beta", "CL:0000169", "CL:0000171")
    adata.var_names = ["INS" if gene == "BBB0" else "GCG" if gene == "GENE0" else gene for gene in adata.var_names]
    adata.var_names = ["TTR" if gene == "GENE1" else gene for gene in adata.var_names]
    del adata.obsm["X_evercell"]
    shown = Page(write_report(adata, tmp_path / "known.html").read_text())
    assert "INS ✓" in shown.text and "GCG ✗" in shown.text
    assert "Known markers are not raised: " in shown.text and "raised in 1 of the 4 labels" not in shown.text


def test_markers_that_the_caller_names(tmp_path: Path) -> None:
    named = {"alpha": ["GENE3", "not measured"], "beta": ["AAA1"]}
    adata = annotated_cells(60)
    del adata.obsm["X_evercell"]
    shown = Page(write_report(adata, tmp_path / "a.html", markers=named).read_text())
    assert [len(shown.all("th", "gene"))] == [2] and "GENE3" in shown.text and "not measured" not in shown.text
    assert not shown.all("canvas") and "There is no map" in shown.text
    bare = Page(write_report(adata, tmp_path / "b.html", markers={}).read_text())
    assert not bare.all("th", "gene") and "Marker genes" not in bare.text


def test_a_wide_dot_plot_is_parted() -> None:
    types = [f"t{i}" for i in range(30)]
    genes = [f"g{i}" for i in range(120)]
    table = pd.DataFrame(0.5, types, genes)
    groups = {name: [(gene, False) for gene in genes[4 * i : 4 * i + 4]] for i, name in enumerate(types)}
    panels = figures.dot_plot(table, table, groups)
    widths = [sum(len(group["genes"]) for group in panel["groups"]) for panel in panels]
    assert sum(widths) == 120 and max(widths) <= figures.MOST_GENES
    assert all(len(panel["rows"]) == 30 for panel in panels)
    assert figures.dot_plot(table, table, {}) == []


def test_a_map_that_is_there_is_taken(tmp_path: Path) -> None:
    adata = annotated_cells(30)
    adata.obsm["X_umap"] = np.column_stack([np.arange(30), np.zeros(30)])
    shown = Page(write_report(adata, tmp_path / "own.html", basis="X_umap").read_text())
    names = bytes(unpacked(shown.map["names"])).decode().split("\n")
    x = dict(zip(names, unpacked(shown.map["x"], "<u2"), strict=True))
    assert [x[f"cell{i}"] for i in (0, 29)] == [0, 65535]
    assert "UMAP of the cells was computed" not in shown.text
    with pytest.raises(CellsError, match="`obsm` has no `X_tsne`"):
        write_report(adata, tmp_path / "x.html", basis="X_tsne")


def test_old_labels_are_found_by_their_name(tmp_path: Path) -> None:
    adata = annotated_cells(60)
    del adata.obsm["X_evercell"]
    adata.obs["leiden"] = pd.Categorical(np.where(np.arange(60) % 2, "0", "1"))
    shown = Page(write_report(adata, tmp_path / "found.html").read_text())
    assert "Where the cells of each label in leiden went" in shown.text
    named = Page(write_report(adata, tmp_path / "named.html", old_labels="given").read_text())
    assert "Where the cells of each label in given went" in named.text and "of the cells agree" not in named.text
    del adata.obs["leiden"]
    assert "Old against new" not in Page(write_report(adata, tmp_path / "none.html").read_text()).text


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
    assert not shown.all("canvas") and len(shown.all("div", "bar-row")) == 2  # all cells, and the axis


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
    places = cell_map.stratified_sample(labels, 1_000, seed=1)
    drawn = pd.Series(labels[places]).value_counts()
    assert drawn["rare"] == 30 and drawn["common"] == 900 and 90 <= drawn["some"] <= 100
    assert (np.diff(places) > 0).all()
    assert (places == cell_map.stratified_sample(labels, 1_000, seed=1)).all()
    assert len(cell_map.stratified_sample(labels, 10_000, seed=1)) == 10_000


def test_sampling_is_said_in_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "MOST_CELLS_DRAWN", 100)
    adata = annotated_cells(400)
    shown = Page(write_report(adata, tmp_path / "large.html").read_text())
    drawn = shown.map["cells"]
    assert drawn < 200 and f"Shown are {drawn} of 400 cells, sampled by type." in shown.text


def test_sets_of_types_are_counted(tmp_path: Path) -> None:
    adata = annotated_cells(40)
    del adata.obsm["X_evercell"]
    adata.obs["evercell_set"] = [SEPARATOR.join(["alpha", "beta", "c"][: 1 + i % 2 + (i == 1)]) for i in range(40)]
    shown = Page(write_report(adata, tmp_path / "sets.html").read_text())
    assert "The label sets leave one type for 50.0% of the cells." in shown.text
    assert "50.0% of the cells have a set of one type, 47.5% of the cells have a set of two types, 2.5%" in shown.text


def test_a_large_page_holds_fewer_genes() -> None:
    assert [cell_map.n_genes(n) for n in (10, 60_000, 100_000, 1_000_000)] == [200, 200, 120, 60]
    values = np.array([0.0, 0.5, 1.0, np.nan, np.inf])
    assert cell_map.steps(values, 0, 1).tolist() == [0, 127, 254, 255, 255]


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
    ("known", "words"),
    [
        ({"INS": False, "IAPP": False}, "Known markers are not raised: a"),
        ({"INS": True, "IAPP": False}, None),
        ({}, "No known marker was measured: a"),
    ],
)
def test_known_markers_need_attention(known: dict[str, bool], words: str | None) -> None:
    found = findings.attention(overview({"a": 60, "b": 40}, known_markers={"a": known}))
    assert len(found) == (words is not None)
    if words:
        assert words in found[0].finding and found[0].mend


def test_given_types_that_the_model_lacks_are_told_apart() -> None:
    per_type = pd.DataFrame({"cells": [30, 30, 5], "f1": [0.1, 0.0, 0.0]}, index=["a", "new", "rare"])
    case = overview({"a": 60}, per_type=per_type, truth="given", settings={"classes": np.array(["a", "b"])})
    lacking, badly = findings.attention(case)
    assert "no type of that name for: new (30 cells)" in lacking.finding and "update" in lacking.mend
    assert badly.finding == "Poor agreement with “given”: a (F1 0.10)."


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
    assert all(gene in shown.text for gene in ("GCG", "SST", "PPY"))  # the hormones of alpha, delta and gamma cells

from __future__ import annotations

import importlib.util
import json
from dataclasses import FrozenInstanceError
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evercell.celltypes import CellTypes, Reconciliation, is_unassigned, read_labels, read_mapping, reconcile
from evercell.errors import LabelsError

# ------------------------------------------------------------------------------------------------------------ types


def test_codes_are_places_and_stay_when_types_are_added() -> None:
    old = CellTypes(("b", "cd4_t", "mystery"))
    new = old.extended(["nk", "b", "mystery 2", "nk"], stage=2)
    assert old.names == ("b", "cd4_t", "mystery")
    assert new.names == ("b", "cd4_t", "mystery", "nk", "mystery 2")
    assert new.stages == (1, 1, 1, 2, 2)
    assert new.ontology_ids == ("CL:0000236", "CL:0000624", None, "CL:0000623", None)
    assert [new.code(name) for name in old.names] == [old.code(name) for name in old.names] == [0, 1, 2]
    codes = new.codes(["nk", "b", "nk"])
    assert codes.tolist() == [3, 0, 3]
    assert codes.dtype == np.int64
    assert len(new) == 5
    assert "nk" in new
    assert "nk" not in old


@given(
    st.lists(st.text("abcdxyz", min_size=1, max_size=3).filter(lambda name: name != "na"), min_size=1, unique=True),
    st.integers(1, 5),
)
def test_extended_only_appends(names: list[str], cut: int) -> None:
    old = CellTypes(tuple(names[:cut]))
    new = old.extended(names, stage=2)
    assert new.names == tuple(names)
    assert new.names[: len(old)] == old.names
    assert CellTypes.from_dict(json.loads(json.dumps(new.to_dict()))) == new


def test_types_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        CellTypes(("b",)).names = ("t",)  # type: ignore[misc]


def test_unknown_name_is_refused_with_near_ones() -> None:
    with pytest.raises(LabelsError, match="`bta`") as caught:
        CellTypes(("alpha", "beta")).codes(["alpha", "bta"])
    assert caught.value.hint is not None
    assert "`beta`" in caught.value.hint


@pytest.mark.parametrize(
    ("names", "stages", "message"),
    [
        (("b", "b"), (), "more than once"),
        (("b", "Unknown"), (), "without a label"),
        (("b", "t"), (2, 1), "appended"),
        (("b",), (1, 1), "2 stages"),
    ],
)
def test_types_that_cannot_be(names: tuple[str, ...], stages: tuple[int, ...], message: str) -> None:
    with pytest.raises(LabelsError, match=message):
        CellTypes(names, stages)


# ----------------------------------------------------------------------------------------------------------- labels


def _adata(**obs: object) -> ad.AnnData:
    frame = pd.DataFrame(obs)
    frame.index = pd.Index([f"cell{i}" for i in range(len(frame))])
    return ad.AnnData(np.zeros((len(frame), 1), dtype=np.float32), obs=frame)


def test_read_labels_sets_cells_without_label_aside() -> None:
    adata = _adata(kind=pd.Categorical(["b", "t", None, "Unknown", "unassigned", " ", "b"]))
    labels = read_labels(adata, "kind", name="x.h5ad", min_cells=2)
    assert labels.isna().tolist() == [False, False, True, True, True, True, False]
    assert labels.dropna().tolist() == ["b", "t", "b"]
    assert labels.index.equals(adata.obs.index)
    assert labels.attrs["notes"] == [
        "4 of 7 cells of `x.h5ad` have no label in `kind` and are set aside",
        "types with fewer than 2 cells in `x.h5ad`: `t` (1)",
    ]


def test_read_labels_reads_cluster_numbers_with_gaps() -> None:
    assert read_labels(_adata(leiden=[1.0, 2.0, np.nan]), "leiden").dropna().tolist() == ["1", "2"]


def test_missing_column_names_near_ones_and_those_that_look_like_labels() -> None:
    adata = _adata(
        cell_type=["b", "t"] * 3, note=["p", "q", "r"] * 2, n_counts=range(6), barcode=[f"x{i}" for i in range(6)]
    )
    with pytest.raises(LabelsError, match=r"`x\.h5ad` has no column `celltype`") as caught:
        read_labels(adata, "celltype", name="x.h5ad")
    assert caught.value.hint is not None
    assert caught.value.hint.index("`cell_type`") < caught.value.hint.index("`note`")
    assert "n_counts" not in caught.value.hint
    assert "barcode" not in caught.value.hint


def test_column_of_measurements_and_of_one_type_are_refused() -> None:
    adata = _adata(score=[0.5, 1.5], one=["b", "b"], none=[None, "unknown"])
    with pytest.raises(LabelsError, match=r"measurements such as 0\.5"):
        read_labels(adata, "score")
    with pytest.raises(LabelsError, match="only `b`"):
        read_labels(adata, "one")
    with pytest.raises(LabelsError, match="no label"):
        read_labels(adata, "none")


def test_is_unassigned() -> None:
    assert all(is_unassigned(label) for label in (None, np.nan, pd.NA, "", "NaN", "UNKNOWN", " unassigned "))
    assert not any(is_unassigned(label) for label in ("b", "unknown lymphocyte", 0))


# --------------------------------------------------------------------------------------------------- reconciliation


def test_each_rule_in_its_turn() -> None:
    types = CellTypes(
        ("B", "Alpha", "CD4+ T cells", "dendritic", "odd 9"), ontology_ids=(None, None, None, None, "CL:0000623")
    )
    found = reconcile(
        ["B", "alpha", "cd4+ t-cell", "B lymphocyte", "cd4_t", "NK cell", "CL:0000451", "weird", "mast", "Mast cells"],
        types,
        mapping={"weird": "Alpha", "absent": "B"},
    )
    assert [(m.label, m.verdict, m.name, m.by) for m in found.matches] == [
        ("B", "same", "B", "exact"),
        ("alpha", "same", "Alpha", "case"),
        ("cd4+ t-cell", "same", "CD4+ T cells", "plural"),
        ("B lymphocyte", "same", "B", "synonym"),
        ("cd4_t", "same", "CD4+ T cells", "synonym"),
        ("NK cell", "same", "odd 9", "ontology"),
        ("CL:0000451", "new", "CL:0000451", ""),
        ("weird", "same", "Alpha", "mapping"),
        ("mast", "new", "mast", ""),
        ("Mast cells", "new", "mast", "plural"),
    ]
    assert found.new == ["CL:0000451", "mast"]
    assert found.mapping["Mast cells"] == "mast"
    assert found.unused == ("absent",)


def test_an_id_as_label_is_settled_by_the_ids_of_the_types() -> None:
    assert reconcile(["CL:0000236"], CellTypes(("b",))).matches[0].by == "ontology"


def test_label_that_fits_two_old_types_stays_new_with_a_note() -> None:
    match = reconcile(["B lymphocyte"], CellTypes(("b", "B-cells"))).matches[0]
    assert match.verdict == "new"
    assert "`b`, `B-cells`" in match.note


def test_mapping_goes_before_an_exact_name_and_can_found_a_type() -> None:
    found = reconcile(["b", "b2"], CellTypes(("b", "t")), mapping={"b": "t", "b2": "naive b"})
    assert found.mapping == {"b": "t", "b2": "naive b"}
    assert found.new == ["naive b"]


def test_finer_type_is_not_its_parent() -> None:
    found = reconcile(["cd4_t", "treg", "activated_stellate"], CellTypes(("t", "stellate")))
    assert found.new == ["cd4_t", "treg", "activated_stellate"]


def test_table_is_read_back_as_mapping(tmp_path: Path) -> None:
    found = reconcile(["B cells", "nk"], CellTypes(("b",)))
    table = found.table()
    assert table["ontology_id"].tolist() == ["CL:0000236", "CL:0000623"]
    table.to_csv(tmp_path / "table.csv", index=False)
    assert read_mapping(tmp_path / "table.csv") == {"B cells": "b", "nk": "nk"} == found.mapping


def _proba(tops: list[int], k: int) -> np.ndarray:
    return np.eye(k)[tops] * 0.9 + 0.1 / k


def _rows(found: Reconciliation, labels: list[str | None], tops: list[int]) -> pd.DataFrame:
    return found.evidence(_proba(tops, len(found.types)), labels).set_index("label")


def test_evidence_finds_a_rename() -> None:
    types = CellTypes(("alpha", "beta"))
    labels: list[str | None] = ["glucagon maker"] * 10 + ["beta"] * 5 + [None] * 3
    rows = _rows(reconcile(["glucagon maker", "beta"], types), labels, [0] * 9 + [1] + [1] * 5 + [0] * 3)
    first = rows.loc["glucagon maker"]
    assert (first["finding"], first["settlement"], first["to"]) == ("rename", "map", "alpha")
    assert (first["cells"], first["share"], first["next_type"], first["next_share"]) == (10, 0.9, "beta", 0.1)
    assert "90%" in first["sentence"]
    assert rows.loc["beta", "finding"] == "agrees"


def test_evidence_no_rename_below_the_share_or_where_the_ontology_objects() -> None:
    found = reconcile(["acinar", "vague"], CellTypes(("alpha", "beta")))
    rows = _rows(found, ["acinar"] * 10 + ["vague"] * 10, [0] * 10 + [1] * 7 + [0] * 3)
    assert rows.loc["acinar", ["finding", "settlement", "to"]].tolist() == ["new", "new", "acinar"]
    assert "holds the two apart" in rows.loc["acinar", "sentence"]
    assert rows.loc["vague", "finding"] == "new"


def test_evidence_finds_a_split() -> None:
    found = reconcile(["activated_stellate", "quiescent_stellate"], CellTypes(("stellate", "beta")))
    rows = _rows(found, ["activated_stellate"] * 10 + ["quiescent_stellate"] * 5, [0] * 15)
    assert rows["finding"].tolist() == ["split", "split"]
    assert rows["settlement"].tolist() == ["new", "new"]
    assert "`quiescent_stellate`" in rows.loc["activated_stellate", "sentence"]


def test_evidence_a_type_that_a_same_label_claims_is_no_rename() -> None:
    rows = _rows(reconcile(["beta", "odd"], CellTypes(("alpha", "beta"))), ["beta"] * 4 + ["odd"] * 4, [1] * 8)
    assert rows.loc["odd", "finding"] == "split"


def test_evidence_finds_a_merge_of_types_that_no_other_label_claims() -> None:
    types = CellTypes(("activated_stellate", "quiescent_stellate", "beta"))
    tops = [0] * 6 + [1] * 4
    rows = _rows(reconcile(["stellate", "beta"], types), ["stellate"] * 10 + ["beta"] * 2, [*tops, 2, 2])
    assert rows.loc["stellate", ["finding", "settlement", "to"]].tolist() == ["merge", "keep_old", None]
    assert "`activated_stellate` (60%), `quiescent_stellate` (40%)" in rows.loc["stellate", "sentence"]
    claimed = _rows(
        reconcile(["stellate", "quiescent_stellate"], types),
        ["stellate"] * 10 + ["quiescent_stellate"] * 2,
        [*tops, 1, 1],
    )
    assert claimed.loc["stellate", "finding"] != "merge"


def test_evidence_a_label_of_unknown_cells_is_new_and_claims_nothing() -> None:
    types = CellTypes(("activated_stellate", "quiescent_stellate", "beta"))
    found = reconcile(["stellate", "endothelial"], types)
    labels, tops = ["stellate"] * 10 + ["endothelial"] * 10, [0] * 6 + [1] * 4 + [1] * 9 + [0]
    rejected = np.array([False] * 10 + [True] * 8 + [False] * 2)
    rows = found.evidence(_proba(tops, 3), labels, rejected=rejected).set_index("label")
    assert rows["finding"].tolist() == ["merge", "new"]
    assert rows["unknown"].tolist() == [0.0, 0.8]
    assert "80%" in rows.loc["endothelial", "sentence"]
    blind = found.evidence(_proba(tops, 3), labels).set_index("label")
    assert blind.loc["stellate", "finding"] != "merge"


def test_evidence_warns_of_a_same_name_on_other_cells() -> None:
    rows = _rows(reconcile(["alpha", "beta"], CellTypes(("alpha", "beta"))), ["alpha"] * 5 + ["beta"] * 5, [1] * 10)
    assert rows.loc["alpha", ["finding", "settlement", "to"]].tolist() == ["conflict", "check", "alpha"]


def test_evidence_does_not_depend_on_the_order_of_cells() -> None:
    rng = np.random.default_rng(0)
    found = reconcile(["x", "y", "alpha"], CellTypes(("alpha", "beta", "delta")))
    labels, proba = rng.choice(["x", "y", "alpha"], 60), rng.dirichlet(np.ones(3), 60)
    order = rng.permutation(60)
    pd.testing.assert_frame_equal(found.evidence(proba, labels), found.evidence(proba[order], labels[order]))
    np.testing.assert_allclose(found.shares(proba, labels).sum(axis=1), 1)


def test_evidence_refuses_probabilities_of_another_shape() -> None:
    with pytest.raises(LabelsError, match=r"\(2, 3\)"):
        reconcile(["x"], CellTypes(("alpha", "beta"))).evidence(np.ones((2, 3)), ["x", "x"])


# ---------------------------------------------------------------------------------------------------------- mapping


def test_read_mapping_of_each_kind(tmp_path: Path) -> None:
    expected = {"Mono": "monocyte", "0": "b"}
    (tmp_path / "m.json").write_text(json.dumps(expected))
    (tmp_path / "m.csv").write_text("name,label\nmonocyte,Mono\nb,0\n")
    (tmp_path / "m.tsv").write_text("label\tname\nMono\tmonocyte\n0\tb\n")
    (tmp_path / "m.yaml").write_text("Mono: monocyte\n0: b\n")
    kinds = ["json", "csv", "tsv"] + (["yaml"] if importlib.util.find_spec("yaml") else [])
    for kind in kinds:
        assert read_mapping(tmp_path / f"m.{kind}") == expected


def test_a_line_without_a_name_leaves_its_label_open(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text("label,name\nmonocyte,Mono\nb,\n")
    assert read_mapping(tmp_path / "m.csv") == {"monocyte": "Mono"}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("m.csv", "a,b\nx,y\n", "expected `label` and `name`"),
        ("m.json", '{"a": "b", "a": "c"}', "keep one"),
        ("m.json", '{"a": null}', "both must be names"),
        ("m.json", '{"a": {"b": "c"}}', "both must be names"),
        ("m.json", '["a"]', "one object"),
        ("m.json", "{", "not json"),
        ("m.txt", "a", "cannot be read|can be read"),
        ("m.csv", "label,name\n,x\n", "both must be names"),
    ],
)
def test_read_mapping_refuses(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(LabelsError, match=message):
        read_mapping(tmp_path / name)


def test_read_mapping_of_no_file(tmp_path: Path) -> None:
    with pytest.raises(LabelsError, match="absent"):
        read_mapping(tmp_path / "absent.json")


def test_yaml_that_makes_objects_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("yaml")
    (tmp_path / "m.yaml").write_text("a: !!python/object/apply:os.getcwd []\n")
    with pytest.raises(LabelsError, match="not yaml"):
        read_mapping(tmp_path / "m.yaml")
    (tmp_path / "n.yaml").write_text("no: b\n")  # YAML reads a bare no as false
    with pytest.raises(LabelsError, match="both must be names"):
        read_mapping(tmp_path / "n.yaml")

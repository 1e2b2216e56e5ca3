"""Which model fits a query: the figures, what they make of the models, and what is said where none fits."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp
from anndata import AnnData

import evercell as ec
from evercell import checkpoint, choosing, registry
from evercell.cells import find_counts
from evercell.choosing import SAMPLED, Tried, choose
from evercell.errors import CellsError, GenesError, ModelError
from evercell.finetuning import quick_settings, train
from evercell.genes import align
from evercell.testing import TYPES, synthetic_cells


@pytest.fixture(scope="module")
def saved(model: ec.Annotator, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of the first four types, one of four others, and one of genes that no query here has."""
    folder = tmp_path_factory.mktemp("models")
    checkpoint.save(model, folder / "first")
    cells = synthetic_cells(400, n_types=8, seed=1)
    others = cells[cells.obs["cell_type"].isin(TYPES[4:8])].copy()
    checkpoint.save(train(others, groups="donor", settings=quick_settings(), shown=False), folder / "others")
    cells = synthetic_cells(200, n_genes=700, seed=1)[:, 400:].copy()
    checkpoint.save(train(cells, groups="donor", settings=quick_settings(), shown=False), folder / "foreign")
    return folder


@pytest.fixture(autouse=True)
def own(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The two models that are to be chosen from, under their names."""
    folder = tmp_path / "own"
    for name in ("first", "others"):
        shutil.copytree(saved / name, folder / name)
    monkeypatch.setattr(registry, "PACKAGED", tmp_path / "packaged")
    monkeypatch.setenv("EVERCELL_MODELS", str(folder))
    return folder


def of_types(first: int, last: int, *, n_cells: int = 240, seed: int = 2) -> AnnData:
    cells = synthetic_cells(n_cells, n_types=8, seed=seed)
    return cells[cells.obs["cell_type"].isin(TYPES[first:last])].copy()


def test_the_model_that_knows_the_types_is_chosen(own: Path) -> None:
    for query, name in ((of_types(0, 4), "first"), (of_types(4, 8), "others")):
        found = choose(query)
        assert (found.name, found.path) == (name, own / name)
        best, worse = found.rows
        assert best.name == name
        assert best.score > worse.score
        assert found.warning == ""
        assert found.reason.startswith(f"`{name}` is chosen: it labels {best.kept:.0%} of 120 cells")
        assert f"the next, `{worse.name}`, has {worse.score:.3f}" in found.reason


def test_the_figures_are_those_of_annotate(model: ec.Annotator, own: Path) -> None:
    query = of_types(0, 4)
    found = next(row for row in choose(query).rows if row.name == "first")
    result = ec.annotate(model, query)
    kept = result.labels != "Unknown"
    assert found.kept == kept.mean()
    assert found.confidence == pytest.approx(result.obs["evercell_confidence"][kept].mean())
    assert (found.genes, found.known, found.out) == (1.0, 1.0, "")
    assert found.score == round(found.kept * found.confidence, 3)


def test_counts_known_are_a_share_of_the_counts_not_of_the_genes(model: ec.Annotator) -> None:
    query = synthetic_cells(60, n_genes=500, seed=2)
    found = next(row for row in choose(query).rows if row.name == "first")
    columns = align(query.var, model.vocabulary).columns
    assert found.known == pytest.approx(query.X[:, columns >= 0].sum() / query.X.sum())
    assert found.known != pytest.approx(300 / 500, abs=1e-3)
    assert found.genes == 1.0


def test_cells_are_evenly_spaced(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    real = choosing.annotate

    def watched(model: ec.Annotator, sample: AnnData, **settings: object) -> ec.Annotation:
        seen.append(sample.obs_names.tolist())
        return real(model, sample, **settings)  # type: ignore[arg-type]

    monkeypatch.setattr(choosing, "annotate", watched)
    query = synthetic_cells(2 * SAMPLED + 50, seed=2)
    assert choose(query).n_cells == SAMPLED
    rows = query.obs_names.get_indexer(seen[0])
    assert (rows[0], rows[-1], len(set(rows))) == (0, query.n_obs - 1, SAMPLED)
    assert set(np.diff(rows)) == {2, 3}
    assert seen[0] == seen[1]


def test_in_memory_backed_and_as_counts_it_is_the_same(tmp_path: Path) -> None:
    query = of_types(0, 4)
    query.write_h5ad(tmp_path / "q.h5ad")
    found = choose(query)
    assert choose(find_counts(query)) == found
    assert choose(ad.read_h5ad(tmp_path / "q.h5ad", backed="r")) == found


def test_normalised_and_fractional_counts_are_taken_as_annotate_takes_them() -> None:
    query = of_types(0, 4)
    wanted = choose(query)
    normalised = query.copy()
    totals = np.asarray(query.X.sum(axis=1), dtype=np.float64)
    normalised.X = sp.csr_matrix(np.log1p(query.X.toarray() / totals * 1e4).astype(np.float32))
    assert [row.kept for row in choose(normalised).rows] == [row.kept for row in wanted.rows]
    expected = query.copy()
    counts = query.X.astype(np.float32).tocsr()
    counts.data[::7] += 0.33  # as expected counts of Salmon or RSEM are
    expected.X = counts
    assert choose(expected).name == wanted.name


def test_equals_go_by_name(own: Path) -> None:
    shutil.copytree(own / "first", own / "a-copy")
    found = choose(of_types(0, 4), models=registry.available()[::-1])
    assert [row.name for row in found.rows] == ["a-copy", "first", "others"]
    assert found.rows[0].score == found.rows[1].score
    assert found.name == "a-copy"


def test_the_score_is_the_expected_share_of_right_labels() -> None:
    sure_of_few = Tried("a", Path(), kept=0.4, confidence=0.99)
    sure_of_most = Tried("b", Path(), kept=0.9, confidence=0.9)
    unsure_of_all = Tried("c", Path(), kept=1.0, confidence=0.3)
    assert [one.score for one in (sure_of_few, sure_of_most, unsure_of_all)] == [0.396, 0.81, 0.3]


def test_models_that_cannot_be_used_are_out_and_say_why(saved: Path, own: Path) -> None:
    shutil.copytree(saved / "foreign", own / "foreign")
    shutil.copytree(saved / "first", own / "damaged")
    (own / "damaged" / "genes.txt").write_text("# evercell genes\tversion 1\thuman\n")
    shutil.copytree(saved / "first", own / "broken")
    (own / "broken" / "annotator.json").write_text("{")
    found = choose(of_types(0, 4), name="q.h5ad")
    assert [row.name for row in found.rows] == ["first", "others", "broken", "damaged", "foreign"]
    outs = {row.name: row.out for row in found.rows if row.out}
    assert outs["broken"].startswith("cannot be read: ")
    assert "`genes.txt` was changed or cut off" in outs["damaged"]
    assert outs["foreign"].startswith("`q.h5ad` shares 0 of the model's 300 genes")
    assert all(row.score == 0 for row in found.rows if row.out)


def test_a_model_that_knows_few_of_the_counts_is_out(monkeypatch: pytest.MonkeyPatch) -> None:
    query = synthetic_cells(60, n_genes=500, seed=2)
    known = choose(query).rows[0].known
    monkeypatch.setattr(choosing, "LEAST_KNOWN", known + 0.01)
    with pytest.raises(ModelError, match=rf"`first`: it knows {known:.0%} of the counts of the cells"):
        choose(query)


def test_mouse_cells_are_brought_to_a_model_of_human_genes() -> None:
    query = synthetic_cells(120, seed=2, species="mouse")
    found = choose(query)
    assert found.name == "first"
    assert found.rows[0].genes > 0.99


def test_where_none_fits_it_is_said_with_the_figures(own: Path) -> None:
    shutil.rmtree(own / "first")
    found = choose(of_types(0, 4))
    (best,) = found.rows
    assert best.score < 0.5
    assert found.name == "others"
    assert found.warning.startswith("no model fits these cells well: the best, `others`, labels ")
    assert f"{best.kept:.0%} of 120 cells with a mean confidence of {best.confidence:.2f}" in found.warning
    assert "the next" not in found.reason


def test_a_model_that_rejects_all_cells_is_chosen_with_a_warning(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(own / "first")
    real = choosing.annotate
    monkeypatch.setattr(choosing, "annotate", lambda *a, **k: real(*a, **(k | {"reject": 0.999999})))
    found = choose(of_types(0, 4))
    assert (found.name, found.rows[0].kept, found.rows[0].confidence) == ("others", 0.0, 0.0)
    assert "labels 0% of 120 cells with a mean confidence of 0.00" in found.warning


def test_without_models_the_hint_says_how_to_get_one(own: Path) -> None:
    with pytest.raises(ModelError, match="no model with cell types") as caught:
        choose(of_types(0, 4), models=[])
    assert "evercell models add" in str(caught.value.hint)
    pretrained = [replace(one, n_types=0, types=()) for one in registry.available()]
    with pytest.raises(ModelError, match="no model with cell types"):
        choose(of_types(0, 4), models=pretrained)
    one, two = registry.available()
    assert [row.name for row in choose(of_types(0, 4), models=[one, replace(two, n_types=0)]).rows] == ["first"]


def test_what_is_wrong_with_the_query_is_no_fault_of_the_models() -> None:
    query = of_types(0, 4)
    with pytest.raises(GenesError, match="`rat` is no species"):
        choose(query, species="rat")
    with pytest.raises(GenesError, match="no column `symbol`"):
        choose(query, gene_column="symbol")
    with pytest.raises(CellsError, match="no layer `umi`"):
        choose(query, layer="umi")


def test_cells_without_counts_are_left_out() -> None:
    query = of_types(0, 4)
    counts = query.X.tolil()
    counts[::3] = 0
    query.X = sp.csr_matrix(counts)
    found = choose(query)
    assert found.n_cells == 80
    assert found.name == "first"
    query.layers["counts"] = sp.csr_matrix(np.eye(*query.shape, k=1000, dtype=np.float32))
    with pytest.raises(CellsError, match="no counts"):
        choose(query, layer="counts")


def test_the_table_has_a_line_for_each_model(own: Path) -> None:
    (own / "others" / "annotator.json").write_text("{")
    found = choose(of_types(0, 4))
    header, first, others = found.text().splitlines()
    assert re.split(" {2,}", header) == [
        "model",
        "genes measured",
        "counts known",
        "cells labelled",
        "confidence",
        "score",
        "types shown",
    ]
    assert first.split() == [
        "first", "100%", "100%", f"{found.rows[0].kept:.0%}", f"{found.rows[0].confidence:.2f}",
        f"{found.rows[0].score:.3f}", f"{found.rows[0].shown:.0%}",
    ]  # fmt: skip
    assert len(first) == len(header)
    assert others.startswith("others  out: cannot be read: ")


def tried(name: str, score: float, shown: float, out: str = "") -> Tried:
    return Tried(name, Path(name), 1.0, 1.0, 1.0, score, shown, out)


@pytest.mark.parametrize(
    ("rows", "chosen"),
    [
        ([tried("lung", 0.90, 0.2), tried("blood", 0.86, 0.6)], "blood"),
        ([tried("lung", 0.90, 0.2), tried("blood", 0.84, 0.6)], "lung"),
        ([tried("lung", 0.90, 0.2), tried("blood", 0.88, 0.6, out="it knows 3 % of the counts")], "lung"),
        ([tried("b", 0.90, 0.5), tried("a", 0.90, 0.5)], "a"),
    ],
)
def test_of_models_about_as_sure_the_one_wins_more_of_whose_types_are_shown(
    rows: list[Tried], chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    of = {row.name: row for row in rows}
    monkeypatch.setattr(choosing, "_tried", lambda one, *_, **__: of[one])
    monkeypatch.setattr(registry, "with_types", lambda _: list(of))
    found = choose(of_types(0, 4))
    assert found.name == found.rows[0].name == chosen
    if chosen == "blood":
        assert "60% of its types are among them, of the next 20%" in found.reason


def test_types_shown_are_those_of_a_hundredth_of_the_cells(model: ec.Annotator, own: Path) -> None:
    (row,) = [row for row in choose(of_types(0, 2)).rows if row.name == "first"]
    labels = ec.annotate(model, of_types(0, 2)).labels
    sizes = [(labels == name).mean() for name in model.types.names]
    assert row.shown == sum(size >= 0.01 for size in sizes) / 4

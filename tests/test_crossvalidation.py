"""Cross-validation of evercell and of other methods on the same folds."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import anndata as ad
import numpy as np
import pytest

import evercell as ec
from evercell import crossvalidation
from evercell.cli import main
from evercell.crossvalidation import cross_validate
from evercell.errors import LabelsError
from evercell.finetuning import quick_settings
from evercell.testing import synthetic_cells
from evercell.training import TrainingSettings

TINY = replace(
    quick_settings(),
    refit=False,
    training=TrainingSettings(samples=640, batch_size=64, learning_rate=5e-3, evaluations=2),
)


@pytest.fixture(scope="module")
def cells() -> ad.AnnData:
    return synthetic_cells(seed=1)


@pytest.fixture(scope="module")
def found(cells: ad.AnnData) -> crossvalidation.CrossValidation:
    return cross_validate(cells, by="donor", n_folds=2, methods=["evercell", "linear"], settings=TINY, shown=False)


def test_every_cell_is_labelled_once_by_every_method(found: crossvalidation.CrossValidation, cells: ad.AnnData) -> None:
    table = found.cells
    assert table.index.tolist() == cells.obs_names.tolist()
    assert table["truth"].tolist() == cells.obs["cell_type"].astype(str).tolist()
    for method in ("evercell", "linear"):
        assert set(table[method]) <= set(table["truth"])
        assert table[f"{method}_confidence"].between(0, 1).all()
    donors = table.groupby("group")["fold"].nunique()
    assert (donors == 1).all()


def test_figures_are_those_of_the_labels(found: crossvalidation.CrossValidation) -> None:
    for row in found.scores.itertuples():
        part = found.cells[found.cells["fold"] == row.fold]
        assert row.accuracy == pytest.approx((part["truth"] == part[row.method]).mean())
        assert row.n_test == len(part)
        assert row.n_train == len(found.cells) - len(part)
    mean = found.scores.loc[found.scores["method"] == "linear", "accuracy"].mean()
    assert found.summary().loc["linear", ("accuracy", "mean")] == pytest.approx(mean)
    # these cells are easy: what fails here is broken
    assert mean > 0.9
    assert found.summary().loc["evercell", ("accuracy", "mean")] > 0.6


def test_learning_curves_are_kept(found: crossvalidation.CrossValidation) -> None:
    assert set(found.history["fold"]) == {1, 2}
    assert {"step", "loss", "held_out_loss", "held_out_accuracy"} <= set(found.history)


def test_the_training_of_a_fold_sees_no_cell_of_it(cells: ad.AnnData, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[set[str]] = []
    real = crossvalidation.train

    def watched(parts: list[ad.AnnData], *rest: object, **options: object) -> ec.Annotator:
        seen.append({name for part in parts for name in part.obs_names})
        return real(parts, *rest, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(crossvalidation, "train", watched)
    result = cross_validate(cells, by="donor", n_folds=2, settings=TINY, shown=False)
    for fold, names in enumerate(seen, start=1):
        tested = result.cells.index[result.cells["fold"] == fold]
        assert not names & set(tested)
        assert len(names) + len(tested) == cells.n_obs


def test_a_stopped_run_goes_on(cells: ad.AnnData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"by": "donor", "n_folds": 2, "settings": TINY, "shown": False, "state_folder": tmp_path}
    whole = cross_validate(cells, **options)  # type: ignore[arg-type]
    kept = sorted(tmp_path.iterdir())
    assert len(kept) == 2
    kept[1].unlink()
    calls = []
    real = crossvalidation.train
    monkeypatch.setattr(crossvalidation, "train", lambda *a, **k: calls.append(1) or real(*a, **k))
    again = cross_validate(cells, **options)  # type: ignore[arg-type]
    assert len(calls) == 1
    assert again.cells.equals(whole.cells)
    other = cross_validate(cells, **{**options, "seed": 1})  # type: ignore[arg-type]
    assert other.cells["fold"].tolist() != whole.cells["fold"].tolist() or len(calls) == 3


def test_a_type_that_training_does_not_show_is_not_scored(cells: ad.AnnData) -> None:
    donors = cells.obs["donor"].astype(str).to_numpy()
    label = cells.obs["cell_type"].astype(str).to_numpy()
    first = label[0]
    alone = cells[(label != first) | (donors == donors[0])].copy()  # this type in one donor only
    result = cross_validate(alone, by="donor", n_folds=2, methods=["linear"], shown=False)
    unknown = ~result.cells["known"]
    assert set(result.cells.loc[unknown, "truth"]) == {first}
    assert result.scores["scored"].sum() == (~unknown).sum()
    assert any("not scored" in one for one in result.warnings)


def test_random_folds_of_known_donors_are_told(cells: ad.AnnData) -> None:
    result = cross_validate(cells, n_folds=2, methods=["linear"], shown=False)
    assert any("too good for a new one" in one for one in result.warnings)
    assert result.scores["held_out"].tolist() == ["cells at random"] * 2


def test_oversampled_cells_are_refused(cells: ad.AnnData) -> None:
    rows = np.concatenate([np.arange(cells.n_obs), np.arange(40)])
    copied = cells[rows].copy()
    copied.obs_names_make_unique()
    with pytest.raises(LabelsError, match="a copy of them"):
        cross_validate(copied, n_folds=2, methods=["linear"], shown=False)
    result = cross_validate(copied, n_folds=2, methods=["linear"], twins="together", shown=False)
    assert result.cells["fold"].to_numpy()[-40:].tolist() == result.cells["fold"].to_numpy()[:40].tolist()


def test_whole_studies_with_their_own_genes(cells: ad.AnnData) -> None:
    first, second = cells[:100, :250].copy(), cells[100:, 50:].copy()
    result = cross_validate(
        [first, second],
        by="study",
        n_folds=2,
        methods=["evercell", "linear"],
        settings=TINY,
        names=["a", "b"],
        shown=False,
    )
    assert result.cells.groupby("study")["fold"].nunique().tolist() == [1, 1]
    assert result.summary().loc["linear", ("accuracy", "mean")] > 0.8


def test_a_base_that_saw_the_cells_is_told(cells: ad.AnnData) -> None:
    from evercell.pretraining import quick_settings as quick_pretraining

    settings = replace(quick_pretraining(), training=replace(quick_pretraining().training, samples=128, evaluations=1))
    base = ec.pretrain([cells], names=["lung"], settings=settings)
    result = cross_validate(
        cells,
        by="donor",
        n_folds=2,
        base=base,
        settings=replace(TINY, finetune="head"),
        names=["lung.h5ad"],
        shown=False,
    )
    assert any("has seen the cells of `lung.h5ad` before" in one for one in result.warnings)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, cells: ad.AnnData) -> Path:
    place = tmp_path_factory.mktemp("validated")
    cells.write_h5ad(place / "cells.h5ad")
    return place


def test_crossval_on_the_command_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["crossval", str(folder / "cells.h5ad"), "--labels", "cell_type", "--by", "donor", "--folds", "2"]
    words += ["--samples", "640", "--output", str(folder / "out")]
    assert main(words) == 0
    said = capsys.readouterr()
    assert "type, all folds together" in said.out
    assert "±" in said.out
    written = {path.name for path in (folder / "out").iterdir()}
    assert {"folds.csv", "cells.csv", "history.csv", "confusion.png", "curves.png", "types-evercell.csv"} <= written
    assert main([*words, "--json"]) == 0  # from the folds that are kept
    data = json.loads(capsys.readouterr().out)
    assert set(data["mean"]) == {"evercell", "linear"}
    assert len(data["folds"]) == 4


def test_compare_on_the_command_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["compare", str(folder / "cells.h5ad"), "--labels", "cell_type", "--by", "donor", "--folds", "3"]
    words += ["--methods", "evercell,linear,knn", "--samples", "640", "--output", str(folder / "compared"), "--json"]
    assert main(words) == 0
    data = json.loads(capsys.readouterr().out)
    rows = data["significance"]["accuracy"]
    assert [row["method"] for row in rows] == ["evercell", "linear", "knn"]
    assert rows[0]["difference"] is None
    assert 0 <= rows[1]["p_holm"] <= 1
    written = {path.name for path in (folder / "compared").iterdir()}
    assert {"compared.png", "significance-accuracy.csv", "significance-macro_f1.csv", "types-knn.csv"} <= written


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--by", "mouse"], "folds cannot be made by `mouse`"),
        (["--by", "donor", "--balance", "smote"], "there is no balance `smote`"),
        (["--by", "donor", "--finetune", "head"], "--finetune head needs a pretrained model"),
        (["--by", "batch", "--batch", "lane"], "no column `lane`"),
        (["--by", "donor", "--folds", "50"], "50 folds need as many groups"),
    ],
)
def test_wrong_use_is_told_in_a_line(
    folder: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    given = ["crossval", str(folder / "cells.h5ad"), "--labels", "cell_type", "--output", str(folder / "no"), *words]
    assert main(given) == 2
    assert message in capsys.readouterr().err
    assert not (folder / "no" / "folds.csv").exists()

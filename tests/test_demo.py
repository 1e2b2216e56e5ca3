"""The demonstration on packaged cells, with a small model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from evercell.checkpoint import load
from evercell.cli import main
from evercell.demo import UNSEEN, Demo, run_demo
from evercell.errors import ModelError
from evercell.examples import EXAMPLES
from evercell.finetuning import quick_settings


@pytest.fixture(scope="module", autouse=True)
def no_map() -> Iterator[None]:
    """Reports without their map: it has tests of its own, and what draws it is compiled for ten seconds or more."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("evercell.reporting.report._map_points", lambda *_, **__: (None, "There is no map in tests."))
        yield


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory, no_map: None) -> Demo:
    return run_demo(tmp_path_factory.mktemp("demo") / "out", settings=quick_settings(), shown=False)


def test_everything_that_the_table_names_is_there(demo: Demo) -> None:
    written = {"model", "annotated.h5ad", "labels.csv", "report.html", "data"}
    assert {file.name for file in demo.output.iterdir()} == written
    assert {file.stem for file in (demo.output / "data").iterdir()} == set(EXAMPLES)
    table = demo.table()
    for name in written:
        assert str(demo.output / name) in table
    assert load(demo.output / "model").types.names[0] == "acinar"
    assert "linear baseline" in (demo.output / "model" / "MODEL_CARD.md").read_text()
    page = (demo.output / "report.html").read_text()
    assert "Human pancreas: a study that was not trained on" in page


def test_scores_are_those_of_the_written_labels(demo: Demo) -> None:
    cells = ad.read_h5ad(demo.output / "annotated.h5ad")
    classes = np.asarray(cells.uns["evercell"]["classes"], dtype=object)
    truth = cells.obs["cell_type"].astype(str).to_numpy()
    known = np.isin(truth, classes)
    scores = demo.studies[0]
    assert (scores.study, scores.known_cells, scores.other_cells) == (UNSEEN[0], 249, 1)  # one endothelial cell
    best = classes[cells.obsm["evercell_proba"].argmax(axis=1)]
    assert scores.accuracy == pytest.approx((best == truth)[known].mean())
    rejected = (cells.obs["evercell"] == "Unknown").to_numpy()
    assert scores.rejected_known == pytest.approx(rejected[known].mean())
    assert scores.rejected_other == pytest.approx(rejected[~known].mean())
    table = pd.read_csv(demo.output / "labels.csv", index_col="cell")
    assert table["evercell"].tolist() == cells.obs["evercell"].astype(str).tolist()
    assert table["cell_type"].tolist() == truth.tolist()


def test_known_types_are_told_from_others_in_every_study(demo: Demo) -> None:
    counted = {one.study: (one.known_cells, one.other_cells) for one in demo.studies}
    # 42 and 13 endothelial cells are of no type of stage 1; stellate cells are, under two finer names
    assert counted == {"tritschler_unseen": (249, 1), "fasolino_stage2": (255, 42), "muraro_stage3": (106, 13)}


def test_even_a_small_model_labels_another_study(demo: Demo) -> None:
    for one in demo.studies:
        assert one.accuracy > 0.75
        assert one.linear_accuracy > 0.75
    assert demo.studies[0].accuracy > 0.9


def test_the_table_holds_the_numbers(demo: Demo) -> None:
    rows = demo.table().splitlines()[2:5]
    for row, one in zip(rows, demo.studies, strict=True):
        words = row.split()
        assert words[0] == one.study
        assert words[2:6] == [
            f"{value:.3f}" for value in (one.accuracy, one.linear_accuracy, one.macro_f1, one.linear_macro_f1)
        ]


def test_the_command_prints_json_and_replaces_what_it_wrote(
    demo: Demo, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.txt").write_text("not a model")
    with pytest.raises(ModelError, match="already there"):
        run_demo(tmp_path, settings=quick_settings(), shown=False)
    assert (tmp_path / "model" / "mine.txt").read_text() == "not a model"

    before = (demo.output / "model" / "annotator.json").read_bytes()
    code = main(["demo", "--output", str(demo.output), "--samples", "256", "--json"])
    out, err = capsys.readouterr()
    assert code == 0
    found = json.loads(out)
    assert [one["study"] for one in found["studies"]] == list(UNSEEN)
    assert "Baron et al. 2016" in err
    assert (demo.output / "model" / "annotator.json").read_bytes() != before

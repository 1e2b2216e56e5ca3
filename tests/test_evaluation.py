from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evercell.errors import LabelsError, SettingsError
from evercell.evaluation import evaluate, expected_calibration_error, split_cells, stream_metrics

# Ten cells. Of 5 a: 4 right, 1 called b. Of 3 b: 2 right, 1 called z, a type the truth does not have. Of 2 c: both b.
TRUTH = list("aaaaabbbcc")
CALLED = list("aaaabbbzbb")
# a: precision 4/4, recall 4/5, F1 8/9.  b: precision 2/5, recall 2/3, F1 1/2.  c: 0, 0, 0.


def test_figures_by_hand() -> None:
    found = evaluate(TRUTH, CALLED)
    assert found.n_cells == 10
    assert found.accuracy == pytest.approx(6 / 10)
    assert found.balanced_accuracy == pytest.approx((4 / 5 + 2 / 3 + 0) / 3)
    assert found.macro_f1 == pytest.approx((8 / 9 + 1 / 2 + 0) / 3)
    assert found.weighted_f1 == pytest.approx((5 * 8 / 9 + 3 * 1 / 2 + 0) / 10)
    assert found.known_accuracy == found.accuracy
    assert found.known_macro_f1 == found.macro_f1
    assert found.false_rejection == 0
    assert found.unknown_accuracy is None
    assert found.h_score is None
    assert found.ece is None
    assert found.per_type.index.tolist() == ["a", "b", "c"]
    assert found.per_type["cells"].tolist() == [5, 3, 2]
    np.testing.assert_allclose(found.per_type["precision"], [1, 2 / 5, 0])
    np.testing.assert_allclose(found.per_type["recall"], [4 / 5, 2 / 3, 0])
    np.testing.assert_allclose(found.per_type["f1"], [8 / 9, 1 / 2, 0])


def test_confusion_by_hand() -> None:
    table = evaluate(TRUTH, CALLED).confusion
    assert table.columns.tolist() == ["a", "b", "c", "z"]
    assert table.to_numpy().tolist() == [[4, 1, 0, 0], [0, 2, 0, 1], [0, 2, 0, 0]]


def test_ari_and_nmi_by_hand() -> None:
    # truth aabb, called aaab: pairs together in both 1; in truth 2; in called 3; of 6 pairs
    # ARI = (1 - 2*3/6) / ((2+3)/2 - 2*3/6) = 0
    found = evaluate(list("aabb"), list("aaab"))
    assert found.ari == pytest.approx(0)
    # entropies: truth ln 2; called H(3/4); shared = H(truth) - H(truth | called) = ln 2 - 3/4 H(1/3)
    h_called = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25))
    shared = np.log(2) - 0.75 * -(np.log(1 / 3) / 3 + 2 * np.log(2 / 3) / 3)
    assert found.nmi == pytest.approx(shared / ((np.log(2) + h_called) / 2))
    # names do not matter to either
    swapped = evaluate(list("aabb"), list("bbaa"))
    assert (swapped.accuracy, swapped.ari, swapped.nmi) == (0, pytest.approx(1), pytest.approx(1))


def test_unknown_cells_by_hand() -> None:
    # known a, b: 4 cells, 2 right, 1 rejected, 1 wrong; unknown x, y: 4 cells, 3 rejected
    truth = ["a", "a", "b", "b", "x", "x", "y", "y"]
    called = ["a", "b", "b", "Unknown", "Unknown", "a", "Unknown", None]
    found = evaluate(truth, called, known_types=["a", "b"])
    assert found.known_accuracy == pytest.approx(1 / 2)
    assert found.unknown_accuracy == pytest.approx(3 / 4)
    assert found.h_score == pytest.approx(2 * 0.5 * 0.75 / 1.25)
    assert found.false_rejection == pytest.approx(1 / 4)
    assert found.accuracy == pytest.approx(5 / 8)
    assert found.per_type.loc["Unknown", "cells"] == 4
    # among known cells: a F1 2/3; b precision 1/2, recall 1/2, F1 1/2
    assert found.known_macro_f1 == pytest.approx((2 / 3 + 1 / 2) / 2)


def test_h_score_is_zero_when_every_cell_is_called_unknown_or_none_is() -> None:
    assert evaluate(["a", "x"], ["Unknown", "Unknown"], known_types=["a"]).h_score == 0
    assert evaluate(["a", "x"], ["a", "a"], known_types=["a"]).h_score == 0
    assert evaluate(["a", "x"], ["b", "b"], known_types=["a"]).h_score == 0
    only_unknown = evaluate(["x", "x"], ["Unknown", "a"], known_types=["a"])
    assert (only_unknown.known_accuracy, only_unknown.h_score, only_unknown.unknown_accuracy) == (None, None, 0.5)


def test_cells_without_a_true_label_are_not_scored() -> None:
    truth = [*TRUTH, None, np.nan, "unknown", "Unassigned", ""]
    found = evaluate(truth, CALLED + ["a"] * 5, confidence=np.full(15, 0.5))
    assert found.n_cells == 10
    assert found.macro_f1 == evaluate(TRUTH, CALLED).macro_f1
    assert found.ece == pytest.approx(0.1)
    with pytest.raises(LabelsError, match="no cell has a true label"):
        evaluate(["unknown"], ["a"])


def test_calibration_error_by_hand() -> None:
    # two bins: (0, 0.5] holds 0.2 wrong and 0.5 right; (0.5, 1] holds 0.6 wrong and 1.0 right
    # |1/2 - 0.35| * 2/4 + |1/2 - 0.8| * 2/4 = 0.225
    confidence, correct = np.array([0.2, 0.5, 0.6, 1.0]), np.array([False, True, False, True])
    assert expected_calibration_error(confidence, correct, bins=2) == pytest.approx(0.225)
    # fifteen bins part all four: (0.2 + 0.5 + 0.6 + 0) / 4
    assert expected_calibration_error(confidence, correct) == pytest.approx(1.3 / 4)
    assert expected_calibration_error(np.array([0.0, 1.0]), np.array([False, True])) == 0


def test_calibration_leaves_rejected_cells_out() -> None:
    found = evaluate(list("aab"), ["a", "Unknown", "b"], confidence=np.array([0.9, 0.2, 0.7]))
    assert found.ece == pytest.approx((0.1 + 0.3) / 2)
    assert evaluate(["a", "b"], ["Unknown"] * 2, confidence=np.ones(2)).ece is None


def test_confidence_outside_0_to_1_and_lengths_are_refused() -> None:
    with pytest.raises(SettingsError, match=r"1\.5"):
        evaluate(["a", "b"], ["a", "b"], confidence=np.array([1.5, 1]))
    with pytest.raises(SettingsError, match="nan"):
        expected_calibration_error(np.array([np.nan]), np.array([True]))
    with pytest.raises(LabelsError, match=r"\[2, 1\]"):
        evaluate(["a", "b"], ["a"])


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from("abx"), st.sampled_from(["a", "b", "z", "Unknown"]), st.floats(0, 1)), min_size=1
    ),
    st.randoms(),
)
def test_order_of_cells_does_not_matter(cells: list[tuple[str, str, float]], random: object) -> None:
    def figures(rows: list[tuple[str, str, float]]) -> dict[str, int | float | None]:
        truth, called, confidence = zip(*rows, strict=True)
        return evaluate(truth, called, confidence=np.array(confidence), known_types=["a", "b"]).figures()

    shuffled = list(cells)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    before, after = figures(cells), figures(shuffled)
    assert before == {name: None if value is None else pytest.approx(value) for name, value in after.items()}
    assert all(value is None or value >= -1 for value in before.values())


def test_to_dict_is_json_and_table_is_text() -> None:
    found = evaluate(pd.Categorical(TRUTH), np.array(CALLED), confidence=np.full(10, 0.6))
    stored = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert stored["n_cells"] == 10
    assert stored["per_type"]["a"] == {"cells": 5, "precision": 1.0, "recall": 0.8, "f1": pytest.approx(8 / 9)}
    assert stored["confusion"]["b"] == {"a": 0, "b": 2, "c": 0, "z": 1}
    assert stored["ece"] == pytest.approx(0)
    assert stored["h_score"] is None
    text = found.table()
    assert "macro-F1" in text
    assert "0.4630" in text
    assert "H-score" not in text
    assert len(text.splitlines()[-1]) == len(text.splitlines()[-2])


# ----------------------------------------------------------------------------------------------------------- stream


def test_stream_figures_by_hand() -> None:
    # part 0: 0.9 when learnt, 0.95 after stage 1, 0.8 at last; part 1: 0.9 when learnt, 0.7 at last
    matrix = np.array([[0.90, 0.30, 0.10, 0.5], [0.95, 0.90, 0.40, 0.5], [0.80, 0.70, 0.60, 0.6]])
    found = stream_metrics(matrix)
    assert found["final_mean_accuracy"] == pytest.approx((0.8 + 0.7 + 0.6) / 3)
    assert found["forgetting"] == pytest.approx((0.95 - 0.8 + 0.9 - 0.7) / 2)
    assert found["backward_transfer"] == pytest.approx((0.8 - 0.9 + 0.7 - 0.9) / 2)
    assert found["forward_transfer"] == pytest.approx((0.3 + 0.4) / 2)
    assert found["unseen_mean_accuracy"] == pytest.approx(0.6)
    shifted = stream_metrics(matrix, baseline=np.array([0, 0.1, 0.2, 0]))
    assert shifted["forward_transfer"] == pytest.approx((0.2 + 0.2) / 2)


def test_stream_of_one_stage_and_of_parts_not_measured() -> None:
    one = stream_metrics(np.array([[0.9]]))
    assert one == {
        "final_mean_accuracy": 0.9,
        "forgetting": None,
        "backward_transfer": None,
        "forward_transfer": None,
        "unseen_mean_accuracy": None,
    }
    lower = stream_metrics(np.array([[0.9, np.nan], [0.95, 0.8]]))
    assert lower["forgetting"] == pytest.approx(-0.05)
    assert lower["forward_transfer"] is None


@pytest.mark.parametrize("shape", [(2, 1), (3,), (0, 2)])
def test_stream_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(SettingsError, match="stages, parts"):
        stream_metrics(np.ones(shape))


# ------------------------------------------------------------------------------------------------------------ split


def _donors() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.choice(["a", "b", "c"], 300, p=[0.6, 0.3, 0.1]), np.repeat([f"d{i}" for i in range(10)], 30)


def test_whole_donors_are_held_out() -> None:
    labels, donors = _donors()
    split = split_cells(labels, donors, test_share=0.2, seed=1)
    train, validation = split
    assert split.by == "groups"
    assert not split.note
    assert set(donors[train]).isdisjoint(donors[validation])
    assert set(donors[validation]) == set(split.held_out)
    assert len(validation) == 60
    assert sorted([*train, *validation]) == list(range(300))
    assert set(labels[train]) == {"a", "b", "c"}


def test_donor_that_alone_has_a_type_is_never_held_out() -> None:
    labels, donors = _donors()
    labels[donors == "d3"] = "rare"
    for seed in range(20):
        assert "d3" not in split_cells(labels, donors, test_share=0.3, seed=seed).held_out


def test_two_donors_or_types_of_their_own_fall_back_on_cells() -> None:
    labels, _ = _donors()
    two = split_cells(labels, np.repeat(["d0", "d1"], 150), test_share=0.2, seed=1)
    assert two.by == "cells"
    assert "only 2 groups (`d0`, `d1`)" in two.note
    own = split_cells(np.repeat(["a", "b", "c"], 10), np.repeat(["d0", "d1", "d2"], 10), test_share=0.2, seed=1)
    assert own.by == "cells"
    assert "enough cells" in own.note


def test_cells_are_drawn_in_each_type() -> None:
    labels = np.array(["a"] * 50 + ["b"] * 10 + ["c"] * 2 + ["d"] + ["unknown"] * 5)
    split = split_cells(labels, test_share=0.2, seed=0)
    assert split.by == "cells"
    assert pd.Series(labels[split.validation]).value_counts().to_dict() == {"a": 10, "b": 2, "c": 1}
    assert pd.Series(labels[split.train]).value_counts().to_dict() == {"a": 40, "b": 8, "c": 1, "d": 1}
    assert not set(split.train) & set(split.validation)


def test_split_depends_on_the_seed_only() -> None:
    labels, donors = _donors()
    for groups in (None, donors):
        one, same, other = (split_cells(labels, groups, test_share=0.2, seed=seed) for seed in (1, 1, 2))
        assert one.validation.tolist() == same.validation.tolist()
        assert one.validation.tolist() != other.validation.tolist()


def test_cells_of_no_donor_stay_in_training() -> None:
    labels, donors = _donors()
    groups = donors.astype(object)
    groups[:30] = None
    split = split_cells(labels, groups, test_share=0.2, seed=0)
    assert split.by == "groups"
    assert set(range(30)) <= set(split.train.tolist())


def test_split_refuses_what_cannot_be() -> None:
    with pytest.raises(SettingsError, match="1"):
        split_cells(["a", "b"], test_share=1, seed=0)
    with pytest.raises(LabelsError, match="1 cells"):
        split_cells(["a", "unknown"], test_share=0.5, seed=0)
    with pytest.raises(LabelsError, match="1 groups for 2 cells"):
        split_cells(["a", "b"], ["d"], test_share=0.5, seed=0)

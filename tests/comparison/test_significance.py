"""The paired test over folds, by hand."""

from __future__ import annotations

import json
import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from evercell.comparison.significance import holm, paired_test, significance
from evercell.errors import SettingsError


def folds(**accuracies: list[float]) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {"method": method, "fold": fold, "n_train": 80, "n_test": 20, "accuracy": value}
            for method, values in accuracies.items()
            for fold, value in enumerate(values)
        ]
    )


def test_corrected_resampled_t_test_by_hand() -> None:
    """Differences 2, 1, 4, 3, 0 points: mean 2, variance 2.5; t = 2 / sqrt((1/5 + 1/4) 2.5) = 1.8856, 4 degrees."""
    found = paired_test([0.02, 0.01, 0.04, 0.03, 0.00], 1 / 4)
    assert found.difference == pytest.approx(0.02)
    assert found.standard_error == pytest.approx(0.01 * math.sqrt(0.45 * 2.5))
    assert found.p == pytest.approx(2 * (1 - stats.t.cdf(2 / math.sqrt(1.125), df=4)))
    assert found.p == pytest.approx(0.13242, abs=1e-5)
    assert paired_test([-0.02, -0.01, -0.04, -0.03, -0.00], 1 / 4).p == found.p


def test_correction_makes_a_plain_t_test_more_careful() -> None:
    differences = [0.02, 0.01, 0.04, 0.03, 0.01]
    plain = stats.ttest_1samp(differences, 0).pvalue
    assert paired_test(differences, 1e-12).p == pytest.approx(plain)
    p_values = [paired_test(differences, ratio).p for ratio in (1e-12, 0.1, 0.25, 1.0)]
    assert p_values == sorted(p_values)
    assert p_values[2] > 1.5 * plain


def test_false_alarms_are_as_rare_as_promised_where_folds_are_correlated() -> None:
    """Differences with the correlation n_test / (n_test + n_train) that the correction assumes, and no true mean."""
    rng = np.random.default_rng(0)
    correlation = 0.2
    shared, own = rng.normal(size=(2000, 1)), rng.normal(size=(2000, 5))
    draws = math.sqrt(correlation) * shared + math.sqrt(1 - correlation) * own
    corrected = np.mean([paired_test(row, 0.25).p < 0.05 for row in draws])
    plain = np.mean([paired_test(row, 1e-12).p < 0.05 for row in draws])
    assert corrected < 0.065 < plain


def test_no_test_where_none_can_be_made() -> None:
    two = paired_test([0.1, 0.2], 1.0)
    assert two.p is None and "2 folds, a test needs three" in two.note and two.standard_error is not None
    one = paired_test([0.1], 1.0)
    assert one.p is None and one.standard_error is None and "one fold" in one.note
    same = paired_test([0.1, 0.3 - 0.2, 0.1], 1.0)
    assert same.p is None and "same difference" in same.note


def test_no_difference_at_all_is_p_one() -> None:
    found = paired_test([0.0, 0.0, 0.1 + 0.2 - 0.3], 0.5)
    assert (found.p, found.difference, found.standard_error, found.note) == (1.0, 0.0, 0.0, "")


@pytest.mark.parametrize(("differences", "ratio"), [([], 0.5), ([0.1, float("nan"), 0.1], 0.5), ([0.1] * 3, 0.0)])
def test_what_cannot_be_tested_is_said(differences: list[float], ratio: float) -> None:
    with pytest.raises(SettingsError, match="no paired test"):
        paired_test(differences, ratio)


def test_holm_by_hand() -> None:
    """Sorted 0.01, 0.03, 0.04 times 3, 2, 1; none below the one before it."""
    assert holm([0.01, 0.04, None, 0.03]) == pytest.approx([0.03, 0.06, None, 0.06])
    assert holm([0.6, 0.5]) == [1.0, 1.0]
    assert holm([None]) == [None]
    assert holm([]) == []


def test_table_against_the_first() -> None:
    table = significance(folds(evercell=[0.9, 0.8, 0.7], linear=[0.8, 0.8, 0.65], knn=[0.5, 0.6, 0.8]))
    assert table["method"].tolist() == ["evercell", "linear", "knn"]
    first, linear, knn = table.to_dict("records")
    assert first["mean"] == pytest.approx(0.8) and first["sd"] == pytest.approx(0.1)
    assert [first[name] for name in ("difference", "standard_error", "p", "p_holm", "folds_better")] == [None] * 5
    expected = paired_test([-0.1, 0.0, -0.05], 20 / 80)
    assert linear["difference"] == pytest.approx(-0.05) and linear["p"] == pytest.approx(expected.p)
    assert linear["standard_error"] == pytest.approx(expected.standard_error)
    assert (linear["folds_better"], linear["folds_worse"]) == (0, 2)
    assert (knn["folds_better"], knn["folds_worse"]) == (1, 2)
    assert [linear["p_holm"], knn["p_holm"]] == pytest.approx(holm([linear["p"], knn["p"]]))
    json.dumps(table.to_dict("records"), allow_nan=False)
    other = significance(folds(evercell=[0.9, 0.8, 0.7], linear=[0.8, 0.8, 0.65]), first="linear")
    assert other["method"].tolist() == ["linear", "evercell"]
    assert other["difference"].iloc[1] == pytest.approx(0.05) and other["p"].iloc[1] == pytest.approx(expected.p)


def test_seeds_of_a_fold_are_one_result() -> None:
    """Ten runs of two folds are two folds, not ten."""
    once = folds(evercell=[0.9, 0.8, 0.7], scanvi=[0.8, 0.6, 0.7])
    more = once[once["method"] == "scanvi"].copy()
    more["accuracy"] += 0.1
    table = significance(pd.concat([once, more]))
    assert table["folds"].tolist() == [3, 3]
    assert table["difference"].iloc[1] == pytest.approx(-0.05)


def test_a_fold_that_failed_is_left_out_of_its_pair_only() -> None:
    table = significance(folds(evercell=[0.9, 0.8, 0.7, 0.6], a=[0.8, np.nan, 0.7, 0.5], b=[0.8, 0.7, 0.65, 0.5]))
    assert table["folds"].tolist() == [4, 3, 4]
    assert table["mean"].iloc[1] == pytest.approx(2.0 / 3)
    assert table["difference"].iloc[1] == pytest.approx(-0.2 / 3)
    alone = significance(folds(evercell=[0.9, 0.8], a=[np.nan, np.nan]))
    assert alone["note"].iloc[1] == "no fold in common" and alone["mean"].iloc[1] is None


def test_tables_that_say_nothing() -> None:
    with pytest.raises(SettingsError, match="no `macro_f1`"):
        significance(folds(evercell=[0.9]), "macro_f1")
    with pytest.raises(SettingsError, match="is empty"):
        significance(folds(evercell=[0.9]).iloc[:0])
    with pytest.raises(SettingsError, match="no results of `scanvi`"):
        significance(folds(evercell=[0.9]), first="scanvi")

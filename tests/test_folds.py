"""Folds that keep donors whole and copies of cells on one side."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.sparse import csr_matrix, vstack

from evercell.errors import LabelsError, SettingsError
from evercell.folds import make_folds, twins_of

LABELS = np.array(["a"] * 60 + ["b"] * 30 + ["c"] * 10)
DONORS = np.array([f"donor {i % 6}" for i in range(100)])


def counts(n_cells: int = 100, n_genes: int = 200, seed: int = 0) -> csr_matrix:
    return csr_matrix(np.random.default_rng(seed).poisson(0.5, (n_cells, n_genes)).astype(np.float32))


def test_donors_are_kept_whole_and_every_cell_is_tested_once() -> None:
    folds = make_folds(LABELS, DONORS, n_folds=3)
    seen = np.zeros(len(LABELS), dtype=int)
    for (training, tested), held_out in zip(folds, folds.held_out, strict=True):
        seen[tested] += 1
        assert not set(DONORS[training]) & set(DONORS[tested])
        assert set(held_out) == set(DONORS[tested])
        assert len(training) + len(tested) == len(LABELS)
    assert (seen == 1).all()
    assert folds.by == "groups"
    assert folds.warnings == ()


def test_random_folds_have_every_types_share() -> None:
    folds = make_folds(LABELS, n_folds=5, seed=3)
    for _, tested in folds:
        assert [(LABELS[tested] == name).sum() for name in "abc"] == [12, 6, 2]
    assert make_folds(LABELS, n_folds=5, seed=3).of.tolist() == folds.of.tolist()
    assert make_folds(LABELS, n_folds=5, seed=4).of.tolist() != folds.of.tolist()


def test_twins_are_cells_of_the_same_counts() -> None:
    first = counts(20)
    both = vstack([first, counts(20, seed=1), first[[3, 4]]], format="csr")
    numbers = twins_of(both)
    assert numbers[40] == numbers[3]
    assert numbers[41] == numbers[4]
    assert len(np.unique(numbers)) == 40
    nearly_empty = csr_matrix((5, 200), dtype=np.float32)
    assert len(np.unique(twins_of(nearly_empty))) == 5


def test_random_folds_of_twins_are_refused() -> None:
    twins = np.concatenate([np.arange(50), np.arange(50)])
    with pytest.raises(LabelsError, match=r"of 100 cells are tested while a copy of them, the same counts") as error:
        make_folds(LABELS, n_folds=5, twins=twins)
    assert "--twins together" in str(error.value.hint)
    told = make_folds(LABELS, n_folds=5, twins=twins, when_twins="apart")
    assert told.leaked > 50
    assert told.copies == 100
    assert "too good" in told.warnings[0]


def test_twins_kept_together_leak_nothing() -> None:
    twins = np.concatenate([np.arange(50), np.arange(50)])
    folds = make_folds(LABELS, n_folds=5, twins=twins, when_twins="together")
    assert folds.leaked == 0
    assert (folds.of[:50] == folds.of[50:]).all()
    # a copy in another donor ties both donors into one
    pair = np.arange(100)
    pair[1] = 0
    tied = make_folds(LABELS, DONORS, n_folds=3, twins=pair, when_twins="together")
    both = np.isin(DONORS, [DONORS[0], DONORS[1]])
    assert len(np.unique(tied.of[both])) == 1


def test_twins_within_a_donor_are_no_leak() -> None:
    twins = np.arange(100)
    twins[6] = 0  # of the same donor
    folds = make_folds(LABELS, DONORS, n_folds=3, twins=twins)
    assert (folds.leaked, folds.copies) == (0, 2)


@pytest.mark.parametrize(
    ("groups", "n_folds", "message", "hint"),
    [
        (None, 1, "1 folds leave nothing", "--folds 2"),
        (None, 101, "101 folds need as many cells; there are 100", "--folds 100"),
        (DONORS, 7, "7 folds need as many groups; there are 6: `donor 0`", "--folds 6"),
        (np.full(100, "one"), 2, "2 folds need as many groups; there are 1: `one`", "--by stratified"),
    ],
)
def test_a_number_of_folds_that_cannot_be_is_refused(groups: object, n_folds: int, message: str, hint: str) -> None:
    with pytest.raises(SettingsError, match=message) as error:
        make_folds(LABELS, groups, n_folds=n_folds)  # type: ignore[arg-type]
    assert hint in str(error.value.hint)

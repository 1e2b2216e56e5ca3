"""Example bank: exact quotas, balanced choice, joined banks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.sparse import csr_matrix

from evercell.bank import ExampleBank, balanced_rows, quotas

sizes_of_types = st.lists(st.integers(0, 60), min_size=1, max_size=12)


@given(sizes_of_types, st.integers(0, 500))
def test_quotas_are_exact(sizes: list[int], total: int) -> None:
    kept = quotas(sizes, total)
    assert kept.sum() == min(total, sum(sizes))
    assert (kept >= 0).all()
    assert (kept <= sizes).all()


@given(sizes_of_types, st.integers(0, 500))
def test_no_type_is_emptied(sizes: list[int], total: int) -> None:
    """A known fault of the published system: ties emptied a type from the bank."""
    present = np.array(sizes) > 0
    if total >= present.sum():
        assert (quotas(sizes, total)[present] > 0).all()


@given(sizes_of_types, st.integers(0, 500))
def test_shares_are_equal_where_there_are_cells_enough(sizes: list[int], total: int) -> None:
    kept = quotas(sizes, total)
    cut = kept < np.array(sizes)  # these types had more to give
    if cut.any():
        assert kept[cut].max() - kept[cut].min() <= 1
        assert (kept[~cut] <= kept[cut].min() + 1).all()


def test_what_a_small_type_leaves_goes_to_the_larger() -> None:
    assert quotas([100, 100, 4], 100).tolist() == [48, 48, 4]
    assert quotas([], 10).tolist() == []


@given(st.lists(st.integers(0, 5), min_size=1, max_size=80), st.integers(0, 100), st.integers(0, 5))
def test_balanced_rows_follow_the_quotas(codes: list[int], total: int, seed: int) -> None:
    array = np.array(codes)
    rows = balanced_rows(array, total, np.random.default_rng(seed))
    assert (np.diff(rows) > 0).all()
    found = np.bincount(array[rows], minlength=array.max() + 1)
    assert found.tolist() == quotas(np.bincount(array).tolist(), total).tolist()
    assert rows.tolist() == balanced_rows(array, total, np.random.default_rng(seed)).tolist()


def test_no_cells_give_no_rows() -> None:
    assert balanced_rows(np.zeros(0, dtype=np.int64), 10, np.random.default_rng(0)).tolist() == []


@pytest.fixture
def bank() -> ExampleBank:
    counts = csr_matrix(np.arange(20, dtype=np.float32).reshape(5, 4))
    measured = np.array([[True, True, False, True], [True, True, True, True], [False, True, True, True]])
    return ExampleBank(
        counts, np.array([0, 1, 0, 2, 1]), np.array([1, 1, 1, 2, 2]), np.array([0, 1, 0, 2, 2]), measured
    )


def test_taken_cells_keep_what_is_known_of_them(bank: ExampleBank) -> None:
    rows = np.array([4, 0])
    part = bank.taken(rows)
    assert len(part) == 2
    assert part.counts.toarray().tolist() == bank.counts[rows].toarray().tolist()
    assert part.codes.tolist() == [1, 0]
    assert part.stages.tolist() == [2, 1]
    assert len(part.measured) == 2  # the study without cells is gone
    assert part.measured[part.studies].tolist() == bank.measured[bank.studies[rows]].tolist()
    assert len(bank.taken(np.zeros(0, dtype=int))) == 0


def test_joined_banks_keep_old_cells_and_widen_their_genes(bank: ExampleBank) -> None:
    other = ExampleBank(
        csr_matrix(np.ones((2, 6), dtype=np.float32)), np.array([3, 3]), np.array([3, 3]), np.array([0, 0]),
        np.ones((1, 6), dtype=bool),
    )  # fmt: skip
    both = bank.joined(other)
    assert len(both) == 7
    assert both.counts.shape == (7, 6)
    assert both.counts[:5, :4].toarray().tolist() == bank.counts.toarray().tolist()
    assert both.counts[:5, 4:].nnz == 0
    assert both.codes.tolist() == [0, 1, 0, 2, 1, 3, 3]
    assert not both.measured[both.studies[:5]][:, 4:].any()  # new genes were not measured then
    assert both.measured[both.studies[5:]].all()
    assert len(bank) == 5
    assert bank.counts.shape == (5, 4)

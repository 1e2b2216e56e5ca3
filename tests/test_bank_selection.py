"""Which cells the bank keeps: exact numbers, ties, and what each rule looks for."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evercell.bank import quotas
from evercell.bank_selection import SELECTIONS, selected_rows
from evercell.errors import SettingsError


def chosen(
    how: str, codes: np.ndarray, total: int, features: np.ndarray, stages: np.ndarray | None = None
) -> np.ndarray:
    return selected_rows(
        codes,
        np.ones(len(codes), dtype=int) if stages is None else stages,
        total,
        how=how,
        features=features,
        rows_of_types=np.ones((codes.max() + 1, features.shape[1])),
        rng=np.random.default_rng(0),
    )


@pytest.mark.parametrize("how", list(SELECTIONS))
@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(1, 3)), min_size=1, max_size=60),
    st.integers(0, 80),
    st.booleans(),
)
def test_numbers_are_exact_even_where_all_cells_are_alike(
    how: str, given_cells: list[tuple[int, int]], total: int, alike: bool
) -> None:
    """A known fault of the published system: ties emptied a type from the bank."""
    codes, stages = np.array(given_cells).T
    features = np.ones((len(codes), 3)) if alike else np.random.default_rng(1).normal(size=(len(codes), 3))
    rows = chosen(how, codes, total, features, stages)
    assert (np.diff(rows) > 0).all()
    sizes = np.bincount(codes)
    assert np.bincount(codes[rows], minlength=len(sizes)).tolist() == quotas(sizes.tolist(), total).tolist()
    assert chosen(how, codes, total, features, stages).tolist() == rows.tolist()


@pytest.mark.parametrize("how", list(SELECTIONS))
def test_an_earlier_stage_is_not_crowded_out(how: str) -> None:
    stages = np.repeat([1, 2], [30, 970])
    rows = chosen(how, np.zeros(1000, dtype=int), 40, np.random.default_rng(2).normal(size=(1000, 4)), stages)
    assert (stages[rows] == 1).sum() == 20


def test_nearest_takes_those_in_the_direction_of_the_row() -> None:
    features = np.array([[1.0, 1.0], [5.0, 5.1], [1.0, -1.0], [-1.0, -1.0], [0.0, 1.0]])
    assert chosen("nearest", np.zeros(5, dtype=int), 2, features).tolist() == [0, 1]


def test_herding_follows_the_mean_and_kcentre_the_rim() -> None:
    rng = np.random.default_rng(3)
    features = rng.normal(size=(400, 5)) * np.array([5.0, 1, 1, 1, 1])
    codes = np.zeros(400, dtype=int)
    means = {how: features[chosen(how, codes, 20, features)].mean(axis=0) for how in SELECTIONS}
    away = {how: np.linalg.norm(mean - features.mean(axis=0)) for how, mean in means.items()}
    assert away["herding"] < 0.1 < away["random"]
    rows = chosen("kcentre", codes, 20, features)

    def farthest(kept: np.ndarray) -> float:
        return float(np.linalg.norm(features[:, None] - features[kept], axis=2).min(axis=1).max())

    assert farthest(rows) < farthest(chosen("random", codes, 20, features))


def test_a_rule_that_is_not_there_is_told() -> None:
    with pytest.raises(SettingsError, match="no selection `best`"):
        chosen("best", np.zeros(3, dtype=int), 2, np.ones((3, 2)))

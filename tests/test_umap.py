"""The map of a report: near cells are near on it, and it is the same for the same cells."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.manifold import trustworthiness

from evercell.annotation import embed
from evercell.annotator import Annotator
from evercell.reporting.umap import NEIGHBOURS, umap
from evercell.testing import synthetic_cells


def groups(n_cells: int = 400, n_groups: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """Cells of some groups in 40 dimensions, of which two matter less than noise, and the group of each."""
    draws = np.random.default_rng(3)
    of = draws.integers(0, n_groups, n_cells)
    centres = draws.normal(0, 4, (n_groups, 40))
    return (centres[of] + draws.normal(0, 1, (n_cells, 40))).astype(np.float32), of


def test_groups_are_islands_and_near_cells_are_near() -> None:
    space, of = groups()
    points = umap(space, seed=0)
    assert points.shape == (400, 2) and np.isfinite(points).all()
    assert trustworthiness(space, points, n_neighbors=15) > 0.8
    centres = np.array([points[of == one].mean(axis=0) for one in range(5)])
    nearest = np.linalg.norm(points[:, None] - centres[None], axis=2).argmin(axis=1)
    assert (nearest == of).all()
    widest = max(np.linalg.norm(points[of == one] - centres[one], axis=1).max() for one in range(5))
    assert np.ptp(points) < 200 and widest < np.ptp(points) / 2


def test_a_line_is_not_torn() -> None:
    """Cells along one path: from one to the next it is never far on the map."""
    along = np.linspace(0, 30, 300)
    bent = np.column_stack([along, np.sin(along / 5) * 3, np.random.default_rng(0).normal(0, 0.2, 300)])
    points = umap(bent, seed=0)
    steps = np.linalg.norm(np.diff(points, axis=0), axis=1)
    assert steps.max() < np.ptp(points) / 5
    assert trustworthiness(bent, points, n_neighbors=15) > 0.95


def test_types_of_a_model_are_apart(model: Annotator) -> None:
    cells = synthetic_cells(200, seed=4)
    space = embed(model, cells)
    points = umap(space, seed=0)
    assert trustworthiness(space, points, n_neighbors=15) > 0.85


def test_the_same_cells_and_seed_give_the_same_map() -> None:
    space, _ = groups(120)
    before = space.copy()
    one, again, other = umap(space, seed=1), umap(space, seed=1), umap(space, seed=2)
    assert (one == again).all() and (one != other).any()
    assert (space == before).all()


@pytest.mark.parametrize(
    "space",
    [
        np.random.default_rng(0).normal(size=(NEIGHBOURS, 8)),  # the fewest cells
        np.random.default_rng(0).normal(size=(40, 1)),  # one dimension
        np.zeros((60, 4)),  # cells that are all alike
        np.repeat(np.random.default_rng(0).normal(size=(3, 4)), 30, axis=0),  # groups of such
        np.random.default_rng(0).normal(size=(50, 4)) * 1e-20,
        np.random.default_rng(0).normal(size=(50, 4)) * 1e15,
    ],
    ids=["few", "one dimension", "alike", "groups alike", "tiny", "huge"],
)
def test_odd_cells_have_places(space: np.ndarray) -> None:
    points = umap(space.astype(np.float32), seed=0)
    assert points.shape == (len(space), 2) and np.isfinite(points).all()
    assert len(np.unique(points, axis=0)) == len(space)

"""Random views of training cells."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_matrix

from evercell.augmentation import Augmentation
from evercell.errors import SettingsError

N_GENES = 200
NOTHING = Augmentation(gene_dropout=0.0, thinning=0.0, panels=0.0, max_genes=N_GENES)


def cells(n_cells: int = 30, seed: int = 0) -> csr_matrix:
    rng = np.random.default_rng(seed)
    counts = rng.poisson(rng.gamma(0.5, 6.0, (n_cells, N_GENES)))
    counts[0] = 0
    counts[1] = 0
    counts[1, 7] = 1  # one count in all
    return csr_matrix(counts.astype(np.float32))


MEASURED = np.ones(N_GENES, dtype=bool)


def test_without_any_change_a_view_is_the_cells() -> None:
    counts = cells()
    view = NOTHING.view(counts, MEASURED, np.random.default_rng(0))
    assert (view.counts != counts).nnz == 0
    np.testing.assert_array_equal(view.totals, np.asarray(counts.sum(axis=1)).ravel())
    assert view.measured.all()


@settings(max_examples=40, deadline=None)
@given(
    st.builds(
        Augmentation,
        gene_dropout=st.floats(0, 1),
        thinning=st.floats(0, 1),
        least_depth=st.floats(0.01, 1),
        panels=st.floats(0, 1),
        smallest_panel=st.integers(1, 300),
        max_genes=st.integers(1, 300),
    ),
    st.integers(0, 100),
)
def test_a_view_shows_a_part_of_the_cells_and_empties_none(augmentation: Augmentation, seed: int) -> None:
    counts = cells()
    before = counts.copy()
    view = augmentation.view(counts, MEASURED, np.random.default_rng(seed))
    assert (counts != before).nnz == 0
    assert view.counts.shape == counts.shape
    assert view.counts.has_sorted_indices
    assert (view.counts.data > 0).all()
    assert (view.counts.toarray() <= counts.toarray()).all()
    shown, had = np.diff(view.counts.indptr), np.diff(counts.indptr)
    assert ((shown > 0) == (had > 0)).all()
    assert view.totals.dtype == np.float32
    assert (view.totals + 1e-3 >= np.asarray(view.counts.sum(axis=1)).ravel()).all()
    again = augmentation.view(counts, MEASURED, np.random.default_rng(seed))
    assert (again.counts != view.counts).nnz == 0


def test_gene_dropout_hides_genes_and_leaves_depth() -> None:
    counts = cells()
    view = Augmentation(gene_dropout=0.9, thinning=0, panels=0).view(counts, MEASURED, np.random.default_rng(1))
    assert view.counts.nnz < 0.8 * counts.nnz
    np.testing.assert_array_equal(view.totals, np.asarray(counts.sum(axis=1)).ravel())
    kept = view.counts.toarray() > 0
    np.testing.assert_array_equal(view.counts.toarray()[kept], counts.toarray()[kept])


def test_thinning_lowers_depth_to_the_least_asked() -> None:
    counts = cells(400)
    view = Augmentation(gene_dropout=0, thinning=1, least_depth=0.25, panels=0, max_genes=N_GENES).view(
        counts, MEASURED, np.random.default_rng(1)
    )
    totals = np.asarray(counts.sum(axis=1)).ravel()
    share = view.totals[2:] / totals[2:]
    assert share.min() > 0.18
    assert share.max() <= 1
    assert 0.4 < np.median(share) < 0.6  # log-uniform between a quarter and one
    np.testing.assert_array_equal(view.totals, np.asarray(view.counts.sum(axis=1)).ravel())


def test_a_panel_is_one_for_the_batch_and_normalised_over_itself() -> None:
    counts = cells()
    views = [
        Augmentation(gene_dropout=0, thinning=0, panels=1, smallest_panel=50, max_genes=N_GENES).view(
            counts, MEASURED, np.random.default_rng(seed)
        )
        for seed in range(30)
    ]
    sizes = [int(view.measured.sum()) for view in views]
    assert 50 <= min(sizes) < 75
    assert max(sizes) > 150
    for view in views:
        rows = slice(2, None)  # the first two cells have next to nothing to lose
        np.testing.assert_array_equal(view.counts[rows].toarray(), counts[rows].toarray() * view.measured)
        np.testing.assert_array_equal(view.totals[rows], (counts[rows].toarray() * view.measured).sum(axis=1))


def test_a_panel_holds_only_genes_that_were_measured() -> None:
    measured = MEASURED.copy()
    measured[100:] = False
    augmentation = Augmentation(panels=1, smallest_panel=20)
    view = augmentation.view(cells()[:, :].multiply(measured).tocsr(), measured, np.random.default_rng(0))
    assert not view.measured[100:].any()
    assert view.measured.sum() < 100


def test_at_most_about_max_genes_are_shown() -> None:
    view = Augmentation(gene_dropout=0, thinning=0, panels=0, max_genes=20).view(
        cells(200), MEASURED, np.random.default_rng(0)
    )
    shown = np.diff(view.counts.indptr)[2:]
    assert 18 < shown.mean() < 22


@pytest.mark.parametrize(
    "wrong",
    [
        {"gene_dropout": 1.2},
        {"thinning": -0.1},
        {"panels": 2.0},
        {"least_depth": 0.0},
        {"smallest_panel": 0},
        {"max_genes": 0},
    ],
)
def test_impossible_settings_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(SettingsError, match=next(iter(wrong))):
        Augmentation(**wrong)  # type: ignore[arg-type]

"""What every compared method promises; a new file in the registry is tested unseen, where its packages are."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse

from evercell.comparison import METHODS, Method, Prediction, Query, Reference
from evercell.testing import synthetic_cells


def split(n_types: int = 3, seed: int = 1) -> tuple[Reference, Query, np.ndarray]:
    """Cells of two made-up studies, and the true types of the second."""
    known, asked = (synthetic_cells(n, n_genes=200, n_types=n_types, seed=seed + n) for n in (150, 60))
    columns = {name: cells.obs["cell_type"].astype(str).to_numpy() for name, cells in (("r", known), ("q", asked))}
    reference = Reference(known.X, columns["r"], known.obs["donor"].to_numpy(), known.var_names.to_numpy())
    return reference, Query(asked.X, np.full(asked.n_obs, "another")), columns["q"]


SLOW = {"scanvi"}  # trains three networks


@pytest.fixture(params=[pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in METHODS])
def method(request: pytest.FixtureRequest) -> Method:
    found = METHODS[request.param]
    if found.missing():
        pytest.skip(f"{found.missing()} not installed")
    return found()


def check(prediction: Prediction, reference: Reference, query: Query) -> None:
    n_cells = len(query.batches)
    assert prediction.labels.shape == prediction.confidence.shape == (n_cells,)
    assert set(prediction.labels) <= set(reference.labels)
    assert np.isfinite(prediction.confidence).all()
    assert ((prediction.confidence >= 0) & (prediction.confidence <= 1)).all()
    assert prediction.seconds_train > 0
    assert prediction.seconds_annotate > 0
    if prediction.rejected is not None:
        assert prediction.rejected.shape == (n_cells,)
        assert prediction.rejected.dtype == bool


def test_types_that_can_be_told_apart_are_told_apart(method: Method) -> None:
    reference, query, truth = split()
    prediction = method(reference, query, 0)
    check(prediction, reference, query)
    assert (prediction.labels == truth).mean() > 0.9


def test_what_is_given_stays_as_it_was(method: Method) -> None:
    reference, query, _ = split()
    parts = [reference.counts, query.counts]
    before = [part.copy() for part in parts]
    labels = reference.labels.copy()
    method(reference, query, 0)
    assert all((one != two).nnz == 0 for one, two in zip(parts, before, strict=True))
    np.testing.assert_array_equal(reference.labels, labels)


def test_the_seed_says_what_the_answer_is(method: Method) -> None:
    """The same seed, the same answer; another seed changes nothing where the method calls itself deterministic."""
    reference, query, _ = split()
    first = method(reference, query, 0)
    np.random.random(3)  # noqa: NPY002 (what others have drawn must not matter)
    again = method(reference, query, 1 if method.deterministic else 0)
    np.testing.assert_array_equal(first.labels, again.labels)
    np.testing.assert_array_equal(first.confidence, again.confidence)


def test_awkward_cells_are_labelled_too(method: Method) -> None:
    """Two types, one of them of a single cell, names as people write them; cells without counts; columns unsorted."""
    reference, query, _ = split(n_types=2)
    types = np.unique(reference.labels)
    rows = np.r_[np.flatnonzero(reference.labels == types[0]), np.flatnonzero(reference.labels == types[1])[:1]]
    names = np.array(["unlabelled", "T/NK cell (CD8+), 2"])
    counts = sparse.csr_matrix(query.counts, copy=True)
    counts.data[: counts.indptr[2]] = 0
    counts.indices[counts.indptr[4] : counts.indptr[5]] = counts.indices[counts.indptr[4] : counts.indptr[5]][::-1]
    counts.data[counts.indptr[4] : counts.indptr[5]] = counts.data[counts.indptr[4] : counts.indptr[5]][::-1]
    counts.has_sorted_indices = False
    small = Reference(
        reference.counts[rows],
        names[(reference.labels[rows] == types[1]).astype(int)],
        reference.batches[rows],
        reference.genes,
    )
    check(method(small, Query(counts, reference.batches[: len(query.batches)]), 0), small, query)


@pytest.mark.parametrize("name", list(METHODS))
def test_it_says_what_it_needs(name: str) -> None:
    found = METHODS[name]
    assert found.needs
    assert isinstance(found.deterministic, bool)
    assert found.__doc__
    assert found.available() == (not found.missing())
    if found.available():
        assert found.version().startswith(found.needs[0])

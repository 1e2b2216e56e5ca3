"""The compared methods one by one; what all of them promise is in ``tests/contracts/test_compared_methods.py``."""

from __future__ import annotations

import logging
import os
import random
import subprocess
import sys
from importlib import metadata

import numpy as np
import pytest
from scipy import sparse

from evercell.comparison import METHODS, Method, Prediction, Query, Reference, available, log_normalise
from evercell.comparison.base import quiet
from evercell.errors import CellsError, GenesError, LabelsError, SettingsError

COUNTS = sparse.csr_matrix(np.array([[3, 1, 0], [0, 2, 2], [0, 0, 0], [5, 0, 0]], dtype=np.float32))
GENES = np.array(["INS", "GCG", "SST"])
LABELS = np.array(["beta", "alpha", "beta", "beta"])
BATCHES = np.full(4, "donor1")


def skip_without(name: str) -> None:
    if METHODS[name].missing():
        pytest.skip(f"{METHODS[name].missing()} not installed")


class _Absent(Method):
    """Needs what nobody has."""

    needs = ("no-such-package", "numpy")

    def annotate(self, reference: Reference, query: Query, seed: int) -> Prediction:
        raise AssertionError("called without its package")


class _Broken(Method):
    """Is installed and cannot be imported."""

    needs = ("numpy",)

    def annotate(self, reference: Reference, query: Query, seed: int) -> Prediction:
        raise ImportError("cannot import name `parse_use_gpu_arg`")


def test_what_is_not_installed_is_named_with_the_way_to_get_it() -> None:
    assert not _Absent.available()
    with pytest.raises(SettingsError, match=r"`no-such-package`, not installed") as caught:
        _Absent()(Reference(COUNTS, LABELS, BATCHES, GENES), Query(COUNTS, BATCHES))
    assert "numpy" not in caught.value.message
    assert 'pip install "evercell[bench]"' in str(caught.value)
    with pytest.raises(SettingsError):
        _Absent.version()


def test_what_cannot_be_imported_is_an_error_of_its_own() -> None:
    with pytest.raises(SettingsError, match=r"`numpy` is installed and cannot be imported: .*parse_use_gpu_arg"):
        _Broken()(Reference(COUNTS, LABELS, BATCHES, GENES), Query(COUNTS, BATCHES))


def test_available_names_what_is_installed_in_order() -> None:
    assert available()[:2] == ["linear", "knn"]
    assert available() == [name for name in METHODS if not METHODS[name].missing()]
    assert METHODS["linear"].version() == f"scikit-learn {metadata.version('scikit-learn')}"


def test_only_scanvi_depends_on_the_seed() -> None:
    assert [name for name in METHODS if not METHODS[name].deterministic] == ["scanvi"]


def test_asking_what_is_available_imports_nothing_heavy() -> None:
    heavy = ("torch", "scanpy", "sklearn", "matplotlib", "celltypist", "scvi", "singler")
    code = (
        "import sys\nfrom evercell.comparison import METHODS, available\n"
        "available(), [METHODS[name].deterministic for name in METHODS]\n"
        f"print(*[name for name in {heavy} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


def test_a_reference_says_what_is_wrong_with_it() -> None:
    with pytest.raises(CellsError, match=r"3 labels for 4 cells"):
        Reference(COUNTS, LABELS[:3], BATCHES, GENES)
    with pytest.raises(CellsError, match=r"3 batches for 4 cells"):
        Query(COUNTS, BATCHES[:3])
    with pytest.raises(CellsError, match=r"the query holds no cells"):
        Query(COUNTS[:0], BATCHES[:0])
    with pytest.raises(GenesError, match=r"3 columns of counts and 2 gene names"):
        Reference(COUNTS, LABELS, BATCHES, np.array(["INS", "GCG", "INS"]))
    with pytest.raises(GenesError, match=r"no gene is left"):
        Reference(COUNTS[:, :0], LABELS, BATCHES, GENES[:0])
    with pytest.raises(LabelsError, match=r"1 cell types; at least two"):
        Reference(COUNTS, np.full(4, "beta"), BATCHES, GENES)
    with pytest.raises(GenesError, match=r"the query has 2 genes, the reference 3"):
        METHODS["linear"]()(Reference(COUNTS, LABELS, BATCHES, GENES), Query(COUNTS[:, :2], BATCHES))


def test_log_normalised_by_hand() -> None:
    logged = log_normalise(COUNTS).toarray()
    np.testing.assert_allclose(logged[0], np.log1p([7500.0, 2500.0, 0.0]), rtol=1e-6)
    np.testing.assert_array_equal(logged[2], 0.0)
    assert COUNTS.toarray()[0].tolist() == [3, 1, 0]


def test_linear_is_logistic_regression_on_log_counts() -> None:
    from sklearn.linear_model import LogisticRegression

    prediction = METHODS["linear"]()(Reference(COUNTS, LABELS, BATCHES, GENES), Query(COUNTS, BATCHES))
    proba = LogisticRegression(max_iter=300).fit(log_normalise(COUNTS), LABELS).predict_proba(log_normalise(COUNTS))
    np.testing.assert_allclose(prediction.confidence, proba.max(axis=1))
    assert prediction.labels.tolist() == ["beta", "alpha", "beta", "beta"]


def test_knn_is_a_share_of_the_neighbours() -> None:
    """With fewer cells than neighbours all of them vote."""
    rng = np.random.default_rng(0)
    counts = sparse.csr_matrix(rng.poisson(2.0, (6, 30)).astype(np.float32))
    reference = Reference(counts, np.repeat(["a", "b"], [4, 2]), np.full(6, "one"), np.arange(30))
    prediction = METHODS["knn"]()(reference, Query(counts, np.full(6, "one")))
    assert prediction.labels.tolist() == ["a"] * 6
    np.testing.assert_allclose(prediction.confidence, 4 / 6)


def test_scanvi_leaves_random_states_and_environment_as_they_were() -> None:
    """Invariant 6, though scvi-tools seeds everything there is."""
    skip_without("scanvi")
    import scvi
    import torch

    rng = np.random.default_rng(0)
    counts = sparse.csr_matrix(rng.poisson(1.0, (30, 40)).astype(np.float32))
    reference = Reference(counts, np.repeat(["a", "b"], 15), np.repeat(["x", "y", "x"], 10), np.arange(40))

    def drawn() -> tuple[float, ...]:
        return random.random(), np.random.random(), torch.rand(1).item()  # noqa: NPY002, S311

    def state() -> tuple[object, ...]:
        flags = torch.backends.cudnn
        logged = logging.getLogger().level, len(logging.getLogger().handlers), logging.getLogger("scvi").level
        return dict(os.environ), flags.deterministic, flags.benchmark, scvi.settings.seed, logged

    def seeded() -> None:
        random.seed(5)
        np.random.seed(5)  # noqa: NPY002
        torch.manual_seed(5)

    seeded()
    expected, before = drawn(), state()
    seeded()
    METHODS["scanvi"]()(reference, Query(counts, np.full(30, "z")), 3)
    assert drawn() == expected
    assert state() == before


def test_quiet_puts_the_loggers_back() -> None:
    root, own = logging.getLogger(), logging.getLogger("evercell.test.quiet")
    before = root.level, root.handlers[:]
    with quiet("evercell.test.quiet"):
        assert own.level == logging.ERROR
        logging.basicConfig(level=logging.DEBUG, force=True)  # as some packages do when they are imported
    assert (root.level, root.handlers, own.level) == (*before, logging.NOTSET)

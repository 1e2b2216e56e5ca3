"""What a compared method is given, what it answers, and what it says of itself."""

from __future__ import annotations

import logging
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from typing import ClassVar

import numpy as np
from scipy import sparse

from evercell.errors import CellsError, GenesError, LabelsError, SettingsError


@dataclass(frozen=True, eq=False)
class Reference:
    """Labelled cells, over the genes that all studies of the comparison share.

    Parameters
    ----------
    counts
        Raw counts (N, G), CSR.
    labels
        Cell type of every cell (N,); at least two types.
    batches
        Donor or batch of every cell (N,); one name for all where nothing is known.
    genes
        Name of every gene (G,), each once.

    Raises
    ------
    CellsError, LabelsError, GenesError
        Lengths differ, there are no cells or genes, or there is one type only.
    """

    counts: sparse.csr_matrix
    labels: np.ndarray
    batches: np.ndarray
    genes: np.ndarray

    def __post_init__(self) -> None:
        _store(self, counts=self.counts, labels=self.labels, batches=self.batches, genes=self.genes)
        if len(self.genes) != self.counts.shape[1] or len(set(self.genes)) != len(self.genes):
            raise GenesError(
                f"the reference has {self.counts.shape[1]:,} columns of counts and {len(set(self.genes)):,} gene names",
                hint="name every gene once; add up columns of one gene",
            )
        if not len(self.genes):
            raise GenesError("no gene is left to compare methods on", hint="give studies that share genes")
        if len(np.unique(self.labels)) < 2:
            raise LabelsError(
                f"the reference holds {len(np.unique(self.labels))} cell types; at least two are needed",
                hint="check the column of labels, or give more cells",
            )


@dataclass(frozen=True, eq=False)
class Query:
    """Cells to be annotated, over the genes of the reference; their labels are not here.

    Parameters
    ----------
    counts
        Raw counts (M, G), CSR.
    batches
        Donor or batch of every cell (M,).
    """

    counts: sparse.csr_matrix
    batches: np.ndarray

    def __post_init__(self) -> None:
        _store(self, counts=self.counts, batches=self.batches)


def _store(cells: Reference | Query, *, counts: sparse.csr_matrix, **columns: np.ndarray) -> None:
    """Set counts as CSR and columns as text, and check that every column has one entry a cell."""
    object.__setattr__(cells, "counts", sparse.csr_matrix(counts))
    for name, column in columns.items():
        object.__setattr__(cells, name, np.asarray(column).astype(str).astype(object))
        if name != "genes" and len(column) != counts.shape[0]:
            raise CellsError(f"{len(column):,} {name} for {counts.shape[0]:,} cells; one a cell is needed")
    if not counts.shape[0]:
        raise CellsError(f"the {type(cells).__name__.lower()} holds no cells")


@dataclass(frozen=True, eq=False)
class Prediction:
    """What a method says of the query's cells, and what it cost.

    Parameters
    ----------
    labels
        Best label of every cell (M,), whether or not the method rejects the cell.
    confidence
        Confidence in the label (M,), 0 to 1, higher is surer; what it is differs from method to method.
    seconds_train, seconds_annotate
        Wall-clock seconds, imports left out.
    rejected
        Mask of the cells (M,) that the method calls unknown, or None where it does not reject.
    unknown_score
        Higher where a cell is less likely of a known type (M,); ``1 - confidence`` where None.
    """

    labels: np.ndarray
    confidence: np.ndarray
    seconds_train: float
    seconds_annotate: float
    rejected: np.ndarray | None = None
    unknown_score: np.ndarray | None = None


class Method(ABC):
    """A way to annotate a query from a reference; called like a function.

    Attributes
    ----------
    needs
        Distributions that must be installed; the first gives the version that results are reported with.
    deterministic
        Whether the answer is the same for every seed, so that one run is enough.
    """

    needs: ClassVar[tuple[str, ...]]
    deterministic: ClassVar[bool] = True

    @classmethod
    def missing(cls) -> list[str]:
        """Distributions that it needs and that are not installed; nothing is imported."""
        return [name for name in cls.needs if not _installed(name)]

    @classmethod
    def available(cls) -> bool:
        """Whether everything that it needs is installed."""
        return not cls.missing()

    @classmethod
    def version(cls) -> str:
        """Package and version behind it, for example ``"celltypist 1.7.1"``."""
        cls.check()
        return f"{cls.needs[0]} {metadata.version(cls.needs[0])}"

    @classmethod
    def check(cls) -> None:
        """Raise `SettingsError` where something that it needs is not installed."""
        if missing := cls.missing():
            raise SettingsError(
                f"the method needs {' and '.join(f'`{name}`' for name in missing)}, not installed here",
                hint='pip install "evercell[bench]", or leave the method out',
            )

    def __call__(self, reference: Reference, query: Query, seed: int = 0) -> Prediction:
        """Learn from the reference and label every cell of the query.

        Raises
        ------
        SettingsError
            A package is not installed, or is and cannot be imported.
        GenesError
            Reference and query have not the same number of genes.
        """
        self.check()
        if query.counts.shape[1] != len(reference.genes):
            raise GenesError(
                f"the query has {query.counts.shape[1]:,} genes, the reference {len(reference.genes):,}",
                hint="bring both to the genes that they share, in one order",
            )
        try:
            return self.annotate(reference, query, seed)
        except ImportError as error:
            raise SettingsError(
                f"`{self.needs[0]}` is installed and cannot be imported: {error}",
                hint='pip install --upgrade "evercell[bench]", or leave the method out',
            ) from error

    @abstractmethod
    def annotate(self, reference: Reference, query: Query, seed: int) -> Prediction:
        """As ``__call__``, for what has been checked. Heavy packages are imported here, before the clock starts."""


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def log_normalise(counts: sparse.csr_matrix) -> sparse.csr_matrix:
    """log(1 + counts per 10,000) over the given genes; a cell without counts stays zero."""
    totals = np.asarray(counts.sum(axis=1)).ravel()
    logged = sparse.csr_matrix(sparse.diags(1e4 / np.maximum(totals, 1.0)) @ counts, dtype=np.float32)
    logged.data = np.log1p(logged.data)
    return logged


def best(probabilities: np.ndarray, types: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Most probable type of every cell and its probability, from probabilities (M, K) of `types` (K,)."""
    return np.asarray(types)[probabilities.argmax(axis=1)], probabilities.max(axis=1)


@contextmanager
def quiet(*loggers: str) -> Iterator[None]:
    """Without warnings and without the chatter of other packages; the root logger is as before when it ends.

    Some packages set the root logger up when they are imported, after which every library's notes reach the user.
    """
    root = logging.getLogger()
    before = root.level, root.handlers[:]
    levels = {name: logging.getLogger(name).level for name in loggers}
    try:
        for name in loggers:
            logging.getLogger(name).setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        root.setLevel(before[0])
        root.handlers[:] = before[1]
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)

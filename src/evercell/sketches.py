"""Sketches: means and covariances of cell types in the place of example cells, for data that must not leave its owner.

Of every type of a stage a sketch keeps how many cells there were, mean and covariance of their representations, the
mean share of a cell's counts that each gene has, a few directions in which these shares vary together, how much each
varies besides, and how deep the cells were sequenced. Later stages draw from it: representations, which the head learns
again, and made-up cells, for whatever needs counts.

What is promised: no count of a cell is kept, only sums over at least `LEAST_CELLS` cells, and nothing of a gene that
fewer than `LEAST_EXPRESSING` cells of the type express. What is not: there is no formal differential privacy. Someone
who has all cells of a type but one can work out what that one adds to the sums, and weights too are learnt from cells.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

import numpy as np
from scipy.sparse import csr_matrix, vstack

from evercell.bank import ExampleBank
from evercell.celltypes import CellTypes
from evercell.errors import LabelsError
from evercell.tokenizers.base import TOTAL

LEAST_CELLS = 10
"""Cells of a type from which on it is sketched: a mean over fewer says too much of each."""
LEAST_EXPRESSING = 3
"""Cells of the type that must express a gene for its share to be kept."""
SHRINKAGE = 50.0
"""Cells for which the covariance of all types of the stage counts, beside those of the type."""
PROGRAMS = 5
"""Most directions of joint variation that are kept of a type: one for every `CELLS_A_PROGRAM` of its cells."""
CELLS_A_PROGRAM = 20
MOST_DISPERSION = 20.0
DRAWN = 1000
"""Draws of all types together, where cells of sketched stages are needed."""
RIDGE = 1e-4  # of the mean variance, added to every variance: a few cells have none in most directions


@dataclass(frozen=True)
class Sketch:
    """Sums over the cells of types, one entry a stage and type (E).

    Parameters
    ----------
    codes, stages, sizes
        Type code, stage (from 1) and number of cells of each entry (E,), int64.
    means, covariances
        Of the representations (E, D) and (E, D, D), float32. A covariance is shrunk towards that of all types of the
        stage, so a type of few cells has a whole one.
    shares
        Mean share of a cell's counts that each gene has (E, G), float32.
    programs
        Directions in which the shares of a type vary together (E, `PROGRAMS`, G), float32, each for a step of one
        standard deviation; 0 where there are fewer.
    dispersions
        What each gene varies besides (E, G), float32: ``variance = mean + dispersion mean^2``.
    depths
        Mean and standard deviation of the logarithm of a cell's counts (E, 2), float32.
    measured
        Genes that the studies of the entry measured (E, G), bool.
    """

    codes: np.ndarray
    stages: np.ndarray
    sizes: np.ndarray
    means: np.ndarray
    covariances: np.ndarray
    shares: np.ndarray
    programs: np.ndarray
    dispersions: np.ndarray
    depths: np.ndarray
    measured: np.ndarray

    def __len__(self) -> int:
        return len(self.codes)

    @classmethod
    def of(cls, cells: ExampleBank, representation: np.ndarray) -> Sketch:
        """Sketch of cells of one stage with representations (N, D); types of too few cells are left out."""
        x = representation.astype(np.float64)
        sizes = np.bincount(cells.codes)
        types = np.flatnonzero(sizes >= LEAST_CELLS)
        rows = [np.flatnonzero(cells.codes == code) for code in types]
        width, n_genes = x.shape[1], cells.counts.shape[1]
        means = np.stack([x[of_type].mean(axis=0) for of_type in rows]) if rows else np.zeros((0, width))
        within = [np.cov(x[of_type].T, bias=True).reshape(width, width) for of_type in rows]
        pooled = sum((len(r) * one for r, one in zip(rows, within, strict=True)), np.zeros((width, width)))
        pooled /= max(sum(map(len, rows)), 1)
        pooled += (RIDGE * np.trace(pooled) / width + 1e-9) * np.eye(width)
        covariances = [
            (len(r) * one + SHRINKAGE * pooled) / (len(r) + SHRINKAGE) for r, one in zip(rows, within, strict=True)
        ]
        expressed = [_expression(cells.counts[of_type]) for of_type in rows]
        return cls(
            codes=types,
            stages=np.array([cells.stages[r[0]] for r in rows], dtype=np.int64),
            sizes=sizes[types],
            means=means.astype(np.float32),
            covariances=np.array(covariances, dtype=np.float32).reshape(-1, width, width),
            shares=np.array([one[0] for one in expressed], dtype=np.float32).reshape(-1, n_genes),
            programs=np.array([one[1] for one in expressed], dtype=np.float32).reshape(-1, PROGRAMS, n_genes),
            dispersions=np.array([one[2] for one in expressed], dtype=np.float32).reshape(-1, n_genes),
            depths=np.array([one[3] for one in expressed], dtype=np.float32).reshape(-1, 2),
            measured=np.array(
                [cells.measured[np.unique(cells.studies[r])].any(axis=0) for r in rows], dtype=bool
            ).reshape(-1, n_genes),
        )

    def joined(self, other: Sketch) -> Sketch:
        """Entries of both; `other` may know more genes, appended behind those of this one."""
        this = self.widened(other.shares.shape[1])
        return Sketch(**{f.name: np.concatenate([getattr(this, f.name), getattr(other, f.name)]) for f in fields(this)})

    def taken(self, entries: np.ndarray) -> Sketch:
        """Only the entries `entries`."""
        return Sketch(**{f.name: getattr(self, f.name)[entries] for f in fields(self)})

    def widened(self, n_genes: int) -> Sketch:
        """The sketch over a longer gene list; the new genes were not measured."""
        more = ((0, 0), (0, n_genes - self.shares.shape[1]))
        return replace(
            self,
            shares=np.pad(self.shares, more),
            programs=np.pad(self.programs, ((0, 0), *more)),
            dispersions=np.pad(self.dispersions, more),
            measured=np.pad(self.measured, more),
        )

    def moved(self, by: np.ndarray) -> Sketch:
        """The sketch with its representations moved (E, D), after a backbone was trained on."""
        return replace(self, means=(self.means + by).astype(np.float32))

    def numbers(self, total: int) -> np.ndarray:
        """How many draws each entry is given of `total` (E,): types share alike, and the stages share a type's."""
        _, of_type = np.unique(self.codes, return_inverse=True)
        entries = np.bincount(of_type)
        found: np.ndarray = np.maximum(total // (len(entries) * entries[of_type]), 1)
        return found

    def representations(self, numbers: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Gaussian draws (N, D), float32, entry after entry; `rng` alone decides the noise."""
        drawn = [np.zeros((0, self.means.shape[1]), dtype=np.float32)]
        for mean, factor, number in zip(self.means, self.factors(), numbers, strict=True):
            drawn.append(mean + rng.standard_normal((int(number), len(mean)), dtype=np.float32) @ factor.T)
        return np.concatenate(drawn)

    def factors(self) -> np.ndarray:
        """Lower triangles L with ``L L' = covariance`` (E, D, D), float32."""
        return np.linalg.cholesky(self.covariances.astype(np.float64)).astype(np.float32)

    def cells(self, numbers: np.ndarray, rng: np.random.Generator) -> ExampleBank:
        """Made-up cells, entry after entry.

        Depths are log-normal, the shares of genes move along the type's programs, and counts are gamma-Poisson.
        """
        drawn = [csr_matrix((0, self.shares.shape[1]), dtype=np.float32)]
        drawn += [self._drawn(entry, int(number), rng) for entry, number in enumerate(numbers)]
        entries = np.repeat(np.arange(len(self)), numbers)
        return ExampleBank(
            vstack(drawn, format="csr"), self.codes[entries], self.stages[entries], entries, self.measured
        )

    def _drawn(self, entry: int, number: int, rng: np.random.Generator) -> csr_matrix:
        dispersions, (mean, spread) = self.dispersions[entry], self.depths[entry]
        genes = np.flatnonzero(self.shares[entry])
        steps = rng.standard_normal((number, PROGRAMS), dtype=np.float32)
        shares = np.maximum(self.shares[entry, genes] + steps @ self.programs[entry][:, genes], 0.0)
        expected = np.exp(rng.normal(mean, spread, number))[:, None] * shares  # (number, genes)
        varying = np.flatnonzero(dispersions[genes])
        over = dispersions[genes[varying]]
        expected[:, varying] *= rng.gamma(1.0 / over, over, (number, len(varying)))
        counts = rng.poisson(expected).astype(np.float32)
        empty = counts.sum(axis=1) == 0
        if empty.any():
            counts[empty, self.shares[entry, genes].argmax()] = 1.0
        rows, columns = np.nonzero(counts)
        return csr_matrix((counts[rows, columns], (rows, genes[columns])), shape=(number, self.shares.shape[1]))

    def arrays(self) -> dict[str, np.ndarray]:
        """As a model directory stores them, beside `facts`."""
        names = ("means", "covariances", "shares", "programs", "dispersions", "depths", "measured")
        return {name: getattr(self, name).astype(np.uint8 if name == "measured" else np.float32) for name in names}

    def facts(self, types: tuple[str, ...]) -> list[dict[str, object]]:
        """Type, stage and number of cells of each entry, as JSON holds them."""
        rows = zip(self.codes, self.stages, self.sizes, strict=True)
        return [{"type": types[code], "stage": int(stage), "cells": int(size)} for code, stage, size in rows]

    @classmethod
    def stored(cls, arrays: Mapping[str, np.ndarray], facts: list[dict[str, object]], types: tuple[str, ...]) -> Sketch:
        """Sketch that `arrays` and `facts` gave."""
        numbers = np.array([[types.index(str(f["type"])), f["stage"], f["cells"]] for f in facts], dtype=np.int64)
        codes, stages, sizes = numbers.reshape(-1, 3).T
        return cls(codes, stages, sizes, **{**arrays, "measured": arrays["measured"].astype(bool)})


def too_few(codes: np.ndarray, n_types: int) -> np.ndarray:
    """Codes of the types that have cells, but too few to be sketched."""
    sizes = np.bincount(codes, minlength=n_types)
    return np.flatnonzero((sizes > 0) & (sizes < LEAST_CELLS))


def refuse_rare(codes: np.ndarray, rare: np.ndarray, types: CellTypes) -> None:
    """Refuse to sketch types `rare` of the cells with type `codes` (N,).

    Raises
    ------
    LabelsError
        If there are any; all of them are named.
    """
    if len(rare):
        named = ", ".join(f"`{types.names[code]}` ({(codes == code).sum()} cells)" for code in rare)
        raise LabelsError(
            f"too few cells to sketch: {named}; a mean over fewer than {LEAST_CELLS} gives single cells away",
            hint="leave these cells without a label, give them a coarser one, or keep cells with --bank cells",
        )


def _expression(counts: csr_matrix) -> tuple[np.ndarray, np.ndarray, np.ndarray, tuple[float, float]]:
    """Shares (G,), programs (`PROGRAMS`, G), dispersions (G,), mean and spread of the log depth, of cells (n, G)."""
    counts = counts.astype(np.float64)
    totals = np.maximum(np.asarray(counts.sum(axis=1)).ravel(), 1.0)
    hidden = np.bincount(counts.indices, minlength=counts.shape[1]) < LEAST_EXPRESSING
    shares = np.asarray(counts.T @ (1.0 / totals)) / len(totals)
    shares[hidden] = 0.0
    scores = _scores(counts, totals)
    programs = np.zeros((PROGRAMS, counts.shape[1]))
    programs[: scores.shape[1]] = (counts.T @ (scores / totals[:, None])).T / len(totals)
    programs[:, hidden] = 0.0
    # E (x - share d)^2 = share d + dispersion (share d)^2 for a cell of depth d
    sums, products = np.asarray(counts.sum(axis=0)).ravel(), np.asarray(counts.T @ totals)
    squares, depth = np.asarray(counts.multiply(counts).sum(axis=0)).ravel(), np.square(totals).sum()
    beyond = (
        squares - 2.0 * shares * products + np.square(shares) * depth - sums - np.square(programs).sum(axis=0) * depth
    )
    dispersions = np.divide(beyond, np.square(shares) * depth, out=np.zeros_like(shares), where=shares > 0)
    logged = np.log(totals)
    return shares, programs, np.clip(dispersions, 0.0, MOST_DISPERSION), (float(logged.mean()), float(logged.std()))


def _scores(counts: csr_matrix, totals: np.ndarray) -> np.ndarray:
    """Standardised scores (n, at most `PROGRAMS`) on the principal components of the log-normalised counts.

    A component that hangs on fewer than `LEAST_CELLS` cells, by the participation ratio of the squared scores, would
    be their profile; it is left out.
    """
    from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh

    n_cells = counts.shape[0]
    number = min(PROGRAMS, n_cells // CELLS_A_PROGRAM)
    if number == 0:
        return np.zeros((n_cells, 0))
    per_count = np.repeat(TOTAL / totals, np.diff(counts.indptr))
    logged = csr_matrix((np.log1p(counts.data * per_count), counts.indices, counts.indptr), shape=counts.shape)
    mean = np.asarray(logged.mean(axis=0)).ravel()
    if np.square(logged.data).sum() - n_cells * np.square(mean).sum() < RIDGE * n_cells:
        return np.zeros((n_cells, 0))  # all cells alike

    def covered(vector: np.ndarray) -> np.ndarray:
        found = logged @ (logged.T @ (vector - vector.mean()))
        centred: np.ndarray = found - found.mean()
        return centred

    gram = LinearOperator((n_cells, n_cells), matvec=covered, dtype=np.float64)
    try:
        _, vectors = eigsh(gram, k=number, v0=np.linspace(-1.0, 1.0, n_cells), tol=1e-4)
    except ArpackNoConvergence as stopped:
        vectors = stopped.eigenvectors
    carried_by = 1.0 / np.power(vectors, 4).sum(axis=0)
    scores: np.ndarray = vectors[:, carried_by >= LEAST_CELLS] * np.sqrt(n_cells)
    return scores

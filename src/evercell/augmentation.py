"""Random views of training cells: hidden genes, shallower sequencing, smaller panels.

What a model must not depend on between studies is drawn at random in training: which genes a cell happened to show, how
deeply it was sequenced, and which genes the technology could measure at all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.sparse import csr_matrix

from evercell.errors import SettingsError
from evercell.tokenizers.base import View

if TYPE_CHECKING:
    from numpy.random import Generator


@dataclass(frozen=True)
class Augmentation:
    """How training cells are varied.

    Parameters
    ----------
    gene_dropout
        Largest share of a cell's expressed genes hidden; each cell draws its share between 0 and this.
    thinning
        Probability that a cell is thinned to a random depth.
    least_depth
        Smallest share of the counts that thinning keeps; the depth is drawn log-uniformly between this and 1.
    panels
        Probability that a batch of cells is seen through a random panel of genes, normalised over the panel.
    smallest_panel
        Number of genes in the smallest panel; the size is drawn log-uniformly up to all genes.
    max_genes
        A cell shows about this many genes at most, drawn at random, which bounds the time of a training step.
    """

    gene_dropout: float = 0.5
    thinning: float = 0.5
    least_depth: float = 0.2
    panels: float = 0.5
    smallest_panel: int = 500
    max_genes: int = 768

    def __post_init__(self) -> None:
        for name in ("gene_dropout", "thinning", "panels"):
            if not 0 <= getattr(self, name) <= 1:
                raise SettingsError(f"{name} must lie between 0 and 1, not {getattr(self, name)}")
        if not 0 < self.least_depth <= 1:
            raise SettingsError(f"least_depth must lie above 0 and up to 1, not {self.least_depth}")
        if self.smallest_panel < 1 or self.max_genes < 1:
            raise SettingsError(
                f"smallest_panel and max_genes must be at least 1, not {self.smallest_panel} and {self.max_genes}"
            )

    def view(self, counts: csr_matrix, measured: np.ndarray, rng: Generator) -> View:
        """Random view of cells.

        Parameters
        ----------
        counts
            Counts (B, G), CSR.
        measured
            Genes that the cells' study measured (G,), bool.
        rng
            Source of randomness.

        Returns
        -------
        View
            A cell that would lose all its genes keeps what it had at the step before.
        """
        n_cells = counts.shape[0]
        rows = np.repeat(np.arange(n_cells), np.diff(counts.indptr))
        genes, values = counts.indices, counts.data.astype(np.float32)

        if self.panels > 0 and rng.random() < self.panels:
            panel = self._panel(measured, rng)
            rows, genes, values = _kept(panel[genes], rows, genes, values, n_cells)
            measured = panel
        if self.thinning > 0:
            thinned = rng.random(n_cells) < self.thinning
            depth = np.where(thinned, np.exp(rng.uniform(np.log(self.least_depth), 0.0, n_cells)), 1.0)
            values = np.where(thinned[rows], rng.binomial(np.ceil(values).astype(np.int64), depth[rows]), values)
            rows, genes, values = _kept(values > 0, rows, genes, values, n_cells)
        totals = np.bincount(rows, weights=values, minlength=n_cells).astype(np.float32)

        share = 1.0 - rng.uniform(0.0, self.gene_dropout, n_cells)
        n_genes = np.bincount(rows, minlength=n_cells)
        share = np.minimum(share, self.max_genes / np.maximum(n_genes, 1))
        rows, genes, values = _kept(rng.random(len(rows)) < share[rows], rows, genes, values, n_cells)

        indptr = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=n_cells))])
        seen = csr_matrix((values.astype(np.float32), genes, indptr), shape=counts.shape)
        return View(seen, totals, measured)

    def _panel(self, measured: np.ndarray, rng: Generator) -> np.ndarray:
        """Random subset of the measured genes (G,), bool."""
        pool = np.flatnonzero(measured)
        if len(pool) <= self.smallest_panel:
            return measured
        size = int(np.exp(rng.uniform(np.log(self.smallest_panel), np.log(len(pool)))))
        panel = np.zeros_like(measured)
        panel[rng.choice(pool, size, replace=False)] = True
        return panel


def _kept(
    keep: np.ndarray, rows: np.ndarray, genes: np.ndarray, values: np.ndarray, n_cells: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Entries to keep; a cell that would be left with none keeps all it has, each at one count at least."""
    emptied = np.bincount(rows, weights=keep, minlength=n_cells) == 0
    restored = emptied[rows]
    keep = keep | restored
    values = np.where(restored, np.maximum(values, 1.0), values)
    return rows[keep], genes[keep], values[keep]

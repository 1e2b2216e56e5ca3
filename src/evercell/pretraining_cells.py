"""Cells of many studies, labelled or not, brought into one gene order and drawn a study at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix

from evercell import ontology
from evercell.errors import GenesError
from evercell.genes import Alignment, GeneVocabulary, align, canonical_genes
from evercell.pretraining_studies import PretrainingStudy
from evercell.stored_counts import ROWS, column_sizes, stacked

POWERS = {"sqrt": 0.5, "equal": 0.0, "none": 1.0}  # of a number that weighs


@dataclass(frozen=True)
class PretrainingCells:
    """Cells of several studies over a model's genes, in memory or in files (see `stored_counts`).

    Parameters
    ----------
    names
        Name of each study (S).
    counts
        Counts of each study (N_s, G), CSR.
    measured
        Genes that each study measured (S, G), bool.
    codes
        Type code of the cells of each study (N_s,), -1 for a cell without a label; none where no study is labelled.
    types
        Keys of the types (K): one type has one key in all studies (see `type_key`).
    tissues
        Shares of the tissues in each study's cells; none where no tissues were asked for.
    """

    names: tuple[str, ...]
    counts: tuple[csr_matrix, ...]
    measured: np.ndarray
    codes: tuple[np.ndarray, ...] = ()
    types: tuple[str, ...] = ()
    tissues: tuple[Mapping[str, float], ...] = ()

    @property
    def sizes(self) -> np.ndarray:
        """Number of cells of each study (S,)."""
        return np.array([counts.shape[0] for counts in self.counts], dtype=np.int64)

    @cached_property
    def shown(self) -> np.ndarray:
        """Types that each study shows (S, K), bool."""
        shown = np.zeros((len(self.names), len(self.types)), dtype=bool)
        for study, codes in enumerate(self.codes):
            shown[study, codes[codes >= 0]] = True
        return shown

    def draw(self, study: int, n_cells: int, rng: np.random.Generator) -> tuple[csr_matrix, np.ndarray]:
        """Random cells of one study, none twice; fewer where the study has fewer.

        Where the study is labelled, its types are drawn in proportion to the root of their number of cells.

        Returns
        -------
        counts, codes
            (n_cells, G), float32, and (n_cells,), -1 where a cell has no label.
        """
        counts = self.counts[study]
        n_all = counts.shape[0]
        n_cells = min(n_cells, n_all)
        if not self.types or not self.shown[study].any():
            rows = np.sort(rng.choice(n_all, n_cells, replace=False, shuffle=False))
            return counts[rows].astype(np.float32), np.full(n_cells, -1)
        codes = self.codes[study]
        # The smallest of exponential draws, each divided by its cell's weight: a weighted choice, none twice.
        waits = rng.exponential(size=n_all) * np.sqrt(np.bincount(codes + 1)[codes + 1])
        rows = np.sort(np.argpartition(waits, n_cells - 1)[:n_cells])
        return counts[rows].astype(np.float32), codes[rows]

    def spread(self, most: int) -> Iterator[tuple[int, np.ndarray, csr_matrix]]:
        """Study, rows and counts (at most `ROWS`, G), float32, of about `most` evenly spaced cells of all studies."""
        share = min(most / max(int(self.sizes.sum()), 1), 1.0)
        for study, counts in enumerate(self.counts):
            n_all = counts.shape[0]
            rows = np.linspace(0, n_all - 1, int(np.ceil(share * n_all))).astype(int)
            for start in range(0, len(rows), ROWS):
                some = rows[start : start + ROWS]
                yield study, some, counts[some].astype(np.float32)

    def over_genes(self, columns: np.ndarray, store: Path | None = None) -> PretrainingCells:
        """Only the genes `columns`, and only the cells that express one of them; `store` as in `stacked`."""
        kept, rows = [], []
        for counts in self.counts:
            found: list[np.ndarray] = []
            kept.append(stacked(_expressing(counts, columns, found), store))
            rows.append(np.concatenate(found))
        filled = [study for study, expressing in enumerate(rows) if expressing.any()]
        return PretrainingCells(
            tuple(self.names[study] for study in filled),
            tuple(kept[study] for study in filled),
            self.measured[filled][:, columns],
            tuple(self.codes[study][rows[study]] for study in filled) if self.codes else (),
            self.types,
            tuple(self.tissues[study] for study in filled) if self.tissues else (),
        )

    def n_expressing(self) -> np.ndarray:
        """Number of cells of each study that express each gene (S, G)."""
        return np.stack([column_sizes(counts) for counts in self.counts])


def _expressing(counts: csr_matrix, columns: np.ndarray, found: list[np.ndarray]) -> Iterator[csr_matrix]:
    """Blocks of the cells that express one of the genes `columns`; a mask of every block is added to `found`."""
    for start in range(0, counts.shape[0], ROWS):
        block = counts[start : start + ROWS][:, columns].tocsr()
        found.append(np.diff(block.indptr) > 0)
        yield block[found[-1]]


def shared_vocabulary(
    studies: Sequence[PretrainingStudy],
    how: Literal["union", "intersection"],
    *,
    species: str = "auto",
    column: str | None = None,
) -> GeneVocabulary:
    """Genes of any or of all studies; mouse genes beside human ones are brought to their orthologues.

    Raises
    ------
    GenesError
        If the studies share no gene.
    """
    genes = [canonical_genes(study.genes, species=species, column=column) for study in studies]
    found = GeneVocabulary.from_genes(genes, how=how)
    if len(found) == 0:
        raise GenesError(
            f"the {len(studies)} data sets share no gene", hint="take the genes of any of them: vocabulary='union'"
        )
    return found


def gathered(
    studies: Sequence[PretrainingStudy],
    rows: Sequence[np.ndarray],
    vocabulary: GeneVocabulary,
    *,
    species: str = "auto",
    column: str | None = None,
    store: Path | None = None,
) -> PretrainingCells:
    """The cells `rows` of each study over the genes of a vocabulary, without the studies of which none is asked for."""
    names, counts, measured, keys = [], [], [], []
    tissues: list[Mapping[str, float]] = []
    for study, wanted in zip(studies, rows, strict=True):
        if len(wanted) == 0:
            continue
        alignment = align(study.genes, vocabulary, species=species, column=column, name=study.name)
        names.append(study.name)
        counts.append(stacked(_aligned(study.counts, wanted, alignment), store))
        measured.append(alignment.measured)
        labels = np.full(len(wanted), "", dtype=object) if study.labels is None else study.labels[wanted]
        known = {label: type_key(label) for label in np.unique(labels) if label}
        keys.append(np.array([known.get(label, "") for label in labels], dtype=object))
        of_cells = [study.name] if study.tissues is None else study.tissues[wanted]  # not told: a tissue of its own
        shares = pd.Series(of_cells).value_counts(normalize=True)
        tissues.append({str(one): float(share) for one, share in shares.items()})
    types = tuple(sorted({key for of_study in keys for key in of_study} - {""}))
    codes: tuple[np.ndarray, ...] = ()
    if types:
        place = {key: code for code, key in enumerate(types)} | {"": -1}
        codes = tuple(np.array([place[key] for key in of_study], dtype=np.int64) for of_study in keys)
    told = any(study.tissues is not None for study in studies)
    return PretrainingCells(
        tuple(names), tuple(counts), np.stack(measured), codes, types, tuple(tissues) if told else ()
    )


def type_key(label: str) -> str:
    """What studies that write a type differently share: its Cell Ontology id, else its name without case and plural."""
    found = ontology.find(label)
    return found.id if found is not None else ontology.normalised(label)


def study_shares(cells: PretrainingCells, balance: str, tissue_balance: str) -> np.ndarray:
    """Probability with which each study is drawn (S,).

    Parameters
    ----------
    cells
        Of several studies.
    balance
        How the number of its cells weighs a study: see `PretrainingSettings`.
    tissue_balance
        How those weights, summed over the studies of a tissue, weigh the tissue; no matter where tissues are not told.
    """
    weights = cells.sizes ** POWERS[balance]
    if cells.tissues:
        of_tissues = pd.DataFrame(cells.tissues).fillna(0.0).to_numpy() * weights[:, None]  # (S, tissues)
        sums = of_tissues.sum(axis=0)
        weights = (of_tissues / sums * sums ** POWERS[tissue_balance]).sum(axis=1)
    shares: np.ndarray = weights / weights.sum()
    return shares


def _aligned(counts: csr_matrix, rows: np.ndarray, alignment: Alignment) -> Iterator[csr_matrix]:
    for start in range(0, len(rows), ROWS):
        yield alignment.apply(counts[rows[start : start + ROWS]])

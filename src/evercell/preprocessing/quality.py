"""Which cells are good enough: numbers of each cell, the thresholds they must pass, and doublets."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import scipy.sparse as sp

from evercell.errors import CellsError, SettingsError, words_of
from evercell.labels import listed
from evercell.normalisation import called
from evercell.progress import progress

if TYPE_CHECKING:
    from anndata import AnnData

    from evercell.preprocessing.settings import PreprocessingSettings

GENES, COUNTS, MITO = "n_genes_by_counts", "total_counts", "pct_counts_mt"  # Scanpy's names
SCORE, DOUBLET = "doublet_score", "predicted_doublet"
BOUNDS = ("genes_low", "genes_high", "counts_low", "counts_high", "mito_high")
LEAST_MAD = 30  # a median and a deviation of fewer cells say little: those of all batches are taken
LEAST_SCRUBLET = 100  # doublets are simulated from the cells of a batch; fewer have no neighbours to tell them by
MANY_DOUBLETS = 0.25  # a share of called doublets above this is more often a bad threshold than a bad run
ONE_BATCH = "all cells"
NO_BATCH = "(none)"


@dataclass(frozen=True)
class Step:
    """What one step left of the cells and the genes; `rule` is what it asks for, in words."""

    name: str
    rule: str
    cells_before: int
    cells_after: int
    genes_before: int
    genes_after: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def batches_of(adata: AnnData, key: str | None, name: str) -> np.ndarray:
    """Batch of each cell (N,), strings; one for all where no column is named."""
    if key is None:
        return np.full(adata.n_obs, ONE_BATCH, dtype=object)
    column = _column(adata, key, name, "--batch")
    return np.asarray(column.astype("object").where(column.notna(), NO_BATCH).astype(str), dtype=object)


def training_cells(adata: AnnData, given: str | None, name: str) -> np.ndarray:
    """Which cells thresholds and genes are estimated on (N,), bool: by a column of truths, or ``KEY=VALUE``."""
    if given is None:
        return np.ones(adata.n_obs, dtype=bool)
    key, equals, value = (given, "", "") if given in adata.obs else given.partition("=")
    column = _column(adata, key, name, "--training")
    words = column.astype("object").where(column.notna(), "").astype(str)
    if equals:
        found = (words == value).to_numpy()
        if not found.any():
            values = listed(sorted(words.unique()))
            raise SettingsError(f"no cell of {called(name)} has `{value}` in `{key}`; it holds {values}",
                                hint="name one of these with --training KEY=VALUE")  # fmt: skip
        return np.asarray(found)
    truths = words.str.lower()
    if not truths.isin(["true", "false"]).all():
        values = listed(sorted(words.unique()), 4)
        raise SettingsError(f"column `{key}` of {called(name)} is not made of true and false; it holds {values}",
                            hint=f"say which value marks training cells: --training {key}=VALUE")  # fmt: skip
    found = (truths == "true").to_numpy()
    if not found.any():
        raise SettingsError(f"column `{key}` of {called(name)} marks no training cell", hint="change --training")
    return np.asarray(found)


def _column(adata: AnnData, key: str, name: str, option: str) -> pd.Series:
    if key not in adata.obs:
        have = listed(map(str, adata.obs.columns), 12) or "none"
        raise SettingsError(f"{called(name)} has no column `{key}` in obs; columns: {have}",
                            hint=f"name one of these with {option}")  # fmt: skip
    column: pd.Series = adata.obs[key]
    return column


def cell_metrics(
    counts: sp.csr_matrix, cells: pd.Index, mitochondrial: np.ndarray, told: np.ndarray, batches: np.ndarray
) -> pd.DataFrame:
    """Genes, counts and mitochondrial share of each cell.

    Parameters
    ----------
    counts
        (N, G), CSR, no stored zeros.
    cells
        Their names (N).
    mitochondrial
        Which genes are (G,), bool.
    told
        Cells whose mitochondrial genes were measured (N,), bool. The share of the others is missing.
    batches
        Batch of each cell (N,).
    """
    totals = np.asarray(counts.sum(axis=1, dtype=np.float64)).ravel()
    mito = np.asarray(counts[:, np.flatnonzero(mitochondrial)].sum(axis=1, dtype=np.float64)).ravel()
    shares = np.where(told, 100 * mito / np.maximum(totals, 1e-12), np.nan)
    genes = np.diff(counts.indptr).astype(np.int64)
    return pd.DataFrame({"batch": batches, GENES: genes, COUNTS: totals, MITO: shares}, index=cells)


def mad_bounds(metrics: pd.DataFrame, deviations: float) -> dict[str, float]:
    """Median plus and minus so many median absolute deviations, of log1p genes and counts, and of the share (upper).

    The deviation is not scaled, as in Heumos et al., Nature Reviews Genetics 2023. Missing where more than half of the
    cells have the same value: every other cell would be an outlier.
    """
    found = dict.fromkeys(BOUNDS, float("nan"))
    for column, word in ((GENES, "genes"), (COUNTS, "counts")):
        logs = np.log1p(metrics[column].to_numpy(dtype=np.float64))
        middle = np.median(logs)
        width = deviations * float(np.median(np.abs(logs - middle)))
        if width > 0:
            found[f"{word}_low"] = float(np.expm1(middle - width))
            found[f"{word}_high"] = float(np.expm1(middle + width))
    shares = metrics[MITO].dropna().to_numpy()
    if len(shares):
        middle = np.median(shares)
        width = deviations * float(np.median(np.abs(shares - middle)))
        if width > 0:
            found["mito_high"] = float(middle + width)
    return found


class QualityFilter:
    """Thresholds put on the cells one after the other; what each of them did is kept for the table.

    Parameters
    ----------
    metrics
        See `cell_metrics`.
    settings
        The thresholds.
    n_genes
        For the table.
    name
        What messages call the data.
    """

    def __init__(self, metrics: pd.DataFrame, settings: PreprocessingSettings, n_genes: int, name: str) -> None:
        self.metrics, self.settings, self.name = metrics, settings, name
        self.n_genes = n_genes
        self.kept = np.ones(len(metrics), dtype=bool)
        self.bounds: dict[str, dict[str, float]] = {}
        self.steps: list[Step] = []
        self.notes: list[str] = []
        self.warnings: list[str] = []

    def fixed(self) -> None:
        """The thresholds that are the same for every cell."""
        asked, of = self.settings, self.metrics
        self._ask("genes a cell", "--min-genes", asked.min_genes or None, of[GENES], "genes", lower=True)
        self._ask("counts a cell", "--min-counts", asked.min_counts, of[COUNTS], "counts", lower=True)
        self._ask("counts a cell", "--max-counts", asked.max_counts, of[COUNTS], "counts", lower=False)
        unknown = int(of[MITO].isna().sum())
        if unknown < len(of):
            self._ask("mitochondrial share", "--max-mito", asked.max_mito, of[MITO], "%", lower=False)
        if unknown and (asked.max_mito is not None or asked.mad is not None):
            whose = "cells" if unknown == len(of) else f"{unknown:,} cells whose source measured none"
            self.notes.append(
                f"no mitochondrial gene was measured: {whose} are not filtered by their mitochondrial share"
            )

    def _ask(self, name: str, option: str, value: float | None, of: pd.Series, unit: str, *, lower: bool) -> None:
        if value is None:
            return
        passed = ~(of < value if lower else of > value).to_numpy()  # what is missing passes
        median = f"the median is {of[self.kept].median():,.{1 if unit == '%' else 0}f}"
        percent = " %" if unit == "%" else ""
        rule = f"{'at least' if lower else 'at most'} {value:,g}{percent or f' {unit}'}"
        mend = f"{'lower' if lower else 'raise'} {option}, which is {value:g}: {median}{percent}"
        self.drop(passed, name, rule, mend)

    def drop(self, passed: np.ndarray, name: str, rule: str, mend: str) -> None:
        """Keep the cells that pass; an error where none is left, a warning where most of them went."""
        before = int(self.kept.sum())
        self.kept = self.kept & passed
        after = int(self.kept.sum())
        if not after:
            raise CellsError(f"no cell of {called(self.name)} is left: `{name}, {rule}` removed the last {before:,}",
                             hint=mend)  # fmt: skip
        self.steps.append(Step(name, rule, before, after, self.n_genes, self.n_genes))
        if 2 * after < before:
            self.warnings.append(
                f"`{name}, {rule}` removed {before - after:,} of {before:,} cells; if they are good, {mend}"
            )

    def genes_left(self, name: str, rule: str, genes: int) -> None:
        """A step that removed genes only."""
        cells = int(self.kept.sum())
        self.steps.append(Step(name, rule, cells, cells, self.n_genes, genes))
        self.n_genes = genes

    def look_back(self) -> None:
        """A warning where the steps together, none of them alone, removed most of the cells."""
        before, after = len(self.kept), int(self.kept.sum())
        if 2 * after < before and not any(2 * s.cells_after < s.cells_before for s in self.steps):
            worst = max(self.steps, key=lambda step: step.cells_before - step.cells_after)
            many = worst.cells_before - worst.cells_after
            self.warnings.append(
                f"{before - after:,} of {before:,} cells were removed, most of them ({many:,}) by "
                f"`{worst.name}, {worst.rule}`"
            )

    def relative(self, training: np.ndarray, stored: Mapping[str, float] | None) -> dict[str, float] | None:
        """Bounds by median absolute deviations in every batch, from its training cells that are left.

        Returns the bounds over all batches, which batches with few cells get; `stored` are those of an earlier file.
        """
        if self.settings.mad is None:
            return None
        told = self.kept & training
        if not told.any() and stored is None:
            raise CellsError(f"no training cell of {called(self.name)} passes the thresholds", hint="change --training")
        pooled = dict(stored) if stored is not None else mad_bounds(self.metrics[told], self.settings.mad)
        few, passed = [], np.ones(len(self.kept), dtype=bool)
        batches = self.metrics["batch"].to_numpy()
        for batch in pd.unique(batches[self.kept]):
            rows = batches == batch
            if (rows & told).sum() >= LEAST_MAD:
                bounds = mad_bounds(self.metrics[rows & told], self.settings.mad)
            else:
                bounds = pooled
                few.append(batch)
            self.bounds[str(batch)] = bounds
            # A missing bound is passed by all; a cell on the bound is inside, whatever the logarithm rounds.
            low, high = 1 - 1e-9, 1 + 1e-9
            for column, word in ((GENES, "genes"), (COUNTS, "counts")):
                passed &= ~(rows & (self.metrics[column] < bounds[f"{word}_low"] * low).to_numpy())
                passed &= ~(rows & (self.metrics[column] > bounds[f"{word}_high"] * high).to_numpy())
            passed &= ~(rows & (self.metrics[MITO] > bounds["mito_high"] * high).to_numpy())
        if few and (len(self.bounds) > 1 or stored is not None):
            whose = "the file the settings were made on" if stored is not None else "all batches together"
            self.notes.append(f"{listed(few)}: fewer than {LEAST_MAD} cells to tell outliers by, bounds of {whose}")
        flat = [b for b, one in self.bounds.items() if np.isnan([one["genes_low"], one["counts_low"]]).any()]
        if flat:
            self.notes.append(f"{listed(flat)}: more than half of the cells have the same number of genes or counts")
        steady = [b for b, one in self.bounds.items() if np.isnan(one["mito_high"])]
        if steady and self.metrics[MITO].notna().any():
            self.notes.append(f"{listed(steady)}: more than half of the cells have the same mitochondrial share; "
                              "it tells no outliers")  # fmt: skip
        rule = f"within {self.settings.mad:g} median absolute deviations"
        self.drop(passed, "outliers of their batch", rule, f"raise --mad, which is {self.settings.mad:g}")
        return pooled

    def doublets(self, counts: sp.csr_matrix, limits: dict[str, dict[str, float]]) -> None:
        """Score the cells that are left, and drop doublets where that was asked for; thresholds go into `limits`."""
        rows = np.flatnonzero(self.kept)
        scored, thresholds, notes = score_doublets(counts[rows], self.metrics.iloc[rows], seed=self.settings.seed)
        self.notes += notes
        self.metrics[SCORE] = scored[SCORE].reindex(self.metrics.index)
        self.metrics[DOUBLET] = scored[DOUBLET].reindex(self.metrics.index, fill_value=False)
        for batch, threshold in thresholds.items():
            limits.setdefault(batch, {})["doublet_score"] = threshold
        if self.settings.doublets == "drop":
            singlets = ~self.metrics[DOUBLET].to_numpy(dtype=bool)
            self.drop(singlets, "doublets", "not called by Scrublet", "pass --doublets score and look at the scores")
        elif thresholds:
            self.notes.append(
                f"Scrublet calls {int(scored[DOUBLET].sum()):,} of {len(rows):,} cells doublets; all are kept"
            )


def check_doublets() -> None:
    """Whether what Scrublet needs is installed, said before the work."""
    if importlib.util.find_spec("skimage") is None:
        raise SettingsError("doublets need the package scikit-image", hint="pip install evercell[doublets]")


@progress("scoring doublets")
def score_doublets(
    counts: sp.csr_matrix, metrics: pd.DataFrame, *, seed: int
) -> tuple[pd.DataFrame, dict[str, float], list[str]]:
    """Scrublet (Wolock et al., Cell Systems 2019) as Scanpy has it, on each batch by itself.

    Returns
    -------
    tuple
        Score and call of each cell (missing and False where it was not scored), threshold of each batch, notes.
    """
    import scanpy as sc
    from anndata import AnnData

    found = pd.DataFrame({SCORE: np.nan, DOUBLET: False}, index=metrics.index)
    thresholds: dict[str, float] = {}
    few, notes = [], []
    batches = metrics["batch"].to_numpy()
    for batch in pd.unique(batches):
        rows = np.flatnonzero(batches == batch)
        if len(rows) < LEAST_SCRUBLET:
            few.append(batch)
            continue
        part = AnnData(counts[rows].copy(), obs=pd.DataFrame(index=metrics.index[rows]))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                sc.pp.scrublet(part, random_state=seed, verbose=False)
        except (ValueError, KeyError) as error:  # too few genes that vary; no threshold between two modes
            what = words_of(error)
            notes.append(f"doublets of `{batch}` were not scored: Scrublet stopped with {what}")
            continue
        scores = part.obs[SCORE].reindex(part.obs_names).to_numpy(dtype=np.float64)
        found.iloc[rows, 0] = scores
        threshold = part.uns["scrublet"].get("threshold")
        if threshold is None:
            notes.append(f"doublets of `{batch}` were scored but not called: Scrublet found no threshold")
            continue
        called_doublets = scores > threshold
        found.iloc[rows, 1] = called_doublets
        thresholds[str(batch)] = float(threshold)
        if (share := called_doublets.mean()) > MANY_DOUBLETS:
            notes.append(f"Scrublet calls {share:.0%} of `{batch}` doublets, more than droplets usually hold: "
                         "look at the scores before they are dropped")  # fmt: skip
    if few:
        notes.append(f"doublets of {listed(few)} were not scored: fewer than {LEAST_SCRUBLET} cells")
    return found, thresholds, notes

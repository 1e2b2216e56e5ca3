"""The usual way from counts to values for plots and clusters, kept with its settings: `preprocess`.

Cells are filtered, then genes, then counts are normalised, log-transformed and variable genes chosen, with Scanpy's
functions. What was learnt on the way (which genes) is kept and brings any later file through the same steps.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from evercell import __version__
from evercell.cells import find_counts
from evercell.errors import CellsError, SettingsError, words_of
from evercell.genes import CanonicalGenes, canonical_genes
from evercell.normalisation import called
from evercell.outputs import atomic_path
from evercell.preprocessing.genes import (
    assembled,
    expressed_genes,
    logged,
    matched_genes,
    measured_by_all,
    measures_mitochondria,
    normalised,
    with_variable_genes,
)
from evercell.preprocessing.quality import (
    COUNTS,
    DOUBLET,
    GENES,
    MITO,
    SCORE,
    QualityFilter,
    Step,
    batches_of,
    cell_metrics,
    check_doublets,
    training_cells,
)
from evercell.preprocessing.settings import LOGS, PreprocessingSettings

if TYPE_CHECKING:
    import pandas as pd
    import scipy.sparse as sp
    from anndata import AnnData

__all__ = ["Preprocessed", "Preprocessing", "PreprocessingSettings", "preprocess"]

FORMAT_VERSION = 1
KEY = "evercell_preprocessing"  # in uns


@dataclass(frozen=True)
class Preprocessing:
    """Settings, and what was learnt with them from the training cells of one file: which genes, which are variable.

    Fixed thresholds hold for later files as they are. Bounds by median absolute deviations say what is usual in a
    batch: every file tells its own, and a batch with too few cells for that gets `bounds`. Doublets too are told anew.

    Parameters
    ----------
    settings
        See `PreprocessingSettings`.
    names, ids, symbols
        Name in the file, canonical name and symbol of each gene that was kept (G); totals are taken over these.
    species
        ``human`` or ``mouse``.
    variable
        Names of the variable genes; None where none were asked for.
    bounds
        Bounds by median absolute deviations over all training cells; None where they were not asked for.
    """

    settings: PreprocessingSettings
    names: tuple[str, ...]
    ids: tuple[str, ...]
    symbols: tuple[str, ...]
    species: str
    variable: tuple[str, ...] | None = None
    bounds: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        if not self.names or len({len(self.names), len(self.ids), len(self.symbols)}) != 1:
            raise SettingsError("the genes of a preprocessing need a name, a canonical name and a symbol each")
        if len(set(self.names)) != len(self.names):
            raise SettingsError("a gene of a preprocessing is named twice")
        if not set(self.variable or ()) <= set(self.names):
            raise SettingsError("variable genes of a preprocessing are not among its genes")

    def apply(
        self,
        adata: AnnData,
        *,
        batch: str | None = None,
        layer: str | None = None,
        species: str = "auto",
        gene_column: str | None = None,
        name: str = "the data",
    ) -> Preprocessed:
        """Bring a later file through the same steps: same thresholds, same genes, nothing estimated that is stored.

        The genes are matched by their canonical names, those of the other species through orthologues. A gene that this
        file did not measure is there as a column of zeros, False in ``var["measured"]``, and a note names it.

        Parameters
        ----------
        adata, batch, layer, species, gene_column, name
            As of `preprocess`.

        Raises
        ------
        CellsError, GenesError, SettingsError
            As `preprocess`; too few of the genes match.
        """
        given = _Given(adata, batch, None, layer, species, gene_column, name)
        return _run(given, self.settings, self)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "format_version": FORMAT_VERSION,
            "evercell_version": __version__,
            "settings": self.settings.to_dict(),
            "species": self.species,
            "bounds": None if self.bounds is None else _finite(self.bounds),
            "variable": None if self.variable is None else list(self.variable),
            "names": list(self.names),
            "ids": list(self.ids),
            "symbols": list(self.symbols),
        }

    @classmethod
    def from_dict(cls, stored: Any) -> Preprocessing:
        """What `to_dict` gave; an error where it is something else."""
        if not isinstance(stored, dict) or not isinstance(stored.get("settings"), dict):
            raise SettingsError("this is no preprocessing: there are no settings in it")
        if not isinstance(version := stored.get("format_version"), int) or version > FORMAT_VERSION:
            raise SettingsError(f"it has format version {version}; this evercell reads up to {FORMAT_VERSION}",
                                hint="update evercell")  # fmt: skip
        texts: dict[str, tuple[str, ...]] = {}
        for key in ("names", "ids", "symbols", "variable"):
            value = stored.get(key)
            if value is None and key == "variable":
                continue
            if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
                raise SettingsError(f"`{key}` is damaged: a list of names was expected")
            texts[key] = tuple(value)
        bounds = stored.get("bounds")
        if bounds is not None and not (
            isinstance(bounds, dict) and all(one is None or isinstance(one, int | float) for one in bounds.values())
        ):
            raise SettingsError("`bounds` are damaged: numbers were expected")
        if stored.get("species") not in ("human", "mouse"):
            raise SettingsError(f"`{stored.get('species')}` is no species of evercell; human or mouse was expected")
        return cls(
            PreprocessingSettings.from_dict(stored["settings"]),
            **{key: texts[key] for key in ("names", "ids", "symbols")},
            species=stored["species"],
            variable=texts.get("variable"),
            bounds=None if bounds is None else {k: math.nan if v is None else float(v) for k, v in bounds.items()},
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a ``.json`` file, whole or not at all."""
        if Path(path).suffix != ".json":
            raise SettingsError(f"`{path}` does not end in .json", hint="give the settings this suffix")
        with atomic_path(path) as unfinished:
            unfinished.write_text(json.dumps(self.to_dict(), ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Preprocessing:
        """Read a ``.json`` of `save`, or what `preprocess` left in the ``.h5ad`` or ``.zarr`` that it made."""
        path = Path(path)
        if not path.exists():
            raise SettingsError(f"`{path}` does not exist", hint="check the path")
        hint = "give the .json of --settings-out, or a file that `evercell preprocess` wrote"
        if path.suffix not in (".json", ".h5ad", ".zarr"):
            raise SettingsError(f"`{path}` holds no preprocessing that can be read", hint=hint)
        try:
            text = path.read_text(encoding="utf-8") if path.suffix == ".json" else _text_in(path)
            stored = json.loads(text)
        except (OSError, KeyError, ValueError) as error:
            raise SettingsError(f"`{path}` holds no preprocessing: {words_of(error)}", hint=hint) from error
        try:
            return cls.from_dict(stored)
        except SettingsError as error:
            raise SettingsError(f"`{path}`: {error.message}", hint=error.hint or hint) from error


def _text_in(path: Path) -> str:
    """The text that `preprocess` left in a file of cells, without reading the cells."""
    if path.suffix == ".h5ad":
        import h5py

        with h5py.File(path) as file:
            return str(file[f"uns/{KEY}"].asstr()[()])
    import zarr
    from anndata.io import read_elem

    return str(read_elem(zarr.open_group(str(path), mode="r")[f"uns/{KEY}"]))


@dataclass(frozen=True)
class Preprocessed:
    """What `preprocess` made; unpacks into `cells` and `preprocessing`.

    Parameters
    ----------
    cells
        The cells and genes that are left: normalised values in ``X``, counts in ``layers["counts"]``.
    preprocessing
        What brings later files through the same steps.
    steps
        What each step removed.
    notes, warnings
        What is worth knowing, and what asks for a look at the thresholds.
    before
        Genes, counts, mitochondrial share, doublet score and batch of all cells of the file, and which were `kept`.
    limits
        Bounds by median absolute deviations, and the threshold of doublet scores, of each batch.
    """

    cells: AnnData
    preprocessing: Preprocessing
    steps: tuple[Step, ...]
    notes: tuple[str, ...]
    warnings: tuple[str, ...]
    before: pd.DataFrame
    limits: Mapping[str, Mapping[str, float]]

    def __iter__(self) -> Iterator[Any]:
        yield from (self.cells, self.preprocessing)

    def rows(self) -> list[list[str]]:
        """Table of the steps, for people: step, what it asks for, cells and genes before and after."""
        return [
            [s.name, s.rule, *(f"{n:,}" for n in (s.cells_before, s.cells_after, s.genes_before, s.genes_after))]
            for s in self.steps
        ]

    def write_plots(self, path: str | os.PathLike[str]) -> None:
        """Draw the numbers of all cells and of those kept, by batch: ``.png``, ``.pdf`` or ``.svg``."""
        from evercell.preprocessing.plots import write_plots

        write_plots(self.before, path, settings=self.preprocessing.settings.to_dict(), limits=self.limits)


def preprocess(
    adata: AnnData,
    settings: PreprocessingSettings | None = None,
    *,
    batch: str | None = None,
    training: str | None = None,
    layer: str | None = None,
    species: str = "auto",
    gene_column: str | None = None,
    name: str = "the data",
) -> Preprocessed:
    """Filter cells and genes, normalise, log-transform and choose variable genes, with Scanpy.

    `train`, `update` and `annotate` start from the counts and need none of this. It is for a look at the cells, for
    other programs, and to leave bad cells out before a training.

    Parameters
    ----------
    adata
        Cells; the counts are searched for, whatever ``X`` holds. It is not changed.
    settings
        See `PreprocessingSettings`.
    batch
        Column of obs: outliers, doublets and variable genes are told in each batch by itself.
    training
        Column of obs that is true for training cells, or ``KEY=VALUE``. Whatever is estimated (medians, which genes are
        expressed, which are variable) is estimated on these cells only, then used for all.
    layer, species, gene_column
        See `find_counts` and `canonical_genes`.
    name
        File name, for messages.

    Returns
    -------
    Preprocessed
        Its `cells` keep all that was in the AnnData. New in ``obs``: ``n_genes_by_counts``, ``total_counts``,
        ``pct_counts_mt``, ``doublet_score``, ``predicted_doublet``; in ``var``: ``mt``, ``n_cells``,
        ``highly_variable`` and Scanpy's numbers beside it.

    Raises
    ------
    CellsError, GenesError, SettingsError
        No counts; no cell or gene is left; a column is not there; Scrublet's package is missing.

    Examples
    --------
    >>> from evercell.testing import synthetic_cells
    >>> cells, steps = preprocess(synthetic_cells(100), PreprocessingSettings(min_genes=20))
    >>> later, _ = steps.apply(synthetic_cells(50, seed=3))
    >>> bool((later.var_names == cells.var_names).all())
    True
    """
    given = _Given(adata, batch, training, layer, species, gene_column, name)
    return _run(given, settings or PreprocessingSettings(), None)


@dataclass(frozen=True)
class _Given:
    """What `preprocess` and `apply` are called with."""

    adata: AnnData
    batch: str | None
    training: str | None
    layer: str | None
    species: str
    gene_column: str | None
    name: str


def _run(given: _Given, settings: PreprocessingSettings, earlier: Preprocessing | None) -> Preprocessed:
    """All steps. `earlier` is what another file gave; without it, it is learnt here."""
    if settings.doublets != "off":
        check_doublets()
    adata, name = given.adata.to_memory() if given.adata.isbacked else given.adata, given.name
    batches = batches_of(adata, given.batch, name)
    training = training_cells(adata, given.training, name)
    found = find_counts(adata, layer=given.layer, name=name, empty_cells="keep")
    counts = found.to_csr()
    known = canonical_genes(found.genes, species=given.species, column=given.gene_column)
    mitochondrial = np.char.startswith(np.char.upper(known.symbols), "MT-")
    shares = measures_mitochondria(adata, found, mitochondrial, name=name)
    metrics = cell_metrics(counts, adata.obs_names, mitochondrial, shares, batches)

    quality = QualityFilter(metrics, settings, counts.shape[1], name)
    quality.notes += [*found.notes, *_went_through_before(adata, quality, found.source)]
    bounds, limits = _filter_cells(quality, counts, training, earlier)
    kept = metrics["kept"] = quality.kept
    learning = kept & training
    if earlier is None and not learning.any():
        raise CellsError(f"no training cell of {called(name)} passes the thresholds", hint="change --training")
    counts = counts[np.flatnonzero(kept)]

    table, told = found.genes, np.flatnonzero(learning[kept])
    genes = (
        expressed_genes(table, counts[told], settings.min_cells, mitochondrial, name=name)
        if earlier is None
        else matched_genes(table, earlier, species=given.species, column=given.gene_column, name=name)
    )
    quality.notes += genes.notes
    quality.genes_left("cells a gene" if earlier is None else "genes of the settings", genes.rule, len(genes.rows))
    counts = genes.bring(counts)
    values = normalised(counts, settings.target_sum)
    if earlier is None:
        groups = batches[learning] if given.batch is not None else None
        common = measured_by_all(adata, found, learning, name=name)
        shared = None if common is None else common[genes.rows]
        var, notes = with_variable_genes(genes.var, (values, told), groups, shared, settings.variable_genes)
        quality.notes += notes
        learnt = _learnt(settings, known, genes.rows, var, bounds)
    else:
        learnt, var = earlier, genes.var
    columns = np.arange(len(var))
    if settings.only_variable:
        columns = np.flatnonzero(var["highly_variable"])
        quality.genes_left("variable genes", "the variable ones only", len(columns))
    cells, notes = assembled(adata, found.source, kept, (genes, var, columns), (counts, logged(values, settings.log)))
    quality.notes += notes
    _write_numbers(cells, metrics[kept], settings.log)
    quality.look_back()
    run = {"name": name, "learnt_here": earlier is None, **_record(quality, limits)}
    cells.uns[KEY] = json.dumps(learnt.to_dict() | {"run": run}, ensure_ascii=False)
    said = (tuple(quality.steps), tuple(quality.notes), tuple(quality.warnings))
    return Preprocessed(cells, learnt, *said, metrics, limits)


def _learnt(
    settings: PreprocessingSettings,
    known: CanonicalGenes,
    rows: np.ndarray,
    var: pd.DataFrame,
    bounds: Mapping[str, float] | None,
) -> Preprocessing:
    """What is kept for later files."""
    names = tuple(map(str, var.index))
    ids, symbols = (tuple(of[rows].tolist()) for of in (known.names, known.symbols))
    variable = tuple(map(str, var.index[var["highly_variable"]])) if settings.variable_genes else None
    return Preprocessing(settings, names, ids, symbols, known.species, variable, bounds)


def _write_numbers(cells: AnnData, metrics: pd.DataFrame, log: str) -> None:
    """Put the numbers of each cell where Scanpy puts them, and the base of the logarithm where it looks for it."""
    for column in (GENES, COUNTS, MITO, SCORE, DOUBLET):
        if column in metrics and (column != MITO or metrics[column].notna().any()):
            cells.obs[column] = metrics[column].to_numpy()
    cells.uns.pop("log1p", None)
    if log != "none":
        cells.uns["log1p"] = {"base": LOGS[log]}  # never None, for which older versions of Scanpy fail


def _record(quality: QualityFilter, limits: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """What was done to this file, kept in it beside the settings."""
    return {
        "steps": [step.to_dict() for step in quality.steps],
        "notes": quality.notes,
        "warnings": quality.warnings,
        "limits": {batch: _finite(of) for batch, of in limits.items()},
    }


def _went_through_before(adata: AnnData, quality: QualityFilter, source: str) -> list[str]:
    """What it means that a file went through `preprocess` before; a warning where genes were left out."""
    if not isinstance(text := adata.uns.get(KEY), str):
        return []
    try:
        earlier = Preprocessing.from_dict(json.loads(text)).settings
    except (ValueError, SettingsError):
        return []
    if earlier.only_variable:
        quality.warnings.append(
            f"only the {earlier.variable_genes:,} variable genes of an earlier preprocessing are left, so genes and "
            "counts of a cell are too low; give the file from before"
        )
    return [f"these cells were preprocessed before; the counts in {source} are taken"]


def _filter_cells(
    quality: QualityFilter, counts: sp.csr_matrix, training: np.ndarray, earlier: Preprocessing | None
) -> tuple[Mapping[str, float] | None, dict[str, dict[str, float]]]:
    """Put all thresholds on the cells; the bounds over all training cells, and the thresholds of each batch."""
    quality.fixed()
    bounds = quality.relative(training, None if earlier is None else earlier.bounds)
    limits = {key: dict(one) for key, one in quality.bounds.items()}
    if quality.settings.doublets != "off":
        quality.doublets(counts, limits)
    return bounds, limits


def _finite(numbers: Mapping[str, float]) -> dict[str, float | None]:
    """Numbers as JSON holds them: what is missing as None."""
    return {key: value if math.isfinite(value) else None for key, value in numbers.items()}

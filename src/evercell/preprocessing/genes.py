"""The genes of a preprocessing and their values: which are kept, which vary, and the AnnData that is made of them."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import scipy.sparse as sp

from evercell.errors import CellsError
from evercell.gene_names import GENE_COLUMNS, Species
from evercell.genes import Alignment, GeneVocabulary, align
from evercell.labels import listed
from evercell.normalisation import called
from evercell.preprocessing.settings import LOGS
from evercell.sources import parts_of

if TYPE_CHECKING:
    from anndata import AnnData

    from evercell.cells import Counts
    from evercell.preprocessing.steps import Preprocessing

LEAST_VARIABLE = 20  # training cells of a batch, below which it is not asked for variable genes by itself


@dataclass(frozen=True)
class KeptGenes:
    """The genes (G,) that a file is brought to.

    Parameters
    ----------
    rows
        Row of each in the gene table of the file; -1 where the file did not measure it.
    var
        Their table.
    rule
        In words, for the table of steps.
    alignment
        How a later file is brought to them; None where they are some of the file's own.
    notes
        For the user.
    """

    rows: np.ndarray
    var: pd.DataFrame
    rule: str
    alignment: Alignment | None = None
    notes: tuple[str, ...] = ()

    def bring(self, matrix: Any) -> sp.csr_matrix:
        """Values (B, genes of the file) over the kept genes (B, G); rows of one gene are summed."""
        if self.alignment is not None:
            return self.alignment.apply(matrix)
        found = sp.csr_matrix(sp.csr_matrix(matrix)[:, self.rows])
        found.sort_indices()
        return found

    def taken(self, table: Any) -> Any:
        """Rows of an array or a table over the genes of the file (G_file, ...), for the kept genes."""
        return table_rows(table, self.rows)


def expressed_genes(
    table: pd.DataFrame, counts: sp.csr_matrix, least: int, mitochondrial: np.ndarray, *, name: str
) -> KeptGenes:
    """Genes that are expressed in at least so many of the training cells (counts: (cells, genes))."""
    expressed = np.bincount(counts.indices, minlength=counts.shape[1])
    rows = np.flatnonzero(expressed >= least)
    if not rows.size:
        raise CellsError(
            f"no gene of {called(name)} is left: none is expressed in {least:,} cells",
            hint=f"lower --min-cells, which is {least}: the most that a gene has is {expressed.max():,}",
        )
    var = table.iloc[rows].assign(mt=mitochondrial[rows], n_cells=expressed[rows])
    return KeptGenes(rows, var, f"in at least {least:,} cells")


def matched_genes(
    table: pd.DataFrame, learnt: Preprocessing, *, species: str, column: str | None, name: str
) -> KeptGenes:
    """The genes of an earlier file in the table of a later one, by their canonical names."""
    first: dict[str, int] = {}
    for row, identifier in enumerate(learnt.ids):
        first.setdefault(identifier, row)
    at = np.array(list(first.values()))
    of_species: Species = "mouse" if learnt.species == "mouse" else "human"
    vocabulary = GeneVocabulary(tuple(first), tuple(learnt.symbols[row] for row in at), of_species)
    found = align(table, vocabulary, species=species, column=column, name=name)
    columns = np.where(found.columns >= 0, at[found.columns], -1).astype(np.int32)
    # Two rows of the first file may have been one gene; a file with the same two names keeps them apart as well.
    places = {str(gene): place for place, gene in enumerate(table.index)}
    for row, identifier in enumerate(learnt.ids):
        place = places.get(learnt.names[row])
        if first[identifier] != row and place is not None and columns[place] == first[identifier]:
            columns[place] = row
    if "measured" in table and table["measured"].dtype == bool:
        columns[~table["measured"].to_numpy()] = -1  # zeros that an earlier `apply` put there
    rows = np.full(len(learnt.names), -1)
    matched = np.flatnonzero(columns >= 0)[::-1]  # of rows that are one gene, the first gives its facts
    rows[columns[matched]] = matched
    measured = rows >= 0

    notes = []
    if found.coverage.through_orthologues:
        notes.append(
            f"{found.coverage.species} genes, matched to {learnt.species} genes through one-to-one orthologues"
        )
    if missing := [learnt.names[row] for row in np.flatnonzero(~measured)]:
        notes.append(f"{len(missing):,} of {len(rows):,} genes were not measured and are zeros, marked in "
                     f"var['measured']: {listed(missing, 5)}")  # fmt: skip
    var = table_rows(table.drop(columns=[c for c in table.columns if str(c).lower() in GENE_COLUMNS]), rows)
    var.index = pd.Index(learnt.names)
    symbols = np.char.upper(np.array(learnt.symbols, dtype=str))
    var = var.assign(
        gene_ids=list(learnt.ids),
        gene_symbols=list(learnt.symbols),
        name_in_file=[str(table.index[row]) if row >= 0 else "" for row in rows],
        measured=measured,
        mt=np.char.startswith(symbols, "MT-"),
    )
    var = var.drop(columns=[c for c in _VARIABLE if c in var])
    if learnt.variable is not None:
        var["highly_variable"] = np.isin(np.array(learnt.names), np.array(learnt.variable))
    alignment = Alignment(columns, measured, found.coverage)
    return KeptGenes(rows, var, f"{measured.sum():,} of {len(rows):,} were measured", alignment, tuple(notes))


def table_rows(table: Any, rows: np.ndarray) -> Any:
    """Rows of a table or an array; where a row is -1, what its type has for nothing."""
    absent = rows < 0
    if isinstance(table, pd.DataFrame):
        found = table.iloc[np.where(absent, 0, rows)].copy()
        if absent.any():
            for column in found.columns:
                values = found[column]
                if isinstance(values.dtype, np.dtype) and values.dtype.kind in "bif":
                    found[column] = table_rows(table[column].to_numpy(), rows)
                elif isinstance(values.dtype, pd.CategoricalDtype):
                    found[column] = values.mask(absent)
                else:
                    found[column] = values.astype(str).mask(absent, "")
        return found
    found = table[np.where(absent, 0, rows)]
    if absent.any():
        found = found.copy() if found.dtype.kind in "bf" else found.astype(np.float64)
        found[absent] = False if found.dtype.kind == "b" else np.nan
    return found


def normalised(counts: sp.csr_matrix, target_sum: float) -> sp.csr_matrix:
    """Counts (B, G) times what brings the total of each cell to `target_sum`."""
    import scanpy as sc
    from anndata import AnnData

    cells = AnnData(counts.copy())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of cells without counts, which stay as they are
        sc.pp.normalize_total(cells, target_sum=target_sum)
    return sp.csr_matrix(cells.X, dtype=np.float32)


def logged(values: sp.csr_matrix, log: str) -> sp.csr_matrix:
    """Logarithm of 1 + x to the base `log`, in place."""
    base = LOGS[log]
    if base is not None:
        np.log1p(values.data, out=values.data)
    if log == "2":
        values.data /= np.float32(math.log(2))
    return values


_VARIABLE = (
    "highly_variable", "means", "dispersions", "dispersions_norm", "highly_variable_nbatches",
    "highly_variable_intersection",
)  # fmt: skip


def with_variable_genes(
    var: pd.DataFrame,
    training: tuple[sp.csr_matrix, np.ndarray],
    batches: np.ndarray | None,
    common: np.ndarray | None,
    number: int | None,
) -> tuple[pd.DataFrame, list[str]]:
    """The gene table with Scanpy's marks of the variable genes.

    Parameters
    ----------
    var
        Genes (G rows).
    training
        Normalised values (N, G), not log-transformed, and the rows of the training cells (B,).
    batches
        Their batches (B,), where they are told.
    common
        Genes that every source of a merged file measured (G,). Others are not chosen: that a gene was not measured is
        no variation.
    number
        How many are marked.
    """
    import scanpy as sc
    from anndata import AnnData

    var = var.drop(columns=[column for column in _VARIABLE if column in var])
    if number is None:
        return var, []
    notes = []
    columns = np.arange(len(var))
    if common is not None and not common.all():
        if common.sum() >= number:
            columns = np.flatnonzero(common)
            notes.append(f"variable genes are chosen among the {len(columns):,} that every source measured")
        else:
            notes.append(
                f"only {common.sum():,} genes were measured by every source, fewer than the {number:,} variable genes "
                "asked for: they are chosen among all"
            )
    if number >= len(columns):
        marks = np.isin(np.arange(len(var)), columns)
        return var.assign(highly_variable=marks), [*notes, f"all {len(columns):,} genes are marked as variable"]
    values, every = training
    rows = every
    if batches is not None:
        sizes = pd.Series(batches).value_counts()
        if few := list(sizes.index[sizes < LEAST_VARIABLE]):
            notes.append(f"{listed(few)}: fewer than {LEAST_VARIABLE} training cells, not asked for variable genes")
            large = ~np.isin(batches, few)
            rows, batches = every[large], batches[large]
        if not rows.size:
            notes[-1] = f"no batch has {LEAST_VARIABLE} training cells: variable genes are chosen without batches"
            rows, batches = every, None
    cells = AnnData(logged(sp.csr_matrix(values[rows][:, columns]), "e"), var=var.iloc[columns][[]])
    key = None
    if batches is not None and len(set(batches)) > 1:
        key = "batch"
        cells.obs[key] = pd.Categorical(batches)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            sc.pp.highly_variable_genes(cells, n_top_genes=number, flavor="seurat", batch_key=key)
    except ValueError as error:
        raise CellsError(
            f"variable genes cannot be chosen from {len(rows):,} cells and {len(columns):,} genes: {error}",
            hint="leave out --variable-genes, or give more training cells",
        ) from error
    found = cells.var[[column for column in _VARIABLE if column in cells.var]].reindex(var.index)
    for column in ("highly_variable", "highly_variable_intersection"):
        if column in found:
            found[column] = found[column].eq(True)
    return var.join(found), notes


def measured_by_all(adata: AnnData, counts: Counts, cells: np.ndarray, *, name: str) -> np.ndarray | None:
    """Genes of the counts (G,) that all sources of these cells measured; None where the file was not merged."""
    parts = [part for part in parts_of(adata, name) if cells[part.rows].any()]
    if len(parts) == 1 and not parts[0].name:
        return None
    found: np.ndarray = np.logical_and.reduce([part.genes_of(counts, name=name) for part in parts])
    return found


def measures_mitochondria(adata: AnnData, counts: Counts, mitochondrial: np.ndarray, *, name: str) -> np.ndarray:
    """Cells (N,) whose source measured a mitochondrial gene; of a merged file not all may have."""
    told = np.zeros(adata.n_obs, dtype=bool)
    if mitochondrial.any():
        for part in parts_of(adata, name):
            told[part.rows] = not part.name or mitochondrial[part.genes_of(counts, name=name)].any()
    return told


def assembled(
    adata: AnnData,
    source: str,
    kept: np.ndarray,
    genes: tuple[KeptGenes, pd.DataFrame, np.ndarray],
    matrices: tuple[sp.csr_matrix, sp.csr_matrix],
) -> tuple[AnnData, list[str]]:
    """All that was in the AnnData for the cells and genes that are left, with the new values.

    Parameters
    ----------
    adata, source
        The cells as they came, and where their counts were.
    kept
        Which cells are left.
    genes
        The genes, their table, and which of them are left in the end.
    matrices
        Counts and values (cells left, genes).

    Returns
    -------
    tuple
        The AnnData, and notes on what could not be kept.
    """
    from anndata import AnnData

    brought, var, columns = genes
    counts, values = (one[:, columns] if len(columns) < len(var) else one for one in matrices)
    notes = []
    shell = AnnData(obs=adata.obs, uns=dict(adata.uns), obsm=dict(adata.obsm), obsp=dict(adata.obsp))[kept].copy()
    cells = AnnData(
        values, obs=shell.obs, var=var.iloc[columns], uns=dict(shell.uns), obsm=dict(shell.obsm), obsp=dict(shell.obsp)
    )
    cells.layers["counts"] = counts
    from_raw = source == "raw.X"
    if "counts" in adata.layers and source != "layers['counts']":
        notes.append(f"layer `counts` was replaced by the counts in {source}")
    if from_raw and len(adata.layers):
        notes.append(f"layers over other genes than raw are left out: {listed(adata.layers)}")
    for layer in () if from_raw else adata.layers:
        if layer != "counts":
            values_of = brought.bring(adata.layers[layer][np.flatnonzero(kept)])
            cells.layers[layer] = values_of[:, columns]
    tables = adata.raw.varm if from_raw else adata.varm
    for key in tables:
        table = table_rows(brought.taken(tables[key]), columns)
        cells.varm[key] = table.set_axis(cells.var_names) if isinstance(table, pd.DataFrame) else table
    if brought.alignment is None and not from_raw:
        for key in adata.varp:
            cells.varp[key] = adata.varp[key][brought.rows[columns]][:, brought.rows[columns]]
    if adata.raw is not None and not from_raw:
        # Counts that were taken from raw are now in their layer.
        raw = AnnData(adata.raw.X[kept], obs=cells.obs[[]], var=adata.raw.var)
        for key in adata.raw.varm:
            raw.varm[key] = adata.raw.varm[key]
        cells.raw = raw
    if "highly_variable" in var and brought.alignment is None:
        cells.uns["hvg"] = {"flavor": "seurat"}
    return cells, notes

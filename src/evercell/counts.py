"""Raw counts in an AnnData: where they are, whether they can be trusted, and how to get them back once normalised."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import scipy.sparse as sp

from evercell.errors import CellsError, words_of
from evercell.normalisation import (
    Reading,
    called,
    check_finite,
    check_one_kind,
    check_whole,
    csr_block,
    judge,
    read_columns,
    read_rows,
    to_counts,
    whole,
)

if TYPE_CHECKING:
    from anndata import AnnData

ROWS = 4096  # cells read at a time
SAMPLED = 512  # cells that decide what kind of values a matrix holds


_GENE = re.compile(
    r"ENS[A-Z]*G\d{6,}(\.\d+)?|RP[LS]\d+[AXYL]?|MT-\w+|HLA-\w+|H2-\w+|COL\d+A\d+|CD\d+[A-Z]?|IL\d+R?[A-Z]?|CC[LR]\d+|CXC[LR]\d+"
    r"|ZNF\d+|ZFP\d+|SLC\d+A\d+|KRT\d+|TMEM\d+|FAM\d+[A-Z]|LINC\d+|S100A\d+|HIST\w+|IG[HKL][A-Z]\w*|TR[ABDG]C\d?"
    r"|ACTB|ACTG1|GAPDH|MALAT1|B2M|EEF1A1|FTL|FTH1|TMSB4X|TMSB10|VIM|LYZ|MS4A1|NKG7|GNLY|PTPRC|EPCAM|PECAM1|INS|GCG|SST|PPY"
    r"|FOXP3|GATA\d|SOX\d+|PAX\d|FOS|JUNB?|EGR1|MKI67|TOP2A|PCNA|GZM[ABHKM]|PRF1|SFTP[ABCD]|SCGB\d\w+|TYROBP|FCER1G|C1Q[ABC]",
    re.IGNORECASE,
)
_BARCODE = re.compile(r"(?<![A-Za-z])[ACGT]{8,}(?![A-Za-z])")


@dataclass(frozen=True, eq=False)
class Counts:
    """Checked counts of the cells of an AnnData, read a block of rows at a time.

    Attributes
    ----------
    genes
        Variable table of where the counts were found; its index is the gene names, unique.
    cells
        Names of the cells, unique, in file order.
    source
        ``"X"``, ``"raw.X"`` or ``"layers['counts']"``.
    transform
        ``"none"``, or what was undone to get the counts back.
    notes
        What the user should know but need not act on.
    """

    genes: pd.DataFrame
    cells: pd.Index
    source: str
    transform: str
    notes: tuple[str, ...]
    _matrix: Any = field(repr=False)
    _reading: Reading = field(repr=False)
    _name: str = field(repr=False)
    _keep_empty: bool = field(repr=False)
    looked_for_empty: bool = True  # whether `notes` tell of the cells without counts; else who reads them has to

    @property
    def shape(self) -> tuple[int, int]:
        """Number of cells and of genes."""
        return len(self.cells), len(self.genes)

    def rows(self, start: int, stop: int) -> sp.csr_matrix:
        """Counts of the cells ``start`` to ``stop - 1``.

        Returns
        -------
        scipy.sparse.csr_matrix
            float32 (cells, genes), sorted indices, no stored zeros. Only these rows are read from a backed file.

        Raises
        ------
        CellsError
            A value is missing, negative or not a count, or a cell is empty although empty cells were not allowed; or
            the file is damaged there.
        """
        block = _block(self._matrix, start, stop, self._name)
        cells = self.cells[start:stop]
        check_finite(block, cells, self.genes.index, self._name)
        if not self._keep_empty:
            empty = np.flatnonzero(np.diff(block.indptr) == 0)
            if empty.size:
                raise _empty_error(self._name, str(cells[empty[0]]), None)
        if self._reading.undo is not None:
            check_one_kind(block, self._reading, cells, self._name)
            block.data, _ = to_counts(block, self._reading)
        elif not self._reading.expected:
            _judged_again(block, cells, self.genes.index, self._name)
        return block.astype(np.float32)

    def over(self, genes: np.ndarray) -> Counts:
        """The same counts of some genes only, a mask (G,)."""
        if genes.all():
            return self
        chosen = Chosen(self._matrix, np.arange(self.shape[0]), np.flatnonzero(genes))
        return replace(self, genes=self.genes[genes], _matrix=chosen, looked_for_empty=False)

    def chunks(self, size: int = ROWS) -> Iterator[tuple[int, int, sp.csr_matrix]]:
        """Yield ``(start, stop, rows(start, stop))`` over all cells, ``size`` cells at a time."""
        for start in range(0, self.shape[0], size):
            stop = min(start + size, self.shape[0])
            yield start, stop, self.rows(start, stop)

    def to_csr(self) -> sp.csr_matrix:
        """All counts in memory, float32 (cells, genes)."""
        return sp.vstack([block for _, _, block in self.chunks()], format="csr")


class Chosen:
    """Some rows and columns of a matrix in a file, given by their numbers: a slice of them is read when asked for."""

    def __init__(self, matrix: Any, rows: np.ndarray, columns: np.ndarray) -> None:
        self.matrix, self.rows, self.columns = matrix, rows, columns
        self.all_columns = np.array_equal(columns, np.arange(matrix.shape[1]))
        self.dtype, self.shape = matrix.dtype, (len(rows), len(columns))

    def __getitem__(self, part: slice) -> sp.csr_matrix:
        rows, place = np.unique(self.rows[part], return_inverse=True)
        blocks, done = [sp.csr_matrix((0, self.matrix.shape[1]), dtype=self.dtype)], 0
        while done < len(rows):
            # Rows between those that are asked for are read too, but never more than `ROWS` at a time.
            first = int(rows[done])
            end = int(np.searchsorted(rows, first + ROWS))
            block = read_rows(self.matrix, first, int(rows[end - 1]) + 1)
            blocks.append(block if block.shape[0] == end - done else block[rows[done:end] - first])
            done = end
        found = blocks[1] if len(blocks) == 2 else sp.vstack(blocks, format="csr")
        if not np.array_equal(place, np.arange(len(rows))):
            found = found[place]
        return found if self.all_columns else found[:, self.columns]


def find_counts(
    adata: AnnData, *, layer: str | None = None, name: str = "the data", empty_cells: str = "error"
) -> Counts:
    """Find the raw counts of an AnnData and check them; the AnnData is not changed.

    Layers whose name speaks of counts are looked at first, then ``X``, ``raw.X`` and the other layers. Where none holds
    counts, values that were normalised per cell, log-transformed or both are turned back: every value of a cell divided
    by the value of one count is a whole number, so the division that makes all of them whole gives the counts exactly.

    Parameters
    ----------
    adata
        Cells (rows) and genes (columns); in memory or backed.
    layer
        Where the counts are: ``"X"``, ``"raw"`` or the name of a layer. By default they are searched for.
    name
        What messages call the data, usually the path of the file.
    empty_cells
        ``"error"`` or ``"keep"``: what to do with cells without a single count.

    Returns
    -------
    Counts
        In memory every value has been looked at; of backed data a sample, and the rest when it is read.

    Raises
    ------
    CellsError
        No counts, or values, names or a shape that cannot be used; the message names the cell, gene and value.
    """
    if empty_cells not in ("error", "keep"):
        raise CellsError(f"`empty_cells` is `{empty_cells}`", hint="give `error` or `keep`")
    _check_cells(adata, name)
    candidates = _candidates(adata)
    asked = _asked(adata, candidates, layer, name)
    readings: dict[str, Reading] = {}
    failures: dict[str, CellsError] = {}
    for source in asked:
        try:
            matrix, var = candidates[source]
            candidates[source] = _by_rows(matrix), var
            readings[source] = _read_values(adata, *candidates[source], name=name)
        except CellsError as error:
            failures[source] = error
            continue
        if _rank(readings[source]) == 0:
            break
    if not readings:
        raise _no_counts(adata, candidates, failures, name)
    # Of matrices that have to be turned back, the one with the most genes; else the order decides.
    source = min(readings, key=lambda s: (r := _rank(readings[s]), -len(candidates[s][1]) if r == 2 else 0))

    matrix, var = candidates[source]
    genes, notes = _gene_table(var, name)
    if source != "X" and "X" in failures and layer is None:
        notes.append(f"X does not hold counts; they were taken from {source}")
    notes += readings[source].notes
    empty = _empty_cells(matrix)
    if empty is not None and empty.size:
        if empty_cells == "error":
            raise _empty_error(name, str(adata.obs_names[empty[0]]), int(empty.size))
        notes.append(empty_note(adata.obs_names, empty))
    reading, keep, looked = readings[source], empty_cells == "keep", empty is not None
    return Counts(genes, adata.obs_names, source, reading.transform, tuple(notes), matrix, reading, name, keep, looked)


def empty_note(cells: pd.Index, empty: np.ndarray) -> str:
    """What `Counts.notes` says of cells without counts, given their places."""
    return f"{empty.size:,} of {len(cells):,} cells have no counts, the first is `{cells[empty[0]]}`"


def is_transposed(rows: pd.Index, columns: pd.Index) -> bool:
    """Tell from the names whether the rows are genes and the columns cells.

    Gene names are recognised by families common to human and mouse annotations, cells by a barcode of eight or more
    bases. Where neither gives a clear answer the rows are taken to be cells.
    """
    row_genes, column_genes = _share(rows, _GENE.fullmatch), _share(columns, _GENE.fullmatch)
    row_barcodes, column_barcodes = _share(rows, _BARCODE.search), _share(columns, _BARCODE.search)
    if max(row_barcodes, column_barcodes) > 0.5 and min(row_barcodes, column_barcodes) < 0.1:
        return column_barcodes > row_barcodes
    return row_genes > 0.01 and row_genes > 5 * column_genes and row_genes * len(rows) >= 3


def _share(names: pd.Index, test: Callable[[str], object]) -> float:
    step = max(1, len(names) // 5000)
    some = [str(name) for name in names[::step]]
    return sum(test(name) is not None for name in some) / max(len(some), 1)


def _layer_word(source: str) -> str:
    """The word for ``--layer``: X, raw or the name of the layer."""
    return "raw" if source == "raw.X" else source.removeprefix("layers['").removesuffix("']")


def _check_cells(adata: AnnData, name: str) -> None:
    data = called(name)
    if adata.n_obs == 0 or adata.n_vars == 0:
        raise CellsError(
            f"{data} holds {adata.n_obs} cells and {adata.n_vars} genes; at least one of each is needed",
            hint="check the filter that made the file",
        )
    twice = adata.obs_names[adata.obs_names.duplicated()]
    if len(twice):
        raise CellsError(
            f"{data} names cell `{twice[0]}` more than once ({len(twice):,} cell names repeat another)",
            hint="call adata.obs_names_make_unique() and save the file again",
        )
    if is_transposed(adata.obs_names, adata.var_names):
        raise CellsError(
            f"{data} has genes in rows and cells in columns: the first row is `{adata.obs_names[0]}`, "
            f"the first column `{adata.var_names[0]}`",
            hint="save adata.T instead",
        )


def _candidates(adata: AnnData) -> dict[str, tuple[Any, pd.DataFrame]]:
    """Every matrix that may hold counts, the likely ones first: source -> (matrix, variable table)."""

    def layer(key: str) -> Any:
        return _stored(adata, lambda one: one.layers[key])

    layers = {f"layers['{key}']": (layer(key), adata.var) for key in adata.layers}
    found = {s: layers[s] for s in layers if re.search(r"count|umi|'raw'", s, re.IGNORECASE)}
    if (matrix := _stored(adata, lambda one: one.X)) is not None:
        found["X"] = (matrix, adata.var)
    if adata.raw is not None:
        found["raw.X"] = (_stored(adata, lambda one: one.raw.X, all_genes=True), adata.raw.var)
    return found | {s: layers[s] for s in layers if s not in found}


def _stored(adata: AnnData, matrix_of: Callable[[AnnData], Any], *, all_genes: bool = False) -> Any:
    """A matrix of an AnnData; of a view of cells in a file a choice of its rows, because the view would read all."""
    parent = getattr(adata, "_adata_ref", None) if adata.is_view else None
    matrix = None if parent is None else matrix_of(parent)
    if matrix is None or sp.issparse(matrix) or isinstance(matrix, np.ndarray):
        return matrix_of(adata)
    if getattr(matrix, "format", "csr") != "csr":
        return matrix_of(adata)
    columns = np.arange(matrix.shape[1])
    return Chosen(matrix, np.arange(matrix.shape[0])[adata._oidx], columns if all_genes else columns[adata._vidx])


def _asked(adata: AnnData, candidates: dict[str, tuple[Any, pd.DataFrame]], layer: str | None, name: str) -> list[str]:
    """The sources to look at, in order: the one asked for, or all that may hold the counts of a cell."""
    if layer is None:
        # Unspliced and ambiguous reads are counts, but never all the counts of a cell.
        return [source for source in candidates if not re.search(r"unspliced|ambig|spann", source)]
    source = {"X": "X", "raw": "raw.X", "raw.X": "raw.X"}.get(layer, "")
    if layer in adata.layers:
        source = f"layers['{layer}']"
    if source not in candidates:
        have = ", ".join(f"`{_layer_word(other)}`" for other in candidates) or "nothing"
        raise CellsError(f"{called(name)} has no layer `{layer}`; it has {have}", hint="pass --layer with one of these")
    return [source]


def _rank(reading: Reading) -> int:
    """Counts as they stand, else expected counts, else what can be turned back, else zeros and ones."""
    if reading.undo is not None:
        return 2
    return 3 if reading.binary else int(reading.expected)


def _by_rows(matrix: Any) -> Any:
    """A matrix stored by columns as CSR, in memory: its rows cannot be read one block at a time."""
    if getattr(matrix, "format", "") != "csc":
        return matrix
    if hasattr(matrix, "to_memory"):
        matrix = read_columns(matrix)
    return matrix.tocsr()


def _no_counts(
    adata: AnnData,
    candidates: dict[str, tuple[Any, pd.DataFrame]],
    failures: dict[str, CellsError],
    name: str,
) -> CellsError:
    if not failures:
        return CellsError(f"{called(name)} has no matrix", hint="put the raw counts into X")
    first = failures["X" if "X" in failures else next(iter(failures))]
    for other in _asked(adata, candidates, None, name):
        if other in failures:
            continue
        matrix, var = candidates[other]
        try:
            reading = _read_values(adata, _by_rows(matrix), var, name=name)
        except CellsError:
            continue
        kind = "raw counts" if reading.undo is None else "values that can be turned back into counts"
        word = _layer_word(other)
        where = f"`{word}`" if other in ("X", "raw.X") else f"layer `{word}`"
        return CellsError(first.message, hint=f"{kind} were found in {where}; pass --layer {word}")
    return CellsError(first.message, hint=first.hint or "put the raw counts into X or into a layer `counts`")


def _gene_table(var: pd.DataFrame, name: str) -> tuple[pd.DataFrame, list[str]]:
    """The variable table with unique names: identifiers take the place of symbols that occur twice."""
    twice = var.index[var.index.duplicated()]
    if not len(twice):
        return var.copy(), []
    for column in var.columns:
        if not re.search(r"(^|_)ids?$|ensembl|accession", str(column), re.IGNORECASE):
            continue
        ids = var[column]
        text = ids.dtype == object or isinstance(ids.dtype, pd.StringDtype | pd.CategoricalDtype)
        if text and ids.notna().all() and ids.is_unique:
            genes = var.assign(**{"gene_symbol": var.index.to_numpy()}) if "gene_symbol" not in var else var.copy()
            genes.index = pd.Index(ids.astype(str).to_numpy(), name=str(column))
            return genes, [f"{len(twice):,} gene names repeat another (`{twice[0]}`): `{column}` is used instead"]
    raise CellsError(
        f"{called(name)} names gene `{twice[0]}` more than once ({len(twice):,} gene names repeat another) "
        "and no column of var has a unique identifier for each gene",
        hint="put Ensembl identifiers into var['gene_ids'], or call adata.var_names_make_unique() and save again",
    )


def _empty_cells(matrix: Any) -> np.ndarray | None:
    """Positions of cells without a count; None for data in a file that would have to be read whole."""
    if isinstance(matrix, Chosen) and matrix.all_columns and hasattr(matrix.matrix, "group"):
        return np.flatnonzero(np.diff(matrix.matrix.group["indptr"][:])[matrix.rows] == 0)
    if hasattr(matrix, "group"):  # backed CSR: the row lengths are small and tell it
        return np.flatnonzero(np.diff(matrix.group["indptr"][:]) == 0)
    if not (sp.issparse(matrix) or isinstance(matrix, np.ndarray)):
        return None
    lengths = [np.diff(csr_block(matrix, s, s + ROWS).indptr) for s in range(0, matrix.shape[0], ROWS)]
    return np.flatnonzero(np.concatenate(lengths) == 0)


def _empty_error(name: str, cell: str, number: int | None) -> CellsError:
    many = "" if number is None else f" ({number:,} cells have none)"
    return CellsError(
        f"{called(name)} has no counts in cell `{cell}`{many}", hint="remove empty cells, or pass --empty-cells keep"
    )


def _read_values(adata: AnnData, matrix: Any, var: pd.DataFrame, *, name: str) -> Reading:
    """Decide how the values of one matrix are to be read, or say why they cannot be."""
    cells, genes = adata.obs_names, var.index
    if matrix.dtype.kind not in "buif":
        raise CellsError(f"{called(name)} does not hold counts: its values are of type {matrix.dtype}, not numbers")
    sample, rows = _sample(matrix, name)
    check_finite(sample, cells[rows], genes, name)
    reading = judge(sample, cells[rows], genes, name)
    if not (sp.issparse(matrix) or isinstance(matrix, np.ndarray)):
        return reading
    for start in range(0, matrix.shape[0], ROWS):
        block, block_cells = _block(matrix, start, start + ROWS, name), cells[start : start + ROWS]
        check_finite(block, block_cells, genes, name)
        check_one_kind(block, reading, block_cells, name)
        if reading.undo is None and not reading.expected:
            reading = _judged_again(block, block_cells, genes, name) or reading
    return reading


def _judged_again(block: sp.csr_matrix, cells: pd.Index, genes: pd.Index, name: str) -> Reading | None:
    """How cells that are not whole among whole counts are to be read: as expected counts, or the file is refused."""
    part = ~whole(block.data)
    if not part.any():
        return None
    odd = np.unique(np.searchsorted(block.indptr, np.flatnonzero(part), side="right") - 1)[:SAMPLED]
    reading = judge(block[odd], cells[odd], genes, name)
    if not reading.expected:  # most cells hold counts and these do not: two data sets joined
        check_whole(block, cells, genes, name)
    return reading


def _sample(matrix: Any, name: str) -> tuple[sp.csr_matrix, np.ndarray]:
    """Up to ``SAMPLED`` rows in eight runs spread over the file, because neighbours are cheap to read together."""
    n = matrix.shape[0]
    if n <= SAMPLED:
        return _block(matrix, 0, n, name), np.arange(n)
    run = SAMPLED // 8
    starts = np.linspace(0, n - run, 8).astype(int)
    blocks = [_block(matrix, int(start), int(start) + run, name) for start in starts]
    return sp.vstack(blocks, format="csr"), np.concatenate([np.arange(s, s + run) for s in starts])


def _block(matrix: Any, start: int, stop: int, name: str) -> sp.csr_matrix:
    """Rows of a matrix, which may lie in a file that is damaged there: opening it looks at its beginning only."""
    try:
        return csr_block(matrix, start, stop)
    except OSError as error:
        what = words_of(error)
        raise CellsError(
            f"{called(name)} cannot be read from cell {start + 1:,} on: it is damaged, or has just changed ({what})",
            hint="copy or download the file again",
        ) from error

"""The only reader and writer of cell files."""

from __future__ import annotations

import csv
import glob
import os
import re
import warnings
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import scipy.sparse as sp

from evercell.counts import Counts, find_counts, is_transposed
from evercell.errors import CellsError, words_of
from evercell.h5_files import write_h5ad
from evercell.outputs import atomic_path
from evercell.progress import progress
from evercell.stored_cells import open_h5ad, open_zarr, sound, stored_csr, watch
from evercell.vetting import lines_of, vet_hdf5, vet_matrix_market, vet_zarr

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["Counts", "find_counts", "read_cells", "write_cells", "write_table"]

READABLE = ".h5ad, .zarr, .h5 (10x), .loom, .csv, .tsv or .txt (also .gz), or a 10x folder with matrix.mtx"
TENX = "10x matrix.mtx"
TABLES = (".csv", ".tsv", ".txt")
STORED = (".h5ad", ".zarr", ".h5", ".hdf5")  # kinds whose matrices can stay in the file
TABLE_ROWS = 1000  # rows of a dense table parsed at a time, then kept sparse
FORMULA = re.compile(r"[=@\t\r\n\uff1d\uff20]|[+\uff0b\uff0d-].*[(|!=]", re.DOTALL)  # and their wide forms
PRINTED_ROWS = 50_000  # rows of a table made into text at a time


@progress("reading the cells")
def read_cells(path: str | os.PathLike[str], *, layer: str | None = None, backed: bool = False) -> AnnData:
    """Read a file of cells, check that it holds counts, and leave everything in it as it was.

    Parameters
    ----------
    path
        ``.h5ad``, ``.zarr``, 10x ``.h5``, a 10x folder (or its ``matrix.mtx``, or folder and file-name prefix),
        ``.loom`` or a dense table (``.csv``, ``.tsv``, ``.txt``, also ``.gz``) with cells or genes in rows.
    layer
        Where the counts are: ``"X"``, ``"raw"`` or a layer; searched for by default (see :func:`find_counts`).
    backed
        Leave the matrices of an ``.h5ad``, ``.zarr`` or 10x ``.h5`` in the file and read rows when they are asked for;
        ``obs``, ``var`` and ``uns`` are in memory. See `stored_cells`.

    Returns
    -------
    anndata.AnnData
        Cells in rows, genes in columns, in file order. Of a 10x file with several kinds of features only the genes.

    Raises
    ------
    CellsError
        The file is missing, damaged or of an unknown kind, or holds no counts. Empty cells are let through here.
    """
    path = Path(path)
    kind = kind_of(path)
    if backed and kind not in STORED:
        raise CellsError(f"`{path}` cannot be read backed: only {', '.join(STORED)} can", hint="convert it to .h5ad")
    try:
        with warnings.catch_warnings():
            # Names that repeat are judged by find_counts, with a message that says what to do.
            warnings.filterwarnings("ignore", message=".*names are not unique")
            check = watch(path)
            adata = _read(path, kind, backed)
            check()
    except (CellsError, MemoryError):
        raise
    except Exception as error:  # every format has errors of its own; to the user they are one
        what = words_of(error)
        raise CellsError(
            f"`{path}` cannot be read as {kind}: it is damaged, cut off or of another kind ({what})",
            hint="copy or download the file again, or check how it was written",
        ) from error
    find_counts(adata, layer=layer, name=str(path), empty_cells="keep")
    return adata


@progress("writing the cells")
def write_cells(adata: AnnData, path: str | os.PathLike[str]) -> None:
    """Write an AnnData to ``.h5ad`` or ``.zarr``; the file is whole or absent, and ``adata`` is not changed.

    Raises
    ------
    CellsError
        The suffix is unknown, the folder does not exist, or something in ``adata`` cannot be stored.
    """
    from anndata.io import write_zarr

    path = Path(path)
    if path.suffix not in (".h5ad", ".zarr"):
        raise CellsError(f"`{path}` does not end in .h5ad or .zarr", hint="give the output one of these suffixes")
    with atomic_path(path) as unfinished, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Writing zarr v2")  # every reader of AnnData reads it
        try:
            if path.suffix == ".h5ad":
                write_h5ad(unfinished, adata, compression="gzip")
            else:
                write_zarr(unfinished, adata, convert_strings_to_categoricals=False)
        except MemoryError:
            raise
        except Exception as error:
            raise CellsError(f"`{path}` cannot be written: {error}") from error


def write_table(frame: pd.DataFrame, path: str | os.PathLike[str]) -> None:
    """Write a table to ``.csv``, ``.tsv`` or ``.txt`` (also ``.gz``), whole or not at all; a named index is kept.

    Text that a spreadsheet would run as a formula, such as a cell type ``=cmd|...``, gets an apostrophe before it.
    """
    path = Path(path)
    kind = _suffix(path)
    if kind not in TABLES:
        raise CellsError(f"`{path}` does not end in .csv or .tsv (or .gz)", hint="give the table one of these suffixes")
    keep_index = not (isinstance(frame.index, pd.RangeIndex) and frame.index.name is None)
    separator, packed = "," if kind == ".csv" else "\t", path.suffix == ".gz"
    with atomic_path(path) as unfinished, unfinished.open("wb") as file:
        # gzip, without a time and a name inside: the same table gives the same bytes.
        packer = zlib.compressobj(9, zlib.DEFLATED, 31) if packed else None
        for start in range(0, max(len(frame), 1), PRINTED_ROWS):
            part = _without_formulas(frame.iloc[start : start + PRINTED_ROWS])
            text = part.to_csv(sep=separator, index=keep_index, header=start == 0).encode()
            file.write(text if packer is None else packer.compress(text))
        file.write(b"" if packer is None else packer.flush())


def _without_formulas(frame: pd.DataFrame) -> pd.DataFrame:
    """The table with no text that a spreadsheet runs, in names of rows and columns too; numbers, and names such as
    ``-`` or ``+ve``, are left. A carriage return becomes a blank: where it is not quoted it ends the row.
    """

    def risky(one: object) -> bool:
        return isinstance(one, str) and ("\r" in one or FORMULA.match(one) is not None)

    def mended(one: object) -> object:
        return ("'" if FORMULA.match(one) else "") + one.replace("\r", " ") if isinstance(one, str) else one

    def named(labels: pd.Index) -> pd.Index:
        return labels.map(mended) if any(map(risky, labels)) else labels

    def harmless(values: pd.Series) -> pd.Series:
        if values.dtype.kind in "biufc":
            return values
        text = values.astype(object).where(values.notna(), None)
        return text.map(mended) if text.map(risky).any() else values

    columns = [harmless(frame.iloc[:, number]) for number in range(frame.shape[1])]
    found = pd.concat(columns, axis=1) if columns else frame.copy(deep=False)
    found.columns, found.index = named(frame.columns), named(frame.index)
    return found


def _suffix(path: Path) -> str:
    """The last suffix in lower case, without a closing ``.gz``."""
    name = path.name.lower().removesuffix(".gz")
    return Path(name).suffix


def kind_of(path: Path) -> str:
    """What reader a path needs.

    Raises
    ------
    CellsError
        If nothing is there, or nothing that is read.
    """
    suffix = _suffix(path)
    if not path.exists() and any(path.parent.glob(f"{glob.escape(path.name)}*matrix.mtx*")):
        return TENX
    if not path.exists():
        raise CellsError(f"`{path}` does not exist", hint="check the path")
    if suffix == ".mtx" or (path.is_dir() and suffix != ".zarr"):
        return TENX
    if suffix not in (".h5ad", ".zarr", ".h5", ".hdf5", ".loom", *TABLES):
        raise CellsError(f"`{path}` is of no known kind", hint=f"cells are read from {READABLE}")
    return suffix


def _read(path: Path, kind: str, backed: bool) -> AnnData:
    from anndata.io import read_h5ad, read_zarr

    if kind == ".zarr":
        vet_zarr(path)
    elif kind in STORED:
        vet_hdf5(path)
    if kind == ".h5ad":
        return open_h5ad(path) if backed else sound(read_h5ad(path))
    if kind == ".zarr":
        return open_zarr(path) if backed else sound(read_zarr(path))
    if kind in (".h5", ".hdf5"):
        return _read_10x_h5(path, backed)
    if kind == ".loom":
        return _read_loom(path)
    if kind in TABLES:
        return _read_table(path)
    return _read_10x_folder(path)


def _read_10x_h5(path: Path, backed: bool) -> AnnData:
    """Cell Ranger 3 and later (group ``matrix``) or before (one group a genome, of which there must be one)."""
    import h5py
    from anndata import AnnData
    from anndata.io import read_h5ad

    file = h5py.File(path, "r")
    try:
        if "obs" in file and "var" in file:
            return open_h5ad(path) if backed else sound(read_h5ad(path))
        group = "matrix" if "matrix" in file else next(iter(file), "")
        if group != "matrix" and len(file) > 1:
            raise CellsError(
                f"`{path}` holds several genomes: {', '.join(f'`{g}`' for g in file)}", hint="give a file of one genome"
            )
        if group == "" or "barcodes" not in file[group]:
            raise CellsError(f"`{path}` holds no 10x matrix", hint=f"cells are read from {READABLE}")
        matrix = file[group]
        n_genes, n_cells = (int(n) for n in matrix["shape"][:])
        # Stored by cell: the columns of (genes, cells) are the rows of (cells, genes).
        arrays = ("data", "indices", "indptr")
        counts = (
            stored_csr(matrix, (n_cells, n_genes))
            if backed
            else sp.csr_matrix(tuple(matrix[one][:] for one in arrays), shape=(n_cells, n_genes))
        )
        text = {key: matrix[key].asstr()[:] for key in ("barcodes", "genes", "gene_names") if key in matrix}
        if group == "matrix":
            # Other tables beside these describe a panel or a genome, one row a feature.
            features = {
                key: item.asstr()[:]
                for key, item in matrix["features"].items()
                if isinstance(item, h5py.Dataset) and item.shape == (n_genes,) and item.dtype.kind in "SO"
            }
        else:
            features = {"name": text["gene_names"], "id": text["genes"]}
    finally:
        if not backed:
            file.close()
    names = pd.Index(features.pop("name"))
    var = pd.DataFrame(features, index=names).rename(columns={"id": "gene_ids", "feature_type": "feature_types"})
    adata = AnnData(counts, obs=pd.DataFrame(index=text["barcodes"]), var=var)
    return _genes_only(adata if backed else sound(adata), backed)


def _read_10x_folder(path: Path) -> AnnData:
    from anndata import AnnData
    from scipy.io import mmread

    folder, prefix = (path, "") if path.is_dir() else (path.parent, path.name.split("matrix.mtx")[0])
    matrices = sorted(folder.glob(f"{glob.escape(prefix)}*matrix.mtx*"))
    plain = [m for m in matrices if m.name in (f"{prefix}matrix.mtx", f"{prefix}matrix.mtx.gz")]
    matrices = plain[:1] or matrices  # an unpacked file beside its .gz is the same matrix
    if len(matrices) != 1:
        found = ", ".join(f"`{m.name}`" for m in matrices) or "no matrix.mtx"
        raise CellsError(
            f"`{path}` holds {found}; one 10x matrix is needed",
            hint=f"give the folder with the file-name prefix of one sample, such as {folder}/sample1_"
            if matrices
            else f"cells are read from {READABLE}",
        )
    prefix = matrices[0].name.split("matrix.mtx")[0]
    barcodes = _read_list(folder, prefix, ("barcodes.tsv",))
    features = _read_list(folder, prefix, ("features.tsv", "genes.tsv"))
    shape = vet_matrix_market(matrices[0])
    if shape != (len(features), len(barcodes)):
        raise CellsError(
            f"`{matrices[0]}` has {shape[0]} genes and {shape[1]} cells, its lists {len(features)} and {len(barcodes)}",
            hint="take the three files from the same run",
        )
    counts = sp.csr_matrix(mmread(matrices[0]).T)
    columns = ["gene_ids", "name", "feature_types"]
    var = features.iloc[:, :3].set_axis(columns[: min(3, features.shape[1])], axis=1)
    var = var.set_index("name" if "name" in var else "gene_ids", drop="name" in var).rename_axis(None)
    return _genes_only(AnnData(counts, obs=pd.DataFrame(index=barcodes[0].to_numpy()), var=var))


def _read_list(folder: Path, prefix: str, names: tuple[str, ...]) -> pd.DataFrame:
    for name in names:
        for file in (folder / f"{prefix}{name}", folder / f"{prefix}{name}.gz"):
            if file.exists():
                return pd.read_csv(file, sep="\t", header=None, dtype=str, keep_default_na=False, quoting=3)
    wanted = " or ".join(f"`{prefix}{name}`" for name in names)
    raise CellsError(f"`{folder}` has no {wanted} (or .gz) beside its matrix", hint="put the file into the folder")


def _genes_only(adata: AnnData, backed: bool = False) -> AnnData:
    """Leave out antibodies, guides and peaks: they are not genes, and their totals would distort the cells'."""
    if "feature_types" not in adata.var or (adata.var["feature_types"] == "Gene Expression").all():
        return adata
    genes = adata[:, (adata.var["feature_types"] == "Gene Expression").to_numpy()]
    return genes if backed else genes.copy()


def _read_loom(path: Path) -> AnnData:
    try:
        import loompy
    except ImportError as error:
        raise CellsError(f"`{path}` needs the package loompy", hint="pip install evercell[loom]") from error
    from anndata.io import read_loom

    vet_hdf5(path)
    with loompy.connect(str(path), mode="r", validate=False) as file:
        cells = next((key for key in ("CellID", "obs_names", "cell_id", "barcode") if key in file.ca), "CellID")
        genes = next((key for key in ("Gene", "var_names", "gene_name", "gene") if key in file.ra), "Gene")
    return read_loom(path, X_name="", obs_names=cells, var_names=genes, validate=False)


def _read_table(path: Path) -> AnnData:
    """A dense table of numbers with names in the first column and row; columns of text go with the row names."""
    from anndata import AnnData

    with lines_of(path) as file:
        try:
            lines = [file.readline().decode("utf-8-sig"), file.readline().decode()]
        except UnicodeDecodeError as error:
            raise CellsError(
                f"`{path}` is not a table: it is no text in UTF-8", hint="save it as a .csv in UTF-8"
            ) from error
    separator = max("\t,; ", key=lines[1].count)
    header, first = (next(csv.reader([line], delimiter=separator), []) for line in lines)
    if len(first) < 2:
        raise CellsError(
            f"`{path}` is not a table: a row of names and a row of values are needed",
            hint="separate columns by comma or tab",
        )
    if len(header) < len(first) - 1:
        raise CellsError(
            f"`{path}` is not a table: its first row names {len(header)} columns, its second "
            f"has {len(first) - 1} values",
            hint="the first row has to name every column",
        )
    # Tables written by R have no name above the column of names.
    names = np.array(header[-(len(first) - 1) :])
    blocks, texts = [], []
    text: np.ndarray | None = None
    with lines_of(path) as file:
        for part in pd.read_csv(file, sep=separator, index_col=0, header=None, skiprows=1, chunksize=TABLE_ROWS):
            if text is None:
                text = np.array([not pd.api.types.is_numeric_dtype(kind) for kind in part.dtypes])
            texts.append(part.loc[:, text].set_axis(names[text], axis=1))
            blocks.append(sp.csr_matrix(_numbers(part.loc[:, ~text].set_axis(names[~text], axis=1), path)))
    if text is None or text.all():
        raise CellsError(f"`{path}` is a table without numbers", hint="give a table of counts")
    rows = pd.concat(texts)
    rows.index = rows.index.astype(str).rename(None)
    counts, columns = sp.vstack(blocks, format="csr"), pd.DataFrame(index=names[~text])
    if is_transposed(rows.index, columns.index):
        return AnnData(sp.csr_matrix(counts.T), obs=columns, var=rows)
    return AnnData(counts, obs=rows, var=columns)


def _numbers(part: pd.DataFrame, path: Path) -> np.ndarray:
    """The values of a part of a table; text among them is named."""
    try:
        return part.apply(pd.to_numeric).to_numpy(dtype=np.float32)
    except ValueError as error:
        found = part.apply(pd.to_numeric, errors="coerce").isna().to_numpy() & part.notna().to_numpy()
        row, column = np.argwhere(found)[0]
        raise CellsError(
            f"`{path}` holds text among its values: `{part.iloc[row, column]!s}` at `{part.index[row]}`, "
            f"`{part.columns[column]}`",
            hint="give a table of counts; columns of text are taken from the first rows",
        ) from error

"""Bad files of cells, each made from good ones with one thing wrong: `CELL_FILES`, name -> how it is made.

Each maker gets the folder to write in, and returns the path of what it wrote.
"""

from __future__ import annotations

import gzip
import json
import os
import shutil
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import scipy.sparse as sp

from evercell.testing import synthetic_cells

Maker = Callable[[Path], Path]
CELL_FILES: dict[str, Maker] = {}
N_CELLS, N_GENES = 12, 60


@cache
def _good() -> ad.AnnData:
    return synthetic_cells(N_CELLS, n_genes=N_GENES, n_types=2, n_donors=2)


def good() -> ad.AnnData:
    """A few cells, to be spoilt."""
    return _good().copy()


def bad(maker: Maker) -> Maker:
    """Register a maker under its name."""
    CELL_FILES[maker.__name__] = maker
    return maker


def written(folder: Path, cells: ad.AnnData, name: str = "cells.h5ad") -> Path:
    cells.write_h5ad(folder / name)
    return folder / name


def changed(folder: Path, change: Callable[[h5py.File], object], cells: ad.AnnData | None = None) -> Path:
    """An ``.h5ad`` that was written well and then changed."""
    path = written(folder, good() if cells is None else cells)
    with h5py.File(path, "r+") as file:
        change(file)
    return path


def put(group: h5py.Group, name: str, values: Any, **more: Any) -> None:
    """Replace an array; its attributes stay."""
    attributes = dict(group[name].attrs)
    del group[name]
    group.create_dataset(name, data=values, **more)
    group[name].attrs.update(attributes)


def declared(group: h5py.Group, name: str, shape: tuple[int, ...], dtype: str = "f4") -> None:
    """Replace an array by one that declares a shape and stores nothing."""
    attributes = dict(group[name].attrs)
    del group[name]
    chunks = tuple(min(n, 1024) for n in shape)
    group.create_dataset(name, shape, dtype=dtype, chunks=chunks, compression="gzip")
    group[name].attrs.update(attributes)


def dense() -> ad.AnnData:
    cells = good()
    cells.X = cells.X.toarray().astype(np.float32)
    return cells


# --- what is no file of cells


@bad
def h5ad_missing(folder: Path) -> Path:
    return folder / "nowhere.h5ad"


@bad
def h5ad_empty(folder: Path) -> Path:
    (folder / "cells.h5ad").touch()
    return folder / "cells.h5ad"


@bad
def h5ad_of_text(folder: Path) -> Path:
    (folder / "cells.h5ad").write_text("<html>404 not found</html>" * 50)
    return folder / "cells.h5ad"


@bad
def h5ad_cut_off(folder: Path) -> Path:
    path = written(folder, good())
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


@bad
def h5ad_without_tail(folder: Path) -> Path:
    path = written(folder, good())
    path.write_bytes(path.read_bytes()[:-600])
    return path


@bad
def h5ad_gzipped(folder: Path) -> Path:
    path = written(folder, good())
    path.write_bytes(gzip.compress(path.read_bytes()))
    return path


@bad
def h5ad_without_anything(folder: Path) -> Path:
    h5py.File(folder / "cells.h5ad", "w").close()
    return folder / "cells.h5ad"


@bad
def h5ad_is_a_folder(folder: Path) -> Path:
    (folder / "cells.h5ad").mkdir()
    return folder / "cells.h5ad"


@bad
def unknown_suffix(folder: Path) -> Path:
    (folder / "cells.xlsx").write_bytes(b"PK\x03\x04")
    return folder / "cells.xlsx"


@bad
def rds_of_r(folder: Path) -> Path:
    (folder / "cells.rds").write_bytes(gzip.compress(b"RDX3\n"))
    return folder / "cells.rds"


@bad
def h5ad_by_pickle(folder: Path) -> Path:
    import pickle

    (folder / "cells.h5ad").write_bytes(pickle.dumps({"X": [1, 2]}))
    return folder / "cells.h5ad"


# --- declared sizes, bombs, links


@bad
def dense_of_a_million_by_a_million(folder: Path) -> Path:
    return changed(folder, lambda file: declared(file, "X", (1_000_000, 1_000_000)), dense())


@bad
def sparse_of_a_hundred_billion_values(folder: Path) -> Path:
    def change(file: h5py.File) -> None:
        declared(file["X"], "data", (10**11,))
        declared(file["X"], "indices", (10**11,), "i8")

    return changed(folder, change)


@bad
def indptr_of_a_trillion(folder: Path) -> Path:
    return changed(folder, lambda file: declared(file["X"], "indptr", (10**12,), "i8"))


@bad
def obsm_declared_only(folder: Path) -> Path:
    def change(file: h5py.File) -> None:
        file["obsm"].create_dataset("X_pca", (N_CELLS, 10**9), dtype="f8", chunks=(1, 1024))

    return changed(folder, change)


@bad
def many_arrays_declared_only(folder: Path) -> Path:
    def change(file: h5py.File) -> None:
        for number in range(40):
            file["uns"].create_dataset(f"a{number}", (10**8,), dtype="u1", chunks=(1024,))

    return changed(folder, change)


def packed_zeros(file: h5py.Group, name: str, n_chunks: int, dtype: str = "f4") -> None:
    """An array of 4 MB zeros a chunk, packed a thousandfold."""
    size = (4 << 20) // np.dtype(dtype).itemsize
    part = file.create_dataset(name, (size * n_chunks,), dtype=dtype, chunks=(size,), compression="gzip")
    packed = zlib.compress(bytes(4 << 20), 9)
    for number in range(n_chunks):
        part.id.write_direct_chunk((number * size,), packed)


@bad
def bomb_in_the_values(folder: Path) -> Path:
    def change(file: h5py.File) -> None:
        del file["X/data"], file["X/indices"]
        packed_zeros(file["X"], "data", 400)
        packed_zeros(file["X"], "indices", 400, "i4")
        put(file["X"], "indptr", np.array([0] * N_CELLS + [400 << 20], dtype=np.int64))

    return changed(folder, change)


@bad
def bomb_in_uns(folder: Path) -> Path:
    return changed(folder, lambda file: packed_zeros(file["uns"], "note", 400))


@bad
def values_in_another_file(folder: Path) -> Path:
    """HDF5 reads any file of the one who opens it as an array."""
    (folder / "secret.txt").write_bytes(b"not yours " * N_CELLS)

    def change(file: h5py.File) -> None:
        outside = [(str(folder / "secret.txt"), 0, 10 * N_CELLS)]
        file["obsm"].create_dataset("X_a", (N_CELLS, 10), dtype="u1", external=outside)

    return changed(folder, change)


@bad
def link_to_another_file(folder: Path) -> Path:
    written(folder, good(), "other.h5ad")

    def change(file: h5py.File) -> None:
        file["layers"]["counts"] = h5py.ExternalLink("other.h5ad", "/X")

    return changed(folder, change)


@bad
def virtual_array(folder: Path) -> Path:
    def change(file: h5py.File) -> None:
        layout = h5py.VirtualLayout((N_CELLS, 4), dtype="f4")
        layout[:] = h5py.VirtualSource(str(folder / "other.h5"), "x", shape=(N_CELLS, 4))
        file["obsm"].create_virtual_dataset("X_a", layout)

    return changed(folder, change)


@bad
def groups_in_groups(folder: Path) -> Path:
    def change(file: h5py.File) -> None:
        group = file["uns"]
        for _ in range(300):
            group = group.create_group("a")
            group.attrs.update({"encoding-type": "dict", "encoding-version": "0.1.0"})

    return changed(folder, change)


@bad
def group_that_holds_itself(folder: Path) -> Path:
    def change(file: h5py.File) -> None:
        file["uns"]["again"] = file["uns"]

    return changed(folder, change)


@bad
def link_to_nowhere(folder: Path) -> Path:
    def change(file: h5py.File) -> None:
        del file["X"]
        file["X"] = h5py.SoftLink("/none")

    return changed(folder, change)


# --- sparse matrices whose arrays do not fit


def of_csr(name: str, change: Callable[[h5py.Group], object]) -> None:
    def maker(folder: Path) -> Path:
        return changed(folder, lambda file: change(file["X"]))

    CELL_FILES[name] = maker


def edited(array: str, place: int, value: int) -> Callable[[h5py.Group], None]:
    def change(group: h5py.Group) -> None:
        values = group[array][:].astype(np.int64)
        values[place] = value
        put(group, array, values)

    return change


of_csr("indptr_negative", edited("indptr", 3, -5))
of_csr("indptr_goes_down", edited("indptr", 3, 0))
of_csr("indptr_beyond_the_values", edited("indptr", -1, 10**9))
of_csr("indptr_begins_late", edited("indptr", 0, 7))
of_csr("indptr_too_short", lambda group: put(group, "indptr", group["indptr"][:-2]))
of_csr("indptr_too_long", lambda group: put(group, "indptr", np.append(group["indptr"][:], group["indptr"][-1])))
of_csr("indptr_of_fractions", lambda group: put(group, "indptr", group["indptr"][:] + 0.5))
of_csr("index_out_of_range", edited("indices", 10, 10**6))
of_csr("index_just_out_of_range", edited("indices", 10, N_GENES))
of_csr("index_negative", edited("indices", 10, -1))
of_csr("index_very_negative", edited("indices", 10, -(2**40)))
of_csr("indices_of_fractions", lambda group: put(group, "indices", group["indices"][:].astype(np.float64)))
of_csr("indices_too_few", lambda group: put(group, "indices", group["indices"][:-3]))
of_csr("values_too_few", lambda group: put(group, "data", group["data"][:-3]))
of_csr("values_missing", lambda group: group.pop("data"))
of_csr("indices_missing", lambda group: group.pop("indices"))
of_csr("shape_too_wide", lambda group: group.attrs.__setitem__("shape", (N_CELLS, N_GENES + 7)))
of_csr("shape_negative", lambda group: group.attrs.__setitem__("shape", (-1, N_GENES)))
of_csr("shape_enormous", lambda group: group.attrs.__setitem__("shape", (2**62, 2**62)))
of_csr("shape_of_text", lambda group: group.attrs.__setitem__("shape", "many"))
of_csr("shape_missing", lambda group: group.attrs.__delitem__("shape"))
of_csr("kind_unknown", lambda group: group.attrs.__setitem__("encoding-type", "ellpack_matrix"))


@bad
def csc_index_out_of_range(folder: Path) -> Path:
    cells = good()
    cells.X = sp.csc_matrix(cells.X)
    return changed(folder, lambda file: edited("indices", 2, N_CELLS)(file["X"]), cells)


# --- values that are no counts


def of_values(name: str, change: Callable[[Any], Any], cells: Callable[[], ad.AnnData] = good) -> None:
    def maker(folder: Path) -> Path:
        def spoil(file: h5py.File) -> None:
            group, key = (file["X"], "data") if isinstance(file["X"], h5py.Group) else (file, "X")
            put(group, key, change(group[key][:]))

        return changed(folder, spoil, cells())

    CELL_FILES[name] = maker


def with_value(value: float) -> Callable[[np.ndarray], np.ndarray]:
    def change(values: np.ndarray) -> np.ndarray:
        values = values.astype(np.float64)
        values.flat[5] = value
        return values

    return change


of_values("count_nan", with_value(np.nan))
of_values("count_infinite", with_value(np.inf))
of_values("count_negative", with_value(-3))
of_values("count_nan_dense", with_value(np.nan), dense)
of_values("count_infinite_dense", with_value(-np.inf), dense)
of_values("counts_complex", lambda values: values.astype(np.complex64))
of_values("counts_complex_dense", lambda values: values.astype(np.complex64), dense)
of_values("counts_of_text", lambda values: values.astype(str).astype("S4"))
of_values("counts_of_text_dense", lambda values: values.astype(str).astype("S4"), dense)
of_values("counts_scaled", lambda values: (values - values.mean()) / values.std(), dense)
of_values("counts_random", lambda values: np.random.default_rng(0).gamma(1.0, 3.0, values.shape), dense)
of_values("counts_of_records", lambda values: values.astype([("a", "f4"), ("b", "f4")]), dense)
of_values("counts_dense_of_one_axis", lambda values: values.ravel(), dense)
of_values("counts_dense_of_three_axes", lambda values: values[:, :, None], dense)
of_values("counts_dense_too_few_cells", lambda values: values[:-2], dense)
of_values("counts_dense_too_few_genes", lambda values: values[:, :-2], dense)


@bad
def counts_missing(folder: Path) -> Path:
    return changed(folder, lambda file: file.pop("X"))


@bad
def counts_only_unspliced(folder: Path) -> Path:
    cells = good()
    cells.layers["unspliced"] = cells.X.copy()
    return changed(folder, lambda file: file.pop("X"), cells)


# --- tables of cells and genes


@bad
def no_cells(folder: Path) -> Path:
    return written(folder, good()[:0].copy())


@bad
def no_genes(folder: Path) -> Path:
    return written(folder, good()[:, :0].copy())


@bad
def cell_twice(folder: Path) -> Path:
    cells = good()
    cells.obs_names = [*cells.obs_names[:-1], cells.obs_names[0]]
    return written(folder, cells)


@bad
def gene_twice(folder: Path) -> Path:
    cells = good()
    cells.var_names = [*cells.var_names[:-1], cells.var_names[0]]
    return written(folder, cells)


@bad
def cell_without_counts(folder: Path) -> Path:
    cells = good()
    counts = cells.X.toarray()
    counts[4] = 0
    cells.X = sp.csr_matrix(counts)
    return written(folder, cells)


@bad
def genes_of_nobody(folder: Path) -> Path:
    cells = good()
    cells.var_names = [f"contig_{n}_orf" for n in range(cells.n_vars)]
    return written(folder, cells)


@bad
def genes_numbered(folder: Path) -> Path:
    cells = good()
    cells.var_names = [str(n) for n in range(cells.n_vars)]
    return written(folder, cells)


@bad
def genes_in_rows(folder: Path) -> Path:
    cells = synthetic_cells(12, n_genes=300).T
    return written(folder, ad.AnnData(sp.csr_matrix(cells.X), obs=cells.obs, var=cells.var[[]]))


@bad
def obs_missing(folder: Path) -> Path:
    return changed(folder, lambda file: file.pop("obs"))


@bad
def var_missing(folder: Path) -> Path:
    return changed(folder, lambda file: file.pop("var"))


@bad
def obs_is_an_array(folder: Path) -> Path:
    def change(file: h5py.File) -> None:
        del file["obs"]
        file["obs"] = np.zeros(N_CELLS)

    return changed(folder, change)


@bad
def obs_index_missing(folder: Path) -> Path:
    return changed(folder, lambda file: file["obs"].pop("_index"))


@bad
def obs_index_named_wrongly(folder: Path) -> Path:
    return changed(folder, lambda file: file["obs"].attrs.__setitem__("_index", "barcodes"))


@bad
def obs_too_short(folder: Path) -> Path:
    return changed(folder, lambda file: put(file["obs"], "_index", file["obs/_index"][:-3]))


@bad
def obs_code_out_of_range(folder: Path) -> Path:
    def change(file: h5py.File) -> None:
        codes = file["obs/cell_type/codes"][:]
        codes[0] = 99
        put(file["obs/cell_type"], "codes", codes)

    return changed(folder, change)


@bad
def obs_without_categories(folder: Path) -> Path:
    return changed(folder, lambda file: file["obs/cell_type"].pop("categories"))


@bad
def obs_with_a_column_that_is_not_there(folder: Path) -> Path:
    def change(file: h5py.File) -> None:
        file["obs"].attrs["column-order"] = ["cell_type", "donor", "nowhere"]

    return changed(folder, change)


@bad
def obsm_too_short(folder: Path) -> Path:
    def change(file: h5py.File) -> None:
        file["obsm"]["X_pca"] = np.zeros((N_CELLS - 1, 2))
        file["obsm/X_pca"].attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})

    return changed(folder, change)


# --- 10x .h5


def tenx(folder: Path, **more: Any) -> Path:
    cells, path = good(), folder / "cells.h5"
    with h5py.File(path, "w") as file:
        matrix = file.create_group("matrix")
        parts = {
            "data": cells.X.data.astype(np.int32), "indices": cells.X.indices, "indptr": cells.X.indptr,
            "shape": np.array(cells.shape[::-1]), "barcodes": np.array(cells.obs_names, dtype="S30"),
        }  # fmt: skip
        for name, value in (parts | more).items():
            if value is not None:
                matrix[name] = value
        features = matrix.create_group("features")
        for name in ("id", "name"):
            features[name] = np.array(cells.var_names, dtype="S30")
        features["feature_type"] = np.array(["Gene Expression"] * cells.n_vars, dtype="S15")
    return path


def of_tenx(name: str, **more: Any) -> None:
    def maker(folder: Path) -> Path:
        return tenx(folder, **more)

    CELL_FILES[name] = maker


of_tenx("tenx_shape_enormous", shape=np.array([60, 2**40]))
of_tenx("tenx_shape_negative", shape=np.array([-60, 12]))
of_tenx("tenx_shape_of_one", shape=np.array([60]))
of_tenx("tenx_shape_swapped", shape=np.array([12, 60]))
of_tenx("tenx_without_barcodes", barcodes=None)
of_tenx("tenx_without_values", data=None)
of_tenx("tenx_barcodes_too_few", barcodes=np.array(["AAAC"] * 3, dtype="S4"))
of_tenx("tenx_barcodes_twice", barcodes=np.array(["AAAC"] * 12, dtype="S4"))
of_tenx("tenx_barcodes_of_numbers", barcodes=np.arange(12))
of_tenx("tenx_index_out_of_range", indices=_good().X.indices + 50)
of_tenx("tenx_indptr_of_fractions", indptr=_good().X.indptr * 1.5)
of_tenx("tenx_indptr_goes_down", indptr=_good().X.indptr[::-1].copy())


@bad
def tenx_without_features(folder: Path) -> Path:
    path = tenx(folder)
    with h5py.File(path, "r+") as file:
        del file["matrix/features"]
    return path


@bad
def tenx_of_several_genomes(folder: Path) -> Path:
    with h5py.File(folder / "cells.h5", "w") as file:
        for name in ("GRCh38", "mm10"):
            file.create_group(name)
    return folder / "cells.h5"


@bad
def tenx_molecule_info(folder: Path) -> Path:
    with h5py.File(folder / "molecule_info.h5", "w") as file:
        file["barcode_idx"] = np.arange(10)
    return folder / "molecule_info.h5"


# --- 10x folders


def mtx(folder: Path, *, matrix: str | bytes | None = None, barcodes: int = N_CELLS, genes: int = N_GENES) -> Path:
    cells = good()
    coo = sp.coo_matrix(cells.X.T)
    rows = "".join(f"{i + 1} {j + 1} {v}\n" for i, j, v in zip(coo.row, coo.col, coo.data, strict=True))
    whole = f"%%MatrixMarket matrix coordinate integer general\n{N_GENES} {N_CELLS} {coo.nnz}\n{rows}"
    target = folder / "sample"
    target.mkdir()
    content = whole if matrix is None else matrix
    (target / "matrix.mtx").write_bytes(content if isinstance(content, bytes) else content.encode())
    (target / "barcodes.tsv").write_text("".join(f"{name}\n" for name in cells.obs_names[:barcodes]))
    (target / "genes.tsv").write_text("".join(f"{name}\t{name}\n" for name in cells.var_names[:genes]))
    return target


HEAD = "%%MatrixMarket matrix coordinate integer general\n"
for _name, _matrix in {
    "mtx_empty": "",
    "mtx_of_text": "these are no counts\n",
    "mtx_without_sizes": HEAD,
    "mtx_of_a_trillion_values": f"{HEAD}60 12 1000000000000\n1 1 3\n",
    "mtx_too_many_values_for_its_size": f"{HEAD}60 12 700\n1 1 3\n",
    "mtx_cut_off": f"{HEAD}60 12 3\n1 1 3\n2 2 4\n",
    "mtx_row_out_of_range": f"{HEAD}60 12 2\n99 1 3\n2 2 4\n",
    "mtx_row_zero": f"{HEAD}60 12 2\n0 1 3\n2 2 4\n",
    "mtx_value_of_text": f"{HEAD}60 12 2\n1 1 many\n2 2 4\n",
    "mtx_with_bytes_among_its_values": f"{HEAD}60 12 3\n1 1 3\n2 2 40\0\0\0 2 4\n3 1 3\n4 1 3\n",
    "mtx_complex": "%%MatrixMarket matrix coordinate complex general\n60 12 1\n1 1 3 4\n",
    "mtx_negative": f"{HEAD}60 12 13\n5 1 -7\n" + "".join(f"1 {j} 3\n" for j in range(1, 13)),
    "mtx_enormous": f"{HEAD}1000000000000 1000000000000 2\n1 1 3\n2 2 4\n",
}.items():

    def _of_mtx(folder: Path, matrix: str = _matrix) -> Path:
        return mtx(folder, matrix=matrix)

    CELL_FILES[_name] = _of_mtx


@bad
def mtx_with_other_lists(folder: Path) -> Path:
    return mtx(folder, barcodes=5)


@bad
def mtx_without_barcodes(folder: Path) -> Path:
    path = mtx(folder)
    (path / "barcodes.tsv").unlink()
    return path


@bad
def mtx_gz_cut_off(folder: Path) -> Path:
    path = mtx(folder)
    whole = gzip.compress((path / "matrix.mtx").read_bytes())
    (path / "matrix.mtx").unlink()
    (path / "matrix.mtx.gz").write_bytes(whole[: len(whole) // 2])
    return path


@bad
def folder_of_two_samples(folder: Path) -> Path:
    path = mtx(folder)
    os.rename(path / "matrix.mtx", path / "a_matrix.mtx")
    shutil.copy(path / "a_matrix.mtx", path / "b_matrix.mtx")
    return path


@bad
def folder_of_nothing(folder: Path) -> Path:
    (folder / "sample").mkdir()
    return folder / "sample"


# --- tables

GENES = ("INS", "GCG", "SST", "PPY")
for _name, _text in {
    "csv_empty": "",
    "csv_of_one_line": ",INS,GCG\n",
    "csv_of_words": "hello\nworld\n",
    "csv_without_numbers": "cell,type\nA,alpha\nB,beta\n",
    "csv_ragged": "cell,INS,GCG\nA,1,2\nB,1,2,3\n",
    "csv_header_too_short": "INS\nA,1,2,3\nB,4,5,6\n",
    "csv_text_among_numbers": "cell,INS,GCG\n" + "A,1,2\n" * 1200 + "B,oops,2\n",
    "csv_cell_twice": "cell,INS,GCG\nA,1,2\nA,3,4\n",
    "csv_gene_twice": "cell,INS,INS\nA,1,2\nB,3,4\n",
    "csv_of_fractions": "cell,INS,GCG,SST\nA,1.37,2.113,7.7171\nB,3.19,4.93,0.1234\n",
    "csv_negative": "cell,INS,GCG\nA,1,2\nB,-3,4\n",
    "csv_with_a_gap": "cell,INS,GCG\nA,1,2\nB,,4\n",
    "csv_open_quote": 'cell,INS,GCG\n"A,1,2\nB,3,4\n',
    "csv_infinite": "cell,INS,GCG\nA,1,inf\nB,3,4\n",
}.items():

    def _of_csv(folder: Path, text: str = _text) -> Path:
        (folder / "cells.csv").write_text(text)
        return folder / "cells.csv"

    CELL_FILES[_name] = _of_csv


@bad
def csv_binary(folder: Path) -> Path:
    (folder / "cells.csv").write_bytes(bytes(range(256)) * 40)
    return folder / "cells.csv"


@bad
def csv_of_utf16(folder: Path) -> Path:
    (folder / "cells.csv").write_text("cell,INS,GCG\nA,1,2\nB,3,4\n", encoding="utf-16")
    return folder / "cells.csv"


@bad
def csv_gz_that_is_none(folder: Path) -> Path:
    (folder / "cells.csv.gz").write_text("cell,INS,GCG\nA,1,2\n")
    return folder / "cells.csv.gz"


@bad
def csv_gz_cut_off(folder: Path) -> Path:
    text = "cell,INS,GCG\n" + "".join(f"cell{n},{n % 7},{n % 5}\n" for n in range(4000))
    whole = gzip.compress(text.encode())
    (folder / "cells.csv.gz").write_bytes(whole[: len(whole) // 2])
    return folder / "cells.csv.gz"


@bad
def csv_gz_one_line_of_a_gigabyte(folder: Path) -> Path:
    packer = zlib.compressobj(1, zlib.DEFLATED, 31)
    part = b"9" * (1 << 24)
    with (folder / "cells.csv.gz").open("wb") as file:
        for _ in range(9):
            file.write(packer.compress(part))
        file.write(packer.flush())
    return folder / "cells.csv.gz"


# --- zarr


def zarr_of(folder: Path) -> Path:
    import warnings

    path = folder / "cells.zarr"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        good().write_zarr(path)
    (path / ".zmetadata").unlink(missing_ok=True)
    return path


def of_zarr(name: str, file: str, change: Callable[[dict[str, Any]], object]) -> None:
    def maker(folder: Path) -> Path:
        path = zarr_of(folder)
        told = json.loads((path / file).read_text())
        change(told)
        (path / file).write_text(json.dumps(told))
        return path

    CELL_FILES[name] = maker


of_zarr("zarr_pickle", "X/data/.zarray", lambda told: told.update(filters=[{"id": "pickle"}]))
of_zarr("zarr_pickle_as_compressor", "X/data/.zarray", lambda told: told.update(compressor={"id": "pickle"}))
of_zarr("zarr_codec_unknown", "X/data/.zarray", lambda told: told.update(compressor={"id": "magic"}))
of_zarr("zarr_shape_enormous", "X/data/.zarray", lambda told: told.update(shape=[10**13], chunks=[10**13]))
of_zarr("zarr_shape_negative", "X/data/.zarray", lambda told: told.update(shape=[-4]))
of_zarr("zarr_shape_of_text", "X/data/.zarray", lambda told: told.update(shape=["many"]))
of_zarr("zarr_type_unknown", "X/data/.zarray", lambda told: told.update(dtype="<q9"))
of_zarr("zarr_kind_unknown", "X/.zattrs", lambda told: told.update({"encoding-type": "magic"}))


@bad
def zarr_of_nothing(folder: Path) -> Path:
    (folder / "cells.zarr").mkdir()
    return folder / "cells.zarr"


@bad
def zarr_metadata_cut_off(folder: Path) -> Path:
    path = zarr_of(folder)
    (path / "X" / "data" / ".zarray").write_text('{"shape": [1')
    return path


@bad
def zarr_metadata_deep(folder: Path) -> Path:
    path = zarr_of(folder)
    (path / "X" / "data" / ".zarray").write_text("[" * 200_000)
    return path


@bad
def zarr_chunk_of_noise(folder: Path) -> Path:
    path = zarr_of(folder)
    (path / "X" / "data" / "0").write_bytes(b"\x02\x01\x21\x04" + bytes(60))
    return path


@bad
def zarr_values_gone(folder: Path) -> Path:
    path = zarr_of(folder)
    shutil.rmtree(path / "X" / "data")
    return path


# --- loom, and names


@bad
def loom_of_text(folder: Path) -> Path:
    (folder / "cells.loom").write_text("no loom")
    return folder / "cells.loom"

"""Reading and writing files of cells."""

from __future__ import annotations

import gzip
import shutil
import sys
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.io import mmwrite

from evercell.cells import find_counts, read_cells, write_cells, write_table
from evercell.errors import CellsError, OutputError
from evercell.outputs import atomic_path

GENES = ["ACTB", "RPL3", "RPS6", "MT-CO1", "CD3E", "TBCE", "TBCE", "CD8A", "GAPDH", "NKG7"]
IDS = [f"ENSG{j:011d}" for j in range(10)]
BARCODES = [f"AAACCTGAGC{a}{b}TTGG-1" for a in "ACGT" for b in "ACG"]


@pytest.fixture
def counts() -> np.ndarray:
    return np.random.default_rng(0).poisson(2.0, (12, 10)) + np.eye(12, 10, dtype=int)


@pytest.fixture
def adata(counts: np.ndarray) -> ad.AnnData:
    """Something in every slot."""
    adata = ad.AnnData(
        sp.csr_matrix(counts.astype(np.uint16)),
        obs=pd.DataFrame({"donor": ["a", "b"] * 6, "n": np.arange(12)}, index=BARCODES),
        var=pd.DataFrame({"gene_ids": IDS}, index=[*GENES[:6], "TBCE-2", *GENES[7:]]),
        obsm={"X_umap": np.zeros((12, 2))},
        uns={"source": "made up", "numbers": np.arange(3)},
        layers={"scaled": np.full((12, 10), 0.5)},
    )
    adata.obs["type"] = pd.Categorical(["T", "B", None] * 4, categories=["T", "B"])
    adata.raw = adata
    return adata


def same(one: ad.AnnData, other: ad.AnnData) -> None:
    assert (sp.csr_matrix(one.X) != sp.csr_matrix(other.X)).nnz == 0
    pd.testing.assert_frame_equal(one.obs, other.obs)
    pd.testing.assert_frame_equal(one.var, other.var)
    assert list(one.obsm) == list(other.obsm) and list(one.layers) == list(other.layers)
    assert one.uns["source"] == other.uns["source"]
    assert (one.raw is None) == (other.raw is None)


@pytest.mark.parametrize("suffix", [".h5ad", ".zarr"])
def test_everything_survives_writing_and_reading(adata: ad.AnnData, tmp_path: Path, suffix: str) -> None:
    before = adata.copy()
    write_cells(adata, tmp_path / f"cells{suffix}")
    same(adata, before)  # strings of the argument did not become categories
    read = read_cells(tmp_path / f"cells{suffix}")
    same(read, before)
    assert read.X.dtype == np.uint16
    assert [path.name for path in tmp_path.iterdir()] == [f"cells{suffix}"]


def test_backed(adata: ad.AnnData, counts: np.ndarray, tmp_path: Path) -> None:
    write_cells(adata, tmp_path / "cells.h5ad")
    read = read_cells(tmp_path / "cells.h5ad", backed=True)
    assert read.isbacked
    np.testing.assert_array_equal(find_counts(read).rows(3, 5).toarray(), counts[3:5])
    read.obs["new"] = 1
    write_cells(read, tmp_path / "cells.h5ad")  # over the file that it is read from
    again = read_cells(tmp_path / "cells.h5ad")
    np.testing.assert_array_equal(again.X.toarray(), counts)
    assert (again.obs["new"] == 1).all()
    (tmp_path / "cells.csv").write_text("cell,ACTB\nc,1\n")
    with pytest.raises(CellsError, match=r"cells\.csv` cannot be read backed"):
        read_cells(tmp_path / "cells.csv", backed=True)


@pytest.mark.parametrize("suffix", [".h5ad", ".zarr"])
def test_backed_matrices_are_those_in_memory_and_stay_in_the_file(
    adata: ad.AnnData, counts: np.ndarray, tmp_path: Path, suffix: str
) -> None:
    adata.layers["counts"] = adata.X.copy()
    adata.obsp["near"] = sp.identity(12, format="csr")
    path = tmp_path / f"cells{suffix}"
    write_cells(adata, path)
    read = read_cells(path, backed=True)
    stored = [read.X, read.raw.X, *read.layers.values(), *read.obsm.values(), *read.obsp.values()]
    assert not any(isinstance(matrix, np.ndarray) or sp.issparse(matrix) for matrix in stored)
    same(read.to_memory(), read_cells(path))
    for layer, source in (("X", "X"), ("raw", "raw.X"), ("counts", "layers['counts']")):
        found = find_counts(read, layer=layer)
        assert found.source == source
        np.testing.assert_array_equal(found.rows(3, 9).toarray(), counts[3:9])
    some = find_counts(read[[7, 2, 9], 3:8])  # the rows of a view are read when they are asked for
    assert not sp.issparse(some._matrix)
    np.testing.assert_array_equal(some.rows(1, 3).toarray(), counts[[2, 9], 3:8])


@pytest.mark.parametrize("suffix", [".h5ad", ".zarr"])
def test_backed_without_x(adata: ad.AnnData, counts: np.ndarray, tmp_path: Path, suffix: str) -> None:
    adata.layers["counts"] = adata.X.copy()
    adata.X = None
    write_cells(adata, tmp_path / f"cells{suffix}")
    found = find_counts(read_cells(tmp_path / f"cells{suffix}", backed=True))
    np.testing.assert_array_equal(found.to_csr().toarray(), counts)


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 1000), dtype=st.sampled_from(["uint8", "uint16", "int64", "float32"]), sparse=st.booleans())
def test_property_counts_survive_a_round_trip(
    tmp_path_factory: pytest.TempPathFactory, seed: int, dtype: str, sparse: bool
) -> None:
    rng = np.random.default_rng(seed)
    values = rng.poisson(1.0, (rng.integers(2, 30), rng.integers(2, 30))).astype(dtype)
    values[:, 0] = 1
    names = [pd.DataFrame(index=[f"{kind}{i}" for i in range(n)]) for kind, n in zip("cg", values.shape, strict=True)]
    path = tmp_path_factory.mktemp("round") / "cells.h5ad"
    write_cells(ad.AnnData(sp.csc_matrix(values) if sparse else values, obs=names[0], var=names[1]), path)
    read = read_cells(path)
    assert read.X.dtype == values.dtype
    np.testing.assert_array_equal(find_counts(read).to_csr().toarray(), values)


# 10x


def write_10x(
    folder: Path, counts: np.ndarray, *, prefix: str = "", features: str = "features.tsv", packed: bool = True
) -> None:
    folder.mkdir(exist_ok=True)
    mmwrite(folder / f"{prefix}matrix.mtx", sp.coo_matrix(counts.T))
    kind = ["Gene Expression"] * 9 + ["Antibody Capture"]
    rows = [[i, g, k][: 3 if features == "features.tsv" else 2] for i, g, k in zip(IDS, GENES, kind, strict=True)]
    (folder / f"{prefix}{features}").write_text("".join("\t".join(row) + "\n" for row in rows))
    (folder / f"{prefix}barcodes.tsv").write_text("\n".join(BARCODES) + "\n")
    if packed:
        for path in list(folder.glob(f"{prefix}*")):
            Path(f"{path}.gz").write_bytes(gzip.compress(path.read_bytes()))
            path.unlink()


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("features", ["features.tsv", "genes.tsv"])
@pytest.mark.parametrize("prefix", ["", "GSM1.v2_"])
def test_10x_folder(counts: np.ndarray, tmp_path: Path, packed: bool, features: str, prefix: str) -> None:
    folder = tmp_path / "run"
    write_10x(folder, counts, prefix=prefix, features=features, packed=packed)
    n = 9 if features == "features.tsv" else 10  # the antibody is not a gene
    for path in (folder, folder / prefix, folder / f"{prefix}matrix.mtx{'.gz' * packed}"):
        read = read_cells(path)
        np.testing.assert_array_equal(read.X.toarray(), counts[:, :n])
        assert list(read.obs_names) == BARCODES and list(read.var_names) == GENES[:n]
        found = find_counts(read)
        assert list(found.genes.index) == IDS[:n] and "`gene_ids`" in found.notes[0]


def test_10x_folder_of_two_samples(counts: np.ndarray, tmp_path: Path) -> None:
    write_10x(tmp_path, counts, prefix="a_")
    write_10x(tmp_path, counts + 1, prefix="b_")
    with pytest.raises(CellsError, match=r"`a_matrix\.mtx\.gz`, `b_matrix\.mtx\.gz`; one"):
        read_cells(tmp_path)
    np.testing.assert_array_equal(read_cells(tmp_path / "b_").X.toarray(), counts[:, :9] + 1)


def test_10x_folder_with_a_list_that_does_not_fit(counts: np.ndarray, tmp_path: Path) -> None:
    write_10x(tmp_path, counts, packed=False)
    (tmp_path / "barcodes.tsv").write_text("AAAC\n")
    with pytest.raises(CellsError, match="has 10 genes and 12 cells, its lists 10 and 1"):
        read_cells(tmp_path)
    (tmp_path / "barcodes.tsv").unlink()
    with pytest.raises(CellsError, match=r"has no `barcodes\.tsv`"):
        read_cells(tmp_path)


def test_10x_h5_of_both_versions(counts: np.ndarray, tmp_path: Path) -> None:
    stored = sp.csr_matrix(counts.astype(np.int32))
    kind = ["Gene Expression"] * 9 + ["Antibody Capture"]
    for version in (2, 3):
        path = tmp_path / f"v{version}.h5"
        with h5py.File(path, "w") as file:
            group = file.create_group("matrix" if version == 3 else "GRCh38")
            for key in ("data", "indices", "indptr"):
                group[key] = getattr(stored, key)
            group["shape"] = [10, 12]
            group["barcodes"] = np.array(BARCODES, dtype="S")
            if version == 3:
                for key, values in (("name", GENES), ("id", IDS), ("feature_type", kind)):
                    group[f"features/{key}"] = np.array(values, dtype="S")
                group["features/_all_tag_keys"] = np.array(["genome"], dtype="S")
            else:
                group["gene_names"], group["genes"] = np.array(GENES, dtype="S"), np.array(IDS, dtype="S")
        read = read_cells(path)
        n = 9 if version == 3 else 10
        np.testing.assert_array_equal(read.X.toarray(), counts[:, :n])
        assert list(read.var_names) == GENES[:n] and list(read.var["gene_ids"]) == IDS[:n]
        assert list(read.obs_names) == BARCODES
        backed = read_cells(path, backed=True)
        pd.testing.assert_frame_equal(backed.var, read.var)
        found = find_counts(backed)
        assert not sp.issparse(found._matrix)
        np.testing.assert_array_equal(found.rows(2, 12).toarray(), counts[2:, :n])


# Tables


@pytest.mark.parametrize("name", ["t.csv", "t.tsv", "t.txt", "t.csv.gz", "t.tsv.gz"])
@pytest.mark.parametrize("genes_in_rows", [True, False])
def test_tables_in_both_directions(counts: np.ndarray, tmp_path: Path, name: str, genes_in_rows: bool) -> None:
    genes = [*GENES[:6], "TBCE.2", *GENES[7:]]
    frame = pd.DataFrame(counts, index=BARCODES, columns=genes)
    (frame.T if genes_in_rows else frame).to_csv(tmp_path / name, sep="," if ".csv" in name else "\t")
    read = read_cells(tmp_path / name)
    assert list(read.obs_names) == BARCODES and list(read.var_names) == genes
    np.testing.assert_array_equal(read.X.toarray(), counts)


def test_table_of_r_without_a_name_above_the_names(counts: np.ndarray, tmp_path: Path) -> None:
    text = pd.DataFrame(counts.T, index=IDS, columns=BARCODES).to_csv(sep="\t").removeprefix("\t")
    (tmp_path / "t.txt").write_text(text)
    read = read_cells(tmp_path / "t.txt")
    assert read.shape == (12, 10) and list(read.var_names) == IDS
    np.testing.assert_array_equal(read.X.toarray(), counts)


def test_table_columns_of_text_are_kept(counts: np.ndarray, tmp_path: Path) -> None:
    frame = pd.DataFrame(counts, index=[f"c{i}" for i in range(12)], columns=[f"g{j}" for j in range(10)])
    frame.insert(0, "cell_type", ["T, helper", "B"] * 6)
    frame.to_csv(tmp_path / "t.csv")
    read = read_cells(tmp_path / "t.csv")
    assert list(read.obs["cell_type"][:2]) == ["T, helper", "B"]
    assert read.shape == (12, 10)  # no hint of the direction: rows are cells


def test_tables_that_cannot_be_used(counts: np.ndarray, tmp_path: Path) -> None:
    (tmp_path / "words.csv").write_text("name,type\na,b\nc,d\n")
    with pytest.raises(CellsError, match=r"words\.csv` is a table without numbers"):
        read_cells(tmp_path / "words.csv")
    (tmp_path / "line.csv").write_text("one line\n")
    with pytest.raises(CellsError, match=r"line\.csv` is not a table"):
        read_cells(tmp_path / "line.csv")
    (tmp_path / "nan.csv").write_text("cell,g1,g2\nc1,1,2\nc2,,3\n")
    with pytest.raises(CellsError, match=r"nan\.csv` has a missing or infinite value: nan at cell `c2`, gene `g1`"):
        read_cells(tmp_path / "nan.csv")
    (tmp_path / "twice.csv").write_text("cell,g1,g1\nc1,1,2\nc2,1,3\n")
    with pytest.raises(CellsError, match="names gene `g1` more than once"):
        read_cells(tmp_path / "twice.csv")
    packed = gzip.compress(pd.DataFrame(counts).to_csv().encode())
    (tmp_path / "cut.csv.gz").write_bytes(packed[: len(packed) // 2])
    with pytest.raises(CellsError, match=r"cut\.csv\.gz` cannot be read"):
        read_cells(tmp_path / "cut.csv.gz")


# Loom


def test_loom(counts: np.ndarray, tmp_path: Path) -> None:
    loompy = pytest.importorskip("loompy")
    rows, columns = {"Gene": np.array(IDS)}, {"CellID": np.array(BARCODES)}
    loompy.create(str(tmp_path / "cells.loom"), counts.T.astype(float), rows, columns)
    read = read_cells(tmp_path / "cells.loom")
    np.testing.assert_array_equal(read.X.toarray(), counts)
    assert list(read.obs_names) == BARCODES and list(read.var_names) == IDS


def test_loom_without_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cells.loom").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "loompy", None)
    with pytest.raises(CellsError, match="needs the package loompy") as caught:
        read_cells(tmp_path / "cells.loom")
    assert "evercell[loom]" in str(caught.value.hint)


# Paths and damaged files


def test_paths_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "cells.rds").write_bytes(b"x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "hollow.zarr").mkdir()
    (tmp_path / "other.h5").write_bytes(b"x")
    with h5py.File(tmp_path / "plain.h5", "w") as file:
        file["x"] = 1
    for name, message in {
        "none.h5ad": "does not exist",
        "none": "does not exist",
        "cells.rds": "is of no known kind",
        "empty": r"holds no matrix\.mtx",
        "hollow.zarr": "cannot be read as .zarr",
        "other.h5": "cannot be read as .h5",
        "plain.h5": "holds no 10x matrix|cannot be read as .h5",
    }.items():
        with pytest.raises(CellsError, match=message) as caught:
            read_cells(tmp_path / name)
        assert f"`{tmp_path / name}`" in caught.value.message and caught.value.hint


@pytest.mark.parametrize("backed", [True, False])
def test_damaged_h5ad(adata: ad.AnnData, tmp_path: Path, backed: bool) -> None:
    write_cells(adata, tmp_path / "whole.h5ad")
    path = tmp_path / "cut.h5ad"
    whole = (tmp_path / "whole.h5ad").read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"not HDF5 at all"):
        path.write_bytes(content)
        with pytest.raises(CellsError, match=r"cut\.h5ad` cannot be read as \.h5ad"):
            read_cells(path, backed=backed)


def test_values_that_are_no_counts_name_the_file(adata: ad.AnnData, tmp_path: Path) -> None:
    path = tmp_path / "q.h5ad"
    write_cells(adata, path)
    with pytest.raises(CellsError, match=r"q\.h5ad` does not hold counts: 0\.5 at cell `AAACC") as caught:
        read_cells(path, layer="scaled")
    assert caught.value.hint == "raw counts were found in `X`; pass --layer X"


def test_empty_cells_are_let_through(adata: ad.AnnData, tmp_path: Path) -> None:
    adata.X[3] = 0
    write_cells(adata, tmp_path / "cells.h5ad")
    assert read_cells(tmp_path / "cells.h5ad").n_obs == 12


# Writing


@pytest.mark.parametrize("suffix", [".h5ad", ".zarr"])
def test_a_write_that_fails_leaves_the_old_file(adata: ad.AnnData, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"cells{suffix}"
    write_cells(adata, path)
    before = read_cells(path)
    adata.uns["what"] = object()  # nothing can store it
    with pytest.raises(CellsError, match=f"cells{suffix}` cannot be written"):
        write_cells(adata, path)
    same(read_cells(path), before)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    with pytest.raises(CellsError, match="cannot be written"):
        write_cells(adata, tmp_path / f"new{suffix}")
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("suffix", [".h5ad", ".zarr"])
def test_writing_over_an_old_file(adata: ad.AnnData, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"cells{suffix}"
    write_cells(adata, path)
    write_cells(adata[:5].copy(), path)
    assert read_cells(path).n_obs == 5
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_paths_that_cannot_be_written(adata: ad.AnnData, tmp_path: Path) -> None:
    with pytest.raises(CellsError, match=r"does not end in \.h5ad or \.zarr"):
        write_cells(adata, tmp_path / "cells.csv")
    for write in (lambda p: write_cells(adata, p), lambda p: write_table(adata.obs, p.with_suffix(".csv"))):
        with pytest.raises(OutputError, match=r"folder `.*none` of `.*` does not exist"):
            write(tmp_path / "none" / "cells.h5ad")
    with pytest.raises(CellsError, match=r"does not end in \.csv or \.tsv"):
        write_table(adata.obs, tmp_path / "t.xlsx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["t.csv", "t.tsv", "t.csv.gz", "t.tsv.gz"])
def test_tables_survive(tmp_path: Path, name: str) -> None:
    frame = pd.DataFrame({"label": ["T, helper", "B"], "p": [0.25, 0.5]}, index=pd.Index(["c1", "c2"], name="cell"))
    write_table(frame, tmp_path / name)
    read = pd.read_csv(tmp_path / name, sep="," if ".csv" in name else "\t", index_col="cell")
    pd.testing.assert_frame_equal(read, frame)
    first = (tmp_path / name).read_bytes()
    write_table(frame, tmp_path / name)
    assert (tmp_path / name).read_bytes() == first
    write_table(frame.reset_index(drop=True), tmp_path / name)
    assert list(pd.read_csv(tmp_path / name, sep=None, engine="python").columns) == ["label", "p"]


@pytest.mark.parametrize("old", ["none", "file", "folder"])
@pytest.mark.parametrize("new", ["file", "folder"])
@pytest.mark.parametrize("fails", [True, False])
def test_atomic_path(tmp_path: Path, old: str, new: str, fails: bool) -> None:
    path = tmp_path / "model.x"

    def make(where: Path, kind: str, text: str) -> None:
        if kind == "folder":
            where.mkdir()
            (where / "inside").write_text(text)
        elif kind == "file":
            where.write_text(text)

    def text() -> str | None:
        inside = path / "inside"
        return inside.read_text() if inside.exists() else path.read_text() if path.exists() else None

    make(path, old, "old")
    before = text()
    try:
        with atomic_path(path) as unfinished:
            assert unfinished.parent == path.parent and unfinished.suffix == ".x" and not unfinished.exists()
            make(unfinished, new, "new")
            assert text() == before
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert fails
    assert text() == (before if fails else "new")
    assert [p.name for p in tmp_path.iterdir()] == ([] if fails and old == "none" else ["model.x"])


def test_atomic_path_follows_a_link(tmp_path: Path) -> None:
    (tmp_path / "real.csv").write_text("old")
    (tmp_path / "link.csv").symlink_to(tmp_path / "real.csv")
    with atomic_path(tmp_path / "link.csv") as unfinished:
        unfinished.write_text("new")
    assert (tmp_path / "link.csv").is_symlink() and (tmp_path / "real.csv").read_text() == "new"


def test_atomic_path_when_nothing_was_written(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    path.mkdir()
    (path / "inside").write_text("old")
    with pytest.raises(FileNotFoundError), atomic_path(path):
        pass
    assert (path / "inside").read_text() == "old"
    shutil.rmtree(path)

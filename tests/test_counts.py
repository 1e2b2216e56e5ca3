"""Where the counts of an AnnData are, whether they can be trusted, and how they come back from normalised values."""

from __future__ import annotations

from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from evercell.counts import find_counts, is_transposed
from evercell.errors import CellsError

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
REAL = sorted(SHARED.glob("*labelled/*/*.h5ad"))


def molecules(n_cells: int = 60, n_genes: int = 300, seed: int = 0) -> np.ndarray:
    """Counts with the depth and the sparsity of droplets; every cell has a gene with one count."""
    rng = np.random.default_rng(seed)
    rate = rng.gamma(0.3, 4.0, n_genes) * rng.lognormal(0, 0.5, (n_cells, 1))
    counts = rng.poisson(rate)
    counts[:, 0], counts[:, 1], counts[:, 2] = 1, 2, 5
    return counts


def cells(values: object, **more: object) -> ad.AnnData:
    n_cells, n_genes = values.shape  # type: ignore[attr-defined]
    obs = pd.DataFrame(index=[f"cell{i}" for i in range(n_cells)])
    return ad.AnnData(values, obs=obs, var=pd.DataFrame(index=[f"gene{j}" for j in range(n_genes)]), **more)


def normalised(counts: np.ndarray, total: float = 1e4) -> np.ndarray:
    return (counts / counts.sum(axis=1, keepdims=True) * total).astype(np.float32)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32", "int32", "int64", "float32", "float64"])
@pytest.mark.parametrize("form", [sp.csr_matrix, sp.csc_matrix, sp.csr_array, np.asarray])
def test_counts_of_every_type_and_layout(dtype: str, form: type) -> None:
    counts = molecules().clip(max=255)
    found = find_counts(cells(form(counts.astype(dtype))))
    assert (found.source, found.transform, found.notes, found.shape) == ("X", "none", (), counts.shape)
    block = found.rows(10, 20)
    assert isinstance(block, sp.csr_matrix) and block.dtype == np.float32
    np.testing.assert_array_equal(block.toarray(), counts[10:20])
    np.testing.assert_array_equal(found.to_csr().toarray(), counts)


def test_chunks_cover_every_cell_once() -> None:
    counts = molecules(23)
    seen = list(find_counts(cells(counts)).chunks(size=10))
    assert [(start, stop) for start, stop, _ in seen] == [(0, 10), (10, 20), (20, 23)]
    np.testing.assert_array_equal(sp.vstack([block for *_, block in seen]).toarray(), counts)


@pytest.mark.parametrize("form", [sp.csr_matrix, sp.csc_matrix, np.asarray])
def test_backed_counts_equal_those_in_memory(tmp_path: Path, form: type) -> None:
    counts = molecules(700)
    cells(form(counts)).write_h5ad(tmp_path / "a.h5ad")
    adata = ad.read_h5ad(tmp_path / "a.h5ad", backed="r")
    found = find_counts(adata)
    np.testing.assert_array_equal(found.rows(650, 700).toarray(), counts[650:])
    np.testing.assert_array_equal(found.to_csr().toarray(), counts)


def test_backed_reads_only_the_rows_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells(sp.csr_matrix(molecules(700))).write_h5ad(tmp_path / "a.h5ad")
    found = find_counts(ad.read_h5ad(tmp_path / "a.h5ad", backed="r"))
    asked: list[slice] = []
    kind = type(found._matrix)
    plain = kind.__getitem__
    monkeypatch.setattr(kind, "__getitem__", lambda self, index: asked.append(index) or plain(self, index))
    found.rows(5, 9)
    assert asked == [slice(5, 9)]


def test_a_value_that_the_sample_missed_is_found_when_read(tmp_path: Path) -> None:
    counts = molecules(2000).astype(np.float32)
    counts[100, 7] = 7.31
    cells(sp.csr_matrix(counts)).write_h5ad(tmp_path / "a.h5ad")
    found = find_counts(ad.read_h5ad(tmp_path / "a.h5ad", backed="r"), name="a.h5ad")
    with pytest.raises(CellsError, match=r"`a\.h5ad` does not hold counts: 7\.31 at cell `cell100`, gene `gene7`"):
        found.rows(64, 128)


# Where the counts are


def test_a_layer_of_counts_comes_before_x() -> None:
    counts = molecules()
    adata = cells(np.log1p(normalised(counts)), layers={"spliced": counts // 2, "raw_counts": sp.csr_matrix(counts)})
    found = find_counts(adata)
    assert (found.source, found.transform) == ("layers['raw_counts']", "none")
    np.testing.assert_array_equal(found.to_csr().toarray(), counts)


def test_raw_has_genes_of_its_own() -> None:
    counts = molecules()
    whole = cells(counts)
    adata = cells(np.random.default_rng(0).normal(size=(60, 300)))[:, :50].copy()
    adata.raw = whole
    found = find_counts(adata)
    assert found.source == "raw.X" and found.shape == (60, 300)
    assert list(found.genes.index) == list(whole.var_names)
    assert any("X does not hold counts" in note for note in found.notes)


def test_of_two_normalised_matrices_the_one_with_more_genes() -> None:
    counts = molecules()
    whole = cells(np.log1p(normalised(counts)))
    adata = whole[:, :100].copy()
    adata.raw = whole
    found = find_counts(adata)
    assert found.source == "raw.X"
    np.testing.assert_array_equal(found.to_csr().toarray(), counts)


def test_a_mask_or_unspliced_reads_are_not_taken_for_counts() -> None:
    counts = molecules()
    layers = {"expressed": (counts > 0).astype(np.uint8), "unspliced": counts // 3}
    found = find_counts(cells(np.log1p(normalised(counts)), layers=layers))
    assert found.source == "X" and "log1p" in found.transform
    # Asked for by name they are.
    assert (
        find_counts(cells(counts, layers=layers), layer="unspliced", empty_cells="keep").source == "layers['unspliced']"
    )


def test_the_hint_names_the_layer_that_holds_counts() -> None:
    counts = molecules()
    scaled = np.random.default_rng(0).normal(size=counts.shape)
    with pytest.raises(CellsError, match=r"`q\.h5ad` does not hold counts") as caught:
        find_counts(cells(scaled, layers={"counts": counts}), layer="X", name="q.h5ad")
    assert caught.value.hint == "raw counts were found in layer `counts`; pass --layer counts"
    with pytest.raises(CellsError, match="negative") as caught:
        find_counts(cells(counts, layers={"scaled": scaled}), layer="scaled")
    assert caught.value.hint == "raw counts were found in `X`; pass --layer X"


def test_an_unknown_layer_lists_those_there_are() -> None:
    with pytest.raises(CellsError, match="no layer `cuonts`; it has `counts`, `X`"):
        find_counts(cells(molecules(), layers={"counts": molecules()}), layer="cuonts")


# Turning values back into counts

LOGS = {"log1p": np.log1p, "log2(1 + x)": lambda x: np.log2(1 + x), "log10(1 + x)": lambda x: np.log10(1 + x)}


@pytest.mark.parametrize("word", LOGS)
@pytest.mark.parametrize("total", [1.0, 1e3, 1e4, 1e6])
def test_log_normalised_counts_come_back_exactly(word: str, total: float) -> None:
    counts = molecules()
    found = find_counts(cells(sp.csr_matrix(LOGS[word](normalised(counts, total)))))
    if total > 1:  # below a value of about 0.01 a logarithm is a line, and its base does not show
        assert found.transform == f"{word} and per-cell normalisation undone"
    np.testing.assert_array_equal(found.to_csr().toarray(), counts)


def test_counts_come_back_after_genes_were_left_out() -> None:
    counts = molecules()
    kept = np.arange(1, 300, 3)  # gene 0, the one with a single count, is gone
    found = find_counts(cells(np.log1p(normalised(counts))[:, kept]))
    np.testing.assert_array_equal(found.to_csr().toarray(), counts[:, kept])


def test_a_cell_without_single_counts_comes_back() -> None:
    counts = molecules()
    counts[7][counts[7] == 1] = 0
    counts[7, 3] = 7  # smallest value 2, others not all even
    found = find_counts(cells(np.log1p(normalised(counts))))
    np.testing.assert_array_equal(found.to_csr().toarray(), counts)


def test_normalised_counts_without_a_logarithm() -> None:
    counts = molecules()
    for total in (1e4, 1e6):
        found = find_counts(cells(normalised(counts, total)))
        assert found.transform == "per-cell normalisation undone"
        np.testing.assert_array_equal(found.to_csr().toarray(), counts)
        # Without all genes the totals differ from cell to cell.
        part = find_counts(cells(normalised(counts, total)[:, :120]))
        np.testing.assert_array_equal(part.to_csr().toarray(), counts[:, :120])


@pytest.mark.parametrize("word", LOGS)
def test_logarithm_of_counts_that_were_not_normalised(word: str) -> None:
    counts = molecules()
    counts[:, 0] = np.where(np.arange(60) % 2, 1, 0)
    found = find_counts(cells(LOGS[word](counts).astype(np.float32)))
    assert found.transform == f"{word} undone"
    np.testing.assert_array_equal(found.to_csr().toarray(), counts)


def test_logarithm_taken_twice() -> None:
    counts = molecules()
    found = find_counts(cells(np.log1p(np.log1p(normalised(counts)))))
    assert found.transform == "log1p applied twice and per-cell normalisation undone"
    np.testing.assert_array_equal(found.to_csr().toarray(), counts)


def test_log_values_rounded_in_a_table() -> None:
    counts = molecules().clip(max=60)
    found = find_counts(cells(np.log1p(normalised(counts)).round(4)))
    np.testing.assert_array_equal(found.to_csr().toarray(), counts)


def test_a_cell_is_turned_back_whatever_the_others_hold() -> None:
    values = np.log1p(normalised(molecules()))
    some = find_counts(cells(values)).rows(20, 25).toarray()
    alone = find_counts(cells(values[20:25])).to_csr().toarray()
    np.testing.assert_array_equal(some, alone)


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    total=st.sampled_from([None, 1e3, 1e4, 1e5, 1e6]),
    log=st.sampled_from(list(LOGS)),
    kept=st.integers(60, 300),
)
def test_property_any_normalisation_is_undone(seed: int, total: float | None, log: str, kept: int) -> None:
    counts = molecules(20, seed=seed)
    values = normalised(counts, total or float(np.median(counts.sum(axis=1))))
    found = find_counts(cells(sp.csr_matrix(LOGS[log](values)[:, :kept])))
    np.testing.assert_array_equal(found.to_csr().toarray(), counts[:, :kept])


# Values that are accepted with a note, or refused


def test_expected_counts_are_accepted_with_a_note() -> None:
    counts = molecules().astype(float)
    rng = np.random.default_rng(0)
    rsem = np.where(
        (counts > 0) & (rng.random(counts.shape) < 0.4), (counts + rng.random(counts.shape)).round(2), counts
    )
    collisions = -256 * np.log(1 - np.minimum(counts, 200) / 256)  # CEL-seq barcodes of four bases
    for values in (rsem, collisions):
        found = find_counts(cells(values.astype(np.float32)))
        assert found.transform == "none"
        assert "expected counts" in found.notes[0] and "gene `gene" in found.notes[0]
        np.testing.assert_allclose(found.to_csr().toarray(), values, rtol=1e-6)


def test_a_few_expected_cells_among_counts() -> None:
    counts = molecules(900).astype(np.float32)
    counts[100:110] = -256 * np.log(1 - np.minimum(counts[100:110], 200) / 256)
    assert "expected counts" in find_counts(cells(counts)).notes[0]


def test_presence_is_noted() -> None:
    found = find_counts(cells((molecules() > 2).astype(np.uint8)), empty_cells="keep")
    assert found.transform == "none" and "no value is above 1" in found.notes[0]


def tpm() -> np.ndarray:
    lengths = np.random.default_rng(1).uniform(500, 5000, 300)
    return normalised(molecules() / lengths, 1e6)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (tpm(), "every cell sums to 1,000,000, CPM or TPM that cannot be turned back"),
        (np.log1p(tpm() / 100), "log1p of values that sum to 10,000 a cell and cannot be turned back"),
        (np.log2(1 + tpm())[:, :150], "the values look log-transformed"),
        (np.log1p(np.log1p(tpm() / 100))[:, :150], "log-transformed twice"),
        (tpm()[:, :150], "does not hold counts"),
        (tpm().round(2)[:, :150], "does not hold counts"),
        ((tpm() / 2e4).round(2)[:, :150], "does not hold counts"),  # all are multiples of 0.01
        (np.random.default_rng(0).normal(size=(50, 30)), "is negative"),
    ],
)
def test_values_that_are_no_counts_are_refused(values: np.ndarray, reason: str) -> None:
    with pytest.raises(
        CellsError, match=r"`q.h5ad` does not hold counts: .* at cell `cell\d+`, gene `gene\d+`"
    ) as caught:
        find_counts(cells(values.astype(np.float32)), name="q.h5ad")
    assert reason in caught.value.message
    assert caught.value.hint


def test_two_joined_data_sets_of_which_one_is_normalised_are_refused() -> None:
    counts = molecules(600).astype(np.float32)
    for n in (3, 300, 597):
        values = counts.copy()
        values[-n:] = np.log1p(normalised(molecules(n, seed=1)))
        with pytest.raises(CellsError, match=r"does not hold counts|mixes counts and transformed values"):
            find_counts(cells(values))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("form", [sp.csr_matrix, sp.csc_matrix, np.asarray])
def test_missing_values_are_named(bad: float, form: type) -> None:
    values = molecules(900).astype(np.float32)
    values[70, 3] = bad
    with pytest.raises(CellsError, match=r"missing or infinite value: (nan|inf) at cell `cell70`, gene `gene3`"):
        find_counts(cells(form(values)))


def test_negative_whole_numbers_are_named() -> None:
    values = molecules()
    values[4, 9] = -2
    with pytest.raises(CellsError, match="-2 at cell `cell4`, gene `gene9` is negative"):
        find_counts(cells(values))


# Names and shapes


def test_repeated_gene_names() -> None:
    adata = cells(molecules())
    adata.var_names = ["TBCE", "TBCE", *adata.var_names[2:]]
    with pytest.raises(CellsError, match="names gene `TBCE` more than once") as caught:
        find_counts(adata)
    assert "gene_ids" in str(caught.value.hint)
    adata.var["gene_ids"] = [f"ENSG{j:011d}" for j in range(300)]
    before = adata.var.copy()
    found = find_counts(adata)
    assert found.genes.index[1] == "ENSG00000000001" and found.genes["gene_symbol"].iloc[1] == "TBCE"
    assert "`TBCE`" in found.notes[0] and "`gene_ids`" in found.notes[0]
    pd.testing.assert_frame_equal(adata.var, before)


def test_repeated_cell_names() -> None:
    adata = cells(molecules())
    adata.obs_names = ["a", "a", *adata.obs_names[2:]]
    with pytest.raises(CellsError, match="names cell `a` more than once") as caught:
        find_counts(adata)
    assert "obs_names_make_unique" in str(caught.value.hint)


@pytest.mark.parametrize("form", [sp.csr_matrix, np.asarray])
def test_empty_cells(form: type, tmp_path: Path) -> None:
    counts = molecules()
    counts[[3, 8]] = 0
    adata = cells(form(counts))
    with pytest.raises(CellsError, match=r"no counts in cell `cell3` \(2 cells have none\)") as caught:
        find_counts(adata)
    assert "--empty-cells keep" in str(caught.value.hint)
    found = find_counts(adata, empty_cells="keep")
    assert "2 of 60 cells have no counts" in found.notes[0]
    assert found.rows(3, 4).nnz == 0
    adata.write_h5ad(tmp_path / "a.h5ad")
    with pytest.raises(CellsError, match="cell3"):
        find_counts(ad.read_h5ad(tmp_path / "a.h5ad", backed="r")).to_csr()
    with pytest.raises(CellsError, match="`empty_cells` is `drop`"):
        find_counts(adata, empty_cells="drop")


@pytest.mark.parametrize("shape", [(0, 5), (5, 0)])
def test_no_cells_or_no_genes(shape: tuple[int, int]) -> None:
    with pytest.raises(CellsError, match=f"{shape[0]} cells and {shape[1]} genes"):
        find_counts(cells(np.zeros(shape)))


GENES = pd.Index(["ACTB", "RPL3", "RPS6", "MT-CO1", "CD3E", "INS", *(f"Gm{i}" for i in range(30))])
BARCODES = pd.Index([f"AAACCTGAGC{a}{b}TTGG-1" for a in "ACGT" for b in "ACGT"])


def test_transposed_cells_are_recognised() -> None:
    assert is_transposed(GENES, BARCODES) and not is_transposed(BARCODES, GENES)
    names = pd.Index([f"cell_{i}" for i in range(40)])
    assert is_transposed(GENES, names) and not is_transposed(names, GENES)
    assert not is_transposed(names, pd.Index(["a", "b"]))
    assert is_transposed(pd.Index([f"ENSMUSG{i:011d}" for i in range(9)]), names)
    counts = molecules(len(GENES), len(BARCODES))
    adata = ad.AnnData(counts, obs=pd.DataFrame(index=GENES), var=pd.DataFrame(index=BARCODES))
    with pytest.raises(CellsError, match="genes in rows and cells in columns: the first row is `ACTB`"):
        find_counts(adata)


def test_the_data_are_not_changed() -> None:
    adata = cells(sp.csc_matrix(np.log1p(normalised(molecules()))))
    adata.X.data[5] = 0.0  # a stored zero
    before = adata.copy()
    find_counts(adata).to_csr()
    assert adata.X.format == "csc" and adata.X.nnz == before.X.nnz
    np.testing.assert_array_equal(adata.X.data, before.X.data)
    assert list(adata.uns) == [] and list(adata.var.columns) == []


# Real cells


@pytest.mark.shared
def test_every_real_file_holds_counts() -> None:
    assert len(REAL) >= 52
    for path in REAL:
        adata = ad.read_h5ad(path, backed="r")
        found = find_counts(adata, name=path.name)
        block = found.rows(0, 100)
        assert found.source == "X" and found.transform == "none", path.name
        assert block.nnz and block.data.min() > 0
        whole = (block.data == np.rint(block.data)).all()
        assert whole or path.name == "panc8_small_5tech.h5ad", path.name
        adata.file.close()


@pytest.mark.shared
def test_each_technology_of_panc8_holds_counts() -> None:
    adata = ad.read_h5ad(SHARED / "labelled/human/panc8_small_5tech.h5ad")
    for technology in adata.obs["technology"].unique():
        part = adata[adata.obs["technology"] == technology]
        found = find_counts(part)
        expected = technology not in ("Smart-seq2", "inDrop")
        assert found.transform == "none" and bool(found.notes) == expected, technology
        np.testing.assert_array_equal(found.to_csr().toarray(), part.X.toarray())


@pytest.mark.shared
@pytest.mark.parametrize(
    "file",
    [
        "human/pbmc3k",  # 10x version 1
        "human/tritschler_pancreas",  # 10x version 3
        "human/xin_delta_gamma_raw",  # full-length reads, a million a cell
        "human/ding_pbmc_indrops",  # 57 genes a cell
        "mouse/zilionis_lung_immune",
    ],
)
def test_real_counts_come_back_from_log_normalised_values(file: str) -> None:
    adata = ad.read_h5ad(SHARED / "labelled" / f"{file}.h5ad")[:100].copy()
    counts = sp.csr_matrix(adata.X).astype(np.float64)
    scale = sp.diags(1e4 / np.asarray(counts.sum(axis=1)).ravel())
    frequent = np.sort(np.argsort(-counts.getnnz(axis=0))[:1000])
    for logarithm in (np.log1p, lambda x: np.log2(1 + x)):
        values = (scale @ counts).tocsr().astype(np.float32)
        values.data = logarithm(values.data)
        for genes in (np.arange(adata.n_vars), frequent):
            part = adata[:, genes].copy()
            part.X = values[:, genes]
            found = find_counts(part, empty_cells="keep")
            assert "normalisation undone" in found.transform
            assert (found.to_csr() != counts[:, genes]).nnz == 0

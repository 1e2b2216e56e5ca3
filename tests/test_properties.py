"""Properties of readers, genes, tokens, banks, label sets, rejectors and tables that hold for whatever is drawn."""

from __future__ import annotations

import gzip
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.io import mmwrite
from scipy.special import log_softmax

from evercell.annotator import Annotator
from evercell.bank import ExampleBank
from evercell.cells import find_counts, read_cells, write_table
from evercell.checkpoint import load, save
from evercell.gene_names import current_symbol
from evercell.genes import GeneVocabulary, align
from evercell.label_sets import LabelSets
from evercell.rejection import REJECTORS, Outputs
from evercell.testing import synthetic_cells
from evercell.tokenizers import TOKENIZERS, View

GENES = list(synthetic_cells(9, n_genes=60).var_names)
FORMS = {"csr": sp.csr_matrix, "csc": sp.csc_matrix, "dense": np.asarray}
seeds = st.integers(0, 10_000)


def barcode(number: int) -> str:
    """Name of a cell; by such names a table with cells in its columns is known."""
    return "".join("ACGT"[number >> 2 * place & 3] for place in range(10)) + "-1"


def drawn(seed: int, dtype: str = "int64") -> pd.DataFrame:
    """Counts of a few cells and genes; each cell has a count of the first gene, and some values are large."""
    rng = np.random.default_rng(seed)
    shape = (int(rng.integers(2, 20)), int(rng.integers(2, len(GENES))))
    counts = rng.poisson(rng.gamma(0.3, 3.0, shape))
    counts[:, 0] += 1
    counts[0, -1] = rng.integers(0, 60_000)
    return pd.DataFrame(counts.astype(dtype), [barcode(n) for n in range(shape[0])], GENES[: shape[1]])


def written_10x_h5(frame: pd.DataFrame, path: Path) -> Path:
    counts, names = sp.csr_matrix(frame.to_numpy(np.int32)), np.array(frame.columns, dtype="S")
    with h5py.File(path, "w") as file:
        for key in ("data", "indices", "indptr"):
            file[f"matrix/{key}"] = getattr(counts, key)
        file["matrix/shape"], file["matrix/barcodes"] = frame.shape[::-1], np.array(frame.index, dtype="S")
        file["matrix/features/name"] = file["matrix/features/id"] = names
        file["matrix/features/feature_type"] = np.array([b"Gene Expression"] * len(names))
    return path


def written_10x_folder(frame: pd.DataFrame, folder: Path) -> Path:
    folder.mkdir()
    mmwrite(folder / "matrix.mtx", sp.coo_matrix(frame.to_numpy().T))
    (folder / "features.tsv").write_text("".join(f"{one}\t{one}\tGene Expression\n" for one in frame.columns))
    (folder / "barcodes.tsv.gz").write_bytes(gzip.compress("".join(f"{one}\n" for one in frame.index).encode()))
    return folder


@settings(max_examples=12, deadline=None)
@given(
    seed=seeds,
    dtype=st.sampled_from(["float32", "int64", "uint16"]),
    form=st.sampled_from(list(FORMS)),
    packed=st.sampled_from([None, "gzip", "lzf"]),
)
def test_h5ad_of_any_layout_gives_the_same_counts_backed_or_not(
    tmp_path_factory: pytest.TempPathFactory, seed: int, dtype: str, form: str, packed: Any
) -> None:
    frame, path = drawn(seed, dtype), tmp_path_factory.mktemp("h5ad") / "cells.h5ad"
    tables = [pd.DataFrame(index=names) for names in frame.axes]
    ad.AnnData(FORMS[form](frame.to_numpy()), obs=tables[0], var=tables[1]).write_h5ad(path, compression=packed)
    for backed in (False, True):
        read = read_cells(path, backed=backed)
        assert list(read.obs_names) == list(frame.index) and list(read.var_names) == list(frame.columns)
        assert np.array_equal(find_counts(read).to_csr().toarray(), frame.to_numpy())


@settings(max_examples=4, deadline=None)
@given(seed=seeds)
def test_every_format_gives_the_same_counts(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    frame, folder = drawn(seed), tmp_path_factory.mktemp("formats")
    paths = [folder / name for name in ("cells.csv", "genes.tsv", "cells.csv.gz")]
    frame.to_csv(paths[0])
    frame.T.to_csv(paths[1], sep="\t")
    frame.to_csv(paths[2], sep=";")
    paths += [written_10x_h5(frame, folder / "cells.h5"), written_10x_folder(frame, folder / "10x")]
    for path in paths:
        read = read_cells(path)
        found = pd.DataFrame(find_counts(read).to_csr().toarray(), read.obs_names, read.var_names)
        assert found.astype(int).equals(frame.rename_axis(None)), path


@settings(max_examples=15, deadline=None)
@given(seed=seeds, twice=st.integers(0, 5), extra=st.integers(0, 5))
def test_order_repeats_and_strangers_among_genes_change_nothing(seed: int, twice: int, extra: int) -> None:
    """A gene whose counts are split over two rows, and genes that nobody knows, leave the result as it is."""
    frame, rng = drawn(seed), np.random.default_rng(seed)
    vocabulary = GeneVocabulary.of(GENES)
    expected = align(list(frame.columns), vocabulary, min_genes=1)
    counts = expected.apply(frame.to_numpy()).toarray()
    parts = frame.to_numpy().copy()
    again = rng.integers(0, frame.shape[1], twice)
    more = np.zeros((len(frame), twice), dtype=parts.dtype)
    for number, gene in enumerate(again):
        more[:, number] = rng.integers(0, parts[:, gene] + 1)
        parts[:, gene] -= more[:, number]
    names = [*frame.columns, *frame.columns[again], *(f"contig_{n}_orf" for n in range(extra))]
    whole = np.hstack([parts, more, rng.integers(0, 9, (len(frame), extra))])
    order = rng.permutation(len(names))
    found = align([names[n] for n in order], vocabulary, min_genes=1)
    assert np.array_equal(found.apply(whole[:, order]).toarray(), counts)
    assert np.array_equal(found.measured, expected.measured)
    assert found.coverage.n_matched == expected.coverage.n_matched


@settings(max_examples=15, deadline=None)
@given(seed=seeds, name=st.sampled_from(list(TOKENIZERS)))
def test_tokens_do_not_depend_on_the_order_of_genes_nor_on_stored_zeros_nor_on_other_cells(
    seed: int, name: str
) -> None:
    frame, rng = drawn(seed), np.random.default_rng(seed)
    vocabulary, tokenizer = GeneVocabulary.of(GENES), TOKENIZERS[name]()

    def tokens(genes: list[str], counts: Any) -> Any:
        alignment = align(genes, vocabulary, min_genes=1)
        cells = ad.AnnData(counts, var=pd.DataFrame(index=genes))
        counts = find_counts(cells, empty_cells="keep").to_csr()
        return tokenizer.tokenize(View.whole(alignment.apply(counts), alignment.measured))

    expected = tokens(list(frame.columns), frame.to_numpy())
    order = rng.permutation(frame.shape[1])
    zeros = sp.csr_matrix(np.ones(frame.shape))
    zeros.data = frame.to_numpy()[:, order].ravel().astype(float)  # every value is stored, zeros too
    found = tokens([frame.columns[n] for n in order], zeros)
    for cell in range(len(frame)):
        alone = tokens(list(frame.columns), frame.to_numpy()[cell : cell + 1])
        sets = []
        for batch, row in ((expected, cell), (found, cell), (alone, 0)):
            mask = batch.mask[row]
            sets.append(dict(zip(batch.gene_ids[row][mask].tolist(), batch.values[row][mask].tolist(), strict=True)))
        assert sets[0] == sets[1] == sets[2]


@settings(max_examples=15, deadline=None)
@given(seed=seeds)
def test_a_bank_that_is_taken_apart_and_joined_again_holds_the_same_cells(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n, n_genes, n_studies = int(rng.integers(1, 30)), int(rng.integers(1, 12)), int(rng.integers(1, 4))
    bank = ExampleBank(
        sp.csr_matrix(rng.poisson(0.7, (n, n_genes)).astype(np.float32)), rng.integers(0, 4, n), rng.integers(1, 4, n),
        rng.integers(0, n_studies, n), rng.random((n_studies, n_genes)) < 0.7,
    )  # fmt: skip
    order, cut = rng.permutation(n), int(rng.integers(0, n + 1))
    both = bank.taken(order[:cut]).joined(bank.taken(order[cut:]))
    assert len(both) == n
    back = np.argsort(order)
    for one, two in ((both.counts[back].toarray(), bank.counts.toarray()), (both.codes[back], bank.codes),
                     (both.stages[back], bank.stages),
                     (both.measured[both.studies[back]], bank.measured[bank.studies])):  # fmt: skip
        assert np.array_equal(one, two)


@settings(max_examples=3, deadline=None)
@given(seed=seeds)
def test_a_bank_is_read_as_it_was_written(
    tmp_path_factory: pytest.TempPathFactory, model: Annotator, seed: int
) -> None:
    rows = np.sort(np.random.default_rng(seed).choice(len(model.bank), min(len(model.bank), 20), replace=False))
    part = replace(model, bank=model.bank.taken(rows))
    read = load(save(part, tmp_path_factory.mktemp("bank") / "model")).bank
    assert np.array_equal(read.counts.toarray(), part.bank.counts.toarray())
    for name in ("codes", "stages", "studies", "measured"):
        assert np.array_equal(getattr(read, name), getattr(part.bank, name)), name


rates = st.lists(st.floats(0.01, 0.9), min_size=2, max_size=6).map(sorted)


def made_up(seed: int, n_cells: int = 120, n_types: int = 4) -> tuple[Outputs, np.ndarray]:
    rng = np.random.default_rng(seed)
    codes = np.concatenate([np.arange(n_types), rng.integers(0, n_types, n_cells - n_types)])
    x = 3.0 * np.eye(n_types, 8)[codes] + rng.normal(size=(n_cells, 8))
    logits = x[:, :n_types].astype(np.float32)
    counts = rng.poisson(3.0 + 5.0 * np.repeat(np.eye(n_types)[codes], 6, axis=1)).astype(np.float32)
    view = View.whole(sp.csr_matrix(counts))
    return Outputs(x.astype(np.float32), logits, log_softmax(logits, axis=1).astype(np.float32), view), codes


@settings(max_examples=25, deadline=None)
@given(seed=seeds, asked=rates)
def test_a_higher_rate_of_errors_never_adds_a_type_to_a_set(seed: int, asked: list[float]) -> None:
    known, codes = made_up(seed)
    sets = LabelSets.calibrated(known.log_proba, codes, 4)
    log_proba = made_up(seed + 1)[0].log_proba
    members = [sets.members(log_proba, rate) for rate in asked]
    for strict, loose in pairwise(members):
        assert not (loose & ~strict).any()
    best = log_proba.argmax(axis=1)
    assert all(one[np.arange(len(best)), best].all() for one in members)


@pytest.mark.parametrize("name", list(REJECTORS))
@settings(max_examples=3, deadline=None)
@given(seed=seeds, asked=rates)
def test_a_higher_rate_never_takes_a_cell_back_that_was_rejected(name: str, seed: int, asked: list[float]) -> None:
    rejector = REJECTORS[name].fitted(*made_up(seed)).calibrated(made_up(seed + 1)[0])
    outputs = made_up(seed + 2)[0]
    scores = rejector.score(outputs)
    rejected = [scores > rejector.threshold(rate) for rate in asked]
    for fewer, more in pairwise(rejected):
        assert not (fewer & ~more).any()


text = st.text(st.sampled_from("=+-@\t\r\n(|!'\"a1 ,;\uff1d\uff0b"), max_size=6)


@settings(max_examples=20, deadline=None)
@given(
    texts=st.lists(text, min_size=1, max_size=8), numbers=st.lists(st.floats(allow_nan=False), min_size=1, max_size=8)
)
def test_tables_come_back_and_hold_no_formula(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], numbers: list[float]
) -> None:
    """Numbers stay numbers, also negative ones written as text; of a text at most an apostrophe is to be taken off."""
    path = tmp_path_factory.mktemp("tables") / "t.csv"
    n = min(len(texts), len(numbers))
    frame = pd.DataFrame({"text": texts[:n], "number": numbers[:n], "written": [str(one) for one in numbers[:n]]})
    write_table(frame, path)
    read = pd.read_csv(path, dtype=str, keep_default_na=False, na_filter=False)
    assert read["number"].astype(float).tolist() == numbers[:n]
    assert read["written"].tolist() == frame["written"].tolist()
    for given_text, found in zip(frame["text"], read["text"], strict=True):
        shown = given_text.replace("\r", " ")  # where it is not quoted, it would end the row
        assert found in (shown, f"'{shown}")
        assert not found.startswith(("=", "@", "\t", "\r", "\n", "\uff1d"))
        assert not (found[:1] in "+-\uff0b" and set(found) & set("(|!="))


def test_the_genes_of_these_tests_have_names_of_their_own() -> None:
    assert len(set(map(current_symbol, GENES))) == len(GENES)

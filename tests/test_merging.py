"""Files brought into one, and the sources of a merged file told apart again."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from scipy.io import mmwrite

import evercell as ec
from evercell import sources
from evercell.cells import read_cells
from evercell.celltypes import CellTypes
from evercell.counts import find_counts
from evercell.errors import CellsError, GenesError, LabelsError, SettingsError
from evercell.examples import copy_examples
from evercell.finetuning import quick_settings
from evercell.gene_names import canonical_genes, current_symbol
from evercell.merging import merge, unmerged
from evercell.pretraining_cells import gathered, shared_vocabulary
from evercell.pretraining_studies import read_for_pretraining
from evercell.sources import file_stems, gene_table
from evercell.testing import synthetic_cells
from evercell.training_cells import gather, read_studies, vocabulary_of


def written(folder: Path, *, species: str = "human") -> list[Path]:
    """Two studies with other genes, other names for them and other columns; cells share no name."""
    first = synthetic_cells(90, n_genes=200, seed=1)
    second = synthetic_cells(60, n_genes=300, seed=2, species=species)[:, 80:].copy()
    second.var_names = canonical_genes(second.var_names.tolist()).names
    second.obs = second.obs.rename(columns={"donor": "patient"})
    files = [folder / "first.h5ad", folder / "second.h5ad"]
    first.write_h5ad(files[0])
    second.write_h5ad(files[1])
    return files


def dense(adata: ad.AnnData, genes: list[str]) -> np.ndarray:
    """Counts by canonical names; a gene that is not there has none."""
    names = canonical_genes(adata.var).names
    frame = pd.DataFrame(sp.csr_matrix(adata.X).toarray().astype(int), columns=names)
    return frame.reindex(columns=genes, fill_value=0).to_numpy()


def test_union_keeps_every_count_and_says_who_measured_what(tmp_path: Path) -> None:
    files = written(tmp_path)
    result = merge(files, tmp_path / "merged.h5ad")
    merged = read_cells(result.path)
    assert merged.shape == (150, 300)
    assert merged.X.dtype.kind == "u"
    genes = canonical_genes(merged.var).names.tolist()
    assert genes == merged.var["gene_ids"].tolist()
    given = [ad.read_h5ad(file) for file in files]
    np.testing.assert_array_equal(merged.X.toarray(), np.vstack([dense(one, genes) for one in given]))
    measured = merged.varm["measured"]
    assert measured.dtype == bool
    for number, one in enumerate(given):
        assert set(np.array(genes)[measured[:, number]]) == set(canonical_genes(one.var).names)
    assert merged.var["sources"].tolist() == measured.sum(axis=1).tolist()
    assert merged.obs_names[0] == "study1_cell00000-first"
    assert merged.obs["barcode"].tolist() == [name for one in given for name in one.obs_names]
    assert merged.obs["source"].value_counts().to_dict() == {"first": 90, "second": 60}
    assert merged.obs["cell_type"].tolist() == [label for one in given for label in one.obs["cell_type"]]
    assert merged.obs["donor"].notna().sum() == 90
    assert merged.obs["patient"].notna().sum() == 60
    assert json.loads(merged.uns["evercell_merge"]["manifest"]) == result.manifest
    assert json.loads((tmp_path / "merged.manifest.json").read_text()) == result.manifest
    assert not (tmp_path / "merged.duplicates.csv").exists()
    assert sorted(one.name for one in tmp_path.iterdir()) == [
        "first.h5ad", "merged.h5ad", "merged.manifest.json", "second.h5ad"
    ]  # fmt: skip


def test_intersection_keeps_the_genes_of_all_and_no_cell_without_a_count(tmp_path: Path) -> None:
    files = written(tmp_path)
    first = ad.read_h5ad(files[0])
    counts = first.X.tolil()
    counts[4, 80:] = 0  # counts of genes that the other file did not measure only
    first.X = counts.tocsr()
    first.write_h5ad(files[0])
    result = merge(files, tmp_path / "merged.h5ad", genes="intersection")
    merged = read_cells(result.path, backed=True)
    assert merged.shape == (149, 120)
    assert merged.varm["measured"].all()
    assert (merged.X[:].sum(axis=1) > 0).all()
    facts = result.manifest["sources"][0]
    assert (facts["cells"], facts["empty_cells_left_out"], facts["cells_written"]) == (90, 1, 89)
    assert (facts["genes"], facts["genes_in_output"]) == (200, 120)


def test_mouse_beside_human_goes_through_orthologues(tmp_path: Path) -> None:
    files = written(tmp_path, species="mouse")
    mouse = ad.read_h5ad(files[1])
    # No orthologue; and known by nothing but a symbol, which is an older one of a human gene.
    more = ad.AnnData(
        sp.csr_matrix(np.ones((60, 2))), obs=mouse.obs, var=pd.DataFrame(index=["ENSMUSG00000052305", "Stra13"])
    )
    ad.concat([mouse, more], axis=1, merge="first").write_h5ad(files[1])
    result = merge(files, tmp_path / "merged.h5ad")
    assert [one["species"] for one in result.manifest["sources"]] == ["human", "mouse"]
    merged = read_cells(result.path)
    assert merged.shape == (150, 302)
    assert merged.var_names[-2:].tolist() == ["ENSMUSG00000052305", "mm10___Stra13"]
    back = canonical_genes(merged.var)
    assert (back.species, back.names.tolist()) == ("human", merged.var["gene_ids"].tolist())
    human = canonical_genes(synthetic_cells(8, n_genes=300).var_names.tolist()).names
    assert set(human) < set(back.names)
    shared = merged.varm["measured"].all(axis=1)
    assert shared.sum() == 120


def test_gene_table_is_read_back_as_the_same_genes() -> None:
    from evercell.genes import GeneVocabulary

    names = ("ENSG00000141510", "ENSG00000075624", "TBCE-LIKE", "ENSG00000284770", "NOT_KNOWN")
    symbols = (*(current_symbol(name) for name in names[:2]), "TBCE-1", "TBCE", "NOT_KNOWN")
    table = gene_table(GeneVocabulary(names, symbols))
    assert canonical_genes(table).names.tolist() == list(names) == table["gene_ids"].tolist()
    assert table.index.is_unique
    assert table.index[0] == "TP53"


def test_formats_are_mixed(tmp_path: Path) -> None:
    whole = synthetic_cells(60, n_genes=200, seed=3)
    tenx, table, zarr, h5ad = (whole[rows].copy() for rows in (range(20), range(20, 30), range(30, 45), range(45, 60)))
    folder = tmp_path / "sample1"
    folder.mkdir()
    with gzip.open(folder / "matrix.mtx.gz", "wb") as file:
        mmwrite(file, sp.coo_matrix(tenx.X.T))
    (folder / "barcodes.tsv").write_text("\n".join(tenx.obs_names) + "\n")
    ids = canonical_genes(tenx.var_names.tolist()).names
    lines = [f"{i}\t{name}\tGene Expression" for i, name in zip(ids, tenx.var_names, strict=True)]
    (folder / "features.tsv").write_text("\n".join(lines) + "\n")
    pd.DataFrame(table.X.toarray().T, index=table.var_names, columns=table.obs_names).to_csv(tmp_path / "t.csv.gz")
    zarr.write_zarr(tmp_path / "z.zarr")
    # Normalised: the counts are got back.
    h5ad.X = sp.csr_matrix(np.log1p(h5ad.X.toarray() / h5ad.X.sum(axis=1).reshape(-1, 1) * 1e4))
    h5ad.write_h5ad(tmp_path / "h.h5ad")
    files = [folder, tmp_path / "t.csv.gz", tmp_path / "z.zarr", tmp_path / "h.h5ad"]
    result = merge(files, tmp_path / "out.zarr")
    merged = read_cells(result.path)
    assert merged.obs["source"].cat.categories.tolist() == ["sample1", "t", "z", "h"]
    genes = canonical_genes(merged.var).names.tolist()
    np.testing.assert_array_equal(merged.X.toarray(), dense(whole, genes))
    assert merged.obs["barcode"].tolist() == whole.obs_names.tolist()
    assert "undone" in result.manifest["sources"][3]["transform"]
    assert [name for name, _ in unmerged(merged, "out")] == ["out/sample1", "out/t", "out/z", "out/h"]


def test_the_copy_given_first_is_kept(tmp_path: Path) -> None:
    files = written(tmp_path)
    again = ad.read_h5ad(files[0])[10:30, 50:].copy()
    again.obs_names = [f"copy{i}" for i in range(20)]
    again.write_h5ad(tmp_path / "again.h5ad")
    files.append(tmp_path / "again.h5ad")
    dropped = merge(files, tmp_path / "dropped.h5ad")
    assert dropped.manifest["cells"] == 150
    assert dropped.manifest["duplicates"]["same counts"] == 20
    assert dropped.manifest["sources"][2]["duplicates_left_out"] == 20
    table = pd.read_csv(tmp_path / "dropped.duplicates.csv")
    assert table.columns.tolist() == ["kind", "source", "cell", "later_source", "later_cell", "cosine"]
    assert table["later_cell"].tolist() == again.obs_names.tolist()
    assert [name for name, _ in unmerged(read_cells(dropped.path))] == ["the data/first", "the data/second"]
    kept = merge(files, tmp_path / "kept.h5ad", duplicates="keep")
    assert kept.manifest["cells"] == 170
    assert len(kept.duplicates) == 20
    assert kept.manifest["notes"] == dropped.manifest["notes"] == []
    other = merge([files[2], *files[:2]], tmp_path / "other.h5ad")
    assert [one["cells_written"] for one in other.manifest["sources"]] == [20, 70, 60]
    with pytest.raises(CellsError, match=r"20 cells are there twice; the first is `copy0` of `again`, which is"):
        merge(files, tmp_path / "none.h5ad", duplicates="error")
    assert not [one for one in tmp_path.iterdir() if "none" in one.name]


def test_a_copy_with_few_genes_that_comes_first_is_told(tmp_path: Path) -> None:
    whole = synthetic_cells(30, n_genes=300)
    whole[:, :100].copy().write_h5ad(tmp_path / "panel.h5ad")
    whole.write_h5ad(tmp_path / "whole.h5ad")
    files = [tmp_path / "panel.h5ad", tmp_path / "whole.h5ad"]
    (note,) = merge(files, tmp_path / "merged.h5ad").manifest["notes"]
    assert note.startswith(
        "30 cells of `whole` were left out for their copies in `panel`, which has 100 genes in place"
    )
    assert merge(files[::-1], tmp_path / "merged.h5ad").manifest["notes"] == []


def test_an_old_table_of_duplicates_goes_with_its_file(tmp_path: Path) -> None:
    files = written(tmp_path)
    (tmp_path / "merged.duplicates.csv").write_text("of the file before")
    merge(files, tmp_path / "merged.h5ad")
    assert not (tmp_path / "merged.duplicates.csv").exists()


# --- runs that were killed


def tree(path: Path) -> dict[str, bytes]:
    files = [path] if path.is_file() else sorted(one for one in path.rglob("*") if one.is_file())
    return {str(one.relative_to(path.parent)): one.read_bytes() for one in files}


@pytest.mark.parametrize("suffix", [".h5ad", ".zarr"])
def test_the_same_files_give_the_same_bytes(tmp_path: Path, suffix: str) -> None:
    files = written(tmp_path)
    found = []
    for _ in range(2):
        merge(files, tmp_path / f"merged{suffix}")
        found.append(tree(tmp_path / f"merged{suffix}") | tree(tmp_path / "merged.manifest.json"))
    assert found[0] == found[1]


def merge_killed(files: list[Path], target: Path, prepare: Callable[[], None]) -> None:
    """Merge in a process that `prepare` has killed as the kernel does it: nothing is tidied up."""
    child = os.fork()
    if child == 0:
        try:
            prepare()
            merge(files, target)
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize("place", ["second file", "writing"])
def test_a_killed_merge_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    files = written(tmp_path)
    merge(files, tmp_path / "merged.h5ad")
    whole = tree(tmp_path / "merged.h5ad") | tree(tmp_path / "merged.manifest.json")
    (tmp_path / "merged.h5ad").unlink()

    read = sources.read_cells

    def prepare() -> None:

        def killed(path: Path, *_: object, **__: object) -> None:
            path.write_bytes(b"half of it")
            os.kill(os.getpid(), signal.SIGKILL)

        def one_file(path: Path, **how: object) -> ad.AnnData:
            if path == files[1]:
                os.kill(os.getpid(), signal.SIGKILL)
            return read(path, **how)  # type: ignore[arg-type]

        if place == "writing":
            monkeypatch.setattr("evercell.merging._write", killed)
        else:
            monkeypatch.setattr(sources, "read_cells", one_file)

    merge_killed(files, tmp_path / "merged.h5ad", prepare)
    assert not (tmp_path / "merged.h5ad").exists()
    left = {one.name for one in tmp_path.iterdir()} - {"first.h5ad", "second.h5ad", "merged.manifest.json"}
    assert left == {".merged.h5ad.parts", ".merged.h5ad.lock"}  # the lock is free; the next call removes both

    seen: list[Path] = []

    def watched(path: Path, **how: object) -> ad.AnnData:
        seen.append(path)
        return read(path, **how)  # type: ignore[arg-type]

    monkeypatch.setattr(sources, "read_cells", watched)
    merge(files, tmp_path / "merged.h5ad")
    assert seen == ([] if place == "writing" else [files[1]])
    assert tree(tmp_path / "merged.h5ad") | tree(tmp_path / "merged.manifest.json") == whole
    assert not (tmp_path / ".merged.h5ad.parts").exists()


@pytest.mark.parametrize("gone", [0, 1, 99])
def test_a_merge_that_is_killed_while_it_tidies_up_can_be_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gone: int
) -> None:
    """The file is there; a half of the folder of its parts must not stop the same command."""
    files = written(tmp_path)
    merge(files, tmp_path / "merged.h5ad")
    whole = tree(tmp_path)
    remove = shutil.rmtree

    def prepare() -> None:

        def killed(path: Path, *given: object, **how: object) -> None:
            if not Path(path).name.endswith(".merged.h5ad.parts"):
                return remove(path, *given, **how)  # type: ignore[arg-type]
            for one in sorted(one for one in Path(path).rglob("*") if one.is_file())[:gone]:
                one.unlink()
            os.kill(os.getpid(), signal.SIGKILL)

        monkeypatch.setattr(shutil, "rmtree", killed)

    merge_killed(files, tmp_path / "merged.h5ad", prepare)
    assert [one for one in tmp_path.iterdir() if one.name.endswith(".parts")], "nothing was left to be removed"
    merge(files, tmp_path / "merged.h5ad")
    assert tree(tmp_path) == whole


def test_a_file_that_changed_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = written(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("evercell.merging.find_duplicates", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        merge(files, tmp_path / "merged.h5ad")
    ad.read_h5ad(files[0])[:50].copy().write_h5ad(files[0])
    assert merge(files, tmp_path / "merged.h5ad").manifest["cells"] == 110


# --- sources told apart again


def test_what_was_not_merged_comes_back_as_it_is() -> None:
    cells = synthetic_cells(10)
    ((name, same),) = unmerged(cells, "x.h5ad")
    assert name == "x.h5ad"
    assert same is cells


def test_sources_come_back_after_genes_and_cells_were_left_out(tmp_path: Path) -> None:
    files = written(tmp_path)
    merged = read_cells(merge(files, tmp_path / "merged.h5ad").path)
    rng = np.random.default_rng(0)
    some = merged[rng.permutation(150)[:70], np.sort(rng.choice(300, 150, replace=False))].copy()
    parts = dict(unmerged(some, "m"))
    assert list(parts) == ["m/first", "m/second"]
    for name, file in zip(parts, files, strict=True):
        given, part = ad.read_h5ad(file), parts[name]
        genes = [gene for gene in canonical_genes(given.var).names if gene in set(some.var["gene_ids"])]
        assert set(canonical_genes(part.var).names) == set(genes)
        rows = given.obs_names.get_indexer(part.obs["barcode"])
        np.testing.assert_array_equal(dense(part, genes), dense(given[rows], genes))
    only = unmerged(some[some.obs["source"] == "second"])
    assert [name for name, _ in only] == ["the data/second"]


def test_counts_set_aside_in_raw_are_split_too(tmp_path: Path) -> None:
    merged = read_cells(merge(written(tmp_path), tmp_path / "merged.h5ad").path)
    merged.raw = merged
    merged.X = sp.csr_matrix(merged.X, dtype=np.float32) * 0.37 - 0.0
    merged.X.data = np.sqrt(merged.X.data)
    variable = merged[:, ::4].copy()
    variable.write_h5ad(tmp_path / "variable.h5ad")
    for cells in (
        variable,
        read_cells(tmp_path / "variable.h5ad"),
        read_cells(tmp_path / "variable.h5ad", backed=True),
    ):
        shapes = [find_counts(part, layer="raw").shape for _, part in unmerged(cells)]
        assert shapes == [(90, 200), (60, 220)]
        assert cells.raw.shape == (150, 300)
    names = [study.genes.shape[0] for study in read_for_pretraining([tmp_path / "variable.h5ad"], layer="raw")]
    assert names == [200, 220]


@pytest.mark.parametrize("lost", ["source", "measured", "genes"])
def test_what_a_merged_file_must_keep_is_said(tmp_path: Path, lost: str) -> None:
    merged = read_cells(merge(written(tmp_path), tmp_path / "merged.h5ad").path)
    if lost == "source":
        del merged.obs["source"]
    elif lost == "measured":
        del merged.varm["measured"]
    else:
        merged = merged[:, ~merged.varm["measured"][:, 1]].copy()
    said = "measured none of its 80 genes" if lost == "genes" else f"'{lost}'"
    with pytest.raises(CellsError, match=said):
        unmerged(merged)


@pytest.mark.parametrize("species", ["human", "mouse"])
def test_training_on_a_merged_file_is_training_on_its_files(tmp_path: Path, species: str) -> None:
    files = written(tmp_path, species=species)
    merged = read_cells(merge(files, tmp_path / "merged.h5ad").path)
    given = [read_cells(file) for file in files]
    types = CellTypes(("alpha", "beta", "delta", "gamma"))
    apart = read_studies(given, "cell_type", groups="donor", names=["first", "second"])
    together = read_studies([merged], "cell_type", groups="donor", names=["m"])
    assert [study.name for study in together] == ["m/first", "m/second"]
    vocabulary = vocabulary_of(apart)
    assert set(vocabulary_of(together).names) == set(vocabulary.names)
    one, other = gather(apart, vocabulary, types), gather(together, vocabulary, types)
    np.testing.assert_array_equal(one.measured, other.measured)
    assert (one.counts != other.counts).nnz == 0
    np.testing.assert_array_equal(one.codes, other.codes)
    np.testing.assert_array_equal(one.studies, other.studies)
    assert one.groups is not None
    assert other.groups is not None
    assert [f"m/{group}" for group in one.groups] == other.groups.tolist()


def test_sources_without_labels_are_left_out(tmp_path: Path) -> None:
    files = written(tmp_path)
    second = ad.read_h5ad(files[1])
    del second.obs["cell_type"]
    second.write_h5ad(files[1])
    merged = read_cells(merge(files, tmp_path / "merged.h5ad").path)
    assert [study.name for study in read_studies([merged], "cell_type", names=["m"])] == ["m/first"]
    merged.obs["cell_type"] = "unknown"
    with pytest.raises(LabelsError, match="names no label"):
        read_studies([merged], "cell_type", names=["m"])


def test_models_are_made_and_updated_with_merged_files(tmp_path: Path) -> None:
    files = written(tmp_path)
    merged = read_cells(merge(files, tmp_path / "merged.h5ad").path)
    model = ec.train(merged, names=["m"], settings=quick_settings(), shown=False)
    apart = ec.train([read_cells(file) for file in files], settings=quick_settings(), shown=False)
    assert model.vocabulary.names == apart.vocabulary.names
    np.testing.assert_array_equal(model.bank.measured, apart.bank.measured)
    assert [one["name"] for one in model.ledger.stages[0].facts["data"]] == ["m/first", "m/second"]
    grown = ec.update(model, merged, names=["again"], force=True, strategy="analytic", shown=False)
    assert [one["name"] for one in grown.ledger.stages[1].facts["data"]] == ["again/first", "again/second"]


def test_pretraining_takes_the_sources_as_studies(tmp_path: Path) -> None:
    files = written(tmp_path)
    merge(files, tmp_path / "merged.h5ad")
    (tmp_path / "store").mkdir()
    apart = read_for_pretraining(files, labels="cell_type", groups="donor")
    for store in (None, tmp_path / "store"):
        together = read_for_pretraining([tmp_path / "merged.h5ad"], labels="cell_type", groups="donor", store=store)
        assert [study.name for study in together] == ["merged/first", "merged/second"]
        assert [study.groups is None for study in together] == [False, True]
        vocabulary = shared_vocabulary(apart, "union")
        rows = [np.arange(90), np.arange(60)]
        one, other = gathered(apart, rows, vocabulary), gathered(together, rows, vocabulary)
        np.testing.assert_array_equal(one.measured, other.measured)
        assert all((a != b).nnz == 0 for a, b in zip(one.counts, other.counts, strict=True))
        assert one.types == other.types


def test_a_merged_file_counts_as_its_sources(tmp_path: Path) -> None:
    files = written(tmp_path)
    third = synthetic_cells(20, n_genes=100, seed=3)
    third.write_h5ad(tmp_path / "third.h5ad")
    merge(files, tmp_path / "two.h5ad", batch="donor")
    merge([tmp_path / "two.h5ad", tmp_path / "third.h5ad"], tmp_path / "three.h5ad")
    at_once = merge([*files, tmp_path / "third.h5ad"], tmp_path / "once.h5ad", batch="donor")
    one, other = (read_cells(tmp_path / f"{name}.h5ad") for name in ("three", "once"))
    assert one.obs_names.tolist() == other.obs_names.tolist()
    assert one.obs["source"].tolist() == other.obs["source"].tolist()
    assert set(one.obs["batch"][:150]) == {"first/donor1", "first/donor2", "first/donor3", "second"}
    genes = one.var_names.tolist()
    assert (one.X != other[:, genes].X).nnz == 0
    np.testing.assert_array_equal(one.varm["measured"], other[:, genes].varm["measured"])
    assert at_once.manifest["cells"] == 170


# --- tables of the cells


def test_columns_of_cells_are_joined_by_what_they_hold(tmp_path: Path) -> None:
    first, second = synthetic_cells(6, n_genes=120, seed=1), synthetic_cells(4, n_genes=120, seed=2)
    first.obs = pd.DataFrame(
        {
            "age": [1, 2, 3, 4, 5, 6],
            "dose": [1, 2, 3, 4, 5, 6],
            "smoker": [True] * 3 + [False] * 3,
            "batch": pd.Categorical(["a", "b"] * 3),
            "source": "the lab",
            "stage": pd.Categorical(["late", "early", None] * 2, categories=["late", "early"]),
            "sick": True,
        },
        index=first.obs_names,
    )
    second.obs = pd.DataFrame(
        {"age": [0.5] * 4, "dose": ["low", "high"] * 2, "smoker": [False] * 4, "stage": ["early", "x", "y", "late"]},
        index=second.obs_names,
    )
    first.write_h5ad(tmp_path / "one.h5ad")
    second.write_h5ad(tmp_path / "two.h5ad")
    result = merge([tmp_path / "one.h5ad", tmp_path / "two.h5ad"], tmp_path / "merged.h5ad", duplicates="keep")
    obs = read_cells(result.path).obs
    assert obs["age"].tolist() == [1, 2, 3, 4, 5, 6, 0.5, 0.5, 0.5, 0.5]
    assert obs["dose"].tolist() == ["1", "2", "3", "4", "5", "6", "low", "high", "low", "high"]
    assert result.manifest["notes"] == [
        "column `dose` of obs holds numbers in `one`, words in `two`: it is kept as words"
    ]
    assert obs["smoker"].tolist() == [True] * 3 + [False] * 7
    assert obs["stage"].cat.categories.tolist() == ["late", "early", "x", "y"]
    assert obs["stage"].isna().sum() == 2
    assert obs["sick"].tolist()[:6] == ["True"] * 6
    assert obs["sick"].isna().sum() == 4
    assert obs["batch"].tolist() == ["one/a", "one/b"] * 3 + ["two"] * 4
    assert obs["original_source"].tolist()[:6] == ["the lab"] * 6
    assert obs["source"].tolist() == ["one"] * 6 + ["two"] * 4


def test_a_column_of_batches_names_its_source(tmp_path: Path) -> None:
    files = written(tmp_path)
    obs = read_cells(merge(files, tmp_path / "merged.h5ad", batch="donor").path).obs
    assert set(obs["batch"]) == {"first/donor1", "first/donor2", "first/donor3", "second"}
    assert set(obs["donor"].dropna()) == {"donor1", "donor2", "donor3"}
    with pytest.raises(LabelsError, match="no file has a column `run`"):
        merge(files, tmp_path / "other.h5ad", batch="run")
    assert "batch" not in read_cells(merge(files, tmp_path / "plain.h5ad").path).obs


def test_names_of_files(tmp_path: Path) -> None:
    for name in ("a/outs/cells.h5", "b/outs/cells.h5", "c.csv.gz", "GSM1_matrix.mtx.gz", "d.e.h5ad"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert (
        file_stems([tmp_path / "c.csv.gz", tmp_path / "GSM1_matrix.mtx.gz", tmp_path / "GSM1_", tmp_path / "a"]) != []
    )
    assert file_stems([tmp_path / "c.csv.gz", tmp_path / "d.e.h5ad"]) == ["c", "d.e"]
    assert file_stems([tmp_path / "GSM1_matrix.mtx.gz"]) == file_stems([tmp_path / "GSM1_"]) == ["GSM1"]
    same = [tmp_path / "a/outs/cells.h5", tmp_path / "b/outs/cells.h5"]
    assert file_stems(same) == ["a_outs_cells", "b_outs_cells"]


# --- what can go wrong


def test_a_file_that_shares_no_genes_is_told(tmp_path: Path) -> None:
    files = written(tmp_path)
    odd = synthetic_cells(10, n_genes=200, seed=5)
    odd.var_names = [f"peak{i}" for i in range(200)]
    odd.write_h5ad(tmp_path / "odd.h5ad")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(GenesError, match=r"odd\.h5ad` shares 0 of its 200 genes .* like `peak0`") as caught:
        merge([*files, tmp_path / "odd.h5ad"], tmp_path / "merged.h5ad")
    assert "--gene-column" in str(caught.value.hint)
    assert sorted(tmp_path.iterdir()) == before


def test_wrong_settings_are_told_before_a_file_is_read(tmp_path: Path) -> None:
    files = written(tmp_path)
    for changed, said in (
        ({"genes": "all"}, "genes is `all`"),
        ({"duplicates": "no"}, "duplicates is `no`"),
        ({"names": ["a"]}, "2 files with the names"),
        ({"names": ["a", "a"]}, "2 files with the names"),
        ({"species": "rat"}, "`rat` is no species"),
    ):
        with pytest.raises((SettingsError, GenesError), match=said):
            merge(files, tmp_path / "merged.h5ad", **changed)  # type: ignore[arg-type]
    with pytest.raises(SettingsError, match="is one of the files"):
        merge(files, files[0])
    with pytest.raises(SettingsError, match="given twice"):
        merge([*files, files[0]], tmp_path / "merged.h5ad")
    with pytest.raises(SettingsError, match="no files"):
        merge([], tmp_path / "merged.h5ad")
    with pytest.raises(CellsError, match="does not end in"):
        merge(files, tmp_path / "merged.csv")
    assert sorted(one.name for one in tmp_path.iterdir()) == ["first.h5ad", "second.h5ad"]


def test_a_table_of_cells_is_joined(tmp_path: Path) -> None:
    written = copy_examples("mouse-lung", tmp_path / "raw")
    folders = [path for path in written if path.is_dir()]
    table = pd.read_csv(tmp_path / "raw" / "cells.csv")
    found = merge(folders, tmp_path / "lung.h5ad", cells=tmp_path / "raw" / "cells.csv")
    obs = read_cells(found.path).obs
    expected = table.set_index(["source", "barcode"])
    own = expected.loc[list(zip(obs["source"].astype(str), obs["barcode"].astype(str), strict=True))]
    assert obs["cell_type"].astype(str).tolist() == own["cell_type"].tolist()
    assert obs["animal"].astype(str).tolist() == own["animal"].tolist()
    assert found.manifest["notes"] == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: table.assign(source="elsewhere"), "names the source `elsewhere`; the files are"),
        (lambda table: pd.concat([table, table[:2]]), r"two rows of cell `.*` \(2 rows repeat another\)"),
        (lambda table: table.assign(barcode="x" + table["barcode"]), "no cell of the table of cells is in the files"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(tmp_path: Path, change: Any, message: str) -> None:
    written = copy_examples("mouse-lung", tmp_path / "raw")
    folders = [path for path in written if path.is_dir()][:1]
    table = pd.read_csv(tmp_path / "raw" / "cells.csv")
    table = table[table["source"] == folders[0].name]
    with pytest.raises(LabelsError, match=message):
        merge(folders, tmp_path / "lung.h5ad", cells=change(table))
    assert not (tmp_path / "lung.h5ad").exists()


def test_cells_that_the_table_does_not_tell_are_counted(tmp_path: Path) -> None:
    written = copy_examples("mouse-lung", tmp_path / "raw")
    folders = [path for path in written if path.is_dir()][:1]
    table = pd.read_csv(tmp_path / "raw" / "cells.csv")
    table = table[table["source"] == folders[0].name].drop(columns="source")[:-10]
    found = merge(folders, tmp_path / "lung.h5ad", cells=table)
    assert "the table of cells tells nothing of 10 of 60 cells" in found.manifest["notes"]
    assert read_cells(found.path).obs["cell_type"].isna().sum() == 10

"""The packaged example data."""

from __future__ import annotations

import re
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from evercell.cells import read_cells
from evercell.errors import SettingsError
from evercell.examples import EXAMPLES, copy_examples, describe, example_path, load_example
from evercell.genes import canonical_genes

SOURCES = Path(__file__).resolve().parents[2] / "shared" / "data" / "labelled" / "human"


@pytest.fixture(scope="module")
def examples() -> dict[str, ad.AnnData]:
    return {name: load_example(name) for name in EXAMPLES}


def types(adata: ad.AnnData) -> set[str]:
    return set(adata.obs["cell_type"])


def test_all_examples_together_stay_below_three_megabytes() -> None:
    assert sum(example_path(name).stat().st_size for name in EXAMPLES) < 3_000_000


def test_no_file_lies_there_that_is_no_example() -> None:
    assert {path.stem for path in example_path(EXAMPLES[0]).parent.glob("*.h5ad")} == set(EXAMPLES)


@pytest.mark.parametrize("name", EXAMPLES)
def test_counts_are_whole_and_no_cell_is_empty(examples: dict[str, ad.AnnData], name: str) -> None:
    adata = examples[name]
    assert isinstance(adata.X, sp.csr_matrix) and adata.X.has_sorted_indices
    assert adata.X.dtype.kind == "u" and adata.X.data.min() > 0
    assert (np.diff(adata.X.indptr) > 150).all()
    assert (adata.obs["n_counts_source"].to_numpy() >= np.asarray(adata.X.sum(axis=1)).ravel()).all()


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_cell_has_a_type_a_donor_a_study_and_a_technology(examples: dict[str, ad.AnnData], name: str) -> None:
    obs = examples[name].obs
    columns = obs[["cell_type", "donor", "dataset", "technology"]].astype(str)
    assert not columns.isin(["", "nan", "unknown"]).any(axis=None)
    assert len(set(columns["dataset"])) == 1


def test_genes_are_the_same_and_known_everywhere(examples: dict[str, ad.AnnData]) -> None:
    genes = examples[EXAMPLES[0]].var_names
    assert 4_000 <= len(genes) <= 8_000 and genes.is_unique
    assert all(list(adata.var_names) == list(genes) for adata in examples.values())
    assert canonical_genes(list(genes)).recognised == 1.0
    assert {"INS", "GCG", "SST", "PPY", "PECAM1", "KRT19"} <= set(genes)


def test_no_cell_is_in_two_examples(examples: dict[str, ad.AnnData]) -> None:
    profiles = {name: {row.tobytes() for row in a.X.astype(np.uint32).toarray()} for name, a in examples.items()}
    for one, other in combinations(EXAMPLES, 2):
        assert not profiles[one] & profiles[other]
        assert not set(examples[one].obs_names) & set(examples[other].obs_names)
    assert all(len(profiles[name]) == examples[name].n_obs for name in EXAMPLES)


def test_the_second_stage_brings_a_type_and_the_first_splits_stellate_cells(examples: dict[str, ad.AnnData]) -> None:
    first, second, third, unseen = (types(examples[name]) for name in EXAMPLES)
    assert "endothelial" in second - first
    assert {"activated_stellate", "quiescent_stellate"} <= first and "stellate" in second & third
    assert unseen <= first | second
    assert examples["baron_stage1"].obs["donor"].nunique() >= 3
    assert examples["baron_stage1"].obs["cell_type"].value_counts().min() >= 10


def test_markers_are_highest_in_their_types(examples: dict[str, ad.AnnData]) -> None:
    for adata in examples.values():
        for gene, cell_type in (("INS", "beta"), ("GCG", "alpha"), ("SST", "delta"), ("PPY", "gamma")):
            if cell_type in types(adata):
                counted = adata.obs["cell_type"].value_counts()
                shares = adata[:, gene].X.toarray().ravel() / np.asarray(adata.X.sum(axis=1)).ravel()
                medians = {t: np.median(shares[adata.obs["cell_type"] == t]) for t in counted.index[counted >= 10]}
                assert max(medians, key=medians.__getitem__) == cell_type


@pytest.mark.parametrize("name", EXAMPLES)
def test_source_licence_and_the_study_to_cite_are_stated(examples: dict[str, ad.AnnData], name: str) -> None:
    example = describe(name)
    assert (example.n_cells, example.n_genes) == examples[name].shape
    assert re.search("CC BY 4.0|public GEO deposit", example.licence)
    study = re.match(r"(\w+) et al\. (\d{4})", example.source)
    readme = (example_path(name).parent / "README.md").read_text()
    assert study and f"{study[1]} {study[2]}" in readme and "subset" in example.notes


def test_the_readme_gives_the_counts_of_the_files(examples: dict[str, ad.AnnData]) -> None:
    readme = (example_path(EXAMPLES[0]).parent / "README.md").read_text()
    for name, adata in examples.items():
        row = next(line for line in readme.splitlines() if line.startswith(f"| `{name}.h5ad`"))
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert cells[3:6] == [str(adata.obs["donor"].nunique()), f"{adata.n_obs:,}", f"{adata.n_vars:,}"]
        counted = dict(part.rsplit(" ", 1) for part in cells[6].split(", "))
        assert {t: int(n) for t, n in counted.items()} == adata.obs["cell_type"].value_counts().to_dict()


def test_an_unknown_example_is_answered_with_the_names() -> None:
    with pytest.raises(SettingsError, match="there is no example `baron`") as error:
        load_example("baron")
    assert "baron_stage1, fasolino_stage2" in str(error.value)


@pytest.mark.shared
@pytest.mark.slow
def test_the_script_writes_the_packaged_files_again(tmp_path: Path) -> None:
    script = Path(__file__).resolve().parents[1] / "runs" / "make_demo_data.py"
    subprocess.run([sys.executable, str(script), str(SOURCES), "--output", str(tmp_path)], check=True)
    for name in EXAMPLES:
        made, packaged = ad.read_h5ad(tmp_path / f"{name}.h5ad"), load_example(name)
        assert (made.X != packaged.X).nnz == 0
        assert made.obs.equals(packaged.obs) and list(made.var_names) == list(packaged.var_names)
        assert dict(made.uns) == dict(packaged.uns)


def test_raw_samples_are_folders_as_a_run_leaves_them(tmp_path: Path) -> None:
    written = copy_examples("mouse-lung", tmp_path / "raw")
    folders = [path for path in written if path.is_dir()]
    assert [path.name for path in folders] == ["nkx2-1_mutant", "tabula_muris", "zilionis"]
    table = pd.read_csv(tmp_path / "raw" / "cells.csv")
    for folder in folders:
        cells = read_cells(folder)
        assert sorted(cells.obs_names) == sorted(table.loc[table["source"] == folder.name, "barcode"])
        assert canonical_genes(cells.var).species == "mouse"
    genes = [set(read_cells(folder).var_names) for folder in folders]
    assert genes[0] != genes[1] and len(genes[0] & genes[1]) > 500
    assert sum(path.stat().st_size for path in (tmp_path / "raw").rglob("*") if path.is_file()) < 2_000_000


def test_examples_are_not_written_over_something(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "mine.txt").write_text("mine")
    with pytest.raises(SettingsError, match="already there"):
        copy_examples("mouse-lung", tmp_path / "raw")
    assert (tmp_path / "raw" / "mine.txt").read_text() == "mine"
    with pytest.raises(SettingsError, match="no examples `brain`"):
        copy_examples("brain", tmp_path / "other")

"""Made-up cells."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from sklearn.linear_model import LogisticRegression

from evercell.errors import SettingsError
from evercell.genes import canonical_genes, orthologues
from evercell.testing import TYPES, synthetic_cells


def log_normalised(adata: ad.AnnData) -> np.ndarray:
    counts = adata.X.toarray().astype(float)
    return np.log1p(1e4 * counts / counts.sum(axis=1, keepdims=True))


def test_counts_labels_and_donors() -> None:
    adata = synthetic_cells(90, n_genes=120, n_types=3, n_donors=3)
    assert adata.shape == (90, 120) and isinstance(adata.X, sp.csr_matrix) and adata.X.dtype == np.uint16
    assert adata.obs_names.is_unique and adata.var_names.is_unique
    assert (pd.crosstab(adata.obs["cell_type"], adata.obs["donor"]) == 10).all(axis=None)
    assert set(adata.obs["cell_type"]) == {"alpha", "beta", "delta"}


def test_a_seed_gives_the_same_cells_and_another_seed_others() -> None:
    one, same, other = (synthetic_cells(60, seed=seed) for seed in (1, 1, 2))
    assert (one.X != same.X).nnz == 0 and one.obs.equals(same.obs)
    assert (one.X != other.X).nnz > 0
    assert not set(one.obs_names) & set(other.obs_names)


def test_the_global_random_state_is_left_alone() -> None:
    before = np.random.get_state()[1].copy()  # noqa: NPY002 - the state that must not change
    synthetic_cells(20, n_genes=50)
    assert (np.random.get_state()[1] == before).all()  # noqa: NPY002


@pytest.mark.parametrize("species", ["human", "mouse"])
def test_gene_symbols_are_real(species: str) -> None:
    genes = canonical_genes(list(synthetic_cells(10, n_genes=2000, species=species).var_names))
    assert genes.species == species and genes.recognised == 1.0
    assert len(set(genes.names)) == 2000


def test_mouse_genes_are_orthologues_of_the_human_genes_in_the_same_place() -> None:
    human = list(synthetic_cells(10, species="human").var_names)
    mouse = list(synthetic_cells(10, species="mouse").var_names)
    table = orthologues(mouse, to="human")
    assert [table[gene] for gene in mouse] == canonical_genes(human).names.tolist()


@pytest.mark.parametrize("study_shift", [0.0, 0.5])
def test_types_can_be_learnt_across_donors_and_studies(study_shift: float) -> None:
    study = synthetic_cells(240, seed=0)
    held_out = (study.obs["donor"] == "donor3").to_numpy()
    model = LogisticRegression(max_iter=500)
    model.fit(log_normalised(study)[~held_out], study.obs["cell_type"][~held_out])
    assert model.score(log_normalised(study)[held_out], study.obs["cell_type"][held_out]) > 0.9
    other = synthetic_cells(240, seed=5, study_shift=study_shift)
    assert model.score(log_normalised(other), other.obs["cell_type"]) > 0.9


def test_labels_carry_no_more_than_the_counts_say() -> None:
    study = synthetic_cells(240, seed=0)
    shuffled = np.random.default_rng(0).permutation(study.obs["cell_type"].to_numpy())
    model = LogisticRegression(max_iter=500).fit(log_normalised(study)[:160], shuffled[:160])
    assert model.score(log_normalised(study)[160:], shuffled[160:]) < 0.5


def test_a_type_keeps_its_markers_when_types_and_genes_are_added() -> None:
    small, large = synthetic_cells(400, n_genes=100, n_types=2), synthetic_cells(800, n_genes=200, n_types=4, seed=1)
    assert list(large.var_names[:100]) == list(small.var_names)

    def contrast(adata: ad.AnnData) -> np.ndarray:
        values = log_normalised(adata[:, :100])
        of = {t: values[(adata.obs["cell_type"] == t).to_numpy()].mean(axis=0) for t in ("alpha", "beta")}
        return np.asarray(of["alpha"] - of["beta"])

    assert np.corrcoef(contrast(small), contrast(large))[0, 1] > 0.9


def test_a_study_shift_moves_the_means() -> None:
    base = log_normalised(synthetic_cells(200, seed=3)).mean(axis=0)
    other = log_normalised(synthetic_cells(200, seed=4)).mean(axis=0)
    shifted = log_normalised(synthetic_cells(200, seed=4, study_shift=1.0)).mean(axis=0)
    assert np.abs(shifted - base).mean() > 2 * np.abs(other - base).mean()


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        ({"n_types": len(TYPES) + 1}, "n_types"),
        ({"n_genes": 10**6}, "n_genes"),
        ({"n_donors": 0}, "n_donors"),
        ({"species": "rat"}, "species="),
    ],
)
def test_what_cannot_be_made_is_said(arguments: dict[str, object], hint: str) -> None:
    with pytest.raises(SettingsError) as error:
        synthetic_cells(**arguments)  # type: ignore[arg-type]
    assert hint in str(error.value.hint)

"""Labelled cells of several studies in one gene order."""

from __future__ import annotations

import numpy as np
import pytest

from evercell.celltypes import CellTypes
from evercell.errors import LabelsError
from evercell.testing import synthetic_cells
from evercell.training_cells import TrainingCells, gather, read_study, vocabulary_of


def gathered(groups: str | None = "donor") -> TrainingCells:
    first = synthetic_cells(40, n_genes=120, n_types=3, n_donors=2, seed=1)
    second = synthetic_cells(30, n_genes=160, n_types=4, n_donors=2, seed=2)[:, 40:].copy()
    studies = [
        read_study(first, "cell_type", groups=groups, name="first"),
        read_study(second, "cell_type", name="second"),
    ]
    types = CellTypes(("alpha", "beta", "delta", "gamma"))
    return gather(studies, vocabulary_of(studies), types)


def test_studies_are_joined_over_the_union_of_their_genes() -> None:
    cells = gathered()
    assert cells.counts.shape == (70, 160)
    assert cells.counts.dtype == np.float32
    assert cells.measured.sum(axis=1).tolist() == [120, 120]
    assert cells.measured_by_any.all()
    for study in (0, 1):
        part = cells.counts[cells.studies == study]
        assert part[:, ~cells.measured[study]].nnz == 0
        assert part.nnz > 0
    assert np.bincount(cells.studies).tolist() == [40, 30]


def test_groups_name_their_study_and_a_study_without_is_one_group() -> None:
    cells = gathered()
    assert cells.groups is not None
    assert set(cells.groups[:40]) == {"first/donor1", "first/donor2"}
    assert set(cells.groups[40:]) == {"second"}
    assert gathered(groups=None).groups is None


def test_parts_keep_what_belongs_to_their_cells() -> None:
    cells = gathered()
    rows = np.array([60, 3, 41])
    part = cells.taken(rows).over_genes(np.array([5, 2]))
    assert len(part) == 3
    assert part.counts.toarray().tolist() == cells.counts[rows][:, [5, 2]].toarray().tolist()
    assert part.codes.tolist() == cells.codes[rows].tolist()
    assert part.measured.tolist() == cells.measured[:, [5, 2]].tolist()
    assert part.groups is not None
    assert cells.groups is not None
    assert part.groups.tolist() == cells.groups[rows].tolist()


def test_sampling_weights_balance_the_types_of_each_study() -> None:
    nothing = np.zeros((2, 1), dtype=bool)
    codes, studies = np.array([0] * 16 + [1] * 4 + [1] * 9), np.array([0] * 20 + [1] * 9)
    cells = TrainingCells(None, codes, studies, nothing, None)  # type: ignore[arg-type]

    def share(balance: str) -> list[float]:
        weights = cells.sampling_weights(balance)
        assert weights.sum() == pytest.approx(1)
        return [float(weights[part].sum()) for part in (slice(0, 16), slice(16, 20), slice(20, 29))]

    assert share("sqrt") == pytest.approx([4 / 9, 2 / 9, 3 / 9])
    assert share("oversample") == pytest.approx([1 / 3] * 3)
    assert share("none") == pytest.approx([16 / 29, 4 / 29, 9 / 29])


def test_a_missing_column_is_told_with_those_that_are_there() -> None:
    cells = synthetic_cells(20, n_genes=100)
    with pytest.raises(LabelsError, match=r"`a\.h5ad` has no column `patient` in obs; columns: `cell_type`, `donor`"):
        read_study(cells, "cell_type", groups="patient", name="a.h5ad")
    with pytest.raises(LabelsError, match="no column `label`"):
        read_study(cells, "label")

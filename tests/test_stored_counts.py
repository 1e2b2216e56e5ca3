"""Counts in files in place of memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp

import evercell as ec
from evercell.errors import CellsError
from evercell.pretraining import quick_settings
from evercell.stored_counts import column_sizes, compact, room_in, stacked
from evercell.testing import synthetic_cells


def blocks() -> list[sp.csr_matrix]:
    rng = np.random.default_rng(0)
    return [sp.csr_matrix(rng.poisson(0.7, (n, 30)).astype(np.float32)) for n in (5, 1, 40)]


def test_mapped_counts_are_those_in_memory(tmp_path: Path) -> None:
    there, here = stacked(blocks(), tmp_path), stacked(blocks())
    assert isinstance(there.data, np.memmap)
    assert (there != here).nnz == 0
    rows = np.array([45, 0, 5])
    np.testing.assert_array_equal(there[rows].toarray(), here[rows].toarray())
    np.testing.assert_array_equal(there[:, [3, 1]].toarray(), here[:, [3, 1]].toarray())
    np.testing.assert_array_equal(column_sizes(there), (here.toarray() > 0).sum(axis=0))


def test_blocks_without_a_count_are_stacked(tmp_path: Path) -> None:
    assert stacked([sp.csr_matrix((3, 4))], tmp_path).shape == (3, 4)


def test_the_smallest_type_that_holds_the_counts_is_taken() -> None:
    assert compact(sp.csr_matrix([[255.0]])).dtype == np.uint8
    assert compact(sp.csr_matrix([[256.0]])).dtype == np.uint16
    assert compact(sp.csr_matrix([[0.5]])).dtype == np.float32


def test_files_are_gone_afterwards_whatever_happens(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), room_in(tmp_path) as place:
        assert place is not None
        stacked(blocks(), place)
        1 / 0  # noqa: B018
    assert not list(tmp_path.iterdir())
    with pytest.raises(CellsError, match="does not exist"), room_in(tmp_path / "not there"):
        pass


def test_pretraining_from_files_gives_the_numbers_of_memory(tmp_path: Path) -> None:
    studies = [synthetic_cells(150, seed=seed) for seed in (1, 2)]
    studies[0].X = sp.csr_matrix(studies[0].X.multiply((np.arange(150) != 3)[:, None]))  # a cell without counts
    for number, study in enumerate(studies):
        study.write_h5ad(tmp_path / f"{number}.h5ad")
    (tmp_path / "store").mkdir()
    files = [tmp_path / "0.h5ad", tmp_path / "1.h5ad"]
    in_memory = ec.pretrain(files, "cell_type", settings=quick_settings())
    from_files = ec.pretrain(files, "cell_type", settings=quick_settings(), store=tmp_path / "store")
    assert from_files.fingerprint == in_memory.fingerprint
    assert from_files.ledger.head == in_memory.ledger.head
    assert not list((tmp_path / "store").iterdir())

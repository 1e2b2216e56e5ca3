"""Many files labelled in parts: the labels of `annotate`, whoever labels, whoever dies."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

import evercell as ec
from evercell import atlas, engines
from evercell.annotation import annotate
from evercell.annotator import Annotator
from evercell.atlas import Job, Part, annotate_files
from evercell.cells import read_cells, write_cells
from evercell.engines import RETRIES, each
from evercell.errors import CellsError, EvercellError, ModelError, SettingsError
from evercell.label_store import read_labels
from evercell.merging import merge
from evercell.testing import synthetic_cells

Run = Callable[..., tuple[int, str, str]]
PART = 40
FILES = {"a.h5ad": 150, "b.zarr": 90, "merged.h5ad": 110, "sub/few.h5ad": 30, "sub/tenx.h5": 60}
PARTS = 4 + 3 + 3 + 1 + 2


@pytest.fixture(scope="module")
def folder(model: Annotator, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and a folder of files of every kind."""
    folder = tmp_path_factory.mktemp("atlas")
    ec.save(model, folder / "model")
    (folder / "cells" / "sub").mkdir(parents=True)
    plain = synthetic_cells(150, seed=2)
    plain.X = plain.X.multiply(~np.isin(np.arange(150), [3, 99])[:, None]).tocsr()
    plain.X.eliminate_zeros()
    write_cells(plain, folder / "cells" / "a.h5ad")
    dense = synthetic_cells(90, seed=3)
    dense.X = dense.X.toarray().astype(np.float32)
    dense.X[50] = 0  # known when it is read
    write_cells(dense, folder / "cells" / "b.zarr")
    sources = [synthetic_cells(70, n_genes=200, seed=4), synthetic_cells(40, seed=5)[:, 80:].copy()]
    for number, cells in enumerate(sources):
        cells.write_h5ad(folder / f"source{number}.h5ad")
    merge([folder / "source0.h5ad", folder / "source1.h5ad"], folder / "merged.h5ad")
    merged = ad.read_h5ad(folder / "merged.h5ad")
    write_cells(merged[np.random.default_rng(0).permutation(110)].copy(), folder / "cells" / "merged.h5ad")
    write_cells(synthetic_cells(30, seed=6), folder / "cells" / "sub" / "few.h5ad")
    tenx = synthetic_cells(60, seed=7)
    with h5py.File(folder / "cells" / "sub" / "tenx.h5", "w") as file:
        group, matrix = file.create_group("matrix"), sp.csr_matrix(tenx.X)
        for key in ("data", "indices", "indptr"):
            group[key] = getattr(matrix, key)
        group["shape"] = matrix.shape[::-1]
        group["barcodes"] = np.array(tenx.obs_names, dtype="S")
        for key, values in (("name", tenx.var_names), ("id", tenx.var_names)):
            group[f"features/{key}"] = np.array(values, dtype="S")
        group["features/feature_type"] = np.array(["Gene Expression"] * tenx.n_vars, dtype="S")
    (folder / "cells" / ".hidden.h5ad").write_bytes(b"not of the user")
    (folder / "cells" / "notes.txt").write_text("no cells")
    return folder


@pytest.fixture(scope="module")
def expected(model: Annotator, folder: Path) -> pd.DataFrame:
    """What `annotate` says in memory."""
    tables = []
    for name in FILES:
        cells = read_cells(folder / "cells" / name)
        found = annotate(model, cells, empty_cells="keep", name=name, shown=False).obs
        tables.append(found.assign(file=name))
    return pd.concat(tables)


def labelled(folder: Path, store: Path, **options: Any) -> dict[str, Any]:
    """The folder in parts."""
    options = {"part": PART, "empty_cells": "keep", "shown": False, **options}
    return annotate_files(folder / "model", options.pop("source", folder / "cells"), store, **options)


def same(store: Path, expected: pd.DataFrame) -> None:
    """To the last bit."""
    found = read_labels(store)
    assert list(found["file"]) == list(expected["file"])
    pd.testing.assert_frame_equal(found.drop(columns="file"), expected.drop(columns="file"), check_exact=True)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The parts that are labelled in this process."""
    done: list[str] = []
    label = atlas._labelled

    def spied(job: Job, part: Part) -> Any:
        done.append(part.called)
        return label(job, part)

    monkeypatch.setattr(atlas, "_labelled", spied)
    yield done


@pytest.mark.parametrize("part", [PART, 1000])
def test_a_store_holds_the_labels_of_annotate(folder: Path, expected: pd.DataFrame, tmp_path: Path, part: int) -> None:
    manifest = labelled(folder, tmp_path / "store", part=part)
    same(tmp_path / "store", expected)
    assert {one["file"]: one["cells"] for one in manifest["files"]} == FILES
    assert manifest["cells"] == sum(FILES.values()) == sum(manifest["labels"].values())
    assert manifest["labels"] == expected["evercell"].astype(str).value_counts().to_dict()
    assert json.loads((tmp_path / "store" / "manifest.json").read_text()) == manifest
    parts = [name for one in manifest["files"] for name in one["parts"]]
    assert len(parts) == (PARTS if part == PART else len(FILES))
    assert {one.name for one in (tmp_path / "store" / "parts").iterdir()} == set(parts)
    first, second = (one["notes"] for one in manifest["files"][:2])
    assert "2 of 150 cells have no counts, the first is `study2_cell00003`" in first
    where = "cells 40 to 80: 1 of 40" if part == PART else "1 of 90"
    assert f"{where} cells have no counts, the first is `study3_cell00050`" in second
    assert all("genes" in one["coverage"] for one in manifest["files"])


def test_what_is_there_is_not_done_again(
    folder: Path, expected: pd.DataFrame, tmp_path: Path, counted: list[str]
) -> None:
    """But what depends on something that changed is."""
    cells, store = tmp_path / "cells", tmp_path / "store"
    shutil.copytree(folder / "cells", cells)
    expected = expected.copy()

    def again(**options: Any) -> list[str]:
        counted.clear()
        labelled(folder, store, **{"source": cells, **options})
        return sorted(counted)

    assert len(again()) == PARTS
    assert again() == []
    same(store, expected)
    os.utime(cells / "b.zarr" / "X" / ".zarray", (1, 1))
    assert again() == ["b.zarr"] * 3
    shutil.copyfile(cells / "a.h5ad", cells / "c.h5ad")
    assert again() == ["c.h5ad"] * 4
    (cells / "c.h5ad").unlink()
    assert again() == []
    same(store, expected)
    assert len(list((store / "parts").iterdir())) == PARTS
    assert len(again(source=cells / "a.h5ad")) == 0  # of all, its parts are kept
    for option in ({"reject": "off"}, {"key_added": "other"}, {}):
        assert again(source=cells / "a.h5ad", **option) == ["a.h5ad"] * 4
    same(store, expected[expected["file"] == "a.h5ad"])


def test_another_model_begins_anew(folder: Path, tmp_path: Path, model: Annotator, counted: list[str]) -> None:
    labelled(folder, tmp_path / "store", source=folder / "cells" / "a.h5ad")
    other = replace(model, temperature=2 * model.temperature)
    ec.save(other, tmp_path / "model")
    counted.clear()
    annotate_files(tmp_path / "model", folder / "cells" / "a.h5ad", tmp_path / "store", part=PART, empty_cells="keep")
    assert len(counted) == 4
    found = annotate(other, read_cells(folder / "cells" / "a.h5ad"), empty_cells="keep", shown=False).obs
    same(tmp_path / "store", found.assign(file="a.h5ad"))


def test_a_call_that_was_ended_goes_on(
    folder: Path, expected: pd.DataFrame, tmp_path: Path, counted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "store"

    def ended(job: Job, part: Part) -> EvercellError | None:
        if len(counted) == 6:
            (store / "parts" / ".half.h5ad").write_bytes(b"half")
            raise KeyboardInterrupt
        return label(job, part)

    label = atlas.label_part
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(atlas, "label_part", ended)
        labelled(folder, store)
    with pytest.raises(CellsError, match="is not complete"):
        read_labels(store)
    labelled(folder, store)
    assert len(counted) == PARTS
    same(store, expected)
    assert len(list((store / "parts").iterdir())) == PARTS


def test_bad_files_do_not_keep_the_others_from_their_labels(folder: Path, tmp_path: Path, run: Run) -> None:
    cells, store = tmp_path / "cells", tmp_path / "store"
    shutil.copytree(folder / "cells", cells)
    (cells / "bad.h5ad").write_bytes(b"not a file of cells")
    negative = synthetic_cells(150, seed=8)
    negative.X = negative.X.astype(np.float32)
    negative.X[100, 0] = -1
    write_cells(negative, cells / "negative.h5ad")
    words = ["annotate", cells, "--model", folder / "model", "--output", store]
    code, out, err = run(*words, "--empty-cells", "keep", "--json")
    assert code == 1
    assert "error: `bad.h5ad`: " in err and "is damaged" in err
    assert "error: `negative.h5ad`: " in err and f"-1 at cell `{negative.obs_names[100]}`" in err
    assert "5 of 7 files" in err
    manifest = json.loads(out)
    assert [one["file"] for one in manifest["files"] if "error" in one] == ["bad.h5ad", "negative.h5ad"]
    assert set(read_labels(store)["file"]) == set(FILES)
    for name in ("bad.h5ad", "negative.h5ad"):
        write_cells(synthetic_cells(150, seed=8), cells / name)
    code, out, err = run(*words, "--empty-cells", "keep")
    assert code == 0, err
    assert "cells: 740, files: 7, parts: 7" in err
    assert out.splitlines()[0].split() == ["type", "cells", "share"]
    # Where nothing could be labelled, the input was wrong.
    (tmp_path / "all").mkdir()
    (tmp_path / "all" / "bad.h5ad").write_bytes(b"not a file of cells")
    code, out, err = run("annotate", tmp_path / "all", "--model", folder / "model", "--output", tmp_path / "none")
    assert code == 2 and out == "" and "is damaged" in err
    with pytest.raises(CellsError, match="could be labelled"):
        read_labels(tmp_path / "none")


def test_one_file_in_parts_to_a_table(folder: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["annotate", folder / "cells" / "merged.h5ad", "--model", folder / "model", "--output"]
    monkeypatch.setattr(annotate_files, "__kwdefaults__", {**annotate_files.__kwdefaults__, "part": PART})
    assert run(*words, tmp_path / "plain.csv")[0] == 0
    code, _, err = run(*words, tmp_path / "parts.csv", "--workers", "1")
    assert code == 0, err
    assert "parts: 3" in err
    assert (tmp_path / "parts.csv").read_bytes() == (tmp_path / "plain.csv").read_bytes()
    # The cells of a table of counts are not known before it is read.
    cells = synthetic_cells(50, seed=8)
    pd.DataFrame(cells.X.toarray(), cells.obs_names, cells.var_names).to_csv(tmp_path / "counts.csv")
    words[1] = tmp_path / "counts.csv"
    assert run(*words, tmp_path / "plain.csv")[0] == 0
    assert run(*words, tmp_path / "parts.csv", "--workers", "1")[0] == 0
    assert (tmp_path / "parts.csv").read_bytes() == (tmp_path / "plain.csv").read_bytes()
    code, _, err = run("annotate", tmp_path / "no.h5ad", *words[2:], tmp_path / "no.csv", "--workers", "1")
    assert code == 2 and "does not exist" in err
    assert sorted(one.name for one in tmp_path.iterdir()) == ["counts.csv", "parts.csv", "plain.csv"]


def test_wrong_use_is_told_before_the_work(folder: Path, tmp_path: Path, run: Run) -> None:
    cells, model = folder / "cells", ["--model", folder / "model"]
    one = [cells / "a.h5ad", *model]
    cases = [
        ([cells, *model, "--output", tmp_path / "labels.csv"], "is one file, `"),
        ([cells, *model, "--output", tmp_path / "labels.h5ad"], "labels.h5ad` cannot be written in parts"),
        ([cells, *model, "--output", tmp_path / "labels.rds"], "labels.rds` does not end in .csv"),
        ([cells, *model, "--output", tmp_path / "no" / "labels"], "no` of `"),
        ([cells, *model, "--output", cells / "labels"], "lies in `"),
        ([cells, *model, "--output", folder], "is no store of labels"),
        ([tmp_path, *model, "--output", tmp_path.parent / "new"], "holds no .h5ad, .zarr, .h5 file"),
        ([cells, "--model", "auto", "--output", tmp_path / "labels"], "--model auto looks at all cells"),
        ([*one, "--output", tmp_path / "labels", "--majority"], "--majority needs all cells of one file"),
        ([*one, "--output", tmp_path / "labels", "--engine", "dask"], "`dask` is no engine"),
        ([*one, "--output", tmp_path / "labels", "--workers", "0"], "0 workers cannot label"),
        ([*one, "--output", tmp_path / "labels", "--device", "tpu"], "tpu"),
    ]
    for words, message in cases:
        code, _, err = run("annotate", *words)
        assert code == 2 and message in err, f"{words}\n{err}"
    assert list(tmp_path.iterdir()) == [] and not (cells / "labels").exists()
    with pytest.raises(CellsError, match="is no store"):
        read_labels(tmp_path)


def test_ray_that_is_not_there_is_named(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "find_spec", lambda name: None)
    with pytest.raises(SettingsError) as raised:
        labelled(folder, tmp_path / "store", engine="ray")
    assert raised.value.hint == 'pip install "evercell[ray]"'
    assert list(tmp_path.iterdir()) == []


def test_other_files_and_models_than_those_of_the_call_are_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a worker on another machine may see them."""
    seen: list[tuple[Job, Part]] = []

    def spied(job: Job, part: Part) -> EvercellError | None:
        seen.append((job, part))
        return None if len(seen) > 1 else EvercellError("not now")

    with monkeypatch.context() as patch:
        patch.setattr(atlas, "label_part", spied)
        entry = labelled(folder, tmp_path / "store", source=folder / "cells" / "b.zarr", part=1000)["files"][0]
    assert entry["error"] == "not now"
    job, part = seen[0]
    atlas._model.cache_clear()
    wrong = atlas.label_part(Job(**{**vars(job), "fingerprint": "another"}), part)
    assert isinstance(wrong, ModelError) and "another model" in str(wrong)
    changed = atlas.label_part(job, Part(part.file, part.called, "another"))
    assert isinstance(changed, CellsError) and "has changed" in str(changed)
    assert atlas.label_part(job, part) is None
    assert os.listdir(tmp_path / "store" / "parts") == [part.name]
    atlas._opened.cache_clear()


def killed_once(job: Job, part: Part) -> EvercellError | None:
    """Label a part; the first process that comes to a certain one dies in the middle of it."""
    marker = Path(job.store).with_name("killed")
    if part.called == "merged.h5ad" and part.start == PART and not marker.exists():
        marker.touch()
        Path(job.store, "parts", ".begun.h5ad").write_bytes(b"begun")
        os.kill(os.getpid(), signal.SIGKILL)
    return atlas.label_part(job, part)


def test_a_worker_that_is_killed_costs_its_part_only(
    folder: Path, expected: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(atlas, "label_part", killed_once)
        manifest = labelled(folder, tmp_path / "store", workers=2)
    assert [one["error"] for one in manifest["files"] if "error" in one] == []
    assert (tmp_path / "killed").exists()
    same(tmp_path / "store", expected)
    assert len(list((tmp_path / "store" / "parts").iterdir())) == PARTS


@pytest.mark.slow
def test_a_worker_of_ray_that_is_killed_costs_its_part_only(
    folder: Path, expected: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also: what Ray changes in the environment is put back, and none of its processes stays."""
    ray = pytest.importorskip("ray")
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers do not find the tests
    monkeypatch.setenv("HOME", str(tmp_path))  # Ray makes a token there
    monkeypatch.setenv("RAY_worker_niceness", "0")  # beside other tests, nice workers come to nothing
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    before = dict(os.environ)
    with monkeypatch.context() as patch:
        patch.setattr(atlas, "label_part", killed_once)
        manifest = labelled(folder, tmp_path / "store", engine="ray", workers=2)
    assert [one["error"] for one in manifest["files"] if "error" in one] == []
    assert (tmp_path / "killed").exists()
    same(tmp_path / "store", expected)
    assert len(list((tmp_path / "store" / "parts").iterdir())) == PARTS
    assert not ray.is_initialized() and dict(os.environ) == before


def test_a_task_that_kills_everyone_is_given_up() -> None:
    harmless = [signal.SIGCONT, signal.SIGURG, signal.SIGWINCH, signal.SIGCHLD]
    found: dict[Any, Any] = dict(each(signal.raise_signal, [*harmless[:2], signal.SIGKILL, *harmless[2:]], workers=2))
    lost = found.pop(signal.SIGKILL)
    assert isinstance(lost, EvercellError) and f"{RETRIES + 1} processes died" in str(lost)
    assert found == dict.fromkeys(harmless)

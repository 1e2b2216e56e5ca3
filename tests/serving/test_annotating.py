"""A user of the page, by its interface: from an upload to what is taken away, what goes wrong, and teaching."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pytest

from evercell.checkpoint import load
from evercell.testing import synthetic_cells

from .conftest import HEADERS, Client, ended, served, stored

Upload = Callable[..., dict[str, Any]]
HOSTILE = "<img src=x onerror=alert(1)>"


def result_of(client: Client, job: dict[str, Any]) -> dict[str, Any]:
    """What came of a job that must have worked."""
    found = ended(client, job)
    assert found["state"] == "done", found
    result: dict[str, Any] = client.get(f"/api/jobs/{job['id']}/result").json()
    return result


@pytest.fixture(scope="module")
def done(address: str, query: Path) -> dict[str, Any]:
    """One annotation that several tests look at."""
    with Client(base_url=address, headers=HEADERS, timeout=120) as client:
        options = {"name": "my <b>cells</b>.h5ad", "model": "quick", "map": False}
        job: dict[str, Any] = client.post("/api/jobs", params=options, content=query.read_bytes()).json()
        assert ended(client, job)["state"] == "done"
        return job


def test_from_upload_to_download(client: Client, done: dict[str, Any], query: Path, tmp_path: Path) -> None:
    result = client.get(f"/api/jobs/{done['id']}/result").json()
    assert (result["name"], result["cells"], result["model"]) == ("my <b>cells</b>.h5ad", 150, "quick")
    assert sum(one["cells"] for one in result["types"]) == 150
    assert result["samples"][0]["column"] == "donor"
    assert [sum(row["cells"]) for row in result["samples"][0]["rows"]] == [75, 75]
    assert "150 cells were annotated" in result["summary"][0]

    given = client.get(f"/api/jobs/{done['id']}/files/h5ad")
    assert "my_b_cells_b-evercell.h5ad" in given.headers["content-disposition"]
    (tmp_path / "got.h5ad").write_bytes(given.content)
    cells, before = ad.read_h5ad(tmp_path / "got.h5ad"), ad.read_h5ad(query)
    assert (cells.X != before.X).nnz == 0
    assert (cells.obs["evercell"].astype(str) == cells.obs["cell_type"].astype(str)).mean() > 0.9

    rows = list(csv.DictReader(io.StringIO(client.get(f"/api/jobs/{done['id']}/files/csv").text)))
    assert [row["cell"] for row in rows] == list(before.obs_names)
    assert [row["evercell"] for row in rows] == list(cells.obs["evercell"])


@pytest.mark.slow
def test_tables_are_read_and_the_model_is_chosen(models: Path, upload: Upload, tmp_path: Path) -> None:
    synthetic_cells(60, seed=3).to_df().to_csv(tmp_path / "cells.csv")
    with (
        served(models=str(models), jobs=1) as address,
        Client(base_url=address, headers=HEADERS, timeout=120) as client,
    ):
        job = upload(client, (tmp_path / "cells.csv").read_bytes(), name="cells.csv", model="auto")
        result = result_of(client, job)
    assert result["model"] == "quick" and "`quick` is chosen" in result["chosen"]


@pytest.mark.parametrize(
    ("name", "content", "status", "words"),
    [
        ("cells.h5ad", b"no HDF5 at all", 202, "`cells.h5ad` cannot be read as .h5ad"),
        ("cells.csv", b"a,b\n", 202, "`cells.csv`"),
        ("cells.exe", b"MZ", 415, "of no kind that is read"),
        ("cells.h5ad", b"", 422, "the file is empty"),
    ],
)
def test_a_bad_file_is_refused_in_words(client: Client, name: str, content: bytes, status: int, words: str) -> None:
    answer = client.post("/api/jobs", params={"name": name, "model": "quick"}, content=content)
    assert answer.status_code == status
    said = answer.json()
    if status == 202:
        found = ended(client, said)
        assert found["state"] == "failed"
        said = found["error"]
    assert words in said["error"]
    assert said["hint"]
    assert "evercell-serve" not in json.dumps(said) and "upload." not in json.dumps(said)


def test_wrong_options_are_named(client: Client) -> None:
    for options, words in [
        ({"model": "none-such"}, "there is no model `none-such`"),
        ({"model": "quick", "reject": "often"}, "reject is `often`"),
        ({"model": "quick", "majority": "perhaps"}, "majority"),
    ]:
        answer = client.post("/api/jobs", params={"name": "cells.h5ad", **options}, content=b"x")
        assert answer.status_code == 422 and words in answer.json()["error"], answer.text


@pytest.mark.slow
def test_a_cancelled_job_is_gone_with_its_process(models: Path, upload: Upload) -> None:
    many = stored(synthetic_cells(3000, seed=4))
    with served(models=str(models), jobs=1) as place, Client(base_url=place, headers=HEADERS, timeout=120) as client:
        large = upload(client, many, map=True)
        small = upload(client)
        while client.get(f"/api/jobs/{large['id']}").json()["state"] == "queued":
            time.sleep(0.05)
        begun = time.monotonic()
        assert client.post(f"/api/jobs/{large['id']}/cancel").json()["state"] == "cancelled"
        assert time.monotonic() - begun < 20
        assert ended(client, small)["state"] == "done"  # in a new process
        assert client.get(f"/api/jobs/{large['id']}").json()["state"] == "cancelled"
        assert client.get(f"/api/jobs/{large['id']}/result").status_code == 409


def test_removed_is_removed(client: Client, upload: Upload) -> None:
    job = upload(client)
    ended(client, job)
    assert client.delete(f"/api/jobs/{job['id']}").status_code == 204
    assert client.get(f"/api/jobs/{job['id']}").status_code == 404
    assert client.get(f"/api/jobs/{job['id']}/files/h5ad").status_code == 404


@pytest.mark.slow
def test_files_go_with_their_time_and_with_the_server(
    models: Path, upload: Upload, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with served(models=str(models), jobs=1, keep_seconds=4) as address:
        with Client(base_url=address, timeout=60) as client:
            assert client.get("/api/status").status_code == 200
        (folder,) = tmp_path.glob("evercell-serve-*")
        assert folder.stat().st_mode & 0o077 == 0
        with Client(base_url=address, headers=HEADERS, timeout=120) as client:
            job = upload(client)
            assert ended(client, job)["state"] == "done"
            assert any(folder.iterdir()) and not list(folder.glob("*/upload.*"))
            until = time.monotonic() + 30
            while client.get(f"/api/jobs/{job['id']}").status_code != 404:
                assert time.monotonic() < until
                time.sleep(0.5)
            assert not any(folder.iterdir())
            upload(client)
    assert not list(tmp_path.glob("evercell-serve-*"))


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc")
def test_no_process_outlives_a_server_that_is_killed(models: Path, upload: Upload, tmp_path: Path) -> None:
    def workers() -> set[str]:
        found = set()
        for place in Path("/proc").glob("[0-9]*/environ"):
            with suppress(OSError):
                if mark in place.read_bytes():
                    found.add(place.parent.name)
        return found

    mark = f"EVERCELL_TEST={uuid.uuid4().hex}".encode()
    words = [sys.executable, str(Path(__file__).with_name("server.py")), json.dumps({"models": str(models), "jobs": 1})]
    name, _, value = mark.decode().partition("=")
    process = subprocess.Popen(
        words, stdout=subprocess.PIPE, text=True, env={**os.environ, name: value, "TMPDIR": str(tmp_path)}
    )
    assert process.stdout is not None
    with Client(base_url=process.stdout.readline().strip(), headers=HEADERS, timeout=120) as client:
        job = upload(client, map=True)
        while client.get(f"/api/jobs/{job['id']}").json()["state"] == "queued":
            time.sleep(0.2)
        assert len(workers()) >= 2
    process.kill()
    process.wait()
    until = time.monotonic() + 30
    while workers():
        assert time.monotonic() < until
        time.sleep(0.2)


def test_two_users_at_once_see_their_own(address: str, upload: Upload) -> None:
    def use(seed: int) -> tuple[int, list[str], list[str]]:
        cells = synthetic_cells(40 + seed, seed=seed)
        with Client(base_url=address, headers=HEADERS, timeout=120) as client:
            job = upload(client, stored(cells), name=f"{seed}.h5ad")
            result = result_of(client, job)
            rows = csv.DictReader(io.StringIO(client.get(f"/api/jobs/{job['id']}/files/csv").text))
            return result["cells"], [row["cell"] for row in rows], list(cells.obs_names)

    with ThreadPoolExecutor(2) as pool:
        for seed, (n_cells, got, given) in zip((5, 6), pool.map(use, (5, 6)), strict=True):
            assert n_cells == 40 + seed
            assert got == given


@pytest.mark.slow
def test_fifty_small_jobs_at_once_lose_none(address: str, upload: Upload) -> None:
    def use(number: int) -> int:
        content = stored(synthetic_cells(20 + number, seed=1))
        with Client(base_url=address, headers=HEADERS, timeout=240) as client:
            result: int = result_of(client, upload(client, content, name=f"{number}.h5ad"))["cells"]
            return result

    with ThreadPoolExecutor(50) as pool:
        assert list(pool.map(use, range(50))) == [20 + number for number in range(50)]


def test_hostile_names_are_text_everywhere(client: Client, upload: Upload) -> None:
    cells = synthetic_cells(40, seed=7, n_donors=2)
    cells.obs["donor"] = cells.obs["donor"].cat.rename_categories([HOSTILE, "b"])
    cells.var_names = [f"{HOSTILE}{number}" if number < 2 else name for number, name in enumerate(cells.var_names)]
    cells.obs_names = [f"{HOSTILE}{number}" for number in range(cells.n_obs)]
    job = upload(client, stored(cells), name=f"../../{HOSTILE}.h5ad")
    result = result_of(client, job)
    assert result["name"] == f"../../{HOSTILE}.h5ad"
    path = f"/api/jobs/{job['id']}"
    answer = client.post(f"{path}/corrections", json={"label": HOSTILE, "was": result["types"][0]["name"]})
    assert answer.status_code == 201
    for kind in ("result", "corrections"):
        given = client.get(f"{path}/{kind}")
        assert given.headers["content-type"].startswith("application/json")
        assert given.headers["x-content-type-options"] == "nosniff"
    table = client.get(f"{path}/files/csv")
    assert ".." not in table.headers["content-disposition"] and "<" not in table.headers["content-disposition"]
    assert HOSTILE in {row["evercell_corrected"] for row in csv.DictReader(io.StringIO(table.text))}


@pytest.mark.slow
def test_the_report_shows_hostile_names_as_text(client: Client, upload: Upload) -> None:
    cells = synthetic_cells(12, seed=7, n_donors=2)  # too few for a map
    cells.obs["donor"] = cells.obs["donor"].cat.rename_categories([HOSTILE, "b"])
    job = upload(client, stored(cells), name=f"{HOSTILE}.h5ad")
    result_of(client, job)
    report = client.get(f"/api/jobs/{job['id']}/files/html")
    assert report.status_code == 200, report.text
    assert "Cell types of" in report.text
    assert "<img src=x" not in report.text


def test_corrections_are_made_undone_and_written(client: Client, done: dict[str, Any], tmp_path: Path) -> None:
    path = f"/api/jobs/{done['id']}"
    plain = client.get(f"{path}/corrections").json()["counts"]
    made = client.post(f"{path}/corrections", json={"label": "brand  new", "cells": [3, 1, 3]}).json()
    assert made["corrections"] == [{"label": "brand new", "was": "", "cells": [1, 3], "n_cells": 2}]
    made = client.post(f"{path}/corrections", json={"label": "twice", "was": "brand new"}).json()
    assert made["counts"]["twice"] == 2 and "brand new" not in made["counts"]
    assert sum(made["counts"].values()) == 150

    (tmp_path / "got.h5ad").write_bytes(client.get(f"{path}/files/h5ad").content)
    cells = ad.read_h5ad(tmp_path / "got.h5ad")
    assert np.flatnonzero(cells.obs["evercell_corrected"] == "twice").tolist() == [1, 3]
    others = cells.obs["evercell_corrected"] != "twice"
    assert (cells.obs["evercell_corrected"].astype(str) == cells.obs["evercell"].astype(str))[others].all()

    for body, words in [
        ({"label": " ", "cells": [1]}, "printable characters"),
        ({"label": "x", "cells": [150]}, "150 cells"),
        ({"label": "x", "cells": [-1]}, "150 cells"),
        ({"label": "x"}, "no cells were named"),
        ({"label": "x", "was": "none such"}, "no cell has the label"),
        ({"label": "x", "cells": "all"}, "cells"),
    ]:
        answer = client.post(f"{path}/corrections", json=body)
        assert answer.status_code == 422 and words in answer.json()["error"], answer.text
    for _ in range(2):
        last = client.delete(f"{path}/corrections/last").json()
    assert last == {"corrections": [], "counts": plain}
    assert "evercell_corrected" not in client.get(f"{path}/files/csv").text


@pytest.mark.slow
def test_the_model_is_taught_what_was_corrected(client: Client, models: Path, upload: Upload) -> None:
    cells = synthetic_cells(300, n_types=5, seed=8)
    job = upload(client, stored(cells))
    result_of(client, job)
    path = f"/api/jobs/{job['id']}"
    assert client.post(f"{path}/teach", json={"name": "taught"}).status_code == 422  # nothing corrected
    rows = np.flatnonzero(cells.obs["cell_type"] == "acinar").tolist()
    client.post(f"{path}/corrections", json={"label": "acinar", "cells": rows})
    for name in ("quick", "human-lung", "../taught", ".taught", "auto", "a/b", ""):
        assert client.post(f"{path}/teach", json={"name": name}).status_code == 422, name

    facts = result_of(client, client.post(f"{path}/teach", json={"name": "taught"}).json())
    assert (facts["model"], facts["types_added"], facts["corrected"]) == ("taught", ["acinar"], len(rows))
    assert facts["confident"] > 0 and facts["holds"] and facts["sealed"]
    assert {one.name for one in models.iterdir()} == {"quick", "taught"}
    assert len(load(models / "quick").ledger) == 1
    assert load(models / "taught").types.names[-1] == "acinar"
    history = client.get("/api/models/taught").json()["history"]
    assert [stage["verb"] for stage in history] == ["train", "update"]
    assert history[-1]["gate"]["holds"] is True
    again = result_of(client, upload(client, stored(cells), model="taught"))
    assert next(one["cells"] for one in again["types"] if one["name"] == "acinar") > 0.8 * len(rows)


@pytest.mark.slow
def test_the_map_and_its_genes(client: Client, upload: Upload, query: Path) -> None:
    job = upload(client, map=True, majority=True)
    result = result_of(client, job)
    path = f"/api/jobs/{job['id']}"
    found = client.get(f"{path}/map").json()
    assert sorted(found["row"]) == list(range(150)) and result["map"]["cells"] == 150
    assert {len(found[name]) for name in ("x", "y", "type", "confidence", "unknown_score", "majority", "cell")} == {150}
    cells = ad.read_h5ad(query)
    (sample,) = found["samples"]
    assert sample["column"] == "donor" and len(sample["colours"]) == len(sample["levels"]) == 2
    assert [sample["levels"][code] for code in sample["codes"]] == list(cells.obs["donor"].iloc[found["row"]])
    gene = client.get(f"{path}/gene", params={"name": cells.var_names[7].lower()}).json()
    counts = np.asarray(cells.X[:, 7].todense()).ravel() / np.asarray(cells.X.sum(axis=1)).ravel()
    shown = np.zeros(150)
    shown[gene["cells"]] = gene["values"]
    assert np.allclose(shown, np.log1p(1e4 * counts)[found["row"]], atol=0.01)
    start = cells.var_names[7][:2]
    assert all(one.startswith(start) for one in client.get(f"{path}/genes", params={"find": start}).json())
    assert client.get(f"{path}/gene", params={"name": HOSTILE}).status_code == 404

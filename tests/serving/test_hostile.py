"""What strangers send to the server: bombs, huge headers, odd bodies and names; and disks and memory that run out."""

from __future__ import annotations

import gzip
import http.client
import json
import os
import signal
import socket
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import h5py
import pytest
from bad_inputs.cell_files import CELL_FILES

from evercell.testing import synthetic_cells

from .conftest import HEADERS, Client, ended, served, stored
from .test_guard import raw

Upload = Callable[..., dict[str, Any]]
BOMBS = (
    "dense_of_a_million_by_a_million", "sparse_of_a_hundred_billion_values", "indptr_of_a_trillion",
    "bomb_in_the_values", "bomb_in_uns", "groups_in_groups", "group_that_holds_itself", "values_in_another_file",
    "link_to_another_file", "tenx_shape_enormous",
)  # fmt: skip


@pytest.mark.parametrize("content_type", ["application/json", "text/plain", "application/x-www-form-urlencoded", ""])
def test_bodies_of_other_sites_are_not_read(client: Client, content_type: str) -> None:
    """What a form of another site can send without being asked: no header of its own, and three kinds of content."""
    body, path = json.dumps({"label": "x", "was": "y"}), "/api/jobs/x/corrections"
    for origin in ({}, {"Origin": "null"}, {"Origin": "https://evil.example"}):
        with Client(base_url=client.base_url, headers={"Content-Type": content_type, **origin}) as stranger:
            assert stranger.post(path, content=body).status_code == 403
            assert stranger.post("/api/login", content=json.dumps({"token": "x"})).status_code == 403
    answer = client.post(path, content=body, headers={"Content-Type": content_type})  # by the page, without an Origin
    assert answer.status_code == (404 if content_type == "application/json" else 422)


@pytest.mark.parametrize("origin", ["http://[", "http://[::1", "null", "", "\xff", "//", "http://evil.example@{host}"])
def test_origins_that_are_none_are_refused(address: str, origin: str) -> None:
    host = urlsplit(address).netloc
    head = f"POST /api/jobs?name=a.csv HTTP/1.1\r\nHost: {host}\r\nX-Evercell: 1\r\nContent-Length: 0\r\n"
    answer = raw(address, f"{head}Origin: {origin.format(host=host)}\r\nConnection: close\r\n\r\n".encode("latin-1"))
    assert answer.startswith(b"HTTP/1.1 403"), answer[:100]


@pytest.mark.parametrize(
    "extra",
    [
        "X: " + "a" * (1 << 20),
        "\r\n".join(f"X-{number}: a" for number in range(50_000)),
        "Cookie: " + "evercell=a; " * 50_000,
        "Content-Length: " + "9" * 5000,
        "Content-Length: -1",
        "Content-Length: 5\r\nContent-Length: 6",
        "X: a\rSet-Cookie: b",
        "X: \0",
    ],
    ids=["one large", "many", "many cookies", "length", "negative", "two lengths", "broken line", "nul"],
)
def test_large_and_broken_headers_are_refused(address: str, extra: str) -> None:
    place = urlsplit(address)
    request = f"GET /api/models HTTP/1.1\r\nHost: {place.netloc}\r\n{extra}\r\n\r\n".encode("latin-1")
    found = b""
    with socket.create_connection((place.hostname, place.port), timeout=20) as line:
        with suppress(ConnectionError):  # it does not listen to the end
            line.sendall(request)
        with suppress(ConnectionError):
            while part := line.recv(65536):
                found += part
    assert not found or found.startswith(b"HTTP/1.1 400"), found[:100]
    with Client(base_url=address) as client:
        assert client.get("/api/status").status_code == 200


def test_odd_bodies_are_refused_in_words(client: Client, upload: Upload) -> None:
    """Deep, huge, half characters: never an error of the server itself."""
    job = upload(client)
    assert ended(client, job)["state"] == "done"
    half, odd = "\ud800", "\u202e"
    bodies: list[Any] = [
        {"label": "a", "was": half}, {"label": half, "was": "a"}, {half: 1}, {"label": odd, "cells": [1]},
        {"label": "a", "cells": [10**400]}, {"label": "a", "cells": [float("nan")]}, {"label": "a", "cells": [-1]},
        {"label": "x" * 5000, "was": "a"}, {"name": half}, {"name": "../x"}, {"token": half}, [], None, 1,
    ]  # fmt: skip
    texts = [*map(json.dumps, bodies), "[" * 200_000, '{"cells": [' + "9" * 100_000 + "]}", "\0", '{"label": "a"']
    for path in (f"jobs/{job['id']}/corrections", f"jobs/{job['id']}/teach", "login"):
        for text in texts:
            answer = client.post(f"/api/{path}", content=text, headers={"Content-Type": "application/json"})
            assert answer.status_code in (400, 401, 422), (path, text[:60], answer.status_code)
            assert answer.json()["error"]
    assert client.get(f"/api/jobs/{job['id']}/corrections").json()["corrections"] == []


NAMES = {
    "../../../etc/passwd.h5ad": "etc_passwd",
    "..\\..\\boot.h5ad": "boot",
    "a\0b.h5ad": "a_b",
    "a\r\nSet-Cookie: x=1\r\n\r\n<b>.h5ad": "a_Set-Cookie_x_1_b",
    'a"; filename="evil.exe".h5ad': "a_filename_evil.exe",
    "<img src=x onerror=alert(1)>.h5ad": "img_src_x_onerror_alert_1",
    "</script>{{7*7}}.h5ad": "script_7_7",
    "\u202egnp\u2066.h5ad": "gnp",
    "a\u2028b.h5ad": "a_b",
    "-rf .h5ad": "-rf",
    ".h5ad": "cells",
    "....h5ad": "cells",
    "é.h5ad": "%C3%A9",
    "x" * 295 + ".h5ad": "x" * 80,
}


@pytest.mark.parametrize("name", NAMES)
def test_names_of_uploads_are_text_and_never_paths(client: Client, upload: Upload, name: str, tmp_path: Path) -> None:
    job = upload(client, name=name)
    found = ended(client, job)
    assert found["state"] == "done"
    assert found["name"].isprintable() and len(found["name"]) <= 300
    answer = client.get(f"/api/jobs/{job['id']}/files/csv")
    assert answer.status_code == 200 and "set-cookie" not in answer.headers
    given = answer.headers["content-disposition"]
    assert given in (
        f'attachment; filename="{NAMES[name]}-evercell.csv"',
        f"attachment; filename*=utf-8''{NAMES[name]}-evercell.csv",
    )
    assert client.delete(f"/api/jobs/{job['id']}").status_code == 204


def test_a_name_that_is_too_long_or_of_no_kind_is_refused(client: Client) -> None:
    for name, status in (("x" * 301 + ".h5ad", 422), ("cells.h5ad\0", 415), ("cells.h5ad/", 415), ("a.h5ad\n", 415)):
        answer = client.post("/api/jobs", params={"name": name, "model": "quick"}, content=b"x")
        assert answer.status_code == status, name
        assert "\n" not in answer.json()["error"]


def test_bombs_fail_in_words_and_the_next_job_is_answered(client: Client, upload: Upload, tmp_path: Path) -> None:
    files = []
    for name in BOMBS:
        (tmp_path / name).mkdir()
        files.append(CELL_FILES[name](tmp_path / name))
    (tmp_path / "line.csv.gz").write_bytes(gzip.compress(b",a\nx," + b"1" * (1 << 28)))
    jobs = {}
    for path in (*files, tmp_path / "line.csv.gz"):
        jobs[str(path)] = upload(client, path.read_bytes(), name=path.name)
    last = upload(client)
    for path, job in jobs.items():
        found = ended(client, job)
        assert found["state"] == "failed", path
        assert " is refused: " in found["error"]["error"] or "damaged" in found["error"]["error"], found
        assert "this is a bug" not in found["error"]["hint"] and str(tmp_path) not in json.dumps(found)
        assert client.get(f"/api/jobs/{job['id']}/result").status_code == 409
    assert ended(client, last)["state"] == "done"


def test_a_name_in_a_file_that_is_no_text_is_answered(client: Client, upload: Upload, tmp_path: Path) -> None:
    """HDF5 takes any bytes as a name; an answer must be UTF-8."""
    cells = synthetic_cells(20, seed=1)
    cells.layers["a"] = cells.X.copy()
    cells.write_h5ad(tmp_path / "odd.h5ad")
    with h5py.File(tmp_path / "odd.h5ad", "r+") as file:
        file["layers"].id.move(b"a", b"counts\xff")
    found = ended(client, upload(client, (tmp_path / "odd.h5ad").read_bytes()))
    assert found["state"] == "failed"
    assert "`query.h5ad` cannot be read as .h5ad" in found["error"]["error"]


@pytest.mark.slow
def test_one_user_does_not_see_the_jobs_of_another(models: Path, upload: Upload, query: Path) -> None:
    """All who have the token may use the server; a job is found by its id alone, which is told to who began it."""
    token = "a-token-of-two-users"  # noqa: S105
    with served(models=str(models), token=token, jobs=1) as address:
        users = [Client(base_url=address, headers=HEADERS, timeout=120) for _ in range(2)]
        for user in users:
            assert user.post("/api/login", json={"token": token}).status_code == 204
        one, two = users
        assert one.cookies["evercell"] != two.cookies["evercell"]
        job = upload(one, name="secret of one.h5ad")
        assert ended(one, job)["state"] == "done"
        for method, path in (
            ("GET", "/api/jobs"), ("GET", "/api/jobs/"), ("GET", "/api/jobs/*"), ("GET", "/api/jobs/%25"),
            ("GET", f"/api/jobs/{job['id'][:-1]}"), ("GET", f"/api/jobs/{job['id'].swapcase()}"),
            ("GET", f"/api/jobs/{job['id']}%20"), ("DELETE", f"/api/jobs/{job['id'][:-1]}"),
            ("GET", "/api/status"), ("GET", "/api/models"),
        ):  # fmt: skip
            answer = two.request(method, path)
            assert "secret" not in answer.text and job["id"] not in answer.text.replace(path, ""), path
            assert answer.status_code in (404, 405, 307) or path in ("/api/status", "/api/models"), path
        assert two.post("/api/logout").status_code == 204
        assert two.get(f"/api/jobs/{job['id']}").status_code == 401
        assert one.get(f"/api/jobs/{job['id']}/result").json()["name"] == "secret of one.h5ad"
        for user in users:
            user.close()


@pytest.mark.slow
def test_a_full_disk_is_told_and_the_server_goes_on(models: Path, query: Path, upload: Upload) -> None:
    """The disk is full for what is larger than the limit: for the upload, or only for what the job writes."""
    small = stored(synthetic_cells(5, seed=1, n_genes=120))
    with (
        served(models=str(models), jobs=1, file_size=len(small) + 100) as address,
        Client(base_url=address, headers=HEADERS, timeout=120) as client,
    ):
        options = {"name": "a.h5ad", "model": "quick", "map": False}
        answer = client.post("/api/jobs", params=options, content=query.read_bytes())
        assert answer.status_code == 507
        assert "no room" in answer.json()["error"] and answer.json()["hint"]
        found = ended(client, upload(client, small))
        assert found["state"] == "failed", found
        assert found["error"]["error"] == "there is no room on the server's disk for what comes of `query.h5ad`"
        assert found["error"]["hint"] == "try a smaller file, or later"
        assert client.get("/api/status").status_code == 200


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc")
def test_a_job_whose_memory_runs_out_leaves_the_server_alive(
    models: Path, upload: Upload, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system ends the process that takes most, and asks for workers before all others."""

    def worker() -> int | None:
        for place in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if mark in (place / "environ").read_bytes() and (place / "oom_score_adj").read_text() == "1000\n":
                    return int(place.name)
        return None

    value = uuid.uuid4().hex
    mark = f"EVERCELL_TEST={value}".encode()
    monkeypatch.setenv("EVERCELL_TEST", value)
    with (
        served(models=str(models), jobs=1) as address,
        Client(base_url=address, headers=HEADERS, timeout=120) as client,
    ):
        job, other = upload(client, stored(synthetic_cells(3000, seed=4)), map=True), upload(client)
        until = time.monotonic() + 60
        while client.get(f"/api/jobs/{job['id']}").json()["state"] == "queued" or worker() is None:
            assert time.monotonic() < until
            time.sleep(0.05)
        os.kill(worker() or 0, signal.SIGKILL)
        found = ended(client, job)
        assert found["state"] == "failed"
        assert "signal 9" in found["error"]["error"] and "memory" in found["error"]["hint"]
        assert ended(client, other)["state"] == "done"


def test_an_upload_that_is_cut_off_is_forgotten(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with served(models=str(models), jobs=1, kept=1) as address:
        place = urlsplit(address)
        line = http.client.HTTPConnection(str(place.hostname), place.port, timeout=20)
        line.putrequest("POST", "/api/jobs?name=a.csv&model=quick")
        line.putheader("X-Evercell", "1")
        line.putheader("Content-Length", "100000")
        line.endheaders()
        line.send(b"a,b\n" * 100)
        until = time.monotonic() + 30
        while not (found := list(tmp_path.glob("evercell-serve-*/*/upload.csv"))):
            assert time.monotonic() < until
            time.sleep(0.05)
        line.close()
        while any(found[0].parents[1].iterdir()):
            assert time.monotonic() < until
            time.sleep(0.05)
        with Client(base_url=address, headers=HEADERS, timeout=60) as client:  # the one place is free again
            assert client.post("/api/jobs?name=a.csv&model=quick", content=b"a").status_code == 202

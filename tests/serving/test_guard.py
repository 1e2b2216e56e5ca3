"""Who may ask the server what: tokens, hosts, origins, sizes, slow clients, paths."""

from __future__ import annotations

import http.client
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from evercell.errors import ModelError, SettingsError
from evercell.serving.settings import ServerSettings

from .conftest import HEADERS, Client, served

TOKEN = "a-token-of-the-tests"  # noqa: S105


@pytest.fixture(scope="module")
def locked(models: Path) -> Iterator[str]:
    """A server with a token."""
    with served(models=str(models), token=TOKEN, jobs=1) as address:
        yield address


def raw(address: str, request: bytes, *, wait: float = 10) -> bytes:
    """What a server answers to bytes."""
    place = urlsplit(address)
    with socket.create_connection((place.hostname, place.port), timeout=wait) as line:
        line.sendall(request)
        found = b""
        while part := line.recv(65536):
            found += part
        return found


def test_without_the_token_nothing_is_shown(locked: str) -> None:
    with Client(base_url=locked, headers=HEADERS) as client:
        for method, path in [
            ("GET", "/api/models"), ("GET", "/api/jobs/x"), ("POST", "/api/jobs?name=a.csv"), ("DELETE", "/api/jobs/x"),
            ("GET", "/api/jobs/x/files/h5ad"), ("POST", "/api/logout"), ("GET", "/api/none"),
        ]:  # fmt: skip
            answer = client.request(method, path)
            assert answer.status_code == 401, path
            assert "token" in answer.json()["error"]
        assert client.get("/api/status").json()["known"] is False
        for given in ("Bearer wrong", f"Basic {TOKEN}", f"Bearer {TOKEN}x", TOKEN, "Bearer", "Bearer \xe9"):
            bad = client.get("/api/models", headers={"Authorization": given.encode("latin-1")})
            assert bad.status_code == 401
        assert client.get("/", headers={}).status_code == 200
        assert client.get("/api/models", headers={"Authorization": f"Bearer {TOKEN}"}).status_code == 200


def test_a_browser_logs_in_with_a_cookie(locked: str) -> None:
    with Client(base_url=locked, headers=HEADERS) as client:
        assert client.post("/api/login", json={"token": "wrong"}).status_code == 401
        answer = client.post("/api/login", json={"token": TOKEN})
        assert answer.status_code == 204
        cookie = answer.headers["set-cookie"].lower()
        assert "httponly" in cookie and "samesite=strict" in cookie and TOKEN not in cookie
        assert client.get("/api/models").status_code == 200
        assert client.post("/api/logout").status_code == 204
        assert client.get("/api/models", headers={"Cookie": cookie.split(";")[0]}).status_code == 401


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"X-Evercell": "1"}, 422),  # let through: the body is wrong
        ({}, 403),
        ({"X-Evercell": "1", "Origin": "https://evil.example"}, 403),
        ({"X-Evercell": "1", "Origin": "null"}, 403),
        ({"X-Evercell": "1", "Sec-Fetch-Site": "cross-site"}, 403),
        ({"X-Evercell": "1", "Sec-Fetch-Site": "same-site"}, 403),
    ],
)
def test_other_sites_change_nothing(address: str, headers: dict[str, str], status: int) -> None:
    with Client(base_url=address) as client:
        answer = client.post("/api/jobs?name=a.csv&model=quick", content=b"", headers=headers)
    assert answer.status_code == status
    assert "access-control-allow-origin" not in answer.headers


def test_other_sites_are_not_told_that_they_may(address: str) -> None:
    asked = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    with Client(base_url=address) as client:
        answer = client.options("/api/jobs", headers={**asked, "Access-Control-Request-Headers": "x-evercell"})
    assert answer.status_code >= 400
    assert not [name for name in answer.headers if name.startswith("access-control")]


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8501", "127.0.0.1.evil.example", "", "[", "10.0.0.1"])
def test_other_names_lead_nowhere(address: str, host: str) -> None:
    answer = raw(address, f"GET /api/models HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
    assert answer.startswith((b"HTTP/1.1 421", b"HTTP/1.1 400"))
    assert b"quick" not in answer


def test_names_of_this_machine_are_allowed() -> None:
    local = ServerSettings(hosts=("Cells.lab",))
    assert all(local.allows(one) for one in ("127.0.0.1", "localhost", "LOCALHOST.", "::1", "cells.lab"))
    assert not any(local.allows(one) for one in ("10.0.0.1", "evil.example", "", "localhost.evil.example"))
    everywhere = ServerSettings(host="0.0.0.0", token=TOKEN)  # noqa: S104
    assert everywhere.allows("10.0.0.1") and everywhere.allows(socket.gethostname())
    assert not everywhere.allows("evil.example")


def test_others_than_this_machine_need_a_token() -> None:
    assert ServerSettings().checked().token is None
    made = ServerSettings(host="0.0.0.0").checked().token  # noqa: S104
    assert made is not None and len(made) >= 32
    with pytest.raises(SettingsError, match="characters"):
        ServerSettings(token="short").checked()  # noqa: S106


def test_answers_carry_their_guards(address: str) -> None:
    with Client(base_url=address, headers=HEADERS) as client:
        for path in ("/", "/page/app.js", "/api/models", "/api/none", "/openapi.json", "/page/map.js"):
            headers = client.get(path).headers
            policy = dict(part.strip().partition(" ")[::2] for part in headers["content-security-policy"].split(";"))
            assert policy["script-src"] == policy["style-src"] == "'self'" and "unsafe" not in " ".join(policy.values())
            assert policy["default-src"] == "'none'" and policy["frame-ancestors"] == "'none'"
            assert headers["x-content-type-options"] == "nosniff"
        assert client.get("/api/models").headers["cache-control"] == "no-store"
        page = client.get("/").text
        assert "http://" not in page and "https://" not in page and "onclick" not in page and "<style" not in page
        for path in ("/docs", "/redoc"):
            assert client.get(path).status_code == 404


def test_the_interface_describes_itself(address: str) -> None:
    with Client(base_url=address) as client:
        found = client.get("/openapi.json").json()
    assert {"/api/jobs", "/api/jobs/{job_id}/files/{kind}", "/api/models/{name}"} <= set(found["paths"])
    for path in found["paths"].values():
        for operation in path.values():
            assert operation["description"].rstrip().endswith(".")


def test_a_file_that_is_too_large_is_refused_at_once_or_on_the_way(address: str) -> None:
    place = urlsplit(address)
    connection = http.client.HTTPConnection(str(place.hostname), place.port, timeout=20)
    connection.putrequest("POST", "/api/jobs?name=a.csv&model=quick")
    connection.putheader("X-Evercell", "1")
    connection.putheader("Content-Length", str(1 << 40))
    connection.endheaders()
    assert connection.getresponse().status == 413

    def endless() -> Iterator[bytes]:
        for _ in range(80):
            yield bytes(1 << 17)

    with Client(base_url=address, headers=HEADERS, timeout=60) as client:
        answer = client.post("/api/jobs?name=a.csv&model=quick", content=endless())
        assert answer.status_code == 413
        assert "larger than 4 MB" in answer.json()["error"]
        body = json.dumps({"label": "x" * (17 << 20)})
        assert client.post("/api/jobs/x/corrections", content=body).status_code == 413


def test_slow_uploads_and_silent_callers_are_sent_away(address: str) -> None:
    place = urlsplit(address)
    head = f"POST /api/jobs?name=a.csv&model=quick HTTP/1.1\r\nHost: {place.netloc}\r\nX-Evercell: 1\r\n"
    stalled = raw(address, f"{head}Content-Length: 1000\r\n\r\nabc".encode(), wait=20)
    assert stalled.startswith(b"HTTP/1.1 408")

    begun = time.monotonic()
    with socket.create_connection((place.hostname, place.port), timeout=30) as line:  # a few bytes, again and again
        line.sendall(f"{head}Content-Length: 100000\r\n\r\n".encode())
        line.setblocking(False)
        answer = b""
        while not answer and time.monotonic() - begun < 25:
            try:
                answer = line.recv(65536)
            except BlockingIOError:
                line.sendall(b"x")
                time.sleep(0.3)
    assert answer.startswith(b"HTTP/1.1 408")

    assert raw(address, b"", wait=20) == b""  # nothing said, ever
    assert raw(address, b"GET / HTTP/1.1\r\nHost: loc", wait=20) == b""
    with Client(base_url=address) as client:
        assert client.get("/api/status").status_code == 200


@pytest.mark.parametrize(
    "path",
    [
        "/page/../app.py", "/page/%2e%2e/app.py", "/page/..%2fapp.py", "/page//etc/passwd", "/page/style.css%00",
        "/api/jobs/..%2f..%2fetc/result", "/api/models/..%2f..%2fevercell", "/api/models/%2e%2e",
        "/api/models/..%5c..", "/api/jobs/x/files/..%2fresult.json", "/page/map.js/../../__init__.py",
    ],
)  # fmt: skip
def test_no_path_leads_out(address: str, path: str) -> None:
    host = urlsplit(address).netloc
    answer = raw(address, f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
    assert answer.split()[1] in (b"404", b"401", b"422"), answer[:200]
    assert b"import" not in answer and b"root:" not in answer


def test_model_names_are_no_paths(tmp_path: Path) -> None:
    settings = ServerSettings(models=tmp_path)
    for name in ("..", "../x", "/etc", "a/b", "a\\b", ".x", "-x", "x" * 65, "auto", "human-lung", "a\n"):
        with pytest.raises(ModelError):
            settings.free_name(name)
    assert settings.free_name("mine") == tmp_path / "mine"


def test_no_more_jobs_than_are_kept(models: Path, query: Path) -> None:
    with served(models=str(models), jobs=1, kept=2) as address, Client(base_url=address, headers=HEADERS) as client:
        options = {"name": "a.h5ad", "model": "quick", "map": False}
        jobs = [client.post("/api/jobs", params=options, content=query.read_bytes()) for _ in range(3)]
        assert [one.status_code for one in jobs] == [202, 202, 503]
        assert "keeps 2 jobs" in jobs[2].json()["error"]
        assert client.delete(f"/api/jobs/{jobs[0].json()['id']}").status_code == 204
        assert client.post("/api/jobs", params=options, content=query.read_bytes()).status_code == 202


def test_job_names_cannot_be_guessed(address: str, query: Path) -> None:
    with Client(base_url=address, headers=HEADERS) as client:
        options = {"name": "a.h5ad", "model": "quick", "map": False}
        words = {client.post("/api/jobs", params=options, content=query.read_bytes()).json()["id"] for _ in range(3)}
        assert len(words) == 3 and min(map(len, words)) >= 24
        assert client.get("/api/jobs").status_code == 405  # no list

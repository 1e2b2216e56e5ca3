"""`evercell serve`, and the page of the documentation about it."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from made_once import command_line

from evercell.serving.app import make_app
from evercell.serving.settings import ServerSettings

from .conftest import Client

DOC = (Path(__file__).parents[2] / "docs" / "page.md").read_text(encoding="utf-8")
Run = Callable[..., tuple[int, str, str]]


def test_it_prints_an_address_serves_and_ends(models: Path) -> None:
    words = [sys.executable, "-m", "evercell", "serve", "--port", "0", "--no-open", "--models", str(models)]
    words += ["--token", "a-token-of-the-tests"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ)
    assert process.stdout is not None
    address, token = process.stdout.readline().strip(), process.stdout.readline().strip()
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/", address)
    assert token == "token: a-token-of-the-tests"  # noqa: S105
    with Client(base_url=address, timeout=60) as client:
        assert client.get("/api/status").json()["known"] is False
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode in (0, 130)
    assert "Traceback" not in said, said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--port", "99999"], "--port"),
        (["--jobs", "0"], "--jobs"),
        (["--keep", "-1"], "--keep"),
        (["--max-upload", "0"], "--max-upload"),
        (["--token", "short"], "16 or more"),
        (["--models", "none-such"], "`none-such` does not exist"),
        (["--host", "203.0.113.7", "--port", "0"], "cannot listen at 203.0.113.7:0"),
    ],
)
def test_wrong_use_is_told(run: Run, words: list[str], said: str) -> None:
    code, _, err = run("serve", "--no-open", *words)
    assert code == 2
    assert said in err and "hint:" in err


def test_what_is_not_installed_is_named(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [one for one in sys.modules if one.startswith("evercell.serving")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    code, _, err = run("serve", "--no-open")
    assert code == 2
    assert 'pip install "evercell[serve]"' in err


def test_the_server_itself_imports_nothing_heavy() -> None:
    code = (
        "import sys, evercell.serving.listening; print([n for n in ('torch', 'scanpy', 'anndata') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_commands_and_paths_of_the_documentation_are_there() -> None:
    command = command_line().commands["serve"]
    lines = re.findall(r"^    evercell serve(.*)$", DOC, flags=re.MULTILINE)
    assert len(lines) == 2
    for line in lines:
        command.make_context("serve", shlex.split(line)).close()
    paths = {re.sub(r"\{\w+\}", "X", path) for path in make_app(ServerSettings()).openapi()["paths"]}
    asked = re.findall(r'"\$page(/[^"?]*)', DOC)
    assert len(asked) == 8
    for path in asked:
        plain = re.sub(r"files/\w+", "files/X", path.replace("$job", "X"))
        assert f"/api{plain}" in paths, path

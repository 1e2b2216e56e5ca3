"""Real servers on free ports, a quick model, and what a user of the page does with them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("fastapi", reason="the page needs evercell[serve]")
httpx = pytest.importorskip("httpx", reason="the tests of the page need httpx")

from evercell.checkpoint import save  # noqa: E402
from evercell.finetuning import quick_settings, train  # noqa: E402
from evercell.model_card import model_card  # noqa: E402
from evercell.testing import synthetic_cells  # noqa: E402

if TYPE_CHECKING:
    from anndata import AnnData

HEADERS = {"X-Evercell": "1"}
Client = httpx.Client


@contextmanager
def served(*, file_size: int | None = None, **settings: Any) -> Iterator[str]:
    """The address of a server in a process of its own, whose files cannot grow beyond some bytes: a full disk to it."""

    program = str(Path(__file__).with_name("server.py"))
    words = [sys.executable, program, json.dumps(settings), str(file_size or 0)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(20)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with one model of four made-up types."""
    folder = tmp_path_factory.mktemp("models")
    model = train(synthetic_cells(400, seed=1), "cell_type", groups="donor", settings=quick_settings(), shown=False)
    save(model, folder / "quick", card=model_card(model, summary="made-up cells"))
    return folder


@pytest.fixture(scope="session")
def query(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of cells of these types, of two donors."""
    path = tmp_path_factory.mktemp("query") / "query.h5ad"
    synthetic_cells(150, seed=2, n_donors=2).write_h5ad(path)
    return path


@pytest.fixture(scope="session")
def address(models: Path) -> Iterator[str]:
    """A server without a token that most tests share."""
    with served(models=str(models), max_upload=4 << 20, patience=2, jobs=2, kept=100) as address:
        yield address


@pytest.fixture
def client(address: str) -> Iterator[Client]:
    """A user of that server."""
    with Client(base_url=address, headers=HEADERS, timeout=120) as client:
        yield client


@pytest.fixture
def upload(query: Path) -> Callable[..., dict[str, Any]]:
    """Upload a file; gives the job."""

    def upload_it(client: Client, content: bytes | None = None, **options: Any) -> dict[str, Any]:
        options = {"name": "query.h5ad", "model": "quick", "map": False, **options}
        done = client.post("/api/jobs", params=options, content=query.read_bytes() if content is None else content)
        assert done.status_code == 202, done.text
        found: dict[str, Any] = done.json()
        return found

    return upload_it


def stored(cells: AnnData) -> bytes:
    """Cells as the bytes of an .h5ad."""
    with TemporaryDirectory() as folder:
        cells.write_h5ad(Path(folder) / "cells.h5ad")
        return (Path(folder) / "cells.h5ad").read_bytes()


def ended(client: Client, job: dict[str, Any], seconds: float = 150) -> dict[str, Any]:
    """A job after its end."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        found: dict[str, Any] = client.get(f"/api/jobs/{job['id']}", params={"wait": 20}).json()
        if found["state"] not in ("queued", "running"):
            return found
    raise AssertionError(f"not ended: {found}")

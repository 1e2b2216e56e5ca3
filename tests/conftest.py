"""One small trained model that many tests look at."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

# OpenMP threads wait by spinning: on a machine that others use too, tiny tensors on two of them take 50 times as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"

if TYPE_CHECKING:
    from collections.abc import Callable

    from anndata import AnnData

    from evercell.annotator import Annotator


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    """Run a command in this process: exit code, standard output, standard error."""
    from made_once import command_line

    from evercell import cli

    monkeypatch.setattr(cli, "app", command_line())

    def run_it(*words: str | Path) -> tuple[int, str, str]:
        code = cli.main([str(word) for word in words])
        out, err = capsys.readouterr()
        return code, out, err

    return run_it


@pytest.fixture(scope="session")
def model() -> Annotator:
    """Model of four made-up types, trained in a second."""
    from evercell.finetuning import quick_settings, train
    from evercell.testing import synthetic_cells

    return train(synthetic_cells(seed=1), "cell_type", groups="donor", settings=quick_settings(), shown=False)


@pytest.fixture
def query() -> AnnData:
    """Cells of another made-up study of the same types; more than one batch and no whole number of batches."""
    from evercell.testing import synthetic_cells

    return synthetic_cells(150, seed=2)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `shared` are skipped in a clone that has no real data sets beside it."""
    if not SHARED.is_dir():
        for item in items:
            if item.get_closest_marker("shared"):
                item.add_marker(pytest.mark.skip(reason="the real data sets in ../shared/data are not there"))


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--approve`` writes `bad_inputs/messages.txt` anew."""
    parser.addoption("--approve", action="store_true", help="write bad_inputs/messages.txt as the messages are now")

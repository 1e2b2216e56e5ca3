"""Every bad file and wrong use is answered by one error that was read and approved: `messages.txt`.

After a change of a message, ``python -m pytest tests/bad_inputs --approve`` writes what is printed now; read the
difference before it is committed, as a biologist would: one error, the file, the value, what mends it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from made_once import command_line

from evercell.annotator import Annotator
from evercell.cells import read_cells
from evercell.checkpoint import save
from evercell.errors import EvercellError
from evercell.testing import synthetic_cells

from .cell_files import CELL_FILES
from .commands import COMMANDS
from .model_files import FORGED, MODEL_FILES

Run = Callable[..., tuple[int, str, str]]
MESSAGES = Path(__file__).with_name("messages.txt")
LIBRARY = re.compile(r"(of another kind|cannot be read|no description) \(.*\)$", re.MULTILINE)


@pytest.fixture(scope="session")
def approved(request: pytest.FixtureRequest) -> Iterator[dict[str, str]]:
    """Name of a case -> exit code and message."""
    found = read_messages()
    before = dict(found)
    yield found
    if changed := {name: said for name, said in found.items() if before.get(name) != said}:
        text = "\n".join(f"[{name}]\n{said}" for name, said in sorted((read_messages() | changed).items()))
        MESSAGES.write_text(text, encoding="utf-8")


def read_messages() -> dict[str, str]:
    """Name of a case -> exit code and message, as approved."""
    text = MESSAGES.read_text(encoding="utf-8") if MESSAGES.exists() else ""
    return dict(re.findall(r"^\[(.+)\]\n((?:.+\n)+)", text, re.MULTILINE))


@pytest.fixture(scope="session")
def place(model: Annotator, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What the words of `COMMANDS` name."""
    folder = tmp_path_factory.mktemp("inputs")
    cells = synthetic_cells(60, seed=1)
    cells.obs["n_counts"] = np.asarray(cells.X.sum(axis=1)).ravel() + 0.5
    cells.obs["study"] = "one"
    cells.obs["nothing"] = ""
    second, other = synthetic_cells(30, seed=2), synthetic_cells(30, seed=3)
    other.var_names = [f"contig_{n}_orf" for n in range(other.n_vars)]
    found = {name: folder / f"{name}.h5ad" for name in ("good", "second", "other")}
    for path, one in zip(found.values(), (cells, second, other), strict=True):
        one.write_h5ad(path)
    (folder / "notes.txt").write_text("These are my notes.\n")
    (folder / "empty").mkdir()
    (folder / "taken" / "model").mkdir(parents=True)
    (folder / "taken" / "model" / "notes.txt").write_text("no model")
    save(model, folder / "model")
    return {
        **found,
        "text": folder / "notes.txt",
        "empty": folder / "empty",
        "model": folder / "model",
        "taken": folder / "taken",
    }


@pytest.fixture(autouse=True)
def own_models(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVERCELL_MODELS", str(tmp_path_factory.getbasetemp() / "own"))


@pytest.fixture(autouse=True)
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is wrong is said before anything is learnt."""

    def begun(*_: object) -> None:
        raise AssertionError("it began to train")

    monkeypatch.setattr("evercell.training._Run.advance", begun)
    monkeypatch.setattr("evercell.commands.serving._run", begun)


def said(code: int, err: str, *folders: Path) -> str:
    """Exit code and errors, without the names of temporary folders and the words of libraries."""
    for folder in (*folders, Path.cwd()):
        err = err.replace(str(folder), "...")
    lines = [line for line in err.splitlines() if line.startswith(("error:", "hint:"))]
    text = LIBRARY.sub(r"\1 (...)", "\n".join(lines))
    return f"exit code {code}\n{text}\n"


def check(name: str, found: str, approved: dict[str, str], request: pytest.FixtureRequest) -> None:
    if request.config.getoption("--approve"):
        approved[name] = found
    assert found == approved.get(name, f"{name} is not in {MESSAGES.name}: run with --approve, and read it")


@pytest.mark.parametrize("name", COMMANDS)
def test_a_wrong_use(
    name: str,
    place: dict[str, Path],
    run: Run,
    tmp_path: Path,
    approved: dict[str, str],
    request: pytest.FixtureRequest,
) -> None:
    words = [word.format(here=tmp_path, **place) for word in COMMANDS[name].split()]
    before = {one: one.read_bytes() for one in place["model"].iterdir()}
    code, _, err = run(*words, "--quiet")
    check(name, said(code, err, tmp_path, place["model"].parent), approved, request)
    assert not list(tmp_path.iterdir()), "something was written"
    assert {one: one.read_bytes() for one in place["model"].iterdir()} == before


@pytest.mark.parametrize("name", CELL_FILES)
def test_a_bad_file_of_cells(
    name: str,
    place: dict[str, Path],
    run: Run,
    tmp_path: Path,
    approved: dict[str, str],
    request: pytest.FixtureRequest,
) -> None:
    """By `annotate`, which leaves matrices in the file; what reads all of it may find it good, or refuses it too."""
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    file = CELL_FILES[name](tmp_path / "in")
    code, _, err = run("annotate", file, "--model", place["model"], "--output", tmp_path / "out" / "out.csv", "--quiet")
    check(f"file {name}", said(code, err, tmp_path), approved, request)
    with suppress(EvercellError):
        read_cells(file)
    assert not list((tmp_path / "out").iterdir()), "something was written"


@pytest.mark.parametrize("name", MODEL_FILES)
def test_a_bad_model(
    name: str,
    place: dict[str, Path],
    run: Run,
    tmp_path: Path,
    approved: dict[str, str],
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "in").mkdir()
    path = MODEL_FILES[name](place["model"], tmp_path / "in")
    monkeypatch.setattr(Annotator, "fingerprint", FORGED)
    words = ["models", "add", path, "--name", "taken"] if path.suffix == ".zip" else ["log", path]
    if path.suffix != ".zip":
        words = ["annotate", place["good"], "--model", path, "--output", tmp_path / "out.csv"]
    code, _, err = run(*words, "--quiet")
    check(f"model {name}", said(code, err, tmp_path, place["good"].parent), approved, request)
    assert [one.name for one in tmp_path.iterdir()] == ["in"], "something was written outside"


def test_every_message_is_one_error_with_what_mends_it(approved: dict[str, str]) -> None:
    """Each refusal names what is wrong in one line and how to mend it in another, and none says that it is a bug."""
    for name, message in approved.items():
        assert message.startswith(("exit code 2\n", "exit code 1\n")), name
        assert message.count("\nerror: ") == 1, name
        assert message.count("\nhint: ") == 1, name
        assert "this is a bug" not in message, name
        assert "Traceback" not in message, name


def test_the_corpus_is_as_large_as_is_said(approved: dict[str, str]) -> None:
    assert len(COMMANDS) + len(CELL_FILES) + len(MODEL_FILES) >= 150
    assert set(approved) == {
        *COMMANDS,
        *(f"file {one}" for one in CELL_FILES),
        *(f"model {one}" for one in MODEL_FILES),
    }


def test_every_command_has_a_failure_here() -> None:
    """A new command is in the corpus, or this fails."""
    begun = [words.split() for words in COMMANDS.values()]

    def walk(command: object, words: list[str]) -> Iterator[list[str]]:
        for name, part in getattr(command, "commands", {}).items():
            if getattr(part, "commands", None):
                yield from walk(part, [*words, name])
            else:
                yield [*words, name]

    missing = [" ".join(words) for words in walk(command_line(), []) if not any(
        one[: len(words)] == words for one in begun
    )]  # fmt: skip
    assert not missing, f"add a wrong use of {missing} to {Path(__file__).with_name('commands.py').name}"

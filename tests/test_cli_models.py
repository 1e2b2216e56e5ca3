"""`models`, and models named on the command line: by name, by directory, and `auto`."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import anndata as ad
import pandas as pd
import pytest
from made_once import command_line

import evercell as ec
from evercell import checkpoint, registry
from evercell.pretraining import pretrain, quick_settings
from evercell.testing import synthetic_cells

Run = Callable[..., tuple[int, str, str]]

VERBS = ("list", "show", "path", "add", "export")
CARD = "# Model card\n\nSummary: made-up cells [of] four types\n\nNot for diagnosis.\n"


@pytest.fixture(scope="module")
def saved(model: ec.Annotator, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An annotator, a pretrained backbone, and cells to label."""
    folder = tmp_path_factory.mktemp("saved")
    checkpoint.save(model, folder / "islets", card=CARD)
    quick = quick_settings()
    short = replace(quick, training=replace(quick.training, samples=320))
    checkpoint.save(pretrain([synthetic_cells(200, seed=3)], settings=short, shown=False), folder / "backbone")
    synthetic_cells(120, seed=2).write_h5ad(folder / "q.h5ad")
    return folder


@pytest.fixture(autouse=True)
def own(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's own models; the packaged one is called `backbone`."""
    packaged, folder, here = tmp_path / "packaged", tmp_path / "own", tmp_path / "here"
    shutil.copytree(saved / "backbone", packaged / "backbone")
    shutil.copytree(saved / "islets", folder / "islets")
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setattr(registry, "PACKAGED", packaged)
    monkeypatch.setenv("EVERCELL_MODELS", str(folder))
    monkeypatch.setattr("evercell.reporting.report._map_points", lambda *_, **__: (None, "There is no map in tests."))
    return folder


# --- help


def test_without_a_verb_the_help_is_shown(run: Run) -> None:
    assert run("models") == run("models", "--help")
    assert set(command_line().commands["models"].commands) == set(VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_is_explained_with_examples_that_parse(verb: str, run: Run) -> None:
    code, out, _ = run("models", verb, "--help")
    assert code == 0
    for parameter in command_line().commands["models"].commands[verb].params:
        assert parameter.help, f"{verb} {parameter.name} has no help"
    shown = [line.strip() for line in out.splitlines() if line.startswith("    evercell ")]
    assert shown
    for line in shown:
        program, group, command, *words = shlex.split(line)
        assert (program, group, command) == ("evercell", "models", verb)
        command_line().commands["models"].commands[verb].make_context(command, list(words)).close()


# --- verbs


def test_list(run: Run, own: Path, saved: Path) -> None:
    shutil.copytree(saved / "islets", own / "bad")
    (own / "bad" / "annotator.json").write_text("{")
    code, out, err = run("models", "list")
    assert (code, err) == (0, "")
    _, backbone, bad, islets = out.splitlines()
    assert backbone.split()[:6] == ["backbone", "packaged", "human", "300", "0", "1"]
    assert bad.split()[:5] == ["bad", "own", "cannot", "be", "read:"]
    assert islets.startswith("islets    own            human")
    assert islets.endswith("MB  made-up cells [of] four types")
    found = json.loads(run("models", "list", "--json")[1])
    assert found["own_folder"] == str(own)
    assert [one["name"] for one in found["models"]] == ["backbone", "bad", "islets"]
    assert found["models"][2]["types"] == ["alpha", "beta", "delta", "gamma"]


def test_list_of_nothing_says_how_to_add(run: Run, own: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(registry, "PACKAGED", tmp_path / "none")
    monkeypatch.setenv("EVERCELL_MODELS", str(tmp_path / "none"))
    assert run("models", "list") == (
        0, f"no models; `evercell models add DIR` copies one of yours to {tmp_path / 'none'}\n", "",
    )  # fmt: skip
    assert json.loads(run("models", "list", "--json")[1])["models"] == []


def test_show_and_path(run: Run, own: Path) -> None:
    code, out, err = run("models", "show", "islets")
    assert (code, err) == (0, "")
    assert out.startswith(f"islets\n  directory    {own / 'islets'}\n  source       own\n")
    assert "  cell types   4: alpha, beta, delta, gamma\n" in out
    assert out.endswith(CARD)
    found = json.loads(run("models", "show", own / "islets", "--json")[1])
    assert (found["name"], found["card"], found["n_types"]) == ("islets", CARD, 4)
    assert "pretrained only" in run("models", "show", "backbone")[1]
    assert run("models", "path", "islets") == (0, f"{own / 'islets'}\n", "")
    shutil.copytree(own / "islets", "near")
    assert run("models", "path", "near") == (0, f"{Path.cwd() / 'near'}\n", "")


def test_add_and_export(run: Run, own: Path, saved: Path, tmp_path: Path) -> None:
    code, out, err = run("models", "add", saved / "islets", "--name", "lab-1")
    assert (code, out) == (0, "lab-1: 4 cell types\n")
    assert err == f"copied to `{own / 'lab-1'}`\n"
    assert run("models", "export", "lab-1", "--output", "lab.zip")[:2] == (0, "lab-1: lab.zip\n")
    shutil.rmtree(own / "lab-1")
    assert run("models", "add", "lab.zip", "--quiet") == (0, "lab-1: 4 cell types\n", "")
    assert run("models", "export", "lab-1", "--output", "copy", "--json")[0] == 0
    assert run("verify", "copy")[0] == run("verify", "lab-1")[0] == 0
    assert (own / "lab-1").is_dir()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("show", "error: Missing argument 'NAME|DIR'.\nhint: `evercell models show --help` shows how it is used"),
        ("shwo", "error: No such command 'shwo'"),
        ("show islet", "near it: `islets`\nhint: "),
        ("show .", "is no model: it has no annotator.json"),
        ("path islet", "error: there is no model `islet`"),
        ("add none", "error: there is no model `none`"),
        ("add {saved}/islets", "error: you have a model `islets` already"),
        ("add {saved}/backbone", "hint: choose another --name, or pass --overwrite: the name then leads to yours"),
        ("add {saved}/islets --name a/b", "error: `a/b` cannot be the name of a model\nhint: name it with --name"),
        ("export islets", "error: Missing option '--output'"),
        ("export islets --output {saved}", "is already there, and is no model\nhint: choose another --output"),
        ("export islets --output no/x.zip", "hint: make it first, or change --output"),
        ("export {saved}/q.h5ad --output x", "q.h5ad` is a file"),
    ],
)
def test_wrong_use_is_one_line_and_a_hint(run: Run, saved: Path, own: Path, words: str, said: str) -> None:
    before = sorted(own.rglob("*"))
    code, out, err = run("models", *shlex.split(words.replace("{saved}", str(saved))))
    assert (code, out) == (2, "")
    assert said in err
    assert err.count("error: ") == err.count("hint: ") == 1
    assert sorted(own.rglob("*")) == before
    assert not any(Path.cwd().iterdir())


# --- a model named by other commands


def test_annotate_by_name_is_annotate_by_directory(run: Run, saved: Path, own: Path) -> None:
    for model, name in (("islets", "a.csv"), (own / "islets", "b.csv")):
        code, _, err = run("annotate", saved / "q.h5ad", "--model", model, "--output", name)
        assert code == 0, err
    assert Path("a.csv").read_bytes() == Path("b.csv").read_bytes()
    code, _, err = run("annotate", saved / "q.h5ad", "--model", "islets", "--output", "a.h5ad")
    assert f"`islets` in `{own}`: 4 cell types, 300 human genes" in err
    assert ad.read_h5ad("a.h5ad").uns["evercell"]["model"] == "islets"


def test_every_command_that_takes_a_model_takes_its_name(run: Run, saved: Path) -> None:
    new = synthetic_cells(120, seed=4)
    new.write_h5ad("new.h5ad")
    for words in (
        ["log", "islets"],
        ["verify", "islets"],
        ["diff", "islets", "islets"],
        ["doctor", "new.h5ad", "--model", "islets"],
        ["embed", "new.h5ad", "--model", "backbone", "--output", "e.csv"],
        ["select", "new.h5ad", "--model", "islets", "--number", "3", "--output", "s.csv"],
        ["reconcile", "islets", "new.h5ad", "--labels", "cell_type", "--output", "l.csv"],
        ["train", "new.h5ad", "--labels", "cell_type", "--from", "backbone", "--samples", "320", "--no-refit",
         "--output", "trained"],
        ["update", "islets", "new.h5ad", "--labels", "cell_type", "--strategy", "analytic", "--samples", "320",
         "--output", "updated", "--force"],
        ["revert", "updated", "--stage", "1", "--output", "reverted"],
    ):  # fmt: skip
        code, out, err = run(*words)
        assert code == 0, f"{' '.join(words)}\n{out}\n{err}"
    assert ec.load("reverted").fingerprint == ec.load("islets").fingerprint


def test_auto_says_what_it_tried_and_why(run: Run, saved: Path, own: Path) -> None:
    shutil.copytree(saved / "islets", own / "broken")
    (own / "broken" / "genes.txt").write_text("# evercell genes\tversion 1\thuman\n")
    words = ["annotate", saved / "q.h5ad", "--model", "auto", "--output", "a.h5ad"]
    code, out, err = run(*words)
    assert code == 0, err
    lines = err.splitlines()
    start = lines.index("trying the models that there are: 2")
    assert lines[start + 1].startswith("model   genes measured  counts known")
    assert lines[start + 2].startswith("islets            100%")
    assert lines[start + 3].startswith("broken  out: the model ")  # what is out comes last; the backbone has no types
    assert lines[start + 4].startswith("`islets` is chosen: it labels ")
    assert "trying" not in out
    assert ad.read_h5ad("a.h5ad").uns["evercell"]["model"] == "islets"
    assert run("annotate", saved / "q.h5ad", "--model", "islets", "--output", "b.h5ad")[1] == out
    assert run(*words, "--quiet") == (0, out, "")


def test_auto_is_there_for_the_verbs_that_label_cells(run: Run, saved: Path) -> None:
    for words in (
        ["embed", saved / "q.h5ad", "--output", "e.csv"],
        ["select", saved / "q.h5ad", "--number", "3", "--output", "s.csv"],
        ["discover", saved / "q.h5ad", "--output", "d.h5ad", "--table", "t.csv"],
    ):
        code, out, err = run(*words, "--model", "auto")
        assert code == 0, err
        assert "`islets` is chosen" in err
        assert "--model auto" not in out and "update auto" not in out
    assert len(pd.read_csv("e.csv")) == 120


def test_auto_takes_the_chosen_model_not_its_namesake_here(run: Run, saved: Path, own: Path) -> None:
    shutil.copytree(saved / "backbone", "islets")
    code, _, err = run("annotate", saved / "q.h5ad", "--model", "auto", "--output", "a.h5ad")
    assert code == 0, err
    assert f"`{own / 'islets'}`: 4 cell types" in err


def test_auto_warns_where_no_model_fits(run: Run, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evercell.choosing.FITTING", 1.01)
    code, _, err = run("annotate", saved / "q.h5ad", "--model", "auto", "--output", "a.csv", "--quiet")
    assert code == 0
    assert err.startswith("warning: no model fits these cells well: the best, `islets`, labels ")


def test_auto_without_models_and_where_it_is_not_meant(run: Run, saved: Path, own: Path) -> None:
    shutil.rmtree(own)
    code, out, err = run("annotate", "missing.h5ad", "--model", "auto", "--output", "a.csv")  # said before it reads
    assert (code, out) == (2, "")
    assert err.startswith("error: there is no model with cell types to choose from\nhint: `evercell models add DIR`")
    code, _, err = run("train", saved / "q.h5ad", "--labels", "cell_type", "--from", "auto", "--output", "m")
    assert code == 2
    assert "name a model here" in err
    code, _, err = run("annotate", saved / "q.h5ad", "--model", "backbone", "--output", "a.csv")
    assert code == 2
    assert "error: this model is pretrained only" in err
    assert not any(Path.cwd().iterdir())

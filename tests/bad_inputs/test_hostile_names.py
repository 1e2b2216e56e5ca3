"""Names of types, genes and files may come from strangers: terminals, spreadsheets, Markdown and memory are spared."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from evercell.annotation import annotate
from evercell.annotator import Annotator
from evercell.cells import read_cells, write_table
from evercell.celltypes import CellTypes
from evercell.checkpoint import load, save
from evercell.commands.console import Console, visible
from evercell.errors import CellsError
from evercell.model_card import model_card
from evercell.reporting import write_report
from evercell.testing import synthetic_cells

from .cell_files import CELL_FILES

ESCAPE = "\x1b]0;owned\x07\x1b[2J"
HTML = "<img src=x onerror=alert(1)>"


def test_terminals_are_given_no_orders(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console()
    console.note(f"type {ESCAPE} \x9b31m \u202egnp.exe")
    console.error(ESCAPE, ESCAPE)
    console.result(f"a\tb\n{ESCAPE}", {}, as_json=False)
    console.result("", {"label": f"{ESCAPE}\x9b", "plain": "Zelltyp für β"}, as_json=True)
    out, err = capsys.readouterr()
    assert not {"\x1b", "\x07", "\x9b", "\u202e"} & {*out, *err}
    assert "\\u001b" in err and "a\tb\n" in out
    assert json.loads(out.splitlines()[-1]) == {"label": f"{ESCAPE}\x9b", "plain": "Zelltyp für β"}
    assert visible("Zelltyp für β, T+\n") == "Zelltyp für β, T+\n"


def test_tables_hold_no_formulas(tmp_path: Path) -> None:
    odd = ["=1+1", "@SUM(A1)", "-2+3+cmd|' /C calc'!A0", "+1(2)", "-", "+ve T", "alpha", "-1.5", None]
    frame = pd.DataFrame({"label": pd.Categorical(odd), "text": odd, "number": np.arange(9) - 4.0})
    write_table(frame, tmp_path / "t.csv")
    again = pd.read_csv(tmp_path / "t.csv", dtype=str, keep_default_na=False)
    for column in ("label", "text"):
        assert again[column].tolist() == [*("'" + one for one in odd[:4]), *odd[4:8], ""]
    assert again["number"].astype(float).tolist() == frame["number"].tolist()
    assert frame["text"].tolist() == odd
    names = pd.DataFrame([[1, 2]], index=pd.Index(["=1+1"], name="cell"), columns=["=HYPERLINK(1)", "=HYPERLINK(1)"])
    write_table(names, tmp_path / "n.csv")
    assert (tmp_path / "n.csv").read_text() == "cell,'=HYPERLINK(1),'=HYPERLINK(1)\n'=1+1,1,2\n"


def test_a_model_card_holds_no_html(model: Annotator, tmp_path: Path) -> None:
    hostile = replace(model, types=CellTypes((HTML, "a|b", "[x](javascript:1)", "`rm`"), (1, 1, 1, 1), (None,) * 4))
    card = model_card(hostile)
    assert "<" not in card and "](" not in card and "&#60;img" in card
    assert all(name in model_card(model) for name in model.types.names)
    assert load(save(hostile, tmp_path / "m", card=card)).types.names[0] == HTML  # stored as it is


def test_a_report_shows_odd_names_as_they_are(model: Annotator, tmp_path: Path) -> None:
    """Of types, samples, genes, cells, model and title: no element of theirs, no template, no script that they end."""
    odd = (HTML, "</script><script>alert(2)</script>", "{{7*7}}{%raw%}", "a\u2028b\u2029' onload='alert(3)")
    hostile = replace(model, types=CellTypes(odd, (1,) * 4, (None,) * 4))
    cells = synthetic_cells(40, seed=1)
    cells.obs["donor"] = np.array(odd, dtype=object)[np.arange(40) % 4]
    cells.obs_names = [f"{odd[number % 4]}{number}" for number in range(40)]
    cells.var_names = [*odd, *cells.var_names[4:]]
    annotate(hostile, cells, model_name=HTML, reject="off", shown=False, inplace=True)
    assert set(cells.obs["evercell"]) <= set(odd)
    page = write_report(cells, tmp_path / "report.html", title=odd[1], warnings=list(odd)).read_text(encoding="utf-8")
    assert "<img src=x" not in page and "<script>alert" not in page and "' onload='" not in page
    assert "{{7*7}}" in page and "&lt;img src=x" in page


PROGRAM = """
import resource, sys
from evercell.cells import read_cells
from evercell.errors import EvercellError
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sys.argv[1:]:
    for backed in (False, True):
        try:
            read_cells(path, backed=backed)
        except EvercellError:
            continue
        raise SystemExit(f"{path} was read")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
BOMBS = (
    "dense_of_a_million_by_a_million", "sparse_of_a_hundred_billion_values", "indptr_of_a_trillion",
    "obsm_declared_only", "many_arrays_declared_only", "bomb_in_the_values", "bomb_in_uns", "groups_in_groups",
    "group_that_holds_itself", "tenx_shape_enormous", "zarr_shape_enormous",
)  # fmt: skip


def test_bombs_take_little_memory(tmp_path: Path) -> None:
    """All of them in one process of at most 8 GB of addresses; its memory grows by less than 300 MB (libraries too)."""
    paths = []
    for name in BOMBS:
        (tmp_path / name).mkdir()
        paths.append(str(CELL_FILES[name](tmp_path / name)))

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))

    command = [sys.executable, "-W", "ignore", "-c", PROGRAM, *paths]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, preexec_fn=limited, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) < 300 << 10


@pytest.mark.parametrize("name", ["values_in_another_file", "link_to_another_file", "virtual_array"])
def test_no_file_of_the_reader_is_read(name: str, tmp_path: Path) -> None:
    """An HDF5 file can name another file as the place of its values: on a server that would give files away."""
    path = CELL_FILES[name](tmp_path)
    for backed in (False, True):
        with pytest.raises(CellsError, match="lie in another file"):
            read_cells(path, backed=backed)

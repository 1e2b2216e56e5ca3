"""The figure of methods over folds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from evercell.comparison import compared_figure
from evercell.errors import OutputError, SettingsError

MAGIC = {".png": b"\x89PNG", ".pdf": b"%PDF", ".svg": b"<?xml"}


def folds(n_folds: int = 5) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    rows = []
    for method, mean in (("evercell", 0.95), ("linear", 0.90), ("knn", 0.70)):
        for fold in range(n_folds):
            figures = {"accuracy": mean + 0.02 * rng.normal(), "macro_f1": mean - 0.1 + 0.02 * rng.normal()}
            rows.append({"method": method, "fold": fold, "n_train": 80, "n_test": 20, **figures})
    return pd.DataFrame(rows)


def texts(path: Path) -> str:
    """An SVG writes each text as a comment beside its outlines."""
    return path.read_text(encoding="utf-8")


@pytest.mark.parametrize("suffix", list(MAGIC))
def test_kind_by_suffix(tmp_path: Path, suffix: str) -> None:
    compared_figure(folds(), tmp_path / f"compared{suffix}")
    assert (tmp_path / f"compared{suffix}").read_bytes().startswith(MAGIC[suffix])
    assert [path.name for path in tmp_path.iterdir()] == [f"compared{suffix}"]


def test_methods_stand_by_their_mean_with_p_in_words(tmp_path: Path) -> None:
    compared_figure(folds(), tmp_path / "compared.svg", first="linear")
    text = texts(tmp_path / "compared.svg")
    places = [text.index(f"<!-- {name} -->") for name in ("evercell", "linear", "knn")]
    assert places == sorted(places)
    assert "macro-F1" in text and "p &lt; 0.001" in text
    assert "p: against linear, paired over folds" in text


def test_without_a_test_it_says_why(tmp_path: Path) -> None:
    compared_figure(folds(2).drop(columns="macro_f1"), tmp_path / "compared.svg")
    text = texts(tmp_path / "compared.svg")
    assert "no test" in text and "2 folds, a test needs three" in text
    assert "macro-F1" not in text


def test_odd_tables_are_drawn(tmp_path: Path) -> None:
    """One fold; one method; a method that failed in every fold; seeds as rows."""
    table = folds(3)
    compared_figure(folds(1), tmp_path / "one.png")
    compared_figure(table[table["method"] == "evercell"], tmp_path / "alone.png")
    compared_figure(pd.concat([table, table]), tmp_path / "seeds.png")
    table.loc[table["method"] == "knn", ["accuracy", "macro_f1"]] = np.nan
    compared_figure(table, tmp_path / "failed.svg")
    assert "<!-- knn -->" not in texts(tmp_path / "failed.svg")
    assert len(list(tmp_path.iterdir())) == 4


def test_what_cannot_be_drawn_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"\.png, \.pdf, \.svg"):
        compared_figure(folds(), tmp_path / "compared.jpg")
    with pytest.raises(SettingsError, match="no figure to draw"):
        compared_figure(folds().drop(columns=["accuracy", "macro_f1"]), tmp_path / "compared.png")
    with pytest.raises(OutputError, match="does not exist"):
        compared_figure(folds(), tmp_path / "missing" / "compared.png")
    assert list(tmp_path.iterdir()) == []


def test_no_state_of_matplotlib_is_touched(tmp_path: Path) -> None:
    code = (
        "import sys, pandas as pd\nfrom evercell.comparison import compared_figure\n"
        "rows = [dict(method=m, fold=f, n_train=8, n_test=2, accuracy=a + f / 9) for m, a in (('a', .1), ('b', .2))"
        " for f in range(3)]\n"
        f"compared_figure(pd.DataFrame(rows), {str(tmp_path / 'a.png')!r})\nprint('matplotlib.pyplot' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["False"]

"""The page on file formats says what is written, and what it says is written."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import anndata as ad
import pytest
from anndata import AnnData
from safetensors.numpy import load_file

from evercell.annotator import Annotator
from evercell.checkpoint import save
from evercell.registry import PACKAGED
from evercell.testing import synthetic_cells
from evercell.training import TrainingSettings
from evercell.updating import UpdateSettings
from evercell.updating.update import update

TEXT = (Path(__file__).parents[1] / "docs" / "formats.md").read_text(encoding="utf-8")
Run = Callable[..., tuple[int, str, str]]


def documented(heading: str, *, column: str) -> dict[str, bool]:
    """Names in backticks of a table's first column -> whether they must be there; the first table with that column."""
    section = TEXT.split(f"\n{heading}\n", 1)[1]
    table = section[section.index(f"| {column} |") :].split("\n\n")[0]
    rows = [row.split("|")[1:3] for row in table.splitlines()[2:]]
    return {name: when.strip() == "MUST" for names, when in rows for name in re.findall(r"`([^`]+)`", names)}


def check(found: Iterable[str], said: dict[str, bool]) -> None:
    """What is written is on the page, and what must be written is."""
    found = set(found)
    assert said
    assert found <= set(said), found - set(said)
    assert {name for name, must in said.items() if must} <= found


@pytest.fixture(scope="module")
def folder(model: Annotator, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of two stages, with sealed cells."""
    made = tmp_path_factory.mktemp("formats")
    settings = UpdateSettings(training=TrainingSettings(samples=64, batch_size=32, evaluations=1), bank=60)
    first = save(model, made / "first")
    second = update(model, synthetic_cells(seed=4), settings=settings, strategy="analytic", force=True, shown=False)
    return save(second, made / "second", previous=first)


@pytest.fixture
def models(folder: Path) -> list[Path]:
    """That model, the first stage of it, and those that come along."""
    packaged = [path.parent for path in sorted(PACKAGED.glob("*/annotator.json"))]
    return [folder, folder.parent / "first", *packaged]


def test_files_of_a_model(models: list[Path]) -> None:
    said = documented("## The model directory", column="file")
    for one in models:
        found = {"stages/N/" if path.is_dir() else path.name for path in one.iterdir()}
        check(found, said)
        assert {path.name for path in one.rglob("*") if path.is_symlink()} == set()


def test_keys_of_annotator_json(models: list[Path]) -> None:
    said = documented("### `annotator.json`", column="key")
    seen: set[str] = set()
    for one in models:
        keys = set(json.loads((one / "annotator.json").read_text(encoding="utf-8")))
        check(keys, said)
        seen |= keys
    assert set(said) - seen <= {"linear_scaled"}  # of imported models


def test_names_of_weights(models: list[Path]) -> None:
    section = TEXT.split("### `weights.safetensors`")[1].split("\n#")[0]
    prefixes = tuple(re.findall(r"`(\w+\.)`", section))
    for one in models:
        arrays = load_file(one / "weights.safetensors")
        assert all(name.startswith(prefixes) for name in arrays)
        n_genes = len((one / "genes.txt").read_text(encoding="utf-8").splitlines()) - 1
        assert arrays["backbone.gene_embedding.weight"].shape[0] == n_genes


def test_layout_of_the_bank(folder: Path) -> None:
    said = re.findall(r"`(\w+)\[\"(\w+)\"\]`", TEXT.split("### `bank.h5ad`")[1].split("\n## ")[0])
    for name in ("bank.h5ad", "sealed.h5ad"):
        cells = ad.read_h5ad(folder / name)
        found = [
            (part, key) for part in ("obs", "var", "varm", "obsm", "layers", "uns") for key in getattr(cells, part)
        ]
        assert sorted(found) == sorted(said)


def test_keys_of_the_ledger(models: list[Path]) -> None:
    said = documented("## The ledger", column="key")
    seen: set[str] = set()
    for one in models:
        for line in (one / "ledger.jsonl").read_text(encoding="utf-8").splitlines():
            keys = set(json.loads(line))
            check(keys, said)
            seen |= keys
    assert seen == set(said)


def test_what_is_written_into_a_file(folder: Path, query: AnnData, run: Run, tmp_path: Path) -> None:
    query.write_h5ad(tmp_path / "query.h5ad")
    words = ("annotate", tmp_path / "query.h5ad", "--model", folder, "--output", tmp_path / "annotated.h5ad")
    code, _, err = run(*words, "--majority")
    assert code == 0, err
    cells = ad.read_h5ad(tmp_path / "annotated.h5ad")
    new = [
        f'{part}["{key}"]'
        for part in ("obs", "var", "obsm", "varm", "obsp", "layers", "uns")
        for key in getattr(cells, part)
        if key not in getattr(query, part)
    ]
    check(new, documented("## Annotated files", column="where"))
    said = documented("## Annotated files", column='key of `uns["evercell"]`')
    check(cells.uns["evercell"], said)


def test_keys_of_a_store(folder: Path, query: AnnData, run: Run, tmp_path: Path) -> None:
    (tmp_path / "atlas").mkdir()
    query.write_h5ad(tmp_path / "atlas" / "query.h5ad")
    code, _, err = run("annotate", tmp_path / "atlas", "--model", folder, "--output", tmp_path / "labels")
    assert code == 0, err
    manifest: dict[str, Any] = json.loads((tmp_path / "labels" / "manifest.json").read_text(encoding="utf-8"))
    check(manifest, documented("## The store of labels", column="key of `manifest.json`"))
    assert {"file", "path", "parts"} <= set(manifest["files"][0])


def test_gene_tables_are_there() -> None:
    tables = PACKAGED.parent / "data" / "genes"
    assert set(re.findall(r"`(\w+\.tsv\.gz)`", TEXT)) == {path.name for path in tables.glob("*.gz")}

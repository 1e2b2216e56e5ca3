"""The shape of the package: which module may use which, what is imported when, what is in no module."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "src" / "evercell"
MODULES = sorted(SOURCE.rglob("*.py"))

# A module may import from its own row and from the rows above it; imports between modules of one row make no ring.
ORDER: tuple[tuple[str, ...], ...] = (
    ("colours", "errors", "plugins", "progress", "threads", "distributed", "engines", "locking", "outputs"),
    (
        "gene_names",
        "genes",
        "ontology",
        "labels",
        "celltypes",
        "vetting",
        "normalisation",
        "counts",
        "stored_cells",
        "h5_files",
        "copying",
        "cells",
        "stored_counts",
        "examples",
    ),
    (
        "cell_tables",
        "preprocessing",
        "sources",
        "duplicates",
        "merging",
        "training_cells",
        "tokenizers",
        "augmentation",
        "bank",
        "bank_selection",
        "profiles",
        "sketches",
    ),
    ("backbones", "heads", "linear", "discriminant", "masking", "rejection", "label_sets", "type_targets"),
    ("annotator", "soundness", "checkpoint", "circumstances", "ledger", "registry"),
    (
        "batching",
        "adaptation",
        "training",
        "labelling",
        "annotation",
        "streaming",
        "label_store",
        "atlas",
        "choosing",
        "majority",
        "evaluation",
        "folds",
        "classification",
        "pretraining_studies",
        "pretraining_cells",
    ),
    (
        "pretraining",
        "pretraining_objective",
        "finetuning",
        "updating",
        "presets",
        "frozen_head",
        "importing",
        "exporting",
    ),
    ("discovery", "explaining", "comparison", "doctor", "reproducing", "estimator", "celltypist"),
    ("tl",),
    ("crossvalidation",),
    ("reporting", "model_card"),
    ("serving", "cli", "__main__", "commands", "demo", "benching"),
    ("testing",),
)
RANK = {module: rank for rank, row in enumerate(ORDER) for module in row}

LAZY = ("torch", "scanpy", "matplotlib", "sklearn")
MOST_LINES = 450


def part(path: Path) -> str:
    """Name of the module or subpackage of evercell that a file belongs to."""
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def only_for_types(tree: ast.AST) -> set[int]:
    """Ids of the nodes below ``if TYPE_CHECKING:``, which import nothing."""
    return {
        id(below)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for child in node.body
        for below in ast.walk(child)
    }


def imported(path: Path, text: str) -> Iterator[tuple[int, str]]:
    """Line and full name of everything that a module imports at run time, in functions too."""
    tree = ast.parse(text)
    skipped = only_for_types(tree)
    package = ("evercell", *path.relative_to(SOURCE).parent.parts)
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else ()
            origin = ".".join((*base, *(node.module or "").split("."))).strip(".")
            yield from ((node.lineno, f"{origin}.{alias.name}") for alias in node.names)


def used_parts(path: Path) -> Iterator[tuple[int, str]]:
    """Line and part of evercell of every import from evercell itself."""
    names = {file.stem for file in SOURCE.glob("*.py")} | {f.name for f in SOURCE.iterdir() if f.is_dir()}
    for line, name in imported(path, path.read_text()):
        head, *rest = name.split(".")
        if head == "evercell" and rest and rest[0] in names and rest[0] != part(path):
            yield line, rest[0]


def called(node: ast.AST) -> str:
    """Dotted name of what a node names, for example ``torch.load``; empty where it names nothing."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (owner := called(node.value)):
        return f"{owner}.{node.attr}"
    return ""


def test_there_are_modules_to_look_at() -> None:
    assert {"errors.py", "cells.py", "genes.py"} <= {path.name for path in MODULES}


def test_every_module_has_its_place_in_the_order() -> None:
    unplaced = sorted({part(path) for path in MODULES} - set(RANK) - {"__init__"})
    assert not unplaced, f"add {unplaced} to ORDER in {Path(__file__).name}: the row below everything that they import"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_run_one_way(path: Path) -> None:
    if part(path) == "__init__":
        pytest.skip("offers the names of all modules")
    wrong = [f"line {line}: {used}" for line, used in used_parts(path) if RANK.get(used, 99) > RANK.get(part(path), 99)]
    assert not wrong, f"{part(path)} stands above what it imports in ORDER of {Path(__file__).name}: {wrong}"


def test_no_ring_of_imports() -> None:
    uses: dict[str, set[str]] = {}
    for path in MODULES:
        if part(path) != "__init__":
            uses.setdefault(part(path), set()).update(used for _, used in used_parts(path))
    settled: set[str] = set()
    while free := {module for module, used in uses.items() if module not in settled and used <= settled | {module}}:
        settled |= free
    ring = {module: sorted(used - settled) for module, used in uses.items() if module not in settled}
    assert not ring, f"these modules import each other: {ring}"


@pytest.mark.parametrize("module", ["evercell", "evercell.cli", "evercell.examples", "evercell.testing"])
def test_heavy_libraries_wait_until_they_are_needed(module: str) -> None:
    code = f"import sys, {module}; print(*[name for name in {LAZY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_no_module_is_long(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MOST_LINES


def test_no_module_is_named_after_nothing() -> None:
    vague = {"utils", "util", "helpers", "helper", "common", "misc", "tools"}
    assert not [path for path in MODULES if vague & {name.removesuffix(".py") for name in path.parts}]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_nothing_that_runs_code_from_a_file(path: Path) -> None:
    """No pickle in any dress, no torch.load, no eval or exec (invariant 2).

    Imports of other programs' models have two readers that run nothing: an unpickler of stand-ins, of which
    ``tests/importing`` has more, and torch.load of weights only.
    """
    text = path.read_text()
    unsafe = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    if path == SOURCE / "importing" / "inert.py":
        unsafe.remove("pickle")
        assert "(pickle.Unpickler)" in text and "def find_class" in text
    found = [f"line {line}: {name}" for line, name in imported(path, text) if name.split(".")[0] in unsafe]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call):
            name = called(node.func)
            only = [getattr(one.value, "value", None) is True for one in node.keywords if one.arg == "weights_only"]
            if name == "torch.load" and only == [True] and path == SOURCE / "importing" / "scbert.py":
                continue
            if name in {
                "eval", "exec", "torch.load", "pandas.read_pickle", "pd.read_pickle", "pickle.load", "pickle.loads",
            }:  # fmt: skip
                found.append(f"line {node.lineno}: {name}")
            for keyword in node.keywords:
                if keyword.arg == "allow_pickle" and getattr(keyword.value, "value", True) is not False:
                    found.append(f"line {node.lineno}: allow_pickle")
    assert not found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_only_one_module_knows_of_other_processes(path: Path) -> None:
    """torch.distributed is used in distributed.py only (invariant 5), Ray in engines.py only."""
    text = path.read_text()
    foreign = {"distributed": ("ray.",), "engines": ("torch.distributed.",)}.get(
        part(path), ("torch.distributed.", "ray.")
    )
    found = [line for line, name in imported(path, text) if f"{name}.".startswith(foreign)]
    found += [
        node.lineno
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Attribute) and called(node) == "torch.distributed" and part(path) != "distributed"
    ]
    assert not found, f"lines {found}"


def test_the_walk_sees_what_it_is_meant_to_see() -> None:
    text = "from .base import A\nfrom .. import cells\nfrom evercell import genes\ndef f():\n    import evercell.cli\n"
    text += "if TYPE_CHECKING:\n    from evercell import annotator\n"
    names = [name for _, name in imported(SOURCE / "backbones" / "latent.py", text)]
    assert names == ["evercell.backbones.base.A", "evercell.cells", "evercell.genes", "evercell.cli"]

"""README and documentation: every page runs from top to bottom, on packaged cells, with shorter trainings."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import anndata as ad
import pandas as pd
import pytest
from pages import PAGES, Block, Reader, Run, blocks

from evercell.annotation import annotate
from evercell.backbones import BACKBONES
from evercell.checkpoint import load
from evercell.comparison import METHODS
from evercell.demo import run_demo
from evercell.examples import example_path, load_example
from evercell.rejection import REJECTORS
from evercell.tokenizers import TOKENIZERS
from evercell.training import fit
from evercell.updating import STRATEGIES

SAMPLES, TEACH = 320, 1600
"""Most cells that a training of a page draws; on the page where a model has to learn something, and for the demo."""


def shortened(monkeypatch: pytest.MonkeyPatch, samples: int) -> None:
    """Trainings of so many cells at most, smaller examples in Python, and no map."""

    def short(model: Any, loss: Any, settings: Any, **options: Any) -> Any:
        few = replace(settings, samples=min(settings.samples, samples), evaluations=1)
        return fit(model, loss, few, **options)

    monkeypatch.setattr(
        "evercell.choosing.annotate", lambda *cells, **asked: annotate(*cells, **asked | {"adapt": False})
    )
    monkeypatch.setattr("evercell.examples.load_example", lambda name: load_example(name)[::3].copy())
    for module in ("finetuning", "pretraining", "updating.stage"):
        monkeypatch.setattr(f"evercell.{module}.fit", short)
    monkeypatch.setattr("scanpy.pp.neighbors", lambda *_, **__: None)
    monkeypatch.setattr("scanpy.tl.umap", lambda adata: adata.obsm.update(X_umap=adata.obsm["X_evercell"][:, :2]))
    monkeypatch.setattr("matplotlib.pyplot.show", lambda *_, **__: None)
    monkeypatch.setattr("evercell.reporting.report._map_points", lambda *_, **__: (None, "There is no map in tests."))


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `evercell demo` makes; its model stands for the first model of every page."""
    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        shortened(patch, TEACH)
        run_demo(folder, shown=False)
    return folder


@pytest.fixture
def reader(run: Run, demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Reader]:
    """Somebody in a folder with the files that pages speak of; what they register is forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("EVERCELL_MODELS", str(tmp_path / "models of mine"))
    example_of = {"labelled": "baron_stage1", "atlas": "baron_stage1", "new": "fasolino_stage2"}
    for name, example in example_of.items():
        Path(f"{name}.h5ad").write_bytes(example_path(example).read_bytes())
    load_example("tritschler_unseen")[::5].copy().write_h5ad("query.h5ad")
    shutil.copytree(demo / "model", "model")
    Path("atlas").mkdir()
    shutil.copy("query.h5ad", "atlas")
    trained = "evercell train studies/baron_stage1.h5ad --labels cell_type --donor donor --output model"
    ready = {"evercell demo": {demo: "evercell-demo"}, trained: {demo / "model": "model"}}
    registries = (TOKENIZERS, BACKBONES, REJECTORS, STRATEGIES, METHODS)
    before = [dict(registry._classes) for registry in registries]
    modules = set(sys.modules)
    yield Reader(run, ready)
    for registry, classes in zip(registries, before, strict=True):
        registry._classes = classes
    for name in set(sys.modules) - modules:
        if getattr(sys.modules[name], "__file__", None) and Path(str(sys.modules[name].__file__)).parent == tmp_path:
            del sys.modules[name]


def after_teaching(reader: Reader, folder: Path) -> None:
    """What the page promises is so."""
    words = {command.split()[1]: out for command, out in reader.said.items()}
    assert "endothelial" in words["reconcile"]
    assert load(folder / "model2").types.names[-1] == "endothelial"
    assert len(load(folder / "model3").ledger) == 3
    assert words["log"].count("stage ") >= 3
    assert "it fell in no later stage" in words["bisect"] or "fell most in stage" in words["bisect"]
    assert load(folder / "model1").fingerprint == load(folder / "evercell-demo" / "model").fingerprint
    clusters = pd.read_csv(folder / "clusters.csv", keep_default_na=False)
    assert (clusters["accept"] == "yes").any()
    taught = load(folder / "taught")
    assert taught.types.names[-1] == "endothelial" and len(taught.ledger) == 2
    annotated = ad.read_h5ad(folder / "annotated.h5ad").obs
    endothelial = annotated[annotated["cell_type"] == "endothelial"]
    assert (endothelial["evercell"] == "endothelial").mean() >= 0.5
    others = annotated[annotated["cell_type"] != "endothelial"]
    assert (others["evercell"] == "endothelial").mean() < 0.05
    assert load(folder / "private").bank.codes.size == 0
    assert len(pd.read_csv(folder / "select.csv")) == 20


def after_models(reader: Reader, folder: Path) -> None:
    """A model from the backbone, and a table of weights."""
    assert load(folder / "model").ledger.stages[0].facts["base"]
    assert (folder / "weights.csv").read_text().startswith("#")


def after_mouse_lung(reader: Reader, folder: Path) -> None:
    """From three raw folders to a cross-validated model."""
    assert any("measured by all sources" in out for out in reader.said.values())
    clean = ad.read_h5ad(folder / "clean.h5ad")
    assert clean.obs["source"].nunique() == 3
    assert clean.obs["cell_type"].notna().all()
    cells = pd.read_csv(folder / "folds" / "cells.csv")
    assert not cells.groupby("group")["fold"].agg(lambda folds: len(set(folds)) - 1).any()
    scores = pd.read_csv(folder / "compared" / "folds.csv")
    assert set(scores["method"]) == {"evercell", "linear", "knn"}
    assert scores.loc[scores["method"] == "linear", "accuracy"].mean() > 0.8
    assert load(folder / "lung-model").ledger.stages[0].facts["settings"]["balance"] == "oversample"
    assert ad.read_h5ad(folder / "annotated.h5ad").n_obs == 240


def after_explaining(reader: Reader, folder: Path) -> None:
    """Reasons, in words and in files."""
    assert any("`delta`" in out and "because of SST" in out for out in reader.said.values())
    assert any("called Unknown: unknown score" in out for out in reader.said.values())
    assert "<h3>Genes</h3>" in (folder / "why.html").read_text(encoding="utf-8")
    assert {"gene", "contribution"} <= set(pd.read_csv(folder / "genes.csv"))


def after_python(reader: Reader, folder: Path) -> None:
    """Columns in the AnnData."""
    adata = reader.names["adata"]
    assert {"evercell", "evercell_majority", "evercell_cluster", "predicted_labels", "conf_score"} <= set(adata.obs)


AFTER: dict[str, Callable[[Reader, Path], None]] = {
    "docs/teach.md": after_teaching,
    "docs/models.md": after_models,
    "docs/mouse-lung.md": after_mouse_lung,
    "docs/explain.md": after_explaining,
    "docs/python.md": after_python,
}
"""What is looked at when a page has run."""


@pytest.mark.parametrize("page", [name for name in PAGES if blocks(name)])
def test_the_page_runs_from_top_to_bottom(
    page: str, reader: Reader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shortened(monkeypatch, TEACH if page == "docs/teach.md" else SAMPLES)
    reader.reads(page)
    AFTER.get(page, lambda *_: None)(reader, tmp_path)


def test_what_is_not_run_is_little(capsys: pytest.CaptureFixture[str]) -> None:
    """`python tests/pages.py` lists it."""
    every = [block for page in PAGES for block in blocks(page)]
    unrun = [block for block in every if block.reason is not None]
    assert all(page in {block.page for block in every} for page in ("README.md", *AFTER))
    assert len(unrun) < len(every) / 3, "\n".join(f"{block.where}: {block.reason}" for block in unrun)


def block(code: str, language: str = "bash", reason: str | None = None) -> Block:
    return Block("page.md", 1, language, code, reason)


@pytest.mark.parametrize(
    "wrong",
    [
        block("evercell annotat query.h5ad", reason="needs a query"),
        block("evercell annotate query.h5ad --modle x --output y", reason="needs a query"),
        block("python benchmarks/no_such.py", reason="takes an hour"),
        block('pip install "evercell[nosuch]"', reason="needs the network"),
        block('pip install "evercell[nosuch]"'),
        block("def f(:", "python", reason="needs two GPUs"),
        block("rm query.h5ad"),
        block("evercell annotate none.h5ad --model model --output y.h5ad"),
        block("assert False", "python"),
        block("library(Seurat)", "r"),
    ],
)
def test_a_wrong_block_is_found(wrong: Block, reader: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pages.blocks", lambda _: [wrong])
    with pytest.raises((AssertionError, SyntaxError)):
        reader.reads("page.md")

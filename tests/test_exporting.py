"""A model in other programs' forms says what it says in evercell's own."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from scipy.sparse import csr_matrix

from evercell import exporting
from evercell.annotator import Annotator
from evercell.backbones import BACKBONES
from evercell.checkpoint import save
from evercell.errors import ModelError, SettingsError
from evercell.exporting import INTERCEPT, export_csv, export_onnx
from evercell.heads import GrowingHead
from evercell.linear import LinearModel
from evercell.testing import synthetic_cells
from evercell.tokenizers import TOKENIZERS, View
from evercell.training import seeded

Run = Callable[..., tuple[int, str, str]]
SIZES: dict[str, dict[str, Any]] = {
    "latent": {"members": 2, "member_width": 16, "n_latents": 4, "depth": 1, "library_size": True},
    "transformer": {"width": 16, "depth": 1, "n_heads": 2},
    "performer": {
        "width": 16,
        "depth": 1,
        "n_heads": 2,
        "head_width": 6,
        "published_kernel": True,
        "extra_token": True,
    },
}


def view_of(model: Annotator, cells: AnnData) -> View:
    """Cells over the genes of the model, which they have in its order; the last cell expresses nothing."""
    counts = cells.X.astype(np.float32).toarray()[:, : len(model.vocabulary)]
    counts[-1] = 0
    return View.whole(csr_matrix(counts))


@pytest.fixture(scope="module")
def view(model: Annotator) -> View:
    cells = synthetic_cells(40, seed=2)
    order = [cells.var_names.get_loc(symbol) for symbol in model.vocabulary.symbols]
    return view_of(model, cells[:, order])


def scaled(linear: LinearModel | None) -> LinearModel:
    """A linear member with a centre and a ceiling, as imported ones have."""
    assert linear is not None
    rng = np.random.default_rng(0)
    centre = rng.random(len(linear.weight)).astype(np.float32)
    return replace(linear, centre=centre, ceiling=(centre + 1.0).astype(np.float32))


# --- csv


def applied(path: Path, counts: np.ndarray, symbols: Sequence[str], measured: np.ndarray) -> np.ndarray:
    """Log-probabilities by what the comments of the table say, from the file and the counts alone."""
    table = pd.read_csv(path, comment="#", index_col="gene")
    lines = [line for line in path.read_text().splitlines() if line.startswith("# ")]
    assert any("10000 * count / total" in line for line in lines)
    x = np.log1p(1e4 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1))
    rows = table.drop(INTERCEPT)
    place = [list(symbols).index(gene) for gene in rows.index]
    x = x[:, place]
    if "ceiling" in table:
        x = np.minimum(x, rows["ceiling"].to_numpy())
        x = x - rows["centre"].to_numpy() * measured[place]
    types = [name for name in table.columns if name not in ("id", "centre", "ceiling")]
    logits = x @ rows[types].to_numpy() + table.loc[INTERCEPT, types].to_numpy(dtype=float)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


@pytest.mark.parametrize("with_scale", [False, True])
def test_the_table_gives_the_answers_of_the_linear_member(
    model: Annotator, view: View, with_scale: bool, tmp_path: Path
) -> None:
    if with_scale:
        model = replace(model, linear=scaled(model.linear))
        measured = np.arange(len(model.vocabulary)) % 3 > 0
        counts = csr_matrix(view.counts.multiply(measured).tocsr())
        view = View.whole(counts, measured)
    facts = export_csv(model, tmp_path / "weights.csv")
    assert model.linear is not None
    assert facts == {"genes": [int(model.linear.weight.any(axis=1).sum())], "types": [4]}
    found = applied(tmp_path / "weights.csv", view.counts.toarray(), model.vocabulary.symbols, view.measured)
    np.testing.assert_allclose(found, model.linear.log_proba(view), atol=1e-4)


def test_names_with_commas_and_hashes_are_read_back(model: Annotator, tmp_path: Path) -> None:
    types = replace(model.types, names=("a, b", "c # d", 'say "e"', "f"), ontology_ids=(None,) * 4)
    export_csv(replace(model, types=types), tmp_path / "weights.csv")
    assert pd.read_csv(tmp_path / "weights.csv", comment="#").columns[2:].tolist() == list(types.names)
    with (tmp_path / "weights.csv").open(newline="") as stream:
        assert next(csv.reader(line for line in stream if not line.startswith("# ")))[2:] == list(types.names)


def test_a_model_without_weights_of_genes_is_told(model: Annotator, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no linear member"):
        export_csv(replace(model, linear=None), tmp_path / "weights.csv")
    assert not list(tmp_path.iterdir())


# --- onnx


def session(path: Path) -> Any:
    runtime = pytest.importorskip("onnxruntime", reason="needs the extra `onnx`")
    return runtime.InferenceSession(path, providers=["CPUExecutionProvider"])


def needs_onnx() -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason="needs the extra `onnx`")


def inputs(model: Annotator, view: View) -> dict[str, np.ndarray]:
    tokens = model.tokenizer.tokenize(view)
    found = {"gene_ids": tokens.gene_ids.numpy(), "values": tokens.values.numpy(), "mask": tokens.mask.numpy()}
    if (model.linear is not None or model.profiles is not None) and model.tokenizer.n_bins is not None:
        dense = view.logged().toarray()
        found["logged"] = np.take_along_axis(dense, found["gene_ids"], axis=1) * found["mask"]
    if model.profiles is not None or (model.linear is not None and model.linear.centre is not None):
        found["measured"] = view.measured
    if model.backbone.settings.get("library_size"):
        found["totals"] = view.totals
    return found


def agrees(model: Annotator, view: View, path: Path) -> None:
    """Another number of cells and tokens than the file was traced with, and the same answers to 1e-4."""
    running = session(path)
    for part in (view, view.taken(np.array([5])), view.taken(np.arange(30))):
        found = dict(
            zip([one.name for one in running.get_outputs()], running.run(None, inputs(model, part)), strict=True)
        )
        representation, logits = model.represent(part)
        np.testing.assert_allclose(found["representation"], representation, atol=1e-4)
        if len(model.types):
            np.testing.assert_allclose(found["logits"], logits, atol=1e-4)
            np.testing.assert_allclose(found["log_proba"], model.outputs(part).log_proba, atol=1e-4)


def test_the_default_model_says_the_same_in_onnx(model: Annotator, view: View, tmp_path: Path) -> None:
    needs_onnx()
    before = replace(model).fingerprint
    facts = export_onnx(model, tmp_path / "model.onnx")
    assert facts == {
        "inputs": ["gene_ids", "values", "mask", "measured"],
        "outputs": ["representation", "logits", "log_proba"],
    }
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]
    agrees(model, view, tmp_path / "model.onnx")
    said = session(tmp_path / "model.onnx").get_modelmeta().custom_metadata_map
    assert json.loads(said["types"]) == list(model.types.names)
    assert json.loads(said["genes"]) == list(model.vocabulary.names)
    assert said["fingerprint"] == before == replace(model).fingerprint
    assert getattr(model.backbone, "compiled", None)


@pytest.mark.parametrize(
    ("backbone", "tokenizer", "share"),
    [
        ("latent", "bins", 0.4),
        ("latent", "values", 1.0),
        ("latent", "bins", 1.0),
        ("transformer", "values", 0.5),
        ("performer", "bins", 0.5),
    ],
)
def test_other_backbones_tokenizers_and_linear_members_say_the_same_in_onnx(
    model: Annotator, view: View, backbone: str, tokenizer: str, share: float, tmp_path: Path
) -> None:
    needs_onnx()
    made = TOKENIZERS[tokenizer]()
    with seeded(1):
        network = BACKBONES[backbone](len(model.vocabulary), n_bins=made.n_bins, **SIZES[backbone]).eval()
        head = GrowingHead(network.width, 4, hidden=(8,)).eval()
    linear = scaled(model.linear) if share == 1.0 else model.linear
    other = replace(
        model, tokenizer=made, backbone=network, head=head, linear=linear, linear_share=share, temperature=1.3
    )
    export_onnx(other, tmp_path / "model.onnx")
    measured = np.arange(len(model.vocabulary)) % 4 > 0
    agrees(other, View.whole(csr_matrix(view.counts.multiply(measured).tocsr()), measured), tmp_path / "model.onnx")


def test_every_backbone_is_tried() -> None:
    assert set(SIZES) == set(BACKBONES)


def test_a_pretrained_model_gives_representations(model: Annotator, view: View, tmp_path: Path) -> None:
    needs_onnx()
    from evercell.celltypes import CellTypes

    bare = replace(model, types=CellTypes(()), head=GrowingHead(model.backbone.width, 0), linear=None, rejector=None)
    assert export_onnx(bare, tmp_path / "model.onnx")["outputs"] == ["representation"]
    agrees(bare, view, tmp_path / "model.onnx")


def test_plain_operations_are_the_compiled_ones(model: Annotator, view: View) -> None:
    tokens = model.tokenizer.tokenize(view)
    plain = model.frozen_copy().backbone
    plain.compiled = False  # type: ignore[assignment]
    with torch.inference_mode():
        torch.testing.assert_close(plain(tokens), model.backbone(tokens), atol=1e-5, rtol=1e-4)


def test_without_the_packages_the_extra_is_named(
    model: Annotator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporting.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SettingsError, match="`onnx` is needed") as caught:
        export_onnx(model, tmp_path / "model.onnx")
    assert "onnx]" in (caught.value.hint or "")
    assert not list(tmp_path.iterdir())


def test_the_command(run: Run, model: Annotator, tmp_path: Path) -> None:
    save(model, tmp_path / "model")
    code, out, err = run(
        "export", tmp_path / "model", "--format", "csv", "--output", tmp_path / "weights.csv", "--json"
    )
    assert code == 0, err
    assert json.loads(out)["types"] == [4]
    assert (tmp_path / "weights.csv").is_file()
    for words, message in (
        (("--format", "csv", "--output", tmp_path / "weights.txt"), "does not end in .csv"),
        (("--format", "pmml", "--output", tmp_path / "weights.csv"), "--format is `pmml`"),
    ):
        code, _, err = run("export", tmp_path / "model", *words)
        assert code == 2
        assert message in err

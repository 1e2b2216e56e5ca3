"""Checkpoints of the scBERT family: the numbers of a reference written from the formulas, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix
from torch import Tensor

from evercell.annotation import embed
from evercell.checkpoint import load, save
from evercell.errors import GenesError, ModelError
from evercell.finetuning import ModelSettings, train
from evercell.importing import import_scbert
from evercell.testing import synthetic_cells
from evercell.tokenizers import View
from evercell.training import TrainingSettings

WIDTH, DEPTH, HEADS, HEAD_WIDTH = 20, 2, 3, 8
N_GENES = 60
N_FEATURES = int(HEAD_WIDTH * math.log(HEAD_WIDTH))

Weights = dict[str, Tensor]
Run = Callable[..., tuple[int, str, str]]


def genes() -> list[str]:
    return synthetic_cells(2, n_genes=N_GENES, n_types=1, n_donors=1).var_names.tolist()


def checkpoint(seed: int = 0, *, loud: float = 1.0) -> Weights:
    """Random weights under the names of a PerformerLM; inner width 24 at width 20, as scBERT's 640 at 200."""
    random = torch.Generator().manual_seed(seed)

    def drawn(*shape: int, scale: float = 0.3) -> Tensor:
        return scale * torch.randn(*shape, generator=random)

    inner = HEADS * HEAD_WIDTH
    weights = {"token_emb.weight": drawn(7, WIDTH), "pos_emb.emb.weight": drawn(N_GENES + 1, WIDTH).double()}
    for number in range(DEPTH):
        layer = f"performer.net.layers.{number}"
        for one in "qkv":
            weights[f"{layer}.0.fn.to_{one}.weight"] = drawn(inner, WIDTH, scale=loud * WIDTH**-0.5)
        weights |= {
            f"{layer}.0.norm.weight": 1 + drawn(WIDTH),
            f"{layer}.0.norm.bias": drawn(WIDTH),
            f"{layer}.0.fn.fast_attention.projection_matrix": drawn(N_FEATURES, HEAD_WIDTH, scale=1.0),
            f"{layer}.0.fn.to_out.weight": drawn(WIDTH, inner),
            f"{layer}.0.fn.to_out.bias": drawn(WIDTH),
            f"{layer}.1.norm.weight": 1 + drawn(WIDTH),
            f"{layer}.1.norm.bias": drawn(WIDTH),
            f"{layer}.1.fn.fn.w1.weight": drawn(4 * WIDTH, WIDTH),
            f"{layer}.1.fn.fn.w1.bias": drawn(4 * WIDTH),
            f"{layer}.1.fn.fn.w2.weight": drawn(WIDTH, 4 * WIDTH),
            f"{layer}.1.fn.fn.w2.bias": drawn(WIDTH),
        }
    weights |= {"performer.calls_since_last_redraw": torch.tensor(7)}
    weights |= {"norm.weight": 1 + drawn(WIDTH), "norm.bias": drawn(WIDTH)}
    return weights | {"to_out.weight": drawn(7, WIDTH), "to_out.bias": drawn(7)}


def normed(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    centred = x - x.mean(axis=-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-5) * weight + bias


def encodings(weights: Weights, values: np.ndarray) -> np.ndarray:
    """Encoded tokens of one cell (S, D) in float64, from the published formulas.

    ``phi(x) = exp(w'x - |x|^2 / 2 - max w'x) + 1e-4`` with x scaled by d^(-1/4), the maximum over the features of a
    query and over all keys; attention ``phi(q) (phi(K)' V) / phi(q) sum phi(k)``; blocks ``x + f(norm(x))``.
    """
    w = {name: array.double().numpy() for name, array in weights.items()}
    gelu = np.vectorize(lambda x: 0.5 * x * (1.0 + math.erf(x / math.sqrt(2.0))))
    x = w["token_emb.weight"][values] + w["pos_emb.emb.weight"][: len(values)]
    for number in range(DEPTH):
        layer = f"performer.net.layers.{number}"
        part = normed(x, w[f"{layer}.0.norm.weight"], w[f"{layer}.0.norm.bias"])
        q, k, v = (
            part @ w[f"{layer}.0.fn.to_{one}.weight"].T + w.get(f"{layer}.0.fn.to_{one}.bias", 0.0) for one in "qkv"
        )
        projection = w[f"{layer}.0.fn.fast_attention.projection_matrix"]
        dashes, norms, heads = {}, {}, [slice(h * HEAD_WIDTH, (h + 1) * HEAD_WIDTH) for h in range(HEADS)]
        for name, all_heads in (("q", q), ("k", k)):
            scaled = np.stack([all_heads[:, head] for head in heads]) * HEAD_WIDTH**-0.25
            dashes[name], norms[name] = scaled @ projection.T, (scaled**2).sum(axis=-1, keepdims=True) / 2
        phi_q = np.exp(dashes["q"] - norms["q"] - dashes["q"].max(axis=-1, keepdims=True)) + 1e-4
        phi_k = np.exp(dashes["k"] - norms["k"] - dashes["k"].max()) + 1e-4
        mixed = []
        for head, one, other in zip(heads, phi_q, phi_k, strict=True):
            attention = one @ other.T
            mixed.append(attention @ v[:, head] / attention.sum(axis=1, keepdims=True))
        x = x + np.concatenate(mixed, axis=1) @ w[f"{layer}.0.fn.to_out.weight"].T + w[f"{layer}.0.fn.to_out.bias"]
        part = normed(x, w[f"{layer}.1.norm.weight"], w[f"{layer}.1.norm.bias"])
        part = gelu(part @ w[f"{layer}.1.fn.fn.w1.weight"].T + w[f"{layer}.1.fn.fn.w1.bias"])
        x = x + part @ w[f"{layer}.1.fn.fn.w2.weight"].T + w[f"{layer}.1.fn.fn.w2.bias"]
    return normed(x, w["norm.weight"], w["norm.bias"])


def written(folder: Path, value: Any) -> Path:
    path = folder / "checkpoint.pth"
    torch.save(value, path)
    return path


def with_biases(weights: Weights) -> Weights:
    random = torch.Generator().manual_seed(5)
    names = [f"performer.net.layers.{n}.0.fn.to_{one}.bias" for n in range(DEPTH) for one in "qkv"]
    return weights | {name: torch.randn(HEADS * HEAD_WIDTH, generator=random) for name in names}


def cells(seed: int = 3, n_cells: int = 5) -> csr_matrix:
    """Cells deep enough that a single count falls into bin 0, with zeros."""
    rng = np.random.default_rng(seed)
    return csr_matrix(rng.poisson(rng.gamma(0.3, 900.0, (n_cells, N_GENES))).astype(np.float32))


@pytest.mark.parametrize(
    "weights", [checkpoint(), checkpoint(loud=6.0), with_biases(checkpoint(2))], ids=["", "loud", "bias"]
)
@pytest.mark.parametrize("wrapped", [lambda w: {"model_state_dict": w, "epoch": 3, "losses": 0.5}, dict])
def test_states_are_those_of_the_published_formulas(
    weights: Weights, wrapped: Callable[[Weights], Any], tmp_path: Path
) -> None:
    prefixed = {f"module.{name}": array for name, array in weights.items()} if wrapped is dict else weights
    model = import_scbert(written(tmp_path, wrapped(prefixed)), genes(), species="human", zeros=True)
    counts = cells()
    tokens = model.tokenizer.tokenize(View.whole(counts))
    dense = counts.toarray()
    bins = np.clip(np.floor(np.log2(1 + 1e4 * dense / dense.sum(axis=1, keepdims=True))), 0, 5).astype(int)
    assert ((dense > 0) & (bins == 0)).any()
    with torch.inference_mode():
        states, mask = model.backbone.states(tokens)
        found = model.backbone.final_norm(states)
    assert mask is not None
    assert mask.all()
    for cell, values in enumerate(bins):
        expected = encodings(weights, np.append(values, 0))
        np.testing.assert_allclose(found[cell].numpy(), expected, atol=1e-4)


def test_a_checkpoint_of_performer_pytorch_gives_what_that_package_gives() -> None:
    """Weights, optimiser and all as it wrote them, one cell at a time; made by `runs/make_scbert_checkpoint.py`."""
    folder = Path(__file__).parent
    with np.load(folder / "scbert_expected.npz") as expected:
        genes, counts, encodings = expected["genes"], expected["counts"], expected["encodings"]
    model = import_scbert(folder / "scbert_checkpoint.pth", genes.tolist(), zeros=True)
    assert len(model.vocabulary) == len(genes)
    with torch.inference_mode():
        tokens = model.tokenizer.tokenize(View.whole(csr_matrix(counts.astype(np.float32))))
        states, _ = model.backbone.states(tokens)
        found = model.backbone.final_norm(states).numpy()
    assert np.abs(encodings).max() > 1
    np.testing.assert_allclose(found, encodings, atol=1e-5)


def test_one_gene_a_position_means_no_extra_token(tmp_path: Path) -> None:
    weights = checkpoint()
    weights["pos_emb.weight"] = weights.pop("pos_emb.emb.weight")[:-1]
    model = import_scbert(written(tmp_path, weights), genes(), zeros=True)
    assert "extra_token" not in model.backbone.settings
    tokens = model.tokenizer.tokenize(View.whole(cells()))
    assert model.backbone.states(tokens)[0].shape[1] == N_GENES
    values = tokens.values[0].numpy().astype(int)
    with torch.inference_mode():
        found = model.backbone.final_norm(model.backbone.states(tokens)[0])[0].numpy()
    reference = weights | {"pos_emb.emb.weight": weights["pos_emb.weight"]}
    np.testing.assert_allclose(found, encodings(reference, values), atol=1e-4)


def test_a_model_that_is_saved_embeds_and_trains(tmp_path: Path) -> None:
    imported = import_scbert(written(tmp_path, checkpoint()), genes())
    model = load(save(imported, tmp_path / "model"))
    assert model.fingerprint == imported.fingerprint
    study = synthetic_cells(60, n_genes=N_GENES, n_types=2, seed=1)
    assert embed(model, study).shape == (60, WIDTH)
    settings = ModelSettings(training=TrainingSettings(samples=64, batch_size=16, evaluations=1), finetune="last")
    trained = train(study, base=model, settings=settings, shown=False)
    assert trained.types.names == ("alpha", "beta")
    assert trained.backbone.settings == model.backbone.settings
    old, new = model.backbone.state_dict(), trained.backbone.state_dict()
    assert torch.equal(new["blocks.0.attention.projection"], old["blocks.0.attention.projection"])
    assert not torch.equal(new["blocks.1.feed_forward.up.weight"], old["blocks.1.feed_forward.up.weight"])


def test_a_cell_depends_on_no_other_cell_of_the_batch(tmp_path: Path) -> None:
    """Invariant 1; in the published code the largest key is sought in the whole batch."""
    model = import_scbert(written(tmp_path, checkpoint(loud=6.0)), genes())
    counts = cells(n_cells=6)
    with torch.inference_mode():
        found = model.backbone(model.tokenizer.tokenize(View.whole(counts)))
        alone = model.backbone(model.tokenizer.tokenize(View.whole(counts[[4]])))
    torch.testing.assert_close(found[[4]], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("as_h5ad", [False, True])
def test_genes_come_from_a_file_in_its_order(as_h5ad: bool, tmp_path: Path) -> None:
    names = genes()[::-1]
    path = tmp_path / ("genes.h5ad" if as_h5ad else "genes.txt")
    if as_h5ad:
        study = synthetic_cells(5, n_genes=N_GENES, n_types=1, n_donors=1)[:, names].copy()
        study.X = study.X.toarray() - 3.7  # whatever is in it, only its genes are asked for
        study.write_h5ad(path)
    else:
        path.write_text("\n".join(names) + "\n")
    checkpoint_path = written(tmp_path, checkpoint())
    model = import_scbert(checkpoint_path, path)
    assert model.vocabulary.names == import_scbert(checkpoint_path, names).vocabulary.names
    back = import_scbert(checkpoint_path, genes())
    place = [back.vocabulary.code(name) for name in model.vocabulary.names]
    assert place == list(range(N_GENES))[::-1]


def test_two_names_of_one_gene_leave_one_row(tmp_path: Path) -> None:
    names = genes()
    names[3] = f"{names[9]}-1"  # as var_names_make_unique writes it
    model = import_scbert(written(tmp_path, checkpoint()), names)
    assert len(model.vocabulary) == N_GENES - 1
    table = checkpoint()["pos_emb.emb.weight"].float()
    torch.testing.assert_close(model.backbone.gene_embedding.weight, table[[*range(3), *range(4, N_GENES)]])
    assert any(names[3] in note for note in model.ledger.stages[0].facts["notes"])


@pytest.mark.parametrize("number", [N_GENES - 1, N_GENES + 2])
def test_a_wrong_number_of_genes_is_told_with_the_right_one(number: int, tmp_path: Path) -> None:
    names = [*genes(), "INS", "GCG"][:number]
    with pytest.raises(GenesError, match=f"{number} genes were given.* {N_GENES} genes and the token"):
        import_scbert(written(tmp_path, checkpoint()), names)


def test_names_that_are_no_genes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(GenesError, match="0% of the 60 names"):
        import_scbert(written(tmp_path, checkpoint()), [f"gene {n}" for n in range(N_GENES)])


class Runs:
    """Would write a file if it were unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_a_file_that_needs_more_than_tensors_is_refused_and_runs_nothing(tmp_path: Path) -> None:
    """Nothing in a checkpoint is executed; CANAL's hold a bank of cells beside the weights."""
    mark = tmp_path / "ran"
    with pytest.raises(ModelError, match="holds more than weights") as caught:
        import_scbert(written(tmp_path, {"model_state_dict": checkpoint(), "bank": Runs(mark)}), genes())
    assert not mark.exists()
    assert "weights.pth" in (caught.value.hint or "")
    with pytest.raises(ModelError, match="holds more than weights"):
        bank = {"model_state_dict": checkpoint(), "annotation": np.array(["a", "b"], dtype=object)}
        import_scbert(written(tmp_path, bank), genes())


def changed(**changes: Any) -> Weights:
    """The checkpoint with weights changed (tensor), added or taken out (None); `_` stands for a dot in `0_g`."""
    weights = checkpoint()
    for name, value in changes.items():
        if value is None:
            weights.pop(name)
        else:
            weights[name] = value
    return weights


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"performer.net.layers.0.0.fn.local_attn.rel_pos": torch.ones(3)}, "no place for"),
        ({"performer.net.layers.0.0.g": torch.ones(1)}, "no place for"),
        ({"layer_pos_emb.emb": torch.ones(3, 4)}, "layer_pos_emb.emb"),
        ({"performer.net.layers.0.1.fn.fn.w1.weight": torch.ones(8 * WIDTH, WIDTH)}, "another kind"),
        ({"token_emb.weight": torch.ones(9, WIDTH)}, "has 9 values"),
        ({"pos_emb.emb.weight": None}, "pos_emb.emb.weight"),
        ({"norm.weight": torch.ones(WIDTH + 1)}, "do not fit together"),
        ({"performer.net.layers.1.0.fn.to_v.weight": None}, "to_v"),
    ],
)
def test_another_network_is_refused_by_name(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=message):
        import_scbert(written(tmp_path, changed(**changes)), genes())


def test_reversible_blocks_and_other_files_are_refused(tmp_path: Path) -> None:
    weights = {name.replace("net.layers.0.0", "net.blocks.0.f.net"): array for name, array in checkpoint().items()}
    weights = {name.replace("net.layers.1.0", "net.blocks.1.f.net"): array for name, array in weights.items()}
    with pytest.raises(ModelError, match="no blocks"):
        import_scbert(written(tmp_path, weights), genes())
    with pytest.raises(ModelError, match="no weights"):
        import_scbert(written(tmp_path, [1, 2]), genes())
    (tmp_path / "text.pth").write_text("not a checkpoint")
    with pytest.raises(ModelError, match="cannot be read as a checkpoint"):
        import_scbert(tmp_path / "text.pth", genes())
    with pytest.raises(ModelError, match="there is no checkpoint"):
        import_scbert(tmp_path / "nowhere.pth", genes())


def test_a_classifier_is_left_out_and_told(tmp_path: Path) -> None:
    weights = {name: array for name, array in checkpoint().items() if not name.startswith("to_out")}
    weights |= {"to_out.conv1.weight": torch.ones(1, 1, 1, WIDTH), "to_out.fc3.weight": torch.ones(4, 8)}
    model = import_scbert(written(tmp_path, weights), genes())
    assert len(model.types) == 0
    facts = model.ledger.stages[0].facts
    assert facts["verb"] == "import"
    assert any("classifier" in note for note in facts["notes"])


def test_the_command_writes_a_model_that_train_takes(run: Run, tmp_path: Path) -> None:
    path = written(tmp_path, checkpoint())
    (tmp_path / "genes.txt").write_text("\n".join(genes()))
    words = (
        "import",
        "scbert",
        path,
        "--genes",
        tmp_path / "genes.txt",
        "--output",
        tmp_path / "model",
    )
    code, out, err = run(*words)
    assert code == 0, err
    assert "60 genes" in out
    assert "the token which is added to every cell" in err
    synthetic_cells(60, n_genes=N_GENES, n_types=2, seed=1).write_h5ad(tmp_path / "cells.h5ad")
    code, out, err = run(
        "train", tmp_path / "cells.h5ad", "--labels", "cell_type", "--from", tmp_path / "model", "--samples", "64",
        "--output", tmp_path / "trained",
    )  # fmt: skip
    assert code == 0, err
    assert run("log", tmp_path / "model")[1].startswith("stage 1: import")
    assert "scbert" in (tmp_path / "model" / "MODEL_CARD.md").read_text()
    code, _, err = run("import", "scbert", path, "--output", tmp_path / "other")
    assert code == 2
    assert "--genes" in err
    assert not (tmp_path / "other").exists()
    assert ad.read_h5ad(tmp_path / "cells.h5ad").n_obs == 60

"""Write tests/old_models: a small model of every format version, made by the code of the commit that wrote it.

    python runs/make_old_models.py cells                   # the cells that all of them are trained on and asked about
    python runs/make_old_models.py model NAME              # with the src of the commit in PYTHONPATH

Of each commit a worktree is needed::

    git worktree add ../old COMMIT
    PYTHONPATH=../old/src python runs/make_old_models.py model v1

A model is never made again: a file that today's code writes says nothing about old ones. New versions are added.
"""

from __future__ import annotations

import inspect
import json
import shutil
import sys
import tempfile
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np

FOLDER = Path(__file__).resolve().parents[1] / "tests" / "old_models"
COMMITS = {
    "v1": "b499429",  # the first with a command line; before it the parts of `latent` changed from commit to commit
    "v1_stages": "c84ee15",  # an update, sealed cells, an earlier stage kept
    "v2": "53566d3",  # an update that leaves a sketch
    "v3": "67ad851",  # a share of the linear member of its own
    "v3_scaled": "67ad851",  # a linear member with a centre and a ceiling, as imported models have it
    "v4": "d968aa6",  # profiles, an update that leaves a sketch
    "v5": "7beebe0",  # what label sets are calibrated on
}
N_GENES, N_CELLS, N_QUERY = 100, 90, 24


def make_cells() -> None:
    """Cells of packaged studies over few genes: two stages to learn from, and cells of a third study to ask about."""
    from evercell.examples import load_example

    first, second, query = (load_example(one) for one in ("baron_stage1", "fasolino_stage2", "tritschler_unseen"))
    common = [gene for gene in first.var_names if gene in second.var_names and gene in query.var_names]
    log = np.log1p(first[:, common].X.toarray())
    genes = [common[j] for j in np.sort(np.argsort(-log.var(axis=0))[:N_GENES])]
    rng = np.random.default_rng(0)
    FOLDER.mkdir(exist_ok=True)
    for name, cells, number in (("first", first, N_CELLS), ("second", second, N_CELLS), ("query", query, N_QUERY)):
        types = cells.obs["cell_type"].astype(str).to_numpy()
        kept = ["alpha", "beta", "delta"] + (["acinar"] if name != "first" else [])
        depth = np.asarray(cells[:, genes].X.sum(axis=1)).ravel()
        rows = np.flatnonzero(np.isin(types, kept) & (depth > 200))
        rows = np.sort(
            np.concatenate([rng.permutation(rows[types[rows] == one])[: number // len(kept)] for one in kept])
        )
        small = ad.AnnData(cells[rows, genes].X.astype(np.float32), obs=cells.obs.iloc[rows][["cell_type"]].copy())
        small.obs["cell_type"] = small.obs["cell_type"].astype(str)
        small.var_names = genes
        small.write_h5ad(FOLDER / f"{name}.h5ad", compression="gzip")
        print(name, small.shape, small.obs["cell_type"].value_counts().to_dict())


def known(kind: type, **wanted: Any) -> dict[str, Any]:
    """Those of the settings that the class has: some came later."""
    return {name: value for name, value in wanted.items() if name in {one.name for one in fields(kind)}}


def trained(cells: ad.AnnData, **more: Any) -> Any:
    from evercell.backbones import BACKBONES
    from evercell.finetuning import ModelSettings, train
    from evercell.training import TrainingSettings

    takes = inspect.signature(BACKBONES["latent"]).parameters
    sizes = {"members": 1, "member_width": 16, "width": 16, "n_latents": 2, "depth": 1, "n_heads": 2}
    settings = ModelSettings(
        backbone_settings={name: value for name, value in sizes.items() if name in takes},
        training=TrainingSettings(samples=1920, batch_size=32, learning_rate=5e-3, evaluations=3),
        bank=16,
        **known(ModelSettings, sealed=12, **more),
    )
    return train(cells, settings=settings, names=["first"], shown=False)


def updated(model: Any, cells: ad.AnnData, **more: Any) -> Any:
    from evercell.training import TrainingSettings
    from evercell.updating import UpdateSettings
    from evercell.updating.update import update

    training = TrainingSettings(samples=960, batch_size=32, learning_rate=3e-3, evaluations=2)
    settings = replace(UpdateSettings(), training=training, refit=False, **known(UpdateSettings, sealed=12))
    return update(
        model, cells, settings=settings, mapping={"acinar": "acinar"}, bank_size=20, names=["second"], shown=False,
        force=True, **more,
    )  # fmt: skip


def scaled(model: Any, cells: ad.AnnData) -> Any:
    """A model whose linear member is fitted on expression that is cut off and centred."""
    from sklearn.linear_model import LogisticRegression

    from evercell.linear import LinearModel

    counts = cells[:, list(model.vocabulary.symbols)].X.toarray().astype(np.float64)
    x = np.log1p(1e4 * counts / counts.sum(axis=1, keepdims=True))
    centre, ceiling = x.mean(axis=0), x.mean(axis=0) + 2 * x.std(axis=0)
    fit = LogisticRegression(C=0.01).fit(np.minimum(x, ceiling) - centre, model.types.codes(cells.obs["cell_type"]))
    arrays = [one.astype(np.float32) for one in (fit.coef_.T, fit.intercept_, centre, ceiling)]
    return replace(model, linear=LinearModel(*map(np.ascontiguousarray, arrays)), linear_share=0.75)


def make_model(name: str) -> None:
    """The model of a version, and what the code that made it says of the cells of the query."""
    from safetensors.numpy import save as as_bytes

    import evercell
    from evercell.annotation import annotate
    from evercell.checkpoint import load, save

    first, second, query = (ad.read_h5ad(FOLDER / f"{one}.h5ad") for one in ("first", "second", "query"))
    target = FOLDER / name
    shutil.rmtree(target, ignore_errors=True)
    stage = {"v1_stages": {}, "v2": {"bank": "sketch"}, "v4": {"bank": "sketch"}}
    more = {"linear_share": 1 / 3} if name in ("v3", "v4", "v5") else {}
    model = trained(first, **more)
    if name == "v3_scaled":
        model = scaled(model, first)
    with tempfile.TemporaryDirectory() as folder:
        if name in stage:
            before = save(model, Path(folder) / "before", card="# First stage\n")
            save(
                updated(model, second, **stage[name]),
                target,
                card="# A model\n",
                previous=before if name == "v1_stages" else None,
            )
        else:
            save(model, target, card="# A model\n")
    model = load(target)
    result = annotate(model, query, reject="off")
    rejected = annotate(model, query)
    arrays = {
        "probabilities": result.probabilities,
        "representation": result.representation,
        "unknown_score": rejected.obs["evercell_unknown_score"].to_numpy().astype(np.float32),
    }
    (FOLDER / f"{name}.safetensors").write_bytes(as_bytes({k: np.ascontiguousarray(v) for k, v in arrays.items()}))
    told = {
        "commit": COMMITS[name],
        "evercell": evercell.__version__,
        "fingerprint": model.fingerprint,
        "types": list(model.types.names),
        "stages": len(model.ledger),
        "labels": result.obs["evercell"].astype(str).tolist(),
        "rejected": rejected.obs["evercell"].astype(str).tolist(),
    }
    (FOLDER / f"{name}.json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    size = sum(one.stat().st_size for one in target.rglob("*") if one.is_file())
    right = np.mean(np.array(told["labels"]) == query.obs["cell_type"].to_numpy())
    print(name, evercell.__file__, json.loads((target / "annotator.json").read_text())["format"], size, f"{right:.2f}")


if __name__ == "__main__":
    if sys.argv[1] == "cells":
        make_cells()
    else:
        make_model(sys.argv[2])

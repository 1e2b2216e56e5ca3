"""`scanvi`: scANVI with mapping of the query (scArches), from scvi-tools."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from evercell.comparison.base import Method, Prediction, Query, Reference, best, log_normalise, quiet

LOGGERS = ("scvi", "lightning.pytorch", "lightning.fabric.utilities.seed")


class ScanviMethod(Method):
    """scVI, then scANVI, then scArches mapping of the query without labels; 2,000 variable genes of the reference.

    Network settings are those that the authors recommend for query mapping. Training is shorter than by default: up to
    1,200, 200 and 400 minibatches for the three steps, which is 70, 12 and 60 epochs for 2,000 reference cells. It
    alone looks at all cells of the query together. Confidence is its probability.
    """

    needs = ("scvi-tools",)
    deterministic = False

    def annotate(self, reference: Reference, query: Query, seed: int) -> Prediction:
        """The seed is of all three trainings."""
        with quiet():
            import scvi

        with quiet(*LOGGERS), _seeded(scvi, seed):
            return _annotate(scvi, reference, query)


def _annotate(scvi: Any, reference: Reference, query: Query) -> Prediction:
    import pandas as pd
    import scanpy as sc
    from anndata import AnnData

    options: dict[str, Any] = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
    options |= {"logger": False, "enable_checkpointing": False, "train_size": 1.0}
    unlabelled = "unlabelled"
    while unlabelled in reference.labels:
        unlabelled += "_"

    start = time.perf_counter()
    obs = pd.DataFrame({"label": reference.labels, "batch": reference.batches})
    obs.index = obs.index.astype(str)
    cells = AnnData(reference.counts, obs=obs, var=pd.DataFrame(index=reference.genes))
    cells.layers["logged"] = log_normalise(reference.counts)
    sc.pp.highly_variable_genes(cells, layer="logged", n_top_genes=min(2000, len(reference.genes)))
    variable = cells.var["highly_variable"].to_numpy()
    cells = AnnData(cells.X[:, variable].copy(), obs=obs, var=cells.var.loc[variable, []])
    cells = cells[np.asarray(cells.X.sum(axis=1)).ravel() > 0].copy()
    scvi.model.SCVI.setup_anndata(cells, batch_key="batch", labels_key="label")
    network = {"use_layer_norm": "both", "use_batch_norm": "none", "encode_covariates": True, "dropout_rate": 0.2}
    base = scvi.model.SCVI(cells, n_layers=2, n_latent=30, **network)
    base.train(max_epochs=_epochs(cells.n_obs, 150, 1200), **options)
    model = scvi.model.SCANVI.from_scvi_model(base, unlabeled_category=unlabelled)
    model.train(max_epochs=_epochs(cells.n_obs, 20, 200), n_samples_per_label=100, **options)
    trained = time.perf_counter()

    values = query.counts[:, variable].copy()
    values.data = np.rint(values.data)  # some deposited counts are corrected for saturation
    empty = np.asarray(values.sum(axis=1)).ravel() == 0
    # A cell without a count in the variable genes cannot be mapped: it gets the commonest type at no confidence.
    labels = np.full(len(empty), obs["label"].mode()[0], dtype=object)
    confidence = np.zeros(len(empty))
    if not empty.all():
        query_obs = pd.DataFrame({"label": unlabelled, "batch": query.batches})
        query_obs.index = query_obs.index.astype(str)
        asked = AnnData(values[~empty], obs=query_obs[~empty], var=cells.var.copy())
        mapped = scvi.model.SCANVI.load_query_data(asked, model)
        mapped.train(max_epochs=_epochs(asked.n_obs, 60, 400), plan_kwargs={"weight_decay": 0.0}, **options)
        soft = mapped.predict(soft=True)
        labels[~empty], sure = best(soft.to_numpy(), soft.columns.to_numpy())
        confidence[~empty] = np.minimum(sure, 1.0)  # single precision goes a little beyond
    return Prediction(labels, confidence, trained - start, time.perf_counter() - trained)


def _epochs(n_cells: int, most: int, steps: int) -> int:
    """Epochs from 5 up to `most` within `steps` minibatches of 128 cells, so that a task stays affordable on a CPU."""
    return int(np.clip(steps // max(1, n_cells // 128), 5, most))


@contextmanager
def _seeded(scvi: Any, seed: int) -> Iterator[None]:
    """Seed everything that scvi-tools draws from, and put all of it back: random states, flags and environment."""
    import torch

    settings, flags = scvi.settings, torch.backends.cudnn
    before = settings.seed, settings.verbosity, flags.deterministic, flags.benchmark
    environment = os.environ.copy()
    states = random.getstate(), np.random.get_state()  # noqa: NPY002 (scvi-tools draws from it)
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=devices):
        try:
            settings.seed, settings.verbosity = seed, "ERROR"
            yield
        finally:
            settings.seed, settings.verbosity = before[:2]
            flags.deterministic, flags.benchmark = before[2:]
            random.setstate(states[0])
            np.random.set_state(states[1])  # noqa: NPY002
            for name in os.environ.keys() - environment.keys():
                del os.environ[name]
            os.environ.update(environment)

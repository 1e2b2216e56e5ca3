"""Other ways to annotate a test study from labelled studies, behind one signature.

Each method gets labelled training studies (``obs["label"]``, ``obs["group"]``) and the test study without its labels
and returns a `Prediction`. All work on the genes that every study of the task has, which is what joins several
studies with different gene sets, and normalise over those genes. None sees a test label; `scanvi` alone looks at all
test cells together.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
from scipy import sparse
from tasks import shared_genes


@dataclass(frozen=True)
class Prediction:
    """What a method says of the test cells, and what it cost.

    Parameters
    ----------
    labels
        Best label of every cell (n_cells,), whether or not the method rejects the cell.
    confidence
        Confidence in the label (n_cells,), higher is surer.
    seconds_train, seconds_annotate
        Wall-clock seconds, imports left out.
    rejected
        Mask of the cells that the method calls unknown, or None where it does not reject.
    unknown_score
        Higher where a cell is less likely of a known type; ``1 - confidence`` where None.
    """

    labels: np.ndarray
    confidence: np.ndarray
    seconds_train: float
    seconds_annotate: float
    rejected: np.ndarray | None = None
    unknown_score: np.ndarray | None = None


Method = Callable[[Sequence[ad.AnnData], ad.AnnData, int], Prediction]


def log_normalise(counts: sparse.csr_matrix) -> sparse.csr_matrix:
    """log(1 + counts per 10,000) over the given genes; a cell without counts stays zero."""
    totals = np.asarray(counts.sum(axis=1)).ravel()
    logged = sparse.csr_matrix(sparse.diags(1e4 / np.maximum(totals, 1.0)) @ counts, dtype=np.float32)
    logged.data = np.log1p(logged.data)
    return logged


def _labels(train: Sequence[ad.AnnData]) -> np.ndarray:
    return np.concatenate([cells.obs["label"].astype(str).to_numpy() for cells in train])


def _best(probabilities: np.ndarray, types: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.asarray(types)[probabilities.argmax(axis=1)], probabilities.max(axis=1)


def linear(train: Sequence[ad.AnnData], test: ad.AnnData, seed: int = 0) -> Prediction:
    """Multinomial logistic regression on log counts over shared genes: the plainest thing. `seed` has no effect."""
    from sklearn.linear_model import LogisticRegression

    start = time.perf_counter()
    train_counts, test_counts, _ = shared_genes(train, test)
    model = LogisticRegression(C=1.0, max_iter=300).fit(log_normalise(train_counts), _labels(train))
    trained = time.perf_counter()
    labels, confidence = _best(model.predict_proba(log_normalise(test_counts)), model.classes_)
    return Prediction(labels, confidence, trained - start, time.perf_counter() - trained)


def knn_pca(train: Sequence[ad.AnnData], test: ad.AnnData, seed: int = 0) -> Prediction:
    """Vote of 15 neighbours in 50 principal components of 2,000 variable genes, all fitted on the training cells."""
    import scanpy as sc
    from sklearn.decomposition import PCA
    from sklearn.neighbors import KNeighborsClassifier

    start = time.perf_counter()
    train_counts, test_counts, genes = shared_genes(train, test)
    reference = ad.AnnData(log_normalise(train_counts), var=pd.DataFrame(index=genes.astype(str)))
    sc.pp.highly_variable_genes(reference, n_top_genes=min(2000, len(genes)))
    variable = reference.var["highly_variable"].to_numpy()
    train_values = reference.X[:, variable].toarray()
    mean, deviation = train_values.mean(axis=0), train_values.std(axis=0)
    deviation[deviation == 0] = 1.0

    def scaled(values: np.ndarray) -> np.ndarray:
        return np.clip((values - mean) / deviation, -10, 10)  # scanpy's usual clip, against single outliers

    components = PCA(min(50, *(size - 1 for size in train_values.shape)), svd_solver="randomized", random_state=seed)
    model = KNeighborsClassifier(15).fit(components.fit_transform(scaled(train_values)), _labels(train))
    trained = time.perf_counter()
    values = log_normalise(test_counts)[:, variable].toarray()
    labels, confidence = _best(model.predict_proba(components.transform(scaled(values))), model.classes_)
    return Prediction(labels, confidence, trained - start, time.perf_counter() - trained)


def celltypist(train: Sequence[ad.AnnData], test: ad.AnnData, seed: int = 0) -> Prediction:
    """CellTypist with its defaults: `train` without feature selection, `annotate` by best match, no majority vote."""
    import celltypist as package

    package.logger.set_level(logging.ERROR)
    start = time.perf_counter()
    train_counts, test_counts, genes = shared_genes(train, test)
    names = pd.DataFrame(index=genes.astype(str))
    reference = ad.AnnData(log_normalise(train_counts), obs=pd.DataFrame({"label": _labels(train)}), var=names)
    reference.obs_names = reference.obs_names.astype(str)
    model = package.train(reference, labels="label", n_jobs=1, check_expression=False)
    trained = time.perf_counter()
    query = ad.AnnData(log_normalise(test_counts), obs=pd.DataFrame(index=test.obs_names), var=names)
    result = package.annotate(query, model=model, majority_voting=False)
    labels = result.predicted_labels["predicted_labels"].astype(str).to_numpy()
    confidence = result.probability_matrix.max(axis=1).to_numpy()
    return Prediction(labels, confidence, trained - start, time.perf_counter() - trained)


def _batches(cells: ad.AnnData) -> np.ndarray:
    """Donor or batch where there are at most ten of them, else the study: each batch costs scVI parameters."""
    groups = cells.obs["group"].astype(str)
    return (groups if groups.nunique() <= 10 else cells.obs["study"].astype(str)).to_numpy()


def _epochs(n_cells: int, most: int, steps: int) -> int:
    """Epochs from 5 up to `most` within `steps` minibatches of 128 cells, so that a task stays affordable on a CPU."""
    return int(np.clip(steps // max(1, n_cells // 128), 5, most))


def scanvi(train: Sequence[ad.AnnData], test: ad.AnnData, seed: int = 0) -> Prediction:
    """scVI, then scANVI, then scArches mapping of the query without labels; 2,000 variable genes of the training cells.

    Network settings are those that the authors recommend for query mapping. Training is shorter than by default: up to
    1,200, 200 and 400 minibatches for the three steps, which is 70, 12 and 60 epochs for 2,000 training cells.
    """
    import scanpy as sc
    import scvi

    scvi.settings.seed = seed
    scvi.settings.verbosity = logging.ERROR
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    quiet: dict[str, Any] = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
    quiet |= {"logger": False, "enable_checkpointing": False}

    start = time.perf_counter()
    train_counts, test_counts, genes = shared_genes(train, test)
    obs = pd.DataFrame({"label": _labels(train), "batch": np.concatenate([_batches(cells) for cells in train])})
    obs.index = obs.index.astype(str)
    reference = ad.AnnData(train_counts, obs=obs, var=pd.DataFrame(index=genes.astype(str)))
    reference.layers["logged"] = log_normalise(train_counts)
    sc.pp.highly_variable_genes(reference, layer="logged", n_top_genes=min(2000, len(genes)))
    variable = reference.var["highly_variable"].to_numpy()
    reference = ad.AnnData(reference.X[:, variable].copy(), obs=obs, var=reference.var.loc[variable, []])
    reference = reference[np.asarray(reference.X.sum(axis=1)).ravel() > 0].copy()
    scvi.model.SCVI.setup_anndata(reference, batch_key="batch", labels_key="label")
    base = scvi.model.SCVI(
        reference,
        n_layers=2,
        n_latent=30,
        use_layer_norm="both",
        use_batch_norm="none",
        encode_covariates=True,
        dropout_rate=0.2,
    )
    base.train(max_epochs=_epochs(reference.n_obs, 150, 1200), train_size=1.0, **quiet)
    model = scvi.model.SCANVI.from_scvi_model(base, unlabeled_category="unlabelled")
    model.train(max_epochs=_epochs(reference.n_obs, 20, 200), n_samples_per_label=100, train_size=1.0, **quiet)
    trained = time.perf_counter()

    values = test_counts[:, variable].copy()
    values.data = np.rint(values.data)  # some deposited counts are corrected for saturation
    empty = np.asarray(values.sum(axis=1)).ravel() == 0
    query_obs = pd.DataFrame({"label": "unlabelled", "batch": _batches(test)}, index=test.obs_names)
    query = ad.AnnData(values[~empty], obs=query_obs[~empty], var=reference.var.copy())
    mapped = scvi.model.SCANVI.load_query_data(query, model)
    mapped.train(max_epochs=_epochs(query.n_obs, 60, 400), plan_kwargs={"weight_decay": 0.0}, train_size=1.0, **quiet)
    soft = mapped.predict(soft=True)
    # A cell without a count in the variable genes cannot be mapped: it gets the commonest type at no confidence.
    labels = np.full(test.n_obs, obs["label"].mode()[0], dtype=object)
    confidence = np.zeros(test.n_obs)
    labels[~empty], confidence[~empty] = _best(soft.to_numpy(), soft.columns.to_numpy())
    return Prediction(labels, confidence, trained - start, time.perf_counter() - trained)


BASELINES: dict[str, Method] = {"linear": linear, "knn": knn_pca, "celltypist": celltypist, "scanvi": scanvi}

# Methods whose answer does not depend on the seed are run once.
DETERMINISTIC = frozenset({"linear", "knn", "celltypist"})

"""Other ways to annotate a test study from labelled studies: the methods of `evercell.comparison` on studies.

Each method gets labelled training studies (``obs["label"]``, ``obs["group"]``) and the test study without its labels
and returns a `Prediction`. All work on the genes that every study of the task has, which is what joins several
studies with different gene sets, and normalise over those genes. None sees a test label; `scanvi` alone looks at all
test cells together.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import anndata as ad
import numpy as np
from tasks import shared_genes

from evercell.comparison import METHODS, Prediction, Query, Reference

Method = Callable[[Sequence[ad.AnnData], ad.AnnData, int], Prediction]


def _batches(cells: ad.AnnData) -> np.ndarray:
    """Donor or batch where there are at most ten of them, else the study: each batch costs scVI parameters."""
    groups = cells.obs["group"].astype(str)
    return (groups if groups.nunique() <= 10 else cells.obs["study"].astype(str)).to_numpy()


def on_studies(name: str) -> Method:
    """The method on studies; the time to bring them to shared genes counts as training."""

    def label(train: Sequence[ad.AnnData], test: ad.AnnData, seed: int = 0) -> Prediction:
        start = time.perf_counter()
        train_counts, test_counts, genes = shared_genes(train, test)
        labels = np.concatenate([cells.obs["label"].astype(str).to_numpy() for cells in train])
        batches = np.concatenate([_batches(cells) for cells in train])
        reference, query = Reference(train_counts, labels, batches, genes), Query(test_counts, _batches(test))
        seconds = time.perf_counter() - start
        found = METHODS[name]()(reference, query, seed)
        return replace(found, seconds_train=found.seconds_train + seconds)

    return label


BASELINES: dict[str, Method] = {name: on_studies(name) for name in METHODS}

# Methods whose answer does not depend on the seed are run once.
DETERMINISTIC = frozenset(name for name in METHODS if METHODS[name].deterministic)

"""`knn`: the nearest labelled cells decide."""

from __future__ import annotations

import time

import numpy as np

from evercell.comparison.base import Method, Prediction, Query, Reference, best, log_normalise


class KnnMethod(Method):
    """Vote of 15 neighbours in 50 principal components of 2,000 variable genes, all fitted on the reference.

    Confidence is the share of the neighbours.
    """

    needs = ("scikit-learn", "scanpy")

    def annotate(self, reference: Reference, query: Query, seed: int) -> Prediction:
        """The seed has no effect: the components are drawn with one of their own."""
        import pandas as pd
        import scanpy as sc
        from anndata import AnnData
        from sklearn.decomposition import PCA
        from sklearn.neighbors import KNeighborsClassifier

        start = time.perf_counter()
        cells = AnnData(log_normalise(reference.counts), var=pd.DataFrame(index=reference.genes))
        sc.pp.highly_variable_genes(cells, n_top_genes=min(2000, len(reference.genes)))
        variable = cells.var["highly_variable"].to_numpy()
        values = cells.X[:, variable].toarray()
        mean, deviation = values.mean(axis=0), values.std(axis=0)
        deviation[deviation == 0] = 1.0

        def scaled(values: np.ndarray) -> np.ndarray:
            return np.clip((values - mean) / deviation, -10, 10)  # scanpy's usual clip, against single outliers

        components = PCA(min(50, *(size - 1 for size in values.shape)), svd_solver="randomized", random_state=0)
        model = KNeighborsClassifier(min(15, len(values)))
        model.fit(components.fit_transform(scaled(values)), reference.labels)
        trained = time.perf_counter()
        values = log_normalise(query.counts)[:, variable].toarray()
        labels, confidence = best(model.predict_proba(components.transform(scaled(values))), model.classes_)
        return Prediction(labels, confidence, trained - start, time.perf_counter() - trained)

"""`celltypist`: CellTypist as its authors set it."""

from __future__ import annotations

import time

from evercell.comparison.base import Method, Prediction, Query, Reference, log_normalise, quiet


class CelltypistMethod(Method):
    """CellTypist with its defaults: `train` without feature selection, `annotate` by best match, no majority vote.

    Confidence is the probability that it gives the label.
    """

    needs = ("celltypist",)

    def annotate(self, reference: Reference, query: Query, seed: int) -> Prediction:
        """The seed has no effect."""
        import pandas as pd
        from anndata import AnnData

        with quiet():
            import celltypist as package

        with quiet("celltypist.logger"):
            start = time.perf_counter()
            genes = pd.DataFrame(index=reference.genes)
            obs = pd.DataFrame({"label": reference.labels}, index=_names(len(reference.labels)))
            cells = AnnData(log_normalise(reference.counts), obs=obs, var=genes)
            model = package.train(cells, labels="label", n_jobs=1, check_expression=False)
            trained = time.perf_counter()
            obs = pd.DataFrame(index=_names(len(query.batches)))
            asked = AnnData(log_normalise(query.counts), obs=obs, var=genes)
            result = package.annotate(asked, model=model, majority_voting=False)
            labels = result.predicted_labels["predicted_labels"].astype(str).to_numpy(dtype=object)
            confidence = result.probability_matrix.max(axis=1).to_numpy()
        return Prediction(labels, confidence, trained - start, time.perf_counter() - trained)


def _names(n_cells: int) -> list[str]:
    return [str(row) for row in range(n_cells)]

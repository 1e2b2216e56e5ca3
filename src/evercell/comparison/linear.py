"""`linear`: the plainest thing, and often as good as any."""

from __future__ import annotations

import time

from evercell.comparison.base import Method, Prediction, Query, Reference, best, log_normalise


class LinearMethod(Method):
    """Multinomial logistic regression on log counts; confidence is its probability."""

    needs = ("scikit-learn",)

    def annotate(self, reference: Reference, query: Query, seed: int) -> Prediction:
        """The seed has no effect."""
        from sklearn.linear_model import LogisticRegression

        start = time.perf_counter()
        model = LogisticRegression(C=1.0, max_iter=300).fit(log_normalise(reference.counts), reference.labels)
        trained = time.perf_counter()
        labels, confidence = best(model.predict_proba(log_normalise(query.counts)), model.classes_)
        return Prediction(labels, confidence, trained - start, time.perf_counter() - trained)

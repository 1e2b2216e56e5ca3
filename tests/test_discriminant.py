"""Closed-form head from running sums."""

from __future__ import annotations

import numpy as np
import pytest

from evercell.discriminant import GAP, SHRINKAGE, RunningSums


def cells_of(seed: int, types: list[int], n_cells: int = 60) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    means = 3.0 * np.random.default_rng(99).normal(size=(6, 8))
    codes = rng.choice(types, n_cells)
    return (means[codes] + rng.normal(size=(n_cells, 8))).astype(np.float32), codes


def test_stages_in_any_order_give_the_head_of_all_cells_at_once() -> None:
    parts = [cells_of(1, [0, 1, 2]), cells_of(2, [1, 3]), cells_of(3, [0, 4, 5])]
    features, codes = np.concatenate([x for x, _ in parts]), np.concatenate([y for _, y in parts])
    weight, bias = RunningSums.of(features, codes, 6).classifier()
    for order in ([0, 1, 2], [2, 0, 1], [1, 2, 0]):
        sums = RunningSums.of(*parts[order[0]], 6)
        for place in order[1:]:
            sums = sums + RunningSums.of(*parts[place], 6)
        found = sums.classifier()
        np.testing.assert_allclose(found[0], weight, rtol=0, atol=1e-5)
        np.testing.assert_allclose(found[1], bias, rtol=0, atol=1e-5)


def test_it_is_the_discriminant_of_the_textbook() -> None:
    features, codes = cells_of(4, [0, 1, 2], 300)
    means = np.stack([features[codes == code].mean(axis=0) for code in range(3)]).astype(np.float64)
    centred = features - means[codes]
    within = centred.T @ centred / len(codes)
    within = (1 - SHRINKAGE) * within + SHRINKAGE * np.trace(within) / 8 * np.eye(8)
    distance = np.stack([np.einsum("nd,nd->n", (features - m) @ np.linalg.inv(within), features - m) for m in means])
    weight, bias = RunningSums.of(features, codes, 3).classifier()
    logits = features @ weight.T + bias
    assert (logits.argmax(axis=1) == distance.argmin(axis=0)).all()
    gaps = -0.5 * (distance - distance[0]).T
    ratio = (logits - logits[:, :1])[:, 1:] / gaps[:, 1:]
    np.testing.assert_allclose(ratio, ratio[0, 0], rtol=1e-4)  # one number scales all


def test_types_are_as_far_apart_as_a_trained_head_has_them() -> None:
    features, codes = cells_of(5, [0, 1, 2, 3], 400)
    weight, bias = RunningSums.of(50 * features, codes, 4).classifier()
    means = np.stack([50 * features[codes == code].mean(axis=0) for code in range(4)])
    logits = means @ weight.T + bias
    gaps = np.diag(logits)[:, None] - logits + np.diag(np.full(4, np.inf))
    assert np.median(gaps.min(axis=1)) == pytest.approx(GAP, rel=1e-3)


def test_a_type_without_cells_is_never_told() -> None:
    features, codes = cells_of(6, [0, 2])
    sums = RunningSums.of(features, codes, 3).widened(5)
    weight, bias = sums.classifier()
    assert np.isin((features @ weight.T + bias).argmax(axis=1), [0, 2]).all()
    again = RunningSums.stored(sums.arrays())
    assert again is not None
    np.testing.assert_array_equal(again.classifier()[0], weight)
    assert RunningSums.stored({}) is None

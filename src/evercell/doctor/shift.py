"""How far the cells of a query are from those that a model was trained on."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from evercell.cells import find_counts
from evercell.doctor.finding import Finding
from evercell.errors import EvercellError
from evercell.genes import align
from evercell.labelling import UNKNOWN
from evercell.labels import listed
from evercell.tokenizers import View

if TYPE_CHECKING:
    from anndata import AnnData

    from evercell.annotator import Annotator

LEAST_CELLS = 10  # of a type, for its mean to be worth a comparison
MOST_CELLS = 100  # of a type of the query that are looked at
FAR = 1.0  # distance of means over the spread of a type, from which on a study is far whatever others are
FARTHER = 1.5  # times the distance of the training study that is farthest from the others
RARE, MANY, TIMES = 0.03, 0.2, 10  # shares in the training data and in the query, and their ratio


def plausible(model: Annotator, labels: np.ndarray) -> list[Finding]:
    """Types that are many here and were rare in every study that the model was trained on (held-out cells tell)."""
    highest: dict[str, float] = {}
    for stage in model.ledger:
        per_type = ((stage.facts.get("metrics") or {}).get("model") or {}).get("per_type") or {}
        cells = {name: float(row["cells"]) for name, row in per_type.items() if "cells" in row}
        for name, number in cells.items():
            highest[name] = max(highest.get(name, 0.0), number / max(sum(cells.values()), 1))
    known = labels[labels != UNKNOWN]
    odd = []
    for name, share in highest.items():
        here = float(np.mean(known == name)) if len(known) else 0.0
        if here >= MANY and share <= RARE and here >= TIMES * share:
            odd.append(f"{name} ({here:.0%}, in training at most {share:.1%})")
    if not odd:
        return []
    return [
        Finding(
            "warning",
            "proportions",
            f"many cells of types that are rare in the training data: {listed(odd, 5)}",
            f"less than {TIMES} times the share that a type had in training, or less than {MANY:.0%}",
            "sorted or enriched cells, another tissue, or cells of an unknown type that are called by the nearest one",
            "check their markers (--report); choose another --model, or a stricter --reject",
        )
    ]


def shift_findings(model: Annotator, adata: AnnData, labels: np.ndarray) -> list[Finding]:
    """How far each type of the query is from the same type in the model's bank, in the spread of that type.

    The bank is seen through the genes that the query measured. What other studies of the training data have among each
    other is the measure.
    """
    if not len(model.examples):
        return []
    try:
        counts = find_counts(adata, empty_cells="keep")
        alignment = align(counts.genes, model.vocabulary)
    except EvercellError as error:
        return [Finding("info", "shift", f"not measured: {error.message}")]
    rng = np.random.default_rng(0)
    rows, codes = [], []
    for code, name in enumerate(model.types.names):
        here = np.flatnonzero(labels == name)
        if len(here) >= LEAST_CELLS:
            here = rng.choice(here, min(len(here), MOST_CELLS), replace=False)
            rows.append(here)
            codes.append(np.full(len(here), code))
    if not rows:
        return [Finding("info", "shift", f"not measured: no type has {LEAST_CELLS} cells")]
    chosen, of_type = np.concatenate(rows), np.concatenate(codes)
    order = np.argsort(chosen)
    chosen, of_type = chosen[order], of_type[order]
    blocks = [
        alignment.apply(block[chosen[(chosen >= start) & (chosen < stop)] - start])
        for start, stop, block in counts.chunks()
    ]
    query = model.represent(View.joined([View.whole(block, alignment.measured) for block in blocks]))[0]
    distances = distances_of(model, query, of_type, alignment.measured)
    if distances is None:
        return [Finding("info", "shift", "not measured: the model keeps too few cells of these types")]
    return list(_said(*distances))


def distances_of(
    model: Annotator, query: np.ndarray, codes: np.ndarray, measured: np.ndarray
) -> tuple[float, list[float]] | None:
    """Distance of a query to the bank, and of each study of the bank to its other studies.

    Parameters
    ----------
    query, codes
        Representations (N, D) and types (N,) of the query's cells.
    measured
        Genes of the model that the query measured (G,), bool.

    Returns
    -------
    float, list of float
        Medians over the types of the distance of means over the spread of the type; None where no type can be compared.
    """
    bank = model.examples
    seen = bank.counts.multiply(measured[None, :]).tocsr()
    seen.eliminate_zeros()
    points = np.zeros((len(bank), query.shape[1]), dtype=np.float32)
    for study in np.unique(bank.studies):
        rows = np.flatnonzero(bank.studies == study)
        points[rows] = model.represent(View.whole(seen[rows], measured & bank.measured[study]))[0]
    to_bank: list[float] = []
    among: dict[int, list[float]] = {}
    for code in np.unique(codes):
        own = bank.codes == code
        if own.sum() < LEAST_CELLS:
            continue
        studies = [int(one) for one in np.unique(bank.studies[own]) if (own & (bank.studies == one)).sum() >= 5]
        means = {one: points[own & (bank.studies == one)].mean(axis=0) for one in studies}
        spread = _spread([points[own & (bank.studies == one)] for one in studies] or [points[own]])
        to_bank.append(float(np.linalg.norm(query[codes == code].mean(axis=0) - points[own].mean(axis=0)) / spread))
        for one in studies if len(studies) > 1 else ():
            rest = np.mean([means[other] for other in studies if other != one], axis=0)
            among.setdefault(one, []).append(float(np.linalg.norm(means[one] - rest) / spread))
    if not to_bank:
        return None
    return float(np.median(to_bank)), [float(np.median(one)) for _, one in sorted(among.items())]


def _spread(parts: list[np.ndarray]) -> float:
    """Root of the mean squared distance of cells to the mean of their part."""
    squares = np.concatenate([((part - part.mean(axis=0)) ** 2).sum(axis=1) for part in parts])
    return float(np.sqrt(squares.mean())) + 1e-9


def _said(here: float, others: list[float]) -> Iterable[Finding]:
    said = f"its types lie {here:.2f} spreads of a type from those that the model was trained on"
    if others:
        said += f"; studies of the training data lie {min(others):.2f} to {max(others):.2f} from the others"
    limit = max([FAR, *(FARTHER * one for one in others)])
    if here <= limit:
        yield Finding("info", "shift", said)
        return
    yield Finding(
        "warning",
        "shift",
        said,
        f"{limit:.2f} or less",
        "another technology, tissue, species or disease than any that the model has seen, or input that is no counts",
        "choose another --model, check the markers (--report), or teach it with `evercell update`",
    )

"""Can the labels be believed: what a run left behind, looked at without knowing the truth."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from evercell.doctor.finding import Finding
from evercell.doctor.shift import plausible, shift_findings
from evercell.errors import LabelsError
from evercell.labelling import UNKNOWN
from evercell.labels import listed

if TYPE_CHECKING:
    from anndata import AnnData

    from evercell.annotator import Annotator

LOW_COVERAGE = 0.6  # of the model's genes
MANY_UNKNOWN = 0.2  # of the cells
ONE_TYPE = 0.95  # of the cells
LOW_CONFIDENCE = 0.5
HIGH_ENTROPY = 0.35  # of the most that there can be, on the mean
FEW_CELLS = 10  # of a type, below which nothing is said of it


def check_annotation(adata: AnnData, *, key: str = "evercell", model: Annotator | None = None) -> list[Finding]:
    """Look at cells after a run.

    Parameters
    ----------
    adata
        Cells that evercell annotated: ``obs[key]`` and, where present, ``obs[f"{key}_confidence"]``,
        ``obsm[f"{key}_proba"]``, ``uns[key]``. Nothing is changed.
    key
        Prefix of the annotation.
    model
        The model that annotated them, to compare the cells with those it was trained on.

    Returns
    -------
    list of Finding

    Raises
    ------
    LabelsError
        There is no annotation of that name.
    """
    if key not in adata.obs:
        raise LabelsError(f"`obs` has no column `{key}`: no annotation", hint="name it with --key-added, or annotate")
    obs, info = adata.obs, adata.uns.get(key, {})
    labels = obs[key].astype(object).where(obs[key].notna(), UNKNOWN).astype(str).to_numpy()
    confidence, proba = obs.get(f"{key}_confidence"), adata.obsm.get(f"{key}_proba")
    found = check_labels(
        labels,
        confidence=None if confidence is None else confidence.to_numpy(dtype=float),
        probabilities=None if proba is None else np.asarray(proba, dtype=float),
        info=info if isinstance(info, Mapping) else {},
    )
    if model is not None:
        found += plausible(model, labels)
        found += shift_findings(model, adata, labels)
    return found


def check_labels(
    labels: np.ndarray,
    *,
    confidence: np.ndarray | None = None,
    probabilities: np.ndarray | None = None,
    info: Mapping[str, Any] | None = None,
) -> list[Finding]:
    """Look at labels by themselves.

    Parameters
    ----------
    labels
        (B,) labels, "Unknown" where rejected.
    confidence
        (B,) calibrated probability of the best type.
    probabilities
        (B, K) of all types.
    info
        What the annotation wrote into ``uns``.
    """
    info = info or {}
    sizes = pd.Series(labels).value_counts()
    types = sizes.drop(index=UNKNOWN, errors="ignore")
    said = f"{len(labels):,} cells; {len(types):,} types: {listed([f'{name} ({n:,})' for name, n in types.items()], 5)}"
    found = [Finding("info", "labels", said if len(types) else f"{len(labels):,} cells, all of them Unknown")]
    found += _coverage(info)
    found += _unknown(sizes, len(labels), info)
    found += _one_type(types, len(labels))
    if confidence is not None:
        found += _confidence(labels, confidence)
    if probabilities is not None and probabilities.ndim == 2 and probabilities.shape[1] > 1:
        found += _entropy(labels, probabilities)
    return found


def _coverage(info: Mapping[str, Any]) -> Iterable[Finding]:
    coverage = info.get("coverage")
    if not isinstance(coverage, Mapping) or "share_of_model" not in coverage:
        return
    share = float(coverage["share_of_model"])
    said = str(coverage.get("sentence") or f"{share:.0%} of the model's genes were measured.")
    if share >= LOW_COVERAGE:
        yield Finding("info", "gene coverage", said)
        return
    yield Finding(
        "warning",
        "gene coverage",
        said,
        f"{LOW_COVERAGE:.0%} or more",
        "another species, names of another kind, a targeted panel, or a file of variable genes",
        "check --species and --gene-column, give all measured genes; of a panel, believe types whose markers are on it",
    )


def _unknown(sizes: pd.Series, n_cells: int, info: Mapping[str, Any]) -> Iterable[Finding]:
    number = int(sizes.get(UNKNOWN, 0))
    share, rate = number / max(n_cells, 1), info.get("rejection_rate")
    said = f"{number:,} cells ({share:.1%}) resemble no type of the model"
    if share <= MANY_UNKNOWN:
        yield Finding("info", "unknown cells", said)
        return
    of_known = f", of which about {float(rate):.0%} of known types" if isinstance(rate, float | int) else ""
    yield Finding(
        "warning",
        "unknown cells",
        said,
        f"{MANY_UNKNOWN:.0%} or fewer{of_known}",
        "types that the model has not seen if they form islands of their own; else quality, tissue or species",
        "`evercell discover` groups them, `evercell update` teaches them; --model auto looks for a model that fits, "
        "--reject sets another rate",
    )


def _one_type(types: pd.Series, n_cells: int) -> Iterable[Finding]:
    if len(types) and types.iloc[0] / n_cells > ONE_TYPE and n_cells >= FEW_CELLS:
        yield Finding(
            "warning",
            "one type everywhere",
            f"{types.iloc[0] / n_cells:.1%} of the cells are {types.index[0]}",
            f"{ONE_TYPE:.0%} or fewer, unless the cells were sorted",
            "sorted cells, input that holds no raw counts, or a model of another tissue or species",
            "check the markers in the --report, --layer and --model",
        )


def _confidence(labels: np.ndarray, confidence: np.ndarray) -> Iterable[Finding]:
    known = labels != UNKNOWN
    if not known.any():
        return
    mean = float(np.nanmean(confidence[known]))
    said = f"{mean:.2f} on the mean of the cells with a label"
    expected = f"{LOW_CONFIDENCE:.2f} or more: it is the chance that the label is right"
    by_type = pd.Series(confidence[known]).groupby(labels[known]).agg(["mean", "size"])
    unsure = by_type[(by_type["mean"] < LOW_CONFIDENCE) & (by_type["size"] >= FEW_CELLS)]
    cause = "types that are alike, cells of few counts, or a study unlike those the model was trained on"
    mend = "compare their markers (--report, `evercell explain`), vote with --majority, or update the model"
    if mean < LOW_CONFIDENCE:
        yield Finding("warning", "confidence", said, expected, cause, mend)
        return
    yield Finding("info", "confidence", said)
    if len(unsure):
        names = listed([f"{name} ({row['mean']:.2f})" for name, row in unsure.iterrows()], 5)
        yield Finding("warning", "confidence of types", f"low for {names}", expected, cause, mend)


def mean_entropy(probabilities: np.ndarray) -> float:
    """Mean over the cells of the entropy of their probabilities (B, K), as a share of ``log K``."""
    p = np.clip(probabilities, 1e-12, 1.0)
    return float(-(p * np.log(p)).sum(axis=1).mean() / np.log(p.shape[1]))


def _entropy(labels: np.ndarray, probabilities: np.ndarray) -> Iterable[Finding]:
    entropy = mean_entropy(probabilities)
    said = f"{entropy:.2f} of the most there can be, on the mean of all cells"
    if entropy <= HIGH_ENTROPY:
        yield Finding("info", "entropy", said)
        return
    yield Finding(
        "warning",
        "entropy",
        said,
        f"{HIGH_ENTROPY:.2f} or less",
        "the model spreads its belief over many types: it does not know cells of this kind",
        "choose another --model (`--model auto` tries all), or train one on cells of this tissue",
    )

"""`select`: the cells whose labels would teach a model most: uncertain ones, and unlike each other."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from evercell.annotation import UNKNOWN, Annotation
from evercell.annotator import Annotator
from evercell.discovery.annotated import annotation_of
from evercell.errors import SettingsError

if TYPE_CHECKING:
    from anndata import AnnData

SHARPNESS = 3  # power of the uncertainty: the more, the less room is left for sure cells in empty regions


def select(
    model: Annotator,
    adata: AnnData,
    number: int,
    *,
    key: str = "evercell",
    layer: str | None = None,
    species: str = "auto",
    gene_column: str | None = None,
    name: str = "the data",
    device: str = "auto",
    shown: bool | None = None,
) -> pd.DataFrame:
    """Name the cells that are most worth a label.

    Each next cell is the one with the largest product of its distance to the nearest cell chosen before (greedy
    k-centre, Sener and Savarese 2018, in the model's representation) and its uncertainty cubed: the higher of its ranks
    by small margin between the two most probable types and by unknown score.

    Parameters
    ----------
    model
        Annotator.
    adata
        Cells with counts; left as it is.
    number
        How many cells can be labelled.
    key
        Prefix of names in the AnnData, as in `annotate`.
    layer, species, gene_column, name, device, shown
        As `annotate` takes them.

    Returns
    -------
    pandas.DataFrame
        One row a cell, the most uncertain first: ``cell``, ``label`` (most probable type), ``runner_up``,
        ``confidence``, ``unknown_score``, ``reason`` in words.

    Raises
    ------
    SettingsError
        `number` is not between 1 and the number of cells with counts.
    CellsError, GenesError, ModelError

    Examples
    --------
    >>> import evercell as ec
    >>> from evercell.finetuning import quick_settings
    >>> from evercell.testing import synthetic_cells
    >>> model = ec.train(synthetic_cells(seed=1), groups="donor", settings=quick_settings())
    >>> ec.select(model, synthetic_cells(100, n_types=5, seed=2), 10).columns.tolist()
    ['cell', 'label', 'runner_up', 'confidence', 'unknown_score', 'reason']
    """
    annotation, _ = annotation_of(
        model,
        adata,
        reject=None,
        key=key,
        layer=layer,
        species=species,
        gene_column=gene_column,
        name=name,
        model_name="",
        device=device,
        shown=shown,
    )
    confidence = annotation.obs[f"{annotation.key}_confidence"].to_numpy()
    usable = np.flatnonzero(confidence > 0)  # a cell without counts has none
    if not 1 <= number <= len(usable):
        raise SettingsError(
            f"{number:,} cells were asked for; `{name}` has {len(usable):,}", hint="change --number to fewer cells"
        )
    ordered = np.sort(annotation.probabilities, axis=1)
    doubt = _ranks(ordered[usable, -2] - ordered[usable, -1])
    strangeness = _ranks(annotation.obs[f"{annotation.key}_unknown_score"].to_numpy()[usable])
    uncertainty = np.maximum(doubt, strangeness)
    chosen = _spread(annotation.representation[usable], uncertainty**SHARPNESS, number)
    chosen = chosen[np.argsort(-uncertainty[chosen], kind="stable")]
    return _table(annotation, usable[chosen], doubt[chosen] >= strangeness[chosen])


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks (B,) from above 0 to 1, ties sharing their mean."""
    return pd.Series(values).rank(pct=True).to_numpy()


def _spread(representation: np.ndarray, weights: np.ndarray, number: int) -> np.ndarray:
    """Rows (number,) chosen one after the other: heavy ones, far from those before."""
    chosen = [int(weights.argmax())]
    distance = np.full(len(weights), np.inf)
    left = np.ones(len(weights), dtype=bool)
    while len(chosen) < number:
        left[chosen[-1]] = False
        distance = np.minimum(distance, np.linalg.norm(representation - representation[chosen[-1]], axis=1))
        chosen.append(int(np.where(left, weights * distance, -1.0).argmax()))
    return np.array(chosen)


def _table(annotation: Annotation, rows: np.ndarray, torn: np.ndarray) -> pd.DataFrame:
    """What is said of the chosen cells; `torn` where the margin is what makes a cell uncertain."""
    names = np.asarray(annotation.types, dtype=object)
    first, second = names[np.argsort(-annotation.probabilities[rows], axis=1, kind="stable")[:, :2]].T
    unknown = annotation.labels[rows] == UNKNOWN
    reasons = [
        "unlike every known type" if strange else f"between {a} and {b}" if between else f"unlike most {a} cells"
        for a, b, strange, between in zip(first, second, unknown, torn, strict=True)
    ]
    obs = annotation.obs.iloc[rows]
    return pd.DataFrame(
        {
            "cell": obs.index.to_numpy(),
            "label": first,
            "runner_up": second,
            "confidence": obs[f"{annotation.key}_confidence"].to_numpy(),
            "unknown_score": obs[f"{annotation.key}_unknown_score"].to_numpy(),
            "reason": reasons,
        }
    )

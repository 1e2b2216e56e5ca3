"""Label cells: `annotate` and `embed`."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from evercell import __version__
from evercell.adaptation import LOST, fitted_to, lost_share
from evercell.annotator import Annotator
from evercell.cells import find_counts
from evercell.errors import ModelError, SettingsError
from evercell.genes import align
from evercell.progress import progress
from evercell.rejection import Outputs
from evercell.tokenizers import View
from evercell.training import choose_device

if TYPE_CHECKING:
    from anndata import AnnData

UNKNOWN = "Unknown"
DEFAULT_REJECTION = 0.01
"""Share of cells of known types that may be called unknown, where no rate is asked for."""


@dataclass(frozen=True)
class Annotation:
    """What a model says of the cells of a query, in file order.

    Parameters
    ----------
    obs
        One row a cell: ``evercell`` (label, "Unknown" where rejected), ``evercell_confidence`` (calibrated probability
        of the best type), ``evercell_unknown_score``, ``evercell_ontology_term_id``. The prefix is `key`.
    best_labels
        Most probable type of each cell (B,), whether rejected or not.
    probabilities
        (B, K), float32; columns in the order of `types`.
    representation
        (B, D), float32.
    types
        Names of the types (K).
    info
        What is written into ``uns``: model, coverage, threshold, settings, notes.
    key
        Prefix of all names.
    """

    obs: pd.DataFrame
    best_labels: np.ndarray
    probabilities: np.ndarray
    representation: np.ndarray
    types: tuple[str, ...]
    info: dict[str, Any]
    key: str = "evercell"

    @property
    def labels(self) -> np.ndarray:
        """Label of each cell (B,), "Unknown" where rejected."""
        return self.obs[self.key].astype(str).to_numpy()

    def write_into(self, adata: AnnData) -> None:
        """Add the columns, arrays and facts to the AnnData that was annotated."""
        if list(adata.obs_names) != list(self.obs.index):
            raise SettingsError("the cells of this AnnData are not the cells that were annotated")
        for name in self.obs:
            adata.obs[name] = self.obs[name]
        adata.obsm[f"X_{self.key}"] = self.representation
        adata.obsm[f"{self.key}_proba"] = self.probabilities
        adata.uns[self.key] = copy.deepcopy(self.info)

    def summary(self) -> str:
        """Composition in words, most frequent type first."""
        shares = self.obs[self.key].value_counts()
        confidence = self.obs.groupby(self.key, observed=True)[f"{self.key}_confidence"].mean().to_dict()
        width = max(len(str(name)) for name in shares.index) + 2
        lines = [f"{'type':<{width}}{'cells':>8}{'share':>9}{'confidence':>12}"]
        for name, number in shares[shares > 0].items():
            share = f"{100 * number / len(self.obs):.1f} %"
            lines.append(f"{name!s:<{width}}{number:>8,}{share:>9}{confidence[name]:>12.2f}")
        return "\n".join(lines)


def annotate(
    model: Annotator,
    query: AnnData,
    *,
    reject: str | float | None = None,
    inplace: bool = False,
    key_added: str = "evercell",
    layer: str | None = None,
    species: str = "auto",
    gene_column: str | None = None,
    adapt: bool = True,
    min_coverage: float = 0.05,
    empty_cells: str = "error",
    name: str = "the data",
    model_name: str = "",
    chunk: int = 4096,
    device: str = "auto",
    shown: bool | None = None,
) -> Annotation:
    """Label the cells of an AnnData.

    The label of a cell depends on that cell, the genes that its file measured, and the model; not on the other cells.

    Parameters
    ----------
    model
        Annotator.
    query
        Cells with counts, in memory or backed.
    reject
        Share of cells of known types that may be called unknown (0 to 1); ``"off"`` labels every cell; 0.01 by default.
    inplace
        Write the result into `query` too. By default it is left as it is.
    key_added
        Prefix of the names that are written.
    layer, species, gene_column
        Where the counts are; species of the query; column of ``var`` with gene names. Found if not given.
    adapt
        Fit the linear member again where the query lacks genes that the model leans on (see `adaptation`).
    min_coverage
        Refuse below this share of genes that match.
    empty_cells
        ``"error"``, or ``"keep"``: a cell without counts is called unknown.
    name, model_name
        For messages and ``uns``.
    chunk
        Cells read at a time.
    device
        ``auto``, ``cpu`` or ``cuda``.
    shown
        Show a progress bar; by default in a terminal.

    Returns
    -------
    Annotation

    Raises
    ------
    CellsError, GenesError, ModelError, SettingsError

    Examples
    --------
    >>> import evercell as ec
    >>> from evercell.testing import synthetic_cells
    >>> from evercell.finetuning import quick_settings
    >>> model = ec.train(synthetic_cells(seed=1), labels="cell_type", groups="donor", settings=quick_settings())
    >>> result = ec.annotate(model, synthetic_cells(50, seed=2))
    >>> result.probabilities.shape
    (50, 4)
    """
    rejector = model.rejector
    if rejector is None:
        raise ModelError(
            "this model is pretrained only: it knows no cell types", hint="`evercell train --from` it first"
        )
    rate = rejection_rate(reject)
    counts = find_counts(query, layer=layer, name=name, empty_cells=empty_cells)
    alignment = align(
        counts.genes, model.vocabulary, species=species, column=gene_column, min_coverage=min_coverage, name=name
    )
    model = model.on(choose_device(device))
    lost = lost_share(model, alignment.measured)
    adapted = adapt and lost >= LOST
    fitted = fitted_to(model, alignment.measured) if adapted else model
    rejector = fitted.rejector or rejector
    parts: list[Outputs] = []
    empty: list[np.ndarray] = []
    with progress("annotating", shown=shown) as step:
        for _, stop, block in counts.chunks(chunk):
            view = View.whole(alignment.apply(block), alignment.measured)
            parts.append(fitted.outputs(view))
            empty.append(view.totals == 0)
            step(stop, counts.shape[0], None)
    outputs = Outputs.joined(parts)
    nothing = np.concatenate(empty)
    score = rejector.score(outputs)
    threshold = math.inf if rate is None else rejector.threshold(rate)
    names = np.asarray(model.types.names, dtype=object)
    best = names[outputs.codes]
    rejected = (score > threshold) | nothing
    confidence = np.where(nothing, 0.0, outputs.confidence).astype(np.float32)
    ids = np.asarray([one or "" for one in model.types.ontology_ids], dtype=object)
    obs = pd.DataFrame(
        {
            key_added: pd.Categorical(np.where(rejected, UNKNOWN, best), categories=[*model.types.names, UNKNOWN]),
            f"{key_added}_confidence": confidence,
            f"{key_added}_unknown_score": score.astype(np.float32),
            f"{key_added}_ontology_term_id": pd.Categorical(
                np.where(rejected, "", ids[outputs.codes]), categories=list(dict.fromkeys([*ids, ""]))
            ),
        },
        index=counts.cells,
    )
    notes = list(counts.notes)
    if adapted:
        notes.append(
            f"the query did not measure genes that hold {100 * lost:.0f} % of the counts the model was trained on: "
            "the linear member was fitted again on the genes that are there"
        )
    if nothing.any():
        notes.append(f"{int(nothing.sum()):,} cells have no count of a gene that the model knows: called unknown")
    info = {
        "model": model_name,
        "model_fingerprint": model.fingerprint,
        "version": __version__,
        "stages": len(model.ledger),
        "species": alignment.coverage.species,
        "counts_source": counts.source,
        "counts_transform": counts.transform,
        "coverage": {**alignment.coverage.to_dict(), "sentence": alignment.coverage.sentence()},
        "rejector": rejector.name,
        "rejection_rate": "off" if rate is None else rate,
        "threshold": threshold,
        "lost_share": lost,
        "adapted": adapted,
        "classes": list(model.types.names),
        "notes": notes,
    }
    result = Annotation(obs, best, outputs.proba, outputs.representation, model.types.names, info, key_added)
    if inplace:
        result.write_into(query)
    return result


def embed(
    model: Annotator,
    query: AnnData,
    *,
    layer: str | None = None,
    species: str = "auto",
    gene_column: str | None = None,
    name: str = "the data",
    chunk: int = 4096,
    device: str = "auto",
    shown: bool | None = None,
) -> np.ndarray:
    """Representation of each cell (B, D), float32, from a trained or a pretrained model.

    Parameters are those of `annotate`.

    Examples
    --------
    >>> import evercell as ec
    >>> from evercell.testing import synthetic_cells
    >>> from evercell.finetuning import quick_settings
    >>> model = ec.train(synthetic_cells(seed=1), labels="cell_type", groups="donor", settings=quick_settings())
    >>> ec.embed(model, synthetic_cells(50, seed=2)).shape
    (50, 32)
    """
    counts = find_counts(query, layer=layer, name=name, empty_cells="keep")
    alignment = align(counts.genes, model.vocabulary, species=species, column=gene_column, name=name)
    model = model.on(choose_device(device))
    parts = []
    with progress("embedding", shown=shown) as step:
        for _, stop, block in counts.chunks(chunk):
            parts.append(model.represent(View.whole(alignment.apply(block), alignment.measured))[0])
            step(stop, counts.shape[0], None)
    return np.concatenate(parts)


def rejection_rate(reject: str | float | None) -> float | None:
    """Rate of false rejections asked for, None where rejection is off.

    Raises
    ------
    SettingsError
        If it is neither ``off`` nor a number from 0 to 1.
    """
    if reject is None:
        return DEFAULT_REJECTION
    if reject == "off":
        return None
    try:
        rate = float(reject)
    except (TypeError, ValueError):
        rate = math.nan
    if not 0 <= rate < 1:
        raise SettingsError(f"reject is `{reject}`", hint="pass --reject off, or a rate such as --reject 0.05")
    return rate

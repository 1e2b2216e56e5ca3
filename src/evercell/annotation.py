"""Label cells: `annotate` and `embed`."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from evercell.annotator import Annotator
from evercell.cells import find_counts
from evercell.colours import HETEROGENEOUS, stored_colours
from evercell.errors import ModelError, SettingsError
from evercell.genes import align
from evercell.labelling import UNKNOWN, Asked, Block, Labeller, joined_info, table
from evercell.majority import LEAST_SHARE, clusters_in, made_clusters, majority_vote
from evercell.progress import progress
from evercell.rejection import DEFAULT_RATE, Outputs
from evercell.sources import unmerged
from evercell.tokenizers import View
from evercell.training import choose_device

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["DEFAULT_REJECTION", "UNKNOWN", "Annotation", "add_majority", "annotate", "embed", "rejection_rate"]

DEFAULT_REJECTION = DEFAULT_RATE
"""Share of cells of known types that may be called unknown, where none is asked for and the model stores none."""
DISCOVERIES = 0.1
"""False-discovery rate at which the number of unknown cells is told."""


@dataclass(frozen=True)
class Annotation:
    """What a model says of the cells of a query, in file order.

    Parameters
    ----------
    obs
        One row a cell: ``evercell`` (label, "Unknown" where rejected), ``evercell_confidence`` (calibrated probability
        of the best type), ``evercell_unknown_score``, ``evercell_ontology_term_id`` and, where they were asked for,
        ``evercell_set``, ``evercell_lineage``, ``evercell_lineage_ontology_term_id``, ``evercell_unknown_q``,
        ``evercell_majority``. The prefix is `key`. All but ``evercell_unknown_q`` and
        ``evercell_majority`` depend on the cell and the model only.
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
    clusters
        Cluster of each cell in the majority vote (B,), missing for a cell in none; None where there was no vote.
    """

    obs: pd.DataFrame
    best_labels: np.ndarray
    probabilities: np.ndarray
    representation: np.ndarray
    types: tuple[str, ...]
    info: dict[str, Any]
    key: str = "evercell"
    clusters: pd.Categorical | None = None

    @property
    def labels(self) -> np.ndarray:
        """Label of each cell (B,), "Unknown" where rejected."""
        return self.obs[self.key].astype(str).to_numpy()

    def write_into(self, adata: AnnData) -> None:
        """Add the columns, arrays and facts to the AnnData that was annotated.

        Types of which there is no cell are no categories there: Scanpy's figures and tests would show and refuse them.
        """
        if list(adata.obs_names) != list(self.obs.index):
            raise SettingsError("the cells of this AnnData are not the cells that were annotated")
        if self.clusters is None and f"{self.key}_majority" in adata.obs:
            del adata.obs[f"{self.key}_majority"]  # of an earlier annotation, whose labels are replaced
        for name, column in self.obs.items():
            used = isinstance(column.dtype, pd.CategoricalDtype)
            adata.obs[name] = column.cat.remove_unused_categories() if used else column
        adata.obsm[f"X_{self.key}"] = self.representation
        adata.obsm[f"{self.key}_proba"] = self.probabilities
        adata.uns.update(self.facts(adata.obs[list(self.obs)]))

    def facts(self, obs: pd.DataFrame) -> dict[str, Any]:
        """What belongs into ``uns`` beside the columns `obs`: the facts, and the colours of the types for Scanpy."""
        info = copy.deepcopy(self.info)
        if "sources" in info:  # a slash in a name would be a group in the file
            shared = os.path.commonpath(list(info["sources"]))
            info["sources"] = {
                name.removeprefix(f"{shared}/").replace("/", "_"): facts for name, facts in info["sources"].items()
            }
        return {self.key: info, **stored_colours(obs, self.types)}

    def celltypist(self, *, least_share: float = 0.0) -> pd.DataFrame:
        """The result in the columns of CellTypist, for scripts that read those.

        As CellTypist's "best match": ``predicted_labels`` is the most probable type of every cell, whether or not
        evercell rejects the cell, so it is never "Unknown". ``majority_voting`` is the vote on these labels.

        Parameters
        ----------
        least_share
            CellTypist's ``min_prop``: clusters in which a smaller share of the cells agrees are "Heterogeneous".

        Returns
        -------
        pandas.DataFrame
            One row a cell: ``predicted_labels``, ``over_clustering`` and ``majority_voting`` where there was a vote,
            ``conf_score`` (probability of the predicted label; calibrated, which CellTypist's is not).
        """
        predicted = pd.Categorical(self.best_labels, categories=self.types)
        columns: dict[str, Any] = {"predicted_labels": predicted}
        if self.clusters is not None:
            columns["over_clustering"] = self.clusters
            columns["majority_voting"] = majority_vote(
                predicted, self.clusters.codes, least_share=least_share, below=HETEROGENEOUS
            )
        columns["conf_score"] = self.obs[f"{self.key}_confidence"].to_numpy()
        return pd.DataFrame(columns, index=self.obs.index)

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
    sets: float | None = None,
    unknown_q: bool = False,
    inplace: bool = False,
    key_added: str = "evercell",
    layer: str | None = None,
    species: str = "auto",
    gene_column: str | None = None,
    adapt: bool = True,
    min_coverage: float = 0.05,
    empty_cells: str = "error",
    majority: bool | str = False,
    seed: int = 0,
    name: str = "the data",
    model_name: str = "",
    chunk: int = 4096,
    device: str = "auto",
    shown: bool | None = None,
) -> Annotation:
    """Label the cells of an AnnData.

    The label of a cell depends on that cell, the genes that its file measured, and the model; not on the other cells.
    The majority vote, a column of its own, is the one thing that does depend on them. Of merged files (`merge`) the
    cells of each source are labelled by the genes that this source measured.

    Parameters
    ----------
    model
        Annotator.
    query
        Cells with counts, in memory or backed.
    reject
        Share of cells of known types that may be called unknown (0 to 1); ``"off"`` labels every cell. By default the
        rate that the model stores: at its training it parted the known types best from types left out.
    sets
        Rate of errors (0 to 1) of the sets in ``evercell_set``: types that the cell may be of, so that the right one is
        among them for all but this share of the held-out cells of each type. ``evercell_lineage`` is what all of them
        are, by the Cell Ontology: "T cell" where the kind of T cell is open (see `label_sets`).
    unknown_q
        Add ``evercell_unknown_q``: of the cells with a value of at most 0.1, a tenth at most are expected to be of
        known types (Benjamini and Hochberg), as far as the known cells here score like held-out ones but for one shift,
        which is estimated from the cells of the query (`Rejector.p_values`).
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
    majority
        Add ``evercell_majority``: the label that most cells of the cell's cluster have, or its own where less than half
        agree (see `majority`). True makes small clusters of the representation; a name is that of a column of ``obs``
        with clusters, such as ``"leiden"``, where a cell without one keeps its label. The labels themselves stay as
        they are.
    seed
        Seed of the clusters that `majority` makes; nothing else here is random.
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
    CellsError, GenesError, LabelsError, ModelError, SettingsError

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
    rate = rejection_rate(reject, rejector.default_rate)
    check_guarantees(model, sets, unknown_q)
    clusters = clusters_in(query.obs, majority, name=name) if isinstance(majority, str) else None
    asked = Asked(
        rate, layer, species, gene_column, adapt, min_coverage, empty_cells, model_name, chunk, device, shown, sets
    )
    parts = [(one, _annotated(model, part, asked, one, key_added, unknown_q)) for one, part in unmerged(query, name)]
    result = parts[0][1] if len(parts) == 1 else _of_sources(parts, query.obs_names)
    if unknown_q:
        to_q_values(result.obs, result.info, key=key_added)
    if majority is True:
        clusters = made_clusters(result.representation, seed=seed)
    if clusters is not None:
        column = majority if isinstance(majority, str) else ""
        add_majority(result.obs, result.info, clusters, key=key_added, column=column, seed=seed)
        result = replace(result, clusters=clusters)
    if inplace:
        result.write_into(query)
    return result


def _annotated(model: Annotator, query: AnnData, asked: Asked, name: str, key: str, unknown_q: bool) -> Annotation:
    """Labels of the cells of one source."""
    counts = find_counts(query, layer=asked.layer, name=name, empty_cells=asked.empty_cells)
    ready = Labeller.ready(model, counts, asked, name)
    blocks: list[Block] = []
    with progress("annotating", shown=asked.shown) as step:
        for _, stop, block in ready.blocks(0, counts.shape[0]):
            blocks.append(block)
            step(stop, counts.shape[0], None)
    outputs = Outputs.joined([one.outputs for one in blocks])
    score = np.concatenate([one.score for one in blocks if one.score is not None]) if ready.rejector.per_cell else None
    empty, nothing = (np.concatenate(of) for of in zip(*((one.empty, one.nothing) for one in blocks), strict=True))
    block = Block(outputs, score, empty, nothing)
    threshold = ready.threshold(block)
    obs = table(model, ready.verdicts(block, threshold), counts.cells, key)
    if unknown_q:  # p-values, until those of all sources are there
        obs[f"{key}_unknown_q"] = ready.rejector.p_values(obs[f"{key}_unknown_score"].to_numpy(), outputs.codes)
    best = np.asarray(model.types.names, dtype=object)[outputs.codes]
    info = ready.info(threshold, empty=empty, nothing=int(nothing.sum()))
    return Annotation(obs, best, outputs.proba, outputs.representation, model.types.names, info, key)


def _of_sources(parts: Sequence[tuple[str, Annotation]], cells: pd.Index) -> Annotation:
    """The annotations of the sources of merged cells as one, in the order of the file."""
    joined = pd.concat([one.obs for _, one in parts])
    place = joined.index.get_indexer(cells)

    def in_order(arrays: Iterable[np.ndarray]) -> np.ndarray:
        return np.concatenate(list(arrays))[place]

    return replace(
        parts[0][1],
        obs=joined.iloc[place].copy(),
        best_labels=in_order(one.best_labels for _, one in parts),
        probabilities=in_order(one.probabilities for _, one in parts),
        representation=in_order(one.representation for _, one in parts),
        info=joined_info([(name, one.info) for name, one in parts]),
    )


def check_guarantees(model: Annotator, sets: float | None, unknown_q: bool) -> None:
    """Whether a model can give the label sets and the p-values of unknown cells that are asked for.

    Raises
    ------
    SettingsError
        If `sets` is no rate.
    ModelError
        If the model was made without what they take.
    """
    hint = "train it again with this version of evercell, or update it"
    if sets is not None:
        if not 0 < sets < 1:
            raise SettingsError(f"sets is `{sets}`", hint="give a rate of errors between 0 and 1, such as --sets 0.1")
        if model.sets is None:
            raise ModelError("the model stores nothing from which label sets are made", hint=hint)
    if unknown_q and model.rejector is not None:
        if not model.rejector.per_cell:
            raise ModelError(f"`{model.rejector.name}` judges cells by one another: it gives no false-discovery rate")
        if not model.rejector.gives_p_values:
            raise ModelError("the model stores nothing from which a false-discovery rate is told", hint=hint)


def to_q_values(obs: pd.DataFrame, info: dict[str, Any], *, key: str) -> None:
    """Make the p-values of unknown cells the smallest rates of false discoveries at which each is called unknown."""
    from scipy.stats import false_discovery_control

    q = false_discovery_control(obs[f"{key}_unknown_q"].to_numpy()) if len(obs) else np.zeros(0)
    obs[f"{key}_unknown_q"] = q
    info["notes"].append(
        f"{int((q <= DISCOVERIES).sum()):,} cells are of unknown types at a false-discovery rate of {DISCOVERIES:g} "
        f"(`{key}_unknown_q`, which depends on the other cells of the file)"
    )


def add_majority(
    obs: pd.DataFrame, info: dict[str, Any], clusters: pd.Categorical, *, key: str, column: str, seed: int
) -> None:
    """Add the majority vote to the columns and the facts; `column` is empty where the clusters were made."""
    voted = majority_vote(obs[key].array, clusters.codes, least_share=LEAST_SHARE)
    obs[f"{key}_majority"] = voted
    changed = int((voted.codes != obs[key].cat.codes).sum())
    info["majority"] = {
        "clusters": column or "made from the representation",
        "n_clusters": len(clusters.categories),
        "least_share": LEAST_SHARE,
        "seed": seed,
        "changed": changed,
    }
    info["notes"].append(
        f"majority vote over {len(clusters.categories):,} clusters: {changed:,} cells have another label in "
        f"`{key}_majority`, which depends on the other cells of the file; `{key}` does not"
    )


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
    model = model.on(choose_device(device))
    made, cells = [], []
    for one, part in unmerged(query, name):
        counts = find_counts(part, layer=layer, name=one, empty_cells="keep")
        alignment = align(counts.genes, model.vocabulary, species=species, column=gene_column, name=one)
        cells.append(counts.cells)
        with progress("embedding", shown=shown) as step:
            for _, stop, block in counts.chunks(chunk):
                made.append(model.represent(View.whole(alignment.apply(block), alignment.measured))[0])
                step(stop, counts.shape[0], None)
    place = cells[0].append(cells[1:]).get_indexer(query.obs_names)
    found: np.ndarray = np.concatenate(made)[place]
    return found


def rejection_rate(reject: str | float | None, default: float = DEFAULT_REJECTION) -> float | None:
    """Rate of false rejections asked for, `default` where none is, None where rejection is off.

    Raises
    ------
    SettingsError
        If it is neither ``off`` nor a number from 0 to 1.
    """
    if reject is None:
        return default
    if reject == "off":
        return None
    try:
        rate = float(reject)
    except (TypeError, ValueError):
        rate = math.nan
    if not 0 <= rate < 1:
        raise SettingsError(f"reject is `{reject}`", hint="pass --reject off, or a rate such as --reject 0.05")
    return rate

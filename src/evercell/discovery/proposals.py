"""`discover`: unknown cells in clusters, each with what a biologist needs to name it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from evercell import ontology
from evercell.annotation import UNKNOWN, Annotation
from evercell.annotator import Annotator
from evercell.cells import find_counts
from evercell.counts import Counts
from evercell.discovery.annotated import annotation_of
from evercell.discovery.clusters import clustered, components, positions
from evercell.discovery.profiles import Profiles
from evercell.errors import SettingsError
from evercell.gene_names import canonical_genes

if TYPE_CHECKING:
    from anndata import AnnData
    from scipy.sparse import csr_matrix

RESOLUTION = 0.7  # rather two clusters of one type, which one name merges, than one of two types
LEAST_CELLS = 10
TOO_GENERAL = ("CL:0000000", "CL:0000255")  # cell, eukaryotic cell: true of all, and of no help
MOST_KNOWN = 20_000  # known cells that clusters are compared with
COLUMNS = (
    "cluster",
    "cells",
    "name",
    "accept",
    "nearest_type",
    "nearest_share",
    "ontology_parent",
    "ontology_parent_id",
    "unknown_score",
    "markers",
    "note",
)


@dataclass(frozen=True)
class Discovery:
    """Clusters of the cells that a model does not know.

    Parameters
    ----------
    table
        One row a cluster, the largest first: ``cluster``, ``cells``, ``name`` and ``accept`` (empty, for the user),
        ``nearest_type`` (known type of highest mean log-probability) and ``nearest_share`` (of the cells for which it
        is the most probable), ``ontology_parent`` with ``ontology_parent_id`` (lowest common ancestor of the two
        nearest types that the Cell Ontology knows; empty where it is as general as "eukaryotic cell"),
        ``unknown_score`` (mean), ``markers`` (symbols with log2 fold change) and ``note`` (a sign that it is no type).
    clusters
        Cluster of each cell (B,), empty where it is in none.
    annotation
        Labels of all cells, as `annotate` gives them.
    notes
        What the user should know.
    in_file
        Whether the labels were in the file already.
    """

    table: pd.DataFrame
    clusters: np.ndarray
    annotation: Annotation
    notes: tuple[str, ...] = ()
    in_file: bool = False

    @property
    def n_unknown(self) -> int:
        """Number of cells called unknown."""
        return int((self.annotation.labels == UNKNOWN).sum())

    def write_into(self, adata: AnnData) -> None:
        """Add labels and clusters (``evercell_cluster``, missing for cells in none) to the AnnData."""
        if not self.in_file:
            self.annotation.write_into(adata)
        names = self.table["cluster"].tolist()
        adata.obs[f"{self.annotation.key}_cluster"] = pd.Categorical(
            [one or None for one in self.clusters], categories=names
        )

    def summary(self) -> str:
        """The table in words, for the screen."""
        lines = []
        for row in self.table.to_dict(orient="records"):
            nearest = f"{row['nearest_type']}, the most probable type of {row['nearest_share']:.0%} of the cells"
            parent = f"{row['ontology_parent']} ({row['ontology_parent_id']})" if row["ontology_parent"] else ""
            facts = {"nearest type": nearest, "may be a kind of": parent, "marker genes": row["markers"] or "none"}
            lines.append(f"{row['cluster']}: {row['cells']:,} cells")
            lines += [f"  {word:<18}{text}" for word, text in (facts | {"doubt": row["note"]}).items() if text]
        return "\n".join(lines)


def discover(
    model: Annotator,
    adata: AnnData,
    *,
    reject: str | float | None = None,
    resolution: float = RESOLUTION,
    least_cells: int = LEAST_CELLS,
    seed: int = 0,
    key: str = "evercell",
    layer: str | None = None,
    species: str = "auto",
    gene_column: str | None = None,
    name: str = "the data",
    model_name: str = "",
    device: str = "auto",
    shown: bool | None = None,
) -> Discovery:
    """Find groups of cells that are of no type of the model.

    Cells called Unknown are clustered: nearest neighbours in the model's representation and the principal components of
    the file's variable genes, then Louvain communities. Labels that the same model gave the file are taken as they are.

    Parameters
    ----------
    model
        Annotator.
    adata
        Cells with counts; left as it is (see `Discovery.write_into`).
    reject
        Share of cells of known types that may be called unknown, by default the model's own rate. More finds more
        cells of new types, and more known ones among them.
    resolution
        More gives more and smaller clusters.
    least_cells
        Cells of the smallest cluster; smaller groups stay unclustered.
    seed
        Order in which cells are looked at; the same seed gives the same clusters.
    key
        Prefix of names in the AnnData, as in `annotate`.
    layer, species, gene_column, name, model_name, device, shown
        As `annotate` takes them.

    Returns
    -------
    Discovery
        Without rows where no cell is unknown, or too few are.

    Raises
    ------
    CellsError, GenesError, ModelError, SettingsError

    Examples
    --------
    >>> import evercell as ec
    >>> from evercell.finetuning import quick_settings
    >>> from evercell.testing import synthetic_cells
    >>> model = ec.train(synthetic_cells(seed=1), groups="donor", settings=quick_settings())
    >>> found = ec.discover(model, synthetic_cells(300, n_types=6, seed=2), reject=0.1)
    >>> found.table.loc[:1, "cluster"].tolist()
    ['unknown 1', 'unknown 2']
    """
    if resolution <= 0:
        raise SettingsError(
            f"resolution is {resolution:g}; it must be above 0", hint="0.7 is the default of --resolution"
        )
    if least_cells < 3:
        raise SettingsError(
            f"least_cells is {least_cells}; at least 3 cells make a cluster", hint="change --least-cells"
        )
    if reject == "off":
        raise SettingsError("with reject off no cell is unknown", hint="pass --reject with a rate such as 0.01")
    annotation, in_file = annotation_of(
        model,
        adata,
        reject=reject,
        key=key,
        layer=layer,
        species=species,
        gene_column=gene_column,
        name=name,
        model_name=model_name,
        device=device,
        shown=shown,
    )
    counts = find_counts(adata, layer=layer, name=name, empty_cells="keep")
    labels = annotation.labels
    rows, matrix = _compared(counts, labels)
    totals = np.asarray(matrix.sum(axis=1)).ravel()
    logs = matrix
    logs.data = np.log1p(logs.data * np.repeat(1e4 / np.maximum(totals, 1), np.diff(logs.indptr)))
    unknown = np.flatnonzero((labels[rows] == UNKNOWN) & (totals > 0))
    codes = np.full(len(unknown), -1)
    if len(unknown) >= least_cells:
        where = positions(annotation.representation[rows[unknown]], components(logs)[unknown])
        codes = clustered(where, resolution=resolution, least_cells=least_cells, seed=seed)
    names = [f"unknown {code + 1}" for code in range(codes.max(initial=-1) + 1)]
    clusters = np.full(adata.n_obs, "", dtype=object)
    inside = codes >= 0
    clusters[rows[unknown[inside]]] = [names[code] for code in codes[inside]]
    groups = np.where(labels[rows] == UNKNOWN, clusters[rows], labels[rows])
    symbols = canonical_genes(counts.genes, species=species, column=gene_column).symbols
    profiles = Profiles(logs, totals, symbols, groups)
    table = pd.DataFrame([_row(one, clusters == one, annotation, model, profiles) for one in names], columns=COLUMNS)
    return Discovery(table, clusters, annotation, tuple(_notes(labels, clusters, least_cells)), in_file)


def _compared(counts: Counts, labels: np.ndarray) -> tuple[np.ndarray, csr_matrix]:
    """Rows and counts of all unknown cells and of known ones, spread evenly where they are many."""
    from scipy.sparse import vstack

    known = np.flatnonzero(labels != UNKNOWN)
    some = known[np.linspace(0, len(known) - 1, min(len(known), MOST_KNOWN)).astype(int)]
    rows = np.union1d(np.flatnonzero(labels == UNKNOWN), some)
    parts = [block[rows[(rows >= start) & (rows < stop)] - start] for start, stop, block in counts.chunks()]
    return rows, vstack(parts, format="csr")


def _row(
    cluster: str, cells: np.ndarray, annotation: Annotation, model: Annotator, profiles: Profiles
) -> dict[str, object]:
    """What the table says of one cluster."""
    proba = annotation.probabilities[cells]
    order = np.argsort(-np.log(np.maximum(proba, 1e-6)).mean(axis=0), kind="stable")
    nearest = annotation.types[order[0]]
    parent = _parent([model.types.ontology_ids[code] for code in order[:3]])
    markers = profiles.markers(cluster)
    return {
        "cluster": cluster,
        "cells": int(cells.sum()),
        "name": "",
        "accept": "",
        "nearest_type": nearest,
        "nearest_share": round(float((annotation.best_labels[cells] == nearest).mean()), 3),
        "ontology_parent": parent.label if parent else "",
        "ontology_parent_id": parent.id if parent else "",
        "unknown_score": round(float(annotation.obs[f"{annotation.key}_unknown_score"].to_numpy()[cells].mean()), 3),
        "markers": ", ".join(f"{gene} ({change:+.1f})" for gene, change in markers),
        "note": profiles.doubt(cluster, annotation.types),
    }


def _parent(ids: Sequence[str | None]) -> ontology.Term | None:
    """Lowest common ancestor of the two nearest of some types that have a term."""
    known = [one for one in ids if one is not None][:2]
    parent = ontology.common_parent(known) if len(known) > 1 else None
    return None if parent is None or parent.id in TOO_GENERAL else parent


def _notes(labels: np.ndarray, clusters: np.ndarray, least_cells: int) -> list[str]:
    unknown = int((labels == UNKNOWN).sum())
    left = unknown - int((clusters != "").sum())
    if not unknown:
        return ["no cell is called Unknown: a higher --reject calls more so"]
    if left == unknown:
        return [
            f"{unknown:,} of {len(labels):,} cells are called Unknown, too few alike for a cluster of {least_cells}"
        ]
    notes = [f"{unknown:,} of {len(labels):,} cells are called Unknown"]
    if left:
        notes.append(f"{left:,} of them are in no cluster: groups of fewer than {least_cells} cells")
    return notes

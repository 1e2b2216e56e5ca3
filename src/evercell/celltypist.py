"""CellTypist's calls and result object, for scripts that were written for it: only the import changes.

>>> from evercell import celltypist
>>> predictions = celltypist.annotate(adata, model="human-immune", majority_voting=True)  # doctest: +SKIP
>>> adata = predictions.to_adata()  # doctest: +SKIP

What differs from CellTypist: raw counts are looked for (normalised ones are turned back where that is exact),
probabilities of a cell are calibrated and sum to one, and clusters are made from the model's representation.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from evercell.annotation import annotate as annotate_cells
from evercell.annotator import Annotator
from evercell.cells import read_cells
from evercell.choosing import model_for
from evercell.colours import stored_colours
from evercell.errors import CellsError, SettingsError
from evercell.registry import AUTO

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["AnnotationResult", "annotate"]


class AnnotationResult:
    """What CellTypist calls by this name.

    Attributes
    ----------
    predicted_labels
        One row a cell: ``predicted_labels``, never "Unknown"; with a vote ``over_clustering``, ``majority_voting``.
    decision_matrix
        Log odds of each type (columns): CellTypist's sigmoid of them is the probability.
    probability_matrix
        Calibrated probability of each type, types in the order of the alphabet.
    cell_count
        Number of cells.
    adata
        The cells.
    """

    def __init__(
        self, labels: pd.DataFrame, decision_mat: pd.DataFrame, prob_mat: pd.DataFrame, adata: AnnData
    ) -> None:
        self.predicted_labels = labels
        self.decision_matrix = decision_mat
        self.probability_matrix = prob_mat
        self.adata = adata
        self.cell_count = len(labels)

    def summary_frequency(self, by: str = "predicted_labels") -> pd.DataFrame:
        """Number of cells of each label in a column of `predicted_labels`, most first: ``celltype``, ``counts``."""
        counts = self.predicted_labels[self._column(by)].astype(str).value_counts().sort_index(kind="stable")
        counts = counts.sort_values(ascending=False, kind="stable")
        return pd.DataFrame({"celltype": counts.index.to_numpy(), "counts": counts.to_numpy()})

    def to_adata(
        self,
        *,
        insert_labels: bool = True,
        insert_conf: bool = True,
        insert_conf_by: str = "predicted_labels",
        insert_decision: bool = False,
        insert_prob: bool = False,
        prefix: str = "",
    ) -> AnnData:
        """The AnnData that was given, with the columns of `predicted_labels`, ``conf_score`` and matrices in ``obs``.

        Parameters
        ----------
        insert_labels, insert_conf, insert_decision, insert_prob
            What to insert; probabilities go before decisions.
        insert_conf_by
            Column whose label the confidence is of: ``predicted_labels`` or ``majority_voting``.
        prefix
            Before each name.
        """
        obs, proba = self.adata.obs, self.probability_matrix
        if insert_labels:
            for name, column in self.predicted_labels.items():
                obs[f"{prefix}{name}"] = column
            inserted = obs[[f"{prefix}{name}" for name in self.predicted_labels]]
            self.adata.uns.update(stored_colours(inserted, [str(one) for one in self.adata.uns["evercell"]["classes"]]))
        if insert_conf:
            label = self.predicted_labels[self._column(insert_conf_by)]
            place = proba.columns.get_indexer(pd.Index(label.astype(str)))
            own = proba.to_numpy()[np.arange(len(proba)), np.maximum(place, 0)]
            obs[f"{prefix}conf_score"] = np.where(place >= 0, own, proba.max(axis=1))
        if insert_prob or insert_decision:
            for name, column in (proba if insert_prob else self.decision_matrix).items():
                obs[f"{prefix}{name}"] = column
        return self.adata

    def to_plots(
        self, folder: str | os.PathLike[str], *, plot_probability: bool = False, format: str = "pdf", prefix: str = ""
    ) -> None:
        """Draw a UMAP of each column of `predicted_labels`, and of each type, into a folder.

        A UMAP that the cells have is taken; else one of the model's representation is made.
        """
        import matplotlib.pyplot as plt
        import scanpy as sc

        target, adata = _folder(folder), self.to_adata()
        if "X_umap" not in adata.obsm:
            sc.pp.neighbors(adata, use_rep="X_evercell")
            sc.tl.umap(adata)

        def draw(cells: AnnData, columns: list[str], name: str) -> None:
            sc.pl.umap(cells, color=columns, show=False)
            plt.savefig(target / f"{prefix}{name.replace('/', '_')}.{format}", bbox_inches="tight")
            plt.close()

        for name in self.predicted_labels:
            draw(adata, [str(name)], str(name))
        for name in self.probability_matrix if plot_probability else ():
            both = {"decision score": self.decision_matrix[name], "probability": self.probability_matrix[name]}
            draw(sc.AnnData(obs=pd.DataFrame(both), obsm={"X_umap": adata.obsm["X_umap"]}), list(both), str(name))

    def to_table(self, folder: str | os.PathLike[str], *, prefix: str = "", xlsx: bool = False) -> None:
        """Write the three tables into a folder: as CSV, or as the sheets of one Excel file (needs openpyxl)."""
        target = _folder(folder)
        tables = {
            "predicted_labels": self.predicted_labels,
            "decision_matrix": self.decision_matrix,
            "probability_matrix": self.probability_matrix,
        }
        if not xlsx:
            for name, one in tables.items():
                one.to_csv(target / f"{prefix}{name}.csv")
            return
        try:
            with pd.ExcelWriter(target / f"{prefix}annotation_result.xlsx") as writer:
                for name, one in tables.items():
                    one.to_excel(writer, sheet_name=name.replace("_", " ").title())
        except ModuleNotFoundError as error:
            raise SettingsError(
                "an Excel file needs openpyxl", hint="pip install openpyxl, or leave out xlsx"
            ) from error

    def _column(self, name: str) -> str:
        if name not in self.predicted_labels:
            columns = ", ".join(f"`{one}`" for one in self.predicted_labels)
            raise SettingsError(
                f"predicted_labels has no column `{name}`; columns: {columns}",
                hint="annotate with majority_voting=True",
            )
        return name

    def __repr__(self) -> str:
        columns = ", ".join(f"'{one}'" for one in self.predicted_labels)
        n_types = self.probability_matrix.shape[1]
        return (
            f"CellTypist prediction result for {self.cell_count} query cells\n"
            f"    predicted_labels: data frame with {self.predicted_labels.shape[1]} columns ({columns})\n"
            f"    decision_matrix: data frame with {self.cell_count} query cells and {n_types} cell types\n"
            f"    probability_matrix: data frame with {self.cell_count} query cells and {n_types} cell types\n"
            "    adata: AnnData object referred"
        )


def annotate(
    filename: AnnData | str | os.PathLike[str],
    model: str | os.PathLike[str] | Annotator = AUTO,
    *,
    mode: str = "best match",
    majority_voting: bool = False,
    over_clustering: str | Sequence[object] | None = None,
    min_prop: float = 0.0,
) -> AnnotationResult:
    """Label cells as ``celltypist.annotate`` is called.

    Parameters
    ----------
    filename
        Cells with counts: an AnnData, or a file.
    model
        Name of a model, its directory, an `Annotator`, or ``"auto"``.
    mode
        ``"best match"``; CellTypist's "prob match" has no counterpart here.
    majority_voting
        Vote on the labels in clusters.
    over_clustering
        Clusters to vote in: a column of ``obs``, or one for each cell. By default they are made.
    min_prop
        Clusters in which a smaller share of the cells agrees are "Heterogeneous".

    Returns
    -------
    AnnotationResult
        Its ``adata`` holds what evercell writes as well, so ``obs["evercell"]`` says which cells are Unknown.

    Raises
    ------
    CellsError, GenesError, LabelsError, ModelError, SettingsError
    """
    if mode != "best match":
        raise SettingsError(f"mode is `{mode}`", hint='pass "best match"; obs["evercell"] tells cells of no known type')
    if isinstance(filename, str | os.PathLike):
        name, adata = str(filename), read_cells(filename)
    else:
        name, adata = "the data", filename
    found, called = model_for(model, adata, name=name)
    clusters: pd.Categorical[Any] | None = None
    majority: bool | str = majority_voting
    if majority_voting and isinstance(over_clustering, str):
        majority = over_clustering
    elif majority_voting and over_clustering is not None:
        clusters, majority = pd.Categorical([str(one) for one in over_clustering]), False
        if len(clusters) != adata.n_obs:
            raise SettingsError(f"over_clustering has {len(clusters):,} entries for {adata.n_obs:,} cells")
    result = annotate_cells(found, adata, majority=majority, name=name, model_name=called)
    if clusters is not None:
        result = replace(result, clusters=clusters)
    result.write_into(adata)
    labels = result.celltypist(least_share=min_prop).drop(columns="conf_score")
    types = sorted(result.types)
    proba = result.probabilities[:, [result.types.index(one) for one in types]].astype(np.float64)
    inside = np.clip(proba, 1e-12, 1 - 1e-12)
    odds, chances = (pd.DataFrame(one, labels.index, types) for one in (np.log(inside / (1 - inside)), proba))
    return AnnotationResult(labels, odds, chances, adata)


def _folder(path: str | os.PathLike[str]) -> Path:
    if not Path(path).is_dir():
        raise CellsError(f"the folder `{path}` does not exist", hint="make it first")
    return Path(path)

"""Scanpy's way to call evercell: ``ec.tl.annotate(adata, model="human-immune")`` writes into the AnnData.

Figures are Scanpy's own: ``sc.pl.umap(adata, color="evercell")`` draws every type in its colour.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, TypeAlias

from evercell.annotation import add_majority
from evercell.annotation import annotate as annotate_cells
from evercell.annotation import embed as embed_cells
from evercell.annotator import Annotator
from evercell.choosing import model_for
from evercell.colours import stored_colours
from evercell.discovery import discover as discover_types
from evercell.errors import LabelsError
from evercell.evaluation import Evaluation
from evercell.evaluation import evaluate as evaluate_labels
from evercell.labels import listed
from evercell.majority import clusters_in, made_clusters
from evercell.registry import AUTO, load

if TYPE_CHECKING:
    from anndata import AnnData

    Model: TypeAlias = str | os.PathLike[str] | Annotator

__all__ = ["annotate", "colours", "discover", "embed", "evaluate", "majority"]


def annotate(
    adata: AnnData, model: Model = AUTO, *, key_added: str = "evercell", copy: bool = False, **options: Any
) -> AnnData | None:
    """Label cells.

    Parameters
    ----------
    adata
        Cells with counts, in ``X``, ``raw`` or a layer.
    model
        Name of a model, its directory, an `Annotator`, or ``"auto"``: the one that fits these cells best.
    key_added
        Prefix of all names that are written.
    copy
        Give a copy back, and leave `adata` as it is.
    **options
        As `evercell.annotate` takes them: ``reject``, ``majority``, ``layer``, ``species``, ``gene_column``,
        ``empty_cells``, ``device`` and others.

    Returns
    -------
    anndata.AnnData or None
        With `copy` the annotated copy. Written are ``obs``: ``evercell`` (label, "Unknown" where rejected),
        ``evercell_confidence``, ``evercell_unknown_score``, ``evercell_ontology_term_id``; ``obsm``: ``X_evercell``,
        ``evercell_proba``; ``uns``: ``evercell`` (model, coverage, settings), ``evercell_colors``.

    Raises
    ------
    CellsError, GenesError, LabelsError, ModelError, SettingsError

    Examples
    --------
    >>> import evercell as ec
    >>> adata = ec.load_example("tritschler_unseen")
    >>> ec.tl.annotate(adata, model="human-pancreas")  # doctest: +SKIP
    >>> sc.pl.umap(adata, color="evercell")  # doctest: +SKIP
    """
    found, name = model_for(model, adata, **options)
    made = adata.copy() if copy else adata
    annotate_cells(found, made, inplace=True, key_added=key_added, **{"model_name": name, **options})
    return made if copy else None


def embed(
    adata: AnnData, model: Model = AUTO, *, key_added: str = "evercell", copy: bool = False, **options: Any
) -> AnnData | None:
    """Write the representation of each cell to ``obsm["X_evercell"]``, for ``sc.pp.neighbors(use_rep="X_evercell")``.

    Parameters are those of `annotate`; `options` as `evercell.embed` takes them.

    Raises
    ------
    CellsError, GenesError, ModelError, SettingsError

    Examples
    --------
    >>> ec.tl.embed(adata, model="backbone")  # doctest: +SKIP
    """
    found, _ = model_for(model, adata, **options)
    made = adata.copy() if copy else adata
    made.obsm[f"X_{key_added}"] = embed_cells(found, made, **options)
    return made if copy else None


def majority(
    adata: AnnData, clusters: str | None = None, *, key: str = "evercell", copy: bool = False, seed: int = 0
) -> AnnData | None:
    """Write the most frequent label of each cell's cluster to ``obs["evercell_majority"]``.

    The cells are labelled already (`annotate`), and the model is not asked again.

    Parameters
    ----------
    adata
        Labelled cells.
    clusters
        Column of ``obs`` with clusters, such as ``"leiden"``. By default small clusters of the representation are made.
    key
        Prefix of the labels.
    copy
        Give a copy back, and leave `adata` as it is.
    seed
        Seed of the clusters that are made.

    Raises
    ------
    LabelsError
        The cells are not labelled, or there is no such column.

    Examples
    --------
    >>> sc.tl.leiden(adata)  # doctest: +SKIP
    >>> ec.tl.majority(adata, "leiden")  # doctest: +SKIP
    """
    _check_labelled(adata, key)
    made = adata.copy() if copy else adata
    groups = made_clusters(made.obsm[f"X_{key}"], seed=seed) if clusters is None else clusters_in(made.obs, clusters)
    obs, info = made.obs[[key]].copy(), dict(made.uns[key])
    info["notes"] = list(info.get("notes", ()))
    add_majority(obs, info, groups, key=key, column=clusters or "", seed=seed)
    made.obs[f"{key}_majority"] = obs[f"{key}_majority"].cat.remove_unused_categories()
    made.uns[key] = info
    made.uns.update(stored_colours(made.obs[[f"{key}_majority"]], [str(one) for one in info["classes"]]))
    return made if copy else None


def discover(
    adata: AnnData, model: Model = AUTO, *, key_added: str = "evercell", copy: bool = False, **options: Any
) -> AnnData | None:
    """Cluster the cells that are of no type of the model.

    Parameters are those of `annotate`; `options` as `evercell.discover` takes them.

    Returns
    -------
    anndata.AnnData or None
        With `copy` a copy. Written are what `annotate` writes, unless the same model labelled the cells already;
        ``obs["evercell_cluster"]``, missing for cells in none; ``uns["evercell_clusters"]``, a table with a row for
        each cluster: nearest type, marker genes and more (see `evercell.Discovery`).

    Raises
    ------
    CellsError, GenesError, LabelsError, ModelError, SettingsError

    Examples
    --------
    >>> ec.tl.discover(adata, model="human-pancreas")  # doctest: +SKIP
    >>> adata.uns["evercell_clusters"]  # doctest: +SKIP
    """
    found, name = model_for(model, adata, **options)
    made = adata.copy() if copy else adata
    discovery = discover_types(found, made, key=key_added, **{"model_name": name, **options})
    discovery.write_into(made)
    made.uns[f"{key_added}_clusters"] = discovery.table
    return made if copy else None


def evaluate(adata: AnnData, labels: str, *, key: str = "evercell") -> Evaluation:
    """Score labels against the true types; nothing is written.

    Parameters
    ----------
    adata
        Labelled cells.
    labels
        Column of ``obs`` with the true types. A cell of a type that the model does not know is right when it is called
        Unknown.
    key
        Column of ``obs`` to score.

    Raises
    ------
    LabelsError
        There is no such column, or no true type in it.

    Examples
    --------
    >>> print(ec.tl.evaluate(adata, "cell_type").table())  # doctest: +SKIP
    """
    for column in (labels, key):
        if column not in adata.obs:
            raise LabelsError(
                f"there is no column `{column}` in obs; columns: {listed(map(str, adata.obs), 50) or 'none'}",
                hint="name the column of the true types, and with key= that of the labels",
            )
    info = adata.uns.get(key.removesuffix("_majority"), {})
    classes = [str(name) for name in info["classes"]] if "classes" in info else None
    confidence = adata.obs[f"{key}_confidence"].to_numpy() if f"{key}_confidence" in adata.obs else None
    return evaluate_labels(adata.obs[labels], adata.obs[key], confidence=confidence, known_types=classes)


def colours(adata: AnnData, model: Model, *, columns: str | list[str] = "evercell") -> None:
    """Give columns of types the colours of a model: after files were joined, or for the author's own labels.

    Parameters
    ----------
    adata
        Cells; ``uns["NAME_colors"]`` is written.
    model
        Model whose types they are.
    columns
        Columns of ``obs``.

    Raises
    ------
    LabelsError
        A column is missing, or holds something that is no type of the model.

    Examples
    --------
    >>> both = ad.concat([first, second])  # doctest: +SKIP
    >>> ec.tl.colours(both, "human-immune")  # doctest: +SKIP
    """
    types = (model if isinstance(model, Annotator) else load(model)).types.names
    for column in [columns] if isinstance(columns, str) else columns:
        if column not in adata.obs:
            raise LabelsError(f"there is no column `{column}` in obs", hint="name it with columns=")
        if adata.obs[column].dtype != "category":
            adata.obs[column] = adata.obs[column].astype("category")
        found = stored_colours(adata.obs[[column]], types)
        if not found:
            others = [one for one in adata.obs[column].cat.categories if one not in types]
            raise LabelsError(
                f"`{column}` holds {listed(map(str, others))}, which are no types of the model",
                hint="name the model that labelled the cells",
            )
        adata.uns.update(found)


def _check_labelled(adata: AnnData, key: str) -> None:
    if key not in adata.obs or key not in adata.uns:
        raise LabelsError(f"the cells have no labels `{key}`", hint="call ec.tl.annotate first, or pass key=")

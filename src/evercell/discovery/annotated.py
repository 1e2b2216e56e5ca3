"""The annotation that a file holds already, where the same model made it; else a new one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from evercell.annotation import DEFAULT_REJECTION, Annotation, annotate, rejection_rate
from evercell.annotator import Annotator

if TYPE_CHECKING:
    from anndata import AnnData


def annotation_of(
    model: Annotator,
    adata: AnnData,
    *,
    reject: str | float | None,
    key: str,
    layer: str | None,
    species: str,
    gene_column: str | None,
    name: str,
    model_name: str,
    device: str,
    shown: bool | None,
) -> tuple[Annotation, bool]:
    """Annotation of the cells, and whether it was in the file. Parameters are those of `annotate`.

    What is in the file is taken where the same model (by its fingerprint) made it with the rejection that is asked for.
    Cells without counts are kept.
    """
    stored = _stored(model, adata, key)
    rate = rejection_rate(reject, DEFAULT_REJECTION if model.rejector is None else model.rejector.default_rate)
    if stored is not None and stored.info["rejection_rate"] == ("off" if rate is None else rate):
        return stored, True
    made = annotate(
        model,
        adata,
        reject=reject,
        key_added=key,
        layer=layer,
        species=species,
        gene_column=gene_column,
        empty_cells="keep",
        name=name,
        model_name=model_name,
        device=device,
        shown=shown,
    )
    return made, False


def _stored(model: Annotator, adata: AnnData, key: str) -> Annotation | None:
    info = adata.uns.get(key)
    columns = [key, *(f"{key}_{part}" for part in ("confidence", "unknown_score", "ontology_term_id"))]
    arrays = f"{key}_proba", f"X_{key}"
    if not hasattr(info, "get") or info.get("model_fingerprint") != model.fingerprint or "rejection_rate" not in info:
        return None
    if not all(one in adata.obs for one in columns) or not all(one in adata.obsm for one in arrays):
        return None
    proba, representation = (np.asarray(adata.obsm[one], dtype=np.float32) for one in arrays)
    best = np.asarray(model.types.names, dtype=object)[proba.argmax(axis=1)]
    return Annotation(adata.obs[columns].copy(), best, proba, representation, model.types.names, dict(info), key)

"""All that the doctor says of a file: its cells, the labels that are in it, or those that a model would give."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from evercell.annotation import annotate
from evercell.cells import find_counts, read_cells
from evercell.choosing import sample_of
from evercell.doctor.files import check_cells
from evercell.doctor.finding import Finding
from evercell.doctor.results import check_annotation
from evercell.errors import EvercellError

if TYPE_CHECKING:
    from anndata import AnnData

    from evercell.annotator import Annotator


def examine(
    path: str | Path,
    model: Annotator | None = None,
    *,
    key: str = "evercell",
    layer: str | None = None,
    species: str = "auto",
    gene_column: str | None = None,
    device: str = "auto",
) -> list[Finding]:
    """Look at a file before a run or after one.

    Parameters
    ----------
    path
        Cells. Where they are annotated (``obs[key]``), the labels are looked at too.
    model
        A model to compare with. Of a file that is not annotated it labels a sample of the cells to see how it fits;
        an annotated file should have been annotated by it.
    key
        Prefix of the annotation.
    layer, species, gene_column, device
        As in `annotate`; found if not given.

    Returns
    -------
    list of Finding
        Nothing is changed.
    """
    try:
        adata = read_cells(path, layer=layer)
    except EvercellError as error:
        return [Finding("error", "counts", error.message, mend=error.hint or "")]
    found = check_cells(adata, None if model is None else model.vocabulary, name=str(path),
                         layer=layer, species=species, gene_column=gene_column)  # fmt: skip
    if key in adata.obs:
        found += _other_model(adata, model, key)
        return found + check_annotation(adata, key=key, model=model)
    if model is None or model.rejector is None or any(one.severity == "error" for one in found):
        return found
    more = tried(adata, model, name=str(path), layer=layer, species=species, gene_column=gene_column, device=device)
    return found + more


def _other_model(adata: AnnData, model: Annotator | None, key: str) -> list[Finding]:
    by = str(adata.uns.get(key, {}).get("model_fingerprint", "")) if model is not None else ""
    if model is None or not by or by == model.fingerprint:
        return []
    return [
        Finding(
            "warning",
            "model",
            f"the cells were annotated by the model {by[:12]}",
            f"{model.fingerprint[:12]}, the model that is named here",
            "the model was updated since, or another one was used",
            "annotate the file again, or pass the --model that annotated it",
        )
    ]


def tried(
    adata: AnnData,
    model: Annotator,
    *,
    layer: str | None = None,
    species: str = "auto",
    gene_column: str | None = None,
    name: str = "the data",
    device: str = "auto",
) -> list[Finding]:
    """What the labels of a sample of the cells would be like."""
    counts = find_counts(adata, layer=layer, name=name, empty_cells="keep")
    try:
        sample = sample_of(counts, name)
        annotate(model, sample, inplace=True, species=species, gene_column=gene_column, empty_cells="keep",
                 name=name, device=device, shown=False)  # fmt: skip
    except EvercellError as error:
        return [Finding("error", "labels", error.message, mend=error.hint or "")]
    said = Finding("info", "model tried", f"on {sample.n_obs:,} of {adata.n_obs:,} cells, evenly spaced over the file")
    return [said, *check_annotation(sample, model=model)]

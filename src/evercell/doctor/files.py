"""Can a file be used: what its matrices hold, whether its genes are known, and whether its cells look like cells."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from evercell.cells import Counts, find_counts, read_cells
from evercell.doctor.cells import sign_findings
from evercell.doctor.finding import Finding
from evercell.doctor.genes import gene_findings
from evercell.doctor.signs import signs
from evercell.errors import EvercellError
from evercell.genes import canonical_genes
from evercell.labels import label_columns, listed

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData

    from evercell.genes import GeneVocabulary

DONORS = re.compile(r"donor|patient|subject|individual|batch|sample|library|dataset|study|channel", re.IGNORECASE)
MANY_MORE_GENES = 2  # another matrix of this many times the genes is the one to use


def check_cells(
    cells: str | Path | AnnData,
    vocabulary: GeneVocabulary | None = None,
    *,
    layer: str | None = None,
    species: str = "auto",
    gene_column: str | None = None,
    name: str = "",
) -> list[Finding]:
    """Look at cells before a run.

    Parameters
    ----------
    cells
        A file of a kind that `read_cells` reads, or an AnnData.
    vocabulary
        Genes of a model, to say how many of them were measured.
    layer, species, gene_column
        As in `annotate`; found if not given.
    name
        For messages; the path if not given.

    Returns
    -------
    list of Finding
        With an ``error`` where `annotate` and `train` would refuse the file, or where names and values cannot belong
        together. Nothing is changed.
    """
    is_path = isinstance(cells, str | Path)
    name = name or (str(cells) if is_path else "the data")
    try:
        adata = read_cells(cells, layer=layer) if isinstance(cells, str | Path) else cells
        counts = find_counts(adata, layer=layer, name=name, empty_cells="keep")
    except EvercellError as error:
        return [Finding("error", "counts", error.message, "raw counts of each cell", mend=error.hint or "")]
    findings = [Finding("info", "file", f"`{name}`: {adata.n_obs:,} cells, {adata.n_vars:,} genes")]
    findings += _values(adata, counts, name)
    findings += gene_findings(counts, vocabulary, name, species=species, column=gene_column)
    if not any(one.severity == "error" for one in findings):  # signs are read from genes by name
        genes = canonical_genes(counts.genes, species=species, column=gene_column)
        findings += sign_findings(signs(counts, genes))
    return findings + list(_columns(adata.obs))


def _values(adata: AnnData, counts: Counts, name: str) -> Iterable[Finding]:
    """What each matrix of the file holds, the one that is used first."""
    how = "raw counts" if counts.transform == "none" else f"no raw counts, but they can be had back: {counts.transform}"
    yield Finding("info", "counts", f"taken from {counts.source}, {how}")
    for note in counts.notes:
        yield Finding("info", "counts", note)
    sources = {"X": adata.X is not None, "raw": adata.raw is not None, **dict.fromkeys(map(str, adata.layers), True)}
    used = {"raw.X": "raw"}.get(counts.source, counts.source.removeprefix("layers['").removesuffix("']"))
    for source in (one for one, there in sources.items() if there and one != used):
        try:
            other = find_counts(adata, layer=source, name=name, empty_cells="keep")
        except EvercellError as error:
            yield Finding("info", f"not used: {source}", error.message)
            continue
        said = "raw counts" if other.transform == "none" else other.transform
        if other.shape[1] >= MANY_MORE_GENES * counts.shape[1]:
            yield Finding(
                "warning",
                f"not used: {source}",
                f"{said} of {other.shape[1]:,} genes, where {counts.source} has {counts.shape[1]:,}",
                "the matrix with the most genes",
                "variable genes were chosen and the full matrix kept beside them",
                f"pass --layer {source}",
            )
        else:
            yield Finding("info", f"not used: {source}", said)


def _columns(obs: pd.DataFrame) -> Iterable[Finding]:
    """Columns of `obs` that may hold cell types or donors."""
    donors = [str(one) for one in obs if DONORS.search(str(one)) and 2 <= obs[one].nunique() <= max(2, len(obs) // 2)]
    labels = [one for one in label_columns(obs) if one not in donors]
    said = listed(labels, 5) if labels else "no column of obs looks like cell types; they are needed for training only"
    yield Finding("info", "--labels", said)
    yield Finding("info", "--donor or --batch", listed(donors, 5) if donors else "no column of obs looks like donors")

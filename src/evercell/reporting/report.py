"""write_report: one self-contained HTML page about annotated cells."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from evercell.colours import UNKNOWN, type_colours
from evercell.doctor import check_annotation
from evercell.errors import CellsError, EvercellError
from evercell.progress import progress
from evercell.reporting import figures, findings
from evercell.reporting.annotated import agreement_of, cell_table, overview_of, sample_columns, sequence
from evercell.reporting.cell_map import (
    drawing_order,
    n_genes,
    packed_genes,
    packed_map,
    stratified_sample,
)
from evercell.reporting.findings import Overview
from evercell.reporting.known_markers import known_markers
from evercell.reporting.markers import Markers, rank_markers
from evercell.reporting.page import versions, write_page
from evercell.reporting.stages import history
from evercell.reporting.umap import NEIGHBOURS, umap

if TYPE_CHECKING:
    from anndata import AnnData

    from evercell.cells import Counts

MOST_CELLS_DRAWN = 100_000
MOST_SAMPLES = 40
GENES_A_TYPE = 3


@progress("writing the report")
def write_report(
    adata: AnnData,
    path: str | Path,
    *,
    key: str = "evercell",
    truth: str | None = None,
    old_labels: str | None = None,
    basis: str | None = None,
    title: str | None = None,
    stages: Sequence[Mapping[str, Any]] = (),
    warnings: Sequence[str] = (),
    markers: Mapping[str, Sequence[str]] | None = None,
) -> Path:
    """Write one HTML page about annotated cells: readable offline, on a phone and in print.

    The page holds everything it shows and asks nothing of any other machine. `adata` is not changed. The same input
    gives the same page.

    Parameters
    ----------
    adata
        Cells annotated by evercell: ``obs[key]``, and where present ``obs[f"{key}_confidence"]``,
        ``obs[f"{key}_unknown_score"]``, ``obs[f"{key}_ontology_term_id"]``, ``obs[f"{key}_majority"]``,
        ``obs[f"{key}_set"]``, ``obs[f"{key}_lineage"]``, ``obsm[f"X_{key}"]`` (B, D), ``uns[key]``.
    path
        The HTML file; replaced whole or not at all.
    key
        Prefix of the annotation.
    truth
        Column of ``obs`` with labels to score against. Cells without a label there are not scored.
    old_labels
        Column of ``obs`` with earlier labels or clusters, shown beside the new labels; `truth` or a usual name
        (``cell_type``, ``leiden``, ...) if None.
    basis
        Key of ``obsm`` with (B, 2) coordinates of the map, for example ``X_umap``; a UMAP of the representation if
        None.
    title
        Heading of the page.
    stages
        Facts of the stages of the model, from its ledger, for its history.
    warnings
        Sentences to show under what needs attention.
    markers
        Type to genes for the dot plot, instead of known markers and the highest ranked genes of each type. An empty
        mapping leaves the dot plot out.

    Returns
    -------
    Path
        `path`.

    Raises
    ------
    CellsError
        There are no cells, or ``obsm[basis]`` is missing.
    LabelsError
        ``obs[key]``, `truth` or `old_labels` is missing, or `truth` holds no label.

    Examples
    --------
    >>> write_report(annotated, "report.html", truth="cell_type")  # doctest: +SKIP
    """
    cells = cell_table(adata, key=key, truth=truth, old_labels=old_labels)
    settings = dict(adata.uns.get(key, {}))
    seed = int(settings.get("seed") or 0)
    classes = [str(name) for name in sequence(settings.get("classes"))]
    named = {
        name for column in ("label", "truth", "old", "majority") if column in cells for name in cells[column].dropna()
    }
    colours = type_colours(named, first=classes)
    agreement = agreement_of(cells)
    overview = overview_of(cells, settings, truth=truth, agreement=agreement)
    order = list(overview.types.index)

    drawn = stratified_sample(cells["label"].to_numpy(), MOST_CELLS_DRAWN, seed=seed)
    drawn = drawn[drawing_order(cells["label"].to_numpy()[drawn])]
    points, map_note = _map_points(adata, drawn, key=key, seed=seed, basis=basis)
    counts, ranked, marker_note = _ranked(adata, cells, order, markers)
    known = _known(ranked, overview, settings) if ranked is not None and markers is None else {}
    groups = _groups(ranked, known) if ranked is not None else {}
    overview = replace(overview, known_markers=known)
    packed = None
    if points is not None:
        packed = _packed(adata, cells, drawn, points, colours, samples=sample_columns(adata), truth=truth)
        if counts is not None and ranked is not None:
            chosen = [gene for members in groups.values() for gene, _ in members]
            chosen = list(dict.fromkeys([*chosen, *ranked.variable(n_genes(len(drawn)))]))[: n_genes(len(drawn))]
            packed["genes"] = packed_genes(counts.chunks(), list(ranked.means.columns), chosen, drawn)

    attention = findings.attention(overview, warnings, checked=check_annotation(adata, key=key))
    samples = sample_columns(adata)
    return write_page(
        "cells.html",
        path,
        scripts=("map.js", "cells.js", "page.js") if packed else ("page.js",),
        title=title or "Cell type report",
        key=key,
        overview=overview,
        coverage=findings.coverage_sentence(overview),
        summary=findings.summary(overview, attention),
        attention=attention,
        notes=[str(note) for note in sequence(settings.get("notes"))],
        colours=colours,
        map=packed,
        drawn=len(drawn),
        basis=basis,
        map_note=map_note,
        composition=_composition(adata, cells, samples, order),
        most_samples=MOST_SAMPLES,
        confidence=_confidence(cells),
        unknown=_unknown(cells, settings),
        top_genes={} if ranked is None else ranked.top,
        dots=figures.dot_plot(ranked.means, ranked.shares, groups) if ranked is not None else [],
        marker_note=marker_note,
        truth=truth,
        agreement=agreement,
        confusion=None if agreement is None else figures.shares_table(figures.in_order(agreement.confusion, order)),
        majority_agreement=agreement_of(cells, "majority") if "majority" in cells else None,
        **_old_against_new(cells, order),
        history=history(stages),
        settings=list(_flat(settings)),
        methods=findings.methods(
            overview,
            versions=versions(),
            drawn=None if points is None else len(drawn),
            seed=seed,
            neighbours=min(NEIGHBOURS, len(drawn) - 1),
            ranked=ranked is not None and markers is None,
            basis=basis,
        ),
    )


def _map_points(
    adata: AnnData, drawn: np.ndarray, *, key: str, seed: int, basis: str | None
) -> tuple[np.ndarray | None, str]:
    """(drawn, 2) coordinates of the map, or None and the reason."""
    if basis is not None:
        if basis not in adata.obsm:
            raise CellsError(
                f"`obsm` has no `{basis}`; it has {', '.join(f'`{name}`' for name in adata.obsm) or 'none'}",
                hint="name the coordinates with basis=, or leave it out for a UMAP of the representation",
            )
        return np.asarray(adata.obsm[basis], dtype=float)[drawn][:, :2], ""
    if f"X_{key}" not in adata.obsm:
        return None, f"There is no map: `obsm` holds no `X_{key}`."
    if len(drawn) < NEIGHBOURS:
        return None, f"There is no map: it takes at least {NEIGHBOURS} cells."
    # In the order of the file, so that the order of drawing does not move a cell.
    places = np.argsort(drawn, kind="stable")
    representation = np.asarray(adata.obsm[f"X_{key}"], dtype=np.float32)[drawn[places]]
    if not np.isfinite(representation).all():
        return None, f"There is no map: `obsm['X_{key}']` holds values that are not numbers."
    points = np.empty((len(drawn), 2))
    points[places] = umap(representation, seed=seed)
    return points, ""


def _packed(
    adata: AnnData,
    cells: pd.DataFrame,
    drawn: np.ndarray,
    points: np.ndarray,
    colours: dict[str, str],
    *,
    samples: Sequence[str],
    truth: str | None,
) -> dict[str, Any]:
    """The map as the page draws it."""
    shown = cells.iloc[drawn].copy()
    columns, shades = {"label": "Cell type"}, {"label": colours}
    for name, title in (("majority", "Cell type by majority vote"), ("lineage", "Lineage"), ("old", "")):
        if name in shown:
            columns[name] = title or f"{'Given' if cells.attrs['old'] == truth else 'Old'} labels: {cells.attrs['old']}"
            shades[name] = colours if name != "lineage" else type_colours(shown[name].dropna().unique())
    for number, name in enumerate(samples):
        shown[f"sample-{number}"] = adata.obs[name].astype(str).to_numpy()[drawn]
        columns[f"sample-{number}"] = str(name)
        shades[f"sample-{number}"] = type_colours(shown[f"sample-{number}"].unique())
    scores = {"confidence": "Confidence", "unknown": "Unknown score"}
    scores = {name: text for name, text in scores.items() if name in shown and np.isfinite(shown[name]).any()}
    names = [str(name) for name in adata.obs_names[drawn]]
    return packed_map(points, shown, columns=columns, scores=scores, colours=shades, names=names)


def _composition(
    adata: AnnData, cells: pd.DataFrame, samples: Sequence[str], order: Sequence[str]
) -> list[dict[str, Any]]:
    """Of each column of samples its name, how many there are, and their bars."""
    found = []
    for column in samples:
        counts = pd.crosstab(adata.obs[column].astype(str).to_numpy(), cells["label"].to_numpy())
        largest = counts.sum(axis=1).nlargest(MOST_SAMPLES).index
        rows = figures.composition(counts.loc[[name for name in counts.index if name in largest], list(order)])
        found.append({"column": column, "samples": len(counts), "rows": rows})
    if not found:
        every = cells["label"].value_counts().reindex(list(order)).to_frame("all cells").T
        found.append({"column": "all cells", "samples": 1, "rows": figures.composition(every)})
    return found


def _confidence(cells: pd.DataFrame) -> figures.Histogram | None:
    if "confidence" not in cells or not np.isfinite(cells["confidence"]).any():
        return None
    rejected = (cells["label"] == UNKNOWN).to_numpy()
    return figures.histogram(cells["confidence"].to_numpy(), rejected, name="confidence", limits=(0.0, 1.0))


def _unknown(cells: pd.DataFrame, settings: Mapping[str, Any]) -> figures.Histogram | None:
    if "unknown" not in cells or not np.isfinite(cells["unknown"]).any():
        return None
    values, threshold = cells["unknown"].to_numpy(), settings.get("threshold")
    values = np.where(np.isfinite(values), values, np.nan)  # a cell without a known gene has an infinite score
    line = float(threshold) if isinstance(threshold, int | float | np.number) and np.isfinite(threshold) else None
    marks = [np.nanmin(values), np.nanmax(values), *([] if line is None else [line])]
    limits = (float(min(marks)), float(max(marks)) + 1e-6)
    rejected = (cells["label"] == UNKNOWN).to_numpy()
    return figures.histogram(values, rejected, name="unknown score", limits=limits, line=line)


def _ranked(
    adata: AnnData, cells: pd.DataFrame, order: Sequence[str], markers: Mapping[str, Sequence[str]] | None
) -> tuple[Counts | None, Markers | None, str]:
    """Raw counts of the cells and the marker genes of the labels, or None and why no genes are shown."""
    from evercell.cells import find_counts

    if markers is not None and not markers:
        return None, None, ""
    labels = cells["label"].to_numpy()
    try:
        counts = find_counts(adata, empty_cells="keep")  # a cell without counts is no reason to show no genes
        genes = _gene_names(counts.genes)
        ranked = rank_markers(counts.chunks(), labels, genes, order=order, each=GENES_A_TYPE, chosen=markers)
    except EvercellError as error:
        return None, None, f"Marker genes are not shown: {error.message}."
    if not ranked.top:
        return counts, ranked, "Marker genes are not shown: no label has ten cells."
    note = "No marker genes: they are ranked against the cells of other labels, and there are none."
    return counts, ranked, "" if any(ranked.top.values()) else note


def _known(ranked: Markers, overview: Overview, settings: Mapping[str, Any]) -> dict[str, dict[str, bool]]:
    """Label to its known markers that were measured, each with whether it is raised in the cells of the label."""
    if "ontology" not in overview.types:
        return {}
    species = str(settings.get("species", "human"))
    upper = {gene.upper(): gene for gene in ranked.means.columns}
    found = {}
    for label, term in overview.types["ontology"].items():
        listed = known_markers(term or None, species=species) if label in ranked.means.index else ()
        if listed:
            measured = [upper[gene.upper()] for gene in listed if gene.upper() in upper]
            found[str(label)] = ranked.raised(str(label), measured)
    return found


def _groups(ranked: Markers, known: Mapping[str, Mapping[str, bool]]) -> dict[str, list[tuple[str, bool]]]:
    """Label to the genes of the dot plot: known markers, then the highest ranked of the others; no gene twice."""
    taken: set[str] = set()
    found = {}
    for label, top in ranked.top.items():
        listed = list(known.get(label, ()))[:GENES_A_TYPE]
        genes = [(gene, True) for gene in listed if gene not in taken]
        genes += [(gene, gene in known.get(label, ())) for gene in top if gene not in taken and gene not in listed]
        taken |= {gene for gene, _ in genes}
        found[label] = genes
    return found if taken else {}


def _gene_names(table: pd.DataFrame) -> list[str]:
    """Symbols where the table holds them, else its index; made unique, because a symbol may name two genes."""
    from anndata.utils import make_index_unique

    names = pd.Index(table.index.astype(str))
    if names.str.match(r"ENS[A-Z]*G\d{6}").mean() > 0.5:
        for column in ("gene_symbol", "gene_symbols", "symbol", "feature_name", "gene_name", "gene_names"):
            if column in table:
                symbols = table[column].astype(object)
                names = pd.Index(symbols.where(symbols.notna(), names.to_series(index=table.index)).astype(str))
                break
    return list(make_index_unique(names)) if not names.is_unique else list(names)


def _old_against_new(cells: pd.DataFrame, order: Sequence[str]) -> dict[str, Any]:
    """The flow from the old labels to the new ones, and its largest moves in words."""
    if "old" not in cells or cells["old"].notna().sum() == 0:
        return {"flow": None}
    table = pd.crosstab(cells["old"].fillna("no label"), cells["label"])
    return {
        "flow": figures.flow(table, order),
        "moves": figures.flow_words(table),
        "old_column": cells.attrs["old"],
    }


def _short(value: Any) -> str:
    if isinstance(value, float | np.floating):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int | np.integer) and not isinstance(value, bool) else str(value)


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    """Settings as rows of name and text; nested names are joined with dots."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        elif isinstance(value, list | tuple | np.ndarray):
            yield f"{prefix}{name}", ", ".join(_short(item) for item in np.ravel(np.asarray(value, dtype=object)))
        else:
            yield f"{prefix}{name}", str(value) if name == "seed" else _short(value)

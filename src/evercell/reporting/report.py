"""write_report: one self-contained HTML page about annotated cells."""

from __future__ import annotations

import warnings as python_warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from evercell.colours import UNKNOWN, type_colours
from evercell.doctor import check_annotation
from evercell.errors import CellsError, EvercellError, LabelsError
from evercell.labels import is_unassigned
from evercell.progress import progress
from evercell.reporting import figures, findings
from evercell.reporting.findings import Overview
from evercell.reporting.markers import Markers, rank_markers

if TYPE_CHECKING:
    from anndata import AnnData

    from evercell.evaluation import Evaluation

SAMPLE_COLUMNS = ("sample", "sample_id", "donor", "donor_id", "patient", "batch", "dataset", "library", "condition")
MOST_CELLS_DRAWN = 50_000
MOST_SAMPLES = 40
NEIGHBOURS = 15
GENES_A_TYPE = 3
PACKAGES = ("evercell", "scanpy", "anndata", "umap-learn", "scikit-learn", "numpy", "pandas", "torch")


@progress("writing the report")
def write_report(
    adata: AnnData,
    path: str | Path,
    *,
    key: str = "evercell",
    truth: str | None = None,
    title: str | None = None,
    training: Mapping[str, Any] | None = None,
    warnings: Sequence[str] = (),
    markers: Mapping[str, Sequence[str]] | None = None,
) -> Path:
    """Write one HTML page about annotated cells: readable offline, on a phone and in print.

    The page holds everything it shows, plotly.js included, and asks nothing of any other machine. `adata` is not
    changed. The same input gives the same page.

    Parameters
    ----------
    adata
        Cells annotated by evercell: ``obs[key]``, and where present ``obs[f"{key}_confidence"]``,
        ``obs[f"{key}_unknown_score"]``, ``obs[f"{key}_ontology_term_id"]``, ``obs[f"{key}_majority"]``,
        ``obsm[f"X_{key}"]`` (B, D), ``uns[key]``.
    path
        The HTML file; replaced whole or not at all.
    key
        Prefix of the annotation.
    truth
        Column of ``obs`` with labels to compare with. Cells without a label there are not scored.
    title
        Heading of the page.
    training
        How the model was trained: ``model`` and ``linear`` (each ``accuracy`` and ``macro_f1``), ``split`` in words,
        ``curve`` (records of ``step``, ``loss``, ``validation``) and ``per_type`` (records); all optional.
    warnings
        Sentences to show under what needs attention.
    markers
        Type to genes for the dot plot, instead of the highest ranked genes of each type. An empty mapping leaves the
        dot plot out.

    Returns
    -------
    Path
        `path`.

    Raises
    ------
    CellsError
        There are no cells.
    LabelsError
        ``obs[key]`` or the `truth` column is missing, or `truth` holds no label.

    Examples
    --------
    >>> write_report(annotated, "report.html", truth="cell_type")  # doctest: +SKIP
    """
    from jinja2 import Environment
    from plotly.offline import get_plotlyjs

    from evercell.cells import atomic_path

    context = _contents(adata, key=key, truth=truth, training=training or {}, warnings=warnings, markers=markers)
    template = Path(__file__).with_name("template.html").read_text(encoding="utf-8")
    page = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page.filters |= {"percent": findings.percent}
    html = page.from_string(template).render(title=title or "Cell type report", plotly_js=get_plotlyjs(), **context)
    path = Path(path)
    with atomic_path(path) as temporary:
        Path(temporary).write_text(html, encoding="utf-8")
    return path


def _contents(
    adata: AnnData,
    *,
    key: str,
    truth: str | None,
    training: Mapping[str, Any],
    warnings: Sequence[str],
    markers: Mapping[str, Sequence[str]] | None,
) -> dict[str, Any]:
    """Everything that the template shows."""
    cells = _cell_table(adata, key=key, truth=truth)
    settings = dict(adata.uns.get(key, {}))
    seed = int(settings.get("seed") or 0)
    classes = [str(name) for name in _sequence(settings.get("classes"))]
    given = cells["truth"].dropna() if "truth" in cells else ()
    colours = type_colours({*cells["label"], *given}, first=classes)
    agreement = _agreement(cells)
    overview = _overview(cells, settings, truth=truth, agreement=agreement)

    drawn = stratified_sample(cells["label"].to_numpy(), MOST_CELLS_DRAWN, seed=seed)
    points, map_note = _map_points(adata, drawn, key=key, seed=seed)
    plots: dict[str, Any] = {}
    if points is not None:
        plots["map"] = figures.cell_map(points, cells.iloc[drawn], colours, order=list(overview.types.index))
    samples = _sample_columns(adata)
    for number, column in enumerate(samples):
        counts = pd.crosstab(adata.obs[column].astype(str).to_numpy(), cells["label"].to_numpy())
        largest = counts.sum(axis=1).nlargest(MOST_SAMPLES).index
        counts = counts.loc[[name for name in counts.index if name in largest], overview.types.index]
        plots[f"composition-{number}"] = figures.composition(counts, colours)
    if not samples:
        every = overview.types[["cells"]].T.set_axis(["all cells"])
        plots["composition-0"] = figures.composition(every, colours)
    rejected = (cells["label"] == UNKNOWN).to_numpy()
    if "confidence" in cells:
        values = cells["confidence"].to_numpy()
        plots["confidence"] = figures.histogram(values, rejected, name="confidence", limits=(0.0, 1.0))
    if "unknown" in cells and np.isfinite(cells["unknown"]).any():
        values, threshold = cells["unknown"].to_numpy(), settings.get("threshold")
        line = float(threshold) if isinstance(threshold, int | float | np.number) and np.isfinite(threshold) else None
        marks = [np.nanmin(values), np.nanmax(values), *([] if line is None else [line])]
        limits = (float(min(marks)), float(max(marks)) + 1e-6)
        plots["unknown"] = figures.histogram(values, rejected, name="unknown score", limits=limits, line=line)
    if agreement is not None:
        order = {name: place for place, name in enumerate(overview.types.index)}
        table = agreement.confusion.sort_index(key=lambda names: names.map(lambda name: order.get(name, len(order))))
        columns = sorted(table.columns, key=lambda name: order.get(name, len(order) - 1.5))  # Unknown stays last
        plots["confusion"] = figures.confusion(table[columns])
    if training.get("curve") is not None and len(training["curve"]):
        plots["curve"] = figures.learning_curve(training["curve"])

    ranked, marker_note = _markers(adata, drawn, cells, overview, markers)
    if ranked is not None and len(ranked.genes):
        plots["markers"] = figures.dot_plot(ranked.means[ranked.genes], ranked.shares[ranked.genes])

    attention = findings.attention(overview, warnings, checked=check_annotation(adata, key=key))
    versions = _versions()
    return {
        "key": key,
        "overview": overview,
        "coverage": findings.coverage_sentence(overview),
        "summary": findings.summary(overview, attention),
        "attention": attention,
        "notes": [str(note) for note in _sequence(settings.get("notes"))],
        "colours": colours,
        "drawn": len(drawn),
        "map_note": map_note,
        "samples": samples or ["all cells"],
        "most_samples": MOST_SAMPLES,
        "n_samples": [int(adata.obs[name].nunique()) for name in samples],
        "top_genes": {} if ranked is None else ranked.top,
        "marker_note": marker_note,
        "ontology": "ontology" in overview.types,
        "training": training,
        "training_rows": _records(training.get("per_type")),
        "truth": truth,
        "agreement": agreement,
        "majority_agreement": _agreement(cells, "majority") if "majority" in cells else None,
        "settings": list(_flat(settings)),
        "versions": versions,
        "methods": findings.methods(
            overview,
            versions=versions,
            drawn=None if points is None else len(drawn),
            seed=seed,
            neighbours=min(NEIGHBOURS, len(drawn) - 1),
            ranked=ranked is not None and markers is None,
        ),
        "plots": plots,
    }


def _cell_table(adata: AnnData, *, key: str, truth: str | None) -> pd.DataFrame:
    """(B, ...) label and, where present, confidence, unknown, ontology, majority, truth and group of each cell."""
    if adata.n_obs == 0:
        raise CellsError("there are no cells to report on", hint="check the filter that made this AnnData")
    for column, argument in ((key, "key"), (truth, "truth")):
        if column is not None and column not in adata.obs:
            raise LabelsError(
                f"`obs` has no column `{column}`; it has {', '.join(f'`{name}`' for name in adata.obs) or 'none'}",
                hint=f"name the column with {argument}="
                + (", or annotate the cells first" if argument == "key" else ""),
            )
    obs = adata.obs
    cells = pd.DataFrame({"label": _text(obs[key]).fillna(UNKNOWN).to_numpy()})
    for name, suffix in (("confidence", "confidence"), ("unknown", "unknown_score")):
        if f"{key}_{suffix}" in obs:
            cells[name] = pd.to_numeric(obs[f"{key}_{suffix}"], errors="coerce").to_numpy(dtype=float)
    if f"{key}_ontology_term_id" in obs:
        cells["ontology"] = _text(obs[f"{key}_ontology_term_id"]).to_numpy()
    if f"{key}_majority" in obs:
        cells["majority"] = _text(obs[f"{key}_majority"]).fillna(UNKNOWN).to_numpy()
    if truth is not None:
        given = _text(obs[truth])
        cells["truth"] = given.mask(given.map(is_unassigned)).to_numpy()
    if samples := _sample_columns(adata):
        cells["group"] = obs[samples[0]].astype(str).to_numpy()
    return cells


def _text(column: pd.Series) -> pd.Series:
    """Labels as text; missing and empty ones as missing."""
    text = column.astype(object).where(column.notna(), None)
    return text.map(lambda value: str(value).strip() or None, na_action="ignore")


def _overview(
    cells: pd.DataFrame, settings: dict[str, Any], *, truth: str | None, agreement: Evaluation | None
) -> Overview:
    by_label = cells.groupby("label")
    types = pd.DataFrame({"cells": by_label.size()})
    types["share"] = types["cells"] / len(cells)
    if "confidence" in cells:
        types["confidence"] = by_label["confidence"].mean()
    if "ontology" in cells:
        types["ontology"] = by_label["ontology"].agg(lambda terms: next(iter(terms.mode()), ""))
    if "majority" in cells:
        types["majority"] = cells["majority"].value_counts().reindex(types.index, fill_value=0)
    types = types.sort_values("cells", ascending=False, kind="stable")
    types = types.loc[[*types.index.drop(UNKNOWN, errors="ignore"), *types.index.intersection([UNKNOWN])]]
    confidence = cells["confidence"].dropna() if "confidence" in cells else pd.Series(dtype=float)
    return Overview(
        types=types,
        confidence=float(confidence.mean()) if len(confidence) else None,
        confident=float((confidence >= 0.8).mean()) if len(confidence) else None,
        settings=settings,
        truth=truth,
        accuracy=None if agreement is None else float(agreement.accuracy),
        macro_f1=None if agreement is None else float(agreement.macro_f1),
        per_type=None if agreement is None else agreement.per_type,
    )


def stratified_sample(labels: np.ndarray, most: int, *, seed: int) -> np.ndarray:
    """Places of at most about `most` cells: the same share of every label, but never fewer than 50 cells of one.

    Parameters
    ----------
    labels
        (B,) labels.
    most
        All cells are taken where there are no more than this.
    seed
        Seed of the draw.

    Returns
    -------
    numpy.ndarray
        Ascending places.
    """
    if len(labels) <= most:
        return np.arange(len(labels))
    generator = np.random.default_rng(seed)
    chosen = []
    for name in np.unique(labels):
        here = np.flatnonzero(labels == name)
        wanted = max(int(len(here) * most / len(labels)), min(len(here), 50))
        chosen.append(generator.choice(here, wanted, replace=False))
    return np.sort(np.concatenate(chosen))


def _map_points(adata: AnnData, drawn: np.ndarray, *, key: str, seed: int) -> tuple[np.ndarray | None, str]:
    """(drawn, 2) UMAP of the representation, or None and the reason."""
    if f"X_{key}" not in adata.obsm:
        return None, f"There is no map: `obsm` holds no `X_{key}`."
    representation = np.asarray(adata.obsm[f"X_{key}"], dtype=np.float32)[drawn]
    if len(drawn) < NEIGHBOURS:
        return None, f"There is no map: it takes at least {NEIGHBOURS} cells."
    if not np.isfinite(representation).all():
        return None, f"There is no map: `obsm['X_{key}']` holds values that are not numbers."
    import anndata
    import scanpy as sc

    # An AnnData of its own: neighbours and coordinates must not end up in the caller's.
    space = anndata.AnnData(obs=pd.DataFrame(index=pd.RangeIndex(len(drawn)).astype(str)))
    space.obsm["X"] = representation
    with python_warnings.catch_warnings():
        python_warnings.simplefilter("ignore")  # umap-learn says that a seed means one thread
        sc.pp.neighbors(space, n_neighbors=NEIGHBOURS, use_rep="X", random_state=seed)
        sc.tl.umap(space, random_state=seed)
    return np.asarray(space.obsm["X_umap"]), ""


def _sample_columns(adata: AnnData) -> list[str]:
    """Columns of `obs` that say where a cell comes from, without those that part the cells as an earlier one does."""
    found: dict[bytes, str] = {}
    for column in SAMPLE_COLUMNS:
        if column in adata.obs and 1 < adata.obs[column].nunique() < max(adata.n_obs // 2, 2):
            codes, _ = pd.factorize(adata.obs[column].astype(str))
            found.setdefault(codes.tobytes(), column)
    return list(found.values())[:4]


def _markers(
    adata: AnnData,
    drawn: np.ndarray,
    cells: pd.DataFrame,
    overview: Overview,
    markers: Mapping[str, Sequence[str]] | None,
) -> tuple[Markers | None, str]:
    """Marker genes of the labels in the drawn cells, or None and the reason."""
    from evercell.cells import find_counts

    if markers is not None and not markers:
        return None, ""
    try:
        found = find_counts(adata, empty_cells="keep")  # a cell without counts is no reason to show no genes
    except EvercellError as error:
        return None, f"Marker genes are not shown: {error.message}."
    genes = [str(name) for name in pd.Index(_gene_names(found.genes))]
    labels = cells["label"].to_numpy()[drawn]
    order = list(overview.types.index)
    counts = found.to_csr()[drawn]
    ranked = rank_markers(counts, labels, genes, order=order, each=GENES_A_TYPE, chosen=markers)
    if not ranked.top:
        return None, "Marker genes are not shown: no label has ten cells."
    if not ranked.genes:
        return ranked, "No marker genes: they are ranked against the cells of other labels, and there are none."
    return ranked, ""


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


def _agreement(cells: pd.DataFrame, column: str = "label") -> Evaluation | None:
    """Agreement of a column of labels with the given labels; None where no column of them was named."""
    from evercell.evaluation import evaluate

    if "truth" not in cells:
        return None
    confidence = cells["confidence"].to_numpy() if "confidence" in cells and column == "label" else None
    if confidence is not None and not ((confidence >= 0) & (confidence <= 1)).all():
        confidence = None  # not a probability for every cell, so there is no calibration to speak of
    return evaluate(cells["truth"], cells[column], confidence=confidence)


def _sequence(value: Any) -> list[Any]:
    """A list of what may be a list, an array (as read from a file), one value or nothing."""
    if value is None:
        return []
    return [value] if isinstance(value, str) else list(np.atleast_1d(value))


def _records(table: Any) -> list[dict[str, Any]]:
    """Rows as dictionaries, numbers written short."""
    rows = table.to_dict("records") if isinstance(table, pd.DataFrame) else table or ()
    return [{str(name): _short(value) for name, value in row.items()} for row in rows]


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


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found

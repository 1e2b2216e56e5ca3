"""Which of the models there are fits the cells of a query: what ``--model auto`` does."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.sparse as sp

from evercell import registry
from evercell.annotation import annotate
from evercell.annotator import Annotator
from evercell.cells import Counts, find_counts
from evercell.errors import CellsError, EvercellError, ModelError
from evercell.gene_names import canonical_genes
from evercell.genes import align
from evercell.progress import progress
from evercell.training import choose_device

if TYPE_CHECKING:
    from anndata import AnnData

SAMPLED = 300
"""Most cells that are tried: a share of them has a standard error of 3 points or less."""

LEAST_KNOWN = 0.25
"""Least share of the query's counts that a model has to know: of less, its labels rest on a corner of each cell."""

CLOSE = 0.05
"""Scores that differ by less say the same. Then the model wins more of whose types the query shows: T cells of blood
are T cells to a model of lungs as well, but little else of a lung is among them."""

FITTING = 0.5
"""Score below which no model is said to fit well: less than half of the cells are expected to be labelled right."""


@dataclass(frozen=True)
class Tried:
    """One model, tried on cells of the query.

    Attributes
    ----------
    name, path
        Of the model.
    genes
        Share of the model's genes that the query measured.
    known
        Share of the query's counts that are of genes of the model.
    kept
        Share of the cells not called Unknown, at the model's own rate.
    confidence
        Mean calibrated confidence in the labels of these; 0 where there are none.
    shown
        Share of the model's types that a hundredth of these cells or more are labelled with.
    out
        Why it cannot be chosen; empty for a model that can.
    """

    name: str
    path: Path
    genes: float = 0.0
    known: float = 0.0
    kept: float = 0.0
    confidence: float = 0.0
    shown: float = 0.0
    out: str = ""

    @property
    def score(self) -> float:
        """Share of all cells that the model expects to label right.

        A cell called Unknown gets no label; of the others a calibrated confidence is the chance that the label is
        right. So the expected share is kept * confidence: a model that is sure of few cells loses to one that is nearly
        as sure of most, and a model that labels everything without being sure of it wins nothing. To three decimals, as
        it is shown: what looks like a tie is one.
        """
        return round(self.kept * self.confidence, 3)


@dataclass(frozen=True)
class Choice:
    """The model that fits a query best, and why.

    Attributes
    ----------
    name, path
        Of the model.
    rows
        One for each model that was tried, the chosen one first, those that are out last.
    reason
        Why this one, in a sentence.
    warning
        That no model fits well, with the figures; empty where one does.
    n_cells
        Number of cells that were tried.
    """

    name: str
    path: Path
    rows: tuple[Tried, ...]
    reason: str
    warning: str
    n_cells: int

    def text(self) -> str:
        """The figures as a table."""
        header = ("model", "genes measured", "counts known", "cells labelled", "confidence", "score", "types shown")
        width = max(len(one) for one in (header[0], *(row.name for row in self.rows)))
        lines = ["  ".join([f"{header[0]:<{width}}", *header[1:]])]
        for row in self.rows:
            figures = [f"{row.genes:.0%}", f"{row.known:.0%}", f"{row.kept:.0%}", f"{row.confidence:.2f}"]
            figures += [f"{row.score:.3f}", f"{row.shown:.0%}"]
            cells = [f"{one:>{len(name)}}" for one, name in zip(figures, header[1:], strict=True)]
            lines.append("  ".join([f"{row.name:<{width}}", *([f"out: {row.out}"] if row.out else cells)]))
        return "\n".join(lines)


def choose(
    query: AnnData | Counts,
    *,
    models: Iterable[registry.ListedModel] | None = None,
    layer: str | None = None,
    species: str = "auto",
    gene_column: str | None = None,
    adapt: bool = True,
    name: str = "the data",
    device: str = "auto",
) -> Choice:
    """Choose the model that expects to label most cells of a query right.

    Every model labels some cells of the query, evenly spaced over the file, as `annotate` would. The best is the one
    with the highest `Tried.score`, or of those within `CLOSE` of it the one more of whose types are shown; of equals
    the first by name. A model of few types is easily sure of itself, and only
    its rejection keeps it from being chosen for cells that it does not know: look at the table.

    Parameters
    ----------
    query
        Cells with counts, in memory or backed, or their counts.
    models
        Those to choose from; by default all that are `registry.available`. Those without cell types are left out.
    layer, species, gene_column, adapt, name, device
        As for `annotate`.

    Returns
    -------
    Choice

    Raises
    ------
    ModelError
        If there is no model with cell types, or none that can read the genes of the query.
    CellsError, GenesError
        If no model could use the query.

    Examples
    --------
    >>> from evercell.choosing import choose
    >>> from evercell.examples import load_example
    >>> choose(load_example("tritschler_unseen")).name  # doctest: +SKIP
    'human-pancreas'
    """
    listed = registry.with_types(models)
    choose_device(device)
    counts = query if isinstance(query, Counts) else find_counts(query, layer=layer, name=name, empty_cells="keep")
    canonical_genes(counts.genes, species=species, column=gene_column)  # a wrong word is no fault of the models
    sample = sample_of(counts, name)
    how: dict[str, Any] = {"species": species, "gene_column": gene_column, "adapt": adapt}
    tried = []
    with progress("trying models") as step:
        for number, one in enumerate(listed, 1):
            tried.append(_tried(one, sample, name=name, device=device, **how))
            step(number, len(listed), None)
    rows = sorted(tried, key=lambda row: (bool(row.out), -row.score, row.name))
    near = [row for row in rows if not row.out and row.score > rows[0].score - CLOSE]
    best = max(near, key=lambda row: row.shown, default=rows[0])  # the first of equals
    others = [row for row in rows if row is not best]
    rows = [best, *others]
    if best.out:
        reasons = "; ".join(f"`{row.name}`: {row.out}" for row in rows)
        raise ModelError(
            f"no model can label the cells of `{name}`: {reasons}",
            hint="name one with --model to see what would mend it, or make one with `evercell train`",
        )
    reason = (
        f"`{best.name}` is chosen: it labels {best.kept:.0%} of {sample.n_obs:,} cells, with a mean confidence of "
        f"{best.confidence:.2f}"
    )
    if others and not others[0].out:
        next_best = others[0]
        reason += f" (score {best.score:.3f}; the next, `{next_best.name}`, has {next_best.score:.3f})"
        if next_best.score >= best.score:
            reason += f", and {best.shown:.0%} of its types are among them, of the next {next_best.shown:.0%}"
    warning = ""
    if best.score < FITTING:
        warning = (
            f"no model fits these cells well: the best, `{best.name}`, labels {best.kept:.0%} of {sample.n_obs:,} "
            f"cells with a mean confidence of {best.confidence:.2f}, and knows {best.known:.0%} of their counts; "
            "`evercell train` makes a model from labelled cells of their kind"
        )
    return Choice(best.name, best.path, tuple(rows), reason, warning, sample.n_obs)


def model_for(model: str | os.PathLike[str] | Annotator, query: AnnData, **options: Any) -> tuple[Annotator, str]:
    """The model that is meant, and its name.

    Parameters
    ----------
    model
        Name, directory, ``"auto"``, or the model itself.
    query
        Cells that ``"auto"`` has to fit; where no model fits well, a warning says so.
    **options
        Those of `choose` among them are passed on.
    """
    if isinstance(model, Annotator):
        return model, ""
    if model != registry.AUTO:
        return registry.load(model), os.path.basename(os.path.abspath(model))
    shared = ("layer", "species", "gene_column", "adapt", "name", "device")
    choice = choose(query, **{name: options[name] for name in shared if name in options})
    if choice.warning:
        warnings.warn(choice.warning, stacklevel=3)
    return registry.load(choice.path), choice.name


def sample_of(counts: Counts, name: str) -> AnnData:
    """Cells evenly spaced over a query, as counts; those without a count say nothing of a model."""
    import pandas as pd
    from anndata import AnnData

    n_cells = counts.shape[0]
    rows = np.linspace(0, n_cells - 1, min(SAMPLED, n_cells)).round().astype(int)
    taken = sp.vstack([counts.rows(row, row + 1) for row in rows.tolist()], format="csr")
    filled = np.diff(taken.indptr) > 0
    if not filled.any():
        raise CellsError(
            f"`{name}` has no counts in the {len(rows):,} cells that were looked at", hint="choose --model"
        )
    return AnnData(taken[filled], obs=pd.DataFrame(index=counts.cells[rows][filled]), var=counts.genes)


def _tried(
    model: registry.ListedModel,
    sample: AnnData,
    *,
    species: str,
    gene_column: str | None,
    adapt: bool,
    name: str,
    device: str,
) -> Tried:
    """One model on the cells of a query; whatever keeps it from labelling them is the reason that it is out."""
    if model.problem:
        return Tried(model.name, model.path, out=model.problem)
    try:
        loaded = registry.load(model.path)
        alignment = align(sample.var, loaded.vocabulary, species=species, column=gene_column, name=name)
        genes = alignment.coverage.share_of_model
        known = float(alignment.apply(sample.X).sum() / sample.X.sum())
        if known < LEAST_KNOWN:
            return Tried(model.name, model.path, genes, known, out=f"it knows {known:.0%} of the counts of the cells")
        found = annotate(
            loaded,
            sample,
            species=species,
            gene_column=gene_column,
            adapt=adapt,
            empty_cells="keep",
            name=name,
            device=device,
            shown=False,
        )
    except EvercellError as error:
        return Tried(model.name, model.path, out=error.message)
    kept = found.labels != "Unknown"
    confidence = float(found.obs["evercell_confidence"].to_numpy()[kept].mean()) if kept.any() else 0.0
    sizes = np.unique(found.labels[kept], return_counts=True)[1]
    shown = int((sizes >= 0.01 * len(kept)).sum()) / max(len(loaded.types), 1)
    return Tried(model.name, model.path, genes, known, float(kept.mean()), confidence, shown)

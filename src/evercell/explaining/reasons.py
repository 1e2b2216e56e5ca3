"""`explain`: genes that carry a label, genes for the runner-up, what would flip it, why a cell is unknown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from evercell import __version__
from evercell.annotation import UNKNOWN, rejection_rate
from evercell.annotator import Annotator
from evercell.discovery.annotated import annotation_of
from evercell.errors import CellsError, LabelsError, ModelError, SettingsError
from evercell.explaining.cells import Expression, Piece, Sources, grouped_cells, named_cells, near, of_those
from evercell.explaining.contributions import METHODS, Contributions, contributions
from evercell.explaining.rejected import unknown_cells
from evercell.explaining.removal import deletion_check, flip
from evercell.explaining.result import Explanation, Flip, Reason
from evercell.labelling import Asked
from evercell.labels import listed
from evercell.progress import progress

if TYPE_CHECKING:
    from anndata import AnnData

OTHERS = 2000  # cells, spread evenly over the file, that the expression elsewhere is the mean of


def explain(
    model: Annotator,
    adata: AnnData,
    *,
    cells: Sequence[str] | None = None,
    groups: str | None = None,
    group: Sequence[str] | None = None,
    types: Sequence[str] | None = None,
    against: str | None = None,
    top: int = 20,
    method: str = "integrated",
    max_cells: int = 30,
    seed: int = 0,
    reject: str | float | None = None,
    key: str = "evercell",
    layer: str | None = None,
    species: str = "auto",
    gene_column: str | None = None,
    name: str = "the data",
    model_name: str = "",
    device: str = "auto",
    shown: bool | None = None,
) -> Explanation:
    """Say which genes carry the label of cells, of groups of cells, or of all cells of a type.

    The label is the most probable type of the cells (of several, by the mean of their probabilities), and it is held
    against the runner-up. Contributions are those of the whole model, in log odds of the two types; see `METHODS`. That
    they matter is checked by removing the first genes and asking the model again. What is explained is the model: that
    a gene carries a label does not say that it makes the cell what it is.

    Parameters
    ----------
    model
        Annotator.
    adata
        Cells with counts; left as it is.
    cells
        Names of cells, each explained by itself: what is said of one does not depend on the others.
    groups, group
        Column of ``obs``, for example ``leiden``, and which of its values; all by default.
    types
        Labels, also "Unknown", whose cells are explained together. Labels that the model gave the file are taken as
        they are; else the cells are annotated. With none of `cells`, `groups` and `types`, all labels are explained.
    against
        Type that every label is held against; by default the second most probable. Where it is the label itself, the
        default is taken.
    top
        Genes for the label and genes for the runner-up that are listed.
    method
        ``"integrated"`` (integrated gradients) or ``"gradient"`` (gradient times expression at the cell: about ten
        times as fast, and contributions do not add up to the log odds).
    max_cells
        Of a group or type at most so many cells are drawn.
    seed
        Of the draws of cells and of random genes.
    reject
        Share of cells of known types that may be called unknown, by default the model's own rate, or ``"off"``.
    key
        Prefix of names in the AnnData, as in `annotate`.
    layer, species, gene_column, name, model_name, device, shown
        As `annotate` takes them.

    Returns
    -------
    Explanation

    Raises
    ------
    CellsError, LabelsError
        There is no such cell, group or type.
    SettingsError, GenesError, ModelError

    Examples
    --------
    >>> import evercell as ec
    >>> from evercell.finetuning import quick_settings
    >>> from evercell.testing import synthetic_cells
    >>> model = ec.train(synthetic_cells(seed=1), groups="donor", settings=quick_settings())
    >>> found = ec.explain(model, synthetic_cells(60, seed=2), types=["beta"], max_cells=5)
    >>> found["beta"].label
    'beta'
    """
    rejector = model.rejector
    if rejector is None:
        raise ModelError(
            "this model is pretrained only: it knows no cell types", hint="`evercell train --from` it first"
        )
    _check(model, cells=cells, groups=groups, group=group, against=against, types=types, method=method)
    for option, value in (("top", top), ("max_cells", max_cells)):
        if value < 1:
            raise SettingsError(f"{option} is {value}; at least 1 is needed", hint=f"change {option}")
    rate = rejection_rate(reject, rejector.default_rate)
    if cells is not None:
        kind, chosen = "cell", named_cells(cells, adata.obs_names, name=name)
    elif groups is not None:
        kind, chosen = "group", grouped_cells(adata.obs, groups, group, name=name)
        chosen = {f"{groups} {value}": rows for value, rows in chosen.items()}
    else:
        annotation, _ = annotation_of(
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
        kind, labels = "type", annotation.labels
        named = {one: np.flatnonzero(labels == one) for one in (*model.types.names, UNKNOWN)}
        chosen = of_those(named, types, f"no cell of `{name}` is labelled")
    asked = Asked(rate, layer, species, gene_column, True, 0.05, "keep", model_name, 4096, device, shown)
    sources = Sources.of(model, adata, asked, name)
    others = sources.pieces(np.unique(np.linspace(0, adata.n_obs - 1, min(adata.n_obs, OTHERS)).astype(int)))
    question = _Question(sources, others, Expression.of(others, len(model.vocabulary)), against, top, method, seed)
    reasons = []
    with progress("explaining", shown=shown) as step:
        for number, (one, rows) in enumerate(chosen.items(), start=1):
            label = one if kind == "type" and one != UNKNOWN else None
            reasons.append(question.answered(one, rows, label, max_cells=max_cells, name=name))
            step(number, len(chosen), None)
    info = {
        "model": model_name,
        "model_fingerprint": model.fingerprint,
        "version": __version__,
        "method": method,
        "seed": seed,
        "max_cells": max_cells,
        "groups": groups,
        "against": against,
        "rejector": rejector.name,
        "rejection_rate": "off" if rate is None else rate,
        "adapted": any(one.fitted is not one.model for one in sources.labellers),
    }
    return Explanation(tuple(reasons), kind, info)


def _check(
    model: Annotator,
    *,
    cells: Sequence[str] | None,
    groups: str | None,
    group: Sequence[str] | None,
    types: Sequence[str] | None,
    against: str | None,
    method: str,
) -> None:
    """Whether the question can be asked."""
    given = [word for word, value in (("cells", cells), ("groups", groups), ("types", types)) if value is not None]
    if len(given) > 1:
        raise SettingsError(f"{' and '.join(given)} are given: they ask different questions", hint="pass one of them")
    if group is not None and groups is None:
        raise SettingsError("group names values of a column, and no column is given", hint="pass groups too")
    if method not in METHODS:
        raise SettingsError(f"method is `{method}`", hint=f"pass {' or '.join(METHODS)}")
    if len(model.types) < 2:
        raise ModelError(f"the model knows {len(model.types)} cell types: there is nothing to hold a label against")
    if against is not None and types is not None and against in types:
        raise SettingsError(f"`{against}` is held against itself", hint="pass another type as against")
    known = [UNKNOWN, *model.types.names]
    for word, names in (("types", [types] if isinstance(types, str) else types or ()), ("against", [against])):
        for one in names:
            if one is not None and one not in known[word == "against" :]:
                hint = near(one, known) or f"types of the model: {listed(model.types.names, most=40)}"
                raise LabelsError(f"{word}: the model knows no type `{one}`", hint=hint)


@dataclass(frozen=True)
class _Question:
    """What is asked of every group of cells."""

    sources: Sources
    others: tuple[Piece, ...]
    everywhere: Expression
    against: str | None
    top: int
    method: str
    seed: int
    usual: dict[int, dict[str, float]] = field(default_factory=dict)
    """Unknown scores of known cells, by source; filled where they are needed."""

    def answered(self, called: str, rows: np.ndarray, label: str | None, *, max_cells: int, name: str) -> Reason:
        """Reason of the cells `rows`; `label` is the most probable type where it is None."""
        rng = np.random.default_rng(self.seed)
        drawn = np.sort(rng.choice(rows, max_cells, replace=False)) if len(rows) > max_cells else rows
        pieces = self.sources.pieces(drawn)
        if not pieces:
            raise CellsError(f"`{called}` of `{name}` has no count of a gene that the model knows", hint="leave it out")
        types = self.sources.labellers[0].model.types.names
        log_proba = np.concatenate([one.outputs.log_proba for one in pieces])
        mean = np.exp(log_proba).mean(axis=0, dtype=np.float64)
        first = int(mean.argmax()) if label is None else types.index(label)
        second = int(np.where(np.arange(len(mean)) == first, -1.0, mean).argmax())
        if self.against is not None and self.against != types[first]:
            second = types.index(self.against)
        found = _mean_contributions(pieces, first, second, self.method)
        total = found.total[0]
        expression = Expression.of(pieces, len(total))
        order = np.argsort(-total, kind="stable")
        order = order[(total[order] > 0) & (expression.sums[order] > 0)]  # a gene without counts cannot be removed
        shown = np.argsort(-total, kind="stable")
        shown = np.unique(np.concatenate([shown[: self.top], shown[-self.top :]]))
        shown = shown[total[shown] != 0]
        flipped = flip(pieces, order, first, second)
        return Reason(
            name=called,
            cells=len(rows),
            explained=len(log_proba),
            label=types[first],
            probability=float(mean[first]),
            runner_up=types[second],
            runner_up_probability=float(mean[second]),
            agreement=float((log_proba.argmax(axis=1) == first).mean()),
            log_odds=float(found.log_odds[0]),
            base=float(found.base[0]),
            rest=float(total.sum(dtype=np.float64) - total[shown].sum(dtype=np.float64)),
            genes=self._table(found, shown, expression, rows, (types[first], types[second])),
            flip=flipped and Flip(tuple(self.sources.symbols[flipped[0]]), types[flipped[1]], flipped[2]),
            deletion=deletion_check(pieces, order, expression.mean, first, second, rng=rng),
            unknown=unknown_cells(pieces, self.sources.symbols, self.usual, top=self.top),
        )

    def _table(
        self, found: Contributions, shown: np.ndarray, expression: Expression, rows: np.ndarray, names: tuple[str, str]
    ) -> pd.DataFrame:
        inside = [one.taken(np.flatnonzero(np.isin(one.rows, rows))) for one in self.others]
        elsewhere = self.everywhere.less(Expression.of(inside, len(expression.sums))).mean
        total = found.total[0][shown]
        table = pd.DataFrame(
            {
                "gene": self.sources.symbols[shown],
                "contribution": total,
                "transformer": found.transformer[0][shown],
                "linear": found.linear[0][shown],
                "profiles": found.profiles[0][shown],
                "expression": expression.mean[shown],
                "elsewhere": elsewhere[shown],
                "direction": np.where(total > 0, *names),
            }
        )
        return table.sort_values("contribution", ascending=False, kind="stable", ignore_index=True)


def _mean_contributions(pieces: Sequence[Piece], first: int, second: int, method: str) -> Contributions:
    """Contributions of the cells of all pieces, their mean as one cell."""
    parts = [contributions(one.model, one.view, first, second, method=method) for one in pieces]

    def mean(what: str) -> np.ndarray:
        found: np.ndarray = np.concatenate([getattr(one, what) for one in parts]).mean(axis=0, keepdims=True)
        return found

    return Contributions(*map(mean, ("transformer", "linear", "profiles", "base", "log_odds")))

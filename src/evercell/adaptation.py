"""Fit the linear member and the profiles again on the genes that a query measured.

A targeted panel, or a study of 2,000 deposited genes, lacks much of what the linear member leans on, and counts
normalised over what is left are on another scale. The transformer met random panels in training; linear member and
profiles are fitted again on the example bank, seen through the query's genes. Only the query's list of genes is used,
none of its cells, so a cell's annotation still does not depend on other cells. Of stages that are only sketched,
made-up cells are used (`evercell.sketches`).

Fitting the transformer's head again in the same way was tried and gave no gain (docs/log.md).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from threading import Lock

import numpy as np

from evercell.annotator import EVEN, Annotator, best_temperature, tempered
from evercell.bank import ExampleBank
from evercell.label_sets import surprise_quantiles
from evercell.linear import LinearModel, linear_member
from evercell.profiles import fit_profiles
from evercell.rejection import Outputs
from evercell.tokenizers import View

LOST = 0.1
"""Share of the bank's counts on genes that the query did not measure, from which on the model is fitted again."""

WEIGHT = 2.0
"""How much more than the transformer the refitted linear member counts; it has seen the query's genes and no others."""

ALIKE = 0.9
"""Share of the counts on genes that a query and a study both measured, among those that either did, from which on the
two see cells alike."""

MOST_TYPES = 0.8
"""Share of the types that studies which see cells as the query does must show."""

HIGH = 0.9
"""Quantile of the bank's unknown scores whose move the rejection thresholds follow."""

REMEMBERED = 8
"""Fits that are kept. One is little more than the light members; the transformer is that of the model."""

_FITS: dict[tuple[object, ...], Annotator] = {}  # the last used at the end
_LOCK = Lock()


def lost_share(model: Annotator, measured: np.ndarray) -> float:
    """Share of the bank's counts that are of genes which a query did not measure (G,), mean over cells."""
    bank = model.examples
    if len(bank) == 0:
        return 0.0
    totals = np.asarray(bank.counts.sum(axis=1)).ravel()
    seen = bank.counts @ measured.astype(np.float32)
    return float(np.mean(1.0 - seen / np.maximum(totals, 1.0)))


def worth_fitting(model: Annotator, measured: np.ndarray) -> bool:
    """Whether `fitted_to` the genes of a query (G,) helps.

    A linear member that alone knows the types cannot be fitted again: of most of them there is no cell.
    """
    return not model.linear_only and lost_share(model, measured) >= LOST and not familiar(model, measured)


def familiar(model: Annotator, measured: np.ndarray) -> bool:
    """Whether the model was trained on studies that measured the genes of a query (G,), and little else.

    The linear member was then fitted on such cells, on all of them where the bank holds a few.
    """
    bank = model.examples
    if len(bank) == 0:
        return False
    totals = np.asarray(bank.counts.sum(axis=1)).ravel()
    shares = np.asarray(bank.counts.T @ (1.0 / np.maximum(totals, 1.0))).ravel()
    both, either = (bank.measured & measured) @ shares, (bank.measured | measured) @ shares
    alike = both >= ALIKE * either
    shown = np.unique(bank.codes[alike[bank.studies]])
    return len(shown) >= MOST_TYPES * len(np.unique(bank.codes))


def fitted_to(model: Annotator, measured: np.ndarray, *, seed: int = 0) -> Annotator:
    """The model with light members, temperature, rejector and label sets fitted to the genes `measured` (G,).

    The last `REMEMBERED` fits are kept: `--model auto` tries a model before it is used, and files of one platform
    measured the same genes.
    """
    arrays = (model.bank.studies, model.bank.measured, measured)  # the fingerprint does not tell what studies measured
    key = (model.fingerprint, str(model.device), seed, *(array.tobytes() for array in arrays))
    with _LOCK:
        found = _FITS.pop(key, None)
    found = _fit(model, measured, seed) if found is None else found
    with _LOCK:
        _FITS[key] = found
        while len(_FITS) > REMEMBERED:
            del _FITS[next(iter(_FITS))]
    return found


def _fit(model: Annotator, measured: np.ndarray, seed: int) -> Annotator:
    """The fit itself.

    Temperature and thresholds are set on bank cells that the linear fit before them did not see. The bank is
    class-balanced, so every type is held to be equally common. The thresholds of unknown cells and of label sets come
    from held-out cells that the model no longer has; they move by as much as those of the bank's cells do.
    """
    bank = model.examples
    counts = bank.counts.copy()
    counts.data = counts.data * measured[counts.indices]
    counts.eliminate_zeros()
    cells = np.flatnonzero(counts.getnnz(axis=1))
    through = _Fit(model, View.whole(counts[cells], measured), bank.taken(cells), seed)
    unseen = through.unseen()
    adapted = through.fitted(np.arange(len(cells)), best_temperature(unseen.log_proba, through.bank.codes))
    if model.rejector is None:
        return adapted
    rejector = type(model.rejector).fitted(through.outputs(adapted), through.bank.codes)
    before = _Fit(model, View.whole(bank.counts[cells]), through.bank, seed).unseen()
    after = replace(unseen, log_proba=tempered(unseen.log_proba, adapted.temperature))
    before = replace(before, log_proba=tempered(before.log_proba, model.temperature))
    rejector = rejector.adapted_as(model.rejector, after)
    moved = np.quantile(rejector.score(after), HIGH) - np.quantile(model.rejector.score(before), HIGH)
    sets = model.sets
    if sets is not None:
        more = surprise_quantiles(after.log_proba, through.bank.codes)
        sets = sets.shifted(sets.shift + more - surprise_quantiles(before.log_proba, through.bank.codes))
    return replace(adapted, rejector=rejector.moved(float(moved)), sets=sets)


@dataclass(frozen=True)
class _Fit:
    """Fits of the light members on bank cells, as seen in one view."""

    model: Annotator
    view: View
    bank: ExampleBank
    seed: int

    def fitted(self, rows: np.ndarray, temperature: float = 1.0) -> Annotator:
        """The model with its linear member and its profiles, where it has them, fitted on some of the cells."""
        linear, profiles = None, None
        codes, n_types = self.bank.codes[rows], len(self.model.types)
        if self.model.linear is not None:
            linear = linear_member(self.view.counts[rows], codes, n_types, self.seed)
            linear = LinearModel(WEIGHT * linear.weight, WEIGHT * linear.bias)
        if self.model.profiles is not None:
            measured = self.bank.measured & self.view.measured
            found = fit_profiles(self.view.counts[rows], codes, self.bank.studies[rows], measured, n_types=n_types)
            old = self.model.profiles
            profiles = replace(found, sharpness=old.sharpness, share=old.share)
        # Its weight here is `WEIGHT`, whatever share the model gives to a linear member that saw all genes.
        return replace(self.model, linear=linear, linear_share=EVEN, profiles=profiles, temperature=temperature)

    def unseen(self) -> Outputs:
        """Uncalibrated outputs of all cells; each half is scored by a fit on the other."""
        halves = np.array_split(np.random.default_rng(self.seed).permutation(len(self.bank)), 2)
        parts = [self.outputs(self.fitted(one), other) for one, other in (halves, halves[::-1])]
        back = np.argsort(np.concatenate(halves[::-1]))
        return Outputs.joined(parts).taken(back)

    def outputs(self, fitted: Annotator, rows: np.ndarray | None = None) -> Outputs:
        """What a fit says of some of the cells, by default all."""
        rows = np.arange(len(self.bank)) if rows is None else rows
        representation, logits = self._represented
        return fitted.outputs(self.view.taken(rows), (representation[rows], logits[rows]))

    @cached_property
    def _represented(self) -> tuple[np.ndarray, np.ndarray]:
        """The transformer's part, which is the same in all fits."""
        return self.model.represent(self.view)

"""Whether two methods differ by more than the folds do, paired over the folds.

Folds of one data set share most of their training cells, so their results are not independent and a plain paired t-test
finds differences that are not there. The corrected resampled t-test of Nadeau and Bengio (2003, Machine Learning 52)
widens the standard error by the share of cells tested.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from evercell.errors import SettingsError

FEWEST_FOLDS = 3
NOTHING = 1e-12  # differences this small are noise of floating point


@dataclass(frozen=True)
class PairedTest:
    """What `paired_test` finds.

    Attributes
    ----------
    difference
        Mean of the differences.
    standard_error
        Corrected standard error of that mean; None with one fold.
    p
        Two-sided p value; None where no test can be made.
    note
        Why there is no p value, or empty.
    """

    difference: float
    standard_error: float | None
    p: float | None
    note: str = ""


def paired_test(differences: Sequence[float] | np.ndarray, ratio: float) -> PairedTest:
    """Corrected resampled t-test on the differences of two methods over folds.

    With k differences of mean m and variance s^2 (over k - 1): ``t = m / sqrt((1 / k + n_test / n_train) s^2)`` against
    Student's t with k - 1 degrees of freedom, two-sided.

    Parameters
    ----------
    differences
        One a fold (k,).
    ratio
        ``n_test / n_train``, for example 1 / 4 in five-fold cross-validation.

    Returns
    -------
    PairedTest
        With p = 1 where all differences are zero, and None with fewer than three folds or where all differences are
        equal and not zero, which says nothing of how they vary.

    Raises
    ------
    SettingsError
        There are no differences, or the ratio is not above 0.

    Examples
    --------
    >>> round(paired_test([0.02, 0.01, 0.04, 0.03, 0.00], 1 / 4).p, 3)
    0.132
    """
    values = np.asarray(differences, dtype=float)
    k = len(values)
    if not k or not np.isfinite(values).all() or not (math.isfinite(ratio) and ratio > 0):
        raise SettingsError(
            f"no paired test on {k} differences with a ratio of test to training cells of {ratio}",
            hint="give one finite difference a fold and the numbers of cells of the folds",
        )
    mean = float(values.mean())
    if k == 1:
        return PairedTest(mean, None, None, "one fold, a test needs three")
    error = math.sqrt((1 / k + ratio) * float(values.var(ddof=1)))
    if k < FEWEST_FOLDS:
        return PairedTest(mean, error, None, f"{k} folds, a test needs three")
    if np.abs(values).max() <= NOTHING:
        return PairedTest(0.0, 0.0, 1.0)
    if np.ptp(values) <= NOTHING:
        return PairedTest(mean, 0.0, None, "the same difference in every fold, so no measure of how it varies")
    from scipy.stats import t

    return PairedTest(mean, error, float(2 * t.sf(abs(mean) / error, k - 1)))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's correction for several tests at once: the i-th smallest of n is multiplied by n - i + 1.

    Missing values stay missing and do not count as tests.

    Examples
    --------
    >>> holm([0.01, 0.04, None, 0.03])
    [0.03, 0.06, None, 0.06]
    """
    given = sorted((p, place) for place, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    least = 0.0
    for rank, (p, place) in enumerate(given):
        least = max(least, min(1.0, (len(given) - rank) * p))
        corrected[place] = least
    return corrected


def significance(folds: pd.DataFrame, figure: str = "accuracy", *, first: str | None = None) -> pd.DataFrame:
    """Every method against the first, paired over folds.

    Parameters
    ----------
    folds
        One row a method and fold: ``method``, ``fold``, ``n_train``, ``n_test`` and the `figure`. Several rows of one
        method and fold, of several seeds, are averaged first. A missing figure leaves that fold out for that method.
    figure
        Column of the figure.
    first
        Method that the others are compared with; that of the first row if None.

    Returns
    -------
    pandas.DataFrame
        A row a method, the first on top and the others in the order of the table: ``method``, ``folds`` that it shares
        with the first, ``mean`` and ``sd`` over its folds (sd None with one), ``difference`` (it minus the first),
        ``standard_error``, ``p``, ``p_holm`` (over the methods compared), ``folds_better`` and ``folds_worse`` (of
        those shared), ``note``. The first has None for what compares it with itself. None, never NaN, is what is not
        there.

    Raises
    ------
    SettingsError
        Columns, the first method or all its folds are missing.
    """
    means, ratios = _by_fold(folds, figure)
    first = str(folds["method"].iloc[0]) if first is None else first
    if first not in means.columns or means[first].isna().all():
        raise SettingsError(
            f"there are no results of `{first}` to compare with; found {', '.join(means.columns)}",
            hint="name one of these as the first method",
        )
    order = [first, *(name for name in means.columns if name != first)]
    rows = [_row(means, ratios, name, first) for name in order]
    p_values: list[Any] = [row["p"] for row in rows]
    for row, corrected in zip(rows, holm(p_values), strict=True):
        row["p_holm"] = corrected
    columns = ["method", "folds", "mean", "sd", "difference", "standard_error", "p", "p_holm"]
    return pd.DataFrame(rows, columns=[*columns, "folds_better", "folds_worse", "note"], dtype=object)


def _by_fold(folds: pd.DataFrame, figure: str) -> tuple[pd.DataFrame, pd.Series]:
    """The figure, folds in rows and methods in columns in the order of the table; test over training cells of folds."""
    wanted = ["method", "fold", "n_train", "n_test", figure]
    missing = [name for name in wanted if name not in folds]
    if missing or not len(folds):
        raise SettingsError(
            f"the table of folds has {len(folds)} rows and no {' and no '.join(f'`{name}`' for name in missing)}"
            if missing
            else "the table of folds is empty",
            hint=f"give one row a method and fold with {', '.join(wanted)}",
        )
    table = folds[wanted].assign(method=folds["method"].astype(str))
    means = table.pivot_table(index="fold", columns="method", values=figure, sort=False, dropna=False)
    sizes = table.groupby("fold", sort=False)[["n_train", "n_test"]].mean().astype(float)
    return means[list(dict.fromkeys(table["method"]))], sizes["n_test"] / sizes["n_train"]


def _row(means: pd.DataFrame, ratios: pd.Series, name: str, first: str) -> dict[str, object]:
    own = means[name].dropna()
    row: dict[str, object] = {
        "method": name,
        "folds": len(own),
        "mean": float(own.mean()) if len(own) else None,
        "sd": float(own.std(ddof=1)) if len(own) > 1 else None,
        "difference": None,
        "standard_error": None,
        "p": None,
        "folds_better": None,
        "folds_worse": None,
        "note": "",
    }
    if name == first:
        return row
    differences = (means[name] - means[first]).dropna()
    row["folds"] = len(differences)
    if not len(differences):
        return row | {"note": "no fold in common"}
    found = paired_test(differences.to_numpy(), float(ratios[differences.index].mean()))
    return row | {
        "difference": found.difference,
        "standard_error": found.standard_error,
        "p": found.p,
        "folds_better": int((differences > NOTHING).sum()),
        "folds_worse": int((differences < -NOTHING).sum()),
        "note": found.note,
    }

"""What `preprocess` is asked to do."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from evercell.errors import SettingsError
from evercell.labels import listed

DOUBLETS = ("off", "score", "drop")
LOGS = {"e": math.e, "2": 2.0, "none": None}


@dataclass(frozen=True)
class PreprocessingSettings:
    """What `preprocess` does with the counts.

    Parameters
    ----------
    min_genes, min_counts, max_counts
        Expressed genes and counts that a cell must have; None asks for nothing.
    max_mito
        Most mitochondrial counts of a cell, in percent; None, and where no such gene was measured: not asked for.
    mad
        Cells that are more than so many median absolute deviations off the median of their batch go too: log1p genes
        and counts on both sides, the mitochondrial share above. None: not asked for; 5 is usual. Where most cells of a
        batch are alike, types that are larger or smaller are outliers too: look at the plots.
    min_cells
        Training cells that must express a gene.
    doublets
        ``off``; ``score`` with Scrublet; ``drop`` those that it calls.
    target_sum
        Counts of every cell after normalisation.
    log
        Base of the logarithm of 1 + x: ``e`` or ``2``; ``none`` leaves the normalised values.
    variable_genes
        Number of variable genes to mark; None marks none.
    only_variable
        Keep the variable genes only.
    seed
        Of the simulated doublets.
    """

    min_genes: int = 200
    min_counts: float | None = None
    max_counts: float | None = None
    max_mito: float | None = 20.0
    mad: float | None = None
    min_cells: int = 3
    doublets: str = "off"
    target_sum: float = 1e4
    log: str = "e"
    variable_genes: int | None = None
    only_variable: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("min_genes", "min_cells", "seed"):
            _check(name, getattr(self, name), whole=True)
        for name in ("min_counts", "max_counts", "max_mito"):
            if getattr(self, name) is not None:
                _check(name, getattr(self, name), most=100.0 if name == "max_mito" else math.inf)
        _check("target_sum", self.target_sum, above=True)
        if self.mad is not None:
            _check("mad", self.mad, above=True)
        if self.variable_genes is not None:
            _check("variable_genes", self.variable_genes, whole=True, above=True)
        if self.min_counts is not None and self.max_counts is not None and self.min_counts > self.max_counts:
            raise SettingsError(
                f"min_counts is {self.min_counts:g}, above max_counts, {self.max_counts:g}", hint="change --min-counts"
            )
        for name, value, known in (("doublets", self.doublets, DOUBLETS), ("log", self.log, tuple(LOGS))):
            if value not in known:
                raise SettingsError(
                    f"{name} is `{value}`; it must be one of {', '.join(known)}", hint=f"change --{name}"
                )
        if not isinstance(self.only_variable, bool):
            raise SettingsError(f"only_variable is `{self.only_variable}`; true or false was expected")
        if self.only_variable and self.variable_genes is None:
            raise SettingsError("only the variable genes were to be kept, but no number of them was given",
                                hint="pass --variable-genes N, such as 2000")  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> PreprocessingSettings:
        """Settings as `to_dict` gave them; those that are not named keep their default."""
        known = [one.name for one in fields(cls)]
        if unknown := [name for name in stored if name not in known]:
            raise SettingsError(f"there is no setting {listed(unknown)}", hint=f"the settings are: {', '.join(known)}")
        return cls(**stored)


def _check(name: str, value: Any, *, whole: bool = False, above: bool = False, most: float = math.inf) -> None:
    """Refuse what is no number from 0 (or above it) to `most`."""
    kinds = int if whole else int | float
    good = isinstance(value, kinds) and not isinstance(value, bool) and math.isfinite(value)
    if not good or value > most or value < 0 or (above and value == 0):
        what = f"a {'whole ' * whole}number {'above 0' if above else 'of at least 0'}"
        what += "" if most == math.inf else f" and at most {most:g}"
        raise SettingsError(f"{name} is `{value}`; {what} was expected", hint=f"change --{name.replace('_', '-')}")

"""What `explain` gives: tables, and sentences that say the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

NAMED = 5  # genes in a sentence
MOST_GENES = 50  # that are tried before a label is said not to flip
WORDS_OF_PARTS = {
    "confidence": "it is torn between types",
    "prototypes": "its representation lies apart from those of the known types",
    "markers": "its genes do not fit the nearest type",
}


@dataclass(frozen=True)
class Flip:
    """Genes without which the label would be another one.

    Parameters
    ----------
    genes
        Symbols, the largest contribution first.
    becomes, probability
        The most probable type then, and its probability.
    """

    genes: tuple[str, ...]
    becomes: str
    probability: float


@dataclass(frozen=True)
class Unknown:
    """Why cells are called unknown.

    Parameters
    ----------
    cells
        Number of explained cells that are.
    score, threshold
        Their mean unknown score, and the score above which a cell is called unknown.
    parts
        One row a part of the score, the largest surplus first: ``part``, ``value`` (the parts add up to the score),
        ``usual`` (median of the known cells that lie in the model, those that no training saw where there are any),
        ``surplus`` (value less usual) and ``decisive`` (without its surplus the score would not pass the threshold).
    missing, unexpected
        Marker genes that fit the most probable type badly because the cells have less, or more, of them than the mean
        of all types: ``gene``, ``expression``, and ``loss`` of the correlation between cell and type. Without rows
        where the rejector does not look at genes.
    """

    cells: int
    score: float
    threshold: float
    parts: pd.DataFrame
    missing: pd.DataFrame
    unexpected: pd.DataFrame

    def sentence(self) -> str:
        """The parts in words."""
        first = self.parts.iloc[0]
        text = f"unknown score {self.score:.2f} above the threshold of {self.threshold:.2f}"
        if len(self.parts) > 1:
            text += f", most of all by `{first['part']}` ({WORDS_OF_PARTS[first['part']]})"
        for words, table in (("has too little", self.missing), ("too much", self.unexpected)):
            if len(table):
                text += f"; {words} {_listed(table['gene'].head(NAMED).tolist())}"
        return text


@dataclass(frozen=True)
class Reason:
    """Why the model says what it says of a cell, a group of cells or the cells of a type.

    Parameters
    ----------
    name
        Of the cell, the group or the type.
    cells, explained
        Number of cells, and of those that were drawn to be explained.
    label, probability
        Most probable type over the explained cells, and its mean probability.
    runner_up, runner_up_probability
        The type that it is held against.
    agreement
        Share of the explained cells of which `label` is the most probable type.
    log_odds, base, rest
        Mean log odds of label against runner-up, natural logarithm; what they are without any expression; and what the
        genes that are not in `genes` add.
    genes
        One row a gene, the largest contribution first: ``gene``, ``contribution`` to the log odds (mean over the
        cells), of it ``transformer``, ``linear`` and ``profiles`` (0 where the model has no such member),
        ``expression`` in these cells and ``elsewhere`` (means of log(1 + counts per 10,000)),
        ``direction`` (the type that it speaks for).
    flip
        Genes without which the label would be another one; None where no 50 genes do it.
    deletion
        One row a number of genes: ``genes``, ``drop`` of the label's probability without so many of the first genes,
        ``random`` and ``random_sd`` (mean and standard deviation for random genes of like expression),
        ``log_odds_drop`` and ``random_log_odds_drop``.
    unknown
        Why explained cells are called unknown; None where none is.
    """

    name: str
    cells: int
    explained: int
    label: str
    probability: float
    runner_up: str
    runner_up_probability: float
    agreement: float
    log_odds: float
    base: float
    rest: float
    genes: pd.DataFrame
    flip: Flip | None
    deletion: pd.DataFrame
    unknown: Unknown | None = None

    @property
    def rejected(self) -> bool:
        """Whether most of the explained cells are called unknown."""
        return self.unknown is not None and 2 * self.unknown.cells > self.explained

    @property
    def faithful(self) -> bool:
        """Whether removing the first genes lowers the log odds more than random genes do, however many are removed."""
        return bool(len(self.deletion)) and bool(
            (self.deletion["log_odds_drop"] > self.deletion["random_log_odds_drop"]).all()
        )

    def for_label(self) -> list[str]:
        """Genes that speak for the label, the largest contribution first."""
        return list(self.genes.loc[self.genes["contribution"] > 0, "gene"])

    def against_label(self) -> list[str]:
        """Genes that speak for the runner-up, the largest contribution first."""
        return list(self.genes.loc[self.genes["contribution"] < 0, "gene"])[::-1]

    def sentence(self) -> str:
        """The reason in words."""
        text = f"{self.name}: "
        if self.rejected:
            text += "Unknown, nearest "
        text += f"`{self.label}` ({self.probability:.2f}) rather than `{self.runner_up}` "
        text += f"({self.runner_up_probability:.2f})"
        if named := self.for_label()[:NAMED]:
            text += f" because of {', '.join(named)}"
        return f"{text}; {self.flip_words()}"

    def flip_words(self) -> str:
        """What would flip the label."""
        if self.flip is None:
            return f"no set of {MOST_GENES} genes flips it"
        genes = self.flip.genes
        named = _listed(genes if len(genes) <= NAMED + 3 else [*genes[:NAMED], f"{len(genes) - NAMED} more genes"])
        return f"would be `{self.flip.becomes}` ({self.flip.probability:.2f}) without {named}"

    def deletion_words(self) -> str:
        """What the check by deletion found for the most genes; empty where there was nothing to remove."""
        if not len(self.deletion):
            return ""
        last = self.deletion.iloc[-1]
        n_genes = int(last["genes"])
        text = (
            f"without its {n_genes} first genes the probability falls by {last['drop']:.2f}, without {n_genes} random "
            f"genes of like expression by {last['random']:.2f} ± {last['random_sd']:.2f}"
        )
        return text if self.faithful else f"{text}: these genes do not carry the decision alone"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        plain = {name: value for name, value in vars(self).items() if not isinstance(value, pd.DataFrame)}
        plain |= {name: getattr(self, name).to_dict(orient="records") for name in ("genes", "deletion")}
        plain["flip"] = None if self.flip is None else dict(vars(self.flip))
        plain["sentence"] = self.sentence()
        if self.unknown is not None:
            plain["unknown"] = {
                name: value.to_dict(orient="records") if isinstance(value, pd.DataFrame) else value
                for name, value in vars(self.unknown).items()
            } | {"sentence": self.unknown.sentence()}
        return plain


@dataclass(frozen=True)
class Explanation:
    """Reasons for labels, one for each cell, group or type that was asked for.

    Parameters
    ----------
    reasons
        In the order in which they were asked for.
    kind
        What each stands for: ``cell``, ``group`` or ``type``.
    info
        Model, its fingerprint, method, seed, and what else the explanation rests on.
    """

    reasons: tuple[Reason, ...]
    kind: str
    info: dict[str, Any] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Reason:
        """The reason of a cell, group or type."""
        for one in self.reasons:
            if one.name == name:
                return one
        raise KeyError(name)

    @property
    def genes(self) -> pd.DataFrame:
        """The genes of all reasons in one table."""
        return pd.concat([_headed(one, one.genes) for one in self.reasons], ignore_index=True)

    @property
    def deletion(self) -> pd.DataFrame:
        """The checks by deletion of all reasons in one table."""
        return pd.concat([_headed(one, one.deletion) for one in self.reasons], ignore_index=True)

    def summary(self) -> str:
        """A sentence a reason."""
        return "\n".join(one.sentence() for one in self.reasons)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {"kind": self.kind, **self.info, "reasons": [one.to_dict() for one in self.reasons]}


def _headed(reason: Reason, table: pd.DataFrame) -> pd.DataFrame:
    found = table.copy()
    for place, column in enumerate(("name", "label", "runner_up")):
        found.insert(place, column, getattr(reason, column))
    return found


def _listed(names: Sequence[str]) -> str:
    """Names with an "and" before the last."""
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))

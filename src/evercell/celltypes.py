"""Cell types of a model, labels of a data set, and how the labels of a new data set agree with the types of a model."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd

from . import ontology
from .errors import LabelsError
from .labels import is_unassigned, listed, read_labels, read_mapping

__all__ = ["CellTypes", "Match", "Reconciliation", "is_unassigned", "read_labels", "read_mapping", "reconcile"]


@dataclass(frozen=True)
class CellTypes:
    """Cell types of a model, in the order in which it learnt them. A type's code, its place here, never changes.

    Attributes
    ----------
    names
        Names of the types; each once.
    stages
        Stage in which each type was learnt, 1 for the first; it never falls.
    ontology_ids
        Cell Ontology id of each type, or None.

    Examples
    --------
    >>> types = CellTypes(("B", "T")).extended(["NK"], stage=2)
    >>> types.codes(["NK", "B"]).tolist()
    [2, 0]
    >>> types.stages
    (1, 1, 2)
    """

    names: tuple[str, ...]
    stages: tuple[int, ...] = ()
    ontology_ids: tuple[str | None, ...] = ()

    def __post_init__(self) -> None:
        names = tuple(str(name) for name in self.names)
        stages = tuple(int(stage) for stage in self.stages) or (1,) * len(names)
        ids = tuple(self.ontology_ids) or tuple(_ontology_id(name) for name in names)
        if not len(names) == len(stages) == len(ids):
            raise LabelsError(
                f"{len(names)} names of cell types with {len(stages)} stages and {len(ids)} ontology ids; "
                "one of each is needed for every type"
            )
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise LabelsError(f"cell type `{repeated[0]}` is named more than once; each type has one code")
        unusable = [name for name in names if is_unassigned(name)]
        if unusable:
            raise LabelsError(f"`{unusable[0]}` cannot be the name of a cell type: it stands for cells without a label")
        if any(later < earlier for earlier, later in pairwise(stages)):
            raise LabelsError(f"stages of the cell types fall: {list(stages)}; types are only ever appended")
        for key, value in (("names", names), ("stages", stages), ("ontology_ids", ids)):
            object.__setattr__(self, key, value)
        object.__setattr__(self, "_codes", {name: code for code, name in enumerate(names)})

    def __len__(self) -> int:
        return len(self.names)

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def code(self, name: str) -> int:
        """Code of a type.

        Raises
        ------
        LabelsError
            The model has no such type.
        """
        return int(self.codes([name])[0])

    def codes(self, names: Iterable[str]) -> np.ndarray:
        """Codes (cells,) int64 of the types named.

        Raises
        ------
        LabelsError
            A name is not one of the types; all such names are listed.
        """
        table: dict[str, int] = self._codes  # type: ignore[attr-defined]
        asked = list(names)
        missing = sorted({str(name) for name in asked if name not in table})
        if missing:
            raise LabelsError(
                f"{listed(missing)} {'is not a type' if len(missing) == 1 else 'are not types'} of the model, "
                f"which has {listed(self.names)}",
                hint=_near_hint(missing[0], self.names)
                or "reconcile the labels with the types first, or name them in a mapping",
            )
        return np.fromiter((table[name] for name in asked), dtype=np.int64, count=len(asked))

    def extended(self, names: Iterable[str], stage: int) -> CellTypes:
        """Types with those of `names` that are new appended; the codes of the old ones stay.

        Parameters
        ----------
        names
            Names in the order in which they get their codes; those already held are passed over.
        stage
            Stage that teaches them, not below the last one.
        """
        new = tuple(name for name in dict.fromkeys(str(name) for name in names) if name not in self.names)
        return CellTypes(
            self.names + new,
            self.stages + (stage,) * len(new),
            self.ontology_ids + tuple(_ontology_id(name) for name in new),
        )

    def to_dict(self) -> dict[str, list[Any]]:
        """Names, stages and ontology ids as JSON can hold them."""
        return {"names": list(self.names), "stages": list(self.stages), "ontology_ids": list(self.ontology_ids)}

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> CellTypes:
        """Types that `to_dict` gave."""
        try:
            return cls(tuple(stored["names"]), tuple(stored["stages"]), tuple(stored["ontology_ids"]))
        except KeyError as error:
            raise LabelsError(f"stored cell types lack {error}; expected names, stages and ontology_ids") from None


def _ontology_id(name: str) -> str | None:
    found = ontology.find(name)
    return None if found is None else found.id


def _near_hint(name: str, known: Iterable[str]) -> str | None:
    by_case = {other.casefold(): other for other in known}
    near = difflib.get_close_matches(name.casefold(), by_case, n=3, cutoff=0.6)
    return f"did you mean {' or '.join(f'`{by_case[one]}`' for one in near)}?" if near else None


@dataclass(frozen=True)
class Match:
    """Verdict on one new label.

    Attributes
    ----------
    label
        Label of the new data set.
    verdict
        `"same"` as a type of the model, or `"new"`.
    name
        Name of the type that its cells get.
    by
        What settled it: exact, case, plural, synonym, ontology or mapping; empty for a new label left as it is.
    note
        Sentence for the user, or empty.
    """

    label: str
    verdict: str
    name: str
    by: str = ""
    note: str = ""


@dataclass(frozen=True)
class Reconciliation:
    """How each label of a new data set agrees with the types of a model.

    Attributes
    ----------
    types
        Types of the model.
    matches
        One verdict a label, in the order of the labels.
    unused
        Labels of the user's mapping that the data set does not have.
    """

    types: CellTypes
    matches: tuple[Match, ...]
    unused: tuple[str, ...] = field(default=())

    @property
    def mapping(self) -> dict[str, str]:
        """New label -> final name of its type."""
        return {match.label: match.name for match in self.matches}

    @property
    def mapped(self) -> set[str]:
        """Labels that the user's mapping settled."""
        return {match.label for match in self.matches if match.by == "mapping"}

    @property
    def new(self) -> list[str]:
        """Final names that the model does not have yet, in order."""
        return list(dict.fromkeys(match.name for match in self.matches if match.verdict == "new"))

    def table(self) -> pd.DataFrame:
        """One row a label: label, verdict, name, by, ontology_id of the name, note. `read_mapping` reads it back."""
        ids = dict(zip(self.types.names, self.types.ontology_ids, strict=True))
        rows = [
            (m.label, m.verdict, m.name, m.by, ids[m.name] if m.name in ids else _ontology_id(m.name), m.note)
            for m in self.matches
        ]
        return pd.DataFrame(rows, columns=["label", "verdict", "name", "by", "ontology_id", "note"])

    def shares(self, proba: np.ndarray, labels: Iterable[str | None]) -> pd.DataFrame:
        """Share of each label's cells that the old model puts on each of its types.

        Parameters
        ----------
        proba
            (cells, types) probabilities of the old model.
        labels
            (cells,) labels of the new data set; cells without one are left out.

        Returns
        -------
        DataFrame
            (labels, types); each row sums to one.
        """
        proba = np.asarray(proba)
        given = pd.Series(list(labels), dtype="object")
        if proba.shape != (len(given), len(self.types)):
            raise LabelsError(
                f"probabilities have shape {proba.shape}; "
                f"expected ({len(given)}, {len(self.types)}) for these labels and types"
            )
        kept = (~given.map(is_unassigned)).to_numpy(dtype=bool)
        counts = pd.crosstab(given[kept].astype(str).to_numpy(), proba[kept].argmax(axis=1))
        counts = counts.reindex(
            index=[m.label for m in self.matches if m.label in counts.index],
            columns=range(len(self.types)),
            fill_value=0,
        )
        shares = counts.div(counts.sum(axis=1), axis=0)
        shares.columns, shares.index = pd.Index(self.types.names), pd.Index(shares.index, name="label")
        return shares

    def evidence(
        self,
        proba: np.ndarray,
        labels: Iterable[str | None],
        *,
        rejected: np.ndarray | None = None,
        clear: float = 0.8,
    ) -> pd.DataFrame:
        """What the old model sees in the cells of each new label, and the settlement it speaks for.

        A label that is new by name *claims* the old type on which the old model puts most (more than half) of its
        cells, unless it would call most of them unknown; a label that is the same by name claims its type. Findings for
        new labels:

        - `rename`: at least `clear` of its cells lie on one old type that no other label claims; settle `map` to it;
        - `split`: several labels claim one old type; settle `new` for each that is new by name;
        - `merge`: at least `clear` of its cells lie on several old types, each with a tenth or more, that no other
          label claims; settle `keep_old`: the cells keep the finer types that the model gives them;
        - `new`: none of these, or the old model calls most of the cells unknown, or the Cell Ontology holds label and
          old type apart (neither is a kind of the other).

        For labels that are the same by name: `agrees`, or `conflict` where at least `clear` of the cells lie on another
        type; settle `check`. An old model has no name for what it never saw, so a new type may lie on its
        nearest old one: a rename is a proposal for the user, not a proof.

        Parameters
        ----------
        proba
            (cells, types) probabilities of the old model.
        labels
            (cells,) labels of the new data set.
        rejected
            (cells,) bool, which cells the old model would call unknown; none if not given.
        clear
            Share of a label's cells that counts as clear.

        Returns
        -------
        DataFrame
            One row a label: label, cells, by_name, top_type, share, next_type, next_share, unknown (share of the cells
            that the old model rejects), finding, settlement, to, sentence.
        """
        given = [None if is_unassigned(label) else str(label) for label in labels]
        shares = self.shares(proba, given)
        cells = Counter(given)
        matches = [match for match in self.matches if match.label in shares.index]
        row_of = {match.label: pd.Series(shares.loc[match.label]) for match in matches}
        unknown = pd.Series(np.zeros(len(given)) if rejected is None else rejected, dtype=float)
        share_unknown = unknown.groupby(np.array(given, dtype=object)).mean()
        claims = {match.label: _claimed(match, row_of[match.label], share_unknown[match.label]) for match in matches}
        rows = []
        for match in matches:
            ranked = row_of[match.label].sort_values(ascending=False, kind="stable")
            others = {
                name: [one for one in claims if claims[one] == name and one != match.label] for name in self.types.names
            }
            second = (ranked.index[1], float(ranked.iloc[1])) if len(ranked) > 1 else (None, 0.0)
            first = (match.label, cells[match.label], match.verdict, ranked.index[0], float(ranked.iloc[0]))
            unseen = float(share_unknown[match.label])
            rows.append((*first, *second, unseen, *_settled(match, ranked, others, clear, unseen)))
        columns = "label cells by_name top_type share next_type next_share unknown finding settlement to sentence"
        return pd.DataFrame(rows, columns=columns.split())


def _claimed(match: Match, row: pd.Series, unknown: float) -> str | None:
    if match.verdict == "same":
        return match.name
    return str(row.idxmax()) if row.max() > 0.5 and unknown <= 0.5 else None


def _held_apart(label: str, old: str) -> bool:
    """Whether the Cell Ontology knows both names and neither is a kind of the other."""
    a, b = ontology.find(label), ontology.find(old)
    return a is not None and b is not None and not (ontology.is_a(a.id, b.id) or ontology.is_a(b.id, a.id))


def _settled(
    match: Match, ranked: pd.Series, others: Mapping[str, list[str]], clear: float, unknown: float
) -> tuple[str, str, str | None, str]:
    """Finding, settlement, target and sentence for one label; see `Reconciliation.evidence`."""
    label, name, top, share = match.label, match.name, str(ranked.index[0]), float(ranked.iloc[0])
    lies = f"the old model puts {share:.0%} of the cells of `{label}` on `{top}`"
    parts = ranked[ranked >= 0.1]
    alone = not any(others[str(part)] for part in parts.index)
    finding: tuple[str, str, str | None, str]
    if match.verdict == "same" and top != name and share >= clear:
        finding = "conflict", "check", name, f"{lies}, though the label reads like `{name}`: check the label"
    elif match.verdict == "same":
        finding = "agrees", "map", name, f"`{label}` is `{name}` by name; {lies}"
    elif unknown > 0.5:
        text = f"the old model calls {unknown:.0%} of the cells of `{label}` unknown: a new type"
        finding = "new", "new", name, text
    elif share > 0.5 and others[top]:
        finding = "split", "new", name, f"{lies}, which {listed(others[top])} also claims: keep `{name}` as a new type"
    elif share >= clear and _held_apart(label, top):
        finding = "new", "new", name, f"{lies}, but the Cell Ontology holds the two apart: a new type"
    elif share >= clear:
        finding = "rename", "map", top, f"{lies}, which no other label claims: it seems the same type, renamed"
    elif len(parts) > 1 and float(parts.sum()) >= clear and alone:
        spread = ", ".join(f"`{part}` ({size:.0%})" for part, size in parts.items())
        text = f"the cells of `{label}` lie on {spread}, which no other label claims: a coarser name for them"
        finding = "merge", "keep_old", None, text
    else:
        finding = "new", "new", name, f"{lies}: no old type holds it clearly, a new type"
    return finding


def reconcile(
    new_labels: Iterable[str], types: CellTypes, *, mapping: Mapping[str, str] | None = None
) -> Reconciliation:
    """Settle by name which labels of a new data set are types of the model and which are new.

    The first that holds decides: the user's `mapping`; the same name (`exact`); the same but for case (`case`); but for
    plural, punctuation and a closing "cell" (`plural`); the same Cell Ontology term by label, synonym or usual
    abbreviation (`synonym`); the id stored with the type (`ontology`). A label that would fit several old types is left
    new with a note. Labels that are new and differ by case or plural only become one type.

    Parameters
    ----------
    new_labels
        Labels of the data set; repeated and missing ones are passed over.
    types
        Types of the model.
    mapping
        Label -> name of a type, old or new; goes before every other rule.
    """
    chosen = dict(mapping or {})
    labels = list(dict.fromkeys(str(label) for label in new_labels if not is_unassigned(label)))
    matches: list[Match] = []
    founded: dict[str, str] = {}  # normalised name -> name of a type that this data set founds
    for label in labels:
        if label in chosen:
            verdict = "same" if chosen[label] in types else "new"
            match = Match(label, verdict, chosen[label], "mapping")
        else:
            match = _matched(label, types)
            key = ontology.normalised(label) or label
            if match.verdict == "new" and key in founded:
                match = Match(label, "new", founded[key], _likeness(label, founded[key]))
        if match.verdict == "new":
            founded.setdefault(ontology.normalised(match.name) or match.name, match.name)
        matches.append(match)
    return Reconciliation(types, tuple(matches), tuple(label for label in chosen if label not in labels))


def _likeness(label: str, name: str) -> str:
    if label == name:
        return "exact"
    return "case" if label.strip().casefold() == name.strip().casefold() else "plural"


def _matched(label: str, types: CellTypes) -> Match:
    if label in types:
        return Match(label, "same", label, "exact")
    found = ontology.find(label)
    named = [ontology.find(name) for name in types.names]
    rules = {
        "case": [label.strip().casefold() == name.strip().casefold() for name in types.names],
        "plural": [
            bool(key := ontology.normalised(label)) and key == ontology.normalised(name) for name in types.names
        ],
        # a label that is itself an id is settled by the ids of the types
        "synonym": [found is not None and found == other and not label.startswith("CL:") for other in named],
        "ontology": [found is not None and found.id == id for id in types.ontology_ids],
    }
    for by, hits in rules.items():
        names = [name for name, hit in zip(types.names, hits, strict=True) if hit]
        if len(names) == 1:
            return Match(label, "same", names[0], by)
        if names:
            note = f"reads like {listed(names)} alike; settle it in a mapping"
            return Match(label, "new", label, "", note)
    return Match(label, "new", label)

"""What a report says in words: the summary, what needs attention and how to mend it, and the methods paragraph."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from evercell.colours import UNKNOWN
from evercell.doctor import Finding

# Below these a report asks the reader to look. They are conventions, not measurements: each only starts a sentence.
LOW_F1 = 0.5
FEW_CELLS = 10


@dataclass(frozen=True)
class Attention:
    """One thing to look at, and what to do about it."""

    finding: str
    mend: str = ""


@dataclass(frozen=True)
class Overview:
    """The numbers that the words are made of.

    Parameters
    ----------
    types
        One row a label, most cells first and Unknown last: `cells`, `share` and, where known, `confidence` (mean) and
        `majority` (cells by majority vote).
    confidence
        Mean confidence of all cells, where known.
    confident
        Share of cells with a confidence of 0.8 or more, where known.
    settings
        ``uns[key]`` as it was written by the annotation.
    truth
        Name of the `obs` column with given labels, where there is one.
    accuracy, macro_f1, per_type
        Agreement with the given labels, `per_type` with columns `cells`, `precision`, `recall` and `f1`.
    known_markers
        Label to its known markers that were measured, each with whether it is raised in the cells of the label. A
        label without an entry has no known markers.
    sets
        Share of cells by the size of their set of types, in words, where sets were made.
    single
        Share of cells with a set of one type.
    """

    types: pd.DataFrame
    confidence: float | None = None
    confident: float | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    truth: str | None = None
    accuracy: float | None = None
    macro_f1: float | None = None
    per_type: pd.DataFrame | None = None
    known_markers: Mapping[str, Mapping[str, bool]] = field(default_factory=dict)
    sets: Mapping[str, float] = field(default_factory=dict)
    single: float | None = None

    @property
    def scored_types(self) -> list[dict[str, Any]]:
        """Figures by given type, most cells first."""
        if self.per_type is None:
            return []
        rows = self.per_type.sort_values("cells", ascending=False, kind="stable")
        return [{"type": str(name)} | {str(key): value for key, value in row.items()} for name, row in rows.iterrows()]

    @property
    def n_cells(self) -> int:
        return int(self.types["cells"].sum())

    @property
    def known(self) -> pd.DataFrame:
        return self.types.drop(index=UNKNOWN, errors="ignore")

    @property
    def n_unknown(self) -> int:
        return int(self.types["cells"].get(UNKNOWN, 0))

    @property
    def coverage(self) -> Mapping[str, Any]:
        found = self.settings.get("coverage")
        return found if isinstance(found, Mapping) else {}

    @property
    def share_of_model(self) -> float | None:
        share = self.coverage.get("share_of_model")
        return None if share is None else float(share)


def percent(share: float) -> str:
    """A share from 0 to 1 as a reader wants it: ``0.3124`` is ``31.2%``, a few cells of many are never ``0.0%``."""
    if 0 < share < 0.001:
        return "<0.1%"
    if 0.999 < share < 1:
        return ">99.9%"
    return f"{100 * share:.1f}%"


def plural(number: int, noun: str) -> str:
    """``1 cell``, ``2,638 cells``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def listed(items: Sequence[str], *, most: int = 5) -> str:
    """``a, b and c``; beyond `most`, ``a, b and 4 more``."""
    shown = list(items) if len(items) <= most else [*items[: most - 1], f"{len(items) - most + 1} more"]
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}"


def coverage_sentence(overview: Overview) -> str:
    """How many of the model's genes were measured, or an empty text where that is not recorded."""
    coverage = overview.coverage
    if coverage.get("sentence"):
        return str(coverage["sentence"]).strip().rstrip(".") + "."
    if {"n_matched", "n_model"} <= set(coverage) and overview.share_of_model is not None:
        matched, model = int(coverage["n_matched"]), int(coverage["n_model"])
        return f"{matched:,} of the model's {model:,} genes were measured ({percent(overview.share_of_model)})."
    return ""


def summary(overview: Overview, attention: Sequence[Attention]) -> list[str]:
    """The report in a few sentences, the most important first."""
    known = overview.known
    model = overview.settings.get("model")
    by = f" with the model {model}" if model else ""
    were = "was" if overview.n_cells == 1 else "were"
    found = plural(len(known), "cell type") if len(known) else "no known cell type"
    lines = [
        f"{plural(overview.n_cells, 'cell')} {were} annotated{by}; {found} {'was' if len(known) < 2 else 'were'} found."
    ]
    if len(known):
        top = [f"{name} ({percent(share)})" for name, share in known["share"].head(3).items()]
        others = "one makes" if len(known) == 4 else f"{len(known) - 3} make"
        rest = "" if len(known) <= 3 else f"; the other {others} up {percent(known['share'][3:].sum())}"
        lines.append(f"{'Most cells are' if len(top) > 1 else 'All known cells are'} {listed(top)}{rest}.")
    if overview.n_unknown:
        share = percent(overview.n_unknown / overview.n_cells)
        lines.append(
            f"{plural(overview.n_unknown, 'cell')} ({share}) resembled no type of the model: labelled Unknown."
        )
    else:
        lines.append("No cell was labelled Unknown.")
    if overview.confidence is not None:
        line = f"The mean confidence is {overview.confidence:.2f}"
        if overview.confident is not None:
            line += f"; {percent(overview.confident)} of the cells reach 0.80"
        lines.append(f"{line}.")
    if overview.single is not None:
        lines.append(f"The label sets leave one type for {percent(overview.single)} of the cells.")
    if sentence := coverage_sentence(overview):
        lines.append(sentence)
    if checked := [any(genes.values()) for genes in overview.known_markers.values() if genes]:
        lines.append(
            f"Genes that the literature knows them by are raised in {sum(checked)} of the "
            f"{plural(len(checked), 'label')} that have such genes in the data."
        )
    if overview.accuracy is not None and overview.macro_f1 is not None:
        lines.append(
            f"Against the labels in “{overview.truth}”, {percent(overview.accuracy)} of the cells agree "
            f"(macro-F1 {overview.macro_f1:.2f})."
        )
    if attention:
        lines.append(f"{plural(len(attention), 'point')} below {'needs' if len(attention) == 1 else 'need'} attention.")
    else:
        lines.append("Nothing stands out that needs attention.")
    return lines


def attention(overview: Overview, notes: Sequence[str] = (), *, checked: Sequence[Finding] = ()) -> list[Attention]:
    """What a reader should look at before trusting the labels, each with its mend.

    Parameters
    ----------
    overview
        The numbers of the report.
    notes
        Warnings that the caller adds, shown first as they are.
    checked
        What the doctor found in the labels (`evercell.doctor.check_annotation`).
    """
    found = [Attention(str(note)) for note in notes]
    for one in checked:
        if one.severity != "info":
            expected = f" (expected: {one.expected})" if one.expected else ""
            words = [f"{text[0].upper()}{text[1:]}." for text in (one.cause, one.mend) if text]
            found.append(Attention(f"{one.subject.capitalize()}: {one.found.rstrip('.')}{expected}.", " ".join(words)))
    found += _without_known_markers(overview)
    found += _poor_agreement(overview)
    return found


def _poor_agreement(overview: Overview) -> list[Attention]:
    """Given types that few cells were labelled with: those that the model lacks, and those that it told badly."""
    if overview.per_type is None:
        return []
    poor = overview.per_type[(overview.per_type["f1"] < LOW_F1) & (overview.per_type["cells"] >= FEW_CELLS)]
    classes = overview.settings.get("classes")
    known = {str(name) for name in ([] if classes is None else classes)}
    lacking = [f"{name} ({plural(int(n), 'cell')})" for name, n in poor["cells"].items() if known and name not in known]
    told_badly = [f"{name} (F1 {value:.2f})" for name, value in poor["f1"].items() if not known or name in known]
    found = []
    if lacking:
        found.append(
            Attention(
                f"Labels in “{overview.truth}” that the model has no type of that name for: {listed(lacking)}.",
                "Unknown is the right answer for a type that it does not know; teach it with “evercell update”. If it "
                "knows the type by another name, the confusion table shows which.",
            )
        )
    if told_badly:
        found.append(
            Attention(
                f"Poor agreement with “{overview.truth}”: {listed(told_badly)}.",
                "The confusion table shows where these cells went.",
            )
        )
    return found


def _without_known_markers(overview: Overview) -> list[Attention]:
    """Labels that the known markers do not speak for, or of which none was measured."""
    known = overview.known_markers
    against = [name for name, genes in known.items() if len(genes) > 1 and not any(genes.values())]
    unmeasured = [name for name, genes in known.items() if not genes]
    found = []
    if against:
        found.append(
            Attention(
                f"Known markers are not raised: {listed(against)}.",
                "None of the genes that the literature knows these types by is higher in the cells of the label than "
                "in the others. Look at the marker genes below before you trust the label.",
            )
        )
    if unmeasured:
        found.append(
            Attention(
                f"No known marker was measured: {listed(unmeasured)}.",
                "These labels rest on other genes. A panel with markers of the type would tell more.",
            )
        )
    return found


def methods(
    overview: Overview,
    *,
    versions: Mapping[str, str],
    drawn: int | None,
    seed: int,
    neighbours: int,
    ranked: bool,
    basis: str | None = None,
) -> str:
    """A methods paragraph to copy into a manuscript.

    Parameters
    ----------
    overview
        The numbers of the report.
    versions
        Package name to version.
    drawn
        Cells on the map; None where there is no map.
    seed, neighbours
        Settings of the map.
    ranked
        Whether marker genes were ranked.
    basis
        Key of the coordinates of the file that the map shows, where it is no UMAP made for the report.
    """
    settings = overview.settings
    model = f"the model {settings['model']}" if settings.get("model") else "a trained model"
    about = [
        f"{title} {settings[name]}"
        for name, title in (("model_hash", "hash"), ("species", "species"))
        if settings.get(name)
    ]
    if about:
        model += f" ({', '.join(about)})"
    version = settings.get("version") or versions.get("evercell", "")
    lines = [f"Cell types of {plural(overview.n_cells, 'cell')} were assigned with evercell {version} and {model}."]
    if sentence := coverage_sentence(overview):
        lines.append(sentence)
    threshold = settings.get("threshold")
    if isinstance(threshold, int | float) and math.isfinite(threshold):  # infinite where nothing is rejected
        lines.append(
            f"Cells with an unknown score above {threshold:.4g} were labelled Unknown ({overview.n_unknown:,})."
        )
    if drawn is not None and basis is None:
        of = "the cells" if drawn == overview.n_cells else f"{drawn:,} cells, sampled by type,"
        lines.append(
            f"A UMAP of {of} was computed from the model's representation with evercell "
            f"({neighbours} neighbours, seed {seed})."
        )
    if ranked:
        lines.append(
            "Marker genes were ranked by Welch's t test of each label against all other cells on "
            "log(1 + counts per 10,000), leaving out mitochondrial and ribosomal genes."
        )
    if overview.accuracy is not None and overview.macro_f1 is not None:
        lines.append(
            f"Agreement with given labels: accuracy {overview.accuracy:.3f}, macro-F1 {overview.macro_f1:.3f}."
        )
    return " ".join(lines)

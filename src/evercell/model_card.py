"""What a run says of its model: its figures, and ``MODEL_CARD.md`` for those who find it without its makers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from evercell import __version__
from evercell.registry import SUMMARY

if TYPE_CHECKING:
    from evercell.annotator import Annotator


def model_card(model: Annotator, *, summary: str = "") -> str:
    """Text of the card, from the model and the last stage of its ledger; `summary` is what lists of models show."""
    facts: Mapping[str, Any] = model.ledger.stages[-1].facts if len(model.ledger) else {}
    kinds = f"{len(model.types)} cell types" if len(model.types) else "no cell types: pretrained only"
    genes = f"{len(model.vocabulary):,} {model.vocabulary.species} genes"
    lines = [
        "# Model card",
        "",
        *([f"{SUMMARY}{summary}", ""] if summary else []),
        f"Written by evercell {__version__}. {kinds}, {genes}, `{model.backbone.name}` backbone, "
        f"{len(model.ledger)} stage{'s' * (len(model.ledger) != 1)}.",
        "",
        "## Trained on",
        "",
        *[
            f"- stage {number}: {code(one['name'])}: {one['cells']:,} cells, {one['genes']:,} genes"
            for number, stage in enumerate(model.ledger.stages, start=1)
            for one in stage.facts.get("data", [])
        ],
    ]
    for number, stage in enumerate(model.ledger.stages, start=1):
        if stage.facts.get("verb") == "import":
            source = stage.facts["source"]
            lines.append(f"- stage {number}: imported from {code(source['name'])} ({source['format']})")
            lines += [f"  - {inert(note)}" for note in stage.facts["notes"]]
    if training := training_facts(facts):
        lines += [
            *("", "## On held-out cells", "", inert(training["split"])),
            "The saved model was then trained on all cells." if facts["settings"].get("refit") else "",
            *("", "```", score_table(facts["metrics"]), "```", ""),
            *("| type | held-out cells | precision | recall | F1 |", "|---|---:|---:|---:|---:|"),
        ]
        lines += [
            f"| {inert(row['type'])} | {row['cells']:,} | "
            f"{' | '.join(format(row[one], '.2f') for one in ('precision', 'recall', 'f1'))} |"
            for row in training["per_type"]
        ]
    if len(model.types):
        terms = zip(model.types.names, model.types.ontology_ids, strict=True)
        lines += ["", "## Cell types", "", *[f"- {inert(name)}{f' ({term})' if term else ''}" for name, term in terms]]
    lines += ["", "## Limits", ""]
    sketched = [str(n) for n, stage in enumerate(model.ledger.stages, 1) if stage.facts.get("bank") == "sketch"]
    if sketched:
        lines.append(
            f"- Of stage {', '.join(sketched)} no cell is kept, only a sketch: means and covariances of its types. "
            "That is no proof of privacy in the sense of differential privacy."
        )
    if len(model.bank):
        lines.append(
            "- `bank.h5ad` and `sealed.h5ad`, if it is there, hold counts of labelled cells: pass the model on only "
            "where you may pass those on."
        )
    unknown = "- A cell of a type that is not listed should be called Unknown; some will not be."
    if model.linear_only:
        lines += [
            "- The linear member alone tells the types; the representation is that of an untrained network.",
            "- Of imported types no cell is kept. An update leaves the weights of those that it has no cells of as "
            "they are, but nothing tells whether cells of theirs go to a new type; made-up cells guard against it. "
            "Types that one study taught are often missed in others.",
        ]
        if model.rejector is None or model.rejector.threshold(0.0) == float("inf"):
            unknown = "- No cell is called Unknown and confidence is not calibrated: both take the cells of an update."
    lines += [
        "- Held-out cells of the same studies are easier than those of a study with another technology or tissue.",
        unknown,
        "- Not for diagnosis.",
    ]
    return "\n".join(lines) + "\n"


def inert(text: str) -> str:
    """A name that comes from data, so that no reader of Markdown takes it for HTML, a link or a border of a table."""
    return re.sub(r"[<>&|\[\]`!\n\r]", lambda found: f"&#{ord(found[0])};", text)


def code(text: str) -> str:
    """A name between backticks, where Markdown holds all but a backtick and a line break for text."""
    plain = re.sub(r"[`\n\r|]", " ", text)
    return f"`{plain}`"


def training_facts(facts: Mapping[str, Any]) -> dict[str, Any]:
    """A stage of the ledger as `write_report` takes it."""
    metrics = facts.get("metrics") or {}
    if "model" not in metrics:
        return {}
    held_out = facts.get("held_out") or {}
    split = f"{held_out.get('cells', 0):,} cells were held out"
    if held_out.get("groups"):
        split += f", all of {', '.join(held_out['groups'])}"
    elif held_out.get("by") == "cells":
        split += ", drawn at random: cells of the same donors were trained on"
    curve = [
        {"step": row["step"], "loss": row["loss"], "validation": row.get("held_out_loss")}
        for row in facts.get("history", [])
    ]
    per_type = [{"type": name, **row} for name, row in metrics["model"].get("per_type", {}).items()]
    found = {"split": f"{split}.", "model": metrics["model"], "curve": curve, "per_type": per_type}
    return found | ({"linear": metrics["linear"]} if "linear" in metrics else {})


def score_table(metrics: Mapping[str, Mapping[str, Any]]) -> str:
    """Figures on held-out cells: the model, then its transformer alone and the linear baseline."""
    from evercell.evaluation import IN_WORDS

    columns = ("accuracy", "balanced_accuracy", "macro_f1", "ece")
    words = {"model": "evercell", "transformer": "transformer alone", "linear": "linear baseline"}
    rows = [
        [word, *("" if (value := metrics[name].get(one)) is None else f"{value:.3f}" for one in columns)]
        for name, word in words.items()
        if name in metrics
    ]
    return table(["", *(IN_WORDS[name] for name in columns)], rows)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows of text under a header, the first column to the left and the others to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = []
    for row in [header, *rows]:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)

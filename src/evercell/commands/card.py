"""``MODEL_CARD.md``: what a model is, for those who find it without its makers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from evercell import __version__
from evercell.commands.models import score_table, training_facts

if TYPE_CHECKING:
    from evercell.annotator import Annotator


def model_card(model: Annotator) -> str:
    """Text of the card, from the model and the last stage of its ledger."""
    facts: Mapping[str, Any] = model.ledger.stages[-1].facts if len(model.ledger) else {}
    kinds = f"{len(model.types)} cell types" if len(model.types) else "no cell types: pretrained only"
    genes = f"{len(model.vocabulary):,} {model.vocabulary.species} genes"
    lines = [
        "# Model card",
        "",
        f"Written by evercell {__version__}. {kinds}, {genes}, `{model.backbone.name}` backbone, "
        f"{len(model.ledger)} stage{'s' * (len(model.ledger) != 1)}.",
        "",
        "## Trained on",
        "",
        *[f"- `{one['name']}`: {one['cells']:,} cells, {one['genes']:,} genes" for one in facts.get("data", [])],
    ]
    if training := training_facts(facts):
        lines += [
            *("", "## On held-out cells", "", training["split"]),
            "The saved model was then trained on all cells." if model.settings.get("refit") else "",
            *("", "```", score_table(facts["metrics"]), "```", ""),
            *("| type | held-out cells | precision | recall | F1 |", "|---|---:|---:|---:|---:|"),
        ]
        lines += [
            f"| {row['type']} | {row['cells']:,} | {row['precision']:.2f} | {row['recall']:.2f} | {row['f1']:.2f} |"
            for row in training["per_type"]
        ]
    if len(model.types):
        terms = zip(model.types.names, model.types.ontology_ids, strict=True)
        lines += ["", "## Cell types", "", *[f"- {name}{f' ({term})' if term else ''}" for name, term in terms]]
    lines += ["", "## Limits", ""]
    lines += [
        "- Held-out cells of the same studies are easier than those of a study with another technology or tissue.",
        "- A cell of a type that is not listed should be called Unknown; some will not be.",
        "- `bank.h5ad` holds counts of some training cells: pass the model on only where you may pass those on.",
        "- Not for diagnosis.",
    ]
    return "\n".join(lines) + "\n"

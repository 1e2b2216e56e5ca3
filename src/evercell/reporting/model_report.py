"""write_model_report: one self-contained HTML page about a model: what it knows, how it learnt it, how good it is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evercell import __version__
from evercell.colours import type_colours
from evercell.reporting.findings import FEW_CELLS, LOW_F1, Attention, listed, percent, plural
from evercell.reporting.known_markers import known_markers
from evercell.reporting.page import write_page
from evercell.reporting.stages import history

if TYPE_CHECKING:
    from evercell.annotator import Annotator


def write_model_report(
    model: Annotator, path: str | Path, *, name: str, card: str = "", title: str | None = None
) -> Path:
    """Write one HTML page about a model: its types, stages, forgetting matrix, held-out figures and card.

    Parameters
    ----------
    model
        The model, with its ledger.
    path
        The HTML file; replaced whole or not at all.
    name
        What the page calls the model.
    card
        Text of its model card.
    title
        Heading of the page.

    Returns
    -------
    Path
        `path`.

    Examples
    --------
    >>> write_model_report(model, "model.html", name="our-pancreas")  # doctest: +SKIP
    """
    stages = [stage.facts for stage in model.ledger]
    told = history(stages)
    types = _types(model, stages)
    points = _attention(model, types, stages)
    held_out = (stages[-1].get("metrics") or {}).get("model") or {} if stages else {}
    return write_page(
        "model.html",
        path,
        scripts=("page.js",),
        title=title or f"The model {name}",
        name=name,
        model=model,
        genes=len(model.vocabulary),
        species=model.vocabulary.species,
        types=types,
        colours=type_colours(model.types.names, first=model.types.names),
        summary=_summary(model, name, stages, points),
        attention=points,
        history=told,
        held_out=held_out,
        n_bank=len(model.bank),
        n_sealed=0 if model.sealed is None else len(model.sealed),
        card=card.strip(),
        methods=_methods(model, name, stages),
        settings=_settings(model),
    )


def _types(model: Annotator, stages: Sequence[Any]) -> list[dict[str, Any]]:
    """A row for each type: stage, ontology id, known markers among the model's genes, figures on cells held back."""
    sealed = ((stages[-1].get("sealed") or {}) if stages else {}).get("types", {})
    genes = {str(symbol).upper() for symbol in model.vocabulary.symbols}
    rows = []
    for name, term, stage in zip(model.types.names, model.types.ontology_ids, model.types.stages, strict=True):
        known = known_markers(term, species=model.vocabulary.species)
        rows.append(
            {
                "type": name,
                "term": term or "",
                "stage": stage,
                "known": {gene: gene.upper() in genes for gene in known},
                "sealed": sealed.get(name, {}).get("cells"),
                "recall": sealed.get(name, {}).get("recall"),
            }
        )
    return rows


def _attention(model: Annotator, types: Sequence[dict[str, Any]], stages: Sequence[Any]) -> list[Attention]:
    """What to know before the model is used."""
    found = []
    if not types:
        text = "It knows no cell types: it was pretrained, and is a start for training."
        found.append(Attention(text, "Make an annotator of it with “evercell train --from”."))
    poor = [row for row in types if (row["sealed"] or 0) >= FEW_CELLS and row["recall"] < LOW_F1]
    if poor:
        names = [f"{row['type']} ({percent(row['recall'])} of {row['sealed']:,})" for row in poor]
        found.append(
            Attention(
                f"Fewer than half of the sealed cells are labelled rightly: {listed(names)}.",
                "Teach it more cells of these types, from more donors, with “evercell update”; until then look at "
                "their marker genes.",
            )
        )
    few = [row["type"] for row in types if row["sealed"] is not None and row["sealed"] < FEW_CELLS]
    if few:
        found.append(
            Attention(
                f"Fewer than {FEW_CELLS} sealed cells: {listed(few)}.",
                "Figures of these types say little, and an update is not stopped by a fall of one of them alone.",
            )
        )
    forced = [f"stage {stage['stage']}" for stage in stages if stage.get("forced") and _fell(stage)]
    if forced:
        found.append(
            Attention(
                f"Old types fell and the update was forced: {listed(forced)}.",
                "“evercell bisect” tells what fell, “evercell revert” writes the model as it was before.",
            )
        )
    if model.linear_only:
        text = "The linear member alone tells the types; the network beside it is untrained."
        found.append(Attention(text, "Train on cells of your own to have all three members."))
    return found


def _fell(stage: Any) -> bool:
    return bool((stage.get("tries") or [{}])[-1].get("fallen"))


def _summary(model: Annotator, name: str, stages: Sequence[Any], points: Sequence[Attention]) -> list[str]:
    kinds = plural(len(model.types), "cell type") if len(model.types) else "no cell types"
    lines = [f"The model {name} knows {kinds} by {len(model.vocabulary):,} {model.vocabulary.species} genes."]
    if stages:
        lines.append(history(stages)["sentence"])
        metrics = stages[-1].get("metrics") or {}
        if "model" in metrics and metrics["model"].get("accuracy") is not None:
            n = (stages[-1].get("held_out") or {}).get("cells", 0)
            line = (
                f"Of {plural(n, 'held-out cell')} of its last stage it labels {percent(metrics['model']['accuracy'])}"
            )
            line += f" rightly (macro-F1 {metrics['model']['macro_f1']:.2f})"
            if "linear" in metrics:
                line += f", a linear model on the same cells {percent(metrics['linear']['accuracy'])}"
            lines.append(f"{line}. Cells of another study are harder.")
    if points:
        lines.append(f"{plural(len(points), 'point')} below {'needs' if len(points) == 1 else 'need'} attention.")
    return lines


def _methods(model: Annotator, name: str, stages: Sequence[Any]) -> str:
    """A paragraph to copy into a manuscript."""
    lines = [
        f"Cell types were assigned with the evercell {__version__} model {name} (fingerprint "
        f"{model.fingerprint[:16]}): {plural(len(model.types), 'cell type')}, {len(model.vocabulary):,} "
        f"{model.vocabulary.species} genes, {model.backbone.name} backbone."
    ]
    for stage in stages:
        data = [f"{one['name']} ({plural(int(one['cells']), 'cell')})" for one in stage.get("data", [])]
        if data:
            how = f" by the strategy {stage['strategy']}" if stage.get("strategy") else ""
            lines.append(f"Stage {stage['stage']} ({stage.get('verb', '')}{how}, seed {stage.get('seed', 0)}): ")
            lines[-1] += f"{listed(data, most=12)}."
    metrics = (stages[-1].get("metrics") or {}).get("model") if stages else None
    if metrics and metrics.get("accuracy") is not None:
        n = (stages[-1].get("held_out") or {}).get("cells", 0)
        lines.append(
            f"On {plural(n, 'held-out cell')} of the last stage: accuracy {metrics['accuracy']:.3f}, "
            f"macro-F1 {metrics['macro_f1']:.3f}."
        )
    return " ".join(lines)


def _settings(model: Annotator) -> list[tuple[str, str]]:
    return [
        ("fingerprint", model.fingerprint),
        ("ledger head", model.ledger.head),
        ("tokenizer", model.tokenizer.name),
        ("backbone", model.backbone.name),
        ("rejector", "none" if model.rejector is None else model.rejector.name),
        ("example cells in the bank", f"{len(model.bank):,}"),
        ("sealed cells", f"{0 if model.sealed is None else len(model.sealed):,}"),
    ]

"""What the ledger of a model says of its stages, as a report shows it: history, forgetting matrix, held-out figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from evercell.evaluation import IN_WORDS
from evercell.model_card import training_facts
from evercell.reporting.figures import learning_curve

Facts = Mapping[str, Any]
MEMBERS = {"model": "this model", "transformer": "its transformer alone", "linear": "linear baseline"}
FIGURES = ("accuracy", "balanced_accuracy", "macro_f1", "ece")


def history(stages: Sequence[Facts]) -> dict[str, Any]:
    """The stages of a model, in order.

    Parameters
    ----------
    stages
        Facts of each stage of the ledger.

    Returns
    -------
    dict
        `rows` (a stage each), `matrix` (`forgetting_matrix`), `types` (`type_table`), `scores`, `per_type`, `split`
        and `curve` of the last stage. Empty for a model without stages.
    """
    if not stages:
        return {}
    last = training_facts(stages[-1])
    metrics = stages[-1].get("metrics") or {}
    scores = [
        {"name": text, "figures": [metrics[name].get(figure) for figure in FIGURES]}
        for name, text in MEMBERS.items()
        if isinstance(metrics.get(name), Mapping)
    ]
    return {
        "rows": [_row(number, stage) for number, stage in enumerate(stages, start=1)],
        "matrix": forgetting_matrix(stages),
        "types": type_table(stages),
        "figures": [IN_WORDS[one] for one in FIGURES],
        "scores": scores,
        "split": last.get("split", ""),
        "per_type": last.get("per_type", []),
        "curve": learning_curve(last.get("curve", [])),
        "sentence": _sentence(stages),
    }


def _row(number: int, stage: Facts) -> dict[str, Any]:
    metrics = (stage.get("metrics") or {}).get("model") or {}
    source = stage.get("source") or {}
    data = [{"name": str(one["name"]), "cells": int(one["cells"])} for one in stage.get("data", [])]
    if source.get("name"):
        data.append({"name": str(source["name"]), "cells": 0})
    tries = stage.get("tries") or []
    return {
        "number": int(stage.get("stage", number)),
        "verb": str(stage.get("verb", "")),
        "strategy": str(stage.get("strategy", "")),
        "data": data,
        "added": [str(name) for name in stage.get("types_added", [])],
        "held_out": int((stage.get("held_out") or {}).get("cells", 0)),
        "accuracy": metrics.get("accuracy"),
        "macro_f1": metrics.get("macro_f1"),
        "fallen": [str(name) for name in tries[-1].get("fallen", [])] if tries else [],
        "tries": len(tries),
    }


def forgetting_matrix(stages: Sequence[Facts]) -> dict[str, Any]:
    """Share of right labels on the sealed cells of each stage (columns) after each stage (rows).

    Returns
    -------
    dict
        `columns` (numbers of stages), `rows` (`number`, `shares` with None where not yet learnt). Empty for fewer
        than two columns, because then there is nothing to forget.
    """
    found = [
        (int(stage.get("stage", number)), (stage.get("sealed") or {}).get("stages", {}))
        for number, stage in enumerate(stages, start=1)
    ]
    columns = sorted({int(part) for _, row in found for part in row})
    if len(columns) < 2:
        return {}
    rows = [{"number": number, "shares": [row.get(str(part)) for part in columns]} for number, row in found]
    first = {part: next(row[str(part)] for _, row in found if str(part) in row) for part in columns}
    final = found[-1][1]
    lost = {part: final[str(part)] - first[part] for part in columns[:-1] if str(part) in final}
    return {"columns": columns, "rows": rows, "lost": lost}


def type_table(stages: Sequence[Facts]) -> dict[str, Any]:
    """Share of right labels on the sealed cells of each type (rows) after each stage (columns)."""
    found = [(stage.get("sealed") or {}).get("types", {}) for stage in stages]
    names = list(dict.fromkeys(name for row in found for name in row))
    if not names:
        return {}
    rows = [
        {
            "name": name,
            "cells": next(int(row[name]["cells"]) for row in reversed(found) if name in row),
            "shares": [row[name]["recall"] if name in row else None for row in found],
        }
        for name in names
    ]
    return {"columns": [int(stage.get("stage", n)) for n, stage in enumerate(stages, start=1)], "rows": rows}


def _sentence(stages: Sequence[Facts]) -> str:
    """The history in a sentence or two."""
    types = sum(len(stage.get("types_added", [])) for stage in stages)
    kinds = f"{types} cell type{'s' * (types != 1)}"
    if len(stages) == 1:
        return f"The model was made in one stage and knows {kinds}."
    text = f"The model learnt in {len(stages)} stages and knows {kinds}."
    lost = forgetting_matrix(stages).get("lost", {})
    if lost:
        worst = min(lost, key=lambda part: lost[part])
        if lost[worst] < -0.005:
            text += (
                f" It forgot most of stage {worst}: on its sealed cells {-100 * lost[worst]:.1f} of 100 labels fewer "
                "are right now than when it was learnt."
            )
        else:
            text += " On the sealed cells of earlier stages it is as good as when it learnt them."
    return text

"""The work itself, in a process of its own: annotate a file, make files of the result, teach a model.

Of an annotation these files are left in its folder:

::

    annotated.h5ad  labels.csv  result.json      the labels, and what the page says of them
    map.json                                     cells of the map
    genes.json  genes-{starts,cells,values}.npy  log counts of these cells, gene by gene
    labels.npy                                   place in `types` of each cell's label
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from anndata import AnnData

from evercell import registry
from evercell.annotation import annotate as label
from evercell.cells import find_counts, read_cells, write_cells, write_table
from evercell.checkpoint import load, save
from evercell.choosing import Choice, choose
from evercell.colours import PALETTE, UNKNOWN, type_colours
from evercell.copying import can_be_extended, extended
from evercell.doctor import check_labels
from evercell.errors import LabelsError
from evercell.gene_names import canonical_genes
from evercell.model_card import model_card
from evercell.reporting import write_report
from evercell.reporting.annotated import SAMPLE_COLUMNS, sample_columns
from evercell.reporting.cell_map import drawing_order, stratified_sample
from evercell.reporting.findings import Overview, attention, summary
from evercell.reporting.umap import NEIGHBOURS, umap
from evercell.serving.corrections import Correction, corrected
from evercell.streaming import annotated
from evercell.updating.update import update

if TYPE_CHECKING:
    from evercell.cells import Counts

KEY = "evercell"
CORRECTED = f"{KEY}_corrected"
MOST_DRAWN = 20_000
MOST_SAMPLES = 40
SURE = 0.9
"""Confidence from which on a cell may be taught with the label that the model gave it."""
MOST_SURE = 200
"""Such cells of each type: enough to hold on to it, few enough not to drown what the user corrected."""

Say = Callable[..., None]
Task = dict[str, Any]


def set_threads(threads: int) -> None:
    """Keep this process to its share of the cores."""
    import numba

    torch.set_num_threads(threads)
    numba.set_num_threads(min(threads, numba.get_num_threads()))


def annotate(task: Task, say: Say) -> dict[str, Any]:
    """Label the cells of the uploaded file, and leave in the folder what the page shows and gives away."""
    folder, options, name = Path(task["folder"]), task["options"], task["name"]
    (file,) = folder.glob("upload.*")
    output = folder / "annotated.h5ad"
    say("reading the file")
    stored = _can_be_extended(file, output)
    adata = read_cells(file, backed=stored)
    choice, path = None, Path(options["path"] or ".")
    if not options["path"]:
        say("choosing the model")
        listed = [registry.describe(one) for one in options["models"]]
        choice = choose(adata, models=listed, name=name)
        path = choice.path
    say("loading the model")
    model = load(path)
    how: dict[str, Any] = {one: options[one] for one in ("reject", "majority")}
    how |= {"empty_cells": "keep", "name": name, "model_name": path.name}
    with annotated(model, adata, file, output, **how) if stored else nullcontext(label(model, adata, **how)) as result:
        say("writing the result")
        result.write_into(adata)
        if stored:
            arrays = {one: adata.obsm[one] for one in (f"X_{KEY}", f"{KEY}_proba")}
            extended(file, output, obs=adata.obs, obsm=arrays, uns=result.facts(adata.obs[list(result.obs)]))
        else:
            write_cells(adata, output)
        write_table(result.obs.rename_axis("cell"), folder / "labels.csv")
        labels = result.labels
        drawn = _drawn(labels) if options["map"] else np.zeros(0, dtype=np.int64)
        space = np.array(result.representation[drawn])
        obs, info = result.obs, result.info
    counts = find_counts(adata, name=name, empty_cells="keep")
    types = _types(obs, info)
    samples = adata.obs[sample_columns(adata)]
    note = _map(folder, obs, types, samples, drawn, space, say) if options["map"] else "No map was asked for."
    if not note:
        say("preparing the genes")
        _genes(folder, counts, drawn)
    np.save(folder / "labels.npy", pd.Index(types.index).get_indexer(labels).astype(np.int32))
    shown = _shown(name, adata, obs, types, info, choice)
    shown["map"] = {"cells": 0 if note else len(drawn), "note": note}
    (folder / "result.json").write_text(json.dumps(shown), encoding="utf-8")
    if adata.isbacked:
        adata.file.close()
    file.unlink()
    return {"model": str(path), "name": path.name, "cells": adata.n_obs, "types": list(types.index)}


def files(task: Task, say: Say) -> dict[str, Any]:
    """A file of an annotation, with the labels that the user corrected."""
    folder, kind, output = Path(task["folder"]), task["options"]["kind"], Path(task["options"]["output"])
    source = folder / "annotated.h5ad"
    say("preparing the file")
    made = folder / f"making-{output.name}.{kind}"
    try:
        if kind == "html":
            adata = read_cells(source)
            n_changed = int(_corrected(adata, task)[1].sum())
            note = [f"{n_changed:,} cells were corrected by hand; this report shows the labels of the model."]
            stages = [stage.facts for stage in load(task["facts"]["model"]).ledger]
            title = f"Cell types of {task['name']}"
            write_report(adata, made, key=KEY, title=title, stages=stages, warnings=note if n_changed else [])
        else:
            adata = read_cells(source, backed=True)
            labels, _ = _corrected(adata, task)
            adata.obs[CORRECTED] = pd.Categorical(labels)
            if kind == "h5ad":
                extended(source, made, obs=adata.obs, obsm={}, uns={})
            else:
                own = [one for one in adata.obs if one == KEY or one.startswith(f"{KEY}_")]
                write_table(adata.obs[own].rename_axis("cell"), made)
            adata.file.close()
        made.replace(output)
    finally:
        made.unlink(missing_ok=True)
    return {}


def teach(task: Task, say: Say) -> dict[str, Any]:
    """Teach the model of an annotation the corrected cells; the new model is a folder beside the others."""
    folder, options = Path(task["folder"]), task["options"]
    say("reading the cells")
    adata = read_cells(folder / "annotated.h5ad", backed=True)
    labels, chosen = _corrected(adata, task)
    chosen &= labels != UNKNOWN
    n_corrected = int(chosen.sum())
    if not n_corrected:
        raise LabelsError("no cell was given a cell type by hand", hint="correct some labels first")
    if options["confident"]:
        chosen |= _sure(adata.obs, labels, chosen)
    adata.obs["cell_type"] = labels
    cells = adata[np.flatnonzero(chosen)].to_memory()
    adata.file.close()
    say("loading the model")
    old = load(task["facts"]["model"])
    # Each name is meant as it was written: one that the model does not have is a new type.
    new = update(
        old,
        cells,
        "cell_type",
        strategy=options["strategy"],
        mapping={name: name for name in set(labels[chosen])},
        names=[task["name"]],
    )
    say("writing the model")
    target = Path(options["target"])
    target.parent.mkdir(parents=True, exist_ok=True)
    about = f"{options['base']}, taught {n_corrected:,} corrected cells on the page"
    save(new, target, card=model_card(new, summary=about), previous=task["facts"]["model"])
    facts = new.ledger.stages[-1].facts
    return {
        "model": target.name,
        "corrected": n_corrected,
        "confident": int(chosen.sum()) - n_corrected,
        "strategy": facts["strategy"],
        "asked": facts["asked"],
        "types_added": facts["types_added"],
        "holds": facts["tries"][-1]["holds"],
        "sealed": [{"type": name, **row} for name, row in facts["tries"][-1]["types"].items()],
        "held_out": facts["held_out"]["cells"],
        "accuracy": (facts["metrics"].get("model") or {}).get("accuracy"),
        "stages": len(new.ledger),
    }


TASKS: dict[str, Callable[[Task, Say], dict[str, Any]]] = {"annotate": annotate, "files": files, "teach": teach}


def _can_be_extended(file: Path, output: Path) -> bool:
    """Whether the result can be a copy of the file; what is damaged is no copy, and reading it says what is wrong."""
    try:
        return can_be_extended(file, output)
    except Exception:
        return False


def _corrected(adata: AnnData, task: Task) -> tuple[np.ndarray, np.ndarray]:
    corrections = [Correction(label, tuple(rows), was) for label, rows, was in task["corrections"]]
    return corrected(adata.obs[KEY].astype(str).to_numpy(dtype=object), corrections)


def _sure(obs: pd.DataFrame, labels: np.ndarray, taken: np.ndarray) -> np.ndarray:
    """Cells that were not corrected and that the model is sure of, `MOST_SURE` of each type, the same in every run."""
    sure = (obs[f"{KEY}_confidence"].to_numpy() >= SURE) & (labels != UNKNOWN) & ~taken
    found, draws = np.zeros(len(labels), dtype=bool), np.random.default_rng(0)
    for name in np.unique(labels[sure]):
        here = np.flatnonzero(sure & (labels == name))
        found[draws.permutation(here)[:MOST_SURE]] = True
    return found


def _drawn(labels: np.ndarray) -> np.ndarray:
    """Cells of the map: Unknown first and rare types last, so that these lie on top."""
    drawn = stratified_sample(labels, MOST_DRAWN, seed=0)
    return drawn[drawing_order(labels[drawn])]


def _map(
    folder: Path,
    obs: pd.DataFrame,
    types: pd.DataFrame,
    samples: pd.DataFrame,
    drawn: np.ndarray,
    space: np.ndarray,
    say: Say,
) -> str:
    """Write the map; returns why there is none."""
    if len(drawn) < NEIGHBOURS:
        return f"There is no map: it takes at least {NEIGHBOURS} cells."
    say("drawing the map")
    points = umap(space, seed=0)
    cells = obs.iloc[drawn]
    found: dict[str, Any] = {
        "row": drawn.tolist(),
        "cell": [str(one) for one in cells.index],
        "x": np.round(points[:, 0].astype(float), 3).tolist(),
        "y": np.round(points[:, 1].astype(float), 3).tolist(),
        "type": types.index.get_indexer(pd.Index(cells[KEY].astype(str))).tolist(),
        "confidence": np.round(cells[f"{KEY}_confidence"].to_numpy(dtype=float), 3).tolist(),
        "unknown_score": _finite(np.round(cells[f"{KEY}_unknown_score"].to_numpy(dtype=float), 3)),
    }
    if f"{KEY}_majority" in cells:
        found["majority"] = types.index.get_indexer(pd.Index(cells[f"{KEY}_majority"].astype(str))).tolist()
    found["samples"] = []
    for column in samples.columns:
        codes, levels = pd.factorize(samples[column].astype(str).to_numpy(dtype=object)[drawn], sort=True)
        shades = type_colours(levels)
        colours = [shades[one] for one in levels]
        found["samples"].append(
            {"column": str(column), "levels": list(levels), "colours": colours, "codes": codes.tolist()}
        )
    (folder / "map.json").write_text(json.dumps(found), encoding="utf-8")
    return ""


def _finite(values: np.ndarray) -> list[float | None]:
    return [float(one) if np.isfinite(one) else None for one in values]


def _genes(folder: Path, counts: Counts, drawn: np.ndarray) -> None:
    """Write log(1 + counts per 10,000) of the drawn cells, gene by gene: the page asks for one gene at a time."""
    order = np.sort(drawn)
    blocks = []
    for start, stop, block in counts.chunks():
        part = block[order[(order >= start) & (order < stop)] - start]
        totals = np.asarray(part.sum(axis=1)).ravel()
        scale = np.divide(1e4, totals, out=np.zeros_like(totals), where=totals > 0)
        part.data = np.log1p(part.data * np.repeat(scale, np.diff(part.indptr)))
        blocks.append(part)
    by_gene = sp.vstack(blocks, format="csr")[np.searchsorted(order, drawn)].tocsc()
    np.save(folder / "genes-starts.npy", by_gene.indptr.astype(np.int64))
    np.save(folder / "genes-cells.npy", by_gene.indices.astype(np.uint16 if len(drawn) < 1 << 16 else np.int32))
    np.save(folder / "genes-values.npy", by_gene.data.astype(np.float16))
    names = [str(one) for one in counts.genes.index]
    symbols = [str(one) for one in canonical_genes(counts.genes).symbols]
    (folder / "genes.json").write_text(json.dumps({"names": names, "symbols": symbols}), encoding="utf-8")


def _types(obs: pd.DataFrame, info: dict[str, Any]) -> pd.DataFrame:
    """A row for each label: cells, share, mean confidence, ontology id; most cells first, Unknown last."""
    labels = obs[KEY].astype(str)
    by_label = obs.groupby(labels.to_numpy())
    found = pd.DataFrame({"cells": by_label.size()})
    found["share"] = found["cells"] / len(obs)
    found["confidence"] = by_label[f"{KEY}_confidence"].mean()
    found["ontology"] = by_label[f"{KEY}_ontology_term_id"].agg(lambda terms: str(terms.iloc[0]))
    found["majority"] = 0
    if f"{KEY}_majority" in obs:
        voted = obs[f"{KEY}_majority"].astype(str).value_counts()
        found = found.reindex(found.index.union(voted.index))
        found["majority"] = voted.reindex(found.index, fill_value=0)
        found = found.fillna({"cells": 0, "share": 0.0, "confidence": 0.0, "ontology": ""}).astype({"cells": int})
    found = found.sort_values("cells", ascending=False, kind="stable")
    found = found.loc[[*found.index.drop(UNKNOWN, errors="ignore"), *found.index.intersection([UNKNOWN])]]
    colours = type_colours(found.index, first=info["classes"])
    found["colour"] = [colours[name] for name in found.index]
    return found


def _shown(
    name: str, adata: AnnData, obs: pd.DataFrame, types: pd.DataFrame, info: dict[str, Any], choice: Choice | None
) -> dict[str, Any]:
    """What the page says of an annotation."""
    confidence = obs[f"{KEY}_confidence"]
    overview = Overview(
        types=types,
        confidence=float(confidence.mean()),
        confident=float((confidence >= 0.8).mean()),
        settings=info,
    )
    warned = [choice.warning] if choice is not None and choice.warning else []
    checked = check_labels(obs[KEY].astype(str).to_numpy(), confidence=confidence.to_numpy(float), info=info)
    points = attention(overview, warned, checked=checked)
    samples = []
    for column in SAMPLE_COLUMNS:
        if column in adata.obs and 1 < adata.obs[column].nunique() <= max(adata.n_obs // 2, 2):
            table = pd.crosstab(adata.obs[column].astype(str).to_numpy(), obs[KEY].astype(str).to_numpy())
            table = table.reindex(columns=types.index, fill_value=0)
            table = table.loc[
                [one for one in table.index if one in set(table.sum(axis=1).nlargest(MOST_SAMPLES).index)]
            ]
            rows = [{"name": str(one), "cells": row.tolist()} for one, row in table.iterrows()]
            samples.append({"column": column, "rows": rows})
            break
    return {
        "name": name,
        "cells": adata.n_obs,
        "genes": adata.n_vars,
        "model": info["model"],
        "chosen": None if choice is None else choice.reason,
        "summary": summary(overview, points),
        "attention": [{"finding": one.finding, "mend": one.mend} for one in points],
        "notes": [str(one) for one in info["notes"]],
        "types": [{"name": str(one), **row} for one, row in json.loads(types.to_json(orient="index")).items()],
        "palette": list(PALETTE),
        "samples": samples,
        "classes": list(info["classes"]),
        "majority": "majority" in info,
        "rejection": str(info["rejection_rate"]),
        "threshold": float(info["threshold"]) if np.isfinite(info["threshold"]) else None,
    }

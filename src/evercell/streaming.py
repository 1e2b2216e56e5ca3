"""Annotate a file part by part: memory does not grow with its counts, and a killed run goes on where it was.

The matrices stay in the file, and what the model says of each part is appended to files in a hidden folder beside the
output, the journal. The result is that of `annotate`, to the last bit. Memory holds a part, the table of cells and some
20 bytes a cell; only the majority vote over clusters of its own and the report bring the representations of all cells
back into memory.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from evercell import __version__
from evercell.annotation import (
    Annotation,
    add_majority,
    annotate,
    check_guarantees,
    rejection_rate,
    to_q_values,
)
from evercell.annotator import Annotator
from evercell.cells import find_counts
from evercell.errors import EvercellError, ModelError
from evercell.labelling import Asked, Labeller, Verdicts, joined_info, table
from evercell.locking import locked
from evercell.majority import clusters_in, made_clusters
from evercell.outputs import check_folder, full_disk_told
from evercell.progress import progress
from evercell.sources import parts_of, unmerged
from evercell.stored_cells import file_facts, watch

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData

PART = 50_000
"""Cells after which the journal is brought up to date: at most so many are labelled twice after a kill."""


@contextmanager
def annotated(
    model: Annotator,
    query: AnnData,
    file: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    arrays: bool = True,
    reject: str | float | None = None,
    sets: float | None = None,
    unknown_q: bool = False,
    key_added: str = "evercell",
    layer: str | None = None,
    species: str = "auto",
    gene_column: str | None = None,
    adapt: bool = True,
    min_coverage: float = 0.05,
    empty_cells: str = "error",
    majority: bool | str = False,
    seed: int = 0,
    name: str = "the data",
    model_name: str = "",
    chunk: int = 4096,
    device: str = "auto",
    shown: bool | None = None,
) -> Iterator[Annotation]:
    """Label the cells of a file for an output that is written inside the block; then the journal is removed.

    Ended by anything but an `EvercellError`, the journal stays, and the same call goes on from it. Another file, model
    or option begins anew.

    Parameters
    ----------
    model
        Annotator.
    query
        The cells, as ``read_cells(file, backed=True)`` gives them. It is not changed.
    file
        Where they come from.
    output
        What will be written; the journal lies beside it.
    arrays
        Whether ``probabilities`` and ``representation`` of the annotation are needed: they are mapped from the journal,
        valid within the block. Without them both have no columns.
    reject, sets, unknown_q, key_added, layer, species, gene_column, adapt, min_coverage, empty_cells, majority, seed
        As for `annotate`.
    name, model_name, chunk, device, shown
        As for `annotate`.

    Yields
    ------
    Annotation
        What `annotate` says of the cells.

    Raises
    ------
    CellsError, GenesError, LabelsError, ModelError, SettingsError

    Examples
    --------
    >>> cells = ec.read_cells("atlas.h5ad", backed=True)  # doctest: +SKIP
    >>> with annotated(model, cells, "atlas.h5ad", "labels.csv", arrays=False) as result:  # doctest: +SKIP
    ...     write_table(result.obs, "labels.csv")
    """
    rejector = model.rejector
    if rejector is None:
        raise ModelError(
            "this model is pretrained only: it knows no cell types", hint="`evercell train --from` it first"
        )
    check_guarantees(model, sets, unknown_q)
    asked = Asked(
        rate=rejection_rate(reject, rejector.default_rate),
        layer=layer,
        species=species,
        gene_column=gene_column,
        adapt=adapt,
        min_coverage=min_coverage,
        empty_cells=empty_cells,
        model_name=model_name,
        chunk=chunk,
        device=device,
        shown=shown,
        sets=sets,
    )
    if not rejector.per_cell:  # it looks at all cells at once
        options = {**asdict(asked), "reject": reject, "key_added": key_added, "majority": majority, "seed": seed}
        del options["rate"]
        yield annotate(model, query, name=name, **options)
        return
    clusters = clusters_in(query.obs, majority, name=name) if isinstance(majority, str) else None
    arrays = arrays or majority is True
    sources = _sources(model, query, asked, name)
    shapes = _fields(model, asked)
    if arrays:
        shapes |= {"representation": ("<f4", model.backbone.width), "probabilities": ("<f4", len(model.types))}
    identity = _identity(file, model, asdict(replace(asked, shown=None, chunk=0)))
    with _journal(output, identity, shapes, query.n_obs) as journal:
        check = watch(file)
        _label(sources, journal, asked)
        check()
        result = _result(model, sources, journal, query.obs_names, key_added)
        if unknown_q:
            _add_p_values(sources, journal, result, key_added)
            to_q_values(result.obs, result.info, key=key_added)
        if majority is True:
            clusters = made_clusters(result.representation, seed=seed)
        if clusters is not None:
            column = majority if isinstance(majority, str) else ""
            add_majority(result.obs, result.info, clusters, key=key_added, column=column, seed=seed)
            result = replace(result, clusters=clusters)
        yield result


@dataclass(frozen=True)
class _Source:
    """Cells of one source: their places in the file, sorted, and the model made ready for them."""

    name: str
    rows: np.ndarray
    ready: Labeller


def _sources(model: Annotator, query: AnnData, asked: Asked, name: str) -> list[_Source]:
    """The sources of a file (see `sources.unmerged`), none of them read."""
    parts = parts_of(query, name)
    places = [part.rows for part in parts]
    if len(parts) == 1 and not parts[0].name and parts[0].measured.all():
        split = [(name, query)]
    elif query.raw is not None and any(part.measured_raw is None for part in parts):
        # Which genes of `raw` were measured is not known: left to `unmerged`, which takes the cells into memory.
        split = unmerged(query, name)
    else:
        split = [(f"{name}/{one.name}" if one.name else name, query[one.rows, one.measured]) for one in parts]
    found = []
    for part, rows, (called, cells) in zip(parts, places, split, strict=True):
        counts = find_counts(cells, layer=asked.layer, name=called, empty_cells=asked.empty_cells)
        if counts.source == "raw.X" and part.measured_raw is not None and cells.is_view:
            counts = counts.over(part.measured_raw)
        found.append(_Source(called, rows, Labeller.ready(model, counts, asked, called)))
    return found


def _fields(model: Annotator, asked: Asked) -> dict[str, tuple[str, int | None]]:
    """What is kept of every cell: kind and width, None for one number."""
    found: dict[str, tuple[str, int | None]] = {
        "code": ("<i4", None),
        "confidence": ("<f4", None),
        "score": ("<f4", None),
        "flags": ("u1", None),
    }
    return found if asked.sets is None else found | {"members": ("u1", -(-len(model.types) // 8))}


def _label(sources: list[_Source], journal: _Journal, asked: Asked) -> None:
    """Label the cells that are not in the journal yet, in the order of the file."""
    with progress("annotating", shown=asked.shown) as step:
        for start in range(journal.done, journal.n_cells, PART):
            stop = min(start + PART, journal.n_cells)
            part = journal.empty_part(stop - start)
            done = start
            for source in sources:
                first, end = np.searchsorted(source.rows, [start, stop]).tolist()
                threshold = source.ready.threshold()
                for one, last, block in source.ready.blocks(first, end):
                    verdicts = source.ready.verdicts(block, threshold)
                    rows = source.rows[one:last] - start
                    part["code"][rows] = verdicts.codes
                    part["confidence"][rows] = verdicts.confidence
                    part["score"][rows] = verdicts.score
                    part["flags"][rows] = verdicts.rejected + 2 * block.nothing + 4 * block.empty
                    if "representation" in part:
                        part["representation"][rows] = block.outputs.representation
                        part["probabilities"][rows] = block.outputs.proba
                    if verdicts.members is not None:
                        part["members"][rows] = verdicts.members
                    done += last - one
                    step(done, journal.n_cells, None)
            journal.append(part)


def _result(model: Annotator, sources: list[_Source], journal: _Journal, cells: pd.Index, key: str) -> Annotation:
    """The annotation that the journal holds."""
    codes, flags = np.array(journal.array("code")), np.array(journal.array("flags"))
    confidence, score = (np.array(journal.array(name)) for name in ("confidence", "score"))
    members = np.array(journal.array("members")) if "members" in journal.shapes else None
    obs = table(model, Verdicts(codes, flags & 1 == 1, confidence, score, members), cells, key)
    infos = []
    for source in sources:
        own = flags[source.rows]
        info = source.ready.info(source.ready.threshold(), empty=own & 4 > 0, nothing=int((own & 2 > 0).sum()))
        infos.append((source.name, info))
    best = np.asarray(model.types.names, dtype=object)[codes]
    nothing = np.zeros((len(cells), 0), dtype=np.float32)
    probabilities, representation = (
        journal.array(name) if name in journal.shapes else nothing for name in ("probabilities", "representation")
    )
    return Annotation(obs, best, probabilities, representation, model.types.names, joined_info(infos), key)


def _add_p_values(sources: list[_Source], journal: _Journal, result: Annotation, key: str) -> None:
    scores, codes = np.array(journal.array("score")), np.array(journal.array("code"))
    p_values = np.ones(len(scores))
    for source in sources:
        p_values[source.rows] = source.ready.rejector.p_values(scores[source.rows], codes[source.rows])
    result.obs[f"{key}_unknown_q"] = p_values


def _identity(file: str | os.PathLike[str], model: Annotator, options: Mapping[str, Any]) -> str:
    """SHA-256 of what a result depends on: the file by its sizes and times, the model, the options."""
    path = Path(file).resolve()
    facts = [str(path), file_facts(path), model.fingerprint, __version__, options]
    text = json.dumps(facts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


class _Journal:
    """Arrays of the cells that are labelled, each a file that is appended to; `state.json` says how many are whole."""

    def __init__(self, folder: Path, identity: str, shapes: Mapping[str, tuple[str, int | None]], n_cells: int) -> None:
        self.folder, self.identity, self.shapes, self.n_cells = folder, identity, dict(shapes), n_cells
        self.done = self._done()
        for name in self.shapes:
            with (folder / name).open("ab") as file:
                file.truncate(self._bytes(name, self.done))

    def _done(self) -> int:
        """Cells that an earlier, killed call has labelled; 0 where that was not this call."""
        try:
            state = json.loads((self.folder / "state.json").read_text(encoding="utf-8"))
            if state["identity"] != self.identity or set(self.shapes) - set(state["arrays"]):
                return 0
            done = int(state["cells"])
            whole = all((self.folder / name).stat().st_size >= self._bytes(name, done) for name in self.shapes)
            return done if whole else 0
        except (OSError, ValueError, KeyError, TypeError):
            return 0

    def empty_part(self, n_cells: int) -> dict[str, np.ndarray]:
        """Arrays for the next cells, to be filled."""
        return {name: np.zeros(self._shape(name, n_cells), kind) for name, (kind, _) in self.shapes.items()}

    def append(self, part: Mapping[str, np.ndarray]) -> None:
        """Add cells, and only then say that they are there."""
        for name, array in part.items():
            with (self.folder / name).open("ab") as file:
                file.write(np.ascontiguousarray(array).data)
                file.flush()
                os.fsync(file.fileno())
        done = self.done + len(part["code"])
        state = {"identity": self.identity, "arrays": list(self.shapes), "cells": done}
        new = self.folder / "state.new"
        new.write_text(json.dumps(state), encoding="utf-8")
        new.replace(self.folder / "state.json")
        self.done = done

    def array(self, name: str) -> np.ndarray:
        """An array of all cells, mapped from its file."""
        return np.memmap(self.folder / name, self.shapes[name][0], "r", shape=self._shape(name, self.n_cells))

    def _shape(self, name: str, n_cells: int) -> tuple[int, ...]:
        width = self.shapes[name][1]
        return (n_cells,) if width is None else (n_cells, width)

    def _bytes(self, name: str, n_cells: int) -> int:
        return math.prod(self._shape(name, n_cells)) * np.dtype(self.shapes[name][0]).itemsize


@contextmanager
def _journal(
    output: str | os.PathLike[str], identity: str, shapes: Mapping[str, tuple[str, int | None]], n_cells: int
) -> Iterator[_Journal]:
    """The journal beside an output, for one process at a time; removed unless the block is broken off."""
    target = Path(os.path.realpath(output))
    folder = target.with_name(f".{target.name}.unfinished")
    check_folder(output)
    with locked(output):
        try:
            with full_disk_told(output, folder):
                folder.mkdir(exist_ok=True)
                yield _Journal(folder, identity, shapes, n_cells)
        except EvercellError:
            shutil.rmtree(folder, ignore_errors=True)  # the same call would end in the same way
            raise
        shutil.rmtree(folder, ignore_errors=True)

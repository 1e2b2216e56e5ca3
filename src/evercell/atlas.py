"""Annotate many files, or one very large one, in parts: any process can label any part, and no part is labelled twice.

They go into a store of labels (see `label_store`). The name of a part tells what its labels depend on: file, model and
options. So a part that is there is done, whoever did it; to do one twice does no harm; and the same call does what is
missing. Labels are those of `annotate`, to the last bit: what is decided for a file, such as where its counts are and
how the model is fitted to its genes, is decided for the whole of it by everyone who labels a part.
"""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from evercell import __version__, streaming
from evercell.annotation import Annotation, check_guarantees, rejection_rate
from evercell.annotator import Annotator
from evercell.cells import STORED, read_cells, write_cells
from evercell.engines import check_engine, each
from evercell.errors import CellsError, EvercellError, ModelError, SettingsError, class_and_words
from evercell.label_store import PARTS, keep_parts, make_store, stored, write_manifest
from evercell.labelling import Asked
from evercell.locking import locked
from evercell.progress import progress, silenced
from evercell.registry import find, load
from evercell.stored_cells import watch
from evercell.training import choose_device

FACTS = ("species", "counts_source", "counts_transform", "adapted")  # of a file, for the manifest


@dataclass(frozen=True)
class Job:
    """What all parts of a call share; `apart` where each is labelled in a process of its own, with one thread."""

    model: str
    fingerprint: str
    asked: Asked
    key: str
    store: str
    apart: bool


@dataclass(frozen=True)
class Part:
    """Cells `start` to ``stop - 1`` of a file, all of them where `stop` is None.

    `called` is the user's name of the file, `identity` a digest of what the labels depend on: the file by size and
    time, the model, the options.
    """

    file: str
    called: str
    identity: str
    start: int = 0
    stop: int | None = None

    @property
    def name(self) -> str:
        """Name of its file in the store."""
        stop = "end" if self.stop is None else self.stop
        return f"{Path(self.file).stem[:80]}-{self.identity[:16]}-{self.start}-{stop}.h5ad"


def annotate_files(
    model: str | os.PathLike[str],
    source: str | os.PathLike[str],
    store: str | os.PathLike[str],
    *,
    engine: str = "local",
    workers: int | None = None,
    part: int = streaming.PART,
    reject: str | float | None = None,
    sets: float | None = None,
    key_added: str = "evercell",
    layer: str | None = None,
    species: str = "auto",
    gene_column: str | None = None,
    adapt: bool = True,
    min_coverage: float = 0.05,
    empty_cells: str = "error",
    device: str = "auto",
    shown: bool | None = None,
) -> dict[str, Any]:
    """Label the cells of a file, or of all files in a folder, into a store of labels.

    Parameters
    ----------
    model
        Name or directory of a model; with Ray, one that every machine has.
    source
        A file of cells, or a folder: all ``.h5ad``, ``.zarr`` and 10x ``.h5`` in it and below it.
    store
        Folder to write. Parts of an earlier call that belong to this one are kept, all others are removed.
    engine, workers
        Who labels (see `engines.each`).
    part
        Cells of a part.
    reject, sets, key_added, layer, species, gene_column, adapt, min_coverage, empty_cells, device, shown
        As for `annotate`.

    Returns
    -------
    dict
        The manifest. A file that could not be labelled does not keep the others from it: it has an ``error``.

    Raises
    ------
    CellsError, ModelError, SettingsError

    Examples
    --------
    >>> manifest = annotate_files("human-immune", "atlas/", "labels", workers=4)  # doctest: +SKIP
    """
    check_engine(engine, workers)
    if engine == "local":
        choose_device(device)
    known = load(model)
    if known.rejector is None:
        raise ModelError(
            "this model is pretrained only: it knows no cell types", hint="`evercell train --from` it first"
        )
    if not known.rejector.per_cell:
        raise ModelError(
            f"the rejector `{known.rejector.name}` of this model looks at all cells of a file at once",
            hint="annotate the files one at a time, to an .h5ad",
        )
    check_guarantees(known, sets, unknown_q=False)
    path = find(model)
    asked = Asked(
        rate=rejection_rate(reject, known.rejector.default_rate),
        layer=layer,
        species=species,
        gene_column=gene_column,
        adapt=adapt,
        min_coverage=min_coverage,
        empty_cells=empty_cells,
        model_name=path.resolve().name,
        chunk=4096,
        device=device,
        shown=False,
        sets=sets,
    )
    apart = engine != "local" or (workers or 1) > 1
    word = str(path.absolute()) if path == Path(model) else str(model)
    folder = Path(store).absolute()
    job = Job(word, known.fingerprint, asked, key_added, str(folder), apart)
    with ExitStack() as stack:
        files = _files(Path(source), folder)
        stack.enter_context(locked(folder))
        make_store(folder)
        parts = {called: _cut(job, file, called, known, part) for called, file in files.items()}
        names = {one.name for of in parts.values() for one in of}
        keep_parts(folder, names)
        write_manifest(folder, _facts(job, parts, {}, ended=False), ended=False)
        errors = _label(job, parts, engine, workers, shown)
        keep_parts(folder, names)
        return write_manifest(folder, _facts(job, parts, errors, ended=True), ended=True)


def label_part(job: Job, part: Part) -> EvercellError | None:
    """Label a part, unless it is in the store; tells an error rather than raising it."""
    from anndata import AnnData

    place = Path(job.store, PARTS, part.name)
    if place.exists():
        return None
    try:
        with _apart() if job.apart else ExitStack(), silenced(True):
            result = _labelled(job, part)
            # All types are categories: those of the parts of a file have to be the same.
            write_cells(AnnData(obs=result.obs, uns=result.facts(result.obs)), place)
    except EvercellError as error:
        return error
    except Exception as error:  # one part is no reason to end the others
        return EvercellError(class_and_words(error))
    return None


def is_folder_of_files(path: Path) -> bool:
    """Whether a path is a folder that is not itself one set of cells, as a ``.zarr`` or a 10x folder is."""
    return path.is_dir() and path.suffix != ".zarr" and not any(path.glob("*matrix.mtx*"))


def _files(source: Path, store: Path) -> dict[str, Path]:
    """Files of cells, by what they are called: their path below the folder."""
    if not is_folder_of_files(source):
        return {source.name: source.absolute()}
    if store.resolve().is_relative_to(source.resolve()):
        raise SettingsError(
            f"`{store}` lies in `{source}`, whose files are to be labelled", hint="choose an --output outside of it"
        )
    found = []
    for place, folders, files in os.walk(source):
        found += [Path(place, name) for name in (*files, *folders) if Path(name).suffix in STORED and name[0] != "."]
        folders[:] = [name for name in folders if Path(name).suffix != ".zarr" and name[0] != "."]
    if not found:
        kinds = ", ".join(STORED[:-1])
        raise CellsError(
            f"the folder `{source}` holds no {kinds} file", hint="name a file, or a folder that holds some"
        )
    return {file.relative_to(source).as_posix(): file.absolute() for file in sorted(found)}


def _cut(job: Job, file: Path, called: str, model: Annotator, size: int) -> list[Part]:
    """The parts of a file; one where its number of cells is not known before it is read."""
    whole = Part(str(file), called, _identity(job, file, model))
    n_cells = _n_cells(file)
    if not n_cells:
        return [whole]
    return [replace(whole, start=one, stop=min(one + size, n_cells)) for one in range(0, n_cells, size)]


def _n_cells(file: Path) -> int | None:
    """Number of cells, told without opening the tables; a file that is damaged is left to who labels it."""
    import h5py
    import zarr

    try:
        with ExitStack() as stack:
            root: Any = (
                zarr.open_group(str(file), mode="r")
                if file.suffix == ".zarr"
                else stack.enter_context(h5py.File(file, "r"))
            )
            names = root["obs"][root["obs"].attrs["_index"]] if "obs" in root else root["matrix/barcodes"]
            return int(names.shape[0])
    except Exception:  # every format has errors of its own
        return None


def _identity(job: Job, file: Path, model: Annotator) -> str:
    return streaming._identity(file, model, {**asdict(replace(job.asked, chunk=0)), "key": job.key})


def _label(
    job: Job, parts: dict[str, list[Part]], engine: str, workers: int | None, shown: bool | None
) -> dict[str, EvercellError]:
    """Label what is missing; the first error of each file that has one."""
    place = Path(job.store, PARTS)
    missing = [one for of in parts.values() for one in of if not (place / one.name).exists()]
    errors: dict[str, EvercellError] = {}
    if not missing:
        return errors
    gpu = job.asked.device == "cuda"
    work = partial(label_part, job)
    try:
        with progress("annotating parts", shown=shown) as step:
            for done, (part, error) in enumerate(each(work, missing, engine=engine, workers=workers, gpu=gpu), 1):
                if error is not None:
                    errors.setdefault(part.called, error)
                step(done, len(missing), None)
    finally:  # what this process labelled itself
        _opened.cache_clear()
        _model.cache_clear()
    return errors


class _Cells(streaming._Journal):
    """A journal of some cells, in memory."""

    def __init__(self, start: int, stop: int, shapes: dict[str, tuple[str, int | None]]) -> None:
        self.done, self.n_cells, self.shapes = start, stop, shapes
        self._parts: list[dict[str, np.ndarray]] = []

    def append(self, part: Any) -> None:
        self._parts.append(part)

    def array(self, name: str) -> np.ndarray:
        return np.concatenate([part[name] for part in self._parts])


def _labelled(job: Job, part: Part) -> Annotation:
    """What the model says of the cells of a part."""
    model, sources, cells = _opened(job, part.file, part.called, part.identity)
    start, stop = part.start, len(cells) if part.stop is None else part.stop
    found = _Cells(start, stop, streaming._fields(model, job.asked))
    check = watch(part.file)
    streaming._label(sources, found, job.asked)
    check()
    own = []
    for source in sources:
        first, end = np.searchsorted(source.rows, [start, stop]).tolist()
        if first < end:
            counts = replace(source.ready.counts, cells=source.ready.counts.cells[first:end])
            own.append(replace(source, rows=source.rows[first:end] - start, ready=replace(source.ready, counts=counts)))
    return streaming._result(model, own, found, cells[start:stop], job.key)


@lru_cache(maxsize=1)
def _opened(job: Job, file: str, called: str, identity: str) -> tuple[Annotator, list[streaming._Source], pd.Index]:
    """A file and the model fitted to it: a process labels many parts of a file."""
    model = _model(job.model, job.fingerprint)
    path = Path(file)
    if path.exists() and _identity(job, path, model) != identity:
        raise CellsError(f"`{file}` has changed since the call began", hint="run the same call again")
    query = read_cells(path, layer=job.asked.layer, backed=path.suffix in STORED)
    return model, streaming._sources(model, query, job.asked, called), query.obs_names


@lru_cache(maxsize=1)
def _model(name: str, fingerprint: str) -> Annotator:
    model = load(name)
    if model.fingerprint != fingerprint:
        raise ModelError(
            f"`{name}` is another model here than where the call began: {model.fingerprint}, not {fingerprint}",
            hint="give all machines the same evercell, and a model in a folder that all of them see",
        )
    return model


@contextmanager
def _apart() -> Iterator[None]:
    """A process beside others has one thread, and nobody who reads the warnings of libraries."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_num_threads(before)


def _facts(
    job: Job, parts: Mapping[str, Sequence[Part]], errors: Mapping[str, EvercellError], *, ended: bool
) -> dict[str, Any]:
    """What is in a store; labels are counted when all parts are there."""
    files = []
    for called, of in parts.items():
        entry: dict[str, Any] = {"file": called, "path": of[0].file, "parts": [one.name for one in of]}
        if called in errors:
            entry |= {"error": errors[called].message, "hint": errors[called].hint}
        elif ended:
            entry |= _contents(job, of)
        files.append(entry)
    whole = [one for one in files if "error" not in one] if ended else []
    return {
        "version": __version__,
        "model": {"name": job.asked.model_name, "path": job.model, "fingerprint": job.fingerprint},
        "options": {**asdict(job.asked), "key_added": job.key},
        "cells": sum(one["cells"] for one in whole),
        "labels": dict(sum((Counter(one["labels"]) for one in whole), Counter()).most_common()),
        "files": files,
    }


def _contents(job: Job, parts: Sequence[Part]) -> dict[str, Any]:
    """What the parts of a file say of it, together."""
    labels: Counter[str] = Counter()
    notes: dict[str, list[str]] = {}
    facts: dict[str, Any] = {}
    cells, confidence = 0, 0.0
    for part, labelled in zip(parts, stored(Path(job.store), [one.name for one in parts]), strict=True):
        labels.update(labelled.obs[job.key].astype(str))
        cells += labelled.n_obs
        confidence += float(labelled.obs[f"{job.key}_confidence"].sum())
        info = labelled.uns[job.key]
        facts = facts or {name: np.asarray(info[name]).item() for name in FACTS}
        facts.setdefault("coverage", str(info["coverage"]["sentence"]))
        for note in info["notes"]:
            notes.setdefault(str(note), []).append(f"cells {part.start:,} to {part.start + labelled.n_obs:,}")
    said = [note if len(of) == len(parts) else f"{', '.join(of)}: {note}" for note, of in notes.items()]
    mean = round(confidence / cells, 6)
    return {"cells": cells, "labels": dict(labels.most_common()), "mean_confidence": mean, **facts, "notes": said}

"""Routes of jobs: upload, watch, look, correct, take away, teach."""

from __future__ import annotations

import asyncio
import json
import re
from contextlib import suppress
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Query, Request
from fastapi.responses import FileResponse, JSONResponse, Response
from pydantic import BaseModel, ConfigDict

from evercell.errors import EvercellError, LabelsError, SettingsError
from evercell.registry import AUTO
from evercell.serving.corrections import MOST, Correction, corrected, digest
from evercell.serving.guard import Refused, drained, received, worded
from evercell.serving.jobs import Job, Jobs, State
from evercell.serving.settings import SUFFIXES, ServerSettings

MOST_FOUND = 12
LONGEST_WAIT = 30.0
FILES = {"h5ad": "application/x-hdf5", "csv": "text/csv", "html": "text/html"}
BODY = {"requestBody": {"required": True, "content": {"application/octet-stream": {"schema": {"type": "string"}}}}}

Name = Annotated[str, Query(min_length=1, max_length=300, description="Name of the file; its suffix says what it is.")]


class Asked(BaseModel):
    """Body of a request; unknown fields are refused."""

    model_config = ConfigDict(extra="forbid")


class NewLabel(Asked):
    """A label for `cells`, by their places in the file, or for all cells that now have the label `was`."""

    label: str
    cells: list[int] = []
    was: str = ""


class Lesson(Asked):
    """What a model is to be taught, and the name of the new one."""

    name: str
    confident: bool = True
    strategy: Literal["analytic", "canal"] = "analytic"


def job_routes(settings: ServerSettings) -> APIRouter:  # noqa: PLR0915 -- one route after the other
    """Jobs: upload, watch, look, correct, take away, teach."""
    router = APIRouter(prefix="/api/jobs", tags=["jobs"])

    def jobs(request: Request) -> Jobs:
        found: Jobs = request.app.state.jobs
        return found

    def result_of(request: Request, job_id: str) -> Job:
        job = jobs(request).find(job_id)
        if job.kind != "annotate" or job.state is not State.DONE:
            raise Refused(409, f"the job is no finished annotation: it is {job.state}", hint="wait until it is done")
        return job

    @router.post("", status_code=202, openapi_extra=BODY)
    async def annotate(
        request: Request,
        name: Name,
        model: Annotated[str, Query(max_length=64)] = AUTO,
        reject: Annotated[str, Query(max_length=20, description="off, or a share; the model's own if empty")] = "",
        majority: bool = False,
        map: bool = True,
    ) -> dict[str, Any]:
        """Upload a file, the body of the request as it is, and have its cells labelled."""
        try:
            suffix = _suffix(name)
            rejected = _rate(reject)
            listed = settings.listed_models()
            path = "" if model == AUTO else str(settings.model(model).path)
            jobs(request).room()
        except EvercellError:
            await drained(request)
            raise
        options = {
            "path": path,
            "models": [str(one.path) for one in listed.values()],
            "reject": rejected,
            "majority": majority,
            "map": map,
        }
        job = jobs(request).new("annotate", _plain(name), options)
        try:
            await received(request, job.folder / f"upload{suffix}", settings)
        except BaseException:
            await jobs(request).remove(job)
            raise
        return _job(jobs(request), jobs(request).queue(job))

    @router.get("/{job_id}")
    async def look(
        request: Request, job_id: str, wait: Annotated[float, Query(ge=0, le=LONGEST_WAIT)] = 0
    ) -> dict[str, Any]:
        """How far a job is; with `wait`, answers when it ends or these seconds are over."""
        job = jobs(request).find(job_id)
        if wait:
            with suppress(TimeoutError):
                await asyncio.wait_for(job.ended.wait(), wait)
        return _job(jobs(request), job)

    @router.post("/{job_id}/cancel")
    async def cancel(request: Request, job_id: str) -> dict[str, Any]:
        """End a job; its process is gone and its files are removed when this answers."""
        job = jobs(request).find(job_id)
        await jobs(request).cancel(job)
        return _job(jobs(request), job)

    @router.delete("/{job_id}", status_code=204)
    async def remove(request: Request, job_id: str) -> Response:
        """Forget a job, and remove all its files."""
        await jobs(request).remove(jobs(request).find(job_id))
        return Response(status_code=204)

    @router.get("/{job_id}/result")
    def result(request: Request, job_id: str) -> Response:
        """What came of a job: of an annotation its types, words and notes, of a lesson what the gate said."""
        job = jobs(request).find(job_id)
        if job.kind == "teach" and job.state is State.DONE:
            return JSONResponse(job.facts)
        return FileResponse(result_of(request, job_id).folder / "result.json", media_type="application/json")

    @router.get("/{job_id}/map")
    def points(request: Request, job_id: str) -> Response:
        """Cells of the map: places, labels as places in `types` of the result, scores."""
        path = result_of(request, job_id).folder / "map.json"
        if not path.is_file():
            raise Refused(404, "there is no map of these cells")
        return FileResponse(path, media_type="application/json")

    @router.get("/{job_id}/genes")
    def genes(request: Request, job_id: str, find: Annotated[str, Query(max_length=60)] = "") -> list[str]:
        """Genes whose name begins with some letters."""
        names, symbols = _gene_names(result_of(request, job_id))
        start = find.casefold()
        found = dict.fromkeys(one for one in (*symbols, *names) if one.casefold().startswith(start))
        return sorted(found, key=len)[:MOST_FOUND]

    @router.get("/{job_id}/gene")
    def gene(request: Request, job_id: str, name: Annotated[str, Query(max_length=60)]) -> dict[str, Any]:
        """Log counts per 10,000 of a gene: places among the cells of the map, and values; all others are zero."""
        job = result_of(request, job_id)
        names, symbols = _gene_names(job)
        wanted = name.strip().casefold()
        for row, both in enumerate(zip(names, symbols, strict=True)):
            if wanted in (one.casefold() for one in both):
                starts, cells, values = (
                    np.load(job.folder / f"genes-{part}.npy", mmap_mode="r", allow_pickle=False)
                    for part in ("starts", "cells", "values")
                )
                here = slice(int(starts[row]), int(starts[row + 1]))
                shown = [round(float(one), 3) for one in values[here]]
                return {"name": both[0], "symbol": both[1], "cells": cells[here].tolist(), "values": shown}
        raise Refused(404, f"the file has no gene `{name}`", hint="write a symbol or an Ensembl id of the file")

    @router.get("/{job_id}/corrections")
    def listed(request: Request, job_id: str) -> dict[str, Any]:
        """The corrections of an annotation in their order, and the labels after them."""
        return _corrections(result_of(request, job_id))

    @router.post("/{job_id}/corrections", status_code=201)
    async def correct(request: Request, job_id: str, new: NewLabel) -> dict[str, Any]:
        """Give cells another label."""
        job = result_of(request, job_id)
        if len(job.corrections) >= MOST:
            raise LabelsError(f"there are {MOST:,} corrections already", hint="take some back")
        made = Correction.of(new.label, new.cells, new.was, n_cells=job.facts["cells"])
        before, _ = corrected(_labels(job), job.corrections)
        if made.was and not (before == made.was).any():
            raise LabelsError(f"no cell has the label `{made.was}` now", hint="name a label that cells have")
        job.corrections = [*job.corrections, made]
        return _corrections(job)

    @router.delete("/{job_id}/corrections/last")
    async def undo(request: Request, job_id: str) -> dict[str, Any]:
        """Take the last correction back."""
        job = result_of(request, job_id)
        job.corrections = job.corrections[:-1]
        return _corrections(job)

    @router.head("/{job_id}/files/{kind}", include_in_schema=False)
    @router.get("/{job_id}/files/{kind}")
    async def file(request: Request, job_id: str, kind: Literal["h5ad", "csv", "html"]) -> FileResponse:
        """The file with its labels, a table of them, or the report; made when it is first asked for."""
        job = result_of(request, job_id)
        ready = {"h5ad": "annotated.h5ad", "csv": "labels.csv"}
        if not job.corrections and kind in ready:
            path = job.folder / ready[kind]
        else:
            path = await jobs(request).file(job, kind, digest(job.corrections))
        stem = re.sub(r"[^\w.+-]+", "_", job.name.removesuffix(_suffix(job.name)))[:80].strip("._") or "cells"
        return FileResponse(path, media_type=FILES[kind], filename=f"{stem}-evercell.{kind}")

    @router.post("/{job_id}/teach", status_code=202)
    async def teach(request: Request, job_id: str, lesson: Lesson) -> dict[str, Any]:
        """Teach the model of an annotation the corrected cells; the job's result says what the gate said."""
        about = result_of(request, job_id)
        if not about.corrections:
            raise LabelsError("nothing was corrected", hint="correct some labels first")
        options = {
            "target": str(settings.free_name(lesson.name)),
            "base": about.facts["name"],
            "confident": lesson.confident,
            "strategy": lesson.strategy,
        }
        jobs(request).room()
        job = jobs(request).new("teach", about.name, options, about=about)
        job.corrections = list(about.corrections)
        return _job(jobs(request), jobs(request).queue(job))

    return router


def _suffix(name: str) -> str:
    """Suffix of a file's name that says what it is.

    Raises
    ------
    Refused
    """
    lower = name.lower()
    found = max((one for one in SUFFIXES if lower.endswith(one)), key=len, default=None)
    if found is None:
        raise Refused(
            415,
            f"`{_plain(name)}` is of no kind that is read: {', '.join(SUFFIXES)}",
            hint="of a 10x folder give filtered_feature_bc_matrix.h5",
        )
    return found


def _rate(reject: str) -> str | float | None:
    """Rejection as `annotate` takes it.

    Raises
    ------
    SettingsError
    """
    if reject in ("", "off"):
        return reject or None
    try:
        rate = float(reject)
    except ValueError:
        rate = -1.0
    if not 0 <= rate < 1:
        raise SettingsError(f"reject is `{_plain(reject)}`", hint="give off, or a share such as 0.05")
    return rate


def _plain(text: str) -> str:
    """Text of a user on one line, without what is not printed."""
    return "".join(one if one.isprintable() else " " for one in text)[:300].strip() or "cells"


def _job(jobs: Jobs, job: Job) -> dict[str, Any]:
    """A job as the interface shows it."""
    return {
        "id": job.id,
        "kind": job.kind,
        "name": job.name,
        "state": job.state,
        "before": jobs.before(job) if job.state is State.QUEUED else 0,
        "step": job.step,
        "done": job.done,
        "total": job.total,
        "error": None if job.error is None else worded(job.error),
    }


def _gene_names(job: Job) -> tuple[list[str], list[str]]:
    path = job.folder / "genes.json"
    if not path.is_file():
        raise Refused(404, "there is no map of these cells")
    found = json.loads(path.read_text(encoding="utf-8"))
    return found["names"], found["symbols"]


def _labels(job: Job) -> np.ndarray:
    """(B,) labels of the model."""
    codes = np.load(job.folder / "labels.npy", allow_pickle=False)
    return np.array(job.facts["types"], dtype=object)[codes]


def _corrections(job: Job) -> dict[str, Any]:
    """Corrections in their order, each with how many cells it named, and how many cells have each label after all."""
    found: list[dict[str, Any]] = []
    labels = _labels(job)
    for one in job.corrections:
        n_cells = len(one.rows) or int((labels == one.was).sum())
        found.append({"label": one.label, "was": one.was, "cells": one.rows, "n_cells": n_cells})
        labels, _ = corrected(labels, [one])
    names, numbers = np.unique(labels.astype(str), return_counts=True)
    return {"corrections": found, "counts": dict(zip(names.tolist(), numbers.tolist(), strict=True))}

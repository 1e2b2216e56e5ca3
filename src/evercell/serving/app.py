"""The routes of the page and its interface: `make_app`."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from evercell import __version__
from evercell.errors import EvercellError
from evercell.ledger import Ledger
from evercell.locking import temporary_folder
from evercell.registry import ListedModel, card
from evercell.serving.guard import COOKIE, Guard, Refused, Sessions, answer, cookie_of, right_token
from evercell.serving.job_routes import job_routes
from evercell.serving.jobs import Jobs
from evercell.serving.settings import SUFFIXES, ServerSettings

PAGE = Path(__file__).with_name("page")
REPORT = Path(__file__).parents[1] / "reporting" / "page"
PARTS = {"style.css": PAGE, "app.js": PAGE, "map.css": REPORT, "map.js": REPORT}
"""Files of the page and the folder of each: its map is that of the report."""
KINDS = {".css": "text/css", ".js": "text/javascript"}
WRONG_SECONDS = 0.5  # answer to a wrong token, so that they cannot be tried by the thousand


class Token(BaseModel):
    """What a user gives to log in."""

    token: str = Field(max_length=500)


def make_app(settings: ServerSettings) -> FastAPI:
    """Make the application; its jobs run while its lifespan does.

    Parameters
    ----------
    settings
        As `ServerSettings.checked` gives them.

    Returns
    -------
    fastapi.FastAPI
        With ``state.jobs`` while it runs. No page of it asks anything of another machine.
    """
    sessions = Sessions()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        with temporary_folder(Path(tempfile.gettempdir()), "evercell-serve-") as folder:
            jobs = app.state.jobs = Jobs(settings, folder)
            jobs.start()
            try:
                yield
            finally:
                await jobs.close()

    # The pages that FastAPI makes of the description load scripts from elsewhere.
    app = FastAPI(title="evercell", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(Guard, settings=settings, sessions=sessions)
    app.add_exception_handler(EvercellError, _said)
    app.add_exception_handler(RequestValidationError, _said)
    app.add_exception_handler(HTTPException, _said)
    app.add_exception_handler(ClientDisconnect, _said)
    app.include_router(_page())
    app.include_router(_access(settings, sessions))
    app.include_router(_models(settings))
    app.include_router(job_routes(settings))
    return app


async def _said(request: Request, error: Exception) -> Response:
    """Every error in one shape."""
    if isinstance(error, EvercellError):
        return answer(error)
    if isinstance(error, RequestValidationError):
        first = error.errors()[0]
        where = ".".join(str(one) for one in first["loc"][1:]) or "the body"
        return answer(Refused(422, f"`{where[:100]}`: {first['msg']}", hint="/openapi.json describes every request"))
    if isinstance(error, HTTPException):
        return JSONResponse({"error": str(error.detail), "hint": None}, error.status_code, headers=error.headers)
    return Response(status_code=400)


def _page() -> APIRouter:
    """The page: files as they are in the package."""
    router = APIRouter(include_in_schema=False)

    @router.get("/")
    def index() -> FileResponse:
        return FileResponse(PAGE / "index.html", media_type="text/html", headers={"cache-control": "no-cache"})

    @router.get("/page/{part}")
    def file(part: str) -> FileResponse:
        if part not in PARTS:
            raise HTTPException(404)
        path = PARTS[part] / part
        return FileResponse(path, media_type=KINDS[path.suffix], headers={"cache-control": "no-cache"})

    @router.get("/favicon.ico")
    def icon() -> Response:
        return Response(status_code=204)

    return router


def _access(settings: ServerSettings, sessions: Sessions) -> APIRouter:
    """Who is there."""
    router = APIRouter(prefix="/api", tags=["access"])

    @router.get("/status")
    def status(request: Request) -> dict[str, Any]:
        """What the server is, and whether the one who asks may use it."""
        return {
            "version": __version__,
            "token": settings.token is not None,
            "known": Guard(_nothing, settings, sessions).known(request.headers),
            "max_upload": settings.max_upload,
            "keep_seconds": settings.keep_seconds,
            "suffixes": SUFFIXES,
        }

    @router.post("/login", status_code=204)
    async def login(request: Request, given: Token) -> Response:
        """Open a session for a browser; scripts send `Authorization: Bearer TOKEN` instead."""
        if settings.token is None or not right_token(given.token.strip(), settings.token):
            await asyncio.sleep(WRONG_SECONDS)
            raise Refused(401, "this is not the token", hint="`evercell serve` printed it when it was started")
        response = Response(status_code=204)
        secure = request.url.scheme == "https"
        response.set_cookie(COOKIE, sessions.begin(), httponly=True, samesite="strict", secure=secure)
        return response

    @router.post("/logout", status_code=204)
    def logout(request: Request) -> Response:
        """Close the session of a browser."""
        sessions.end(cookie_of(request.headers))
        response = Response(status_code=204)
        response.delete_cookie(COOKIE)
        return response

    return router


async def _nothing(*_: Any) -> None:
    """An application that answers nothing."""


def _models(settings: ServerSettings) -> APIRouter:
    """The models on offer."""
    router = APIRouter(prefix="/api/models", tags=["models"])

    @router.get("")
    def models() -> list[dict[str, Any]]:
        """Models that can label cells."""
        return [_model(one) for one in settings.listed_models().values()]

    @router.get("/{name}")
    def model(name: str) -> dict[str, Any]:
        """A model, its card, and its history: what it learnt in which stage, and what the gate said."""
        found = settings.model(name)
        ledger = Ledger.from_text(
            (found.path / "ledger.jsonl").read_text(encoding="utf-8"), name=f"{name}/ledger.jsonl"
        )
        history = [_stage({**stage.facts, "hash": stage.digest}) for stage in ledger]
        return {**_model(found), "card": card(found.path), "history": history}

    return router


def _model(one: ListedModel) -> dict[str, Any]:
    return {
        "name": one.name,
        "species": one.species,
        "genes": one.n_genes,
        "types": one.types,
        "stages": one.stages,
        "summary": one.description,
        "packaged": one.source == "packaged",
    }


def _stage(facts: dict[str, Any]) -> dict[str, Any]:
    """A line of the ledger, as the page shows it."""
    tries = facts.get("tries") or []
    return {
        "stage": facts.get("stage"),
        "verb": facts.get("verb", ""),
        "strategy": facts.get("strategy"),
        "data": [{"name": one.get("name", ""), "cells": one.get("cells", 0)} for one in facts.get("data", [])],
        "types_added": facts.get("types_added", []),
        "held_out": (facts.get("held_out") or {}).get("cells"),
        "accuracy": ((facts.get("metrics") or {}).get("model") or {}).get("accuracy"),
        "gate": {"holds": tries[-1]["holds"], "fallen": tries[-1]["fallen"], "tries": len(tries)} if tries else None,
        "hash": facts["hash"],
    }

"""Who may ask the server what, and uploads that end.

A page on another site can make a browser send requests here, but cannot set a header of its own or read answers; it can
have its own name lead to this address, but not change the name that the browser then sends. So a request must name a
host that this server has, and one that changes something must carry `HEADER` and come from this origin.
"""

from __future__ import annotations

import asyncio
import secrets
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse, Response

from evercell.errors import EvercellError
from evercell.serving.settings import ServerSettings

if TYPE_CHECKING:
    from fastapi import Request
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADER = "x-evercell"
COOKIE = "evercell"
OPEN = ("/api/status", "/api/login", "/openapi.json")
"""What needs no token, besides the files of the page."""
SESSIONS = 1000
SESSION_SECONDS = 12 * 3600
ROOM = 1 << 28  # bytes left free on the disk
LOOK = 1 << 24  # bytes of an upload after which the room is looked at again
DRAIN_SECONDS = 3.0
UPLOADS = "/api/jobs"  # the one path whose body may be large; `received` reads it
MOST_BODY = 16 << 20  # bytes of any other body

# No script and no style is taken that is not a file of this server.
SECURITY = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; "
        "img-src 'self'; connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
}


class Refused(EvercellError):
    """A request that is answered with an HTTP status of its own."""

    def __init__(self, status: int, message: str, *, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.status = status


def answer(error: EvercellError) -> JSONResponse:
    """An error as the interface gives it: ``{"error": ..., "hint": ...}``."""
    status = error.status if isinstance(error, Refused) else 422
    headers = {"www-authenticate": "Bearer"} if status == 401 else {}
    return JSONResponse(worded(error), status, headers=headers)


def worded(error: EvercellError) -> dict[str, str | None]:
    """What an error says; half characters, which names in JSON and HDF5 may hold and UTF-8 not, are question marks."""
    message = error.message.encode(errors="replace").decode()
    return {"error": message, "hint": error.hint and error.hint.encode(errors="replace").decode()}


class Sessions:
    """Browsers that have given the token, each known by a cookie; kept in memory only."""

    def __init__(self) -> None:
        self._ends: dict[str, float] = {}

    def begin(self) -> str:
        """Word of a new session."""
        now = time.monotonic()
        self._ends = {word: end for word, end in self._ends.items() if end > now}
        while len(self._ends) >= SESSIONS:
            del self._ends[next(iter(self._ends))]
        word = secrets.token_urlsafe(24)
        self._ends[word] = now + SESSION_SECONDS
        return word

    def holds(self, word: str) -> bool:
        """Whether a session is open."""
        return self._ends.get(word, 0.0) > time.monotonic()

    def end(self, word: str) -> None:
        """Close a session."""
        self._ends.pop(word, None)


class Guard:
    """ASGI middleware: refuses what `Guard.problem` names, and puts `SECURITY` on every answer."""

    def __init__(self, app: ASGIApp, settings: ServerSettings, sessions: Sessions) -> None:
        self.app, self.settings, self.sessions = app, settings, sessions

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close"})
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in SECURITY.items():
                    headers[name] = value
                headers.setdefault("cache-control", "no-store")
            await send(message)

        try:
            self.check(scope)
        except Refused as refused:
            response: Response = answer(refused)
            response.headers["connection"] = "close"  # what the request still sends is not read
            await response(scope, receive, with_headers)
            return
        try:
            await self.app(scope, receive if scope["path"] == UPLOADS else self.in_time(receive), with_headers)
        except TimeoutError:  # of `in_time`: nothing was answered yet
            await answer(Refused(408, "the request was too slow"))(scope, receive, with_headers)

    def in_time(self, receive: Receive) -> Receive:
        """`receive`, as long as the body comes within the server's patience."""
        whole, ends = False, time.monotonic() + self.settings.patience

        async def next_message() -> Message:
            nonlocal whole
            if whole:
                return await receive()
            message = await asyncio.wait_for(receive(), max(ends - time.monotonic(), 0))
            whole = not message.get("more_body", False)
            return message

        return next_message

    def check(self, scope: Scope) -> None:
        """Whether a request may go on.

        Raises
        ------
        Refused
        """
        headers = Headers(scope=scope)
        hosts = headers.getlist("host")
        if len(hosts) != 1 or not self.settings.allows(_name_of(hosts[0])):
            raise Refused(
                421, "this server is not called by that name", hint="open the address that `evercell serve` printed"
            )
        if scope["method"] not in ("GET", "HEAD", "OPTIONS"):
            if headers.get(HEADER) is None:
                raise Refused(403, "the header X-Evercell is missing", hint="send the header `X-Evercell: 1`")
            origin = headers.get("origin")
            site = headers.get("sec-fetch-site", "same-origin")
            if (origin is not None and _place_of(origin) != hosts[0]) or site not in ("same-origin", "none"):
                raise Refused(403, "the request comes from another site", hint="use the page of this server")
        path = scope["path"]
        length = headers.get("content-length", "0")
        known_length = length.isdecimal() and "transfer-encoding" not in headers
        if path != UPLOADS and not (known_length and int(length) <= MOST_BODY):
            raise Refused(413, f"the body of the request is larger than {MOST_BODY >> 20} MB, or of unknown length")
        if self.settings.token is None or not path.startswith("/api/") or path in OPEN:
            return
        if not self.known(headers):
            raise Refused(
                401, "the token is missing or wrong", hint="send `Authorization: Bearer TOKEN`, or log in on the page"
            )

    def known(self, headers: Headers) -> bool:
        """Whether a request carries the token, or the cookie of a session."""
        if self.settings.token is None:
            return True
        kind, _, given = headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer" and right_token(given.strip(), self.settings.token):
            return True
        return self.sessions.holds(cookie_of(headers))


def right_token(given: str, token: str) -> bool:
    """Whether a token is the right one, in a time that does not tell how much of it is."""
    return secrets.compare_digest(given.encode(), token.encode())


def cookie_of(headers: Headers) -> str:
    """Word of the session that a request carries; empty where it carries none."""
    pairs = (part.strip().partition("=") for part in headers.get("cookie", "").split(";"))
    return next((value for name, _, value in pairs if name == COOKIE), "")


def _place_of(origin: str) -> str:
    """Host and port of an origin; empty where it is none."""
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return ""


def _name_of(host: str) -> str:
    """Host without its port; empty where it is none."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


async def received(request: Request, path: Path, settings: ServerSettings) -> int:
    """Write the body of a request to a new file and return its bytes; the file is whole or absent.

    Raises
    ------
    Refused
        If it is too large, too slow, empty or cut off, or the disk is full.
    """
    too_large = Refused(
        413,
        f"the file is larger than {settings.max_upload / (1 << 20):,.0f} MB, the most that this server takes",
        hint="use `evercell annotate` for it, or start the server with a larger --max-upload",
    )
    full = Refused(507, "there is no room for the file on the server's disk", hint="try a smaller file, or later")
    announced = request.headers.get("content-length", "0")
    size = int(announced) if announced.isdecimal() else 0
    if size > settings.max_upload:
        await drained(request)
        raise too_large
    if size + ROOM > shutil.disk_usage(path.parent).free:
        await drained(request)
        raise full
    started, n_bytes = time.monotonic(), 0
    parts = request.stream().__aiter__()
    try:
        with path.open("xb") as file:
            while True:
                try:
                    part: Any = await asyncio.wait_for(anext(parts), settings.patience)
                except StopAsyncIteration:
                    break
                n_bytes += len(part)
                if n_bytes > settings.max_upload:
                    await drained(request)
                    raise too_large
                if n_bytes // LOOK > (n_bytes - len(part)) // LOOK and shutil.disk_usage(path.parent).free < ROOM:
                    raise full  # others write too, and not every upload says how long it is
                spent = time.monotonic() - started
                if spent > settings.patience and n_bytes < settings.least_rate * spent:
                    raise TimeoutError
                file.write(part)
        if n_bytes == 0:
            raise Refused(422, "the file is empty", hint="send the file as the body of the request")
    except TimeoutError:
        path.unlink(missing_ok=True)
        raise Refused(408, "the upload was too slow and was broken off", hint="try again on a better line") from None
    except OSError as error:
        path.unlink(missing_ok=True)
        raise full from error
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return n_bytes


async def drained(request: Request) -> None:
    """Read on for a moment: a client that is still sending when the connection closes does not see the answer."""
    try:
        async with asyncio.timeout(DRAIN_SECONDS):
            async for _ in request.stream():
                pass
    except (TimeoutError, RuntimeError):
        return

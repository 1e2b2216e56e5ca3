"""`serve`: the page, for this machine or, with a token, for others."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from evercell.commands.console import Console, examples
from evercell.errors import SettingsError

if TYPE_CHECKING:
    import uvicorn


def serve(
    context: typer.Context,
    *,
    host: Annotated[
        str, typer.Option("--host", metavar="ADDRESS", help="Where it listens. All but this machine needs a token.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", metavar="N", help="Port; 0 takes a free one.")] = 8501,
    token: Annotated[
        str | None,
        typer.Option("--token", metavar="TEXT", help="What users must give; made and printed where --host needs one."),
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option("--allow-host", metavar="NAME", help="Further name by which browsers reach it. Repeatable."),
    ] = None,
    models: Annotated[
        Path | None,
        typer.Option("--models", metavar="DIR", help="Folder of its own models and of those that it is taught."),
    ] = None,
    max_upload: Annotated[int, typer.Option("--max-upload", metavar="MB", help="Size of the largest file.")] = 2048,
    jobs: Annotated[int, typer.Option("--jobs", metavar="N", help="Jobs that run at a time.")] = 2,
    keep: Annotated[
        float, typer.Option("--keep", metavar="HOURS", help="Time after which the files of a job are removed.")
    ] = 4.0,
    open_page: Annotated[bool, typer.Option("--open/--no-open", help="Open the page in a browser.")] = True,
) -> None:
    """Open a page in the browser: drop a file, look, correct, teach.

    Files stay on this machine and are removed when their time is over or the server ends.
    """
    try:
        from pydantic import ValidationError

        from evercell.serving.listening import server_of
        from evercell.serving.settings import ServerSettings
    except ImportError as error:
        raise SettingsError(
            f"the page needs packages that are not installed ({error.name})", hint='pip install "evercell[serve]"'
        ) from error

    console: Console = context.obj
    try:
        settings = ServerSettings(
            host=host,
            port=port,
            token=token,
            hosts=tuple(allow_host or ()),
            models=models,
            max_upload=max_upload << 20,
            jobs=jobs,
            keep_seconds=keep * 3600,
        ).checked()
    except ValidationError as error:
        first = error.errors()[0]
        option = {"max_upload": "max-upload", "keep_seconds": "keep"}.get(str(first["loc"][0]), str(first["loc"][0]))
        raise SettingsError(
            f"--{option}: {first['msg']}", hint="`evercell serve --help` shows what it takes"
        ) from error
    if models is not None and not models.is_dir():
        raise SettingsError(f"the folder `{models}` does not exist", hint="make it first, or change --models")
    listener = _listening(settings.host, settings.port)
    shown = f"[{settings.host}]" if ":" in settings.host else settings.host
    address = f"http://{shown}:{listener.getsockname()[1]}/"
    print(address, flush=True)
    if settings.token is not None:
        print(f"token: {settings.token}", flush=True)
    if not settings.local:
        console.warning("others can reach this page, and what they send is not encrypted: put a TLS proxy before it")
    console.note("Ctrl-C ends the server and removes the files of its jobs")
    if open_page:
        import webbrowser

        webbrowser.open(address)
    _run(server_of(settings), listener)


def _listening(host: str, port: int) -> socket.socket:
    """A socket that listens, made before anything is printed: the port may be taken."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family, backlog=512)
    except OSError as error:
        raise SettingsError(
            f"cannot listen at {host}:{port}: {error.strerror or error}", hint="choose another --port or --host"
        ) from error
    return listener


def _run(server: uvicorn.Server, listener: socket.socket) -> None:
    try:
        server.run(sockets=[listener])
    except KeyboardInterrupt:
        return


COMMANDS = {
    serve: examples(
        "evercell serve",
        "evercell serve --port 9000 --models lab-models --no-open",
        "evercell serve --host 0.0.0.0 --allow-host cells.lab.example --max-upload 8000 --jobs 4",
    )
}

"""The server that listens: uvicorn, without patience for those who connect and say nothing."""

from __future__ import annotations

import asyncio
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from evercell.serving.app import make_app
from evercell.serving.settings import ServerSettings

CLOSING_SECONDS = 5


def server_of(settings: ServerSettings) -> uvicorn.Server:
    """A server that is ready to be run.

    Parameters
    ----------
    settings
        As `ServerSettings.checked` gives them.
    """

    class Impatient(H11Protocol):
        """Closes connections on which no request has begun after the server's patience, twice at most."""

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._seen: Any = None
            self._hurry()

        def _hurry(self) -> None:
            busy = self.cycle is not None and not self.cycle.response_complete
            if not busy and self._seen is (self.cycle or self):
                self.transport.close()
            if not self.transport.is_closing():
                self._seen = None if busy else (self.cycle or self)
                asyncio.get_running_loop().call_later(settings.patience, self._hurry)

    class Server(uvicorn.Server):
        """Ends the jobs first: some requests wait for them."""

        async def shutdown(self, sockets: Any = None) -> None:
            if (jobs := getattr(app.state, "jobs", None)) is not None:
                await jobs.close()
            await super().shutdown(sockets)

    app = make_app(settings)
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        http=Impatient,
        ws="none",
        access_log=False,
        log_level="warning",
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=CLOSING_SECONDS,
    )
    return Server(config)

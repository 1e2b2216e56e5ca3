"""A server for tests: settings as JSON in, the address out; `evercell serve` has no option for a short patience.

A second word gives the bytes beyond which no file can grow: to the server, a full disk.
"""

from __future__ import annotations

import json
import resource
import socket
import sys
from contextlib import suppress

from evercell.serving.listening import server_of
from evercell.serving.settings import ServerSettings

if __name__ == "__main__":
    if len(sys.argv) > 2 and (most := int(sys.argv[2])):
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    listener = socket.create_server(("127.0.0.1", 0), backlog=512)
    settings = ServerSettings(**json.loads(sys.argv[1])).checked()
    print(f"http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
    with suppress(KeyboardInterrupt):
        server_of(settings).run(sockets=[listener])

"""The command line, made once: Typer makes it anew for each call, which takes longer than many a command."""

from __future__ import annotations

from functools import cache
from typing import Any


@cache
def command_line() -> Any:
    """Click's command of `evercell`."""
    import typer

    from evercell.cli import app

    return typer.main.get_command(app)

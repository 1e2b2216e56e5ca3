"""What commands print: notes on standard error, results on standard output."""

from __future__ import annotations

import json
import math
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import typer

OBEYED = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


@dataclass(frozen=True)
class Console:
    """Where a command says what it does.

    Parameters
    ----------
    quiet
        Nothing but warnings, errors and results.
    verbose
        Details too.
    """

    quiet: bool = False
    verbose: bool = False

    @property
    def shown(self) -> bool | None:
        """Whether progress bars are shown; None: in a terminal."""
        return False if self.quiet else None

    def note(self, text: str) -> None:
        """What was done, and what was found on the way."""
        if not self.quiet:
            self._say(text)

    def detail(self, text: str) -> None:
        """What only those ask for who look for something."""
        if self.verbose and not self.quiet:
            self._say(text, style="dim")

    def warning(self, text: str) -> None:
        """Something that the user can act on."""
        self._say(text, head="warning:", style="yellow")

    def error(self, text: str, hint: str | None = None) -> None:
        """Why the command ends, and what mends it."""
        self._say(text, head="error:", style="bold red")
        if hint is not None:
            self._say(hint, head="hint:", style="cyan")

    def result(self, text: str, data: Mapping[str, Any], *, as_json: bool) -> None:
        """What the command was run for: text for people, or one JSON object."""
        try:
            print(visible(json.dumps(plain(data), ensure_ascii=False) if as_json else text), flush=True)
        except BrokenPipeError:
            # The reader (`head`, a pager) has seen enough. Python would complain again when it closes the pipe.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(0) from None

    def _say(self, text: str, *, head: str = "", style: str = "") -> None:
        from rich.console import Console as Rich
        from rich.text import Text

        # Lines are left as long as they are: a path that was wrapped cannot be copied.
        text = visible(text)
        line = Text.assemble((head, style), " ", text) if head else Text(text, style)
        Rich(stderr=True, soft_wrap=True, highlight=False).print(line)


def visible(text: str) -> str:
    r"""Text without what a terminal obeys: names of types, genes and files may come from strangers.

    Control characters but line break and tab, those that turn the direction of writing, other ends of lines, and halves
    of characters, which no terminal can be sent, are written as ``\\u001b``.
    """
    return OBEYED.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def plain(value: Any) -> Any:
    """A value as JSON can hold it: arrays as lists, what is not finite as None."""
    if isinstance(value, Mapping):
        return {str(key): plain(one) for key, one in value.items()}
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, Sequence | set | frozenset) and not isinstance(value, str):
        return [plain(one) for one in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, str | int | bool) or value is None else str(value)


def examples(*lines: str) -> str:
    r"""End of a help text; ``\b`` keeps the lines apart."""
    return "\n".join(["\b", "Examples:", *(f"  {line}" for line in lines)])

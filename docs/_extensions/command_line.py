"""The reference of the command line, from the parser itself."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import typer

from evercell.cli import app as program

if TYPE_CHECKING:
    from sphinx.application import Sphinx

PLACE = "<!-- commands -->"
"""Where in `cli.md` it stands."""


def commands() -> Iterator[tuple[str, Any]]:
    """Every command with its full name, those of groups after the group."""

    def below(name: str, command: Any) -> Iterator[tuple[str, Any]]:
        yield name, command
        for word, one in getattr(command, "commands", {}).items():
            yield from below(f"{name} {word}", one)

    for word, one in typer.main.get_command(program).commands.items():  # type: ignore[attr-defined]
        yield from below(f"evercell {word}", one)


def reference() -> str:
    """All commands in MyST: what each does, its arguments and options, its examples."""
    return "\n\n".join("\n\n".join(_section(name, command)) for name, command in commands())


def _section(name: str, command: Any) -> Iterator[str]:
    yield f"## `{name}`"
    yield _escaped(command.help or "")
    context = command.make_context(name, [], resilient_parsing=True)
    usage = " ".join(command.collect_usage_pieces(context))
    yield f"```text\n{name} {usage}\n```"
    rows = []
    for one in command.get_params(context):
        found = one.get_help_record(context)
        if found is None or "--help" in one.opts:
            continue
        names, text = re.sub(r" <[\w\[\]]+>$", "", found[0]), found[1]
        rows.append(f"| `{_cell(names)}` | {_escaped(_cell(text))} |")
    if rows:
        yield "\n".join(["| argument or option | meaning |", "|---|---|", *rows])
    if command.epilog:
        lines = re.sub(r"\x08|\\b", "", command.epilog).splitlines()
        examples = "\n".join(line.strip() for line in lines if line.strip().startswith("evercell "))
        yield f"```bash\n{examples}\n```"


def _cell(text: str) -> str:
    """Text for a cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")


def _escaped(text: str) -> str:
    """Text without marks that MyST would take for its own; backticks stay code."""
    return re.sub(r"([*_<>\[\]#])(?=(?:[^`]*`[^`]*`)*[^`]*$)", r"\\\1", text.replace("\x08", ""))


def _fill(app: Sphinx, page: str, source: list[str]) -> None:
    if page == "cli":
        source[0] = source[0].replace(PLACE, reference())


def setup(app: Sphinx) -> dict[str, Any]:
    """Called by Sphinx."""
    app.connect("source-read", _fill)
    return {"parallel_read_safe": True}

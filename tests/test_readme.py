"""The commands and names of the README exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer

import evercell as ec
from evercell.cli import app

README = Path(__file__).parents[1] / "README.md"
TEXT = README.read_text(encoding="utf-8")
FENCED = re.findall(r"```bash\n(.*?)```", TEXT, flags=re.DOTALL)
INDENTED = re.findall(r"^    .*$", TEXT, flags=re.MULTILINE)
CODE = "\n".join([*FENCED, *INDENTED])
COMMANDS = sorted({line.strip() for line in re.findall(r"^\s*(evercell [^\n#`]+)$", CODE, flags=re.MULTILINE)})


@pytest.mark.parametrize("line", COMMANDS)
def test_command_parses(line: str) -> None:
    group = typer.main.get_command(app)
    name, *arguments = shlex.split(line)[1:]
    command = group.commands[name]  # type: ignore[attr-defined]
    command.make_context(name, arguments, resilient_parsing=False).close()


def test_commands_were_found() -> None:
    assert any("evercell demo" in line for line in COMMANDS)
    assert len(COMMANDS) >= 4


def test_every_command_is_in_the_table() -> None:
    group = typer.main.get_command(app)
    for name in group.commands:  # type: ignore[attr-defined]
        assert f"`{name}`" in TEXT, f"README.md does not name `evercell {name}`"


def test_python_names_exist() -> None:
    for name in re.findall(r"\bec\.(\w+)\(", TEXT):
        assert hasattr(ec, name)


def test_linked_files_exist() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", TEXT):
        assert (README.parent / target).exists(), target

"""The README names every command, and what it links to is there; `test_docs` runs its blocks."""

from __future__ import annotations

import re

from made_once import command_line
from pages import PAGES

README = PAGES["README.md"]
TEXT = README.read_text(encoding="utf-8")


def test_every_command_is_in_the_table() -> None:
    for name in command_line().commands:
        assert f"`{name}`" in TEXT, f"README.md does not name `evercell {name}`"


def test_linked_files_exist() -> None:
    links = re.findall(r"\]\(([^)#:]+)(?:#[\w-]*)?\)", TEXT)
    assert len(links) > 10
    for target in links:
        assert (README.parent / target).exists(), target

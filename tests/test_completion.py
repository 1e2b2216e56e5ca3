"""Shell completion: commands, options and names of models, in every shell that is promised."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

CALLS = {
    "bash": {"COMP_WORDS": "evercell {words}", "COMP_CWORD": "{last}"},
    "zsh": {"_TYPER_COMPLETE_ARGS": "evercell {words}"},
    "fish": {"_TYPER_COMPLETE_ARGS": "evercell {words}", "_TYPER_COMPLETE_FISH_ACTION": "get-args"},
}


def completed(shell: str, words: str) -> str:
    """What is offered behind `words`, as the shell asks for it."""
    asked = {name: value.format(words=words, last=len(words.split())) for name, value in CALLS[shell].items()}
    environment = {**os.environ, "_EVERCELL_COMPLETE": f"complete_{shell}", **asked}
    code = "from evercell.cli import main; main([])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert done.stderr == ""
    return done.stdout


@pytest.mark.parametrize("shell", list(CALLS))
def test_names_of_models_are_offered(shell: str) -> None:
    offered = completed(shell, "annotate query.h5ad --model human-")
    assert "human-immune" in offered and "human-lung" in offered and "mouse-lung" not in offered


def test_commands_and_options_are_offered() -> None:
    assert completed("bash", "ann").split() == ["annotate"]
    assert completed("bash", "annotate --maj").split() == ["--majority"]
    assert completed("bash", "log hum").split()[0] == "human-immune"


@pytest.mark.parametrize("shell", list(CALLS))
def test_the_script_of_a_shell_is_shown(shell: str) -> None:
    words = [sys.executable, "-c", "from evercell.cli import main; main()", "--show-completion", shell]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert "_EVERCELL_COMPLETE" in done.stdout

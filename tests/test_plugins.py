"""Registries: a name leads to a class."""

from __future__ import annotations

import subprocess
import sys

import pytest

from evercell.backbones import BACKBONES
from evercell.errors import SettingsError
from evercell.plugins import Registry
from evercell.rejection import REJECTORS
from evercell.tokenizers import TOKENIZERS


@pytest.mark.parametrize("registry", [TOKENIZERS, BACKBONES, REJECTORS], ids=lambda registry: registry.kind)
def test_every_name_leads_to_a_class_of_that_name(registry: Registry) -> None:
    assert len(registry) == len(list(registry)) > 0
    for name, found in registry.items():
        assert found.name == name
        assert name in registry


def test_an_unknown_name_is_told_with_the_known_ones() -> None:
    assert "nonsense" not in TOKENIZERS
    with pytest.raises(SettingsError, match="no tokenizer `nonsense`") as caught:
        TOKENIZERS["nonsense"]
    assert caught.value.hint == "choose one of: bins, values"


def test_an_outside_class_can_be_added_once() -> None:
    registry: Registry[object] = Registry("thing", {"text": "string:Template"})
    registry.add("words", "string:Formatter")
    assert registry["words"].__name__ == "Formatter"
    with pytest.raises(SettingsError, match="already is a thing `words`"):
        registry.add("words", "string:Template")


@pytest.mark.parametrize("target", ["string", "string:", ":Template"])
def test_a_target_that_names_no_class_is_refused(target: str) -> None:
    with pytest.raises(SettingsError, match="does not name a class"):
        Registry("thing", {}).add("new", target)


def test_modules_are_imported_at_the_first_look_up_only() -> None:
    code = (
        "import sys, evercell.tokenizers as t; "
        "assert 'evercell.tokenizers.bins' not in sys.modules; t.TOKENIZERS['bins']; "
        "assert 'evercell.tokenizers.bins' in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

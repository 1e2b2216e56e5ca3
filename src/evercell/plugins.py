"""Extension points: a name leads to a class, imported only when it is asked for.

A new tokenizer, backbone, strategy or rejector is one file and one line in its registry; the contract tests in
``tests/contracts`` run over every registered name.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from typing import Generic, TypeVar

from evercell.errors import SettingsError

T = TypeVar("T")


class Registry(Mapping[str, type[T]], Generic[T]):
    """Names of one extension point, for example of every tokenizer.

    Parameters
    ----------
    kind
        What is registered, for messages: ``"tokenizer"``.
    classes
        Name to ``"module:Class"``; the module is imported at the first look-up.
    """

    def __init__(self, kind: str, classes: dict[str, str]) -> None:
        self.kind = kind
        self._classes = dict(classes)

    def __getitem__(self, name: str) -> type[T]:
        if name not in self._classes:
            raise SettingsError(
                f"there is no {self.kind} `{name}`", hint=f"choose one of: {', '.join(sorted(self._classes))}"
            )
        module, _, cls = self._classes[name].partition(":")
        found: type[T] = getattr(importlib.import_module(module), cls)
        return found

    def __contains__(self, name: object) -> bool:
        return name in self._classes

    def __iter__(self) -> Iterator[str]:
        return iter(self._classes)

    def __len__(self) -> int:
        return len(self._classes)

    def add(self, name: str, target: str) -> None:
        """Register ``"module:Class"`` under a new name, from a user's own package."""
        if name in self._classes:
            raise SettingsError(f"there already is a {self.kind} `{name}`", hint="choose another name")
        if not all(target.partition(":")):
            raise SettingsError(f"`{target}` does not name a class", hint="write it as package.module:Class")
        self._classes[name] = target

"""Ledger of a model: one line a stage, each with the hash of the line before."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from evercell.errors import ModelError

START = "0" * 64
COPY = "restore the model directory from a copy you trust"


@dataclass(frozen=True)
class Stage:
    """One training stage.

    Parameters
    ----------
    facts
        What was done: ``verb``, ``data`` (name, cells, fingerprint of each file), ``types_added``, ``settings``,
        ``seed``, ``strategy``, ``metrics``; JSON values only.
    previous
        Hash of the stage before, zeros for the first.
    """

    facts: Mapping[str, Any]
    previous: str

    @property
    def digest(self) -> str:
        """SHA-256 over the stage and the hash of the one before (hex)."""
        text = json.dumps({"previous": self.previous, **self.facts}, sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()

    def line(self) -> str:
        """The stage as one line of JSON."""
        return json.dumps({**self.facts, "previous": self.previous, "hash": self.digest}, ensure_ascii=False)


class Ledger:
    """Stages of a model in order; immutable."""

    def __init__(self, stages: Iterable[Stage] = ()) -> None:
        self.stages = tuple(stages)

    def __len__(self) -> int:
        return len(self.stages)

    def __iter__(self) -> Iterator[Stage]:
        return iter(self.stages)

    @property
    def head(self) -> str:
        """Hash of the last stage."""
        return self.stages[-1].digest if self.stages else START

    def appended(self, facts: Mapping[str, Any]) -> Ledger:
        """Ledger with one stage more."""
        # As JSON gives them back: a tuple or a numeric key would have another hash after reading.
        plain = json.loads(json.dumps({"stage": len(self.stages) + 1, **facts}))
        stage = Stage(plain, self.head)
        return Ledger([*self.stages, stage])

    def to_text(self) -> str:
        """Content of ``ledger.jsonl``."""
        return "".join(stage.line() + "\n" for stage in self.stages)

    @classmethod
    def from_text(cls, text: str, *, name: str = "ledger.jsonl") -> Ledger:
        """Read ``ledger.jsonl`` and check the chain of hashes.

        Raises
        ------
        ModelError
            If a line was changed in any byte, removed from before another, or is no JSON; the message names the line.
        """
        stages: list[Stage] = []
        previous = START
        # Not splitlines(), which also breaks at separators that may stand inside a name.
        *lines, rest = text.split("\n")
        if rest:
            raise ModelError(f"line {len(lines) + 1} of `{name}` is cut off", hint=COPY)
        for number, line in enumerate(lines, start=1):
            try:
                facts = json.loads(line)
                claimed, found_previous = facts.pop("hash"), facts.pop("previous")
            except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
                raise ModelError(f"line {number} of `{name}` is no ledger stage", hint=COPY) from error
            stage = Stage(facts, found_previous)
            whole = facts.get("stage") == number and stage.digest == claimed and stage.line() == line
            if found_previous != previous or not whole:
                raise ModelError(
                    f"line {number} of `{name}` was changed: its hash does not fit",
                    hint=COPY,
                )
            stages.append(stage)
            previous = claimed
        return cls(stages)

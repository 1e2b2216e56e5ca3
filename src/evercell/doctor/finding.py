"""One thing that the doctor found, and what a list of them says."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Literal

Severity = Literal["info", "warning", "error"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Parameters
    ----------
    severity
        ``info``, ``warning`` (labels may suffer: look at it) or ``error`` (it is refused, or labels cannot be right).
    subject
        What was looked at, a word or two.
    found
        What was found, with the value.
    expected
        What a sound file, run or installation has; empty where there is nothing to compare with.
    cause
        What such a value most often comes from; empty where nothing is wrong.
    mend
        What mends it, naming the argument; empty where there is nothing to mend.
    """

    severity: Severity
    subject: str
    found: str
    expected: str = ""
    cause: str = ""
    mend: str = ""

    def to_dict(self) -> dict[str, str]:
        """Plain values, for JSON."""
        return asdict(self)

    def lines(self) -> list[str]:
        """The finding as a person reads it: what was found, and indented what to make of it."""
        expected = f" (expected: {self.expected})" if self.expected else ""
        lines = [f"{self.severity:<9}{self.subject}: {self.found}{expected}"]
        lines += [f"{'':<9}cause: {self.cause}"] if self.cause else []
        return lines + ([f"{'':<9}-> {self.mend}"] if self.mend else [])


def number_of(findings: Iterable[Finding], severity: Severity) -> int:
    """How many findings have a severity."""
    return sum(one.severity == severity for one in findings)

"""`naive`: plain training on the new cells, to show what forgetting is."""

from __future__ import annotations

from typing import ClassVar

from evercell.updating.base import Strategy


class NaiveStrategy(Strategy):
    """Nothing is done against forgetting."""

    name: ClassVar[str] = "naive"
    uses_bank: ClassVar[bool] = False

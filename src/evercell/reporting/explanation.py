"""write_explanation: one self-contained HTML page with the reasons for labels."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from evercell.reporting.page import write_page

if TYPE_CHECKING:
    from evercell.explaining import Explanation


def write_explanation(explanation: Explanation, path: str | Path, *, title: str = "Why these labels") -> Path:
    """Write the reasons as one HTML page in the look of the report, readable offline, on a phone and in print.

    Parameters
    ----------
    explanation
        What `explain` gave.
    path
        The HTML file; replaced whole or not at all.
    title
        Heading of the page.

    Returns
    -------
    Path
        `path`.
    """
    return write_page("explanation.html", path, title=title, reasons=explanation.reasons, info=explanation.info)

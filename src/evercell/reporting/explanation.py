"""write_explanation: one self-contained HTML page with the reasons for labels."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

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
    from jinja2 import Environment

    from evercell.cells import atomic_path

    folder = Path(__file__).parent
    template = (folder / "explanation.html").read_text(encoding="utf-8")
    style = (folder / "template.html").read_text(encoding="utf-8").split("<style>")[1].split("</style>")[0]
    page = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(template)
    html = page.render(title=title, style=style, reasons=explanation.reasons, info=explanation.info)
    path = Path(path)
    with atomic_path(path) as temporary:
        Path(temporary).write_text(html, encoding="utf-8")
    return path

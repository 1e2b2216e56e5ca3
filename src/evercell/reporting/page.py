"""From values to one HTML file: templates, style and scripts in it, and a policy that lets nothing else in."""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evercell.outputs import atomic_path
from evercell.reporting import findings

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup

FOLDER = Path(__file__).with_name("page")
PACKAGES = ("evercell", "scanpy", "anndata", "scikit-learn", "numpy", "pandas", "torch")


def write_page(template: str, path: str | Path, **context: Any) -> Path:
    """Render a template of this folder into a file, which is replaced whole or not at all.

    The page may run its own scripts, known by their SHA-256, and may ask no machine for anything; values of `context`
    are text and are escaped.
    """
    scripts = [_file(name) for name in context.pop("scripts", ())]
    html = (
        _environment()
        .get_template(template)
        .render(
            style=_file("style.css") + _file("map.css"),
            scripts=scripts,
            hashes=[_hash(script) for script in scripts],
            versions=versions(),
            **context,
        )
    )
    path = Path(path)
    with atomic_path(path) as temporary:
        Path(temporary).write_text(html, encoding="utf-8")
    return path


@cache
def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader

    page = Environment(loader=FileSystemLoader(FOLDER), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page.filters |= {
        "percent": findings.percent,
        "plural": findings.plural,
        "number": number,
        "listed": findings.listed,
        "code": code,
    }
    return page


@cache
def _file(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8")


def _hash(script: str) -> str:
    """As a Content-Security-Policy names a script; line ends are those that the browser reads."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def number(value: float | None, decimals: int = 3) -> str:
    """A figure, or a dash where there is none."""
    return "–" if value is None or value != value else f"{value:.{decimals}f}"  # noqa: PLR0124 -- NaN


def code(text: str) -> Markup:
    """Text whose words in backticks are set as code; all of it is escaped."""
    from markupsafe import Markup, escape

    parts = [escape(part) for part in text.split("`")]
    if len(parts) % 2 == 0:  # one that has no partner is a backtick
        parts[-2:] = [parts[-2] + "`" + parts[-1]]
    return Markup("").join(
        Markup("<code>{}</code>").format(part) if place % 2 else part for place, part in enumerate(parts)
    )


def versions() -> dict[str, str]:
    """Versions of what made the page."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found

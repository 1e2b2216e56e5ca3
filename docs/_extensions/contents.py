"""The table of contents, in groups; a page that is in no group comes last, so that none is left out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sphinx.application import Sphinx

PLACE = "<!-- contents -->"
"""Where in `index.md` they stand."""

GROUPS: dict[str, tuple[str, ...]] = {
    "Begin": ("install", "quick-start", "models", "input"),
    "Tasks": (
        "annotate",
        "report",
        "explain",
        "page",
        "train",
        "teach",
        "unknown",
        "evaluate",
        "merge",
        "preprocess",
        "pretrain",
        "ledger",
        "exchange",
        "doctor",
    ),
    "Walks": ("mouse-lung", "coming-from"),
    "At scale": ("large", "atlas", "nextflow", "speed"),
    "In other places": ("python", "r"),
    "Extend": (
        "extend/tokenizer",
        "extend/backbone",
        "extend/strategy",
        "extend/rejector",
        "extend/metric",
        "extend/method",
    ),
    "Reference": ("cli", "api", "formats", "glossary"),
    "Trust": ("trust", "guarantees", "benchmarks", "log"),
}


def contents(found: set[str]) -> str:
    """Tables of contents of the pages that are there, in MyST."""
    grouped = {page for pages in GROUPS.values() for page in pages}
    more = tuple(sorted(found - grouped - {"index"}))
    parts = []
    for caption, pages in (GROUPS | {"More": more}).items():
        there = [page for page in pages if page in found]
        if there:
            parts.append("\n".join(["```{toctree}", ":hidden:", f":caption: {caption}", "", *there, "```"]))
    return "\n\n".join(parts)


def _fill(app: Sphinx, page: str, source: list[str]) -> None:
    if page == "index":
        source[0] = source[0].replace(PLACE, contents(set(app.env.found_docs)))


def setup(app: Sphinx) -> dict[str, Any]:
    """Called by Sphinx."""
    app.connect("source-read", _fill)
    return {"parallel_read_safe": True}

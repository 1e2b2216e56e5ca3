"""The public names of evercell, each with its docstring."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import evercell

if TYPE_CHECKING:
    from sphinx.application import Sphinx

PLACES = {
    "<!-- functions -->": inspect.isfunction,
    "<!-- classes -->": inspect.isclass,
    "<!-- modules -->": inspect.ismodule,
}
"""Where in `api.md` they stand."""


def names(wanted: Any) -> list[str]:
    """Public names of one kind, in the order of the alphabet."""
    return [name for name in sorted(dir(evercell)) if name != "__version__" and wanted(getattr(evercell, name))]


def described(wanted: Any) -> str:
    """Directives of autodoc, in MyST."""
    kind = {inspect.isfunction: "autofunction", inspect.isclass: "autoclass", inspect.ismodule: "automodule"}[wanted]
    members = "" if kind == "autofunction" else "\n   :members:"
    blocks = (f"### `{name}`\n\n```{{eval-rst}}\n.. {kind}:: evercell.{name}{members}\n```" for name in names(wanted))
    return "\n\n".join(blocks)


def _fill(app: Sphinx, page: str, source: list[str]) -> None:
    if page == "api":
        for place, wanted in PLACES.items():
            source[0] = source[0].replace(place, described(wanted))


def _skip(app: Sphinx, kind: str, name: str, found: Any, skip: bool, options: Any) -> bool | None:
    """Leave out what scikit-learn makes for every estimator."""
    return True if name.startswith("set_") and name.endswith("_request") else None


def setup(app: Sphinx) -> dict[str, Any]:
    """Called by Sphinx."""
    app.connect("source-read", _fill)
    app.connect("autodoc-skip-member", _skip)
    return {"parallel_read_safe": True}

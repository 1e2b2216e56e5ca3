"""What the tests in a real browser share.

``EVERCELL_CHROMIUM`` names the browser, ``EVERCELL_AXE`` a file axe.min.js to check every view with, and
``EVERCELL_SCREENSHOTS`` a folder that pictures of them go to.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

CHROMIUM = os.environ.get("EVERCELL_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
AXE = os.environ.get("EVERCELL_AXE") or None


def looked_at(page: Any, name: str) -> None:
    """A view fits the window and, where that is asked for, breaks no rule of axe and is kept as a picture."""
    assert page.evaluate("document.documentElement.scrollWidth") <= page.viewport_size["width"]
    if folder := os.environ.get("EVERCELL_SCREENSHOTS"):
        page.screenshot(path=f"{folder}/{name}.png", full_page=True)
    found = broken_rules(page)
    assert not found, found


def broken_rules(page: Any) -> list[Any]:
    """Rules of axe that a page breaks, and where; none where axe is not there."""
    if AXE is None:
        return []
    page.evaluate(Path(AXE).read_text(encoding="utf-8"))
    found: list[Any] = page.evaluate(
        "async () => (await axe.run()).violations.map(v => [v.id, v.nodes.map(n => n.html)])"
    )
    return found


def until(page: Any, words: str, *, looks: int = 600) -> None:
    """Wait until an expression holds: `wait_for_function` compiles text on the page, which its policy refuses."""
    for _ in range(looks):
        if page.evaluate(words):
            return
        page.wait_for_timeout(50)
    raise AssertionError(f"never: {words}")


def next_frame(page: Any) -> None:
    """Wait until what was asked of the map is drawn."""
    page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")

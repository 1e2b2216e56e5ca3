"""Pictures of the report and of the page: `python docs/figures/make_pages.py`, with Playwright and Chromium."""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from PIL import Image
from playwright.sync_api import sync_playwright

HERE = Path(__file__).parent
WIDTH = 1000
LASSO = ((0.5, 0.02), (0.98, 0.02), (0.98, 0.98), (0.5, 0.98), (0.5, 0.02))  # places on the map, as shares of it
MINUTE = 60_000  # milliseconds


def evercell(*words: str) -> list[str]:
    """A command as it is run."""
    return [sys.executable, "-m", "evercell", *words]


def kept(picture: bytes, name: str) -> None:
    """Write a picture in its 256 most frequent colours, which hold those of all dots; edges of letters change."""
    image = Image.open(io.BytesIO(picture)).convert("RGB")
    found = sorted(image.getcolors(image.width * image.height) or [], reverse=True)[:256]
    palette = Image.new("P", (1, 1))
    palette.putpalette([channel for _, colour in found for channel in colour])
    image.quantize(palette=palette, dither=Image.Dither.NONE).save(HERE / name, optimize=True)


def report(browser: Any, folder: Path) -> None:
    """The report from its head to the map, and its marker genes."""
    page = browser.new_page(viewport={"width": WIDTH, "height": 900})
    page.goto((folder / "report.html").as_uri())
    page.wait_for_selector("#cells[data-ready]")
    box = page.locator("#map").bounding_box()
    page.wait_for_timeout(500)
    clip = {"x": 0, "y": 0, "width": WIDTH, "height": box["y"] + box["height"] + 16}
    kept(page.screenshot(full_page=True, clip=clip), "report.png")
    kept(page.locator("#markers").screenshot(), "report-markers.png")


def page(browser: Any, file: Path) -> None:
    """The page with a result, some cells inside a lasso."""
    with served() as address:
        # So high that nothing scrolls: the field for a label else stays in sight above the map.
        page = browser.new_page(viewport={"width": WIDTH, "height": 2200})
        page.goto(address)
        page.set_input_files("#file", file)
        page.check("input[value=human-pancreas]")
        page.click("#go")
        page.wait_for_selector("#legend button", timeout=10 * MINUTE)
        box = page.locator("#cells").bounding_box()
        for place, (x, y) in enumerate(LASSO):
            page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"], steps=4)
            if not place:
                page.mouse.down()
        page.mouse.up()
        page.wait_for_selector("#relabel:visible")
        page.wait_for_timeout(500)
        box = page.locator("#relabel").bounding_box()
        clip = {"x": 0, "y": 0, "width": WIDTH, "height": box["y"] + box["height"] + 16}
        kept(page.screenshot(full_page=True, clip=clip), "page.png")


@contextmanager
def served() -> Iterator[str]:
    """The address of a server with the packaged models alone."""
    with TemporaryDirectory() as models:
        words = evercell("serve", "--port", "0", "--no-open", "--jobs", "1", "--models", models)
        process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)  # noqa: S603
        try:
            yield process.stdout.readline().strip() if process.stdout else ""
        finally:
            process.terminate()
            process.wait(30)


if __name__ == "__main__":
    with TemporaryDirectory() as name, sync_playwright() as playwright:
        folder = Path(name)
        file = folder / "examples" / "tritschler_unseen.h5ad"
        output = ("--output", str(folder / "annotated.h5ad"), "--report", str(folder / "report.html"))
        for words in (
            ("example", "pancreas", "--output", str(file.parent)),
            ("annotate", str(file), "--model", "human-pancreas", *output),
        ):
            subprocess.run(evercell(*words), check=True)  # noqa: S603
        flags = ["--no-sandbox", "--disable-gpu"]
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=flags)
        report(browser, folder)
        page(browser, file)
        browser.close()

"""The report in a real browser: Chromium, driven by Playwright; skipped where either is not installed.

`browsing` names the variables of the environment that they look at.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browsing import AXE, CHROMIUM, looked_at, next_frame, until

from evercell.reporting import write_report
from evercell.testing import synthetic_cells

sync_api = pytest.importorskip("playwright.sync_api", reason="the browser tests need Playwright")
if CHROMIUM is None:
    pytest.skip("the browser tests need Chromium", allow_module_level=True)

pytestmark = pytest.mark.slow
FLAGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
HOSTILE = "<img src=x onerror=document.title='owned'>"
GENE = "<b>GENE"
COLOURS = """() => {
    const canvas = document.getElementById("cells"), context = canvas.getContext("2d"), found = new Map();
    const words = new Uint32Array(context.getImageData(0, 0, canvas.width, canvas.height).data.buffer);
    for (const word of words) found.set(word, (found.get(word) ?? 0) + 1);
    return [...found].sort((a, b) => b[1] - a[1]).slice(0, 12);
}"""


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with a map of three islands: two labels of a hostile kind among them."""
    adata = synthetic_cells(240, n_types=3, seed=1)
    _, codes = np.unique(adata.obs["cell_type"].astype(str), return_inverse=True)
    adata.obs["evercell"] = np.array([HOSTILE, "alpha", "beta"], dtype=object)[codes]
    adata.obs["evercell_confidence"] = np.linspace(0, 1, 240)
    adata.var_names = [GENE, *adata.var_names[1:]]
    draws = np.random.default_rng(0)
    centres = np.array([[0, 0], [10, 0], [5, 9]])
    adata.obsm["X_umap"] = centres[codes] + draws.normal(0, 0.6, (240, 2))
    return write_report(adata, tmp_path_factory.mktemp("page") / "report.html", basis="X_umap", title=f"A {HOSTILE}")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def view(browser: Any, report: Path) -> Iterator[Any]:
    """Open the report; what it asks for, and what the browser complains of, is told at the end."""
    contexts, said, asked = [], [], []

    def open_it(width: int = 1400, scheme: str = "light") -> Any:
        phone = width < 600
        axe = AXE is not None  # it is put in from outside, which the policy of the page refuses
        context = browser.new_context(
            viewport={"width": width, "height": 900},
            color_scheme=scheme, has_touch=phone, is_mobile=phone, bypass_csp=axe, accept_downloads=True,
        )  # fmt: skip
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(60_000)
        page.on("console", lambda one: said.append(one.text) if one.type in ("error", "warning") else None)
        page.on("pageerror", lambda one: said.append(str(one)))
        page.on("request", lambda one: asked.append(one.url))
        page.goto(report.as_uri())
        page.wait_for_selector("#cells[data-ready]")
        return page

    yield open_it
    for context in contexts:
        context.close()
    assert not [one for one in said if "willReadFrequently" not in one]
    assert not [url for url in asked if not url.startswith((report.as_uri(), "blob:"))]


def read(page: Any, name: str) -> None:
    assert page.title() == f"A {HOSTILE}" and page.locator("main img").count() == 0
    looked_at(page, f"report-{name}")


def drawn(page: Any) -> Any:
    """The colours of the map after the next frame, the most frequent first."""
    next_frame(page)
    return page.evaluate(COLOURS)


@pytest.mark.parametrize(("width", "scheme"), [(1400, "light"), (1400, "dark"), (390, "light"), (390, "dark")])
def test_it_fits_and_can_be_read(view: Any, width: int, scheme: str) -> None:
    page = view(width, scheme)
    read(page, f"{width}-{scheme}")
    assert len(drawn(page)) > 3  # three labels on a ground


def test_the_map_is_coloured_drawn_around_and_hidden(view: Any, tmp_path: Path) -> None:
    page = view()
    by_label = drawn(page)
    page.select_option("#colour-by", "confidence")
    page.wait_for_selector("#scale:visible")
    assert drawn(page)[1:4] != by_label[1:4]
    page.fill("#gene", GENE.lower())
    page.press("#gene", "Enter")
    until(page, "document.getElementById('colour-by').value === 'gene'")
    assert page.input_value("#gene") == GENE
    page.fill("#gene", "no such gene")
    page.press("#gene", "Enter")
    assert "not among the" in page.inner_text("#gene-said")

    page.select_option("#colour-by", "label")
    page.wait_for_selector("#legend button")
    assert HOSTILE in page.inner_text("#legend")
    page.click("#legend button >> nth=0")
    assert page.get_attribute("#legend button >> nth=0", "aria-pressed") == "false"
    page.click("#legend button >> nth=0")
    pressed = "[...document.querySelectorAll('#legend button')].map((one) => one.getAttribute('aria-pressed'))"
    page.dblclick("#legend button >> nth=1")
    assert page.evaluate(pressed) == ["false", "true", "false"]
    page.click("#legend button >> nth=1", modifiers=["Shift"])  # as with a keyboard
    assert page.evaluate(pressed) == ["true", "true", "true"]

    page.click("[data-drag=lasso]")
    page.locator("#cells").scroll_into_view_if_needed()
    box = page.locator("#cells").bounding_box()
    at = [(0.02, 0.02), (0.98, 0.02), (0.98, 0.45), (0.02, 0.45)]  # the upper island
    for number, (x, y) in enumerate([*at, at[0]]):
        page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"], steps=5)
        if not number:
            page.mouse.down()
    page.mouse.up()
    until(page, "document.querySelector('#selection p + p')?.textContent.includes('gene')")
    said = page.inner_text("#selection")
    assert " cells selected: beta " in said and "(100.0%)" in said and "higher here than in the other cells" in said
    read(page, "selected")
    with page.expect_download() as given:
        page.click("text=Save names as .csv")
    given.value.save_as(tmp_path / "cells.csv")
    found = re.match(r"(\d+) cells selected", said)
    assert found and len((tmp_path / "cells.csv").read_text(encoding="utf-8").splitlines()) == int(found[1]) + 1
    page.click("#selection >> text=Clear")
    assert page.is_hidden("#selection")


def test_without_a_mouse(view: Any) -> None:
    page = view()
    before = drawn(page)
    page.focus("#cells")
    page.keyboard.press("+")
    page.keyboard.press("ArrowLeft")
    assert drawn(page) != before
    page.keyboard.press("0")
    assert drawn(page) == before
    page.focus("#copy")
    page.keyboard.press("Enter")
    until(page, "document.getElementById('copied').textContent !== ''")
    assert "Copied" in page.inner_text("#copied") or "selected" in page.inner_text("#copied")


def test_it_is_printed_on_white(view: Any, tmp_path: Path) -> None:
    page = view(scheme="dark")
    page.pdf(path=tmp_path / "report.pdf", format="A4")
    assert (tmp_path / "report.pdf").stat().st_size > 20_000
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.evaluate("getComputedStyle(document.body).color") == "rgb(28, 36, 48)"
    assert page.is_hidden("nav") and page.is_hidden("[data-drag=lasso]") and page.is_visible("#methods-text")

"""The page in a real browser: Chromium, driven by Playwright; skipped where either is not installed.

`browsing` names the variables of the environment that they look at.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pytest
from browsing import CHROMIUM, looked_at, next_frame, until

from evercell.testing import synthetic_cells

from .conftest import served, stored

sync_api = pytest.importorskip("playwright.sync_api", reason="the browser tests need Playwright")
if CHROMIUM is None:
    pytest.skip("the browser tests need Chromium", allow_module_level=True)

pytestmark = pytest.mark.slow

FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
HARMLESS = re.compile(r"status of 4\d\d")
HOSTILE = "<img src=x onerror=document.title='owned'>"
TOKEN = "a-token-of-the-tests"  # noqa: S105
PATIENCE = 400_000  # milliseconds: what draws the first map is compiled, which takes long on a busy machine
View = Callable[..., Any]


@pytest.fixture(scope="module")
def place(models: Path) -> Iterator[str]:
    """A server of these tests' own, with one worker: what it has compiled it keeps."""
    with served(models=str(models), jobs=1, max_upload=4 << 20) as address:
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def view(browser: Any, place: str) -> Iterator[View]:
    """Open the page in a browser of its own; what it says of errors is told at the end."""
    contexts, said = [], []

    def open_it(*, width: int = 1400, scheme: str = "light", address: str = place) -> Any:
        phone = width < 600
        context = browser.new_context(
            viewport={"width": width, "height": 844}, color_scheme=scheme, has_touch=phone, is_mobile=phone
        )
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(60_000)
        page.on("console", lambda one: said.append(one.text) if one.type == "error" else None)
        page.on("pageerror", lambda one: said.append(str(one)))
        page.goto(address)
        return page

    yield open_it
    for context in contexts:
        context.close()
    assert not [one for one in said if not HARMLESS.search(one)]


def picture(page: Any) -> str:
    """The map as it is drawn in the next frame."""
    next_frame(page)
    found: str = page.evaluate("document.getElementById('cells').toDataURL()")
    return found


def annotated(page: Any, name: str, content: bytes, *, model: str = "quick") -> None:
    """Give the page a file and wait for its result."""
    page.set_input_files("#file", {"name": name, "mimeType": "application/octet-stream", "buffer": content})
    page.check(f"input[value={model}]")
    page.click("#go")
    page.wait_for_selector("#result:visible, #problem:visible", timeout=PATIENCE)


def lassoed(page: Any) -> None:
    """Draw around the left half of the map."""
    page.locator("#cells").scroll_into_view_if_needed()
    box = page.locator("#cells").bounding_box()
    left, top, width, height = box["x"], box["y"], box["width"], box["height"]
    page.mouse.move(left + 0.01 * width, top + 0.02 * height)
    page.mouse.down()
    for x, y in ((0.5, 0.02), (0.5, 0.5), (0.5, 0.98), (0.01, 0.98), (0.01, 0.02)):
        page.mouse.move(left + x * width, top + y * height, steps=4)
    page.mouse.up()
    page.wait_for_selector("#relabel:visible")


def explored(page: Any) -> str:
    """Use the map in every way but the lasso; gives its picture, which is the same before and after."""
    whole = picture(page)
    page.click("#legend button >> nth=0")
    assert page.get_attribute("#legend button >> nth=0", "aria-pressed") == "false" and picture(page) != whole
    page.click("#legend button >> nth=0")
    assert picture(page) == whole
    page.dblclick("#legend button >> nth=1")
    pressed = "[...document.querySelectorAll('#legend button')].map((one) => one.getAttribute('aria-pressed'))"
    assert page.evaluate(pressed)[:3] == ["false", "true", "false"]
    page.dblclick("#legend button >> nth=1")
    assert picture(page) == whole

    page.focus("#cells")
    page.keyboard.press("+")
    page.keyboard.press("ArrowLeft")
    assert picture(page) != whole
    page.keyboard.press("0")
    assert picture(page) == whole
    page.click("[data-drag=move]")
    box = page.locator("#cells").bounding_box()
    page.mouse.move(box["x"] + 100, box["y"] + 100)
    page.mouse.down()
    page.mouse.move(box["x"] + 160, box["y"] + 120)
    page.mouse.up()
    page.mouse.wheel(0, -200)
    assert picture(page) != whole
    page.click("[data-zoom='0']")
    page.click("[data-drag=lasso]")
    assert picture(page) == whole

    for y, x in ((y, x) for y in range(20, 400, 20) for x in range(20, 600, 20)):  # until a cell is met
        page.mouse.move(box["x"] + x, box["y"] + y)
        if page.is_visible("#tip"):
            break
    assert "confidence" in page.inner_text("#tip")
    page.select_option("#colour-by", "sample-0")
    assert "donor" in page.inner_text("#legend") and picture(page) != whole
    page.select_option("#colour-by", "unknown_score")
    assert page.is_visible("#scale") and page.is_hidden("#legend")
    page.select_option("#colour-by", "label")
    with page.expect_download() as given:
        page.click("[data-picture]")
    assert given.value.suggested_filename == "cells.png" and picture(page) == whole
    return whole


def test_from_upload_to_download_with_corrections(view: View, query: Path, tmp_path: Path, models: Path) -> None:
    page = view()
    page.wait_for_selector(".model")
    looked_at(page, "start")
    annotated(page, "my cells.h5ad", query.read_bytes())
    page.wait_for_selector("#legend button")
    page.wait_for_timeout(500)
    looked_at(page, "result")
    assert "150 cells were annotated" in page.inner_text("#summary")
    assert page.locator("#types tr").count() >= 4

    whole = explored(page)
    lassoed(page)
    assert picture(page) != whole
    found = re.search(r"Selected: (\d+) cells?", page.inner_text("#selected"))
    assert found and 0 < int(found[1]) < 150
    page.fill("#new-label", HOSTILE)
    looked_at(page, "selected")
    page.press("#new-label", "Enter")
    page.wait_for_selector("#corrections li")
    assert HOSTILE in page.inner_text("#corrections") and HOSTILE in page.inner_text("#types")
    page.wait_for_timeout(500)
    assert page.title() == "evercell: cell types" and page.locator("main img").count() == 0
    assert page.is_hidden("#relabel") and page.evaluate("state.chosen") is None
    looked_at(page, "corrected")
    page.click("#undo")
    page.wait_for_selector("#corrections li", state="detached")
    assert picture(page) == whole

    page.click("#types tr:first-child button")  # without a mouse: by the table
    page.fill("#new-label", "renamed")
    page.press("#new-label", "Enter")
    page.wait_for_selector("#corrections li")
    with page.expect_download() as given:
        page.click("[data-file=h5ad]")
    given.value.save_as(tmp_path / "got.h5ad")
    assert given.value.suggested_filename == "my_cells-evercell.h5ad"
    assert (ad.read_h5ad(tmp_path / "got.h5ad").obs["evercell_corrected"] == "renamed").sum() > 10
    with page.expect_download() as given:
        page.click("[data-file=csv]")
    assert given.value.suggested_filename == "my_cells-evercell.csv"

    gene = str(ad.read_h5ad(query).var_names[3])
    page.select_option("#colour-by", "gene")
    page.fill("#gene", gene)
    page.press("#gene", "Enter")
    page.wait_for_selector("#scale:visible")
    assert gene in page.evaluate("state.gene.name")
    page.select_option("#colour-by", "confidence")
    page.reload()  # what is known of the job stays
    page.wait_for_selector("#corrections li", timeout=PATIENCE)
    assert "renamed" in page.inner_text("#corrections")
    page.click("#forget")
    page.wait_for_selector("#start:visible")


def test_the_model_is_taught_on_the_page(view: View, models: Path) -> None:
    cells = synthetic_cells(240, n_types=5, seed=8)
    page = view()
    annotated(page, "new.h5ad", stored(cells))
    page.wait_for_selector("#legend button")
    rows = np.flatnonzero(cells.obs["cell_type"] == "acinar").tolist()
    # A lasso finds cells of a type by how they lie; a test must know which these are.
    page.evaluate(
        "(rows) => choose({ places: state.map.row.flatMap((r, i) => (rows.includes(r) ? [i] : [])), text: '' })", rows
    )
    page.fill("#new-label", "acinar")
    page.press("#new-label", "Enter")
    page.wait_for_selector("#teach:visible")
    page.fill("#teach-name", "from-the-page")
    looked_at(page, "teach")
    page.click("#teach button")
    page.wait_for_selector("#taught:visible", timeout=PATIENCE)
    said = page.inner_text("#taught")
    assert "from-the-page is made" in said and "acinar" in said and "no old type fell" in said
    looked_at(page, "taught")
    assert (models / "from-the-page" / "annotator.json").is_file()
    page.click("text=Its history")
    page.wait_for_selector("#model-dialog .stage")
    assert "Stage 2: update" in page.inner_text("#model-dialog")
    looked_at(page, "history")
    page.keyboard.press("Escape")
    page.click("text=Use it for the next file")
    page.wait_for_selector("#start:visible")
    assert page.is_checked("input[value=from-the-page]")


def test_a_bad_file_is_told_and_the_next_one_works(view: View, query: Path) -> None:
    page = view()
    page.set_input_files("#file", {"name": "notes.docx", "mimeType": "text/plain", "buffer": b"x"})
    assert "no kind that is read" in page.inner_text("#problem") and page.is_disabled("#go")
    annotated(page, f"{HOSTILE}.h5ad", b"no HDF5")
    assert "cannot be read as .h5ad" in page.inner_text("#problem") and HOSTILE in page.inner_text("#problem")
    looked_at(page, "bad")
    annotated(page, "good.h5ad", query.read_bytes())
    assert page.is_visible("#result") and not page.is_visible("#problem")
    assert page.title() == "evercell: cell types"


def test_a_job_is_cancelled_on_the_page(view: View, models: Path) -> None:
    with served(models=str(models), jobs=1) as address:  # which has nothing compiled, so that there is time
        page = view(address=address)
        page.set_input_files(
            "#file", {"name": "a.h5ad", "mimeType": "application/octet-stream", "buffer": stored(synthetic_cells(600))}
        )
        page.check("input[value=quick]")
        page.click("#go")
        page.wait_for_selector("#running:visible")
        until(page, "location.hash.length > 1", looks=1200)
        looked_at(page, "running")
        page.click("#cancel")
        page.wait_for_selector("#start:visible")
        assert not page.is_visible("#problem") and page.is_enabled("#go")


def test_two_users_at_once(view: View) -> None:
    pages = [view(), view()]
    for number, page in enumerate(pages):
        content = stored(synthetic_cells(40 + number, seed=3 + number))
        page.set_input_files("#file", {"name": f"{number}.h5ad", "mimeType": "text/plain", "buffer": content})
        page.check("input[value=quick]")
        page.click("#go")
    for number, page in enumerate(pages):
        page.wait_for_selector("#result:visible", timeout=PATIENCE)
        assert page.inner_text("#result-title") == f"{number}.h5ad"
        assert f"{40 + number} cells were annotated" in page.inner_text("#summary")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone(view: View, query: Path, scheme: str) -> None:
    page = view(width=390, scheme=scheme)
    page.wait_for_selector(".model")
    looked_at(page, f"phone-start-{scheme}")
    annotated(
        page, "a name that is much longer than a phone is wide, without_a_break_that_helps.h5ad", query.read_bytes()
    )
    page.wait_for_selector("#legend button")
    page.wait_for_timeout(500)
    looked_at(page, f"phone-result-{scheme}")
    page.tap("#types tr:first-child button")
    page.fill("#new-label", "renamed")
    looked_at(page, f"phone-selected-{scheme}")
    page.press("#new-label", "Enter")
    page.wait_for_selector("#corrections li")
    heights = "[...document.querySelectorAll('button, select')].map((one) => one.offsetHeight)"
    assert min(one for one in page.evaluate(heights) if one) >= 24  # large enough to touch; 0 is not shown


def test_the_token_is_asked_for(view: View, models: Path) -> None:
    with served(models=str(models), jobs=1, token=TOKEN) as address:
        page = view(address=address, scheme="dark")
        page.wait_for_selector("#login:visible")
        looked_at(page, "login")
        page.fill("#token", "wrong")
        page.press("#token", "Enter")
        page.wait_for_selector("#problem:visible")
        assert "not the token" in page.inner_text("#problem")
        page.fill("#token", TOKEN)
        page.press("#token", "Enter")
        page.wait_for_selector("#start:visible")
        assert page.evaluate("document.cookie") == ""
        page.click("#logout")
        page.wait_for_selector("#login:visible")

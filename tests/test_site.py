"""The documentation builds as a site without a warning, is whole, and fetches nothing."""

from __future__ import annotations

import html
import re
import sys
from pathlib import Path

import pytest
from browsing import AXE, CHROMIUM, broken_rules
from pages import PAGES

import evercell

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site; the name of every page leads to its HTML."""
    build = pytest.importorskip("sphinx.cmd.build", reason='pip install ".[docs]"')
    folder = tmp_path_factory.mktemp("site")
    before = list(sys.path)
    warnings = folder / "warnings.txt"
    words = ["-q", "-W", "--keep-going", "-w", str(warnings), "-d", str(folder / "doctrees"), str(DOCS)]
    code = build.build_main([*words, str(folder / "html")])
    sys.path[:] = before
    assert code == 0, warnings.read_text(encoding="utf-8")
    return folder / "html"


def text_of(page: Path) -> str:
    """What a reader sees."""
    return html.unescape(re.sub(r"<[^>]+>", "", page.read_text(encoding="utf-8")))


def test_every_page_is_in_the_table_of_contents(site: Path) -> None:
    sidebar = (site / "index.html").read_text(encoding="utf-8").split('class="sidebar-tree"')[1].split("</aside>")[0]
    linked = {target.removesuffix(".html") for target in re.findall(r'href="([\w/-]+\.html)"', sidebar)}
    pages = {str(path.relative_to(DOCS).with_suffix("")) for path in PAGES.values() if DOCS in path.parents}
    assert pages - {"index"} == linked


def test_the_reference_holds_every_command_and_option(site: Path) -> None:
    from command_line import commands

    text = text_of(site / "cli.html")
    sections = {name: text.split(f"{name}¶")[1].split("¶")[0] for name, _ in commands()}
    assert {"evercell train", "evercell models list", "evercell import celltypist"} <= set(sections)
    for name, command in commands():
        for one in (one for one in command.params if not getattr(one, "hidden", False)):
            for word in (*one.opts, *one.secondary_opts):
                shown = word if word.startswith("-") else (one.metavar or word.upper())
                assert word in ("--help", "-h") or shown in sections[name], f"{name} {shown}"


def test_the_reference_holds_every_public_name(site: Path) -> None:
    text = (site / "api.html").read_text(encoding="utf-8")
    for name in dir(evercell):
        ids = (f'id="evercell.{name}"', f'id="module-evercell.{name}"')
        assert name == "__version__" or any(one in text for one in ids), name


def test_nothing_is_fetched(site: Path) -> None:
    """No script, style, font or picture of another place."""
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert not re.findall(r'<(?:script|img|iframe|source)[^>]+src="(?:https?:)?//[^"]*"', text), page
        assert not re.findall(r'<link[^>]+rel="(?:stylesheet|preconnect|preload)"[^>]+href="(?:https?:)?//', text), page
    for style in site.rglob("*.css"):
        assert not re.findall(r"(?:url\(|@import )['\"]?(?:https?:)?//", style.read_text(encoding="utf-8")), style


def test_pictures_have_words_for_those_who_do_not_see_them(site: Path) -> None:
    found = 0
    for page in site.rglob("*.html"):
        for picture in re.findall(r"<img[^>]*>", page.read_text(encoding="utf-8")):
            alt = re.search(r'alt="([^"]*)"', picture)
            assert alt and len(alt[1]) > 20, f"{page.name}: {picture}"
            found += 1
    assert found
    pictures = [*DOCS.glob("figures/*.png"), *DOCS.glob("figures/*.svg")]
    assert sum(path.stat().st_size for path in pictures) < 1_000_000


@pytest.mark.slow
def test_pages_break_no_rule_of_axe(site: Path) -> None:
    """In Chromium; ``EVERCELL_CHROMIUM`` and ``EVERCELL_AXE`` are those of `browsing`."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs Playwright")
    if CHROMIUM is None or AXE is None:
        pytest.skip("needs Chromium, and axe.min.js in EVERCELL_AXE")
    pages = [site / path.relative_to(DOCS).with_suffix(".html") for path in PAGES.values() if DOCS in path.parents]
    broken = {}
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        for width, scheme in ((1400, "light"), (390, "dark")):
            page = browser.new_page(viewport={"width": width, "height": 844}, color_scheme=scheme)
            for path in pages:
                page.goto(path.as_uri())
                if found := broken_rules(page):
                    broken[path.name, width] = found
        browser.close()
    assert not broken

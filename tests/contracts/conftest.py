"""The examples of the pages on extension points: registered while their contract is tested, and then forgotten."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import pytest
from pages import FILE, blocks

from evercell.backbones import BACKBONES
from evercell.comparison import METHODS
from evercell.rejection import REJECTORS
from evercell.tokenizers import TOKENIZERS
from evercell.updating import STRATEGIES

DOCUMENTED = {
    "test_tokenizers": ("docs/extend/tokenizer.md", TOKENIZERS),
    "test_backbones": ("docs/extend/backbone.md", BACKBONES),
    "test_strategies": ("docs/extend/strategy.md", STRATEGIES),
    "test_rejectors": ("docs/extend/rejector.md", REJECTORS),
    "test_compared_methods": ("docs/extend/method.md", METHODS),
}
"""Contract -> the page with its example, and the registry."""


@contextmanager
def documented(contract: str) -> Iterator[str]:
    """With the example of a page in its registry, as the page registers it; gives its name."""
    page, registry = DOCUMENTED[contract]
    before = dict(registry._classes)
    code = [block.code for block in blocks(page)]
    (file,) = [one for one in code if FILE.match(one)]
    (add,) = re.findall(r"^\w+\.add\(.*\)$", "\n".join(code), flags=re.MULTILINE)
    module = FILE.match(file)["name"].removesuffix(".py")  # type: ignore[index]
    if module not in sys.modules:
        made = ModuleType(module)
        exec(compile(file, page, "exec"), made.__dict__)  # noqa: S102 -- the page's own
        sys.modules[module] = made
    exec(add, {add.partition(".")[0]: registry})  # noqa: S102
    (name,) = set(registry) - set(before)
    try:
        yield name
    finally:
        registry._classes = before
        del sys.modules[module]


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Iterator[None]:
    """Tests are parametrised over the registries when their module is collected."""
    if not isinstance(collector, pytest.Module) or collector.path.stem not in DOCUMENTED:
        return (yield)
    with documented(collector.path.stem):
        return (yield)


@pytest.fixture(scope="module", autouse=True)
def example(request: pytest.FixtureRequest) -> Iterator[None]:
    """The example is there when the tests run, and they run over it."""
    with documented(request.path.stem) as name:
        asked = [one for one in request.config.args if "::" in one] or request.config.option.keyword
        items = [item for item in request.session.items if item.path == request.path]
        assert asked or any(name in item.name for item in items), f"no contract is tested with `{name}`"
        yield

"""The documentation builds without a warning, is complete, and is read without a network."""

import functools
import importlib
import pkgutil
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from sphinx.util.inventory import InventoryFile

import lightning_efficient

pytestmark = pytest.mark.slow

PACKAGES = ["lightning_efficient"] + [
    f"lightning_efficient.{module.name}"
    for module in pkgutil.iter_modules(lightning_efficient.__path__)
    if module.ispkg
]


class Loaded(HTMLParser):
    """Collects what a browser fetches to show a page; links that a reader may follow are not fetched."""

    def __init__(self) -> None:
        super().__init__()
        self.urls: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        wanted = {"link": "href", "script": "src", "img": "src", "iframe": "src", "source": "src", "object": "data"}
        url = dict(attrs).get(wanted.get(tag, ""))
        if url:
            self.urls.append(url)


def test_pages_load_nothing_from_the_network(built_docs: Path) -> None:
    pages = list(built_docs.rglob("*.html"))
    assert len(pages) > 10
    for page in pages:
        loaded = Loaded()
        loaded.feed(page.read_text(encoding="utf-8"))
        assert not [url for url in loaded.urls if re.match(r"(https?:)?//", url)], page
    for sheet in built_docs.rglob("*.css"):
        assert not re.search(r"(url\(|@import)\s*[\"']?(https?:)?//", sheet.read_text(encoding="utf-8")), sheet


def test_formulas_are_in_the_page_itself(built_docs: Path) -> None:
    card = (built_docs / "methods" / "acp_sgd.html").read_text(encoding="utf-8")
    assert '<math xmlns="http://www.w3.org/1998/Math/MathML" display="block">' in card
    assert card.count("<math") > 20
    assert "\\leftarrow" not in card, "a formula was left unconverted"


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_is_in_the_reference(built_docs: Path, package: str) -> None:
    with (built_docs / "objects.inv").open("rb") as file:
        inventory = InventoryFile.load(file, "", lambda base, page: page)
    documented = {name for kind, names in inventory.items() if kind.startswith("py:") for name in names}
    # A name may be exported twice, from its home and from the top; one entry documents both.
    objects = [value for name in documented if (value := _resolve(name)) is not None]
    module = importlib.import_module(package)
    missing = [
        name
        for name in module.__all__
        if not name.startswith("__")
        and f"{package}.{name}" not in documented
        and not any(getattr(module, name) is value for value in objects)
    ]
    assert not missing, f"{package}: {missing} are public and not in docs/reference"


def _resolve(name: str) -> object | None:
    """The object of a dotted name that is a module's own, None for members of classes."""
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute) if module in _modules() else None


@functools.cache
def _modules() -> set[str]:
    found = pkgutil.walk_packages(lightning_efficient.__path__, "lightning_efficient.")
    return {"lightning_efficient", *(module.name for module in found)}

"""The code blocks of README and docs, and what is to be done with each.

A block is run unless an HTML comment right before its fence says otherwise:

    <!-- snippet: skip (why a test cannot run it) -->
    <!-- snippet: file NAME -->         a file that other blocks of the page use; they run, with it in their folder

A `console` block holds commands after `$ ` and what they print, which is compared.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt

ROOT = Path(__file__).resolve().parents[2]

_DIRECTIVE = re.compile(r"<!--\s*snippet:\s*(?P<verb>\w+)\s*(?P<rest>.*?)\s*-->", re.DOTALL)
_RUNNABLE = ("python", "yaml", "bash", "console")
_QUOTED = ("text",)
_MARKUP = re.compile(r"\{(?!code)[\w:-]+\}")


@dataclass(frozen=True)
class Snippet:
    """One block: where it is, its language and text, and what its marker says."""

    page: str
    line: int
    language: str
    text: str
    skip: str = ""
    file: str = ""

    @property
    def where(self) -> str:
        """`page:line` of the block's fence."""
        return f"{self.page}:{self.line}"


def pages() -> list[Path]:
    """Return every hand-written page whose blocks are run; pages of figures hold tables and quoted output."""
    written = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return [page for page in written if not {"_build", "benchmarks"} & set(page.relative_to(ROOT).parts)]


def read_snippets(text: str, page: str) -> list[Snippet]:
    """Return the runnable blocks of a page.

    Raises:
        ValueError: a marker is not understood, a skip gives no reason, or a block has a language nobody can check.
    """
    tokens = MarkdownIt("commonmark").parse(text)
    snippets = []
    for before, token in zip([None, *tokens], tokens, strict=False):
        marker = _DIRECTIVE.search(before.content) if before is not None and before.type == "html_block" else None
        if token.type != "fence":
            if marker:
                raise ValueError(
                    f"{page}: the marker {marker[0]!r} stands before no block. Put it right before a fence."
                )
            continue
        assert token.map is not None
        where, language = f"{page}:{token.map[0] + 1}", token.info.strip()
        if language in _QUOTED or _MARKUP.match(language):
            continue
        if language not in _RUNNABLE:
            raise ValueError(f"{where}: nobody can check a block of {language!r}. Use {_RUNNABLE} or {_QUOTED}.")
        snippets.append(Snippet(page, token.map[0] + 1, language, token.content, **_settings(marker, where)))
    return snippets


def _settings(marker: re.Match[str] | None, where: str) -> dict[str, str]:
    if marker is None:
        return {}
    verb, rest = marker["verb"], marker["rest"]
    if verb == "skip":
        reason = re.fullmatch(r"\((.{10,})\)", rest, re.DOTALL)
        if not reason:
            raise ValueError(f"{where}: skip needs a reason: <!-- snippet: skip (why a test cannot run it) -->")
        return {"skip": " ".join(reason[1].split())}
    if verb == "file" and re.fullmatch(r"[\w.-]+", rest):
        return {"file": rest}
    raise ValueError(f"{where}: the marker 'snippet: {verb} {rest}' is none of skip (reason), file NAME.")


def all_snippets() -> list[Snippet]:
    """Return the runnable blocks of all pages, in order."""
    return [
        snippet
        for page in pages()
        for snippet in read_snippets(page.read_text(encoding="utf-8"), page.relative_to(ROOT).as_posix())
    ]

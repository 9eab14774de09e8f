"""One page in one file: style and script are inside, so it opens from a disk, by mail, and without a network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files

from lightning_efficient.dissect.report.tables import Table


@dataclass(frozen=True, slots=True)
class Section:
    """A part of a page.

    Attributes:
        title: its heading.
        text: paragraphs of plain text, an empty line between them.
        charts: SVG elements, of :mod:`lightning_efficient.dissect.report.svg`.
        tables: below the charts.
        children: sections inside it.
        collapsed: whether only the heading shows until the reader opens it.
    """

    title: str
    text: str = ""
    charts: Sequence[str] = ()
    tables: Sequence[Table] = ()
    children: Sequence[Section] = ()
    collapsed: bool = False


def page(title: str, lead: Sequence[str], sections: Sequence[Section]) -> str:
    """Return a self-contained page.

    Args:
        title: of the page.
        lead: the sentences that a hurried reader reads, most important first.
        sections: what they rest on.

    Returns:
        HTML with its style and its script; it loads nothing.
    """
    folder = files("lightning_efficient.dissect.report")
    style = folder.joinpath("page.css").read_text(encoding="utf-8")
    script = folder.joinpath("page.js").read_text(encoding="utf-8")
    sentences = "\n".join(f"<li>{escape(sentence)}</li>" for sentence in lead)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        '<link rel="icon" href="data:,">\n'  # or browsers ask for /favicon.ico
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>{escape(title)}</h1>\n"
        + (f'<ul class="lead">\n{sentences}\n</ul>\n' if lead else "")
        + "\n".join(_section(section, 2) for section in sections)
        + f"\n</main>\n<script>\n{script}</script>\n</body>\n</html>\n"
    )


def markdown(title: str, lead: Sequence[str], sections: Sequence[Section]) -> str:
    """Return the same as Markdown, without the charts."""
    parts = [f"# {title}\n", *(f"- {sentence}" for sentence in lead)]
    parts += [_markdown_section(section, 2) for section in sections]
    return "\n".join(parts).rstrip() + "\n"


def _section(section: Section, level: int) -> str:
    figures = [f'<figure tabindex="0">{chart}</figure>' for chart in section.charts]
    inner = "\n".join(
        [
            *(f"<p>{escape(part)}</p>" for part in section.text.split("\n\n") if part),
            *(['<div class="figures">', *figures, "</div>"] if figures else []),
            *(table.html() for table in section.tables),
            *(_section(child, min(level + 1, 6)) for child in section.children),
        ]
    )
    if section.collapsed:
        return f"<details>\n<summary>{escape(section.title)}</summary>\n{inner}\n</details>"
    return f"<section>\n<h{level}>{escape(section.title)}</h{level}>\n{inner}\n</section>"


def _markdown_section(section: Section, level: int) -> str:
    parts = [f"\n{'#' * min(level, 6)} {section.title}\n"]
    parts += [f"{section.text}\n"] if section.text else []
    parts += [f"{table.markdown()}" for table in section.tables]
    parts += [_markdown_section(child, level + 1) for child in section.children]
    return "\n".join(parts)

"""The HTML of a report: one file that needs no network, in the reader's light or dark colours.

Whatever comes from data is escaped here; functions take plain text and return HTML.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from html import escape
from importlib.resources import files
from typing import Any

from tracer.report.payload import embedded

SCRIPTS = ("data.js", "inputs.js", "suspects.js", "targets.js", "main.js")
"""The page's scripts, in the order in which they depend on each other."""


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        anchor: Its id, for links.
        heading: Its title, plain text.
        body: Its HTML.
    """

    anchor: str
    heading: str
    body: str


@cache
def asset(name: str) -> str:
    """Return a style sheet or a script of this package."""
    return files("tracer.report").joinpath("assets", name).read_text(encoding="utf-8")


def paragraph(text: str, css_class: str = "") -> str:
    """Return a paragraph of plain text."""
    attribute = f' class="{css_class}"' if css_class else ""
    return f"<p{attribute}>{escape(text)}</p>"


def table(caption: str, header: Sequence[str], rows: Sequence[Sequence[object]], numeric: Sequence[int] = ()) -> str:
    """Return a table.

    Args:
        caption: What it shows; empty for none.
        header: The columns' names.
        rows: The cells: anything that ``str`` makes readable; the first of a row is its heading.
        numeric: Which columns are set flush right.

    Returns:
        HTML, scrolling sideways where the window is narrow.
    """

    def cell(tag: str, column: int, value: object) -> str:
        name = ' class="number"' if column in numeric else ""
        scope = ' scope="col"' if tag == "th" else ""
        if tag == "td" and column == 0:
            tag, scope = "th", ' scope="row"'
        return f"<{tag}{scope}{name}>{escape(str(value))}</{tag}>"

    def line(tag: str, values: Sequence[object]) -> str:
        return "<tr>" + "".join(cell(tag, column, value) for column, value in enumerate(values)) + "</tr>"

    title = f"<caption>{escape(caption)}</caption>" if caption else ""
    body = "".join(line("td", row) for row in rows)
    return (
        f'<div class="scroll" tabindex="0" role="group" aria-label="{escape(caption or "Table")}"><table>{title}'
        f"<thead>{line('th', header)}</thead><tbody>{body}</tbody></table></div>"
    )


def subheading(text: str) -> str:
    """Return a heading within a section."""
    return f"<h3>{escape(text)}</h3>"


def side_by_side(*blocks: str, narrow: bool = False) -> str:
    """Return blocks beside each other where there is room: two, or three narrow ones."""
    return (
        f'<div class="pair{" narrow" if narrow else ""}">'
        + "".join(f"<div>{block}</div>" for block in blocks)
        + "</div>"
    )


def folded(summary: str, body: str) -> str:
    """Return HTML that opens on a click."""
    return f"<details><summary>{escape(summary)}</summary>{body}</details>"


def figure(svg: str, caption: str) -> str:
    """Return a chart with a line below it."""
    return f'<figure><div class="scroll-chart">{svg}</div><figcaption>{escape(caption)}</figcaption></figure>'


def tiles(values: Sequence[tuple[str, str]]) -> str:
    """Return a row of key figures, each a number and what it counts."""
    items = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in values)
    return f'<dl class="tiles">{items}</dl>'


def legend(entries: Sequence[tuple[str, str]]) -> str:
    """Return the legend of a chart: a CSS class and a name for each entry."""
    items = "".join(f'<li><span class="key {css}"></span>{escape(name)}</li>' for css, name in entries)
    return f'<ul class="legend">{items}</ul>'


def page(title: str, summary: str, sections: Sequence[Section], data: Any) -> str:
    """Return the whole page.

    Args:
        title: Plain text.
        summary: One paragraph below the title, plain text.
        sections: The parts, in order.
        data: What the scripts work on, JSON values.

    Returns:
        An HTML document.
    """
    links = "".join(f'<li><a href="#{part.anchor}">{escape(part.heading)}</a></li>' for part in sections)
    cards = "\n".join(
        f'<section id="{part.anchor}" class="card" aria-labelledby="{part.anchor}-heading">'
        f'<h2 id="{part.anchor}-heading">{escape(part.heading)}</h2>\n{part.body}</section>'
        for part in sections
    )
    scripts = "\n".join(asset(name) for name in SCRIPTS)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; \
script-src 'unsafe-inline'; img-src data:">
<link rel="icon" href="data:,">
<title>{escape(title)}</title>
<style>{asset("report.css")}</style>
</head>
<body>
<a class="skip" href="#main">Skip to the report</a>
<header><div class="wide"><p class="brand" aria-hidden="true">tracer</p><h1>{escape(title)}</h1>
{paragraph(summary, "lead")}</div></header>
<nav aria-label="Contents"><div class="wide"><ul>{links}</ul></div></nav>
<main id="main" class="wide" tabindex="-1">
<noscript><p class="card">Scripts are off, so the tables of suspects and targets stay empty. The files beside this \
page hold the same.</p></noscript>
{cards}
</main>
<footer class="wide"><p>Written by tracer. Positive scores are proponents: training on the row helped the \
target.</p></footer>
<script type="application/json" id="report-data">{embedded(data)}</script>
<script>{scripts}</script>
</body>
</html>
"""

"""The HTML of a report: one file that needs no network, in the reader's light or dark colours.

Whatever comes from data is escaped here; functions take plain text and return HTML.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from tracer.report.figures import DPI, Picture

STYLE = """
:root { color-scheme: light dark; --page: #f3f5f8; --card: #ffffff; --text: #17202b; --muted: #5c6776;
  --line: #dfe4ea; --main: #0b63c4; --alert: #c4420c; }
@media (prefers-color-scheme: dark) { :root { --page: #0f1319; --card: #171c24; --text: #e7ebf1; --muted: #9da8b7;
  --line: #2b333f; --main: #69b1ff; --alert: #ff935c; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
header, main, footer { max-width: 1060px; margin: 0 auto; padding: 0 20px; }
header { padding-top: 36px; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .4rem; letter-spacing: -.01em; }
h2 { font-size: 1.3rem; line-height: 1.3; margin: 0 0 .5rem; }
h3 { font-size: 1.02rem; margin: 1.4rem 0 .4rem; }
p { margin: 0 0 .9rem; max-width: 74ch; }
a { color: var(--main); }
nav ul { display: flex; flex-wrap: wrap; gap: .3rem 1.4rem; list-style: none; margin: .8rem 0 0; padding: 0; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 24px 28px;
  margin: 22px 0; }
figure { margin: 1rem 0; }
figure img { display: block; max-width: 100%; height: auto; }
figcaption, caption, .note { color: var(--muted); font-size: .9rem; }
figcaption { margin-top: .5rem; max-width: 80ch; }
caption { text-align: left; padding-bottom: .35rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .92rem; margin: .6rem 0 1rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: .32rem 1.1rem .32rem 0; border-bottom: 1px solid var(--line);
  overflow-wrap: break-word; }
th { font-weight: 600; white-space: nowrap; }
td:not(.number) { min-width: 7em; }
.number { text-align: right; white-space: nowrap; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); gap: 0 2.2rem; }
.pair table { width: 100%; }
.alert { color: var(--alert); font-weight: 600; }
details { margin: .6rem 0; }
summary { cursor: pointer; color: var(--main); }
footer { color: var(--muted); font-size: .88rem; padding-bottom: 40px; }
@media (max-width: 620px) { section { padding: 18px 16px; } h1 { font-size: 1.5rem; } }
"""

FOOTER = "Written by tracer. The whole ranking is in self_influence.csv beside this page."

CARD_WIDTH = 1000
"""No figure is shown wider, in CSS pixels."""


@dataclass(frozen=True)
class Flag:
    """A table cell that is written in the strong colour."""

    text: str


@dataclass(frozen=True)
class Section:
    """A card of the page.

    Attributes:
        anchor: Its id, for links.
        heading: Its title, plain text.
        body: Its HTML.
    """

    anchor: str
    heading: str
    body: str


def paragraph(text: str, css_class: str = "") -> str:
    """Return a paragraph of plain text."""
    attribute = f' class="{css_class}"' if css_class else ""
    return f"<p{attribute}>{escape(text)}</p>"


def table(caption: str, header: Sequence[str], rows: Sequence[Sequence[object]], numeric: Sequence[int] = ()) -> str:
    """Return a table whose first cell of a row is not special.

    Args:
        caption: What it shows; empty for none.
        header: The columns' names.
        rows: The cells: anything that ``str`` makes readable, or `Flag`.
        numeric: Which columns are set flush right.

    Returns:
        HTML, scrolling sideways where the window is narrow.
    """

    def cell(tag: str, column: int, value: object) -> str:
        names = (["number"] if column in numeric else []) + (["alert"] if isinstance(value, Flag) else [])
        attribute = f' class="{" ".join(names)}"' if names else ""
        scope = ' scope="col"' if tag == "th" else ""
        return f"<{tag}{scope}{attribute}>{escape(value.text if isinstance(value, Flag) else str(value))}</{tag}>"

    def line(tag: str, values: Sequence[object]) -> str:
        return "<tr>" + "".join(cell(tag, column, value) for column, value in enumerate(values)) + "</tr>"

    title = f"<caption>{escape(caption)}</caption>" if caption else ""
    body = "".join(line("td", row) for row in rows)
    return f'<div class="scroll"><table>{title}<thead>{line("th", header)}</thead><tbody>{body}</tbody></table></div>'


def subheading(anchor: str, text: str) -> str:
    """Return a heading within a section."""
    return f'<h3 id="{anchor}">{escape(text)}</h3>'


def side_by_side(*blocks: str) -> str:
    """Return blocks beside each other where there is room."""
    return '<div class="pair">' + "".join(f"<div>{block}</div>" for block in blocks) + "</div>"


def folded(summary: str, body: str) -> str:
    """Return HTML that opens on a click."""
    return f"<details><summary>{escape(summary)}</summary>{body}</details>"


def figure(picture: Picture, alt: str, caption: str) -> str:
    """Return a figure whose two PNG files lie inside the page.

    Args:
        picture: The figure in both themes.
        alt: What a reader who does not see it needs to know.
        caption: The line below it.

    Returns:
        HTML.
    """
    width = min(CARD_WIDTH, round(_png_width(picture.light) * 120 / DPI))
    return (
        f'<figure><picture><source media="(prefers-color-scheme: dark)" srcset="{_data_uri(picture.dark)}">'
        f'<img src="{_data_uri(picture.light)}" alt="{escape(alt)}" style="width: {width}px"></picture>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def page(title: str, summary: str, sections: Sequence[Section]) -> str:
    """Return the whole page.

    Args:
        title: Plain text.
        summary: One paragraph below the title, plain text.
        sections: The cards, in order.

    Returns:
        An HTML document.
    """
    links = "".join(f'<li><a href="#{part.anchor}">{escape(part.heading)}</a></li>' for part in sections)
    cards = "\n".join(
        f'<section id="{part.anchor}" aria-labelledby="{part.anchor}-heading">'
        f'<h2 id="{part.anchor}-heading">{escape(part.heading)}</h2>\n{part.body}</section>'
        for part in sections
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<header><h1>{escape(title)}</h1>{paragraph(summary)}<nav aria-label="Contents"><ul>{links}</ul></nav></header>
<main>
{cards}
</main>
<footer>{paragraph(FOOTER)}</footer>
</body>
</html>
"""


def _data_uri(png: bytes) -> str:
    """Return PNG bytes as an address that needs no file."""
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def _png_width(png: bytes) -> int:
    """Return the width in pixels, from the header's first chunk."""
    return int.from_bytes(png[16:20], "big")

"""Figures as lists of marks in pixels, y down: charts.py and montage.py draw them once, for the page and for slides.

templates/macros.html writes a `Figure` as SVG and png.py as a PNG file. Colors are names of CSS variables in
assets/report.css, so figures in the page follow light and dark mode.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np

FONT_SIZE = 12.0

Point = tuple[float, float]
Size = tuple[int, int]

PAGE: Size = (352, 216)
"""Width and height of a chart in the page: text keeps its size on a phone and in three columns on a desktop."""

SLIDE: Size = (640, 320)
"""Width and height of a chart as a PNG file, before `png.SCALE`."""


@dataclass(frozen=True)
class Rect:
    """A filled rectangle, with a tooltip in the page if it has a title."""

    x: float
    y: float
    width: float
    height: float
    color: str
    opacity: float = 1.0
    title: str = ""
    kind: ClassVar[str] = "rect"


@dataclass(frozen=True)
class Line:
    """A line through points or, if ``closed``, the outline of a polygon; ``filled`` polygons have no outline."""

    points: Sequence[Point]
    color: str
    width: float = 1.0
    dash: tuple[float, ...] = ()
    title: str = ""
    closed: bool = False
    filled: bool = False
    kind: ClassVar[str] = "line"


@dataclass(frozen=True)
class Text:
    """A text on the baseline y, anchored at its ``start``, ``middle`` or ``end``; ``turned`` reads upwards."""

    x: float
    y: float
    text: str
    color: str = "muted"
    anchor: str = "start"
    size: float = FONT_SIZE
    bold: bool = False
    turned: bool = False
    kind: ClassVar[str] = "text"


@dataclass(frozen=True)
class Picture:
    """An image ``[H, W]`` or ``[H, W, C]`` between 0 and 1; only in PNG files, since the page has thumbnails."""

    x: float
    y: float
    width: float
    height: float
    pixels: np.ndarray
    kind: ClassVar[str] = "picture"


Mark = Rect | Line | Text | Picture


@dataclass
class Figure:
    """A figure.

    Attributes:
        width: In pixels.
        height: In pixels.
        description: Its content for readers who do not see it.
        marks: In drawing order.
        caption: The line below it in the page.
        title: The heading above it in the page.
        min_width: If positive, the page scrolls sideways rather than shrink the figure below this width.
    """

    width: float
    height: float
    description: str = ""
    marks: list[Mark] = field(default_factory=list)
    caption: str = ""
    title: str = ""
    min_width: int = 0


def text_width(text: str, size: float = FONT_SIZE) -> float:
    """Return about how wide a text will be; fonts differ, so leave some room."""
    return 0.56 * size * len(text)


def moved(marks: Iterable[Mark], right: float, down: float) -> list[Mark]:
    """Return marks that are moved."""
    found: list[Mark] = []
    for mark in marks:
        if isinstance(mark, Line):
            found.append(replace(mark, points=[(x + right, y + down) for x, y in mark.points]))
        else:
            found.append(replace(mark, x=mark.x + right, y=mark.y + down))
    return found

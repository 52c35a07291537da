"""Figures as lists of marks in pixels, y down: charts.py draws them once, for the page and for slides.

templates/macros.html writes a `Figure` as SVG and png.py as a PNG file. Colors are names of CSS variables in
assets/report.css, so figures in the page follow light and dark mode.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np

FONT_SIZE = 12.0

Point = tuple[float, float]
Size = tuple[int, int]

PAGE: Size = (352, 216)
"""The size of a chart in the page, at which it fits on a phone and in three columns on a desktop."""

SLIDE: Size = (640, 320)  # the size of a chart as a PNG file, before `png.SCALE`


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
    """A line through points, back to the first of them if ``closed``."""

    points: Sequence[Point]
    color: str
    width: float = 1.0
    dash: tuple[float, ...] = ()
    title: str = ""
    closed: bool = False
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
    """Marks in drawing order, with the figure's heading and caption in the page."""

    width: float
    height: float
    description: str = ""  # for readers who do not see the figure
    marks: list[Mark] = field(default_factory=list)
    caption: str = ""
    title: str = ""
    min_width: int = 0  # on narrower screens the figure scrolls sideways

    def below(self, title: str) -> Figure:
        """Return a figure with a title above these marks."""
        size, room = 16.0, 32.0
        width = max(self.width, text_width(title) * size / FONT_SIZE)
        titled = Figure(
            width, self.height + room, self.description, [Text(0, size, title, "text", size=size, bold=True)]
        )
        titled.add(self, 0, room)
        return titled

    def add(self, other: Figure, right: float, down: float) -> None:
        """Add the marks of another figure at this place."""
        for mark in other.marks:
            if isinstance(mark, Line):
                self.marks.append(replace(mark, points=[(x + right, y + down) for x, y in mark.points]))
            else:
                self.marks.append(replace(mark, x=mark.x + right, y=mark.y + down))


def text_width(text: str) -> float:
    """Return about how wide a text will be; fonts differ, so this leaves some room."""
    return FONT_SIZE * sum(
        0.96 if char in "%−+→" or ord(char) >= 0x2E80 else 0.68 if char.isupper() or char.isdigit() else 0.58
        for char in text
    )

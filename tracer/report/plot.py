"""A chart with axes: data to pixels, ticks that do not overlap, grid lines and a legend."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tracer.report.figure import FONT_SIZE, Figure, Line, Point, Rect, Size, Text, text_width

MARGIN = 10.0
LINE_HEIGHT = 18.0
KEY_WIDTH = 22.0


@dataclass(frozen=True)
class Axis:
    """One axis: its range, its ticks as (value, text) by priority, and its name."""

    low: float
    high: float
    ticks: Sequence[tuple[float, str]]
    name: str = ""


@dataclass(frozen=True)
class Key:
    """An entry of a legend: a line, or a swatch if ``width`` is 0."""

    name: str
    color: str
    width: float = 0.0
    dash: tuple[float, ...] = ()


class Plot:
    """A figure with a legend and axes, to which bars and lines are added in data units."""

    def __init__(self, size: Size, x: Axis, y: Axis, legend: Sequence[Key] = ()) -> None:
        self.figure = Figure(*size)
        self._x, self._y = x, y
        keys = legend_figure(legend, self.figure.width)
        self.figure.marks += keys.marks
        top = keys.height
        if y.name:
            self.figure.marks.append(Text(0, top + FONT_SIZE, y.name))
            top += LINE_HEIGHT
        self._left = 6 + max(text_width(text) for _, text in y.ticks)
        self._right = self.figure.width - MARGIN
        self._top, self._bottom = top + MARGIN, self.figure.height - 2 * LINE_HEIGHT - 4
        baseline = self._bottom + LINE_HEIGHT
        for value, text in y.ticks:
            level = self.point(x.low, value)[1]
            self.figure.marks.append(Line([(self._left, level), (self._right, level)], "line"))
            self.figure.marks.append(Text(self._left - 6, level + 4, text, anchor="end"))
        self.figure.marks.append(Line([(self._left, self._bottom), (self._right, self._bottom)], "line"))
        taken: list[tuple[float, float]] = []
        for value, text in x.ticks:
            half, at = text_width(text) / 2, self.point(value, y.low)[0]
            self.figure.marks.append(Line([(at, self._bottom), (at, self._bottom + 4)], "line"))
            middle = min(max(at, half), self.figure.width - half)  # numbers at the edges stay inside the figure
            if all(middle + half + 6 < low or high + 6 < middle - half for low, high in taken):  # none over another
                taken.append((middle - half, middle + half))
                self.figure.marks.append(Text(middle, baseline, text, anchor="middle"))
        middle = (self._left + self._right) / 2
        self.figure.marks.append(Text(middle, baseline + LINE_HEIGHT, x.name, anchor="middle"))

    def point(self, x: float, y: float) -> Point:
        """Return the pixels of a point."""
        across, up = (
            (value - axis.low) / ((axis.high - axis.low) or 1.0) for value, axis in ((x, self._x), (y, self._y))
        )
        right, down = across * (self._right - self._left), up * (self._top - self._bottom)
        return float(self._left + right), float(self._bottom + down)

    def bar(self, low: float, high: float, height: float, color: str, title: str) -> None:
        """Draw a bar from the x-axis up; heights of zero draw nothing."""
        if height <= 0:
            return
        left, top = self.point(low, height)
        right, bottom = self.point(high, self._y.low)
        width = max(0.5, right - left - 0.6)
        self.figure.marks.append(Rect(left + 0.3, top, width, bottom - top, color, 0.62, title))

    def line(self, points: Sequence[Point], key: Key) -> None:
        """Draw a line in the style of a legend entry; points outside the axes are left out."""
        across, up = self._x, self._y
        inside = [self.point(x, y) for x, y in points if across.low <= x <= across.high and up.low <= y <= up.high]
        if len(inside) > 1:
            self.figure.marks.append(Line(inside, key.color, key.width, key.dash, key.name))

    def vertical(self, x: float, color: str) -> None:
        """Draw a dashed line over the whole height."""
        at = self.point(x, 0.0)[0]
        self.figure.marks.append(Line([(at, self._top), (at, self._bottom)], color, 1.6, (5, 4)))


def legend_figure(keys: Sequence[Key], width: float) -> Figure:
    """Draw a legend from left to right, on as many lines as it needs."""
    figure = Figure(width, LINE_HEIGHT if keys else 0.0, "Legend: " + ", ".join(key.name for key in keys))
    x, y = 0.0, 0.0
    for key in keys:
        needed = KEY_WIDTH + 6 + text_width(key.name)
        if x and x + needed > width:
            x, y = 0.0, y + LINE_HEIGHT
        if key.width:
            figure.marks.append(Line([(x, y + 8), (x + KEY_WIDTH, y + 8)], key.color, key.width, key.dash))
        else:
            figure.marks.append(Rect(x, y + 3, KEY_WIDTH, 9, key.color, 0.75))
        figure.marks.append(Text(x + KEY_WIDTH + 6, y + FONT_SIZE, key.name))
        x += needed + 4
        figure.height = y + LINE_HEIGHT
    return figure


def round_ticks(low: float, high: float, count: int) -> list[float]:
    """Return about ``count`` round numbers between two bounds.

    >>> round_ticks(-1.0, 9.0, 4)
    [0.0, 2.5, 5.0, 7.5]
    """
    rough = (high - low) / max(1, count) or 1.0
    power = 10.0 ** np.floor(np.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    # adding zero turns -0.0 into 0.0
    first, last = np.ceil(low / step - 1e-9), np.floor(high / step + 1e-9)
    return [float(value) for value in np.arange(first, last + 1) * step + 0.0]


def log_ticks(low: float, high: float) -> list[float]:
    """Return powers of ten between two bounds, with 2 and 5 times these if there are few.

    >>> log_ticks(0.5, 60.0)
    [0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0]
    """
    powers = np.arange(np.floor(np.log10(low)), np.floor(np.log10(high)) + 1)
    factors = (1.0, 2.0, 5.0) if len(powers) <= 3 else (1.0,)
    found = [float(f"{factor * 10.0**power:.3g}") for power in powers for factor in factors]
    found = [value for value in found if low <= value <= high]
    if len(found) < 2:
        return [float(value) for value in np.geomspace(low, high, 4)]
    return found[:: -(-len(found) // 8)]

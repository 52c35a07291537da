"""A chart of one number with an interval for each of several methods, such as their LDS."""

from __future__ import annotations

from collections.abc import Sequence

from tracer.report.figure import FONT_SIZE, Figure, Line, Rect, Text, text_width

_ROW = 30.0
_BAR = 16.0
_AXIS = 300.0


def method_chart(title: str, names: Sequence[str], values: Sequence[tuple[float, float, float]]) -> Figure:
    """Return horizontal bars from 0 with their intervals; ``values`` are mean, lower and upper end of each method."""
    left = 8 + max(text_width(name) for name in names)
    low = min(0.0, *(min(mean, below) for mean, below, _ in values))
    high = max(0.01, *(max(mean, above) for mean, _, above in values))
    top = 2 * FONT_SIZE + 6
    figure = Figure(left + _AXIS + 64, top + _ROW * len(names), description=title)

    def across(value: float) -> float:
        return left + _AXIS * (value - low) / (high - low)

    figure.marks.append(Text(0, FONT_SIZE + 2, title, color="text", bold=True))
    for row, (name, (mean, below, above)) in enumerate(zip(names, values, strict=True)):
        middle = top + _ROW * (row + 0.5)
        start, stop = sorted((across(0.0), across(mean)))
        figure.marks += [
            Text(left - 8, middle + 4, name, color="text", anchor="end"),
            Rect(start, middle - _BAR / 2, stop - start, _BAR, "pos" if mean >= 0 else "neg"),
            Text(left + _AXIS + 10, middle + 4, f"{mean:.3f}", color="text"),
        ]
        if below == below and above == above:  # not NaN, as without resamples
            ends = across(below), across(above)
            figure.marks.append(Line([(ends[0], middle), (ends[1], middle)], "text", 2.0))
            figure.marks += [Line([(end, middle - 5), (end, middle + 5)], "text", 2.0) for end in ends]
    zero = across(0.0)
    figure.marks.append(Line([(zero, top), (zero, figure.height)], "muted"))
    return figure

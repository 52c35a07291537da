"""Charts at sizes at which they can be read: the zoomed curves, maps of few classes, titles of image files."""

from __future__ import annotations

import numpy as np
import pytest

from tracer.report.charts import class_map, recovery_chart
from tracer.report.figure import Figure, Line, Text, text_width

RNG = np.random.default_rng(0)


def test_the_enlarged_curves_fill_the_height_where_rankings_differ():
    known = np.arange(400) % 10 == 0
    rankings = {"one": known * 0.4 + RNG.random(400), "two": known * 0.4 + RNG.random(400)}
    figure = recovery_chart(rankings, known, enlarged=True)
    curves = [mark for mark in figure.marks if isinstance(mark, Line) and mark.title in rankings]
    levels = np.concatenate([[y for _, y in curve.points] for curve in curves])
    axis = [y for mark in figure.marks if isinstance(mark, Line) and mark.color == "line" for _, y in mark.points]
    assert len(curves) == 2
    assert np.ptp(levels) > 0.6 * (max(axis) - min(axis))


@pytest.mark.parametrize("count", [2, 3, 10])
def test_the_axis_names_of_a_map_fit_beside_it_and_a_small_map_is_not_enlarged(count):
    figure = class_map(RNG.normal(size=(count, count)), [str(each) for each in range(count)], np.arange(count))
    (name,) = (mark for mark in figure.marks if isinstance(mark, Text) and mark.text == "training examples of class")
    assert name.y - text_width(name.text) / 2 >= 0
    assert name.y + text_width(name.text) / 2 <= figure.height
    assert figure.min_width <= figure.width


def test_a_title_is_above_the_marks():
    titled = Figure(100, 50, marks=[Text(0, 10, "mark")]).below("A title that is wider than the figure")
    assert [mark.text for mark in titled.marks] == ["A title that is wider than the figure", "mark"]
    assert titled.marks[0].y < titled.marks[1].y - 20
    assert titled.width > 200

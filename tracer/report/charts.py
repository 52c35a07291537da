"""The figures of a report: distributions, recovery of mislabelled examples, mean scores by class, montages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from tracer.report.figure import FONT_SIZE, PAGE, Figure, Line, Mark, Picture, Point, Rect, Size, Text, text_width
from tracer.report.health import recovery_curve
from tracer.report.plot import Axis, Key, Plot, legend_figure, log_ticks, round_ticks
from tracer.report.samples import Samples
from tracer.report.text import number, shortened
from tracer.types import TopK

NUM_BINS = 44
DECADES = 8  # self-influence that is smaller than the greatest by more powers of ten is drawn at the left edge
MAX_CURVE_POINTS = 400
MAX_NAME = 40

MAX_MAP_CLASSES = 40
"""With more classes, those with the most training examples are on the map; class_influence.csv has all."""

MAP_NUMBERS = 12  # with more classes the cells of the map hold no numbers
BEST, CHANCE = Key("best possible", "muted", 1.3, (6, 5)), Key("chance", "muted", 1.6, (1.5, 4))
_DASHES: tuple[tuple[float, ...], ...] = ((), (7, 3), (2, 3), (9, 3, 2, 3))
TILE, PITCH, WIDE_PITCH, TILE_HEIGHT = 64.0, 71.0, 88.0, 104.0
GAP = 25.0  # space between the columns of targets, proponents and opponents
MAX_TILES = 5  # more proponents or opponents of a target would be too small to see; the page and the CSV file list all


def histogram(groups: Mapping[str, np.ndarray], name: str, share_of: str, size: Size = PAGE) -> Figure:
    """Draw overlaid histograms of one or two groups; the bars of each group add up to 100 %."""
    edges, logarithmic = bins(np.concatenate(list(groups.values())))
    shares = {
        group: np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0] * 100.0 / max(1, len(values))
        for group, values in groups.items()
    }

    def place(value: float) -> float:
        return float(np.log(value)) if logarithmic else value

    ticks = log_ticks(edges[0], edges[-1]) if logarithmic else round_ticks(edges[0], edges[-1], size[0] // 90)
    x = Axis(place(edges[0]), place(edges[-1]), [(place(tick), number(tick)) for tick in ticks], name)
    colors = dict(zip(groups, ("pos", "neg"), strict=False))
    legend = [Key(f"{group} ({len(values):,})", colors[group]) for group, values in groups.items()]
    plot = Plot(size, x, _percent_axis(max(share.max() for share in shares.values()), share_of), legend)
    for group, values in groups.items():
        for low, high, share in zip(edges[:-1], edges[1:], shares[group], strict=True):
            title = f"{group}: {share:.2f} % from {number(low)} to {number(high)}"
            plot.bar(place(low), place(high), share, colors[group], title)
        if len(values):
            plot.vertical(place(float(np.clip(np.median(values), edges[0], edges[-1]))), colors[group])
    medians = ", ".join(f"{group} {number(float(np.median(v)))}" for group, v in groups.items() if len(v))
    plot.figure.description = f"Histogram of {name}. Medians: {medians}."
    return plot.figure


def bins(values: np.ndarray) -> tuple[np.ndarray, bool]:
    """Return bin edges, and whether they are logarithmic: if no value is negative and not all are zero."""
    low, high = float(values.min()), float(values.max())
    if low < 0 or high <= 0:
        edges = np.linspace(low, high, NUM_BINS + 1) if high > low else np.array([low - 0.5, low + 0.5])
        return edges, False
    low = max(float(values[values > 0].min()), high * 10.0**-DECADES)
    if high < 1.01 * low:
        low, high = low / 2, high * 2
    return np.geomspace(low, high, NUM_BINS + 1), True


def signed_histogram(edges: np.ndarray, counts: np.ndarray, size: Size = PAGE) -> Figure:
    """Draw the bins of a `ScoreSummary`, logarithmic on both sides of a narrow bin around zero."""
    share = counts * 100.0 / max(1, int(counts.sum()))
    middle = len(counts) // 2
    reach = int(np.abs(np.flatnonzero(counts) - middle).max(initial=1))
    first, last = max(0, middle - reach), min(len(counts) - 1, middle + reach)
    wanted = np.unique(np.linspace(first, last + 1, 5 if size[0] < 500 else 9).round().astype(int)).tolist()
    ticks = [(middle + 0.5, "0")]
    ticks += [(edge, number(float(edges[edge]))) for edge in wanted if edge not in (middle, middle + 1)]
    plot = Plot(
        size,
        Axis(first, last + 1, ticks, "score (logarithmic on both sides of 0)"),
        _percent_axis(share.max(), "% of scores"),
        [Key("positive", "pos"), Key("negative", "neg")],
    )
    for place in range(first, last + 1):
        color = "pos" if place > middle else "neg" if place < middle else "muted"
        title = f"{share[place]:.2f} % from {number(edges[place])} to {number(edges[place + 1])}"
        plot.bar(place, place + 1, share[place], color, title)
    plot.figure.description = f"Histogram of scores. {share[middle + 1 :].sum():.0f} % are above the middle bin."
    return plot.figure


def recovery_slide(rankings: Mapping[str, np.ndarray], known: np.ndarray) -> Figure:
    """Draw both views of `recovery_chart` side by side, with one legend above them."""
    parts = [recovery_chart(rankings, known, (420, 320), enlarged, legend=False) for enlarged in (False, True)]
    legend = legend_figure(recovery_keys(list(rankings)), 860)
    joined = Figure(860, legend.height + 346, parts[0].description, legend.marks)
    for left, part in zip((0, 440), parts, strict=True):
        joined.marks.append(Text(left + 420, legend.height + 10 + FONT_SIZE, part.title, anchor="end"))
        joined.add(part, left, legend.height + 10)
    return joined


def recovery_chart(
    rankings: Mapping[str, np.ndarray],
    known: np.ndarray,
    size: Size = (420, 260),
    enlarged: bool = False,
    legend: bool = True,
) -> Figure:
    """Draw the share of mislabelled examples that each ranking finds, of all or enlarged; a legend adds to the size."""
    num_train, total = len(known), int(known.sum())
    curves = {name: recovery_curve(scores, known) * 100.0 / total for name, scores in rankings.items()}
    best, left, right, floor, top = 100.0 * total / num_train, 0.0, 100.0, 0.0, 102.0
    if enlarged:
        left, right = 0.5 * best, min(100.0, 2.5 * best)
        window = np.stack(
            [curve[round(left / 100 * num_train) : round(right / 100 * num_train) + 1] for curve in curves.values()]
        )
        floor, top = float(0.9 * window.min()), min(top, float(window.max() + 0.1 * np.ptp(window) + 1))
    keys = recovery_keys(list(rankings))
    shown_keys = keys if legend else []
    plot = Plot(
        (size[0], size[1] + int(legend_figure(shown_keys, size[0]).height)),
        Axis(left, right, [(tick, f"{tick:g} %") for tick in round_ticks(left, right, 5)], "training examples checked"),
        Axis(floor, top, [(tick, f"{tick:g} %") for tick in round_ticks(floor, min(100, top), 4)], "mislabelled found"),
        shown_keys,
    )
    shown = np.linspace(np.ceil(left / 100 * num_train), np.floor(right / 100 * num_train), MAX_CURVE_POINTS + 1)
    points = np.unique(shown.round().astype(int))
    plot.line([(at, min(100.0, 100.0 * at / best)) for at in np.union1d(np.linspace(left, right, 201), [best])], BEST)
    plot.line([(at, at) for at in np.linspace(left, right, 201)], CHANCE)
    for name, key in reversed(list(zip(rankings, keys, strict=False))):
        plot.line([(100.0 * at / num_train, curves[name][at]) for at in points], key)
    plot.figure.title = "Enlarged" if enlarged else "All training examples"
    plot.figure.description = f"Share of {total} mislabelled examples found by share of training examples checked."
    return plot.figure


def recovery_keys(names: Sequence[str]) -> list[Key]:
    """Return the legend of `recovery_chart`: the strongest line first, reference lines last."""
    keys = [Key(shortened(names[0], MAX_NAME), "pos", 3.0)]
    for place, name in enumerate(names[1:]):
        keys.append(Key(shortened(name, MAX_NAME), f"series{place % 3 + 1}", 2.0, _DASHES[min(place + 1, 3)]))
    return [*keys, BEST, CHANCE]


def map_classes(train_counts: np.ndarray) -> np.ndarray:
    """Return the indices of the classes on the map, in order: all, or those with the most training examples.

    >>> map_classes(np.array([3, 0, 5])).tolist()
    [0, 1, 2]
    """
    return np.sort(np.argsort(-train_counts, kind="stable")[:MAX_MAP_CLASSES])


def class_map(influence: np.ndarray, names: Sequence[str], train_counts: np.ndarray, max_label: int = 12) -> Figure:
    """Draw mean scores by class: blue cells help the targets of a class, orange cells harm them, NaN is empty."""
    shown = map_classes(train_counts)
    values = influence[np.ix_(shown, shown)]
    labels = [shortened(names[place], max_label) for place in shown]
    widest = max((text_width(label) for label in labels), default=0.0)
    # few classes have larger cells, so that the axes' names fit beside them
    room = text_width("training examples of class") / max(1, len(shown))
    margin, cell = 24 + 14 + widest, int(max(np.clip(420 / max(1, len(shown)), 14, 46), np.ceil(room)))
    side = cell * len(shown)
    largest = float(np.nanmax(np.abs(values))) if np.isfinite(values).any() else 0.0
    figure = Figure(margin + side + 8, margin + side + 48, "Mean scores by class. A table below has the numbers.")
    figure.min_width = int(min(380, figure.width))  # a small map is not enlarged
    figure.caption = (
        "Mean score of the training examples of a class on the targets of a class: blue helps, orange harms."
    )
    if len(shown) <= MAP_NUMBERS:
        figure.caption += f" Numbers are in percent of the largest, {number(largest)}."
    for a, label in enumerate(labels):
        middle = margin + cell * (a + 0.5)
        figure.marks.append(Text(margin - 7, middle + 4, label, anchor="end"))
        if widest <= cell:
            figure.marks.append(Text(middle, margin - 7, label, anchor="middle"))
        else:
            figure.marks.append(Text(middle + 4, margin - 7, label, turned=True))
        for b, other in enumerate(labels):
            title = f"examples of {label} on targets of {other}: {number(values[a, b])}"
            corner = (margin + b * cell, margin + a * cell)
            figure.marks += _cell(values[a, b], largest, corner, cell, title)[: 2 if len(shown) <= MAP_NUMBERS else 1]
    middle = margin + side / 2
    figure.marks.append(Text(middle, 12, "targets of class", anchor="middle"))
    figure.marks.append(Text(13, middle, "training examples of class", anchor="middle", turned=True))
    figure.marks += _color_scale(largest, margin, margin + side + 14, side)
    return figure


def _cell(value: float, largest: float, corner: Point, side: float, title: str) -> list[Mark]:
    """Return a cell of the map in the color of its value, and its percentage of the largest; an outline for NaN."""
    x, y, inner = corner[0] + 0.5, corner[1] + 0.5, side - 1
    if not np.isfinite(value):
        corners = [(x, y), (x + inner, y), (x + inner, y + inner), (x, y + inner)]
        return [Line(corners, "line", 1, (3, 3), closed=True)]
    opacity = _opacity(value, largest)
    text, strong = f"{round(value / largest * 100) if largest else 0}".replace("-", "−"), opacity > 0.6
    middle = (corner[0] + side / 2, corner[1] + side / 2 + 4)
    return [
        Rect(x, y, inner, inner, "pos" if value >= 0 else "neg", opacity, title),
        Text(*middle, text, "card" if strong else "text", "middle", 11, strong),  # readable on the cell's color
    ]


def _opacity(value: float, largest: float) -> float:
    """Return how strong the color of a value is; the root lets small values show."""
    return 0.04 + 0.86 * (abs(value) / largest if largest else 0.0) ** 0.6


def _color_scale(largest: float, x: float, y: float, width: float) -> list[Mark]:
    """Return a strip of the map's colors from the most negative to the most positive, with numbers below."""
    values = np.linspace(-largest, largest, 41)
    step = width / len(values)
    marks: list[Mark] = [
        Rect(x + place * step, y, step, 10, "pos" if value >= 0 else "neg", _opacity(value, largest))
        for place, value in enumerate(values.tolist())
    ]
    ends = [(0.0, "start", number(-largest)), (0.5, "middle", "0"), (1.0, "end", number(largest, signed=True))]
    return marks + [Text(x + share * width, y + 26, text, anchor=anchor) for share, anchor, text in ends]


def _percent_axis(top: float, name: str) -> Axis:
    """Return a vertical axis from 0 to a little more than the tallest bar, in percent."""
    top = max(1e-9, float(top)) * 1.06
    return Axis(0.0, top, [(tick, f"{tick:.3g} %") for tick in round_ticks(0.0, top, 4)], name)


def influence_montage(
    train: Samples,
    target: Samples,
    proponents: TopK,
    opponents: TopK,
    shown: Sequence[int],
    known_mislabelled: np.ndarray | None,
) -> Figure:
    """Draw each shown target with its five strongest proponents and opponents; known mislabelled ones are framed."""
    counts = [min(MAX_TILES, top.indices.shape[1]) for top in (proponents, opponents)]
    starts = [0.0, PITCH + GAP, PITCH + GAP + counts[0] * PITCH + GAP]
    figure = Figure(starts[2] + counts[1] * PITCH, 30 + TILE_HEIGHT * len(shown))
    headings = zip(starts, (1, *counts), ("target", "proponents", "opponents"), ("text", "pos", "neg"), strict=True)
    for start, count, name, color in headings:
        figure.marks.append(Text(start + count * PITCH / 2, 16, name, color, "middle", 14, bold=True))
    framed = () if known_mislabelled is None else np.flatnonzero(known_mislabelled)
    for line, target_index in enumerate(shown):
        y = 30 + line * TILE_HEIGHT
        title, caption = heading(target, target_index), f"target {target_index}"
        _add_tile(figure, (0.0, y), PITCH, target.image(target_index), title, caption)
        for start, top, sign in zip(starts[1:], (proponents, opponents), (1, -1), strict=True):
            pairs = zip(top.indices[target_index, :MAX_TILES].tolist(), top.scores[target_index], strict=False)
            for place, (index, score) in enumerate(pairs):
                if sign * score <= 0:
                    break  # the strongest go on past zero if fewer examples help, or harm
                corner, caption = (start + place * PITCH, y), number(float(f"{score:.2g}"), signed=True)
                _add_tile(figure, corner, PITCH, train.image(index), train.label(index), caption, index in framed)
    return figure


def ranking_montage(
    train: Samples, indices: np.ndarray, scores: np.ndarray, known_mislabelled: np.ndarray | None, num_columns: int = 8
) -> Figure:
    """Draw training examples in the order given, each with its label, prediction and score."""
    figure = Figure(num_columns * WIDE_PITCH, TILE_HEIGHT * -(-len(indices) // num_columns))
    framed = () if known_mislabelled is None else np.flatnonzero(known_mislabelled)
    for place, index in enumerate(indices.tolist()):
        corner = (place % num_columns * WIDE_PITCH, place // num_columns * TILE_HEIGHT)
        title, caption = heading(train, index), number(scores[index])
        _add_tile(figure, corner, WIDE_PITCH, train.image(index), title, caption, index in framed)
    return figure


def heading(samples: Samples, index: int) -> str:
    """Return an example's label and, if it differs, the model's prediction."""
    label, prediction = samples.label(index), samples.prediction(index)
    return label if prediction in ("", label) else f"{label} → {prediction}"


def _add_tile(
    figure: Figure, corner: Point, pitch: float, pixels: np.ndarray, title: str, caption: str, framed: bool = False
) -> None:
    """Add an image with a line above and a line below it, if ``framed`` in a strong frame."""
    scale = TILE / max(pixels.shape[:2])
    height, width = (side * scale for side in pixels.shape[:2])
    middle = corner[0] + pitch / 2
    x, y = middle - width / 2, corner[1] + 20
    color = "neg" if framed else "text"
    figure.marks.append(Text(middle, corner[1] + 14, shortened(title, int(pitch / 6.8)), color, "middle", 11))
    figure.marks.append(Picture(x, y, width, height, pixels))
    corners = [(x, y), (x + width, y), (x + width, y + height), (x, y + height)]
    frame = Line(corners, "neg" if framed else "line", 2.6 if framed else 0.8, closed=True)
    figure.marks += [frame, Text(middle, y + height + 14, caption, "muted", "middle", 11)]

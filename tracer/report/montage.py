"""Montages of images, as PNG files: targets with their proponents and opponents, and examples in order of a ranking."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tracer.report.figure import Figure, Line, Picture, Point, Text
from tracer.report.samples import Samples
from tracer.report.text import number, shortened
from tracer.types import TopK

TILE, PITCH, WIDE_PITCH, LINE_HEIGHT = 64.0, 71.0, 88.0, 104.0
GAP = 25.0  # space between the columns of targets, proponents and opponents
MAX_TILES = 5  # more proponents or opponents of a target would be too small to see; the page and the CSV file list all


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
    figure = Figure(starts[2] + counts[1] * PITCH, 30 + LINE_HEIGHT * len(shown))
    headings = zip(starts, (1, *counts), ("target", "proponents", "opponents"), ("text", "pos", "series1"), strict=True)
    for start, count, name, color in headings:
        figure.marks.append(Text(start + count * PITCH / 2, 16, name, color, "middle", 14, bold=True))
    framed = () if known_mislabelled is None else np.flatnonzero(known_mislabelled)
    for line, target_index in enumerate(shown):
        y = 30 + line * LINE_HEIGHT
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
    figure = Figure(num_columns * WIDE_PITCH, LINE_HEIGHT * -(-len(indices) // num_columns))
    framed = () if known_mislabelled is None else np.flatnonzero(known_mislabelled)
    for place, index in enumerate(indices.tolist()):
        corner = (place % num_columns * WIDE_PITCH, place // num_columns * LINE_HEIGHT)
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

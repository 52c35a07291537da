"""Write a report: check what came, draw the figures, write the files."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tracer.report import content, sections
from tracer.report.figures import Picture
from tracer.report.page import page
from tracer.report.recovery import ranking
from tracer.report.samples import Samples
from tracer.types import TopK


def write_report(
    directory: str | os.PathLike[str],
    *,
    self_influence: Any,
    proponents: TopK,
    opponents: TopK,
    train_inputs: Any = None,
    target_inputs: Any = None,
    train_labels: Any = None,
    target_labels: Any = None,
    train_predictions: Any = None,
    target_predictions: Any = None,
    class_names: Sequence[str] | None = None,
    known_mislabelled: Any = None,
    rankings: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
    shown_targets: Sequence[int] | None = None,
    num_top_rows: int = 24,
    title: str = "Influence report",
) -> Path:
    """Write PNG figures, ``self_influence.csv`` and a self-contained ``index.html`` that shows them.

    Files of an earlier report in the directory are replaced. Inputs may be images ``[N, H, W]``, ``[N, C, H, W]`` or
    ``[N, H, W, C]``, vectors ``[N, D]``, texts, or absent.

    Args:
        directory: Where the files go; made where it does not exist.
        self_influence: ``[N]``, as from `Tracer.self_influence`.
        proponents: The strongest proponents of each target, ``[M, k]``, as from `Tracer.top`.
        opponents: The strongest opponents, likewise; its k may differ.
        train_inputs: The inputs of the N training rows, or None.
        target_inputs: The inputs of the M targets, or None.
        train_labels: ``[N]``, class indices, names or numbers, or None.
        target_labels: ``[M]``, likewise.
        train_predictions: ``[N]``, what the model predicts, likewise.
        target_predictions: ``[M]``, likewise.
        class_names: The name of each class index.
        known_mislabelled: ``[N]``, bool, rows whose label is known to be wrong: adds the recovery curve. Or None.
        rankings: Other scores ``[N]`` by name, higher is checked earlier, to compare self-influence with.
        settings: What the scores come from, shown as a table.
        shown_targets: Which targets are shown; by default six, spread evenly.
        num_top_rows: How many rows of highest self-influence are shown.
        title: The page's title.

    Returns:
        The path of ``index.html``.

    Raises:
        InputError: If sizes disagree, indices are out of range, or scores are NaN or infinite.
        MissingDependencyError: If matplotlib is not installed.

    >>> import tempfile
    >>> import numpy as np
    >>> top = TopK(np.array([[1, 0]]), np.array([[0.5, 0.2]], dtype=np.float32))
    >>> low = TopK(np.array([[2]]), np.array([[-0.4]], dtype=np.float32))
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     index = write_report(directory, self_influence=np.array([1.0, 3.0, 2.0]), proponents=top, opponents=low)
    ...     sorted(path.name for path in index.parent.iterdir())
    ['index.html', 'self_influence.csv', 'self_influence.png']
    """
    scores = content.check_scores(self_influence, "self_influence")
    num_rows, num_targets = len(scores), len(proponents.indices)
    data = content.ReportContent(
        self_influence=scores,
        order=ranking(scores),
        proponents=content.check_top(proponents, "proponents", num_rows, num_targets),
        opponents=content.check_top(opponents, "opponents", num_rows, num_targets),
        train=Samples(
            "train", num_rows, inputs=train_inputs, labels=train_labels, predictions=train_predictions,
            class_names=class_names,
        ),
        target=Samples(
            "target", num_targets, inputs=target_inputs, labels=target_labels, predictions=target_predictions,
            class_names=class_names,
        ),
        known_mislabelled=content.check_mask(known_mislabelled, num_rows),
        rankings=content.check_rankings(rankings or {}, num_rows),
        settings=dict(settings or {}),
        shown_targets=content.check_shown(shown_targets, num_targets),
        num_top_rows=num_top_rows,
    )  # fmt: skip
    built, pictures = sections.build(data)
    return _write(Path(directory), page(title, sections.summary(data), built), csv_text(data), pictures)


def csv_text(data: content.ReportContent) -> str:
    """Return the ranking as CSV, highest self-influence first, with a header.

    Args:
        data: What is reported.

    Returns:
        One line a training row: rank from 1, row index, self-influence, and what else is known of the row.
    """
    columns: dict[str, Sequence[object]] = {
        "self_influence": [repr(float(value)) for value in data.self_influence],
    }
    if data.train.labels is not None:
        columns["label"] = data.train.labels
    if data.train.predictions is not None:
        columns["prediction"] = data.train.predictions
    if data.known_mislabelled is not None:
        columns["known_mislabelled"] = [int(flag) for flag in data.known_mislabelled]
    for name, scores in data.rankings.items():
        columns[name] = [repr(float(value)) for value in scores]
    buffer = io.StringIO()
    lines = csv.writer(buffer, lineterminator="\n")
    lines.writerow(["rank", "row", *columns])
    for rank, row in enumerate(data.order, start=1):
        lines.writerow([rank, row, *(values[row] for values in columns.values())])
    return buffer.getvalue()


def _write(directory: Path, html: str, table: str, pictures: Mapping[str, Picture]) -> Path:
    """Write all files, the page last, and return its path."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, picture in pictures.items():
        (directory / f"{name}.png").write_bytes(picture.light)
    (directory / "self_influence.csv").write_text(table, encoding="utf-8")
    index = directory / "index.html"
    index.write_text(html, encoding="utf-8")
    return index

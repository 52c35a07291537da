"""The files beside the page: CSV tables, and the training rows that help and harm each class most."""

from __future__ import annotations

import csv
import io
import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from tracer.report.content import ReportContent
from tracer.report.thumbnails import png_bytes

TOP_FOLDER = "top_influences"
_MARK = ".written_by_tracer"


def summary_csv(data: ReportContent) -> str:
    """Return one line a training row, highest self-influence first.

    Args:
        data: What is reported.

    Returns:
        CSV with a header: rank from 1, row index, self-influence, and what else is known of the row.
    """
    columns: dict[str, Sequence[object]] = {"self_influence": _numbers(data.self_influence)}
    if data.train.labels is not None:
        columns["label"] = data.train.labels
    if data.train.predictions is not None:
        columns["prediction"] = data.train.predictions
    if data.known_mislabelled is not None:
        columns["known_mislabelled"] = [int(flag) for flag in data.known_mislabelled]
    if data.summary is not None:
        columns["mean_score"] = _numbers(data.summary.row_mean)
        columns["mean_absolute_score"] = _numbers(data.summary.row_mean_abs)
        if data.summary.classes is not None:
            columns["harm_over_help"] = _numbers(data.summary.classes.ratio)
            if data.contradicted is not None:
                columns["contradicted"] = [int(flag) for flag in data.contradicted]
            columns["harmed_class"] = [data.class_names[place] for place in data.summary.classes.harmed.tolist()]
    for name, scores in data.rankings.items():
        columns[name] = _numbers(scores)
    lines = (
        [rank, row, *(values[row] for values in columns.values())] for rank, row in enumerate(data.order.tolist(), 1)
    )
    return _csv(["rank", "row", *columns], lines)


def scores_csv(data: ReportContent) -> str:
    """Return one line for each proponent and opponent of each target: target, kind, rank, row, score, labels."""
    lines = []
    for kind, top in (("proponent", data.proponents), ("opponent", data.opponents)):
        for target, (rows, scores) in enumerate(zip(top.indices.tolist(), top.scores.tolist(), strict=True)):
            for rank, (row, score) in enumerate(zip(rows, scores, strict=True), 1):
                labels = data.train.label(row), data.target.label(target)
                lines.append((target, kind, rank, row, repr(score), *labels))
    lines.sort(key=lambda line: (line[0], line[1] != "proponent", line[2]))
    return _csv(["target", "kind", "rank", "row", "score", "label", "target_label"], lines)


def targets_csv(data: ReportContent) -> str:
    """Return one line a target: label, prediction, mean score over training rows, root mean square."""
    assert data.summary is not None
    lines = (
        [target, data.target.label(target), data.target.prediction(target), repr(float(mean)), repr(float(rms))]
        for target, (mean, rms) in enumerate(zip(data.summary.target_mean, data.summary.target_rms, strict=True))
    )
    return _csv(["target", "label", "prediction", "mean_score", "rms_score"], lines)


def classes_csv(data: ReportContent) -> str:
    """Return the class by class map: a line for each class of training rows, a column for each class of targets."""
    assert data.summary is not None and data.summary.classes is not None
    cells = data.summary.classes.influence
    lines = ([name, *(repr(float(value)) for value in cells[place])] for place, name in enumerate(data.class_names))
    return _csv(["train_class", *data.class_names], lines)


def write_top_influences(directory: Path, data: ReportContent) -> None:
    """Write the rows that help (``positive``) and harm (``negative``) the targets of each class most.

    An image becomes a PNG file, a text a .txt, a vector a .csv with a line a number. Names hold rank, row and score.
    A folder of an earlier report is replaced; one that no report wrote is left and added to.

    Args:
        directory: Of the report.
        data: What is reported, with classes.
    """
    assert data.summary is not None and data.summary.classes is not None
    folder = directory / TOP_FOLDER
    if (folder / _MARK).exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _MARK).touch()
    classes = data.summary.classes
    names = folder_names(data.class_names)
    for place in np.flatnonzero(classes.target_counts).tolist():
        for kind, top, sign in (("positive", classes.helpful, 1), ("negative", classes.harmful, -1)):
            inside = folder / names[place] / kind
            inside.mkdir(parents=True, exist_ok=True)
            for rank, (row, score) in enumerate(
                zip(top.indices[place].tolist(), top.scores[place].tolist(), strict=True), 1
            ):
                if sign * score > 0:
                    _write_row(inside / f"{rank:02d}_row{row}_{score:+.3e}", data, row)


def folder_names(names: Sequence[str]) -> list[str]:
    """Return a different folder name for each class that any file system takes.

    >>> folder_names(["cat", "../x", "a/b", "a b", "CAT"])
    ['cat', '.._x', 'a_b', 'a_b_2', 'CAT_2']
    """
    found: list[str] = []
    taken: set[str] = set()
    for name in names:
        plain = re.sub(r"[^\w.+-]", "_", name)[:60].strip() or "_"
        plain = "_" if not plain.strip(".") else plain
        chosen, copy = plain, 1
        while chosen.lower() in taken:
            copy += 1
            chosen = f"{plain}_{copy}"
        taken.add(chosen.lower())
        found.append(chosen)
    return found


def _write_row(path: Path, data: ReportContent, row: int) -> None:
    """Write one row as the file that fits its kind."""
    samples = data.train
    if samples.kind == "images":
        path.with_name(path.name + ".png").write_bytes(png_bytes(samples.image(row)))
    elif samples.kind == "vectors":
        values = samples.vector(row)
        names = samples.feature_names or [str(place) for place in range(len(values))]
        lines = ([name, repr(value)] for name, value in zip(names, values.tolist(), strict=True))
        write_text(path.with_name(path.name + ".csv"), _csv(["name", "value"], lines))
    else:
        words = samples.text(row) if samples.kind == "texts" else f"training row {row}, label {samples.label(row)}\n"
        write_text(path.with_name(path.name + ".txt"), words)


def write_text(path: Path, text: str) -> None:
    """Write a file as UTF-8; what UTF-8 cannot hold, as a lone half of a surrogate pair, is written as its number."""
    path.write_text(text, encoding="utf-8", errors="backslashreplace")


def _numbers(values: np.ndarray) -> list[str]:
    """Return numbers with all their digits."""
    return [repr(value) for value in np.asarray(values, dtype=np.float64).tolist()]


def _csv(header: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    """Return lines as CSV."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(lines)
    return buffer.getvalue()

"""The files in the folder of the page: CSV tables, and the training examples that help and harm each class most."""

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
    """Return one line for each training example, highest self-influence first, with everything known of it."""
    columns: dict[str, Sequence[object]] = {"self_influence": _numbers(data.self_influence)}
    if data.train.labels is not None:
        columns["label"] = data.train.labels
    if data.train.predictions is not None:
        columns["prediction"] = data.train.predictions
    if data.known_mislabelled is not None:
        columns["known_mislabelled"] = [int(flag) for flag in data.known_mislabelled]
    if data.summary is not None:
        columns["mean_score"] = _numbers(data.summary.train_mean)
        columns["mean_absolute_score"] = _numbers(data.summary.train_mean_abs)
    if data.classes is not None:
        columns["harm_over_help"] = _numbers(data.classes.ratio)
        if data.contradicted is not None:
            columns["contradicted"] = [int(flag) for flag in data.contradicted]
        columns["harmed_class"] = [data.class_names[place] for place in data.classes.harmed.tolist()]
    for name, scores in data.rankings.items():
        columns[name] = _numbers(scores)
    lines = (
        [rank, index, *(values[index] for values in columns.values())]
        for rank, index in enumerate(data.order.tolist(), 1)
    )
    return _csv(["rank", "train_index", *columns], lines)


def scores_csv(data: ReportContent) -> str:
    """Return one line for each proponent and opponent of each target."""
    lines = []
    for kind, top in (("proponent", data.proponents), ("opponent", data.opponents)):
        for target, (indices, scores) in enumerate(zip(top.indices.tolist(), top.scores.tolist(), strict=True)):
            for rank, (index, score) in enumerate(zip(indices, scores, strict=True), 1):
                labels = data.train.label(index), data.target.label(target)
                lines.append((target, kind, rank, index, repr(score), *labels))
    lines.sort(key=lambda line: (line[0], line[1] != "proponent", line[2]))
    return _csv(["target", "kind", "rank", "train_index", "score", "label", "target_label"], lines)


def targets_csv(data: ReportContent) -> str:
    """Return one line for each target: label, prediction, mean score over training examples, root mean square."""
    assert data.summary is not None
    lines = (
        [target, data.target.label(target), data.target.prediction(target), repr(float(mean)), repr(float(rms))]
        for target, (mean, rms) in enumerate(zip(data.summary.target_mean, data.summary.target_rms, strict=True))
    )
    return _csv(["target", "label", "prediction", "mean_score", "rms_score"], lines)


def classes_csv(data: ReportContent) -> str:
    """Return mean scores by class: a line for each training class, a column for each target class."""
    assert data.classes is not None
    cells = data.classes.influence
    lines = ([name, *(repr(float(value)) for value in cells[place])] for place, name in enumerate(data.class_names))
    return _csv(["train_class", *data.class_names], lines)


def write_top_influences(directory: Path, data: ReportContent) -> None:
    """Write the training examples that help (``positive``) and harm (``negative``) the targets of each class most."""
    assert data.classes is not None
    folder = directory / TOP_FOLDER
    # the mark tells the folder of an earlier report, which is replaced, from one of the user, which is not
    if (folder / _MARK).exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _MARK).touch()
    names = folder_names(data.class_names)
    for place in np.flatnonzero(data.classes.target_counts).tolist():
        for kind, top, sign in (("positive", data.classes.helpful, 1), ("negative", data.classes.harmful, -1)):
            inside = folder / names[place] / kind
            inside.mkdir(parents=True, exist_ok=True)
            pairs = zip(top.indices[place].tolist(), top.scores[place].tolist(), strict=True)
            for rank, (index, score) in enumerate(pairs, 1):
                if sign * score > 0:
                    _write_example(inside / f"{rank:02d}_train{index}_{score:+.3e}", data, index)


def folder_names(names: Sequence[str]) -> list[str]:
    """Return a folder name for each class, all different and valid on every file system.

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


def _write_example(path: Path, data: ReportContent, index: int) -> None:
    """Write one training example: an image as .png, a vector as .csv with a line for each number, else .txt."""
    samples = data.train
    if samples.kind == "images":
        path.with_name(path.name + ".png").write_bytes(png_bytes(samples.image(index)))
    elif samples.kind == "vectors":
        values = samples.vector(index)
        names = samples.feature_names or [str(place) for place in range(len(values))]
        lines = ([name, repr(value)] for name, value in zip(names, values.tolist(), strict=True))
        write_text(path.with_name(path.name + ".csv"), _csv(["name", "value"], lines))
    else:
        absent = f"training example {index}, label {samples.label(index)}\n"
        write_text(path.with_name(path.name + ".txt"), samples.text(index) if samples.kind == "texts" else absent)


def write_text(path: Path, text: str) -> None:
    """Write a file as UTF-8; characters that UTF-8 cannot encode, as half a surrogate pair, become escapes."""
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

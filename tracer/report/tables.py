"""The files in the folder of the page: CSV tables, and the training examples that help and harm each class most."""

from __future__ import annotations

import csv
import io
import itertools
import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tracer._core.text import csv_cell
from tracer.errors import InputError
from tracer.report.content import ReportContent
from tracer.report.png import png_bytes
from tracer.report.samples import Samples

TOP_FOLDER = "top_influences"
_MARK = ".written_by_tracer"


def summary_csv(data: ReportContent) -> str:
    """Return one line for each training example, the most suspicious first, with everything known of it."""
    columns: dict[str, Any] = {
        "id": data.train_ids,
        "self_influence": data.self_influence,
        "label": data.train.labels,
        "prediction": data.train.predictions,
        "known_mislabelled": data.known_mislabelled,
    }
    if data.summary is not None:
        columns |= {"mean_score": data.summary.train_mean, "mean_absolute_score": data.summary.train_mean_abs}
    if data.estimate is not None:
        columns |= {"suspect": data.suspects, "suggested_label": data.suggested}
        columns["wrong_probability"] = data.estimate.confidence
    columns |= data.rankings
    known = {name: _plain(values) for name, values in columns.items() if values is not None}
    order = enumerate(data.order.tolist(), 1)
    lines = ([rank, index, *(values[index] for values in known.values())] for rank, index in order)
    return _csv(["rank", "train_index", *known], lines)


def scores_csv(data: ReportContent) -> str:
    """Return one line for each proponent and opponent of each target."""
    ids, target_ids = data.train_ids or [], data.target_ids or []
    lines = (
        [target, *target_ids[target : target + 1], kind, rank, index, *ids[index : index + 1], score]
        + [data.train.label(index), data.target.label(target)]
        for target in range(data.target.size)
        for kind, top in (("proponent", data.proponents), ("opponent", data.opponents))
        for rank, (index, score) in enumerate(zip(*(ends[target].tolist() for ends in top), strict=True), 1)
    )
    own, others = (["target_id"] if target_ids else []), (["id"] if ids else [])
    return _csv(["target", *own, "kind", "rank", "train_index", *others, "score", "label", "target_label"], lines)


def targets_csv(data: ReportContent) -> str:
    """Return one line for each target: label, prediction, mean score over training examples, root mean square."""
    assert data.summary is not None
    numbers = zip(data.summary.target_mean.tolist(), data.summary.target_rms.tolist(), strict=True)
    ids = data.target_ids or []
    lines = (
        [at, *ids[at : at + 1], data.target.label(at), data.target.prediction(at), *pair]
        for at, pair in enumerate(numbers)
    )
    return _csv(["target", *(["target_id"] if ids else []), "label", "prediction", "mean_score", "rms_score"], lines)


def classes_csv(data: ReportContent) -> str:
    """Return mean scores by class: a line for each training class, a column for each target class."""
    assert data.classes is not None
    lines = zip(data.class_names, data.classes.influence.tolist(), strict=True)
    return _csv(["train_class", *data.class_names], ([name, *cells] for name, cells in lines))


def write_top_influences(directory: Path, data: ReportContent) -> None:
    """Write the training examples that help (``positive``) and harm (``negative``) the targets of each class most."""
    assert data.classes is not None
    folder = directory / TOP_FOLDER
    if folder.is_symlink():
        raise InputError(f"{folder} is a link; expected a folder, which a new report replaces: remove the link.")
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
                    _write_example(inside / f"{rank:02d}_train{index}_{score:+.3e}", data.train, index)


def folder_names(names: Sequence[str]) -> list[str]:
    """Return a folder name for each class, all different and valid on every file system.

    >>> folder_names(["cat", "../x", "a/b", "a b", "CAT"])
    ['cat', '.._x', 'a_b', 'a_b_2', 'CAT_2']
    """
    found: list[str] = []
    for name in names:
        plain = re.sub(r"[^\w.+-]", "_", name)[:60].strip()
        plain = plain if plain.strip(".") else "_"
        candidates = itertools.chain([plain], (f"{plain}_{copy}" for copy in itertools.count(2)))
        taken = {other.lower() for other in found}
        found.append(next(each for each in candidates if each.lower() not in taken))
    return found


def _write_example(path: Path, samples: Samples, index: int) -> None:
    """Write one training example: an image as .png, a vector as .csv with a line for each number, else .txt."""
    if samples.kind == "images":
        path.with_name(path.name + ".png").write_bytes(png_bytes(samples.image(index)))
    elif samples.kind == "vectors":
        values = samples.vector(index).tolist()
        names = samples.feature_names or range(len(values))
        write_text(path.with_name(path.name + ".csv"), _csv(["name", "value"], zip(names, values, strict=True)))
    else:
        absent = f"training example {index}, label {samples.label(index)}\n"
        write_text(path.with_name(path.name + ".txt"), samples.text(index) if samples.kind == "texts" else absent)


def write_text(path: Path, text: str) -> None:
    """Write a file as UTF-8; characters that UTF-8 cannot encode, as half a surrogate pair, become escapes."""
    path.write_text(text, encoding="utf-8", errors="backslashreplace")


def _plain(values: Any) -> Sequence[Any]:
    """Return flags as 0 and 1, and numbers with all the digits of float64."""
    if isinstance(values, np.ndarray):
        return values.astype(np.int64 if values.dtype == bool else np.float64).tolist()
    return values


def _csv(header: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    """Return lines as CSV."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerows([csv_cell(value) for value in line] for line in [header, *lines])
    return buffer.getvalue()

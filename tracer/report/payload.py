"""What the page's scripts work on: compact arrays, and inputs of as many rows as a budget allows, as JSON values."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from tracer.report.content import ReportContent
from tracer.report.samples import Samples
from tracer.report.thumbnails import sprite_sheets
from tracer.types import TopK

MAX_TABLE_ROWS = 200_000
"""Of more training rows, those of highest self-influence are in the page's table; files have all."""

MAX_TARGETS = 2_000
"""Of more targets, those that are shown first and others, spread evenly, are in the page; files have all."""

MAX_THUMBNAILS = 4_000
"""Images of one kind of rows in the page."""

TEXT_BUDGET = 6_000_000
"""Characters of texts of one kind of rows in the page."""

TEXT_LENGTH = 600
"""Longer texts are cut after so many characters."""

NUMBER_BUDGET = 1_500_000
"""Numbers of vectors of one kind of rows in the page."""

VECTOR_LENGTH = 24
"""Longer vectors are cut after so many numbers."""


def packed(values: Any, dtype: str) -> str:
    """Return an array as base64 of its little-endian bytes.

    >>> packed([1, 2], "u1")
    'AQI='
    """
    return base64.b64encode(np.ascontiguousarray(values, dtype="<" + dtype).tobytes()).decode("ascii")


def embedded(values: Any) -> str:
    r"""Return JSON that can stand inside a script element: no character of it can end the element.

    >>> embedded("</script>")
    '"\\u003c/script\\u003e"'
    """
    text = json.dumps(values, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def table_rows(data: ReportContent) -> np.ndarray:
    """Return the training rows of the page's table, by descending self-influence."""
    return data.order[:MAX_TABLE_ROWS]


def page_targets(data: ReportContent) -> np.ndarray:
    """Return the targets of the page, those that are shown first before the others."""
    first = np.array(list(dict.fromkeys(data.shown_targets)), dtype=np.int64)[:MAX_TARGETS]
    others = np.setdiff1d(np.arange(data.target.size), first)
    room = MAX_TARGETS - len(first)
    if len(others) > room:
        others = others[np.arange(room) * len(others) // max(1, room)]
    return np.concatenate([first, others])


def payload(data: ReportContent) -> dict[str, Any]:
    """Return everything that the scripts need, as JSON values.

    Args:
        data: What is reported.

    Returns:
        ``rows``, ``columns``, ``labels``, ``flags``, ``train``, ``target``, ``targets`` and ``tokens``; arrays are
        base64, see `packed`.
    """
    rows, targets = table_rows(data), page_targets(data)
    first = np.unique(data.proponents.indices[targets]), np.unique(data.opponents.indices[targets])
    wanted = _wanted(data, rows, np.concatenate(first))
    return {
        "num_rows": data.num_rows,
        "num_targets": data.target.size,
        "rows": packed(rows, "i4"),
        "columns": [
            {"key": key, "title": title, "help": help_, "values": packed(values[rows], "f4")}
            for key, title, help_, values in _columns(data)
        ],
        "labels": _named(data.train.labels, rows),
        "predictions": _named(data.train.predictions, rows),
        "suggested": _suggested(data, rows),
        "flags": {name: packed(mask[rows], "u1") for name, mask in _flags(data).items()},
        "train": _inputs(data.train, wanted, data),
        "target": _inputs(data.target, targets.tolist(), data),
        "targets": {
            "ids": packed(targets, "i4"),
            "labels": _named(data.target.labels, targets),
            "predictions": _named(data.target.predictions, targets),
            "mean": None if data.summary is None else packed(data.summary.target_mean[targets], "f4"),
            "proponents": _top(data.proponents, targets),
            "opponents": _top(data.opponents, targets),
            "row_labels": _row_labels(data, targets),
        },
        "tokens": _tokens(data, targets),
    }


def _columns(data: ReportContent) -> list[tuple[str, str, str, np.ndarray]]:
    """Return key, title, explanation and values ``[N]`` of the table's numbers."""
    columns = [("self", "Self-influence", "How hard training pulled on the row.", data.self_influence)]
    columns += [
        (f"ranking{place}", name[:1].upper() + name[1:], "", values)
        for place, (name, values) in enumerate(data.rankings.items())
    ]
    if data.summary is not None:
        columns.append(("mean", "Mean score", "Over all targets; positive helps.", data.summary.row_mean))
        columns.append(("abs", "Mean |score|", "How much the row moves targets at all.", data.summary.row_mean_abs))
    return columns


def _flags(data: ReportContent) -> dict[str, np.ndarray]:
    """Return masks ``[N]`` by name: those of known, contradicted, disagrees that there are."""
    found = {"known": data.known_mislabelled, "disagrees": data.disagrees, "contradicted": data.contradicted}
    return {name: mask for name, mask in found.items() if mask is not None}


def _suggested(data: ReportContent, rows: np.ndarray) -> dict[str, Any] | None:
    """Return the class that contradicted rows harm most; an empty name for other rows."""
    if data.summary is None or data.summary.classes is None or data.contradicted is None:
        return None
    harmed = np.where(data.contradicted, data.summary.classes.harmed + 1, 0)
    return {"names": ["", *data.class_names], "codes": packed(harmed[rows], "i4")}


def _named(values: list[str] | None, rows: np.ndarray) -> dict[str, Any] | None:
    """Return names once each, and which of them each row has."""
    if values is None:
        return None
    names: dict[str, int] = {}
    codes = [names.setdefault(values[row], len(names)) for row in rows.tolist()]
    return {"names": list(names), "codes": packed(codes, "i4")}


def _top(top: TopK, targets: np.ndarray) -> dict[str, Any]:
    """Return rows and scores of each target of the page, one after another."""
    return {
        "k": top.indices.shape[1],
        "rows": packed(top.indices[targets], "i4"),
        "scores": packed(top.scores[targets], "f4"),
    }


def _row_labels(data: ReportContent, targets: np.ndarray) -> dict[str, Any] | None:
    """Return labels of those proponents and opponents that are not in the table."""
    if data.num_rows <= MAX_TABLE_ROWS:
        return None
    rows = np.unique(np.concatenate([top.indices[targets].ravel() for top in (data.proponents, data.opponents)]))
    return {"rows": packed(rows, "i4"), "labels": _named(data.train.labels, rows)}


def _wanted(data: ReportContent, rows: np.ndarray, top: np.ndarray) -> list[int]:
    """Return training rows by how much their inputs are wanted: half a budget of suspects, then top rows, then all."""
    half = MAX_THUMBNAILS // 2
    masks = _flags(data)
    flagged = [rows[mask[rows]][:half] for mask in masks.values()]
    parts = [rows[:half], *flagged, top, rows[half:]]
    return list(dict.fromkeys(np.concatenate(parts).tolist()))


def _inputs(samples: Samples, rows: list[int], data: ReportContent) -> dict[str, Any]:
    """Return the inputs of as many rows as the budget of their kind allows."""
    if samples.kind == "images" and rows:
        rows = rows[:MAX_THUMBNAILS]
        return {"kind": "images", "rows": packed(rows, "i4"), **sprite_sheets(samples, rows)}
    if samples.kind == "texts":
        texts = dict(_within(((row, _cut(samples.text(row))) for row in rows), TEXT_BUDGET))
        return {"kind": "texts", "rows": packed(list(texts), "i4"), "texts": list(texts.values())}
    if samples.kind == "vectors" and rows:
        return _vectors(samples, rows, data.train)
    return {"kind": "absent", "rows": ""}


def _cut(text: str) -> str:
    """Shorten a text to what is shown."""
    return text if len(text) <= TEXT_LENGTH else text[: TEXT_LENGTH - 1].rstrip() + "…"


def _within(items: Iterable[tuple[int, str]], budget: int) -> Iterable[tuple[int, str]]:
    """Yield texts until the budget of characters is used up."""
    for row, text in items:
        budget -= len(text)
        if budget < 0:
            return
        yield row, text


def _vectors(samples: Samples, rows: list[int], train: Samples) -> dict[str, Any]:
    """Return the first numbers of vectors, and each number's mean and deviation over training rows that have it."""
    width = len(samples.vector(rows[0]))
    shown = min(width, VECTOR_LENGTH)
    rows = rows[: max(1, NUMBER_BUDGET // max(1, shown))]
    reference = train if train.kind == "vectors" and len(train.vector(0)) == width else samples
    assert reference.inputs is not None
    values = np.asarray(reference.inputs, dtype=np.float64).reshape(reference.size, -1)[:, :shown]
    finite = np.isfinite(values)
    counts = np.maximum(1, finite.sum(axis=0))
    mean = np.where(finite, values, 0.0).sum(axis=0) / counts
    spread = np.where(finite, values, mean) - mean  # what is missing adds nothing
    names = samples.feature_names or [f"[{place}]" for place in range(shown)]
    return {
        "kind": "vectors",
        "rows": packed(rows, "i4"),
        "width": width,
        "names": names[:shown],
        "mean": packed(mean, "f4"),
        "deviation": packed(np.sqrt(np.square(spread).sum(axis=0) / counts), "f4"),
        "values": packed([samples.vector(row)[:shown] for row in rows], "f4"),
    }


def _tokens(data: ReportContent, targets: np.ndarray) -> Mapping[str, Any] | None:
    """Return the tokens of pairs that have token scores, and of targets."""
    tokens, shown = data.tokens, set(targets.tolist())
    pairs = {pair: values for pair, values in tokens.scores.items() if pair[0] in shown}
    if not pairs and tokens.target is None:
        return None
    rows = {row for _, row in pairs}
    train = () if tokens.train is None else tokens.train  # an array of tokens has no truth value
    return {
        "train": {str(row): [str(token) for token in train[row]] for row in rows},
        "target": {}
        if tokens.target is None
        else {str(number): [str(token) for token in tokens.target[number]] for number in shown},
        "scores": {
            f"{number},{row}": [float(f"{value:.4g}") for value in values] for (number, row), values in pairs.items()
        },
    }

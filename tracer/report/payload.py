"""The data of the page's scripts, as JSON values: compact arrays, and inputs of as many examples as a budget allows."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np

from tracer.report.content import ReportContent
from tracer.report.samples import Samples
from tracer.report.text import shortened
from tracer.report.thumbnails import sprite_sheets
from tracer.types import TopK

MAX_TABLE_EXAMPLES = 200_000
"""With more training examples, the page's table has those of highest self-influence; the CSV file has all."""

MAX_TARGETS = 2_000
"""With more targets, the page has the shown ones and others, spread evenly; the CSV files have all."""

MAX_THUMBNAILS = 4_000
"""Images in the page, of training examples and of targets each."""

TEXT_BUDGET = 6_000_000
"""Characters of texts in the page, of training examples and of targets each."""

TEXT_LENGTH = 600
"""Longer texts are cut to this many characters."""

NUMBER_BUDGET = 1_500_000
"""Numbers of vectors in the page, of training examples and of targets each."""

VECTOR_LENGTH = 24
"""Longer vectors are cut to this many numbers."""


def packed(values: Any, dtype: str) -> str:
    """Return an array as base64 of its little-endian bytes.

    >>> packed([1, 2], "u1")
    'AQI='
    """
    return base64.b64encode(np.ascontiguousarray(values, dtype="<" + dtype).tobytes()).decode("ascii")


def page_targets(data: ReportContent) -> np.ndarray:
    """Return the targets of the page: first those that are shown, then all or some of the rest."""
    first = np.array(list(dict.fromkeys(data.shown_targets)), dtype=np.int64)[:MAX_TARGETS]
    rest = np.setdiff1d(np.arange(data.target.size), first)
    room = MAX_TARGETS - len(first)
    if len(rest) > room:
        rest = rest[np.arange(room) * len(rest) // max(1, room)]
    return np.concatenate([first, rest])


def payload(data: ReportContent) -> dict[str, Any]:
    """Return everything that the scripts need; assets/data.js unpacks it."""
    table, targets = data.order[:MAX_TABLE_EXAMPLES], page_targets(data)
    flags = {"known": data.known_mislabelled, "disagrees": data.disagrees, "contradicted": data.contradicted}
    masks = {name: mask[table] for name, mask in flags.items() if mask is not None}
    top = np.concatenate([np.unique(ends.indices[targets]) for ends in (data.proponents, data.opponents)])
    # the suspects of the first pages come first, then flagged examples, proponents and opponents, and the rest
    half = MAX_THUMBNAILS // 2
    wanted = np.concatenate([table[:half], *(table[mask][:half] for mask in masks.values()), top, table[half:]])
    suggested = outside = None
    if data.classes is not None and data.contradicted is not None:
        harmed = np.where(data.contradicted, data.classes.harmed + 1, 0)  # the empty name for all other examples
        suggested = {"names": ["", *data.class_names], "codes": packed(harmed[table], "i4")}
    if data.num_train > MAX_TABLE_EXAMPLES:
        indices = np.unique(top)
        outside = {"indices": packed(indices, "i4"), "labels": _names(data.train.labels, indices)}
    return {
        "indices": packed(table, "i4"),
        "columns": [
            {"key": key, "title": title, "help": help_, "values": packed(values[table], "f4")}
            for key, title, help_, values in _columns(data)
        ],
        "labels": _names(data.train.labels, table),
        "predictions": _names(data.train.predictions, table),
        "suggested": suggested,
        "flags": {name: packed(mask, "u1") for name, mask in masks.items()},
        "train": _inputs(data.train, list(dict.fromkeys(wanted.tolist())), data.train),
        "target": _inputs(data.target, targets.tolist(), data.train),
        "targets": {
            "indices": packed(targets, "i4"),
            "labels": _names(data.target.labels, targets),
            "predictions": _names(data.target.predictions, targets),
            "mean": None if data.summary is None else packed(data.summary.target_mean[targets], "f4"),
            "proponents": _top(data.proponents, targets),
            "opponents": _top(data.opponents, targets),
            "train_labels": outside,
        },
        "tokens": _tokens(data, targets),
    }


def _columns(data: ReportContent) -> list[tuple[str, str, str, np.ndarray]]:
    """Return key, title, explanation and values ``[N]`` of the table's numbers."""
    columns = [("self", "Self-influence", "How hard training pulled on the example.", data.self_influence)]
    for place, (name, values) in enumerate(data.rankings.items()):
        columns.append((f"ranking{place}", name[:1].upper() + name[1:], "", values))
    if data.summary is not None:
        columns.append(("mean", "Mean score", "Over all targets; positive helps.", data.summary.train_mean))
        help_ = "How strongly the example moves targets in either direction."
        columns.append(("abs", "Mean |score|", help_, data.summary.train_mean_abs))
    return columns


def _names(values: list[str] | None, indices: np.ndarray) -> dict[str, Any] | None:
    """Return each name once, and a code into these names for each index."""
    if values is None:
        return None
    names: dict[str, int] = {}
    codes = [names.setdefault(values[index], len(names)) for index in indices.tolist()]
    return {"names": list(names), "codes": packed(codes, "i4")}


def _top(top: TopK, targets: np.ndarray) -> dict[str, Any]:
    """Return training examples and scores of the page's targets, k for each target."""
    indices, scores = packed(top.indices[targets], "i4"), packed(top.scores[targets], "f4")
    return {"k": top.indices.shape[1], "indices": indices, "scores": scores}


def _inputs(samples: Samples, indices: list[int], train: Samples) -> dict[str, Any]:
    """Return the inputs of as many examples as the budget of their kind allows."""
    if samples.kind == "images" and indices:
        indices = indices[:MAX_THUMBNAILS]
        return {"kind": "images", "indices": packed(indices, "i4"), **sprite_sheets(samples, indices)}
    if samples.kind == "texts":
        texts = [shortened(samples.text(index), TEXT_LENGTH) for index in indices]
        count = np.searchsorted(np.cumsum([len(text) for text in texts]), TEXT_BUDGET, side="right")
        return {"kind": "texts", "indices": packed(indices[:count], "i4"), "texts": texts[:count]}
    if samples.kind == "vectors" and indices:
        return _vectors(samples, indices, train)
    return {"kind": "absent", "indices": ""}


def _vectors(samples: Samples, indices: list[int], train: Samples) -> dict[str, Any]:
    """Return the first numbers of vectors, with each number's mean and deviation over training examples."""
    width = len(samples.vector(indices[0]))
    shown = min(width, VECTOR_LENGTH)
    indices = indices[: max(1, NUMBER_BUDGET // max(1, shown))]
    reference = train if train.kind == "vectors" and len(train.vector(0)) == width else samples
    values = np.asarray(reference.inputs, dtype=np.float64).reshape(reference.size, -1)[:, :shown]
    known = np.ma.masked_invalid(values)
    names = samples.feature_names or [f"[{place}]" for place in range(shown)]
    return {
        "kind": "vectors",
        "indices": packed(indices, "i4"),
        "width": width,
        "names": names[:shown],
        "mean": packed(known.mean(axis=0).filled(0.0), "f4"),
        "deviation": packed(known.std(axis=0).filled(0.0), "f4"),
        "values": packed([samples.vector(index)[:shown] for index in indices], "f4"),
    }


def _tokens(data: ReportContent, targets: np.ndarray) -> dict[str, Any] | None:
    """Return the tokens of pairs that have token scores, and of targets."""
    shown = set(targets.tolist())
    pairs = {pair: values for pair, values in data.token_scores.items() if pair[0] in shown}
    if not pairs and data.target_tokens is None:
        return None
    train = () if data.train_tokens is None else data.train_tokens  # an array of tokens has no truth value
    target = {} if data.target_tokens is None else {index: data.target_tokens[index] for index in shown}
    return {
        "train": {str(index): [str(token) for token in train[index]] for index in {index for _, index in pairs}},
        "target": {str(index): [str(token) for token in words] for index, words in target.items()},
        "scores": {
            f"{target},{index}": [float(f"{value:.4g}") for value in values]
            for (target, index), values in pairs.items()
        },
    }

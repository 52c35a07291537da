"""The data of the page's scripts, as JSON values: compact arrays, and inputs of as many examples as a budget allows."""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tracer.report.content import ReportContent
from tracer.report.png import encoded, pil_image
from tracer.report.samples import Samples
from tracer.report.text import shortened
from tracer.types import TopK

MAX_TABLE_EXAMPLES = 200_000
"""With more training examples, the page's table has the most suspicious ones; the CSV file has all."""

MAX_TARGETS = 2_000  # with more targets, the page has the shown ones and others, spread evenly; the CSV files have all
MAX_THUMBNAILS = 4_000  # images in the page, of training examples and of targets each
TEXT_BUDGET = 6_000_000  # characters of texts in the page, of training examples and of targets each
TEXT_LENGTH = 600  # longer texts are cut to this many characters
NUMBER_BUDGET = 1_500_000  # numbers of vectors in the page, of training examples and of targets each
VECTOR_LENGTH = 24  # longer vectors without names are cut to this many numbers
FEATURES = 256  # the same for vectors with names
MAX_SIDE = 96  # larger images are scaled down to this many pixels
MAX_PIXELS = 20_000_000  # the pixels of all training or all target thumbnails; more images are scaled down further
MIN_SIDE = 32
LOSSLESS_SIDE = 16  # images up to this many pixels stay exact, because the page enlarges their pixels
SHEET_PIXELS = 1_000_000


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


def payload(data: ReportContent, directory: Path) -> dict[str, Any]:
    """Return everything that the scripts of a page in a directory need; assets/data.js unpacks it."""
    table, targets = data.order[:MAX_TABLE_EXAMPLES], page_targets(data)
    flags = {"known": data.known_mislabelled, "disagrees": data.disagrees, "suspect": data.suspects}
    masks = {name: mask[table] for name, mask in flags.items() if mask is not None}
    top = np.concatenate([np.unique(ends.indices[targets]) for ends in (data.proponents, data.opponents)])
    # the suspects of the first pages come first, then flagged examples, proponents and opponents, and the rest
    half = MAX_THUMBNAILS // 2
    wanted = np.concatenate([table[:half], *(table[mask][:half] for mask in masks.values()), top, table[half:]])
    suggested = outside = None
    if data.suspects is not None:
        pairs = zip(data.suggested, data.suspects.tolist(), strict=True)
        suggested = _names([name if suspect else "" for name, suspect in pairs], table)
    if data.num_train > MAX_TABLE_EXAMPLES:
        indices = np.unique(top)
        outside = {"indices": packed(indices, "i4"), "labels": _names(data.train.labels, indices)}
    columns = _columns(data)
    return {
        "indices": packed(table, "i4"),
        "columns": [
            {"key": key, "title": title, "help": help_, "values": packed(values[table], "f4")}
            for key, title, help_, values in columns
        ],
        "labels": _names(data.train.labels, table),
        "predictions": _names(data.train.predictions, table),
        "suggested": suggested,
        "ids": _ids(data.train_ids, np.union1d(table, top), directory),
        "target_ids": _ids(data.target_ids, targets, directory),
        "key": _digest(table, data),
        "sort": next(key for key, title, *_ in columns if title.lower() == data.order_by.lower()),
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


def _digest(table: np.ndarray, data: ReportContent) -> str:
    """Return a name of these examples and labels, under which a browser keeps what its reader said about them."""
    found = hashlib.blake2b(np.sort(table).tobytes(), digest_size=12)
    for names in (data.train.labels, data.train_ids):
        found.update("\0".join(names or ()).encode("utf-8", "surrogatepass"))
    return found.hexdigest()


def _ids(ids: Sequence[str] | None, indices: np.ndarray, directory: Path) -> dict[str, Any] | None:
    """Return the ids of some examples, which of them are paths of files, and the way to these from a directory."""
    if ids is None:
        return None
    names = [ids[index] for index in indices.tolist()]
    try:
        base = os.path.relpath(os.getcwd(), directory)
    except ValueError:  # of another drive
        base = os.getcwd()
    linked = packed([_is_file(name) for name in names], "u1")
    return {"indices": packed(indices, "i4"), "names": names, "linked": linked, "base": Path(base).as_posix()}


def _is_file(name: str) -> bool:
    try:
        return Path(name).is_file()
    except (OSError, ValueError):  # too long, or with a character that no path has
        return False


def _columns(data: ReportContent) -> list[tuple[str, str, str, np.ndarray]]:
    """Return key, title, explanation and values ``[N]`` of the table's numbers."""
    columns = [("self", "Self-influence", "How hard training pulled on the example.", data.self_influence)]
    for place, (name, values) in enumerate(data.rankings.items()):
        columns.append((f"ranking{place}", name[:1].upper() + name[1:], "", values))
    if data.estimate is not None:
        help_ = "The probability that the label is wrong."
        columns.append(("wrong", "Wrong label", help_, data.estimate.confidence))
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
    if samples.fields is not None:
        return _records(samples.fields, indices)
    if samples.kind == "texts":
        texts = [shortened(samples.text(index), TEXT_LENGTH) for index in indices]
        count = np.searchsorted(np.cumsum([len(text) for text in texts]), TEXT_BUDGET, side="right")
        return {"kind": "texts", "indices": packed(indices[:count], "i4"), "texts": texts[:count]}
    if samples.kind == "vectors" and indices:
        return _vectors(samples, indices, train)
    return {"kind": "absent", "indices": ""}


def _records(fields: Mapping[str, Sequence[str]], indices: list[int]) -> dict[str, Any]:
    """Return the fields of records: each value once, and a code for each record."""
    cut = {name: [shortened(values[index], TEXT_LENGTH) for index in indices] for name, values in fields.items()}
    lengths = np.sum([[len(value) for value in values] for values in cut.values()], axis=0)
    count = int(np.searchsorted(np.cumsum(lengths), TEXT_BUDGET, side="right"))
    columns = [{"name": name, "values": _names(values, np.arange(count))} for name, values in cut.items()]
    return {"kind": "records", "indices": packed(indices[:count], "i4"), "fields": columns}


def _vectors(samples: Samples, indices: list[int], train: Samples) -> dict[str, Any]:
    """Return numbers of vectors, with each number's mean and deviation over training examples."""
    width = len(samples.vector(indices[0]))
    shown = min(width, VECTOR_LENGTH if samples.feature_names is None else FEATURES)
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


def thumbnail_size(height: int, width: int, count: int) -> tuple[int, int]:
    """Return height and width of the thumbnails of ``count`` images.

    >>> thumbnail_size(8, 8, 1000), thumbnail_size(480, 640, 100), thumbnail_size(480, 640, 100_000)
    ((8, 8), (72, 96), (24, 32))
    """
    side = min(MAX_SIDE, max(MIN_SIDE, int((MAX_PIXELS / max(1, count)) ** 0.5)))
    scale = min(1.0, side / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))


def sprite_sheets(samples: Samples, indices: Sequence[int]) -> dict[str, Any]:
    """Return sheets as data URLs; image ``i`` is at place ``i % per_sheet`` of sheet ``i // per_sheet``."""
    first = samples.image(indices[0])
    height, width = thumbnail_size(first.shape[0], first.shape[1], len(indices))
    columns = max(1, int((SHEET_PIXELS / (height * width)) ** 0.5))
    per_sheet = columns * columns
    sheets = []
    for start in range(0, len(indices), per_sheet):
        images = [pil_image(samples.image(index)) for index in indices[start : start + per_sheet]]
        sheet = images[0].resize((1, 1)).resize((columns * width, -(-len(images) // columns) * height))
        for place, image in enumerate(images):
            if image.size != (width, height):
                image = image.resize((width, height), resample=1)  # Lanczos
            sheet.paste(image, ((place % columns) * width, (place // columns) * height))
        best, chosen = encoded(sheet, "PNG"), "png"
        if max(height, width) > LOSSLESS_SIDE:
            # JPEG blurs edges, so it must be much smaller
            smaller = encoded(sheet, "JPEG")
            if len(smaller) < 0.7 * len(best):
                best, chosen = smaller, "jpeg"
        sheets.append(f"data:image/{chosen};base64,{base64.b64encode(best).decode('ascii')}")
    return {"width": width, "height": height, "columns": columns, "per_sheet": per_sheet, "sheets": sheets}

"""Top-k parts: the strongest training examples so far, stored so that a repeated question is read.

    top/<exp_name>/<estimator>/<key>/<start>-<stop>/    group; its attributes are ``inputs``, ``start`` and ``stop``
      proponents_rows, opponents_rows        [M, n]  int64    indices of training examples, strongest first
      proponents_scores, opponents_scores    [M, n]  float32

A *part* covers the training examples of a question from ``start`` to ``stop``; parts that cover all of them are the
answer. ``<key>`` is a digest of ``inputs``, everything that decides the answer. A part exists as soon as its group's
document does, which is written last and removed first.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tracer._core.files import disk_errors
from tracer.errors import StoreError
from tracer.store.arrays.metadata import NODE, child_nodes, read_document, write_group
from tracer.store.arrays.store_path import StorePath
from tracer.store.manifest import json_value
from tracer.store.result_group import load_group, save_group
from tracer.store.revisions import Revisions, result_key, same_but_rows
from tracer.types import TopK

ENDS = ("proponents", "opponents")
"""Both ends of a ranking, in the order of every pair of them."""

_NAME = re.compile("(0|[1-9][0-9]*)-([1-9][0-9]*)")


@dataclass(frozen=True)
class Part:
    """A stored part.

    Attributes:
        path: Its directory.
        start: The first training example that it covers.
        stop: One past the last.
        inputs: Everything that decides it, JSON values; ``k`` among them.
        rows: A digest of the training examples that it covers.
    """

    path: StorePath
    start: int
    stop: int
    inputs: dict[str, Any]
    rows: int


def save_part(
    directory: StorePath,
    start: int,
    stop: int,
    inputs: Mapping[str, Any],
    ends: tuple[TopK, TopK],
    revisions: Revisions,
) -> Part:
    """Write a part durably below ``directory`` unless its tables have changed; an existing one stays."""
    inputs = dict(json_value({**inputs, "revisions": revisions.tables}, "inputs"))
    group = directory / result_key(inputs)
    part = Part(group / f"{start}-{stop}", start, stop, inputs, revisions.digest(start, stop))
    revisions.check()
    with disk_errors(part.path):
        if not (group / NODE).exists():
            write_group(group, {"inputs": inputs}, replace=False)
        if part in list_parts(directory):
            return part
    arrays = {f"{end}_rows": found.indices for end, found in zip(ENDS, ends, strict=True)}
    arrays |= {f"{end}_scores": found.scores for end, found in zip(ENDS, ends, strict=True)}
    save_group(part.path, {"inputs": inputs, "start": start, "stop": stop, "rows": part.rows}, arrays)
    return part


def load_part(part: Part, shape: tuple[int, int] | None = None) -> tuple[TopK, TopK]:
    """Return proponents and opponents of a part, each of a ``shape``; None: of any.

    Raises:
        FileNotFoundError: If it was removed.
        StoreError: If it is damaged, or holds what no selection among its training examples can hold.
    """
    _, arrays = load_group(part.path)
    names = [(f"{end}_rows", f"{end}_scores") for end in ENDS]
    for name in (name for pair in names for name in pair):
        if name not in arrays or arrays[name].shape != (shape or arrays[names[0][0]].shape):
            raise StoreError(f"{part.path} is damaged: expected {name} of shape {shape}; remove it to compute it again")
    for name, _ in names:
        rows = arrays[name]
        if rows.dtype != np.int64 or rows.min() < part.start or rows.max() >= part.stop:
            raise StoreError(
                f"{part.path} is damaged: expected {name} from {part.start} to {part.stop - 1}; remove it to compute "
                "it again"
            )
    first, second = (TopK(arrays[rows], arrays[scores]) for rows, scores in names)
    return first, second


def read_part(path: StorePath) -> Part:
    """Return the part in a directory; raise `FileNotFoundError` if there is none, `StoreError` if it is damaged."""
    known, name = read_document(path / NODE)["attributes"], _NAME.fullmatch(path.name)
    try:
        if name is None:
            raise ValueError(f"{path.name!r} is no range")
        return Part(path, int(name[1]), int(name[2]), known["inputs"], known["rows"])
    except (KeyError, ValueError) as error:
        raise StoreError(f"{path / NODE} is damaged ({error!r}): remove {path} to compute it again") from error


def list_parts(directory: StorePath) -> list[Part]:
    """Return all parts below ``top/<exp_name>/<estimator>``, whatever their inputs."""
    found = []
    for key in child_nodes(directory):
        for node in child_nodes(directory / key):
            # Removed in the meantime, or damaged: it counts as missing, and is written again.
            with contextlib.suppress(FileNotFoundError, StoreError):
                found.append(read_part(directory / key / node))
    return found


def usable(parts: Iterable[Part], inputs: Mapping[str, Any], revisions: Revisions) -> list[Part]:
    """Return parts that answer a question and do not overlap, in order; the longest are preferred."""
    wanted = json_value({**inputs, "revisions": revisions.tables}, "inputs")
    chosen: list[Part] = []
    for part in sorted(parts, key=lambda part: (part.start - part.stop, part.start)):
        # A part of a larger k holds the answer for a smaller one, one of earlier revisions that for the same examples.
        known = {**part.inputs, "k": wanted["k"]}
        fits = same_but_rows(known, wanted) and part.inputs.get("k", 0) >= wanted["k"]
        fits = fits and (known == wanted or 0 != part.rows == revisions.digest(part.start, part.stop))
        if fits and all(part.stop <= other.start or other.stop <= part.start for other in chosen):
            chosen.append(part)
    return sorted(chosen, key=lambda part: part.start)

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
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tracer._core.files import disk_errors
from tracer.errors import StoreError
from tracer.store.arrays.layout import Layout, create_array
from tracer.store.arrays.metadata import NODE, child_nodes, read_document, write_group
from tracer.store.arrays.opening import open_array
from tracer.store.arrays.store_path import StorePath
from tracer.store.manifest import json_value
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
    """

    path: StorePath
    start: int
    stop: int
    inputs: dict[str, Any]


def save_part(directory: StorePath, start: int, stop: int, inputs: Mapping[str, Any], ends: tuple[TopK, TopK]) -> Part:
    """Write a part durably below ``directory``; an existing one of the same range and inputs stays."""
    inputs = dict(json_value(dict(inputs), "inputs"))
    group = directory / _key(inputs)
    path = group / f"{start}-{stop}"
    with disk_errors(path):
        if not (group / NODE).exists():
            write_group(group, {}, replace=False)
        if not (path / NODE).exists():
            for end, found in zip(ENDS, ends, strict=True):
                for name, values in (("rows", found.indices), ("scores", found.scores)):
                    _save_array(path / f"{end}_{name}", values)
            # The document comes last: without it, a crash leaves arrays that nobody reads.
            write_group(path, {"inputs": inputs, "start": start, "stop": stop})
    return Part(path, start, stop, inputs)


def _save_array(path: StorePath, values: np.ndarray) -> None:
    create_array(path, Layout(values.shape, str(values.dtype), len(values)))
    array = open_array(path)
    array.assign(np.arange(len(values)), values)
    array.flush()
    array.close()


def load_part(part: Part) -> tuple[TopK, TopK] | None:
    """Return proponents and opponents of a part, or None if it was removed in the meantime."""
    try:
        found = [open_array(part.path / f"{end}_{name}") for end in ENDS for name in ("rows", "scores")]
        arrays = [np.array(array.read(0, array.layout.shape[0])) for array in found]
        missing = [array for array in found if 0 not in array.stored_chunks()]
    except (StoreError, OSError) as error:
        if not (part.path / NODE).exists():
            return None
        raise StoreError(f"{part.path} is damaged ({error}): remove it to compute it again") from error
    if missing and not (part.path / NODE).exists():
        return None
    same = len({values.shape for values in arrays}) == 1
    if missing or not same or [str(values.dtype) for values in arrays] != ["int64", "float32"] * 2:
        raise StoreError(
            f"{part.path} is damaged: expected four arrays of one shape, found {[(v.dtype, v.shape) for v in arrays]}; "
            "remove it to compute it again"
        )
    return TopK(arrays[0], arrays[1]), TopK(arrays[2], arrays[3])


def list_parts(directory: StorePath) -> list[Part]:
    """Return all parts below ``top/<exp_name>/<estimator>``, whatever their inputs."""
    found = []
    for key in child_nodes(directory):
        for node in child_nodes(directory / key):
            name, path = _NAME.fullmatch(node), directory / key / node
            with contextlib.suppress(FileNotFoundError, KeyError):  # removed in the meantime
                if name:
                    inputs = read_document(path / NODE)["attributes"]["inputs"]
                    found.append(Part(path, int(name[1]), int(name[2]), inputs))
    return found


def remove_part(part: Part) -> None:
    """Remove a part."""
    with disk_errors(part.path):
        (part.path / NODE).remove()  # first: without its document a part that is half removed does not count
        with contextlib.suppress(FileNotFoundError):  # another process may remove it at the same time
            part.path.remove()


def usable(parts: Iterable[Part], inputs: Mapping[str, Any]) -> list[Part]:
    """Return parts that answer a question and do not overlap, in order; the longest are preferred."""
    wanted = json_value(dict(inputs), "inputs")
    chosen: list[Part] = []
    for part in sorted(parts, key=lambda part: (part.start - part.stop, part.start)):
        # A part of a larger k holds the answer for a smaller one.
        fits = {**part.inputs, "k": wanted["k"]} == wanted and part.inputs["k"] >= wanted["k"]
        if fits and all(part.stop <= other.start or other.stop <= part.start for other in chosen):
            chosen.append(part)
    return sorted(chosen, key=lambda part: part.start)


def _key(inputs: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:32]

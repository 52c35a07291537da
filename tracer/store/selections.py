"""Running selections of the strongest train rows, so that a question that was asked is read and not computed again.

    top/<exp_name>/<estimator>/<key>/<start>-<stop>/    group; its attributes are ``inputs``, ``start`` and ``stop``
      proponents_rows, opponents_rows        [M, n]  int64    indices of train rows, strongest first
      proponents_scores, opponents_scores    [M, n]  float32

A *part* covers those train rows from ``start`` to ``stop`` that the question is about; parts that cover all rows
together are the answer. ``<key>`` is a digest of ``inputs``, which is everything that decides the answer. A part is put
together under another name, its group document last, and renamed when it is on the disk. All access to files is in
`save_part`, `load_part`, `list_parts` and `remove_part`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from tracer.errors import StoreError
from tracer.store.documents import NODE, disk_errors, partial_path, read_document, sweep, sync, write_group
from tracer.store.manifest import json_value
from tracer.types import TopK

ENDS = ("proponents", "opponents")
"""Both ends of a selection, in the order in which they are kept."""

_NAME = re.compile("(0|[1-9][0-9]*)-([1-9][0-9]*)")


@dataclass(frozen=True)
class Part:
    """A selection that lies in the store.

    Attributes:
        path: Its directory.
        start: The first train row that it covers.
        stop: One past the last.
        inputs: Everything that decides it, JSON values; ``k`` among them.
    """

    path: Path
    start: int
    stop: int
    inputs: dict[str, Any]


def save_part(
    directory: Path, staging: Path, start: int, stop: int, inputs: Mapping[str, Any], ends: tuple[TopK, TopK]
) -> Part:
    """Write a part durably; one of the same rows and inputs that is there stays.

    Args:
        directory: ``top/<exp_name>/<estimator>`` of the store, a zarr group.
        staging: A directory on the same file system where the part is put together.
        start: The first train row that it covers.
        stop: One past the last.
        inputs: Everything that decides it, JSON values.
        ends: Proponents and opponents.

    Returns:
        The part.
    """
    inputs = dict(json_value(dict(inputs), "inputs"))
    group = directory / _key(inputs)
    path, partial = group / f"{start}-{stop}", partial_path(staging)
    with disk_errors(path):
        if not (group / NODE).exists():
            group.mkdir(exist_ok=True)
            write_group(group, {}, replace=False)
            sync(directory)
        sweep(staging)
        partial.mkdir()
        try:
            for end, found in zip(ENDS, ends, strict=True):
                for name, values in (("rows", found.indices), ("scores", found.scores)):
                    zarr.create_array(
                        str(partial / f"{end}_{name}"),
                        data=values,
                        chunks=values.shape,
                        compressors=None,
                        zarr_format=3,
                    )
            for file in sorted(partial.rglob("*"), reverse=True):  # what is in a directory before the directory
                sync(file)
            write_group(partial, {"inputs": inputs, "start": start, "stop": stop})
            if not path.exists():
                partial.rename(path)
                sync(group)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return Part(path, start, stop, dict(inputs))


def load_part(part: Part) -> tuple[TopK, TopK] | None:
    """Read proponents and opponents of a part, or None where it has been removed meanwhile.

    Args:
        part: The part.

    Returns:
        Both ends.

    Raises:
        StoreError: It is damaged.
    """
    try:
        arrays = [
            np.asarray(zarr.open_array(str(part.path / f"{end}_{name}"), mode="r")[:])
            for end in ENDS
            for name in ("rows", "scores")
        ]
    except Exception as error:  # zarr raises errors of several kinds
        if not (part.path / NODE).exists():
            return None
        raise StoreError(f"{part.path} is damaged ({error!r}): remove it to compute it again") from error
    if len({values.shape for values in arrays}) > 1 or [str(v.dtype) for v in arrays] != ["int64", "float32"] * 2:
        raise StoreError(
            f"{part.path} is damaged: expected four arrays of one shape, found {[(v.dtype, v.shape) for v in arrays]}; "
            "remove it to compute it again"
        )
    return TopK(arrays[0], arrays[1]), TopK(arrays[2], arrays[3])


def list_parts(directory: Path) -> list[Part]:
    """Return all parts under ``top/<exp_name>/<estimator>``, whatever their inputs."""
    found = []
    for node in sorted(directory.glob(f"[!.]*/[!.]*/{NODE}")):
        name = _NAME.fullmatch(node.parent.name)
        with contextlib.suppress(FileNotFoundError, KeyError):  # removed meanwhile
            if name:
                inputs = read_document(node)["attributes"]["inputs"]
                found.append(Part(node.parent, int(name[1]), int(name[2]), inputs))
    return found


def remove_part(part: Part, staging: Path) -> None:
    """Remove a part: at once, or not at all."""
    partial = partial_path(staging)
    with contextlib.suppress(FileNotFoundError), disk_errors(part.path):
        if part.path.exists():
            part.path.rename(partial)
            shutil.rmtree(partial, ignore_errors=True)


def usable(parts: Iterable[Part], inputs: Mapping[str, Any]) -> list[Part]:
    """Return parts that answer a question and do not overlap, the longest first.

    Args:
        parts: Parts.
        inputs: Everything that decides the answer; a part of a larger ``k`` serves as well.

    Returns:
        Parts in the order of their rows.
    """
    wanted = json_value(dict(inputs), "inputs")
    chosen: list[Part] = []
    for part in sorted(parts, key=lambda part: (part.start - part.stop, part.start)):
        fits = {**part.inputs, "k": wanted["k"]} == wanted and part.inputs["k"] >= wanted["k"]
        if fits and all(part.stop <= other.start or other.stop <= part.start for other in chosen):
            chosen.append(part)
    return sorted(chosen, key=lambda part: part.start)


def _key(inputs: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:32]

"""Curvatures of checkpoints, which gradients are whitened with before they are projected.

    curvature/<model_id>/<key>/     group; its attributes are ``inputs``, ``tensors``, ``numbers`` and a checksum
      values     [R, 4096]  float32 or float64    all tensors one after the other, padded with zeros

``<key>`` is a digest of what the curvature was computed from. A curvature exists as soon as its group's document does,
which is written last and removed first. One that is damaged counts as missing.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from tracer.errors import StoreError
from tracer.store.arrays.metadata import child_nodes
from tracer.store.manifest import json_value
from tracer.store.paths import ensure_groups
from tracer.store.result_group import load_group, save_group
from tracer.store.revisions import remove_result, result_key
from tracer.store.store import Store

logger = logging.getLogger("tracer")

_COLUMNS = 4096


class StoredCurvature(NamedTuple):
    """Tensors by name, and plain JSON values that belong to them."""

    tensors: dict[str, np.ndarray]
    numbers: dict[str, Any]


def save_curvature(store: Store, model_id: int, inputs: Mapping[str, Any], found: StoredCurvature) -> None:
    """Write what was computed from ``inputs`` durably, in place of what is there."""
    inputs = json_value(dict(inputs), "inputs")
    dtype = np.result_type(np.float32, *found.tensors.values())
    size = sum(each.size for each in found.tensors.values())
    values = np.zeros((max(1, -(-size // _COLUMNS)), _COLUMNS), dtype)
    flat, start = values.reshape(-1), 0
    for each in found.tensors.values():
        flat[start : start + each.size] = each.reshape(-1)
        start += each.size
    shapes = [[name, list(each.shape)] for name, each in found.tensors.items()]
    parent = store.catalog.curvature_path(model_id)
    ensure_groups(store.path, parent)
    attributes = {"inputs": inputs, "tensors": shapes, "numbers": json_value(found.numbers, "numbers")}
    save_group(parent / result_key(inputs), attributes, {"values": values})


def load_curvature(store: Store, model_id: int, inputs: Mapping[str, Any]) -> StoredCurvature | None:
    """Return what was computed from ``inputs``; None if there is none, or it is damaged."""
    inputs = json_value(dict(inputs), "inputs")
    path = store.catalog.curvature_path(model_id) / result_key(inputs)
    try:
        known, arrays = load_group(path)
        if known["inputs"] != inputs:
            raise StoreError(f"{path} is damaged: it was computed from something else")
        flat, start, tensors = arrays["values"].reshape(-1), 0, {}
        for name, shape in known["tensors"]:
            stop = start + math.prod(shape)
            tensors[name] = flat[start:stop].reshape(shape)
            start = stop
        return StoredCurvature(tensors, known["numbers"])
    except FileNotFoundError:
        return None
    except (StoreError, LookupError, TypeError, ValueError) as error:
        logger.warning("computing the curvature %s again: %s", path, error)
        return None


def remove_curvatures(store: Store, model_id: int, except_for: Sequence[Mapping[str, Any]]) -> None:
    """Remove whatever was stored of a checkpoint, such as parts of a curvature, apart from those of some inputs."""
    parent = store.catalog.curvature_path(model_id)
    kept = {result_key(json_value(dict(inputs), "inputs")) for inputs in except_for}
    for key in child_nodes(parent):
        if key not in kept:
            remove_result(parent / key)

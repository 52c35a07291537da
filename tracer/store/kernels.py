"""Kernels of checkpoints, stored so that a repeated question does not read all training examples again.

    kernels/<model_id>/<weighting>/     group; its attributes are ``inputs``, sums, and a checksum of the arrays
      matrix     [k, k]  float64        ``Φᵀ diag(w) Φ``
      residual_sum [1, k] float64       ``Φᵀ (w · output_change − Q)``
    kernels/<model_id>/regularization/  group without arrays: the λ chosen for kernels weighted with ``loss_hess``

A kernel exists as soon as its group's document does, which is written last and removed first. A kernel that is damaged,
or of other inputs, counts as missing.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import google_crc32c
import numpy as np

from tracer._core.files import disk_errors
from tracer.errors import StoreError
from tracer.store.arrays.layout import Layout, create_array
from tracer.store.arrays.metadata import NODE, read_document, write_group
from tracer.store.arrays.opening import open_array
from tracer.store.arrays.store_path import StorePath
from tracer.store.manifest import json_value

logger = logging.getLogger("tracer")

_CHUNK_BYTES = 16 << 20


def save_kernel(
    path: StorePath, inputs: Mapping[str, Any], sums: Mapping[str, float], arrays: Mapping[str, np.ndarray]
) -> None:
    """Write a kernel, its ``inputs``, ``sums`` and float64 ``arrays [n, k]``, in place of an existing one."""
    with disk_errors(path):
        # Document first when replacing, last when writing: a crash in between leaves a kernel that counts as missing.
        (path / NODE).remove()
        for name, values in arrays.items():
            rows = max(1, min(len(values), _CHUNK_BYTES // (8 * values.shape[1])))
            create_array(path / name, Layout(values.shape, "float64", rows))
            array = open_array(path / name)
            array.assign(np.arange(len(values)), values)
            array.flush()
            array.close()
        write_group(path, {"inputs": json_value(dict(inputs), "inputs"), "sums": dict(sums), "crc32c": _sums(arrays)})


def load_kernel(path: StorePath, inputs: Mapping[str, Any]) -> tuple[dict[str, float], dict[str, np.ndarray]] | None:
    """Return a kernel's sums and arrays; None if there is none of these inputs, or it is damaged."""
    try:
        known = read_document(path / NODE)["attributes"]
        if known["inputs"] != json_value(dict(inputs), "inputs"):
            return None
        arrays = {name: _read(path / name) for name in known["crc32c"]}
        problem = None if _sums(arrays) == known["crc32c"] else "its arrays do not match their checksums"
    except FileNotFoundError:
        return None
    except (StoreError, OSError, KeyError, TypeError) as error:
        problem = str(error)
    if problem is not None:
        logger.warning("the kernel %s is damaged (%s) and is computed again", path, problem)
        return None
    return known["sums"], arrays


def _read(path: StorePath) -> np.ndarray:
    array = open_array(path)
    try:
        return np.array(array.read(0, array.layout.shape[0]))
    finally:
        array.close()


def _sums(arrays: Mapping[str, np.ndarray]) -> dict[str, int]:
    return {name: google_crc32c.value(np.ascontiguousarray(values).tobytes()) for name, values in arrays.items()}

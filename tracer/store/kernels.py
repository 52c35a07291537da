"""Kernels of checkpoints, stored so that a repeated question does not read all training examples again.

    kernels/<model_id>/<weighting>/<key>/     group; its attributes are ``inputs``, sums, and checksums of the arrays
      matrix       [k, k]  float64            ``Φᵀ diag(w) Φ``, w by the weighting: 1, ∂²L/∂f² or Q²
      residual_sum [1, k]  float64            ``Φᵀ (w · output_change − Q)``
      gradient_sum [1, k]  float64            ``Φᵀ Q``
    kernels/<model_id>/regularization/<key>/  without arrays: the λ chosen for kernels weighted with ``loss_hess``
    kernels/<model_id>/search_<estimator>/    an index of training examples (see `tracer.scoring.search_index`)

A kernel exists as soon as its group's document does, which is written last and removed first. A kernel that is damaged
counts as missing.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np

from tracer.errors import StoreError
from tracer.store.arrays.store_path import StorePath
from tracer.store.manifest import json_value
from tracer.store.result_group import load_group, save_group
from tracer.store.revisions import result_key

logger = logging.getLogger("tracer")


def save_kernel(
    parent: StorePath, inputs: Mapping[str, Any], sums: Mapping[str, float], arrays: Mapping[str, np.ndarray]
) -> None:
    """Write a kernel, its ``inputs``, ``sums`` and float64 ``arrays [n, k]``, in place of a damaged one."""
    inputs = json_value(dict(inputs), "inputs")
    save_group(parent / result_key(inputs), {"inputs": inputs, "sums": dict(sums)}, arrays)


def load_kernel(parent: StorePath, inputs: Mapping[str, Any]) -> tuple[dict[str, float], dict[str, np.ndarray]] | None:
    """Return a kernel's sums and arrays; None if there is none of these inputs, or it is damaged."""
    path = parent / result_key(json_value(dict(inputs), "inputs"))
    try:
        known, arrays = load_group(path)
        names = {"value", "rule"} if parent.name == "regularization" else {"trace"}
        if set(known["sums"]) != names or known["inputs"] != json_value(dict(inputs), "inputs"):
            raise StoreError(f"{path} is damaged: expected the sums {sorted(names)}")
        return known["sums"], arrays
    except FileNotFoundError:
        return None
    except (StoreError, KeyError) as error:
        logger.warning("computing the kernel %s again: %s", path, error)
        return None

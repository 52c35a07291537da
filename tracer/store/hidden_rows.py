"""What kernels need beside the features of training examples, stored beside a checkpoint's curvatures."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from tracer.store.curvature import load_curvature
from tracer.store.store import Store
from tracer.store.table_schema import read_attributes


class HiddenFacts(NamedTuple):
    """What is known of a checkpoint beside the features of labels.

    Attributes:
        labels: Of which labels there are features: ``"others"`` than the given one, whose weight is that label's
            ``|Q|``; ``"all"``, weight 1; or ``"none"``, if f shows everything.
        weights: ``[k]``, float64, the model's weights in place of a gradient; None if gradients are preconditioned.
    """

    labels: str
    weights: np.ndarray | None


class HiddenRows(NamedTuple):
    """Features of labels that show the curvature which f does not, and of the model's weights, at a checkpoint.

    Attributes:
        features: ``[R, k]``, float32; the sum of their outer products, each times the weight of its example, is added
            to a kernel.
        examples: ``[R]``, the training example of each.
        facts: Of which labels these are, and the model's weights.
    """

    features: np.ndarray
    examples: np.ndarray
    facts: HiddenFacts


def hidden_inputs(store: Store, model_id: int) -> dict[str, Any]:
    """Return what the features of a checkpoint's labels are stored under, which changes with its training examples."""
    path = f"checkpoints/{model_id}"
    revision = str(read_attributes(store.path / path)["revision"])
    return {"version": 1, "stage": "other labels", "revisions": {path: revision}}


def load_hidden(store: Store, model_id: int) -> HiddenRows | None:
    """Return the features of a checkpoint's labels; None if there are none of its present training examples."""
    found = load_curvature(store, model_id, hidden_inputs(store, model_id))
    if found is None:
        return None
    examples = np.asarray(found.numbers["sums"]["examples"], dtype=np.int64)
    weights = found.tensors["weights"].astype(np.float64) if "weights" in found.tensors else None
    return HiddenRows(found.tensors["features"], examples, HiddenFacts(str(found.numbers["labels"]), weights))

"""The test run checks the shapes that annotations state."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from jaxtyping import Float, TypeCheckError, jaxtyped
from shape_checks import checked
from torch import Tensor

from tracer.cli.demo_digits.digits import Digits, Settings, evaluate
from tracer.store.arrays.chunked import ChunkedArray, copy_values


@jaxtyped(typechecker=checked)
def scaled(values: Float[Tensor, "B k"], scale: Float[Tensor, " B"], note: no_such_type = None) -> Float[Tensor, "B k"]:  # noqa: F821  not resolved: it states no shape
    return values * scale[:, None] if note is None else values[:1]


def test_dimensions_of_one_name_must_agree():
    assert scaled(torch.ones(3, 2), torch.ones(3)).shape == (3, 2)
    with pytest.raises(TypeCheckError, match="scale"):
        scaled(torch.ones(3, 2), torch.ones(4))


def test_dtypes_and_returned_shapes_are_checked():
    with pytest.raises(TypeCheckError, match="values"):
        scaled(torch.ones(3, 2, dtype=torch.int64), torch.ones(3))
    with pytest.raises(TypeCheckError, match="return"):
        scaled(torch.ones(3, 2), torch.ones(3), note="short")


def test_functions_methods_and_data_classes_of_the_library_are_checked_if_they_state_a_shape():
    with pytest.raises(TypeCheckError, match="target"):
        copy_values(np.zeros(2, np.float32), np.zeros(3, np.float32))
    with pytest.raises(TypeCheckError, match="rows"):
        ChunkedArray.take(None, np.zeros((1, 1), np.int64))
    images, labels = torch.zeros(2, 1, 8, 8), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(TypeCheckError, match="train_labels"):
        Digits(images, labels[:1], np.zeros(2, bool), images, labels)
    with pytest.raises(TypeCheckError, match="labels"):
        evaluate("no such file", images, labels[:1])


def test_calls_of_all_other_functions_are_not_slowed_down():
    plain = [ChunkedArray.prefetch_all, Settings.for_demo.__func__, Settings.__init__]
    assert not any(hasattr(each, "__wrapped__") for each in plain)
    assert hasattr(ChunkedArray.take, "__wrapped__")

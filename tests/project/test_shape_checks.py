"""The test run checks the shapes that annotations state."""

from __future__ import annotations

import pytest
import torch
from jaxtyping import Float, TypeCheckError, jaxtyped
from shape_checks import checked
from torch import Tensor


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

"""Adafactor's second moments (Shazeer & Stern 2018), from the means that it keeps of rows and columns.

For a matrix, Adafactor divides gradients by the root of ``V = r cᵀ / mean(r)``, with running means r ``[O]`` over the
rows of squared gradients and c ``[I]`` over their columns; for other tensors of the last two dimensions. Of vectors it
keeps all second moments. Torch and transformers have names, shapes and floors of their own. The factors of whole
parameters, their scale and the clipping of updates, are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

FACTORS = (("row_var", "col_var"), ("exp_avg_sq_row", "exp_avg_sq_col"))
"""The names of row and column means: of `torch.optim.Adafactor`, and of `transformers.optimization.Adafactor`."""

KEYS = ("variance", *(key for pair in FACTORS for key in pair))
"""The names of what no optimizer but Adafactor has."""


@dataclass(frozen=True)
class AdafactorMoment:
    """Adafactor's second moment of one parameter.

    Attributes:
        arrays: The second moment, or the means of its rows ``[..., O]`` and of its columns ``[..., I]``.
        floor: The root of the least second moment, by which smaller ones are replaced.
    """

    arrays: tuple[Tensor, ...]
    floor: float

    def gamma(self) -> Tensor:
        """Return ``1 / sqrt(V)``, float64."""
        found, *columns = (array.double() for array in self.arrays)
        for of_columns in columns:
            share = found / found.mean(-1, keepdim=True).clamp(min=self.floor)
            found = share.unsqueeze(-1) * of_columns.unsqueeze(-2)
        return found.clamp(min=self.floor**2).rsqrt_()

    def described(self, name: str) -> dict[str, Tensor]:
        """Return what decides it, by name."""
        found = {f"{name} {number}": array for number, array in enumerate(self.arrays)}
        return {**found, f"{name} floor": torch.tensor([self.floor], dtype=torch.float64)}


def stored_arrays(entry: Any) -> tuple[Tensor, ...]:
    """Return the arrays of Adafactor's second moment in a parameter's state, or of another optimizer's, else none."""
    entry = entry if isinstance(entry, Mapping) else {}
    for rows, columns in FACTORS:
        if rows in entry and columns in entry:
            found = entry[rows], entry[columns]
            if all(isinstance(each, Tensor) for each in found):
                # torch keeps [..., O, 1] and [..., 1, I]
                return (found[0].squeeze(-1), found[1].squeeze(-2)) if rows == "row_var" else found
    whole = entry.get("variance", entry.get("exp_avg_sq"))
    return (whole,) if isinstance(whole, Tensor) else ()


def moment_shape(entry: Any) -> tuple[int, ...] | None:
    """Return the shape of the parameter whose second moment is in a state of Adam or Adafactor; None: not known."""
    arrays = stored_arrays(entry)
    if not arrays:
        return None
    return tuple(arrays[0].shape) + (tuple(arrays[1].shape[-1:]) if len(arrays) > 1 else ())


def is_adafactor(entry: Mapping, group: Mapping) -> bool:
    """Tell whether a parameter's state is Adafactor's, whose vectors have Adam's name in transformers."""
    return any(key in entry for key in KEYS) or ("decay_rate" in group and "betas" not in group)


def floor_of(entry: Mapping, group: Mapping, dtype: torch.dtype) -> float | None:
    """Return the floor; None if the group has no ``eps`` of this optimizer."""
    eps = group.get("eps")
    if not isinstance(eps, (tuple, list)) or len(eps) != 2:
        return None
    if "decay_rate" in group:  # transformers adds eps to the squares, where it stands in the means
        return 0.0
    return float(torch.finfo(dtype).eps if eps[0] is None else eps[0])

"""The common base of the metrics' results: short representations, and means over targets."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np

from tracer.errors import InputError
from tracer.types import data_frame, html_table


class Result:
    """A frozen dataclass whose representation rounds numbers and shortens arrays."""

    def __repr__(self) -> str:
        shown = (f"{field.name}={shortened(getattr(self, field.name))}" for field in fields(self))  # type: ignore[arg-type]
        return f"{type(self).__name__}({', '.join(shown)})"

    def _repr_html_(self) -> str:
        lines = [(field.name, shortened(getattr(self, field.name))) for field in fields(self)]  # type: ignore[arg-type]
        return html_table(("", type(self).__name__), lines)

    def to_pandas(self) -> Any:
        """Return a DataFrame of the longest values: a line for each target, or for each number of checked examples.

        Returns:
            A column for each field that is an array of the largest first dimension; of a matrix, one for each of its
            columns, ``name_0`` and so on. Without arrays, one line of numbers.

        Raises:
            MissingDependencyError: If pandas is not installed.
        """
        values = {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]
        arrays = {name: value for name, value in values.items() if isinstance(value, np.ndarray) and value.ndim}
        if not arrays:
            return data_frame({name: [value] for name, value in values.items()})
        per_target = {name: value for name, value in arrays.items() if name.endswith("per_target")}
        size = max(map(len, (per_target or arrays).values()))
        columns: dict[str, Any] = {}
        for name, value in arrays.items():
            if len(value) == size:
                flat = value.reshape(size, -1)
                parts = (
                    {name: flat[:, 0]} if value.ndim == 1 else {f"{name}_{i}": part for i, part in enumerate(flat.T)}
                )
                columns |= parts
        return data_frame(columns)


def shortened(value: object) -> str:
    """Return a short text: numbers to 4 digits, arrays of more than 4 values as their shape and range.

    >>> shortened((0.123456, 2))
    '(0.1235, 2)'
    >>> shortened(np.linspace(-1, 1, 6).reshape(2, 3))
    '<[2, 3] from -1 to 1>'
    """
    if isinstance(value, tuple):
        return f"({', '.join(map(shortened, value))})"
    if not isinstance(value, np.ndarray):
        return f"{value:.4g}" if isinstance(value, float) else repr(value)
    if value.ndim == 1 and value.size <= 4:
        return f"[{', '.join(shortened(number.item()) for number in value)}]"
    defined = value[~np.isnan(value)]
    values = f"from {defined.min():.4g} to {defined.max():.4g}" if defined.size else "nan"
    return f"<{list(value.shape)} {values}>"


def mean_over_targets(name: str, per_target: np.ndarray, undefined: str) -> float:
    """Return the mean of a measure over the targets for which it is not NaN, or raise InputError if there are none."""
    defined = ~np.isnan(per_target)
    if not defined.any():
        raise InputError(f"{name} is defined for none of {len(per_target)} targets: {undefined}.")
    return float(per_target[defined].mean())

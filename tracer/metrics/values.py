"""The common base of the metrics' results: short representations, and means over targets."""

from __future__ import annotations

from dataclasses import fields

import numpy as np

from tracer.errors import InputError


class Result:
    """A frozen dataclass whose representation rounds numbers and shortens arrays."""

    def __repr__(self) -> str:
        shown = (f"{field.name}={shortened(getattr(self, field.name))}" for field in fields(self))  # type: ignore[arg-type]
        return f"{type(self).__name__}({', '.join(shown)})"


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

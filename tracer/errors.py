"""The exceptions of the library; each message says what was expected, what was passed and what to do.

Every class derives from [`TracerError`][tracer.errors.TracerError] and from the built-in exception that fits, so both
``except tracer.TracerError`` and ``except ValueError`` work.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class TracerError(Exception):
    """Root of all exceptions that this library raises on purpose."""


class InputError(TracerError, ValueError):
    """An argument has a value that cannot be used."""


class InputTypeError(TracerError, TypeError):
    """An argument is of a type that cannot be used."""


class BatchError(InputError):
    """A batch, its labels or its indices do not fit each other or the model."""


class CallOrderError(TracerError, RuntimeError):
    """A method was called before the one that it needs."""


class IncompleteError(TracerError, RuntimeError):
    """Examples that a step needs are not stored yet."""


class MismatchError(TracerError, ValueError):
    """Settings, weights, examples or targets differ from those of the store."""


class NonFiniteError(TracerError, ValueError):
    """A gradient, loss or derivative is NaN or infinite; the message names the examples."""


class CheckpointError(TracerError, ValueError):
    """A checkpoint cannot be read safely or does not fit the model."""


class StoreError(TracerError, RuntimeError):
    """A directory is not a store, is damaged, or was written by a newer version."""


class GradientError(TracerError, RuntimeError):
    """Per-sample gradients cannot be computed correctly for this model."""


class RankError(TracerError, RuntimeError):
    """Another process that holds a part of the same model failed, does not answer, or makes other calls."""


class MissingDependencyError(TracerError, RuntimeError):
    """An optional package is needed and not installed or not usable."""


def nearest_name(name: object, choices: Iterable[str]) -> str:
    """Return a clause for errors that lists the choices and suggests the nearest one.

    >>> nearest_name("sketsh", ["none", "sketch"])
    "did you mean 'sketch'? Known: 'none', 'sketch'"
    """
    known = sorted(choices)
    listing = "Known: " + ", ".join(repr(choice) for choice in known) if known else "None are known"
    close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}? {listing}" if close else listing

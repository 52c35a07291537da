"""The type checker of the test run: beartype, for the annotations that state a tensor's shape and dtype.

Named in pyproject.toml (`--jaxtyping-packages`). mypy checks all other annotations, and some of them cannot be checked
at run time: protocols, names imported for type checking only.

jaxtyping wraps every function, and a wrapper binds the arguments of each call. That took more than half of the tests'
time, so functions without a shape in their annotations are left as they are.
"""

import functools
import re
from typing import Any, TypeVar

import jaxtyping
from beartype import beartype

Checked = TypeVar("Checked")

_DTYPES = [name for name, value in vars(jaxtyping).items() if hasattr(value, "dtypes")]
_SHAPED = re.compile(rf"\b(?:{'|'.join(_DTYPES)})\[")
_wrap = jaxtyping.jaxtyped


def checked(function: Checked) -> Checked:
    """Return a function that checks the shapes of its arguments and of what it returns; others stay as they are."""
    hints: dict[str, Any] = getattr(function, "__annotations__", {})
    shaped = _shaped(function)
    if not shaped or isinstance(function, type):
        return function
    function.__annotations__ = shaped
    wrapped = beartype(function)
    function.__annotations__ = wrapped.__annotations__ = hints
    return wrapped


def wrapped_if_shaped(function: Any = None, **options: Any) -> Any:
    """Apply jaxtyping's decorator to a function, method or data class that states a shape."""
    if function is None:
        return functools.partial(wrapped_if_shaped, **options)
    parts = [getattr(function, name, None) for name in ("__func__", "fget", "fset", "fdel", "__init__")]
    return _wrap(function, **options) if any(map(_shaped, [function, *parts])) else function


def _shaped(function: Any) -> dict[str, Any]:
    """The annotations that state a shape."""
    hints = getattr(function, "__annotations__", None) or {}
    return {name: hint for name, hint in hints.items() if _SHAPED.search(str(hint))}


jaxtyping.jaxtyped = wrapped_if_shaped  # what the import hook writes above each function and class

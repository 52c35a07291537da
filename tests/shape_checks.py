"""The type checker of the test run: beartype, for the annotations that state a tensor's shape and dtype.

Named in pyproject.toml (`--jaxtyping-packages`). mypy checks all other annotations, and some of them cannot be checked
at run time: protocols, names imported for type checking only.
"""

import re
from typing import Any, TypeVar

import jaxtyping
from beartype import beartype

Checked = TypeVar("Checked")

_DTYPES = [name for name, value in vars(jaxtyping).items() if hasattr(value, "dtypes")]
_SHAPED = re.compile(rf"\b(?:{'|'.join(_DTYPES)})\[")


def checked(function: Checked) -> Checked:
    """Return a function that checks the shapes of its arguments and of what it returns; others stay as they are."""
    hints: dict[str, Any] = getattr(function, "__annotations__", {})
    shaped = {name: hint for name, hint in hints.items() if _SHAPED.search(str(hint))}
    if not shaped or isinstance(function, type):
        return function
    function.__annotations__ = shaped
    wrapped = beartype(function)
    function.__annotations__ = wrapped.__annotations__ = hints
    return wrapped

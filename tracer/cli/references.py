"""Names of things in the user's code, ``package.module:name``, found from the current directory."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

from tracer.cli.app import OtherCodeError
from tracer.errors import InputError, nearest_name


def resolve(reference: str, what: str) -> Any:
    """Import what a reference names.

    Args:
        reference: ``package.module:name``, where the name may have dots too. The current directory comes first.
        what: The setting, for messages.

    Returns:
        The object.

    Raises:
        InputError: It is no reference, or there is no such module or name.
        OtherCodeError: The module failed while it was imported.

    >>> resolve("math:pi", "train")
    3.141592653589793
    """
    module_name, colon, name = reference.partition(":")
    if not (colon and module_name and name):
        raise InputError(f"{what} is {reference!r}; expected package.module:callable, such as training:build_model.")
    directory = os.getcwd()
    if directory not in sys.path:
        sys.path.insert(0, directory)
    found = _imported(module_name, reference, what)
    for part in name.split("."):
        if not hasattr(found, part):
            public = [each for each in vars(found) if not each.startswith("_")] if hasattr(found, "__dict__") else []
            raise InputError(
                f"{what} is {reference!r}, and {module_name} has no {part!r}; {nearest_name(part, public)}."
            )
        found = getattr(found, part)
    return found


def build(reference: str, what: str) -> Any:
    """Import what a reference names and, unless it is data or a module already, call it.

    Args:
        reference: ``package.module:name``.
        what: The setting, for messages.

    Returns:
        What the callable returned; or the object itself where it is a list, a tuple, has rows, or cannot be called.

    Raises:
        InputError: It is no reference, or there is no such module or name.
        OtherCodeError: The module or the call failed.
    """
    found = resolve(reference, what)
    ready = not isinstance(found, type) and (hasattr(found, "__getitem__") or hasattr(found, "parameters"))
    if ready or not callable(found):
        return found
    return _guarded(found, reference, what)


def _imported(module_name: str, reference: str, what: str) -> Any:
    """Import a module; that there is none is bad input, and what it does when it is imported is the user's."""
    try:
        return _guarded(lambda: importlib.import_module(module_name), reference, what)
    except OtherCodeError as error:
        cause = error.__cause__
        if isinstance(cause, ModuleNotFoundError) and f"{module_name}.".startswith(f"{cause.name}."):
            raise InputError(f"{what} is {reference!r}: {cause}, seen from {os.getcwd()}.") from cause
        raise


def _guarded(call: Callable[[], Any], reference: str, what: str) -> Any:
    """Call code of the user; what it raises becomes an error that says where it came from."""
    try:
        return call()
    except SystemExit as error:  # argparse, or a script without a guard
        raise OtherCodeError(
            f"{what}: {reference} ended the program (SystemExit: {error}). What runs when a module is imported, such "
            f"as the parsing of arguments, belongs under `if __name__ == '__main__':`."
        ) from error
    except Exception as error:
        raise OtherCodeError(
            f"{what}: {reference} failed with {type(error).__name__}: {error} (tracer --debug shows the traceback)"
        ) from error

"""References to the user's code, ``package.module:name``, resolved from the current directory first."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

from tracer.cli.app import UserCodeError
from tracer.errors import InputError, nearest_name


def resolve(reference: str, setting: str) -> Any:
    """Import the object of a reference; its name may have dots too."""
    module_name, colon, name = reference.partition(":")
    if not (colon and module_name and name):
        raise InputError(f"{setting} is {reference!r}; expected package.module:callable, such as training:build_model.")
    directory = os.getcwd()
    if directory not in sys.path:
        sys.path.insert(0, directory)
    found = _import(module_name, reference, setting)
    for part in name.split("."):
        if not hasattr(found, part):
            public = [each for each in vars(found) if not each.startswith("_")] if hasattr(found, "__dict__") else []
            raise InputError(
                f"{setting} is {reference!r}, and {module_name} has no {part!r}; {nearest_name(part, public)}."
            )
        found = getattr(found, part)
    return found


def build(reference: str, setting: str) -> Any:
    """Import the object of a reference and call it, unless it is already data or a module."""
    found = resolve(reference, setting)
    # A data set or a model may be callable too; it is the object itself that is meant.
    ready = not isinstance(found, type) and (hasattr(found, "__getitem__") or hasattr(found, "parameters"))
    if ready or not callable(found):
        return found
    return _guard(found, reference, setting)


def _import(module_name: str, reference: str, setting: str) -> Any:
    try:
        return _guard(lambda: importlib.import_module(module_name), reference, setting)
    except UserCodeError as error:
        cause = error.__cause__
        # A missing module is bad input; a module that fails to import, or misses another one, is the user's code.
        if isinstance(cause, ModuleNotFoundError) and f"{module_name}.".startswith(f"{cause.name}."):
            raise InputError(f"{setting} is {reference!r}: {cause} in {os.getcwd()}.") from cause
        raise


def _guard(call: Callable[[], Any], reference: str, setting: str) -> Any:
    """Call the user's code; raise `UserCodeError` for whatever it raises."""
    try:
        return call()
    except SystemExit as error:  # argparse, or a script without a guard
        raise UserCodeError(
            f"{setting}: {reference} ended the program (SystemExit: {error}). Move code that must not run on import, "
            f"such as the parsing of arguments, under `if __name__ == '__main__':`."
        ) from error
    except Exception as error:
        raise UserCodeError(
            f"{setting}: {reference} failed with {type(error).__name__}: {error} (tracer --debug shows the traceback)"
        ) from error

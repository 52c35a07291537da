"""Ids of examples as users have them: paths, lines of a file, names; each names one example."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Subset

from tracer._core.text import listing
from tracer.data.tables import is_column, is_frame, is_hugging_face
from tracer.errors import InputError, InputTypeError

ExampleId = str | int
"""The type of an id."""


def check_ids(ids: Any, count: int, name: str = "ids") -> list[ExampleId]:
    """Return ids as texts and integers; a path becomes its text.

    Args:
        ids: A sequence, array or column of texts, integers or paths.
        count: The number of examples.
        name: The argument's name, for errors.

    Raises:
        InputTypeError: If these are no texts or integers.
        InputError: If there are more or fewer than examples, or an id names several of them.

    >>> check_ids(np.array(["a.png", "b.png"]), 2)
    ['a.png', 'b.png']
    """
    if isinstance(ids, (str, bytes, Mapping)) or not isinstance(ids, Iterable):
        raise InputTypeError(f"{name} is {type(ids).__name__}; expected a text or an integer for each example.")
    found = [_plain(each, name) for each in (ids.tolist() if hasattr(ids, "tolist") else ids)]
    if len(found) != count:
        raise InputError(f"{name} has {len(found)} values; expected {count}, one for each example.")
    seen: dict[str, int] = {}
    repeated = [
        f"{each!r} ({seen[str(each)]} and {row})" for row, each in enumerate(found) if _repeats(seen, each, row)
    ]
    if repeated:
        raise InputError(
            f"{name} names several examples by one id: {listing(repeated, 3)}; expected another id for each, for "
            f"example the document with the number of its part. Sum scores over documents by train_groups=."
        )
    return found


def _repeats(seen: dict[str, int], value: ExampleId, row: int) -> bool:
    return seen.setdefault(str(value), row) != row


def _plain(value: Any, name: str) -> ExampleId:
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if isinstance(value, (np.generic,)):
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise InputTypeError(f"{name} holds {value!r}, a {type(value).__name__}; expected texts, integers or paths.")
    return str(value) if isinstance(value, str) else value


def find_ids(ids: Any, data: Any, count: int, name: str = "ids") -> list[ExampleId] | None:
    """Return the ids of examples: as given, or a column or attribute of the data, or the index of a table.

    Args:
        ids: A sequence, or the name of a column or attribute of the data; None: the index of a DataFrame or Series
            that names each example, if it does not just count them.
        data: The examples, as `tracer.attribute` takes them.
        count: Their number.
        name: The argument's name, for errors.

    Returns:
        The ids, or None if there are none.

    Raises:
        InputTypeError: If these are no texts or integers.
        InputError: If there is no such column, or ids do not name each example once.
    """
    if ids is None:
        return _index_of(data, count)
    if not isinstance(ids, str):
        return check_ids(ids, count, name)
    values = _column_of(data, ids)
    if values is None:
        raise InputError(
            f"{name}={ids!r} is neither a column nor an attribute of the data, a {type(data).__name__}; pass the ids "
            f"themselves, one for each example."
        )
    values = [each[0] if isinstance(each, tuple) and each else each for each in values]  # (path, class) of torchvision
    return check_ids(values, count, f"{name}={ids!r}")


def _index_of(data: Any, count: int) -> list[ExampleId] | None:
    """Return the index of a table, unless it counts or does not tell examples apart."""
    tables = [part for part in (data if isinstance(data, tuple) else (data,)) if is_frame(part) or is_column(part)]
    index = getattr(tables[0], "index", None) if tables else None
    if index is None or not hasattr(index, "tolist"):
        return None
    values = index.tolist()
    if values == list(range(count)):
        return None
    try:
        return check_ids(values, count)
    except (InputError, InputTypeError):
        return None


def _column_of(data: Any, name: str) -> Sequence[Any] | None:
    """Return a column or attribute of data, or of what they wrap."""
    if isinstance(data, DataLoader):
        return _column_of(data.dataset, name)
    if isinstance(data, Subset):
        found = _column_of(data.dataset, name)
        return None if found is None else [found[index] for index in data.indices]
    tables = [part for part in (data if isinstance(data, tuple) else (data,)) if is_frame(part)]
    for table in tables:
        if name in list(table.columns):
            return table[name].to_list()
        if name == "index" and hasattr(table, "index"):
            return table.index.tolist()
    if is_hugging_face(data) and name in data.column_names:
        return list(data[name])
    if isinstance(data, list) and data and all(isinstance(each, Mapping) and name in each for each in data):
        return [each[name] for each in data]
    found = getattr(data, name, None)
    return None if found is None or callable(found) else list(found)

"""The ids of a store's examples: asked for, given, and put beside the strongest training examples."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from tracer.data.example_ids import check_ids
from tracer.errors import InputError, nearest_name
from tracer.store import Store
from tracer.types import TopK

if TYPE_CHECKING:
    from tracer.api.store_reader import StoreReader


def ids(_reader: StoreReader, exp_name: str | None = None) -> list[str | int] | None:
    """Return the ids of examples, as they were given.

    Args:
        exp_name: The name of targets. Default: the training examples.

    Returns:
        The id of each example, or its index if it has none; None if none has one.

    Raises:
        InputError: If there are no targets of this name.
    """
    return _reader.store.ids(exp_name).listed(_size(_reader.store, exp_name))


def set_ids(_reader: StoreReader, ids: Any, exp_name: str | None = None) -> None:
    """Give all training examples, or all targets, their ids, in place of earlier ones.

    Args:
        ids: A text, integer or path for each example, each only once.
        exp_name: The name of targets. Default: the training examples.

    Raises:
        InputError: If there are no targets of this name, or ids are not as many as examples, or not distinct.
        InputTypeError: If an id is no text, integer or path.
    """
    found = check_ids(ids, _size(_reader.store, exp_name))
    _reader.process.wait()
    _reader.process.rank_zero_only(lambda: _reader.store.ids(exp_name).replace(dict(enumerate(found))))


def with_ids(top: TopK, store: Store, exp_name: str | None) -> TopK:
    """Return the strongest training examples with their ids and, unless they are not stored, those of targets."""
    train = store.ids().known()
    targets = None if exp_name is None else store.ids(exp_name).listed(len(top.indices))
    names: Any = None
    if train:
        names = np.empty(top.indices.size, dtype=object)
        names[:] = [train.get(row, row) for row in top.indices.ravel().tolist()]
        names = names.reshape(top.indices.shape)
    return TopK(*top, ids=names, target_ids=targets)


def example_index(store: Store, example: int | str, exp_name: str | None) -> int:
    """Return the index of an example by its index or id; an integer is an index."""
    size, what = store.num_rows(exp_name), "training example" if exp_name is None else "target"
    if isinstance(example, str):
        rows = {str(name): row for row, name in store.ids(exp_name).known().items()}
        if example not in rows:
            raise InputError(f"there is no {what} with the id {example!r}; {nearest_name(example, list(rows)[:1000])}.")
        return rows[example]
    if not 0 <= example < size:
        raise InputError(f"there is no {what} {example}; expected an index from 0 to {size - 1}, or an id.")
    return int(example)


def _size(store: Store, exp_name: str | None) -> int:
    known = store.catalog.exp_names()
    if exp_name is not None and exp_name not in known:
        raise InputError(f"exp_name={exp_name!r} was never scored; {nearest_name(exp_name, known)}.")
    return store.num_rows(exp_name)

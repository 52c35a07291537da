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
    names = None
    if train:
        names = np.empty(top.indices.shape, dtype=object)
        names.flat = [train.get(row, row) for row in top.indices.ravel().tolist()]
    return TopK(*top, ids=names, target_ids=targets)


def _size(store: Store, exp_name: str | None) -> int:
    known = store.catalog.exp_names()
    if exp_name is not None and exp_name not in known:
        raise InputError(f"exp_name={exp_name!r} was never scored; {nearest_name(exp_name, known)}.")
    return store.num_rows(exp_name)

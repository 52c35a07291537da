"""Passes of `attribute` over examples and checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from tracer._core.progress import tqdm
from tracer.api.tracer import Tracer
from tracer.data.datasets import DataSource
from tracer.data.halving import Halving
from tracer.types import Checkpoint


def settle(tracer: Tracer, step: Callable[[], None]) -> None:
    """Run a step, and again as long as what was computed is forgotten in it."""
    before = -1
    while before != tracer._factory.num_restarts:
        before = tracer._factory.num_restarts
        step()


def own_share(tracer: Tracer, source: DataSource, rows: np.ndarray) -> np.ndarray:
    """Return this process's share of some indices."""
    return rows[np.isin(rows, np.asarray(tracer.shard(range(len(source))).indices), assume_unique=True)]


def feed(step: Callable[..., None], source: DataSource, rows: np.ndarray, bar_options: Mapping[str, Any]) -> None:
    """Pass the missing examples to the tracer, batch by batch, with a progress bar."""
    if len(rows) == 0:
        return
    initial = len(source) - len(rows)
    run = Halving(step)
    with tqdm(total=len(source), initial=initial, **bar_options) as bar:
        for batch, inds in source.batches(rows):
            run(batch, inds)
            bar.update(int(np.isin(inds, rows, assume_unique=True).sum()))


def checkpoint_groups(pairs: Iterable[tuple[Checkpoint, float | None]]) -> Iterator[list[tuple[int, tuple]]]:
    """Yield the numbered checkpoints that can be loaded again: those of a list together, of an iterator each alone."""
    if isinstance(pairs, list):
        yield list(enumerate(pairs))
        return
    number = 0
    for pair in pairs:
        yield [(number, pair)]  # enumerate would hold the first one
        number += 1

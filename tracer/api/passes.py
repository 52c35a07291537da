"""Passes of `attribute` over all examples at all checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from tracer._core.progress import tqdm
from tracer._core.validation import bar_disabled
from tracer.api.tracer import Tracer
from tracer.data.datasets import DataSource
from tracer.data.halving import Halving
from tracer.errors import InputError
from tracer.gradients.preconditioning import KRONECKER
from tracer.types import Checkpoint


@dataclass(frozen=True)
class Passes:
    """Passes over training examples and targets that compute what a store lacks.

    Attributes:
        tracer: Computes and stores.
        train: The training examples.
        targets: The targets; none if there are none yet.
        exp_name: The name of the targets.
        fits_kernel: Whether the curvature of all outputs is computed; see `Tracer.fit_kernel`.
    """

    tracer: Tracer
    train: DataSource
    targets: DataSource
    exp_name: str
    fits_kernel: bool

    def run(self, pairs: Iterable[tuple[Checkpoint, float | None]]) -> list[int]:
        """Compute everything at all checkpoints, and return their numbers."""
        tracer, chosen, known = self.tracer, [], isinstance(pairs, list)
        for group in _groups(pairs):
            self._settle(partial(self._featurize_and_score, group, f"/{len(group)}" if known else ""))
            chosen += [model_id for model_id, _ in group]
            if not known:
                tracer._sources.forget(chosen[-1])
        if self._stores_features:
            tracer.flush()
            tracer.process.wait()
        if tracer._factory.num_restarts and not known:
            raise InputError(
                "Gradients of checkpoints that the iterator has passed turned out to be wrong and were forgotten (see "
                "the log): call attribute again with the same save_dir and checkpoints, and they are computed again."
            )
        return chosen

    @property
    def _stores_features(self) -> bool:
        return self.tracer.store.manifest.feature_storage.stores_features

    def _to_pass(self, model_id: int, exp_name: str | None = None) -> np.ndarray:
        """Return the missing examples; at the first checkpoint all, since those in the store may be others by now."""
        tracer, factory = self.tracer, self.tracer._factory
        collected = exp_name is None and tracer.store.manifest.is_collected
        if exp_name in factory.compared or collected or not factory.settings.check_rows:
            return tracer.remaining(model_id, exp_name)
        factory.compared.add(exp_name)
        return np.arange(tracer.store.num_rows(exp_name))

    def _featurize(self, group: list, of: str) -> None:
        tracer = self.tracer
        for model_id, (checkpoint, learning_rate) in group:
            tracer.load_checkpoint(checkpoint, model_id=model_id, learning_rate=learning_rate)
            if tracer._factory.settings.preconditioner in KRONECKER:
                tracer.fit_curvature(self.train)
            if self._stores_features:
                self._feed(tracer.featurize, self.train, self._to_pass(model_id), f"featurize {model_id + 1}{of}")
            else:
                tracer.score_exactly(checkpoint, model_id, self.train, self.targets, self.exp_name)

    def _featurize_and_score(self, group: list, of: str) -> None:
        tracer, count = self.tracer, len(self.targets)
        self._settle(partial(self._featurize, group, of))
        tracer.finalize_features([model_id for model_id, _ in group])
        begun = tracer._factory.num_restarts
        for model_id, (checkpoint, learning_rate) in group if self._stores_features else ():
            if count:
                tracer.start_scoring_checkpoint(checkpoint, model_id, count, self.exp_name)
                rows = self._to_pass(model_id, self.exp_name)
                self._feed(tracer.score, self.targets, rows, f"score {model_id + 1}{of}")
            if self.fits_kernel:
                if not count:
                    tracer.load_checkpoint(checkpoint, model_id, learning_rate)
                tracer.fit_kernel(self.train)
            if tracer._factory.num_restarts > begun:
                return

    def _settle(self, step: Callable[[], None]) -> None:
        """Run a step, and again as long as what was computed is forgotten in it."""
        before = -1
        while before != self.tracer._factory.num_restarts:
            before = self.tracer._factory.num_restarts
            step()

    def _feed(self, step: Callable[..., Any], source: DataSource, rows: np.ndarray, description: str) -> None:
        """Pass this process's share of some examples to the tracer, batch by batch, with a progress bar."""
        own = np.asarray(self.tracer.shard(range(len(source))).indices)
        rows = rows[np.isin(rows, own, assume_unique=True)]
        if len(rows) == 0:
            return
        run, disable = Halving(step), bar_disabled(self.tracer._factory.settings.progress)
        initial = len(source) - len(rows)
        with tqdm(total=len(source), initial=initial, unit="row", desc=description, disable=disable) as bar:
            for batch, inds in source.batches(rows):
                run(batch, inds)
                bar.update(int(np.isin(inds, rows, assume_unique=True).sum()))


def _groups(pairs: Iterable[tuple[Checkpoint, float | None]]) -> Iterator[list[tuple[int, tuple]]]:
    """Yield the numbered checkpoints that can be loaded again: those of a list together, of an iterator each alone."""
    if isinstance(pairs, list):
        yield list(enumerate(pairs))
        return
    number = 0
    for pair in pairs:
        yield [(number, pair)]  # enumerate would hold the first one
        number += 1

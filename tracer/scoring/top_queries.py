"""Top-k queries: the strongest training examples of stored targets, read if they are known, resumed after a crash."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tracer.errors import StoreError
from tracer.scoring.feature_tables import TrainIndices
from tracer.scoring.streaming import TileScorer, stream_topk
from tracer.scoring.topk import RunningTopK
from tracer.store import Store
from tracer.store.revisions import Revisions, is_superseded, remove_result
from tracer.store.topk_parts import Part, list_parts, load_part, save_part, usable
from tracer.types import TopK

logger = logging.getLogger("tracer")

SAVE_SECONDS = 10.0
"""How much work a killed process loses at most."""


def choice_id(indices: TrainIndices, num_rows: int) -> dict[str, Any] | None:
    """Return JSON values that identify a choice of training examples; None for all of them.

    >>> choice_id(range(5), 5), choice_id(np.arange(1, 3), 5)
    (None, {'start': 1, 'stop': 3})
    """
    if len(indices) == num_rows:
        return None
    first, last = int(indices[0]), int(indices[-1])
    if last - first + 1 == len(indices):
        return {"start": first, "stop": last + 1}
    digest = hashlib.sha256(np.asarray(indices, "<i8").tobytes()).hexdigest()
    return {"count": len(indices), "sha256": digest}


@dataclass(frozen=True)
class TopKQuery:
    """A search for the k strongest training examples of stored targets, at both ends.

    A *part* is the selection among consecutive training examples; parts that cover all of them are the result.
    """

    store: Store
    exp_name: str
    inputs: dict[str, Any]  # what decides scores besides the estimator's name and the tables, JSON values
    revisions: Revisions
    scorer: TileScorer
    indices: TrainIndices
    k: int
    progress: bool | None = None

    def result(self) -> tuple[TopK, TopK]:
        """Return proponents and opponents, ``[M, k]`` each, after computing what no part covers."""
        self.compute([(0, self.scorer.num_rows)])
        parts = list_parts(self._directory)
        loaded = self._load(usable(parts, self._all_inputs, self.revisions))
        if self._count(self._gaps([part for part, _ in loaded])):  # a part was removed just now, or was damaged
            return self.result()
        # ties go to the lower index, so that the merged result is the same whatever the parts
        merged = [RunningTopK(self.scorer.num_targets, self.k, largest) for largest in (True, False)]
        for _, ends in loaded:
            for running, found in zip(merged, ends, strict=True):
                running.merge(found)
        proponents, opponents = (running.result() for running in merged)
        used = {part.path for part, _ in loaded}
        if len(loaded) > 1 or any(self._is_obsolete(part) for part, _ in loaded):
            used = {self._save(0, self.scorer.num_rows, (proponents, opponents)).path}
        for part in parts:
            if part.path not in used and self._is_obsolete(part):
                remove_result(part.path)
        self.store.results.remove_superseded(self._directory)
        return proponents, opponents

    def compute(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Compute and store what no part covers within ranges ``(start, stop)`` of training examples."""
        parts = self._usable_parts()
        for start, stop in self._gaps(parts):
            for first, last in ranges:
                if max(start, first) < min(stop, last):
                    self._compute_part(max(start, first), min(stop, last), parts)

    @property
    def num_missing(self) -> int:
        """The number of training examples to select from that no part covers yet."""
        return self._count(self._gaps(self._usable_parts()))

    @property
    def _directory(self) -> Any:
        return self.store.results.top_path(self.exp_name, self.scorer.estimate.name)

    @property
    def _all_inputs(self) -> dict[str, Any]:
        choice = choice_id(self.indices, self.scorer.num_rows)
        return {**self.inputs, "estimator": self.scorer.estimate.name, "k": self.k, "rows": choice}

    def _usable_parts(self) -> list[Part]:
        return usable(list_parts(self._directory), self._all_inputs, self.revisions)

    def _gaps(self, parts: Sequence[Part]) -> list[tuple[int, int]]:
        """Return the ranges between parts, ascending."""
        edges = [0, *(edge for part in parts for edge in (part.start, part.stop)), self.scorer.num_rows]
        return [(start, stop) for start, stop in zip(edges[::2], edges[1::2], strict=True) if start < stop]

    def _within(self, start: int, stop: int) -> TrainIndices:
        """Return those of the training examples to select from that are in a range."""
        if isinstance(self.indices, range):
            first = max(self.indices.start, start)
            return range(first, max(min(self.indices.stop, stop), first))
        first, last = np.searchsorted(self.indices, [start, stop])
        return self.indices[first:last]

    def _count(self, ranges: Sequence[tuple[int, int]]) -> int:
        return sum(len(self._within(*each)) for each in ranges)

    def _load(self, parts: Sequence[Part]) -> list[tuple[Part, tuple[TopK, TopK]]]:
        """Read parts; one that another process has removed is left out, and one that is damaged is removed."""
        loaded = []
        for part in parts:
            shape = self.scorer.num_targets, min(part.inputs["k"], self._count([(part.start, part.stop)]))
            try:
                loaded.append((part, load_part(part, shape)))
            except FileNotFoundError:
                continue
            except StoreError as error:
                logger.warning("computing %s again: %s", part.path, error)
                remove_result(part.path)
        return loaded

    def _compute_part(self, start: int, stop: int, parts: Sequence[Part]) -> None:
        """Compute a part, saved every `SAVE_SECONDS` as one with the part before it, so that parts do not pile up."""
        indices = self._within(start, stop)
        if not len(indices):
            return
        before = self._load([part for part in parts if part.stop == start])
        last, begin = before[0] if before else (None, None)
        first = start if last is None else last.start
        saved = time.monotonic()
        aligned = len(self.indices) == self.scorer.num_rows
        stream = stream_topk(self.scorer, indices, self.k, self.progress, begin=begin, aligned=aligned)
        for seen, proponents, opponents in stream:
            if seen == len(indices) or time.monotonic() - saved >= SAVE_SECONDS:
                reached = stop if seen == len(indices) else int(indices[seen])
                part = self._save(first, reached, (proponents.result(), opponents.result()))
                if last is not None and self._is_obsolete(last):
                    remove_result(last.path)
                last, saved = part, time.monotonic()

    def _save(self, start: int, stop: int, ends: tuple[TopK, TopK]) -> Part:
        return save_part(self._directory, start, stop, self._all_inputs, ends, self.revisions)

    def _is_obsolete(self, part: Part) -> bool:
        """Tell whether ours says at least as much as a part, or its tables have changed."""
        ours = {**self._all_inputs, "revisions": self.revisions.tables}
        covered = {**part.inputs, "k": self.k} == ours and part.inputs["k"] <= self.k
        return covered or is_superseded(self.store.path, part.inputs)

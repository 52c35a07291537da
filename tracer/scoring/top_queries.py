"""The strongest train rows of stored targets: read where they are known, continued where a run was killed."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tracer.scoring.estimators import Estimate
from tracer.scoring.streaming import Band, CheckpointPair, select_rows
from tracer.scoring.topk import RunningTopK
from tracer.store import Store
from tracer.store.topk_parts import Part, list_parts, load_part, remove_part, save_part, usable
from tracer.types import TopK

SAVE_SECONDS = 10.0
"""How much work a killed process may lose."""


def rows_identity(rows: Band, num_rows: int) -> dict[str, Any] | None:
    """Return what tells a choice of train rows from others, as JSON values; None for all of them.

    >>> rows_identity(range(5), 5), rows_identity(np.arange(1, 3), 5)
    (None, {'start': 1, 'stop': 3})
    """
    if len(rows) == num_rows:
        return None
    first, last = int(rows[0]), int(rows[-1])
    if last - first + 1 == len(rows):
        return {"start": first, "stop": last + 1}
    digest = hashlib.sha256(np.asarray(rows, "<i8").tobytes()).hexdigest()
    return {"count": len(rows), "sha256": digest}


@dataclass(frozen=True)
class TopQuestion:
    """Which train rows are strongest, at both ends.

    Attributes:
        store: Where the answer is kept.
        exp_name: The name of the targets.
        estimate: What scores are to say.
        inputs: Everything else that decides the answer, JSON values; ``k`` is added.
        pairs: The tables of each checkpoint.
        rows: The train rows that count.
        k: How many for each target and end.
        device: Where to multiply.
        memory_bytes: How much to hold, about.
        progress: Show a bar; None: on a terminal only.
    """

    store: Store
    exp_name: str
    estimate: Estimate
    inputs: dict[str, Any]
    pairs: Sequence[CheckpointPair]
    rows: Band
    k: int
    device: torch.device
    memory_bytes: int
    progress: bool | None = None

    def answer(self) -> tuple[TopK, TopK]:
        """Return proponents and opponents, ``[M, k]`` each; what no part covers is computed."""
        self.cover([(0, self._num_rows)])
        directory = self.store.selections_path(self.exp_name, self.estimate.name)
        parts = list_parts(directory)
        loaded = self._load(usable(parts, self._inputs))
        if self._count(self._gaps([part for part, _ in loaded])):  # another process removed a part just now
            return self.answer()
        merged = [RunningTopK(self.pairs[0].targets.num_rows, self.k, largest) for largest in (True, False)]
        for _, ends in loaded:
            for running, found in zip(merged, ends, strict=True):
                running.merge(found)
        proponents, opponents = (running.result() for running in merged)
        kept = {part.path for part, _ in loaded}
        if len(loaded) > 1:
            kept = {self._save(0, self._num_rows, (proponents, opponents)).path}
        for part in parts:
            if part.path not in kept and self._is_behind(part):
                remove_part(part)
        return proponents, opponents

    def cover(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Compute and store what is not known yet of some train rows.

        Args:
            ranges: Train rows ``(start, stop)``.
        """
        parts = usable(list_parts(self.store.selections_path(self.exp_name, self.estimate.name)), self._inputs)
        for start, stop in self._gaps(parts):
            for first, last in ranges:
                if max(start, first) < min(stop, last):
                    self._compute(max(start, first), min(stop, last), parts)

    @property
    def num_missing(self) -> int:
        """How many of the train rows that count no part covers yet."""
        parts = usable(list_parts(self.store.selections_path(self.exp_name, self.estimate.name)), self._inputs)
        return self._count(self._gaps(parts))

    @property
    def _num_rows(self) -> int:
        return self.pairs[0].train.num_rows

    @property
    def _inputs(self) -> dict[str, Any]:
        identity = rows_identity(self.rows, self._num_rows)
        return {**self.inputs, "estimator": self.estimate.name, "k": self.k, "rows": identity}

    def _gaps(self, parts: Sequence[Part]) -> list[tuple[int, int]]:
        """Return the rows between parts, ascending."""
        edges = [0, *(edge for part in parts for edge in (part.start, part.stop)), self._num_rows]
        return [(start, stop) for start, stop in zip(edges[::2], edges[1::2], strict=True) if start < stop]

    def _between(self, start: int, stop: int) -> Band:
        """Return the rows that count among consecutive ones."""
        if isinstance(self.rows, range):
            return range(max(self.rows.start, start), max(min(self.rows.stop, stop), max(self.rows.start, start)))
        first, last = np.searchsorted(self.rows, [start, stop])
        return self.rows[first:last]

    def _count(self, ranges: Sequence[tuple[int, int]]) -> int:
        return sum(len(self._between(*each)) for each in ranges)

    def _load(self, parts: Sequence[Part]) -> list[tuple[Part, tuple[TopK, TopK]]]:
        """Read parts; one that another process has removed is left out."""
        loaded = ((part, load_part(part)) for part in parts)
        return [(part, ends) for part, ends in loaded if ends is not None]

    def _compute(self, start: int, stop: int, parts: Sequence[Part]) -> None:
        """Compute a part and save it now and then, as one with the part before it."""
        rows = self._between(start, stop)
        if not len(rows):
            return
        before = self._load([part for part in parts if part.stop == start])
        begin = before[0][1] if before else None
        first = before[0][0].start if before else start
        last = before[0][0] if before else None
        saved = time.monotonic()
        for seen, proponents, opponents in self._selections(rows, begin):
            if seen == len(rows) or time.monotonic() - saved >= SAVE_SECONDS:
                reached = stop if seen == len(rows) else int(rows[seen])
                part = self._save(first, reached, (proponents.result(), opponents.result()))
                if last is not None and self._is_behind(last):
                    remove_part(last)
                last, saved = part, time.monotonic()

    def _selections(
        self, rows: Band, begin: tuple[TopK, TopK] | None
    ) -> Iterator[tuple[int, RunningTopK, RunningTopK]]:
        return select_rows(
            self.pairs,
            self.estimate,
            rows,
            self.k,
            self.device,
            self.progress,
            memory_bytes=self.memory_bytes,
            begin=begin,
            on_grid=len(self.rows) == self._num_rows,
        )

    def _save(self, start: int, stop: int, ends: tuple[TopK, TopK]) -> Part:
        directory = self.store.selections_path(self.exp_name, self.estimate.name)
        return save_part(directory, start, stop, self._inputs, ends)

    def _is_behind(self, part: Part) -> bool:
        """Tell whether a part has no more to say than ours, or comes from tables that are gone."""
        inputs = self._inputs
        same = {**part.inputs, "k": self.k} == inputs and part.inputs["k"] <= self.k
        gone = part.inputs["model_ids"] == inputs["model_ids"] and part.inputs["tables"] != inputs["tables"]
        return same or gone

"""Everything that is computed from the tables of a store: scores, cosines, top-k parts, kernels.

A result of other inputs has another path (see `tracer.store.revisions`), so nothing is ever written over. Results whose
tables have changed since are removed when newer ones are complete. A process that still has such a result open keeps
what it has mapped, and gets a `StoreError` for everything else.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from tracer._core.files import disk_errors
from tracer.errors import CallOrderError, StoreError
from tracer.store.arrays.metadata import NODE, child_nodes, read_document
from tracer.store.arrays.store_path import StorePath
from tracer.store.manifest import json_value
from tracer.store.paths import ensure_groups
from tracer.store.revisions import Revisions, is_superseded, remove_result, same_but_rows
from tracer.store.score_array import ScoreArray, open_scores

if TYPE_CHECKING:
    from tracer.store.store import Store

logger = logging.getLogger("tracer")


class ComputedResults:
    """The part of a store that is computed from its tables, and computed again when they change."""

    def __init__(self, store: Store) -> None:
        self._store, self._catalog = store, store.catalog

    def scores(
        self,
        exp_name: str,
        estimator: str,
        shape: tuple[int, int],
        inputs: Mapping[str, Any],
        *,
        tile_rows: int | None = None,
        dtype: str | None = None,
        revisions: Revisions | None = None,
    ) -> ScoreArray:
        """Open scores ``[N, M]`` for writing: existing ones of the same inputs, else new ones (see `open_scores`)."""
        parent = self._group(self._catalog.scores_path(exp_name, estimator))
        return self._open(parent, shape, inputs, tile_rows, dtype, revisions)

    def _open(
        self,
        parent: StorePath,
        shape: tuple[int, int],
        inputs: Mapping[str, Any],
        tile_rows: int | None,
        dtype: str | None,
        revisions: Revisions | None,
    ) -> ScoreArray:
        if revisions is not None:
            inputs = {**inputs, "revisions": revisions.tables}
        chunk_rows = self._chunk_rows(shape[1])
        for earlier in self._earlier_scores(parent, json_value(dict(inputs), "inputs")):
            tile_rows = earlier.tile_rows  # so that its tiles can be adopted
        return open_scores(
            parent, shape, inputs, tile_rows=tile_rows, chunk_rows=chunk_rows, dtype=dtype, revisions=revisions
        )

    def adopt(self, scores: ScoreArray, process: tuple[int, int] = (0, 1)) -> None:
        """Copy the tiles of this process from earlier scores if none of their training examples has changed since."""
        if scores.complete:
            return
        for earlier in self._earlier_scores(scores.path.parent, scores.inputs):
            scores.adopt(earlier, scores.remaining(process))

    def _earlier_scores(self, parent: StorePath, inputs: Mapping[str, Any]) -> Iterator[ScoreArray]:
        """Yield scores that differ at most in the revisions of their training examples."""
        for path, known in stored_inputs(parent):
            if known != inputs and same_but_rows(known, inputs):
                with contextlib.suppress(StoreError):  # damaged, or just removed by another process
                    yield ScoreArray(path)

    def read_scores(self, exp_name: str, estimator: str) -> ScoreArray:
        """Open existing scores, whatever their inputs and preferably complete ones, or raise `CallOrderError`."""
        path = self._catalog.scores_path(exp_name, estimator)
        found = [ScoreArray(path / key) for key in child_nodes(path)]
        if not found:
            known = self._catalog.score_names(exp_name)
            raise CallOrderError(
                f"{self._catalog.root} has no {estimator!r} scores of {exp_name!r}, only {known}: finalize them first"
            )
        return max(found, key=lambda scores: scores.complete)

    def cosines(self, exp_name: str, revisions: Revisions, *, earlier: bool = False) -> list[tuple[int, ScoreArray]]:
        """Open the blocks of cosines ``[N, targets]`` at a checkpoint, each with its first target.

        Args:
            exp_name: The target set.
            revisions: The tables of the checkpoint.
            earlier: Whether blocks of other revisions of the training examples count too.

        Returns:
            Blocks that follow one another from target 0 on; of those that begin with a target, the most complete one.
        """
        path = self._catalog.cosines_path(exp_name, revisions.model_ids[0])
        inputs = {"revisions": revisions.tables, "targets": None}
        known: dict[int, list[ScoreArray]] = {}
        for key, described in stored_inputs(path):
            own = {**described, "targets": None}
            if own == inputs or (earlier and same_but_rows(own, inputs)):
                with contextlib.suppress(StoreError, LookupError, TypeError):  # damaged: `cosine_block` mends it
                    block = ScoreArray(key)
                    block.forget_damaged()
                    known.setdefault(described["targets"][0], []).append(block)
        found, first = [], 0
        while first in known:
            block = max(known[first], key=lambda block: (block.tile_done.mean(), block.shape[1]))
            found.append((first, block))
            first += block.shape[1]
        return found

    def cosine_block(
        self, exp_name: str, first: int, num_targets: int, revisions: Revisions, *, tile_rows: int
    ) -> ScoreArray:
        """Open a block of cosines from target ``first`` on, with what earlier ones have of the same examples."""
        parent = self._group(self._catalog.cosines_path(exp_name, revisions.model_ids[0]))
        inputs = {"targets": [first, first + num_targets]}
        shape = (self._store.manifest.train_set_size, num_targets)
        block = self._open(parent, shape, inputs, tile_rows, None, revisions)
        self.adopt(block)
        return block

    def top_path(self, exp_name: str, estimator: str) -> StorePath:
        """Return the path of a target set's top-k parts, after making it a zarr group."""
        return self._group(self._catalog.top_path(exp_name, estimator))

    def kernel_path(self, model_id: int, weighting: str) -> StorePath:
        """Return the path of a checkpoint's kernels of a weighting, after making it a zarr group."""
        return self._group(self._catalog.kernel_path(model_id, weighting))

    def remove_superseded(self, parent: StorePath) -> None:
        """Remove results whose tables have changed since."""
        for path, inputs in stored_inputs(parent):
            if is_superseded(self._catalog.root, inputs):
                logger.info("removing %s, whose tables have changed", path)
                with contextlib.suppress(StoreError):  # Windows keeps a file that another process has mapped
                    remove_result(path)

    def _group(self, path: StorePath) -> StorePath:
        with disk_errors(path):
            ensure_groups(self._catalog.root, path)
        return path

    def _chunk_rows(self, num_targets: int) -> int | None:
        """Return the training rows of a file of scores; None for one file, which one process writes as one map."""
        layout = self._store.manifest.layout
        chunk_rows, limit = layout["chunk_rows"], self._catalog.root.score_chunk_bytes
        if limit is not None:
            return max(1, min(chunk_rows, limit // (4 * max(1, num_targets))))
        return None if layout["processes"] == 1 else chunk_rows


def stored_inputs(parent: StorePath) -> Iterator[tuple[StorePath, dict[str, Any]]]:
    """Yield the path and the inputs of each readable result below a group."""
    for key in child_nodes(parent):
        with contextlib.suppress(FileNotFoundError, StoreError, KeyError, TypeError):
            yield parent / key, dict(read_document(parent / key / NODE)["attributes"]["inputs"])

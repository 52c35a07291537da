"""Everything that is computed from the tables of a store: scores, cosines, top-k parts, kernels."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np

from tracer._core.files import disk_errors
from tracer._core.validation import check_integer
from tracer.errors import CallOrderError, StoreError
from tracer.store.arrays.store_path import StorePath
from tracer.store.catalog import Catalog
from tracer.store.manifest import Manifest, json_value
from tracer.store.paths import ensure_groups, numbered_nodes
from tracer.store.score_array import ScoreArray, open_scores, remove_scores

logger = logging.getLogger("tracer")


class ComputedResults:
    """The part of a store that is computed from its tables, and computed again when they change."""

    def __init__(self, catalog: Catalog, manifest: Manifest) -> None:
        self._catalog, self._manifest = catalog, manifest

    def scores(
        self,
        exp_name: str,
        estimator: str,
        shape: tuple[int, int],
        inputs: Mapping[str, Any],
        *,
        tile_rows: int | None = None,
        dtype: str | None = None,
        may_replace: bool = True,
    ) -> ScoreArray:
        """Open scores ``[N, M]`` for writing: existing ones of the same inputs, else new ones (see `open_scores`)."""
        path = self._catalog.scores_path(exp_name, estimator)
        with disk_errors(path):
            ensure_groups(self._catalog.root, path.parent)
        return open_scores(
            path,
            shape,
            inputs,
            tile_rows=tile_rows,
            chunk_rows=self._chunk_rows(shape[1]),
            dtype=dtype,
            may_replace=may_replace,
        )

    def read_scores(self, exp_name: str, estimator: str) -> ScoreArray:
        """Open existing scores, whatever their inputs, or raise `CallOrderError`."""
        path, known = self._catalog.scores_path(exp_name, estimator), self._catalog.score_names(exp_name)
        if estimator not in known:
            raise CallOrderError(
                f"{self._catalog.root} has no {estimator!r} scores of {exp_name!r}, only {known}: finalize them first"
            )
        return ScoreArray(path)

    def cosines(self, exp_name: str, model_id: int) -> list[tuple[int, ScoreArray]]:
        """Open the blocks of cosines ``[N, targets]`` at a checkpoint, each with its first target, ascending."""
        path, found = self._catalog.cosines_path(exp_name, model_id), []
        for first in numbered_nodes(path):
            try:
                found.append((first, ScoreArray(path / str(first))))
            except StoreError as error:  # a crash left it half made: `cosine_block` replaces it
                logger.info("computing %s again: %s", path / str(first), error)
        return found

    def cosine_block(
        self, exp_name: str, model_id: int, first: int, num_targets: int, inputs: Mapping[str, Any], *, tile_rows: int
    ) -> ScoreArray:
        """Open a block of cosines from target ``first`` on: an existing one of the same inputs, or a new one."""
        parent = self._catalog.cosines_path(exp_name, model_id)
        with disk_errors(parent):
            ensure_groups(self._catalog.root, parent)
        known = dict(self.cosines(exp_name, model_id))
        if first not in known or known[first].inputs != json_value(dict(inputs), "inputs"):
            for start, block in known.items():
                if start >= first:  # later blocks begin where this one ended, and the new one may have another size
                    block.close()
                    remove_scores(block.path)
        shape = (self._manifest.train_set_size, num_targets)
        path = parent / str(check_integer(first, "first", 0))
        return open_scores(path, shape, inputs, tile_rows=tile_rows, chunk_rows=self._chunk_rows(num_targets))

    def invalidate(self, rows: np.ndarray, exp_name: str | None = None) -> None:
        """Mark everything computed from some training examples, or targets of a set, as not done."""
        root = self._catalog.root
        if exp_name is None:
            with disk_errors(root):
                (root / "kernels").remove()
        for name in [exp_name] if exp_name else self._catalog.result_names():
            with disk_errors(root):
                (root / "top" / name).remove()
            blocks = [block for number in self._catalog.cosine_ids(name) for _, block in self.cosines(name, number)]
            for scores in [*self._readable_scores(name), *blocks]:
                scores.unmark_rows(rows) if exp_name is None else scores.unmark(np.arange(scores.num_tiles))
                scores.close()

    def _readable_scores(self, exp_name: str) -> list[ScoreArray]:
        found = []
        for estimator in self._catalog.score_names(exp_name):
            try:
                found.append(self.read_scores(exp_name, estimator))
            except StoreError as error:  # damaged scores already count as not done
                logger.info("%s", error)
        return found

    def top_path(self, exp_name: str, estimator: str) -> StorePath:
        """Return the path of a target set's top-k parts, after making it a zarr group."""
        path = self._catalog.top_path(exp_name, estimator)
        with disk_errors(path):
            ensure_groups(self._catalog.root, path)
        return path

    def kernel_path(self, model_id: int, weighting: str) -> StorePath:
        """Return the path of a checkpoint's kernel, after making its parent a zarr group."""
        path = self._catalog.kernel_path(model_id, weighting)
        with disk_errors(path):
            ensure_groups(self._catalog.root, path.parent)
        return path

    def _chunk_rows(self, num_targets: int) -> int | None:
        """Return the training rows of a file of scores; None for one file, which one process writes as one map."""
        chunk_rows, limit = self._manifest.layout["chunk_rows"], self._catalog.root.score_chunk_bytes
        if limit is not None:
            return max(1, min(chunk_rows, limit // (4 * max(1, num_targets))))
        return None if self._manifest.layout["processes"] == 1 else chunk_rows

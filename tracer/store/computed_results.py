"""Everything that is computed from the rows of a store: scores, cosines, top-k parts, kernels."""

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
    """The part of a store that is computed from rows, and that is computed again when rows change.

    Args:
        catalog: Of the store.
        manifest: The store's settings.
    """

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
        """Open scores for writing: existing ones if they come from the same inputs, else new ones.

        Scores that come from other inputs are removed; matrices of them that are still held stay valid.

        Args:
            exp_name: The target set's name.
            estimator: The estimator's name: letters, digits and ``-_.``.
            shape: ``(N, M)``, both at least 1.
            inputs: Everything that decides the scores, as JSON values: checkpoints and their weights'
                fingerprints, learning rates, the estimator's options.
            tile_rows: The most rows of a tile; None: tiles of about 16 MB. Existing scores keep theirs.
            dtype: ``"float32"``, or ``"float16"`` relative to the largest score of each row; None: the dtype of
                existing scores of these inputs, else float32.
            may_replace: Whether this process may remove scores of other inputs.

        Returns:
            The array; `ScoreArray.remaining` lists the tiles still to be written.

        Raises:
            InputError: A name, the shape, the dtype or ``tile_rows`` cannot be used.
            IncompleteError: Scores of other inputs exist and this process may not replace them.
        """
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
        """Open existing scores, whatever their inputs.

        Args:
            exp_name: The target set's name.
            estimator: The estimator's name.

        Returns:
            The array.

        Raises:
            CallOrderError: There are none.
            StoreError: They are damaged.
        """
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
        """Open a block of cosines for writing: an existing one if it comes from the same inputs, else a new one.

        Args:
            exp_name: The target set's name.
            model_id: The checkpoint's number.
            first: The first target of the block.
            num_targets: The number of its targets.
            inputs: Everything that decides the cosines, as JSON values.
            tile_rows: The training rows of a tile.

        Returns:
            The array; `ScoreArray.remaining` lists the tiles still to be written.
        """
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
        """Mark everything computed from training rows, or from targets of a set, ``[n]`` indices, as not done."""
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

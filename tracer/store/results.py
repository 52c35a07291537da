"""What is computed from the rows of a store: scores, cosines, selections, kernels."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np

from tracer._core.files import disk_errors
from tracer.errors import CallOrderError, InputError, StoreError
from tracer.store.manifest import Manifest, json_value
from tracer.store.metadata import StorePath, child_nodes, remove
from tracer.store.nodes import checked_integer, checked_name, ensure_groups, numbered_nodes
from tracer.store.remote_path import RemotePath
from tracer.store.score_array import DONE_SUFFIX, SUFFIXES, ScoreArray, open_scores, remove_scores

REMOTE_SCORE_BYTES = 32 << 20
"""How many bytes of scores an object of a remote store has at most, unless a row has more."""

logger = logging.getLogger("tracer")


class Results:
    """The part of a store that is computed from rows, and that is computed again when rows change.

    Args:
        path: The store's directory.
        manifest: What the store was made with.
    """

    def __init__(self, path: StorePath, manifest: Manifest) -> None:
        self.path, self.manifest = path, manifest

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
        """Open scores for writing: those that are there if they come from the same inputs, else new ones.

        Scores that come from other inputs are removed; matrices of them that are still held stay valid.

        Args:
            exp_name: The target set's name.
            estimator: The estimator's name: letters, digits and ``-_.``.
            shape: ``(N, M)``, both at least 1.
            inputs: Everything that decides the scores, as JSON values: checkpoints and their weights'
                fingerprints, learning rates, the estimator's options.
            tile_rows: The most rows of a tile; None: tiles of about 16 MB. What is there keeps its own.
            dtype: ``"float32"``, or ``"float16"`` relative to each row's largest; None: that of the same scores where
                they are there, else float32.
            may_replace: Whether this process may remove scores of other inputs.

        Returns:
            The array; `ScoreArray.remaining` lists the tiles still to be written.

        Raises:
            InputError: A name, the shape, the dtype or ``tile_rows`` cannot be used.
            IncompleteError: Scores of other inputs are there and this process may not replace them.
        """
        path = self._scores_path(exp_name, estimator)
        with disk_errors(path):
            ensure_groups(self.path, path.parent)
        return open_scores(
            path,
            shape,
            inputs,
            tile_rows=tile_rows,
            file_rows=self._file_rows(shape[1]),
            dtype=dtype,
            may_replace=may_replace,
        )

    def score_names(self, exp_name: str) -> list[str]:
        """Return the estimators for which a target set has scores, complete or not, sorted."""
        names = child_nodes(self.path / "scores" / checked_name("exp_name", exp_name))
        return [name for name in names if name + DONE_SUFFIX in names]

    def read_scores(self, exp_name: str, estimator: str) -> ScoreArray:
        """Open scores that are there, whatever their inputs.

        Args:
            exp_name: The target set's name.
            estimator: The estimator's name.

        Returns:
            The array.

        Raises:
            CallOrderError: There are none.
            StoreError: They are damaged.
        """
        path = self._scores_path(exp_name, estimator)
        if estimator not in self.score_names(exp_name):
            raise CallOrderError(
                f"{self.path} has no {estimator!r} scores of {exp_name!r}, only {self.score_names(exp_name)}: "
                "finalize them first"
            )
        return ScoreArray(path)

    def cosines(self, exp_name: str, model_id: int) -> list[tuple[int, ScoreArray]]:
        """Open the cosines of all train rows with a target set at a checkpoint, as far as there are any.

        Args:
            exp_name: The target set's name.
            model_id: The checkpoint's number.

        Returns:
            Blocks of consecutive targets: the first target and an array ``[N, targets]``, ascending. A block that a
            crash left half made is not among them; `cosine_block` makes it anew.
        """
        path, found = self._cosines_path(exp_name, model_id), []
        for first in numbered_nodes(path):
            try:
                found.append((first, ScoreArray(path / str(first))))
            except StoreError as error:
                logger.info("computing %s again: %s", path / str(first), error)
        return found

    def cosine_block(
        self, exp_name: str, model_id: int, first: int, num_targets: int, inputs: Mapping[str, Any], *, tile_rows: int
    ) -> ScoreArray:
        """Open a block of cosines for writing: what is there if it comes from the same inputs, else a new one.

        Blocks of later targets are removed with a block that is replaced.

        Args:
            exp_name: The target set's name.
            model_id: The checkpoint's number.
            first: The first target of the block.
            num_targets: The number of its targets.
            inputs: Everything that decides the cosines, as JSON values.
            tile_rows: The train rows of a tile.

        Returns:
            The array; `ScoreArray.remaining` lists the tiles still to be written.
        """
        path = self._cosines_path(exp_name, model_id)
        with disk_errors(path):
            ensure_groups(self.path, path)
        known = dict(self.cosines(exp_name, model_id))
        if first not in known or known[first].inputs != json_value(dict(inputs), "inputs"):
            for start, block in known.items():
                if start >= first:
                    block.close()
                    remove_scores(block.path)
        shape = (self.manifest.train_set_size, num_targets)
        path = path / str(checked_integer("first", first, 0))
        return open_scores(path, shape, inputs, tile_rows=tile_rows, file_rows=self._file_rows(num_targets))

    def forget_results(self, rows: np.ndarray, exp_name: str | None = None) -> None:
        """Say of scores, cosines, selections and kernels that come from rows that they are not done.

        Args:
            rows: ``[n]``, int64, train rows, or targets.
            exp_name: The target set; None for train rows.
        """
        if exp_name is None:
            with disk_errors(self.path):
                remove(self.path / "kernels")
        for name in [exp_name] if exp_name else self._result_names():
            with disk_errors(self.path):
                remove(self.path / "top" / name)
            blocks = [block for model_id in self._cosine_ids(name) for _, block in self.cosines(name, model_id)]
            for scores in [*self._readable_scores(name), *blocks]:
                scores.unmark_rows(rows) if exp_name is None else scores.unmark(np.arange(scores.num_tiles))
                scores.close()

    def _result_names(self) -> list[str]:
        return sorted({name for room in ("scores", "cosines", "top") for name in child_nodes(self.path / room)})

    def _cosine_ids(self, exp_name: str) -> list[int]:
        return numbered_nodes(self.path / "cosines" / exp_name)

    def _readable_scores(self, exp_name: str) -> list[ScoreArray]:
        found = []
        for estimator in self.score_names(exp_name):
            try:
                found.append(self.read_scores(exp_name, estimator))
            except StoreError as error:  # it counts as not there
                logger.info("%s", error)
        return found

    def selections_path(self, exp_name: str, estimator: str) -> StorePath:
        """Return where the selections of a target set stand (see `tracer.store.selections`), a zarr group."""
        path = self.path / "top" / checked_name("exp_name", exp_name) / checked_name("estimator", estimator)
        with disk_errors(path):
            ensure_groups(self.path, path)
        return path

    def kernel_path(self, model_id: int, weighting: str) -> StorePath:
        """Return where a checkpoint's kernel stands (see `tracer.store.kernels`); its parent is a zarr group."""
        path = self.path / "kernels" / str(checked_integer("model_id", model_id, 0)) / weighting
        with disk_errors(path):
            ensure_groups(self.path, path.parent)
        return path

    def _file_rows(self, num_targets: int) -> int | None:
        """Return the train rows of a file of scores; None for one file, which one process writes as one map."""
        block_rows = self.manifest.layout["block_rows"]
        if isinstance(self.path, RemotePath):  # whole objects are held in memory
            return max(1, min(block_rows, REMOTE_SCORE_BYTES // (4 * max(1, num_targets))))
        return None if self.manifest.layout["processes"] == 1 else block_rows

    def _cosines_path(self, exp_name: str, model_id: int) -> StorePath:
        name, number = checked_name("exp_name", exp_name), checked_integer("model_id", model_id, 0)
        return self.path / "cosines" / name / str(number)

    def _scores_path(self, exp_name: str, estimator: str) -> StorePath:
        path = self.path / "scores" / checked_name("exp_name", exp_name) / checked_name("estimator", estimator)
        if estimator.endswith(SUFFIXES):
            raise InputError(
                f"estimator is {estimator!r}: names that end with {', '.join(SUFFIXES)} are taken by what stands "
                "beside scores"
            )
        return path

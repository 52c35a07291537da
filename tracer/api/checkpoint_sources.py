"""Where weights of checkpoints are to be had again: what was passed before, or the path that the store remembers."""

from __future__ import annotations

import os
from pathlib import Path

from tracer.errors import CallOrderError
from tracer.store import RowTable
from tracer.types import Checkpoint


class CheckpointSources:
    """Remembers each checkpoint: a path in the store too, for other processes; a state dict in this process only."""

    def __init__(self) -> None:
        self._passed: dict[int, Checkpoint] = {}

    def remember(self, model_id: int, checkpoint: Checkpoint, table: RowTable) -> None:
        """Take note of what was passed for a checkpoint.

        Args:
            model_id: Its number.
            checkpoint: A state dict, of which the tensors are not copied, or a path.
            table: The checkpoint's table of train rows.
        """
        if isinstance(checkpoint, (str, os.PathLike)):
            checkpoint = str(Path(checkpoint).absolute())
            if table.attributes.get("source") != checkpoint:
                table.set_attributes(source=checkpoint)
        self._passed[model_id] = checkpoint

    def find(self, model_id: int, table: RowTable) -> Checkpoint:
        """Return a checkpoint.

        Args:
            model_id: Its number.
            table: The checkpoint's table of train rows.

        Returns:
            What was passed in this process, else the path that the store has.

        Raises:
            CallOrderError: Neither is known, or the file is gone.
        """
        passed = self._passed.get(model_id)
        if passed is not None and not isinstance(passed, str):
            return passed
        source = passed or table.attributes.get("source")
        if source is None or not Path(source).exists():
            why = (
                "are not known to this process" if source is None else f"were in {source}, which is not there any more"
            )
            raise CallOrderError(
                f"The weights of checkpoint {model_id} {why}. Call tracer.load_checkpoint(checkpoint, "
                f"model_id={model_id}) with the checkpoint that was featurized; a path is remembered in the store."
            )
        return str(source)

"""The source of each checkpoint's weights: a path, which the store remembers, or a state dict in this process."""

from __future__ import annotations

import os
from pathlib import Path

from tracer.errors import CallOrderError
from tracer.store import RowTable
from tracer.types import Checkpoint


class CheckpointSources:
    """Remembers where each checkpoint was loaded from; paths are stored, for other processes."""

    def __init__(self) -> None:
        self._passed: dict[int, Checkpoint] = {}

    def remember(self, model_id: int, checkpoint: Checkpoint, table: RowTable) -> None:
        """Remember a checkpoint's path or state dict (not copied); a path is stored with the checkpoint's table."""
        if isinstance(checkpoint, (str, os.PathLike)):
            checkpoint = str(Path(checkpoint).absolute())
            if table.attributes.get("source") != checkpoint:
                table.set_attributes(source=checkpoint)
        self._passed[model_id] = checkpoint

    def find(self, model_id: int, table: RowTable) -> Checkpoint:
        """Return a checkpoint's state dict or path, or raise `CallOrderError` if none is known or the file is gone."""
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

"""Batches that do not fit into memory, computed in halves."""

from __future__ import annotations

import gc
import logging
import math
from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from tracer.data.batches import leaves, select_samples
from tracer.errors import BatchError
from tracer.types import Batch

logger = logging.getLogger("tracer")


class Halving:
    """Calls ``step(batch, inds=inds)``, in halves if memory does not suffice; sizes that failed are not tried again."""

    def __init__(self, step: Callable[..., None]) -> None:
        self._step, self._failed = step, math.inf

    def __call__(self, batch: Batch, inds: Int64[np.ndarray, " b"]) -> None:
        """Run the step on all examples of a batch, or raise BatchError if a single one does not fit into memory."""
        parts = [(batch, inds)]
        while parts:
            batch, inds = parts.pop()
            size = max((leaf.numel() for _, leaf in leaves(batch) if isinstance(leaf, Tensor)), default=0)
            if size >= self._failed and len(inds) > 1:
                halves = torch.arange(len(inds)).tensor_split(2)
                parts += [(select_samples(batch, half, len(inds)), inds[half.numpy()]) for half in reversed(halves)]
            elif not self._try(batch, inds):
                if len(inds) == 1:
                    raise BatchError(
                        f"memory does not suffice for example {inds[0]} alone, which has {size:,} values; shorten it, "
                        f"choose fewer parameters by params=, or use a device with more memory."
                    )
                self._failed = size
                parts.append((batch, inds))
                logger.info("memory does not suffice for a batch of %d examples: halved", len(inds))

    def _try(self, batch: Batch, inds: np.ndarray) -> bool:
        """Return whether memory sufficed; what the failed step holds is released."""
        try:
            self._step(batch, inds=inds)
            return True
        except torch.OutOfMemoryError:
            pass
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return False

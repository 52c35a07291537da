"""The shares of a batch's examples in the gradient of a training step, projected as they arrive."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tracer.gradients.per_sample import DenseGradient, OuterGradient, PerSampleGradient, flat
from tracer.projection.base import Projector
from tracer.types import Projection, SampleOutputs

Scale = Callable[[str], Tensor | None]
"""Returns what a parameter's gradient is multiplied by, ``[*shape]``; None if that is not known before the step."""


class SharesSink:
    """Projects gradients of ``B`` samples, those of each parameter group on their own: groups have rates of their own.

    Args:
        projector: The projector.
        groups: The number of each parameter's group.
        batch_size: ``B``.
        scale: What gradients are multiplied by; None: nothing.
        watched: The parameters whose sums over samples are kept, as they come from the backward.
        device: The device.

    """

    def __init__(
        self,
        projector: Projector,
        groups: Mapping[str, int],
        batch_size: int,
        scale: Scale | None,
        watched: Collection[str],
        device: torch.device,
    ) -> None:
        self._projector, self._groups, self._scale, self._watched = projector, groups, scale, watched
        self._batch_size, self._device = batch_size, device
        self._features = torch.zeros(max(groups.values()) + 1, batch_size, projector.dim, device=device)
        self.begin()

    def begin(self) -> None:
        """Reset everything to zero."""
        self._totals: dict[str, Tensor] = {}
        self._waiting: list[tuple[int, int, str, PerSampleGradient]] = []
        # Norms are not used: a projection has to be told where to add them.
        norms = torch.zeros(self._batch_size, dtype=torch.float64, device=self._device)
        self._running = [self._projector.start(Projection(each, norms)) for each in self._features.zero_()]

    def take(self, start: int, stop: int, gradients: dict[str, PerSampleGradient]) -> None:
        """Add the gradients of samples ``start`` to ``stop``; a parameter may come several times."""
        for name, gradient in gradients.items():
            if name in self._watched:
                self._totals[name] = (
                    self._totals[name] + _summed(gradient) if name in self._totals else _summed(gradient)
                )
            scale = None if self._scale is None else self._scale(name)
            if self._scale is not None and scale is None:
                self._waiting.append((start, stop, name, gradient))
            else:
                self._add(start, stop, name, gradient, scale)

    def _add(self, start: int, stop: int, name: str, gradient: PerSampleGradient, scale: Tensor | None) -> None:
        if scale is not None:
            gradient = gradient.scaled(scale.to(gradient.device))
        self._running[self._groups[name]].add({name: gradient}, start, stop)

    def total(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """Return the sums over samples of gradients of watched parameters, one after another, flat."""
        found = [self._totals.get(name) for name in parameters]
        flat = [
            value.new_zeros(value.numel()) if own is None else own
            for own, value in zip(found, parameters.values(), strict=True)
        ]
        return torch.cat(flat)

    def finish(self) -> Tensor:
        """Return the projections, ``[groups, B, dim]``; gradients that waited for the step must have a scale now."""
        for start, stop, name, gradient in self._waiting:
            if self._scale is not None and (scale := self._scale(name)) is not None:  # else it did not move
                self._add(start, stop, name, gradient, scale)
        self._waiting = []
        for running in self._running:
            running.finish()
        return self._features


def _summed(gradient: PerSampleGradient) -> Tensor:
    if isinstance(gradient, DenseGradient):
        return gradient.values.sum(0).reshape(-1)
    if isinstance(gradient, OuterGradient):
        return (gradient.left.flatten(0, 1).T @ gradient.right.flatten(0, 1)).reshape(-1)
    ones = torch.ones(gradient.batch_size, dtype=gradient.dtype, device=gradient.device)
    return flat(gradient.weighted_sum(ones)[0])


Expected = tuple[SharesSink, SampleOutputs, int | None]
"""What a pass in eval mode gave: gradients of f, outputs, and the position of the example that was run alone."""


@dataclass
class Shares:
    """A batch between its backward and the optimizer's step.

    Attributes:
        rows: The index of each example, ``[B]``.
        sink: What the batch gave.
        own: Whether shares are of the training loss; else they are from a pass in eval mode.
        expected: What a pass in eval mode gave: shares themselves, or gradients to compare them with.
        outputs: Losses and labels of the examples, if they are known.
    """

    rows: np.ndarray
    sink: SharesSink
    own: bool
    expected: Expected | None = None
    outputs: SampleOutputs | None = None


def of_losses(features: Tensor, outputs: SampleOutputs) -> Tensor:
    """Return gradients of losses, ``[groups, B, dim]``, from those of f."""
    return features * outputs.loss_grad.to(features)[:, None]

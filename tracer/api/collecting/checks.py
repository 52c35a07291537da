"""Checks of what is collected: against the gradient that the optimizer used, and examples run apart from training."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from tracer._core.processes import Process
from tracer._core.text import listing
from tracer.api.collecting.shares import Shares, of_losses
from tracer.errors import GradientError
from tracer.gradients.audit import MOST_TIME
from tracer.gradients.selfcheck import norm, tolerance

_EARLY = frozenset((1, 2, 4, 8))
_PROBED = 1 << 14
"""The most entries of the small parameters that are compared at every step, unless the smallest has more."""

_NOISE, _MOST_NOISE = 1e-3, 0.03
_MOST_DIFFERENCE = 0.2


class CheckTimes:
    """Decides which steps are checked thoroughly: the first ones, then as many as take 1.25 % of the time.

    Attributes:
        due: Whether the step in progress is.
    """

    def __init__(self) -> None:
        self.due = True
        self._num_steps = 0
        self._began = time.perf_counter()
        self._spent = self._last = self._now = 0.0

    @contextmanager
    def spending(self) -> Iterator[None]:
        """Count the time of a check in the block."""
        began = time.perf_counter()
        yield
        self._now += time.perf_counter() - began

    def next_step(self) -> None:
        """Decide for the next step."""
        self._num_steps += 1
        if self.due:
            self._spent, self._last, self._now = self._spent + self._now, self._now, 0.0
        elapsed = time.perf_counter() - self._began
        self.due = self._num_steps + 1 in _EARLY or self._spent + self._last <= MOST_TIME * elapsed


def probe(shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Return the smallest parameters, whose sums are compared at every step."""
    sizes = sorted((torch.Size(shape).numel(), name) for name, shape in shapes.items())
    found, total = [sizes[0][1]], sizes[0][0]
    for size, name in sizes[1:]:
        total += size
        if total > _PROBED:
            break
        found.append(name)
    return found


def used_share(
    pending: Sequence[Shares], parameters: Mapping[str, Tensor], dtype: torch.dtype, step: int, process: Process
) -> tuple[float, list[Shares]]:
    """Return the optimizer's gradient as a multiple of the sum of shares: clipping and loss scaling change it.

    Args:
        pending: The batches since the last step.
        parameters: The parameters to compare, which all of them have watched.
        dtype: The dtype that layers compute in.
        step: The number of the step.
        process: This process; the sum is over the shares of all that train together.

    Returns:
        The multiple, and the batches without those that overflowed: a GradScaler left out their step.

    Raises:
        GradientError: If it is no multiple of the sum.
    """
    grad = torch.cat([_grad(value).reshape(-1) for value in parameters.values()])
    totals = [process.all_reduce(each.sink.total(parameters)) for each in pending]
    if len(pending) > 1:
        bad = [place for place, each in enumerate(totals) if not torch.isfinite(each).all()]
        first = bad[-1] + 1 if bad and bad[-1] + 1 < len(pending) else 0
        pending, totals = pending[first:], totals[first:]
    total = totals[0] if len(totals) == 1 else torch.stack(totals).sum(0)
    square, length = float(torch.dot(total, total)), norm(grad)
    factor = float(torch.dot(grad, total)) / square if square else 0.0
    apart = norm(grad - factor * total)
    # A gradient that is noise is compared together with the others.
    if not apart <= 10 * tolerance(dtype, grad.device) * length:
        raise GradientError(
            f"The gradient that the optimizer used in step {step} is not the sum of what the collected examples gave "
            f"(relative difference {apart / max(length, 1e-300):.2g} in {listing([repr(each) for each in parameters])})"
            f". Expected the forward and backward of every batch in `with collector.batch(batch, inds):`, gradients "
            f"set to zero after each step, and nothing that changes them but clipping by their norm. Clipping by "
            f"value, penalties on weights in the loss and torch.compile need second_pass=True. Processes that train "
            f"together need the model in DistributedDataParallel."
        )
    return factor, list(pending)


def _grad(parameter: Tensor) -> Tensor:
    if parameter.grad is None:
        return torch.zeros_like(parameter)
    return parameter.grad.detach().to_dense() if parameter.grad.is_sparse else parameter.grad.detach()


def compare_alone(shares: Shares, features: Tensor, dtype: torch.dtype, step: int) -> int | None:
    """Compare shares ``[groups, B, dim]`` with gradients of the task's loss, up to a factor for each example.

    Returns:
        The position of an example that agrees, and was run alone in the other pass; None if there is none.

    Raises:
        GradientError: If an example has another gradient in training.
    """
    assert shares.expected is not None
    sink, outputs, audited = shares.expected
    others = of_losses(sink.finish(), outputs).transpose(0, 1).flatten(1).double()
    found = features.transpose(0, 1).flatten(1).double()
    factors = (found * others).sum(1) / others.square().sum(1).clamp_min(1e-300)
    apart = torch.linalg.vector_norm(found - factors[:, None] * others, dim=1)
    lengths = torch.linalg.vector_norm(found, dim=1)
    share = min(10 * tolerance(dtype, found.device), _MOST_DIFFERENCE)
    noise = min(max(_NOISE, tolerance(dtype, found.device)), _MOST_NOISE) * lengths.max()
    wrong = apart > torch.maximum(share * lengths, noise)
    if wrong.any():
        place = int((apart / lengths.clamp_min(1e-300)).where(wrong, 0.0).argmax())
        raise GradientError(
            f"In training, example {int(shares.rows[place])} of step {step} has another gradient than the task's loss "
            f"has in eval mode (relative difference {float(apart[place] / lengths[place]):.2g}). Pass the training's "
            f"own loss as task=, as a function (model, batch) -> loss [B], and what targets are explained by as "
            f"target_task=. If the model computes something else in training mode, such as statistics of the batch, "
            f"pass second_pass=True."
        )
    return audited

"""When gradients are checked against autograd, and the checks of a task's outputs."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from tracer._core.heap import return_freed_memory
from tracer._core.text import listing
from tracer.data.batches import select_samples
from tracer.data.tasks import Task, check_per_sample
from tracer.errors import GradientError, TracerError
from tracer.gradients.backend import Backend
from tracer.gradients.calls import CallPattern, SampleAxis
from tracer.gradients.coupling import coupling_error
from tracer.gradients.derived_values import derived_values
from tracer.gradients.isolation import seed_generators
from tracer.gradients.selfcheck import (
    REPEATED,
    Reference,
    WeightedSums,
    check_weights,
    depends_on_nothing,
    difference,
    same_values,
)
from tracer.types import Batch, SampleOutputs

logger = logging.getLogger("tracer.gradients")

LONG_SECONDS = 1.0
"""The least time of a forward whose checks return freed memory to the system, which takes up to a tenth of it."""

_EARLY_CHECKS = frozenset((1, 2, 4, 8))
"""The numbers of early batches that are checked though they look like ones that agreed."""

Signature = tuple[frozenset[CallPattern], bool]
"""How a pass called its layers, and whether its batch had a single sample, which shows no wrong order of samples."""


@dataclass
class _Verified:
    """The passes that agreed with autograd at one checkpoint.

    Attributes:
        signatures: Their signatures, without calls whose samples are mixed.
        mixed: Those calls: which of them a pass has may change with each batch.
        seen: Parameters whose gradient was more than rounding noise when they agreed.
        num_batches: The number of batches computed.
        first: The first sample, as a batch, and its f then.
    """

    signatures: set[Signature] = field(default_factory=set)
    mixed: set[CallPattern] = field(default_factory=set)
    seen: set[str] = field(default_factory=set)
    num_batches: int = 0
    first: tuple[Batch, Tensor] | None = None


class Verifier:
    """Decides which passes to check, per checkpoint, and makes the checks that need one forward.

    Args:
        model: The model.
        task: The task.
        names: The selected parameters.
        backend: How the model runs.
        device: The device of the model.
        autocast: The dtype of autocast, if the task asks for it.

    Attributes:
        dtype: The dtype that layers compute in.
        plain_seconds: The least time of a plain forward and backward that was seen, for one sample of a batch.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        names: Sequence[str],
        backend: Backend,
        device: torch.device,
        autocast: torch.dtype | None,
    ) -> None:
        parameters = dict(model.named_parameters())
        self.model, self.backend = model, backend
        self._task, self._device, self._autocast = task, device, autocast
        # The rounding of half precision in some layers reaches the gradients of all.
        halves = [each.dtype for each in model.parameters() if each.dtype in (torch.bfloat16, torch.float16)]
        self._precision = autocast or next(iter(halves), None)
        self._shapes = {name: parameters[name].shape for name in names}
        self.dtype = self._precision or parameters[names[0]].dtype
        self.plain_seconds = math.inf
        self._num_batches = 0
        self._unchecked = self._warned = self._is_long = False
        self._verified = _Verified()
        self._by_weights: dict[str, _Verified] = {}

    @property
    def is_first(self) -> bool:
        """Whether no batch has been finished with the weights in use."""
        return not self._verified.num_batches

    @contextmanager
    def using_weights(self, fingerprint: str) -> Iterator[None]:
        """Count only what was verified with these weights; put the former ones back afterwards."""
        before = self._verified
        self.use_weights(fingerprint)
        try:
            yield
        finally:
            self._verified = before

    def use_weights(self, fingerprint: str) -> None:
        """Count only what was verified with these weights from now on."""
        # A contribution may vanish at one checkpoint and not at the next: a gate or a head that starts at zero.
        self._verified = self._by_weights.setdefault(fingerprint, _Verified())

    def weights_moved(self, verify: bool) -> None:
        """Declare that training changed the weights in the model; with ``verify`` the next pass is checked again."""
        if verify:
            self._verified = _Verified()
        self._verified.first = None

    def drifts(self, batch: Batch, batch_size: int) -> bool:
        """Return whether the first sample that was run alone with these weights has another f by now."""
        first = self._verified.first
        one = first[0] if first else select_samples(batch, torch.tensor([0]), batch_size)
        if (samples := self.run(one)) is None:
            return False
        if first is None:
            self._verified.first = one, samples.output
        return first is not None and not same_values(first[1], samples.output, self.dtype, REPEATED)

    def run(self, batch: Batch) -> SampleOutputs | None:
        """Return the task's outputs for a batch, without a graph, or None if it cannot run."""
        seed_generators(self._device, 1)
        try:
            with torch.no_grad():
                return self._task.outputs(self.model, batch)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, TypeError, IndexError, TracerError) as error:
            logger.debug("samples cannot be run by themselves: %s", error)
            return None

    def is_due(self, signature: Signature, only_new: bool = False) -> bool:
        """Return whether any rank has to check a pass; ``only_new``: only if none with its signature agreed before."""
        verified = self._verified
        due = not self._is_known(signature) or (self._num_batches in _EARLY_CHECKS and not only_new)
        if not due and not only_new and not verified.seen.issuperset(self._shapes):
            # Agreeing on zero proves nothing, so passes are checked again while the gradient of some parameter was
            # never more than noise; ever more rarely, as the parameter may be unused or its gradient zero in theory.
            number = verified.num_batches
            due = number & (number - 1) == 0
        return self.backend.any(due)

    def puts_in_doubt(self, signature: Signature) -> bool:
        """Return whether a pass that looks like this and is wrong puts batches in doubt that were not checked."""
        return self._unchecked and self._is_known(signature)

    def _is_known(self, signature: Signature) -> bool:
        """Return whether a pass that agreed called its layers in this way."""
        mixed = _mixed(signature)
        return (signature[0] - mixed, signature[1]) in self._verified.signatures and mixed <= self._verified.mixed

    def confirm(self, signature: Signature, checked: bool) -> None:
        """Record a finished pass that agreed with autograd or needed no check."""
        mixed = _mixed(signature)
        self._verified.signatures.add((signature[0] - mixed, signature[1]))
        self._verified.mixed |= mixed
        self._verified.num_batches += 1
        self._num_batches += 1
        self._unchecked |= not checked

    def start_again(self) -> None:
        """Forget that there were unchecked batches: all of them are computed again."""
        self._unchecked = False

    def confirm_gradients(self, reference: Reference) -> None:
        """Record which gradients were more than noise when they agreed, and warn of parameters that f never reaches."""
        self._verified.seen.update(reference.above_noise())
        unused = sorted(self._shapes.keys() - reference.reached)
        if unused and (held := derived_values(self.model, unused)):
            raise GradientError(
                f"f does not depend on {listing(unused)} in eval mode, while the model holds {listing(held)}: a "
                f"value derived from weights, perhaps others, is used in their place. Pass a model that was newly "
                f"built, or leave the parameters out with params=."
            )
        if unused and not self._warned:
            self._warned = True
            logger.warning(
                "f does not depend on %d of %d selected parameters in eval mode (%s); if it should, look at what the "
                "task takes from the model's outputs: of a tuple the first",
                len(unused),
                len(self._shapes),
                listing(unused),
            )

    def sums(self, batch_size: int, row: int | None) -> WeightedSums:
        """Return sums to check a pass by, with other random weights for each batch, and a large one for a sample."""
        weights = check_weights(batch_size, self._num_batches, row)
        return WeightedSums(weights, shrink=self.backend.is_sharded)

    def checked_reference(self, batch: Batch, sums: WeightedSums, keep: Collection[str]) -> Reference:
        """Return autograd's reference of a batch, to check a pass by, with some of its gradients."""
        began, weights = now(self._device), sums.weights
        against = {name: total.gradient for name, total in sums.totals.items()}
        reference = self.reference(batch, weights, against, keep)
        self.plain_seconds = min(self.plain_seconds, (now(self._device) - began) / len(weights))
        if not reference.reached:
            raise GradientError(depends_on_nothing(list(self._shapes)))
        return reference

    def reference(
        self, batch: Batch, weights: Tensor, against: Mapping[str, Tensor], keep: Collection[str] = ()
    ) -> Reference:
        """Return autograd's reference of the sum of f with some weights ``[B]``.

        Args:
            batch: The batch.
            weights: The weights.
            against: What gradients are compared with, by name.
            keep: The names of those that are kept.
        """
        self.make_room()
        seed_generators(self._device, 1)  # another seed: a model that draws random numbers must not pass
        return self.backend.reference(self._task, batch, weights, self._shapes, self._precision, against, keep)

    def make_room(self, forward_seconds: float | None = None) -> None:
        """Return freed memory to the system, unless forwards are short: the passes of a check follow one another."""
        if forward_seconds is not None:
            self._is_long = forward_seconds >= LONG_SECONDS
        if self._is_long and self._device.type == "cpu":
            return_freed_memory()

    def gradients(self, batch: Batch, weights: Tensor) -> dict[str, Tensor]:
        """Return autograd's gradients of the sum of f with some weights ``[B]``."""
        return self.reference(batch, weights, {}, self._shapes).gradients

    def use_precision(self, found: Collection[torch.dtype]) -> None:
        """Allow for the rounding of the lowest dtype that a forward computed in, whatever parameters have."""
        for each in found if self._precision is None else ():
            self._precision = self.dtype = each

    def check_autocast(self, found: Collection[torch.dtype]) -> None:
        """Raise `GradientError` if layers run under another autocast than was asked for."""
        hidden = [each for each in found if each != self._autocast]
        if hidden:
            name = str(hidden[0]).removeprefix("torch.")
            raise GradientError(
                f"The model's forward computes under torch.autocast in {name}, of which the store would know nothing. "
                f"Pass autocast={name!r}, which records it, or a model whose forward does not use it "
                f"(accelerator.unwrap_model(model, keep_fp32_wrapper=False))."
            )

    def check_outputs(self, outputs: SampleOutputs, batch_size: int) -> None:
        """Raise `BatchError` unless a task returned one number a sample."""
        for name in ("output", "loss", "loss_grad", "loss_hess", "label", "baseline", "rival", "rival_share"):
            value = getattr(outputs, name)
            if value is not None:
                check_per_sample(name, value, batch_size, "rows")

    def check_alone(self, together: Tensor, alone: Tensor, batch: Batch, batch_size: int, start: int) -> None:
        """Raise `GradientError` if samples run alone, from ``start`` on, have other f than in their batch, ``[b]``."""
        if (found := difference("output", together, alone, self.dtype)) is None:
            return
        row = start + found[0]
        one = select_samples(batch, torch.tensor([row]), batch_size)
        raise coupling_error(self.model, self._task, batch, one, row, found[1])


def _mixed(signature: Signature) -> frozenset[CallPattern]:
    return frozenset(pattern for pattern in signature[0] if pattern.axis is SampleAxis.MIXED)


_seconds_checked = 0.0


def seconds_checked() -> float:
    """Return how long this process has compared gradients with autograd's, in seconds; see `checking`."""
    return _seconds_checked


@contextmanager
def checking(device: torch.device) -> Iterator[None]:
    """Count the time of a ``with`` block as that of checks, which early batches need and most later ones do not."""
    global _seconds_checked
    began = now(device)
    try:
        yield
    finally:
        _seconds_checked += now(device) - began


def now(device: torch.device) -> float:
    """Return the time at which everything that a device was given is done, in seconds."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()

"""When gradients are checked against autograd, and the checks of a task's outputs."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from tracer.data.batches import select_samples
from tracer.data.tasks import LowerPrecision, Task, check_per_sample
from tracer.errors import GradientError
from tracer.gradients.backend import Backend
from tracer.gradients.capture import CallPattern
from tracer.gradients.isolation import seed_generators
from tracer.gradients.selfcheck import Reference, tolerance
from tracer.types import Batch, SampleOutputs

logger = logging.getLogger("tracer.gradients")

_EAGER_CHECKS = 16

Signature = tuple[frozenset[CallPattern], bool]
"""How a pass called its layers, and whether its batch had a single sample, which shows no wrong order of samples."""


@dataclass
class _Verified:
    """The passes that agreed with autograd at one checkpoint.

    Attributes:
        signatures: Their signatures.
        seen: Parameters whose gradient was more than rounding noise when they agreed.
        num_batches: The number of batches computed.
    """

    signatures: set[Signature] = field(default_factory=set)
    seen: set[str] = field(default_factory=set)
    num_batches: int = 0


class Verifier:
    """Decides which passes to check, per checkpoint, and makes the checks that need one forward.

    Args:
        model: The model.
        task: The task.
        names: The selected parameters.
        backend: How the model runs.
        device: The device of the model.
    """

    def __init__(
        self, model: nn.Module, task: Task, names: Sequence[str], backend: Backend, device: torch.device
    ) -> None:
        parameters = dict(model.named_parameters())
        self._model, self._task, self._backend, self._device = model, task, backend, device
        self._shapes = {name: parameters[name].shape for name in names}
        self._precision = task.dtype if isinstance(task, LowerPrecision) else None
        self._dtype = self._precision or parameters[names[0]].dtype
        self._verified = _Verified()
        self._by_weights: dict[str, _Verified] = {}

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

    def is_due(self, signature: Signature) -> bool:
        """Return whether any rank has to check a pass."""
        verified = self._verified
        due = signature not in verified.signatures
        if not due and not verified.seen.issuperset(self._shapes):
            # Agreeing on zero proves nothing, so passes are checked again while the gradient of some parameter was
            # never more than noise: first each batch, then ever more rarely, as the parameter may be unused.
            number = verified.num_batches
            due = number < _EAGER_CHECKS or number & (number - 1) == 0
        return self._backend.any(due)

    def confirm(self, signature: Signature) -> None:
        """Record a finished pass that agreed with autograd or needed no check."""
        self._verified.signatures.add(signature)
        self._verified.num_batches += 1

    def confirm_gradients(self, reference: Reference) -> None:
        """Record which gradients were more than noise when they agreed."""
        self._verified.seen.update(reference.above_noise())

    def reference(self, batch: Batch, batch_size: int) -> Reference:
        """Return autograd's outputs and gradients of a batch."""
        seed_generators(self._device, 1)  # another seed: a model that draws random numbers must not pass
        return self._backend.reference(self._task, batch, batch_size, self._shapes, self._precision)

    def check_outputs(self, outputs: SampleOutputs, batch_size: int) -> None:
        """Raise `BatchError` unless a task returned one number a sample."""
        for name in ("output", "loss", "loss_grad", "loss_hess", "label", "baseline"):
            value = getattr(outputs, name)
            if value is not None:
                check_per_sample(name, value, batch_size, "rows")

    def check_first_sample(self, outputs: Tensor, batch: Batch, batch_size: int) -> None:
        """Raise `GradientError` if the first sample run alone has another f than within its batch (centring, …)."""
        if not self._backend.any(batch_size > 1):
            return
        try:
            with torch.no_grad():
                alone = self._task.outputs(self._model, select_samples(batch, torch.tensor([0]), batch_size)).output
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            if self._backend.is_sharded:  # the other ranks run on
                raise
            logger.debug("the first sample cannot be run alone: %s", error)  # some models need several, and are sound
            return
        self.check_alone(outputs[:1], alone.reshape(-1)[:1])

    def check_alone(self, together: Tensor, alone: Tensor) -> None:
        """Raise `GradientError` if samples run alone have other f than within their batch, ``[b]`` each."""
        together, alone = together.double(), alone.double().to(together.device)
        bound = 10 * tolerance(self._dtype, self._device) * together.abs().max().clamp(min=1.0)
        if not bool(((together - alone).abs() <= bound).all() | ~torch.isfinite(together).all()):
            raise GradientError(
                "A sample run alone gives another output than within its batch: the samples of a batch influence each "
                "other (batch statistics, padding without a mask, losses over pairs). Tracer needs samples that do not."
            )

"""Per-sample gradients of any model: captured by layer rules, the rest by a fallback, and checked against autograd.

The first batch, and every later batch on which layers are called in a new way, is checked: with random weights c the
sum of ``c_b * gradient_b`` must equal autograd's gradient of ``sum_b c_b f_b`` for every parameter. Random weights find
rows that were assigned to the wrong sample, which a plain sum would not. A parameter that differs uses the fallback
from then on, which is logged with the reason, and is checked again.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tracer._core.text import listing
from tracer._core.validation import check_choice
from tracer.data.batches import select_samples
from tracer.data.tasks import LowerPrecision, Task
from tracer.errors import GradientError
from tracer.gradients.assignment import Assignment
from tracer.gradients.attention import CaptureFailed
from tracer.gradients.audit import Auditor, Finding, FirstOfTwo, Sink, WatchedSink
from tracer.gradients.backend import Backend, PlainBackend
from tracer.gradients.calls import CallPattern, CapturedLayer, SampleAxis
from tracer.gradients.capture import CapturedPass
from tracer.gradients.checkpointing import CheckpointFailed
from tracer.gradients.coupling import STATEFUL, coupling_error
from tracer.gradients.fallback import Fallback, has_batch_norm
from tracer.gradients.isolation import seed_generators
from tracer.gradients.module_state import StatelessTask
from tracer.gradients.per_sample import PerSampleGradient
from tracer.gradients.selfcheck import REPEATED, Reference, WeightedSums, disagreeing, same_values
from tracer.gradients.shared import RawFailed
from tracer.gradients.verification import Signature, Verifier, checking
from tracer.types import Batch, SampleOutputs, first_sample

logger = logging.getLogger("tracer.gradients")

METHODS = ("auto", "capture", "functional")
"""The choices of ``gradients=``."""


class GradientsChanged(GradientError):
    """Gradients of earlier batches, which were not checked, may be wrong; those of all batches are right from now on.

    Whoever passed the batches computes all of them again.
    """


class _Done(NamedTuple):
    """A captured pass: how it called its layers, whether it was checked, and what puts earlier batches in doubt."""

    signature: Signature
    checked: bool
    doubt: list[str]


class GradientEngine:
    """Computes per-sample gradients of f with respect to selected parameters.

    Args:
        model: The model. `compute` must run inside `tracer.gradients.isolation.isolated`.
        task: The task.
        names: Names of the selected parameters, as ``model.named_parameters()`` has them.
        method: ``"auto"``: layer rules, and the fallback if needed; ``"capture"``: an error instead of the fallback;
            ``"functional"``: the fallback for all. Default: ``"auto"``.
        device: The device of the model. Default: that of its first selected parameter.
        backend: How the model runs; for a sharded model all ranks make the same calls. Default: whole, here.
        for_sums: Whether only sums over samples are used, in which it does not matter whose a gradient is: then only
            new ways of calling layers are checked, and no sample is audited. Default: False.

    Attributes:
        stateless_task: The task, whose forwards leave the model's state as it was.
        audited: The position in the last batch of the sample that was run alone and agreed, or None.
        patterns: How the last batch called its layers.

    Raises:
        InputError: If the method is not known.
        GradientError: If ``"capture"`` was asked for and no layer rule covers a parameter.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        names: Sequence[str],
        method: str = "auto",
        device: torch.device | None = None,
        backend: Backend | None = None,
        for_sums: bool = False,
    ) -> None:
        check_choice("gradients", method, METHODS)
        self._for_sums = for_sums
        self.model, self.task, self.method = model, task, method
        self.names, self.backend = tuple(names), backend or PlainBackend(model)
        self.device = dict(model.named_parameters())[self.names[0]].device if device is None else device
        self.audited: int | None = None
        self.patterns: frozenset[CallPattern] = frozenset()
        self._checkpoints = True
        self.stateless_task = StatelessTask(task, model)
        self._assignment = Assignment(model, self.names, method, self.backend)
        autocast = task.dtype if isinstance(task, LowerPrecision) else None
        self._verifier = Verifier(model, self.stateless_task, self.names, self.backend, self.device, autocast)
        self._auditor = Auditor(self.stateless_task, self._verifier, self.device)
        self._fallback = Fallback(model, self.stateless_task, self._verifier.check_alone)

    @property
    def fallback(self) -> Mapping[str, str]:
        """The parameters that the fallback computes, with the reason."""
        return self._assignment.fallback

    @property
    def raw(self) -> frozenset[str]:
        """The parameters without a layer rule whose gradients are taken from the functions that use them."""
        return frozenset(self._assignment.raw)

    def layer_parameters(self) -> frozenset[str]:
        """Return the parameters whose gradients come from layers' rules alone."""
        return frozenset(name for layer in self._assignment.layers for name in layer.parameters.values())

    def plain_layers(self) -> tuple[list[CapturedLayer], Mapping[str, SampleAxis]] | str:
        """Return the layers whose calls give all gradients, and their axes; or why calls of layers do not suffice."""
        assignment = self._assignment
        if others := sorted({*assignment.fallback, *assignment.raw}):
            return f"no layer's input and output give the gradient of {listing(others)}"
        if assignment.stand_ins:
            return f"{type(assignment.stand_ins[0].module).__name__} is captured by a module that replaces it"
        mixed = {name for name, axis in assignment.axes.items() if axis is SampleAxis.MIXED}
        if others := sorted(mixed | {layer.name for layer in assignment.layers if layer.changed}):
            return f"{listing(others)} get rows in any order, or have outputs that are changed in place"
        return list(assignment.layers), dict(assignment.axes)

    @property
    def runs_samples_alone(self) -> bool:
        """Whether the fallback runs sample by sample, since ``vmap`` failed."""
        return self._fallback.looped

    def use_fallback(self, reasons: Mapping[str, str]) -> None:
        """Compute some parameters by the fallback, for example since capture was wrong for them before."""
        for name in reasons.keys() & set(self._assignment.captured):
            self._assignment.drop_parameter(name, reasons[name], at_once=True)

    def use_weights(self, fingerprint: str) -> None:
        """Declare which weights are in the model: gradients are verified for each anew."""
        self._verifier.use_weights(fingerprint)

    def using_weights(self, fingerprint: str) -> AbstractContextManager[None]:
        """Declare which weights are in the model within a ``with`` block."""
        return self._verifier.using_weights(fingerprint)

    def weights_moved(self, verify: bool) -> None:
        """Declare that training changed the weights in the model; with ``verify`` the next pass is checked again."""
        self._verifier.weights_moved(verify)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that layers compute in."""
        return self._verifier.dtype

    def compute(self, batch: Batch, batch_size: int, sink: Sink) -> SampleOutputs:
        """Compute the per-sample gradients of a batch and pass them to a sink, layer by layer.

        Args:
            batch: The batch, on the model's device.
            batch_size: Its number of samples ``B``, at least 1.
            sink: Takes the gradients.

        Returns:
            f, L, Q, w of each sample, ``[B]`` each, detached.

        Raises:
            GradientError: If no method gives gradients that agree with autograd.
            GradientsChanged: If those of earlier batches are in doubt.
        """
        if batch_size == 1 and has_batch_norm(self.model):
            # torch 2.13 on CPUs: BatchNorm in eval mode has a wrong input gradient for a batch of one, by its strides.
            twice = select_samples(batch, torch.zeros(2, dtype=torch.int64), 1)
            outputs = self.compute(twice, 2, FirstOfTwo(sink))
            self.audited = None if self.audited is None else 0
            return first_sample(outputs)
        with _without_reentrant_checkpoints():
            return self._compute(batch, batch_size, sink)

    def _compute(self, batch: Batch, batch_size: int, sink: Sink) -> SampleOutputs:
        watched = WatchedSink(sink, None if self._for_sums else self._auditor.choose(batch, batch_size))
        self.audited = None
        with self.stateless_task.unchanged():
            outputs, done = self._complete(batch, batch_size, watched)
            doubt = done.doubt
            if watched.row is not None:
                with checking(self.device):
                    found = self._auditor.audit(watched, outputs, batch, batch_size)
                if self.backend.any(isinstance(found, Finding)):
                    before = outputs
                    outputs, done = self._complete(batch, batch_size, watched, watched.row)
                    doubt += done.doubt
                    found = self._auditor.audit(watched, outputs, batch, batch_size)
                    if not same_values(before.output, outputs.output, self._verifier.dtype, REPEATED):
                        raise GradientError(STATEFUL)
                    if isinstance(found, Finding):
                        raise self._auditor.error(found, batch)
                with checking(self.device):
                    if not self.backend.is_sharded and self._auditor.drifts(batch, batch_size):
                        raise GradientError(STATEFUL)
                self.audited = watched.row if found else None
        self._verifier.confirm(done.signature, done.checked)
        self.patterns = done.signature[0]
        if doubt:
            self._verifier.start_again()
            raise GradientsChanged(
                f"Captured gradients of {', '.join(doubt)} turned out to be wrong for some samples of a later batch, "
                f"although the first batches agreed with autograd. They are computed without capture from now on. "
                f"Compute all batches again."
            )
        return outputs

    def _complete(
        self, batch: Batch, batch_size: int, sink: WatchedSink, suspect: int | None = None
    ) -> tuple[SampleOutputs, _Done]:
        """Compute captured gradients and the others, with a check if there is a suspect."""
        outputs, done = self._captured(batch, batch_size, sink, suspect)
        for start, stop, gradients in self._fallback.blocks(batch, batch_size, list(self.fallback), outputs.output):
            with torch.no_grad():
                sink.take(start, stop, gradients)
        return outputs, done

    def _captured(
        self, batch: Batch, batch_size: int, sink: WatchedSink, suspect: int | None
    ) -> tuple[SampleOutputs, _Done]:
        """Run captured passes until one agrees with autograd or needs no check."""
        assignment, verifier = self._assignment, self._verifier
        doubt: list[str] = []
        while True:
            seed_generators(self.device)
            sink.begin()
            try:
                began = time.perf_counter()
                captured = CapturedPass(
                    self.model,
                    self.stateless_task,
                    batch,
                    batch_size,
                    assignment.layers,
                    assignment.stand_ins,
                    assignment.axes,
                    assignment.raw,
                    self._checkpoints,
                )
                with closing(captured):
                    self._fallback.looped |= self.stateless_task.converts_weights
                    verifier.check_autocast(captured.autocast)
                    verifier.check_outputs(captured.outputs, batch_size)
                    signature = captured.patterns, batch_size == 1
                    due = verifier.is_due(signature, only_new=self._for_sums) or suspect is not None
                    if due:
                        verifier.use_precision(captured.half_precision())
                        verifier.make_room(time.perf_counter() - began)
                    sums = verifier.sums(batch_size, suspect) if due else None
                    if sums is not None:
                        sink.leave_to(sums)
                    self._backward(captured, batch_size, sink, sums)
                if sums is not None:
                    with checking(self.device):
                        wrong = self._wrong(captured, sums, batch, batch_size)
                    if self.backend.any(wrong is not None):
                        in_doubt = verifier.puts_in_doubt(signature)
                        assignment.blame(wrong or {}, captured, batch_size, at_once=in_doubt)
                        doubt += (wrong or {}) if in_doubt else ()
                        continue
                    sink.take_over(sums)
            except CaptureFailed as failure:
                assignment.give_up(failure.layer, failure.reason, failure.expanded)
                continue
            except CheckpointFailed as failure:
                logger.info("gradient checkpointing is left out while gradients are captured: %s", failure)
                self._checkpoints = False
                continue
            except RawFailed as failure:
                assignment.give_up_raw(failure.reasons)
                continue
            assignment.confirm()
            return captured.outputs, _Done(signature, due, doubt)

    def _backward(self, captured: CapturedPass, batch_size: int, sink: Sink, sums: WeightedSums | None) -> None:
        """Pass captured gradients to the sink and, if they are to be checked, to the sums."""

        def receive(gradients: dict[str, PerSampleGradient]) -> None:
            with torch.no_grad():
                if sums is not None:
                    with checking(self.device):
                        sums.add(0, gradients)
                sink.take(0, batch_size, gradients)

        captured.backward(receive)

    def _wrong(
        self, captured: CapturedPass, sums: WeightedSums, batch: Batch, batch_size: int
    ) -> dict[str, str] | None:
        """Check a captured pass and the fallback against autograd; return the wrong gradients, or None."""
        reference = self._verifier.checked_reference(batch, sums, self.fallback)
        if not reference.same_outputs(captured.outputs.output):
            if not (self._assignment.blame_expanded(captured) or self._assignment.blame_experts()):
                raise GradientError(STATEFUL)
            return {}
        wrong = disagreeing(reference, sums.totals, self._assignment.captured)
        if wrong:
            return wrong
        self._check_fallback(reference, sums.weights, batch, batch_size)
        self._verifier.confirm_gradients(reference)
        return None

    def _check_fallback(self, reference: Reference, weights: Tensor, batch: Batch, batch_size: int) -> None:
        """Check the fallback against autograd; if vmap differs, samples are run alone, and must agree."""
        if not self.fallback:
            return
        sums = WeightedSums(weights)
        for start, _, gradients in self._fallback.blocks(batch, batch_size, list(self.fallback), reference.outputs):
            sums.add(start, gradients)
        differs = reference.compare(sums.totals, self.fallback)
        if not differs:
            return
        if not self._fallback.looped:
            logger.info("torch.func gives other gradients than autograd (%s); running sample by sample", differs)
            self._fallback.looped = True
            return self._check_fallback(reference, weights, batch, batch_size)
        name, difference = next(iter(differs.items()))
        one = select_samples(batch, torch.tensor([0]), batch_size)
        raise coupling_error(self.model, self.stateless_task, batch, one, 0, f"the gradient of {name!r}, {difference}")


@contextmanager
def _without_reentrant_checkpoints() -> Iterator[None]:
    """Raise `GradientError` for a model whose forward uses checkpoints that only ``backward()`` passes."""
    try:
        yield
    except RuntimeError as error:
        if ".grad()" not in str(error) or "checkpoint" not in str(error):
            raise
        raise GradientError(
            "The model's forward uses reentrant activation checkpointing, which torch.autograd.grad cannot pass. Pass "
            "use_reentrant=False to checkpoint(), or switch checkpointing off: gradients are the same."
        ) from error

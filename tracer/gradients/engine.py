"""Per-sample gradients of any model: captured where a layer rule applies, the general way elsewhere, checked always.

The first batch, and every later batch on which layers are called in a new way, is checked: with random weights c the
sum of ``c_b * gradient_b`` must equal autograd's gradient of ``sum_b c_b f_b`` for every parameter. Random weights find
rows that were assigned to the wrong sample, which a plain sum would not. What differs falls back to the general
way, is logged with its reason, and is checked again.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from tracer._core.sharding import layer_type
from tracer._core.validation import check_choice
from tracer.data.batches import select_samples
from tracer.data.tasks import LowerPrecision, Task
from tracer.errors import BatchError, GradientError, TracerError
from tracer.gradients.attention import CapturedAttention, CaptureFailed, refuses_attention
from tracer.gradients.backend import Backend, PlainBackend
from tracer.gradients.capture import CallPattern, CapturedLayer, CapturedPass, Layout
from tracer.gradients.functional import can_vmap, loop_gradients, vmap_gradients
from tracer.gradients.isolation import seed_generators
from tracer.gradients.layers import rule_for
from tracer.gradients.per_sample import DenseGradient, PerSampleGradient
from tracer.gradients.selfcheck import (
    Reference,
    WeightedSums,
    disagreeing,
    tolerance,
)
from tracer.types import Batch, SampleOutputs

logger = logging.getLogger("tracer.gradients")

METHODS = ("auto", "capture", "functional")
"""What ``gradients=`` takes."""

_EAGER_CHECKS = 16
FUNCTIONAL_BYTES = 256 << 20
"""How many bytes of per-sample gradients the general way builds at once."""


@dataclass
class _Verified:
    """What was checked at one checkpoint.

    Attributes:
        signatures: Call patterns, of one row or of several, that agreed with autograd.
        seen: Parameters whose gradient was more than noise when they agreed.
        num_batches: How many batches were computed.
    """

    signatures: set[tuple[frozenset[CallPattern], bool]] = field(default_factory=set)
    seen: set[str] = field(default_factory=set)
    num_batches: int = 0

    def is_due(self, signature: tuple[frozenset[CallPattern], bool], names: Sequence[str]) -> bool:
        """Say whether a pass is to be checked.

        New patterns are. Known ones are checked again while the gradient of some parameter was never more than noise,
        since agreeing on zero says nothing: for the first batches, then ever more rarely, as it may be unused.

        Args:
            signature: How the pass called its layers.
            names: All parameters.

        Returns:
            Whether to check.
        """
        if signature not in self.signatures:
            return True
        unseen = not self.seen.issuperset(names)
        return unseen and (self.num_batches < _EAGER_CHECKS or self.num_batches & (self.num_batches - 1) == 0)


class Sink(Protocol):
    """What takes the gradients of a batch as they are computed."""

    def begin(self) -> None:
        """Forget what came: the gradients of all parameters will come (again)."""

    def take(self, start: int, stop: int, gradients: dict[str, PerSampleGradient]) -> None:
        """Take gradients of samples ``start`` to ``stop``, by parameter name.

        Each parameter of a sample comes once; one that never comes has gradient zero. What is not kept is freed. It is
        called under ``no_grad``.
        """


class GradientEngine:
    """Computes per-sample gradients of f with respect to selected parameters.

    Args:
        model: The model. `compute` must run inside `tracer.gradients.isolation.isolated`.
        task: The task.
        names: Names of the selected parameters, as ``model.named_parameters()`` has them.
        method: ``"auto"``: capture, falling back where needed; ``"capture"``: an error instead of a fallback;
            ``"functional"``: the general way for all.
        device: Where the model runs; by default where its first parameter is.
        backend: How the model runs; of a sharded model all ranks make the same calls.

    Raises:
        InputError: The method is not known.
        GradientError: ``"capture"`` was asked for and a parameter belongs to no layer rule.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        names: Sequence[str],
        method: str = "auto",
        device: torch.device | None = None,
        backend: Backend | None = None,
    ) -> None:
        check_choice("gradients", method, METHODS)
        self.model, self.task, self.method = model, task, method
        self.names, self.backend = tuple(names), backend or PlainBackend(model)
        parameters = dict(model.named_parameters())
        first = parameters[self.names[0]]
        self._shapes = {name: parameters[name].shape for name in self.names}
        self.device = first.device if device is None else device
        self.precision = task.dtype if isinstance(task, LowerPrecision) else None
        self._dtype = self.precision or first.dtype
        self.general: dict[str, str] = {}
        self.looped = False
        self._layouts: dict[str, Layout] = {}
        self._tried: dict[str, set[Layout]] = {}
        self._suspects: dict[str, dict[str, str]] = {}
        self._verified = _Verified()
        self._by_weights: dict[str, _Verified] = {}
        self._layers: list[CapturedLayer] = []
        self._attentions: list[CapturedAttention] = []
        self._assign()

    def use_weights(self, fingerprint: str) -> None:
        """Say which weights are in the model: what was verified with others counts no more.

        A contribution may vanish at one checkpoint and not at the next (a gate or a head that starts at zero).

        Args:
            fingerprint: Tells weights apart.
        """
        self._verified = self._by_weights.setdefault(fingerprint, _Verified())

    @contextmanager
    def using_weights(self, fingerprint: str) -> Iterator[None]:
        """Say which weights are in the model for a while, and then that it is the earlier ones again.

        Args:
            fingerprint: Tells weights apart.

        Yields:
            Nothing.
        """
        before = self._verified
        self.use_weights(fingerprint)
        try:
            yield
        finally:
            self._verified = before

    def compute(self, batch: Batch, batch_size: int, sink: Sink) -> SampleOutputs:
        """Compute the per-sample gradients of a batch and give them to a sink, layer by layer.

        Args:
            batch: The batch, on the model's device.
            batch_size: Its number of samples ``B``, one at least.
            sink: Takes the gradients.

        Returns:
            f, L, Q, w of each sample, ``[B]`` each, detached.

        Raises:
            GradientError: No method gives gradients that agree with autograd.
        """
        outputs = self._captured(batch, batch_size, sink)
        for start, stop, gradients in self._general_parts(batch, batch_size, outputs.output):
            with torch.no_grad():
                sink.take(start, stop, gradients)
        return outputs

    def _assign(self) -> None:
        """Divide the parameters between layer rules and the general way."""
        self._layers, self._attentions = [], []
        if self.method != "functional":
            canonical = {id(parameter): name for name, parameter in self.model.named_parameters()}
            for layer_name, module in self.model.named_modules():
                if layer_type(module) is nn.MultiheadAttention and not refuses_attention(module):
                    attention = CapturedAttention(layer_name, module)
                    if self._take(attention.projection_name, attention.projection, canonical):
                        self._attentions.append(attention)
                else:
                    self._take(layer_name or type(module).__name__, module, canonical)
        owned = {name for layer in self._layers for name in layer.parameters.values()}
        rest = {name: self._why_general(name) for name in self.names if name not in owned and name not in self.general}
        self.backend.refuse_fallback(rest)
        for name, reason in rest.items():
            self._give_up(name, reason)

    def _take(self, layer_name: str, module: nn.Module, canonical: Mapping[int, str]) -> bool:
        """Capture a layer if a rule covers wanted parameters of it, and return whether."""
        registered = rule_for(module)
        if registered is None or not module._parameters or registered.refuses(module):
            return False
        mine = {
            local: canonical[id(parameter)]
            for local, parameter in module._parameters.items()
            if parameter is not None and local in registered.parameters
        }
        wanted = {k: v for k, v in mine.items() if v in self.names and v not in self.general}
        if wanted:
            self._layers.append(CapturedLayer(layer_name, module, registered, wanted))
        return bool(wanted)

    def _why_general(self, name: str) -> str:
        if self.method == "functional":
            return "gradients='functional'"
        module = self.model.get_submodule(name.rpartition(".")[0])
        if isinstance(module, nn.MultiheadAttention) and (reason := refuses_attention(module)):
            return reason
        registered = rule_for(module)
        reason = registered.refuses(module) if registered is not None else None
        return reason or f"no layer rule covers it in {type(module).__name__}"

    def _give_up(self, name: str, reason: str) -> None:
        """Send a parameter the general way, with the reason said once."""
        self.backend.refuse_fallback({name: reason})
        if self.method == "capture":
            raise GradientError(
                f"gradients='capture' cannot compute the gradient of {name!r}: {reason}. Use gradients='auto', which "
                f"takes torch.func for such parameters, leave it out with params=, or register_layer_rule."
            )
        self.general[name] = reason
        if self.method == "auto":
            logger.info("per-sample gradients of %r are computed by torch.func: %s", name, reason)

    def _captured(self, batch: Batch, batch_size: int, sink: Sink) -> SampleOutputs:
        """Run a captured pass, checked where its signature is new, until everything agrees."""
        while True:
            seed_generators(self.device)
            sink.begin()
            try:
                captured = CapturedPass(
                    self.model, self.task, batch, batch_size, self._layers, self._attentions, self._layouts
                )
                self._check_outputs(captured.outputs, batch_size)
                # One row tells nothing of which rows are which samples: it is verified apart.
                signature = (captured.patterns, batch_size == 1)
                due = self.backend.any(self._verified.is_due(signature, self.names))
                sums = WeightedSums(batch_size, shrink=self.backend.is_sharded) if due else None
                self._backward(captured, batch_size, sink, sums)
                if sums is not None and self.backend.any(not self._verify(captured, sums, batch, batch_size)):
                    continue
            except CaptureFailed as failure:
                suspects = list(self._suspects) if failure.expanded else []
                for layer in suspects or [failure.layer]:
                    self._drop_layer(layer, failure.reason)
                continue
            self._verified.signatures.add(signature)
            self._verified.num_batches += 1
            self._suspects.clear()
            return captured.outputs

    def _backward(self, captured: CapturedPass, batch_size: int, sink: Sink, sums: WeightedSums | None) -> None:
        """Give what is captured to the sink and, where it is to be checked, to the sums."""

        def receive(gradients: dict[str, PerSampleGradient]) -> None:
            with torch.no_grad():
                if sums is not None:
                    sums.add(0, gradients)
                sink.take(0, batch_size, gradients)

        captured.backward(receive)

    def _check_outputs(self, outputs: SampleOutputs, batch_size: int) -> None:
        for name in ("output", "loss", "loss_grad", "loss_hess", "label", "baseline"):
            value = getattr(outputs, name)
            if value is not None and value.shape != (batch_size,):
                raise BatchError(
                    f"The task gave {name} of shape {tuple(value.shape)} for a batch of {batch_size} rows; expected "
                    f"({batch_size},). A task returns one number a sample (losses of torch take reduction='none')."
                )

    def _verify(self, captured: CapturedPass, sums: WeightedSums, batch: Batch, batch_size: int) -> bool:
        """Check a captured pass and the general way against autograd; False when something was changed."""
        seed_generators(self.device, 1)  # another seed: a model that draws random numbers must not pass
        reference = self.backend.reference(self.task, batch, batch_size, self._shapes, self.precision)
        if not reference.same_outputs(captured.outputs.output):
            shared = {pattern.layer for pattern in captured.patterns if pattern.layout is Layout.SHARED}
            expanded = shared.intersection(self._suspects) or shared
            if not expanded:
                raise GradientError(
                    "Two forwards of one batch give different outputs: the model draws random numbers in eval mode or "
                    "keeps state between calls. Its gradients would depend on batch sizes and order; make its eval "
                    "mode a function of the batch."
                )
            for name in sorted(expanded):
                self._drop_layer(name, "giving each sample its own copy of its output changes the model's outputs")
            return False
        self._check_first_row(reference, batch, batch_size)
        wrong = disagreeing(reference, sums.totals, [n for n in self.names if n not in self.general])
        if wrong:
            self._blame(wrong, captured, batch_size)
            return False
        if not self._verify_general(reference, batch, batch_size):
            return False
        self._verified.seen.update(reference.above_noise())
        return True

    def _blame(self, wrong: Mapping[str, str], captured: CapturedPass, batch_size: int) -> None:
        """Try another layout for the layers of a wrong gradient; give the parameter up when all were tried."""
        for pattern in captured.patterns:
            self._tried.setdefault(pattern.layer, set()).add(pattern.layout)
        found: dict[str, Layout] = {}
        for name, difference in wrong.items():
            layers = sorted(set(captured.layers.get(name, ())))
            where = ", ".join(layers) or "no layer"
            reason = f"captured from {where}, its gradient differs from autograd's ({difference})"
            if batch_size > 1:
                found |= {layer: layout for layer in layers if (layout := self._untried(layer)) is not None}
            if found.keys().isdisjoint(layers):
                self._drop_parameter(name, reason)
            for layer in found.keys() & set(layers):
                self._suspects.setdefault(layer, {})[name] = reason
        for layer, layout in found.items():
            self._layouts[layer] = layout
            self._tried[layer].add(layout)

    def _untried(self, layer: str) -> Layout | None:
        """Return a layout that was not tried for a layer, cheapest first; `Layout.ROWS` is tried where it can be."""
        return next((one for one in (Layout.SECOND, Layout.SHARED) if one not in self._tried[layer]), None)

    def _verify_general(self, reference: Reference, batch: Batch, batch_size: int) -> bool:
        """Check the general way against autograd; vmap may give way to the loop, the loop to an error."""
        if not self.general:
            return True
        rest = reference.of(self.general)
        sums = WeightedSums(batch_size)
        for start, _, gradients in self._general_parts(batch, batch_size, reference.outputs):
            sums.add(start, gradients)
        differs = rest.compare(sums.totals)
        if not differs:
            return True
        if not self.looped:
            logger.info("torch.func gives other gradients than autograd (%s); running sample by sample", differs)
            self.looped = True
            return self._verify_general(reference, batch, batch_size)
        name, difference = next(iter(differs.items()))
        raise GradientError(
            f"The gradient of {name!r} depends on which samples share a batch ({difference}): a sample run alone gives "
            f"another result. Tracer needs samples that do not influence each other; look for batch statistics "
            f"(normalization over the batch), losses over pairs, or sampling in the forward."
        )

    def _drop_layer(self, layer_name: str, reason: str) -> None:
        """Give up what a layer was suspected of, or all of its parameters."""
        layer = next((layer for layer in self._layers if layer.name == layer_name), None)
        if layer is None:
            raise GradientError(f"Layer {layer_name!r} cannot be captured: {reason}.")
        suspected = self._suspects.pop(layer_name, {})
        self._layouts.pop(layer_name, None)
        for name in suspected or layer.parameters.values():
            self._drop_parameter(name, suspected.get(name, f"captured from {layer_name}: {reason}"))

    def _drop_parameter(self, name: str, reason: str) -> None:
        if name not in self.general:
            self._give_up(name, reason)
        self._assign()

    def _general_parts(
        self, batch: Batch, batch_size: int, outputs: Tensor
    ) -> Iterator[tuple[int, int, dict[str, PerSampleGradient]]]:
        """Compute the parameters without a rule, a few samples at a time."""
        names = [name for name in self.names if name in self.general]
        if not names:
            return
        shapes: Mapping[str, Tensor] = dict(self.model.named_parameters())
        row_bytes = sum(shapes[name].numel() * shapes[name].element_size() for name in names)
        step = max(1, min(batch_size, FUNCTIONAL_BYTES // row_bytes))
        for start in range(0, batch_size, step):
            stop = min(start + step, batch_size)
            part = batch
            if stop - start < batch_size:
                part = select_samples(batch, torch.arange(start, stop), batch_size)
            alone, gradients = self._general(part, stop - start, names)
            self._check_alone(outputs[start:stop], alone)
            yield start, stop, {name: DenseGradient(value) for name, value in gradients.items()}

    def _general(self, batch: Batch, batch_size: int, names: list[str]) -> tuple[Tensor, dict[str, Tensor]]:
        if not self.looped and can_vmap(batch, batch_size):
            try:
                return vmap_gradients(self.model, self.task, batch, batch_size, names)
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
                reason = str(error).strip().partition("\n")[0]
                logger.info("torch.func.vmap cannot run the model (%s); running sample by sample", reason)
        self.looped = True
        try:
            return loop_gradients(self.model, self.task, batch, batch_size, names)
        except (torch.OutOfMemoryError, TracerError):
            raise
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            raise GradientError(
                f"The gradients of {', '.join(names[:4])} need each sample to be run alone, and that fails: {error}"
            ) from error

    def _check_first_row(self, reference: Reference, batch: Batch, batch_size: int) -> None:
        """Run one row alone: values that it takes from other rows (centring over the batch) show in its output."""
        if not self.backend.any(batch_size > 1):
            return
        try:
            with torch.no_grad():
                alone = self.task.outputs(self.model, select_samples(batch, torch.tensor([0]), batch_size)).output
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            if self.backend.is_sharded:  # the other ranks run on
                raise
            logger.debug("the first row cannot be run alone: %s", error)  # a model may need several rows and be sound
            return
        self._check_alone(reference.outputs[:1], alone.reshape(-1)[:1])

    def _check_alone(self, together: Tensor, alone: Tensor) -> None:
        together, alone = together.double(), alone.double().to(together.device)
        bound = 10 * tolerance(self._dtype, self.device) * together.abs().max().clamp(min=1.0)
        if not bool(((together - alone).abs() <= bound).all() | ~torch.isfinite(together).all()):
            raise GradientError(
                "A sample run alone gives another output than within its batch: the samples of a batch influence each "
                "other (batch statistics, padding without a mask, losses over pairs). Tracer needs samples that do not."
            )

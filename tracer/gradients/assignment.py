"""The assignment of parameters to layer rules or to the fallback, which changes as checks fail."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from torch import nn

from tracer._core.sharding import layer_type
from tracer.errors import GradientError
from tracer.gradients.attention import CapturedAttention, refuses_attention
from tracer.gradients.backend import Backend
from tracer.gradients.calls import CapturedLayer, SampleAxis
from tracer.gradients.capture import CapturedPass
from tracer.gradients.experts import CapturedExperts, has_experts
from tracer.gradients.layers import rule_for

logger = logging.getLogger("tracer.gradients")


class Assignment:
    """The layers to capture, and the parameters that the fallback computes.

    Args:
        model: The model.
        names: The selected parameters.
        method: One of `tracer.gradients.METHODS`.
        backend: How the model runs.

    Attributes:
        layers: The layers to capture.
        stand_ins: The modules of attention or experts whose products are among them.
        raw: The parameters without a layer rule that are captured wherever the forward uses them.
        fallback: The parameters that the fallback computes, with the reason.
        axes: The axis of samples of layers and raw parameters for which it is not the one that shapes suggest.

    Raises:
        GradientError: If a parameter needs the fallback, and the method or the backend does not allow it.
    """

    def __init__(self, model: nn.Module, names: Sequence[str], method: str, backend: Backend) -> None:
        self._model, self._names, self._method, self._backend = model, names, method, backend
        self.raw: set[str] = set()
        self.fallback: dict[str, str] = {}
        self.axes: dict[str, SampleAxis] = {}
        self._tried: dict[str, set[SampleAxis]] = {}
        self._own_experts: set[str] = set()
        self._changed: set[str] = set()
        self._suspects: dict[str, dict[str, str]] = {}
        self._assign()

    @property
    def captured(self) -> list[str]:
        """The parameters that are captured."""
        return [name for name in self._names if name not in self.fallback]

    def blame(self, wrong: Mapping[str, str], captured: CapturedPass, batch_size: int, at_once: bool = False) -> None:
        """Try another axis for the layers of each wrong gradient; after all axes, or at once, use the fallback."""
        for pattern in captured.patterns:
            self._tried.setdefault(pattern.layer, set()).add(pattern.axis)
        found: dict[str, SampleAxis] = {}
        changed: set[str] = set()
        for name, difference in wrong.items():
            layers = sorted(set(captured.layers.get(name, ())))
            reason = (
                f"captured from {', '.join(layers) or 'its uses'}, its gradient differs from autograd's ({difference})"
            )
            if not layers and not at_once and (lost := self._lost(name)):
                changed |= lost
                continue
            if batch_size > 1 and not at_once:
                found |= {layer: axis for layer in layers if (axis := self._untried(layer)) is not None}
                if name in self.raw and (axis := self._next_raw(name)) is not None:
                    self.axes[name] = axis
                    continue
            if found.keys().isdisjoint(layers):
                self.drop_parameter(name, reason, at_once)
            for layer in found.keys() & set(layers):
                self._suspects.setdefault(layer, {})[name] = reason
        for layer, axis in found.items():
            self.axes[layer] = axis
            self._tried[layer].add(axis)
        if changed:
            self._changed |= changed
            self._assign()

    def blame_expanded(self, captured: CapturedPass) -> bool:
        """Drop layers whose output was given to each sample, after outputs changed; return whether there are any."""
        shared = {pattern.layer for pattern in captured.patterns if pattern.axis is SampleAxis.NONE}
        expanded = shared.intersection(self._suspects) or shared
        for name in sorted(expanded):
            if not self._mix(name):
                self._drop_layer(name, "giving each sample its own copy of its output changes the model's outputs")
        return bool(expanded)

    def blame_experts(self) -> bool:
        """Run modules of experts by their own forward, after outputs changed; return whether there are any."""
        found = {each.name for each in self.stand_ins if isinstance(each, CapturedExperts)}
        self._own_experts |= found
        self._assign()
        return bool(found)

    def give_up(self, layer: str, reason: str, expanded: bool) -> None:
        """Drop a layer whose capture failed, or, if an expansion may have caused it, all suspects."""
        suspects = set(self._suspects) & {each.name for each in self.layers} if expanded else set()
        for each in sorted(suspects) or [layer]:
            gone = each in suspects and all(each != one.name for one in self.layers)  # with a parameter that it shares
            if not gone and not (expanded and self._mix(each)):
                self._drop_layer(each, reason)
        self._suspects.clear()

    def confirm(self) -> None:
        """Clear all suspicions after a pass that agreed with autograd or was not checked."""
        self._suspects.clear()

    def _assign(self) -> None:
        self.layers: list[CapturedLayer] = []
        self.stand_ins: list[CapturedAttention | CapturedExperts] = []
        if self._method != "functional":
            canonical = {id(parameter): name for name, parameter in self._model.named_parameters()}
            for layer_name, module in self._model.named_modules():
                if layer_type(module) is nn.MultiheadAttention and not refuses_attention(module):
                    attention = CapturedAttention(layer_name, module)
                    if self._capture(attention.projection_name, attention.projection, canonical):
                        self.stand_ins.append(attention)
                elif layer_name not in self._own_experts and has_experts(module):
                    experts = CapturedExperts(layer_name, module)
                    if any([self._capture(*each, canonical) for each in experts.projections.items()]):
                        self.stand_ins.append(experts)
                else:
                    self._capture(layer_name or type(module).__name__, module, canonical)
        owned = {name for layer in self.layers for name in layer.parameters.values()}
        rest = {name: self._reason(name) for name in self.captured if name not in owned}
        if self._may_be_raw:
            self.raw |= rest.keys()
            return
        self._backend.refuse_fallback(rest)
        for name, reason in rest.items():
            self._use_fallback(name, reason)

    @property
    def _may_be_raw(self) -> bool:
        """Whether parameters without a layer rule may be captured: their gradient needs whole weights."""
        return self._method != "functional" and not self._backend.is_sharded

    def _capture(self, layer_name: str, module: nn.Module, canonical: Mapping[int, str]) -> bool:
        """Capture a layer if a rule covers wanted parameters of it, and return whether."""
        registered = rule_for(module)
        if registered is None or not module._parameters or registered.refuses(module):
            return False
        wanted = {
            local: name
            for local, parameter in module._parameters.items()
            if parameter is not None and local in registered.parameters
            if (name := canonical[id(parameter)]) in self._names and name not in self.fallback.keys() | self.raw
        }
        if wanted:
            self.layers.append(CapturedLayer(layer_name, module, registered, wanted, layer_name in self._changed))
        return bool(wanted)

    def _reason(self, name: str) -> str:
        if self._method == "functional":
            return "gradients='functional'"
        module = self._model.get_submodule(name.rpartition(".")[0])
        if isinstance(module, nn.MultiheadAttention) and (reason := refuses_attention(module)):
            return reason
        registered = rule_for(module)
        reason = registered.refuses(module) if registered is not None else None
        return reason or f"no layer rule covers it in {type(module).__name__}"

    def _use_fallback(self, name: str, reason: str) -> None:
        self._backend.refuse_fallback({name: reason})
        if self._method == "capture":
            raise GradientError(
                f"gradients='capture' cannot compute the gradient of {name!r}: {reason}. Use gradients='auto', which "
                f"uses torch.func for such parameters, leave it out with params=, or register_layer_rule."
            )
        self.fallback[name] = reason
        if self._method == "auto":
            logger.info("per-sample gradients of %r are computed by torch.func: %s", name, reason)

    def _untried(self, layer: str) -> SampleAxis | None:
        """Return an axis that was not tried for a layer; the first axis is tried whenever the shape allows it."""
        axes = [SampleAxis.SECOND, SampleAxis.NONE, *([] if self._backend.is_sharded else [SampleAxis.MIXED])]
        return next((axis for axis in axes if axis not in self._tried[layer]), None)  # the cheaper ones first

    def _lost(self, name: str) -> set[str]:
        """Return the layers with a parameter whose outputs may be changed in place, if that was not tried yet."""
        return {layer.name for layer in self.layers if name in layer.parameters.values()} - self._changed

    def _next_raw(self, name: str) -> SampleAxis | None:
        """Return an axis that was not tried for a raw parameter."""
        return {None: SampleAxis.SECOND, SampleAxis.SECOND: SampleAxis.MIXED}.get(self.axes.get(name))

    def _mix(self, layer: str) -> bool:
        """Let gradients tell whose rows are those of a layer, and return whether this was not tried yet."""
        tried = self._tried.setdefault(layer, set())
        if SampleAxis.MIXED in tried or self._backend.is_sharded:
            return False
        logger.info("which rows of %r belong to which sample is told by their gradients, by one more backward", layer)
        self._suspects.pop(layer, None)
        self.axes[layer] = SampleAxis.MIXED
        tried.add(SampleAxis.MIXED)
        return True

    def _drop_layer(self, layer_name: str, reason: str) -> None:
        """Use the fallback for the parameters that a layer was suspected of, or for all of its parameters."""
        layer = next((layer for layer in self.layers if layer.name == layer_name), None)
        if layer is None:
            raise GradientError(f"Layer {layer_name!r} cannot be captured: {reason}.")
        suspected = self._suspects.pop(layer_name, {})
        self.axes.pop(layer_name, None)
        for name in suspected or layer.parameters.values():
            self.drop_parameter(name, suspected.get(name, f"captured from {layer_name}: {reason}"))

    def give_up_raw(self, reasons: Mapping[str, str]) -> None:
        """Use the fallback for parameters whose uses cannot be captured."""
        for name, reason in reasons.items():
            self.drop_parameter(name, f"{self._reason(name)}, and {reason}")

    def drop_parameter(self, name: str, reason: str, at_once: bool = False) -> None:
        """Capture a parameter without its layers, or, if that failed or at once, use the fallback."""
        if self._may_be_raw and not at_once and name not in self.raw and name not in self.fallback:
            self.raw.add(name)
            logger.info("per-sample gradients of %r are taken from the functions that use it: %s", name, reason)
        elif name not in self.fallback:
            self.raw.discard(name)
            self._use_fallback(name, reason)
        self._assign()

"""Layer rules: from a layer's input and output gradient to the per-sample gradients of its parameters.

Layout: a rule gets a layer's first input ``x [N, ...]`` and the gradient ``g [N, ...]`` with respect to its output,
rows first; ``N`` is the number of samples, or a multiple of it if the model folds positions into rows. It returns, for
each wanted parameter, a gradient of ``N`` rows. The engine folds the rows into samples and checks the result against
autograd, so a rule need not care how the model arranges its batch.
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tracer._core.sharding import layer_type
from tracer.errors import InputTypeError
from tracer.gradients.per_sample import DenseGradient, OuterGradient, PerSampleGradient
from tracer.gradients.rows import RowsGradient
from tracer.gradients.windows import WindowGradient

Gradients = dict[str, PerSampleGradient]


@dataclass(frozen=True)
class LayerCall:
    """One call of a layer.

    Attributes:
        module: The layer, a ``torch.nn.Module`` (typed Any: a rule knows its attributes, a type checker does not).
        inputs: Its tensor arguments, ``[N, ...]`` each.
        grad_output: The gradient of the outputs' sum with respect to its output, ``[N, ...]``.
        wanted: The layer's own names of the parameters whose gradient is wanted.
    """

    module: Any
    inputs: tuple[Tensor, ...]
    grad_output: Tensor
    wanted: frozenset[str]

    @property
    def x(self) -> Tensor:
        """The layer's first input."""
        return self.inputs[0]


LayerRule = Callable[[LayerCall], Mapping[str, PerSampleGradient | Tensor]]
"""Returns the gradient of each wanted parameter: a `PerSampleGradient`, or a tensor ``[N, *parameter.shape]``."""


@dataclass(frozen=True)
class RegisteredRule:
    """A rule with the parameters it covers.

    Attributes:
        rule: The rule.
        parameters: The layer's own parameter names that it covers.
        refuses: Returns the reason why a given layer cannot be handled, or None.
    """

    rule: LayerRule
    parameters: tuple[str, ...]
    refuses: Callable[[nn.Module], str | None] = lambda module: None


_RULES: dict[type[nn.Module] | str, RegisteredRule] = {}


def register_layer_rule(
    module_type: type[nn.Module] | str,
    rule: LayerRule,
    parameters: Sequence[str] = ("weight", "bias"),
    refuses: Callable[[nn.Module], str | None] = lambda module: None,
) -> None:
    """Register how to compute the per-sample gradients of a layer type.

    A rule applies to exactly this type, not to subclasses, whose forward may differ. The self-check on the first batch
    compares its gradients with autograd.

    Args:
        module_type: The layer's class, or its qualified name (``"package.module.Class"``) to avoid the import; a name
            may contain ``*`` for any characters.
        rule: ``rule(call) -> {parameter name: gradient}`` with gradients ``[N, *parameter.shape]`` or factors.
        parameters: The names of the layer's own parameters that the rule covers. Default: weight and bias.
        refuses: Returns the reason why a given layer must use the fallback, or None. Default: none is refused.

    Raises:
        InputTypeError: If the type is neither a module class nor a string, or the rule cannot be called.

    >>> class Scale(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.weight = nn.Parameter(torch.ones(3))
    ...     def forward(self, x):
    ...         return x * self.weight
    >>> register_layer_rule(Scale, lambda call: {"weight": call.x * call.grad_output}, parameters=["weight"])
    """
    is_module = isinstance(module_type, type) and issubclass(module_type, nn.Module)
    if not (is_module or isinstance(module_type, str)) or not callable(rule):
        raise InputTypeError(
            f"register_layer_rule takes a torch.nn.Module class (or its qualified name) and a function of a LayerCall; "
            f"got {module_type!r} and {rule!r}."
        )
    _RULES[module_type] = RegisteredRule(rule, tuple(parameters), refuses)


def rule_of(kind: type[nn.Module] | str) -> LayerRule:
    """Return the rule registered for a layer type by this class or name."""
    return _RULES[kind].rule


def rule_for(module: nn.Module) -> RegisteredRule | None:
    """Return the rule registered for exactly this layer's type, or None; a name without ``*`` has priority."""
    kind = layer_type(module)
    name = f"{kind.__module__}.{kind.__qualname__}"
    found = _RULES.get(kind) or _RULES.get(name)
    if found is not None:
        return found
    patterns = (key for key in _RULES if isinstance(key, str) and "*" in key)
    return next((_RULES[key] for key in patterns if fnmatch.fnmatchcase(name, key)), None)


def _positions(values: Tensor) -> Tensor:
    """Return ``[N, ..., D]`` as ``[N, T, D]``; a vector input has one position."""
    return values.reshape(values.shape[0], -1, values.shape[-1])


def _same_dtype(x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Return the input in the gradient's dtype, which the layer computed in under autocast, and the gradient."""
    return x.to(g.dtype), g


def summed(values: Tensor, dim: int) -> Tensor:
    """Return the sum over a dimension; half-precision values are summed in float32."""
    half = values.dtype in (torch.float16, torch.bfloat16)
    return values.sum(dim, dtype=torch.float32 if half else None)


def _linear(call: LayerCall) -> Gradients:
    x, g = _same_dtype(call.x, call.grad_output)
    x, g = _positions(x), _positions(g)
    found: Gradients = {}
    if "weight" in call.wanted:
        found["weight"] = OuterGradient(g, x, call.module.weight.shape)
    if "bias" in call.wanted:
        found["bias"] = DenseGradient(summed(g, 1))
    return found


def _conv1d_of_transformers(call: LayerCall) -> Gradients:
    x, g = _same_dtype(call.x, call.grad_output)
    x, g = _positions(x), _positions(g)
    found: Gradients = {}
    if "weight" in call.wanted:  # stored [in, out]
        found["weight"] = OuterGradient(x, g, call.module.weight.shape)
    if "bias" in call.wanted:
        found["bias"] = DenseGradient(summed(g, 1))
    return found


def conv_weight_gradient(module: nn.Conv1d | nn.Conv2d | nn.Conv3d, x: Tensor, g: Tensor) -> WindowGradient:
    """Return a convolution weight's gradient from its input ``[N, C, *S]`` and its output's gradient ``[N, O, *L]``."""
    pads = module._reversed_padding_repeated_twice  # as F.pad takes it; resolved for 'same' and 'valid'
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    padded = F.pad(x, pads, mode=mode) if any(pads) else x
    return WindowGradient(
        padded,
        g,
        module.weight.shape,
        stride=module.stride,
        dilation=module.dilation,
        groups=module.groups,
    )


def _conv(call: LayerCall) -> Gradients:
    x, g = _same_dtype(call.x, call.grad_output)
    found: Gradients = {}
    if "weight" in call.wanted:
        found["weight"] = conv_weight_gradient(call.module, x, g)
    if "bias" in call.wanted:
        found["bias"] = DenseGradient(summed(g.flatten(2), 2))
    return found


def _embedding(call: LayerCall) -> Gradients:
    module = call.module
    index = call.x.reshape(call.x.shape[0], -1).long()
    values = call.grad_output.reshape(*index.shape, module.embedding_dim)
    if module.padding_idx is not None:
        values = values.masked_fill((index == module.padding_idx).unsqueeze(-1), 0.0)
    return {"weight": RowsGradient(index, values, module.weight.shape)}


def _scaled_embedding(call: LayerCall) -> Gradients:
    scaled = call.grad_output * call.module.embed_scale
    return _embedding(dataclasses.replace(call, grad_output=scaled))


def _affine(call: LayerCall, normalized: Tensor, channels_first: bool) -> Gradients:
    """Return gradients of ``y = normalized * weight + bias``, the weight over channels or over the last dimensions."""
    g = call.grad_output
    found: Gradients = {}
    for name, values in (("weight", lambda: normalized * g), ("bias", lambda: g)):
        if name not in call.wanted:
            continue
        if channels_first:  # [N, C, ...]
            found[name] = DenseGradient(summed(values().flatten(2), 2) if g.ndim > 2 else values())
        else:  # [N, ..., *shape]
            shape = getattr(call.module, name).shape
            found[name] = DenseGradient(summed(values().reshape(g.shape[0], -1, *shape), 1))
    return found


def _layer_norm(call: LayerCall) -> Gradients:
    module = call.module
    return _affine(call, F.layer_norm(call.x, module.normalized_shape, None, None, module.eps), False)


def _layer_scale(call: LayerCall) -> Gradients:
    (name,) = call.wanted
    values = call.x * call.grad_output
    shape = getattr(call.module, name).shape
    return {name: DenseGradient(summed(values.reshape(len(values), -1, *shape), 1))}


def _rms_norm(call: LayerCall) -> Gradients:
    module = call.module
    return _affine(call, F.rms_norm(call.x, module.normalized_shape, None, module.eps), False)


def _rms_norm_of_transformers(call: LayerCall) -> Gradients:
    module, x = call.module, call.x
    x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x  # as these layers do
    return _affine(call, F.rms_norm(x, (x.shape[-1],), None, _rms_epsilon(module)), False)


def _rms_epsilon(module: Any) -> float | None:
    """Return the epsilon of an RMSNorm of transformers, which has one of several names."""
    return getattr(module, "variance_epsilon", getattr(module, "eps", None))


def _refuses_rms_norm_of_transformers(module: Any) -> str | None:
    if _rms_epsilon(module) is None or getattr(module, "weight", None) is None or module.weight.ndim != 1:
        return "it is another RMSNorm than the usual ones"
    return None


def _group_norm(call: LayerCall) -> Gradients:
    module = call.module
    return _affine(call, F.group_norm(call.x, module.num_groups, None, None, module.eps), True)


def _instance_norm(call: LayerCall) -> Gradients:
    module, x = call.module, call.x
    running = module.running_mean is not None
    normalized = F.instance_norm(
        x,
        module.running_mean,
        module.running_var,
        use_input_stats=not running,
        eps=module.eps,
    )
    return _affine(call, normalized, True)


def _batch_norm(call: LayerCall) -> Gradients:
    module = call.module
    normalized = F.batch_norm(call.x, module.running_mean, module.running_var, None, None, False, 0.0, module.eps)
    return _affine(call, normalized, True)


def _refuses_batch_norm(module: Any) -> str | None:
    if module.running_mean is None:  # with running statistics, eval mode uses those
        return "it normalizes with the statistics of the batch"
    return None


def _refuses_embedding(module: Any) -> str | None:
    if module.scale_grad_by_freq:
        return "scale_grad_by_freq scales gradients by counts over the batch"
    if module.max_norm is not None:
        return "max_norm changes its weight in the forward"
    return None


def _refuses_scaled_embedding(module: Any) -> str | None:
    if not isinstance(module, nn.Embedding) or not hasattr(module, "embed_scale"):
        return "it is another scaled embedding than the usual ones"
    return _refuses_embedding(module)


INPUT_DIMS: dict[LayerRule, int] = {_linear: 1, _conv: 1, _conv1d_of_transformers: 0}
"""Rules of layers ``W a + b``, and the dimension of the weight's matrix that inputs have."""


def _register_defaults() -> None:
    register_layer_rule(nn.Linear, _linear)
    register_layer_rule("tracer.gradients.attention.PackedProjection", _linear)
    register_layer_rule("torch.nn.modules.linear.NonDynamicallyQuantizableLinear", _linear)  # of attention modules
    register_layer_rule("transformers.pytorch_utils.Conv1D", _conv1d_of_transformers)
    for conv in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
        register_layer_rule(conv, _conv)
    register_layer_rule(nn.Embedding, _embedding, ("weight",), _refuses_embedding)
    scaled_embeddings = "transformers.models.*Scaled*Embedding"
    register_layer_rule(scaled_embeddings, _scaled_embedding, ("weight",), _refuses_scaled_embedding)
    for layer_norm in (nn.LayerNorm, "timm.layers.norm.LayerNorm"):
        register_layer_rule(layer_norm, _layer_norm)
    for name in ("timm.layers.layer_scale.LayerScale", "transformers.models.*LayerScale"):
        register_layer_rule(name, _layer_scale, ("gamma", "lambda1"))
    register_layer_rule(nn.RMSNorm, _rms_norm, ("weight",))
    for name in ("transformers.models.*RMSNorm", "transformers.models.*T5LayerNorm"):  # also Gemma's, 1 + weight
        register_layer_rule(name, _rms_norm_of_transformers, ("weight",), _refuses_rms_norm_of_transformers)
    register_layer_rule(nn.GroupNorm, _group_norm)
    for norm in (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d):
        register_layer_rule(norm, _instance_norm)
    for batch_norm in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm):
        register_layer_rule(batch_norm, _batch_norm, ("weight", "bias"), _refuses_batch_norm)


_register_defaults()

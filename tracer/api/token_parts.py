"""Inner products of per-token gradients with a direction, and the directions that scores are products with."""

from __future__ import annotations

import copy
import dataclasses
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.autograd.forward_ad as forward_mode
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from tracer.data.model_inputs import logits_of
from tracer.data.tasks import Task, TaskModule
from tracer.data.token_tasks import TokenTask
from tracer.errors import BatchError, GradientError
from tracer.gradients.preconditioning import Preconditioner
from tracer.types import Batch, SampleOutputs

logger = logging.getLogger("tracer")


@contextmanager
def differentiable(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Choose kernels that have derivatives of both kinds, which fused ones of attention and LSTMs lack."""
    fast_path = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as stack:
        stack.callback(torch.backends.mha.set_fastpath_enabled, fast_path)
        torch.backends.mha.set_fastpath_enabled(False)
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(torch.autocast(device.type, enabled=False))
        if any(isinstance(module, nn.RNNBase) for module in model.modules()):
            with warnings.catch_warnings():  # torch's own flags() trips over its deprecated settings
                warnings.simplefilter("ignore")
                stack.enter_context(torch.backends.mkldnn.flags(enabled=False))
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        yield


def loss_gradient(model: nn.Module, task: Task, target: Batch, names: Sequence[str]) -> dict[str, Tensor]:
    """Return the gradient of the summed losses of a batch, ``[*shape]`` for each parameter."""
    outputs = task.outputs(model, target)
    parameters = dict(model.named_parameters())
    wanted = [parameters[name] for name in names]
    loss = (outputs.loss_grad * outputs.output).sum()
    found: Sequence[Tensor | None] = [None] * len(wanted)
    if loss.requires_grad:  # it does not where no selected parameter is used
        found = torch.autograd.grad(loss, wanted, allow_unused=True)
    gradients = {}
    for name, parameter, gradient in zip(names, wanted, found, strict=True):
        if gradient is None:
            gradient = torch.zeros_like(parameter)
        gradients[name] = gradient.to_dense() if gradient.is_sparse else gradient
    return gradients


def squared(gradient: Mapping[str, Tensor], preconditioner: Preconditioner) -> dict[str, Tensor]:
    """Return ``PᵀP g``, whose inner product with another gradient is that of both preconditioned."""
    return {name: each.to(gradient[name].dtype) for name, each in preconditioner.squared(gradient).items()}


def token_parts(model: nn.Module, task: Task, batch: Batch, direction: Mapping[str, Tensor]) -> Tensor:
    """Return ``Q <∂f/∂z_t, J_t v>`` of each position, ``[B, T]``, float64, after checking that they add up."""
    try:
        outputs, logits, change, beside = _forward(model, task, batch, direction)
    except NotImplementedError as reason:
        if not _logged_before(reason):
            logger.info("no forward-mode derivative (%s); differentiating twice instead", _first_line(reason))
        outputs, logits, change, beside = _twice(model, task, batch, direction)
    if logits.ndim < 3:
        raise BatchError(
            f"token_influence expects logits [B, T, vocabulary]; the model gave {tuple(logits.shape)}, which have no "
            f"position to split a loss over. A classifier's loss is one number a row: it has no tokens' parts."
        )
    if bool(beside.any()):
        raise GradientError(
            f"The task {task.name!r} has a loss that does not come from the logits alone: with these held fixed it "
            f"still has derivatives, up to {float(beside.abs().max()):.3g}. token_influence takes tasks whose loss "
            f"depends on the parameters through the logits of one call of the model (no penalty on weights, no hidden "
            f"states)."
        )
    (loss_grad,) = torch.autograd.grad(outputs.output.sum(), logits, allow_unused=True, materialize_grads=True)
    wide = torch.promote_types(logits.dtype, torch.float32)
    parts = (loss_grad.to(wide) * change.to(wide)).flatten(2).sum(2).double()
    return parts * outputs.loss_grad.double()[:, None]


_Derivative = tuple[SampleOutputs, Tensor, Tensor, Tensor]
"""Outputs; logits ``[B, T, V]`` that f can be differentiated by; their change along v; the change of f along v where
the logits are held fixed, ``[B]`` or summed up ``[1]``.

The last is 0 exactly, not up to rounding, where f depends on the parameters through the logits alone: they are cut off
from the parameters before f is computed. Comparing the parts' sum with f's own derivative would need a tolerance for
the roundings of sums over the vocabulary."""


def _forward(model: nn.Module, task: Task, batch: Batch, direction: Mapping[str, Tensor]) -> _Derivative:
    """Run a batch in forward mode, with parameters that carry a direction; no graph of the model is kept."""
    parameters = dict(model.named_parameters())
    found: list[tuple[Tensor, Tensor | None]] = []

    def cut(module: nn.Module, args: Any, output: Any) -> Any:
        logits, change = forward_mode.unpack_dual(logits_of(output))
        leaf = logits.detach().requires_grad_()
        found.append((leaf, change))
        return _with_logits(output, leaf)

    with forward_mode.dual_level():
        duals = {
            f"model.{name}": forward_mode.make_dual(parameters[name].detach(), tangent)
            for name, tangent in direction.items()
        }
        with _hooked(model, cut):
            outputs = torch.func.functional_call(TaskModule(model, task), duals, (batch,))
        logits, change = _only(found, task)
        beside = forward_mode.unpack_dual(outputs.output).tangent
        beside = torch.zeros_like(outputs.output) if beside is None else beside.detach().clone()
        change = torch.zeros_like(logits) if change is None else change.detach().clone()
    return outputs, logits, change, beside


def _twice(model: nn.Module, task: Task, batch: Batch, direction: Mapping[str, Tensor]) -> _Derivative:
    """Return ``J v`` as the derivative by u of ``<Jᵀu, v>``, for layers without a forward-mode derivative."""
    parameters = dict(model.named_parameters())
    wanted = [parameters[name] for name in direction]
    found: list[tuple[Tensor, Tensor | None]] = []

    def cut(module: nn.Module, args: Any, output: Any) -> Any:
        logits = logits_of(output)
        leaf = logits.detach().requires_grad_()
        found.append((leaf, logits))
        return _with_logits(output, leaf)

    def along(gradients: Sequence[Tensor | None]) -> Tensor:
        products = [(g * v).sum() for g, v in zip(gradients, direction.values(), strict=True) if g is not None]
        return torch.stack(products).sum() if products else torch.zeros(())

    with _hooked(model, cut):
        outputs = task.outputs(model, batch)
    leaf, logits = _only(found, task)
    assert logits is not None  # the hook keeps it
    # J v does not depend on u; with the loss's own slope, <Jᵀu, v> is a number to check it by.
    value = outputs.output.sum()
    (loss_grad,) = torch.autograd.grad(value, leaf, retain_graph=True, allow_unused=True, materialize_grads=True)
    weights = loss_grad.detach().requires_grad_()
    try:
        pulled = torch.autograd.grad(logits, wanted, weights, create_graph=True, allow_unused=True)
        expected = along(pulled)
        (change,) = torch.autograd.grad(expected, weights, retain_graph=True)
        products = (loss_grad * change).double()
        rounding = torch.finfo(logits.dtype).eps ** 0.5 * float(products.abs().sum())
        if not torch.allclose(products.sum(), expected.double(), rtol=1e-3, atol=rounding, equal_nan=True):
            raise RuntimeError("a backward cannot be differentiated")
    except (RuntimeError, NotImplementedError) as error:
        raise GradientError(
            f"The model {type(model).__name__} can be differentiated neither in forward mode nor twice: "
            f"{_first_line(error)}. Load it with plain attention (attn_implementation='eager'), or choose by params= "
            f"parameters behind the layer at fault."
        ) from error
    beside = along(torch.autograd.grad(value, wanted, retain_graph=True, allow_unused=True))
    return outputs, leaf, change.detach(), beside.detach().reshape(1)


@contextmanager
def _hooked(model: nn.Module, hook: Any) -> Iterator[None]:
    handle = model.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _only(found: Sequence[tuple[Tensor, Tensor | None]], task: Task) -> tuple[Tensor, Tensor | None]:
    if len(found) != 1:
        raise GradientError(
            f"The task {task.name!r} called the model {len(found)} times for a batch; token_influence takes tasks that "
            f"call it once, since positions of several calls are not of one row."
        )
    return found[0]


def _with_logits(output: Any, logits: Tensor) -> Any:
    """Return a model's output with other logits in the place that `logits_of` reads."""
    if isinstance(output, Tensor):
        return logits
    changed: Any = copy.copy(output)
    if isinstance(output, Mapping):
        changed["logits"] = logits
    elif hasattr(output, "_replace") and "logits" in output._fields:
        changed = output._replace(logits=logits)
    elif dataclasses.is_dataclass(output):
        changed = dataclasses.replace(changed, logits=logits)
    elif getattr(output, "logits", None) is not None:
        changed.logits = logits
    else:
        changed = (logits, *output[1:])
    return changed


def by_label(task: Task, model: nn.Module, batch: Batch, parts: Tensor) -> Tensor:
    """Move the parts ``[M, B, T]`` of a language model from the predicting position to the predicted token."""
    if not isinstance(task, TokenTask) or not task.shifts(model, batch):
        return parts
    return torch.cat([torch.zeros_like(parts[..., :1]), parts[..., :-1]], dim=-1)


_SEEN: set[str] = set()


def _logged_before(reason: BaseException) -> bool:
    """Return whether this reason was logged before."""
    text = _first_line(reason)
    known = text in _SEEN
    _SEEN.add(text)
    return known


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".")

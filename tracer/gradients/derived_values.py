"""Values that modules derive from weights and keep: a gradient that does not pass through them lacks a part."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tracer._core.sharding import is_sharded
from tracer._core.text import listing
from tracer.errors import GradientError
from tracer.gradients.kept_values import Flag, Place, flags, not_stored, places

_MOST = 0.01
"""The largest difference of a derivative and a finite difference, as a share of either."""
_DIRECTIONS = 3


def find_refilled(
    model: nn.Module, run: Callable[[], Tensor | None], restore: Callable[[], bool]
) -> list[Place | Flag]:
    """Return the places with tensors, and the flags beside them, that a forward sets again after they were emptied.

    Args:
        model: The model.
        run: Returns f of a batch from the modules' state as it is, or None if that fails.
        restore: Puts the modules' state back.
    """
    alike: dict[type, dict[Any, list[Place]]] = {}
    for place in not_stored([place for module in model.modules() for place in places(module)], model):
        alike.setdefault(type(place.module), {}).setdefault(place.path, []).append(place)
    found: list[Place | Flag] = []
    for groups in alike.values():
        needed: list[Place] = []  # by the forward, or kept by a flag
        for group in groups.values():
            for place in group:
                place.empty()
            refilled = [place for place in group if place.is_filled()] if run() is not None else []
            restore()
            found += refilled
            needed += [] if refilled else group
        found += _by_flags(needed, run, restore)
    return found


def _by_flags(kept: Sequence[Place], run: Callable[[], Tensor | None], restore: Callable[[], bool]) -> list[Flag]:
    """Return the flags of equal modules without which a forward fills places with other values, and sets the flags."""
    found: list[Flag] = []
    modules = list({place.module: None for place in kept})
    for name in [flag.name for module in modules[:1] for flag in flags(module)]:
        beside = [Flag(module, name) for module in modules]
        before = [value.clone() for place in kept for value in place.tensors()]
        for flag in beside:
            flag.empty()
        done = run() is not None and all(flag.is_set() for flag in beside)
        after = [value for place in kept for value in place.tensors()]
        stale = done and not (len(before) == len(after) and all(map(torch.equal, before, after)))
        restore()
        found += beside if stale else []
    return found


def check_kept(model: nn.Module, run: Callable[[bool], Tensor | None], restore: Callable[[], bool]) -> None:
    """Raise `GradientError` if f depends on weights by way of values that a forward keeps apart from its graph.

    In random directions of the weights of modules that keep something the derivative of f must be the difference.
    Half precision is too coarse for that.

    Args:
        model: The model.
        run: Returns f of a batch, with its graph or without, or None if that fails.
        restore: Puts the modules' state back.

    Raises:
        GradientError: If it is not.
    """
    before = {module: _kept_by(module) for module in model.modules()}
    output = run(True)
    keeping = [module for module, kept in before.items() if not _is_same(kept, _kept_by(module))]
    named = [name for path, module in model.named_modules() if module in keeping for name in _names(path, module, True)]
    weights = list({p: None for module in keeping for p in module.parameters() if p.requires_grad})
    if output is None or not output.requires_grad or not weights or any(is_sharded(p) for p in weights):
        restore()
        return
    grads = torch.autograd.grad(output.sum(), weights, allow_unused=True)
    restore()  # not before: its tensors may be in the graph
    middle, generator, differing = float(output.detach().double().sum()), torch.Generator().manual_seed(0), []
    eps = max(torch.finfo(p.dtype).eps for p in (output, *weights))
    step = eps ** (1 / 3)
    for _ in range(_DIRECTIONS):
        moves = [step * p.detach().abs().mean() * torch.randn(p.shape, generator=generator).to(p) for p in weights]
        expected = sum(float((g * m).sum()) for g, m in zip(grads, moves, strict=True) if g is not None)
        ends = [_moved(weights, moves, sign, run, restore) for sign in (1, -1)]
        if ends[0] is None or ends[1] is None:
            return
        found, bend = (ends[0] - ends[1]) / 2, abs(ends[0] + ends[1] - 2 * middle)  # which rounding shows in, too
        if abs(found - expected) > max(_MOST * max(abs(found), abs(expected)), 4 * bend, 16 * eps * abs(middle)):
            differing.append((expected, found))
    if len(differing) > _DIRECTIONS // 2:
        raise GradientError(
            f"f depends on weights by way of values that the forward keeps in eval mode ({listing(named)}), and its "
            f"gradient lacks this part: where the gradient says {differing[0][0]:.3g}, f changes by "
            f"{differing[0][1]:.3g}. Pass a model whose forward computes these values anew, without detach() or "
            f"no_grad()."
        )


def _kept_by(module: nn.Module) -> list[tuple[Tensor, int]]:
    values = [value for place in places(module, buffers=True) for value in place.tensors()]
    return [(value, 0 if value.is_inference() else value._version) for value in values]  # nothing writes to the former


def _is_same(one: list[tuple[Tensor, int]], other: list[tuple[Tensor, int]]) -> bool:
    return len(one) == len(other) and all(a is b and x == y for (a, x), (b, y) in zip(one, other, strict=True))


def _moved(
    weights: Sequence[Tensor],
    moves: Sequence[Tensor],
    sign: int,
    run: Callable[[bool], Tensor | None],
    restore: Callable[[], bool],
) -> float | None:
    """Return the sum of f with weights that were moved, or None if it cannot be computed."""
    before = [weight.data for weight in weights]
    try:
        for weight, move in zip(weights, moves, strict=True):
            weight.data = weight.data + sign * move
        output = run(False)
    finally:
        for weight, value in zip(weights, before, strict=True):
            weight.data = value
        restore()
    return None if output is None else float(output.double().sum())


def derived_values(model: nn.Module, names: Sequence[str]) -> list[str]:
    """Return values that may be derived from weights, of modules that contain some parameters.

    They are tensors that no state dict has, and buffers of modules with a ``train`` method, which may fold weights into
    them.
    """
    own = with_train_of_their_own(model)
    found: set[str] = set()
    for name in names:
        parts = name.split(".")[:-1]
        for depth in range(len(parts) + 1):
            path = ".".join(parts[:depth])
            module = model.get_submodule(path)
            found.update(_names(path, module, buffers=module in own))
    return sorted(found)


def _names(path: str, module: nn.Module, buffers: bool) -> list[str]:
    return [f"{path}.{place}".lstrip(".") for place in places(module, buffers)]


def with_train_of_their_own(model: nn.Module) -> list[nn.Module]:
    """Return the modules whose class has a ``train`` method of its own."""
    return [module for module in model.modules() if type(module).train is not nn.Module.train]

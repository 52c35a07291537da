"""Run a user's model without side effects: modes, flags, random state and grad mode are restored."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tracer.gradients.checkpointing import checkpointed_layers


@contextmanager
def isolated(model: nn.Module, selected: Collection[str], device: torch.device) -> Iterator[None]:
    """Evaluate a model with gradients for the selected parameters only; everything is restored, even after an error.

    Inside, every module is in eval mode, exactly the selected parameters require a gradient and autograd is on, even if
    called under ``no_grad`` or ``inference_mode``. The random generators of the CPU and of ``device`` may be used
    freely (`seed_generators`).

    Args:
        model: The model.
        selected: Names of the parameters whose gradients are wanted.
        device: The device of the model.

    Yields:
        Nothing.
    """
    training = [(module, module.training) for module in model.modules()]
    requires = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.callback(_restore_flags, training, requires)
        stack.callback(_restore_generators(device))
        for module, _ in training:
            module.training = False  # not module.eval(): users override train()
            if isinstance(module, nn.RNNBase):
                stack.enter_context(_without_cudnn(module))
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in selected)
        stack.enter_context(checkpointed_layers(model))
        yield


@contextmanager
def _without_cudnn(module: nn.RNNBase) -> Iterator[None]:
    """Run a recurrent layer, and nothing else, without cuDNN, which has no backward for it in eval mode."""
    own = module.__dict__.get("forward")
    forward = module.forward

    def run(*args: Any, **kwargs: Any) -> Any:
        enabled = torch.backends.cudnn.enabled
        torch.backends.cudnn.enabled = False
        try:
            return forward(*args, **kwargs)
        finally:
            torch.backends.cudnn.enabled = enabled

    module.__dict__["forward"] = run
    try:
        yield
    finally:
        del module.__dict__["forward"]
        if own is not None:
            module.__dict__["forward"] = own


def _restore_flags(training: list, requires: list) -> None:
    for module, mode in training:
        module.training = mode
    for parameter, flag in requires:
        parameter.requires_grad_(flag)


def _generators(device: torch.device) -> list[torch.Generator]:
    generators = [torch.default_generator]
    if device.type == "cuda":
        torch.cuda.init()
        generators.append(torch.cuda.default_generators[device.index or 0])
    return generators


def seed_generators(device: torch.device, seed: int = 0) -> None:
    """Put the random generators of the CPU and the device in a fixed state; eval mode must not depend on it."""
    for generator in _generators(device):
        generator.manual_seed(seed)


def generator_states(device: torch.device) -> list[Tensor]:
    """Return the states of the random generators of the CPU and the device."""
    return [generator.get_state() for generator in _generators(device)]


def _restore_generators(device: torch.device) -> Callable[[], None]:
    states = generator_states(device)

    def restore() -> None:
        for generator, state in zip(_generators(device), states, strict=True):
            generator.set_state(state)

    return restore

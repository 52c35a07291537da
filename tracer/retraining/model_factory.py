"""Untrained models with their own random numbers, independent of the caller's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from tracer._core.validation import check_model
from tracer.errors import InputError, InputTypeError
from tracer.retraining.subsets import Run


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's random generators, and restore the caller's state afterwards."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        # Not torch.manual_seed: where CUDA is not in use yet, that would leave it a seed for later.
        for generator in (torch.default_generator, *(torch.cuda.default_generators[device] for device in devices)):
            generator.manual_seed(seed)
        yield


class ModelFactory:
    """A factory of the untrained model of a run, which calls the user's function."""

    def __init__(self, make_model: Callable[[], nn.Module]) -> None:
        if isinstance(make_model, nn.Module) or not callable(make_model):
            raise InputTypeError(
                f"make_model is a {type(make_model).__name__}; expected a function that builds an untrained model at "
                f"each call, such as lambda: torch.nn.Linear(64, 10)."
            )
        self._make_model = make_model
        self._last: nn.Module | None = None

    def __call__(self, run: Run) -> nn.Module:
        """Return a new model, whose weights follow from the run's seed and subset."""
        had_cuda = torch.cuda.is_initialized()
        model = self._build(run)
        if torch.cuda.is_initialized() and not had_cuda:
            model = self._build(run)  # weights drawn on the device came from a generator that was not seeded yet
        if self._last is not None and _changeable(model) & _changeable(self._last):
            raise InputError(
                "make_model returned a model that has parameters or buffers of the last one, which would be trained "
                "further; build new ones at each call, or return copy.deepcopy(model)."
            )
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise InputError("make_model built a model without parameters that require a gradient; nothing to train.")
        self._last = model
        return model

    def _build(self, run: Run) -> nn.Module:
        with seeded(run.torch_seed("weights")):
            return check_model(self._make_model())


def _changeable(model: nn.Module) -> set[int]:
    """Return the identities of the tensors that training changes."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return {id(value) for value in (*trained, *model.buffers())}

"""The state of a model beside its parameters: each forward finds it as the user left it, and so does the user.

Models keep more than parameters and buffers of their state dicts: rotary frequencies that grow with the longest input,
counters, biases gathered once in eval mode. A second forward would see what the first one left behind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tracer.data.tasks import Task
from tracer.types import Batch, SampleOutputs

# Hooks and submodules are torch's, and captured attention replaces ``forward`` while a batch is computed.
_TORCHS_OWN = nn.Module().__dict__.keys() - {"_buffers", "_non_persistent_buffers_set", "training"} | {"forward"}

Restore = Callable[[], bool]
"""Puts something back; returns whether it had changed."""


class ModuleState:
    """The buffers and attributes of all modules at one moment, with the values of tensors and the items of containers.

    What a forward changes inside of objects of other classes is not undone.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        seen: set[int] = set()
        self._restores = [_container(module.__dict__, seen, _TORCHS_OWN) for module in model.modules()]

    def restore(self) -> bool:
        """Undo what has happened to the modules since; return whether anything had."""
        return any([restore() for restore in self._restores])


def _container(container: Any, seen: set[int], without: Any = ()) -> Restore:
    """Return what restores the items of a dict, list or set, and what these hold."""
    seen.add(id(container))
    if isinstance(container, dict):
        items = {key: value for key, value in container.items() if key not in without}
        values = list(items.values())
    else:
        items, values = container.copy(), list(container)
    inner = [each for value in values if (each := _value(value, seen)) is not None]

    def restore() -> bool:
        if isinstance(container, dict):
            now = {key: value for key, value in container.items() if key not in without}
            changed = now.keys() != items.keys() or any(now[key] is not value for key, value in items.items())
            if changed:
                for key in now.keys() - items.keys():
                    del container[key]
                container.update(items)
        else:
            changed = len(container) != len(items) or any(a is not b for a, b in zip(container, values, strict=True))
            if changed:
                container.clear()
                container.extend(items) if isinstance(container, list) else container.update(items)
        return any([each() for each in inner]) or changed

    return restore


def _value(value: Any, seen: set[int]) -> Restore | None:
    if id(value) in seen:
        return None
    if isinstance(value, (dict, list, set)):
        return _container(value, seen)
    if not isinstance(value, Tensor) or isinstance(value, nn.Parameter) or value.is_inference():
        return None
    seen.add(id(value))
    kept, version = value.detach().clone(), value._version

    def restore() -> bool:
        nonlocal version
        changed = value._version != version
        if changed:
            with torch.no_grad():
                value.copy_(kept)
            version = value._version
        return changed

    return restore


class StatelessTask(Task):
    """A task whose forwards all find the model's state as it was at the beginning of a batch.

    Args:
        task: The task.
        model: The model.

    Attributes:
        converts_weights: Whether a forward moved or converted a module (``self.head.to(dtype)``), which ends the
            process if ``vmap`` runs it.
    """

    def __init__(self, task: Task, model: nn.Module) -> None:
        self._task, self._model = task, model
        self.name = task.name
        self.converts_weights = False
        self._has_caches: bool | None = None
        self._state: ModuleState | None = None

    def settings(self) -> dict[str, Any]:
        """Return the task's settings."""
        return self._task.settings()

    def outputs(self, model: nn.Module, batch: Batch) -> SampleOutputs:
        """Compute the task's outputs from the state that `unchanged` began with."""
        if self._state is not None:
            self._state.restore()
        with self._noticing_conversions():
            return self._task.outputs(model, batch)

    @contextmanager
    def _noticing_conversions(self) -> Iterator[None]:
        original = nn.Module._apply

        def applied(module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
            self.converts_weights = True
            return original(module, *args, **kwargs)

        nn.Module._apply = applied  # type: ignore
        try:
            yield
        finally:
            nn.Module._apply = original  # type: ignore[method-assign]

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Leave the model's state as it was before the ``with`` block, and begin each forward in it from there."""
        found = ModuleState(self._model)
        if self._has_caches is None:
            _drop_caches(self._model)
            self._has_caches = found.restore()
        if self._has_caches:
            _drop_caches(self._model)
        self._state = ModuleState(self._model) if self._has_caches else found
        try:
            yield
        finally:
            self._state = None
            found.restore()


def derived_values(model: nn.Module, names: Sequence[str]) -> list[str]:
    """Return attributes that hold tensors beside parameters and buffers, of modules that contain some parameters."""
    found = set()
    for name in names:
        parts = name.split(".")[:-1]
        for depth in range(len(parts) + 1):
            path = ".".join(parts[:depth])
            for attribute, value in model.get_submodule(path).__dict__.items():
                items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else (value,)
                if attribute not in (*_TORCHS_OWN, "_buffers") and any(type(item) is Tensor for item in items):
                    found.add(f"{path}.{attribute}".lstrip("."))
    return sorted(found)


def _drop_caches(model: nn.Module) -> None:
    """Call the ``train`` methods that modules have of their own, which drop what eval mode has derived from weights."""
    # What was derived belongs to the weights that were in the model then. Only ``train()`` knows what that is.
    own = [module for module in model.modules() if type(module).train is not nn.Module.train]
    flags = [(module, module.training) for module in model.modules()]
    kept = {parameter: parameter.detach().clone() for module in own for parameter in module.parameters()}
    try:
        for module in own:
            module.train(True)
    finally:
        for parameter, value in kept.items():
            if not torch.equal(parameter.detach(), value):  # it took merged weights apart, but these are a checkpoint's
                parameter.data.copy_(value)
        for module, flag in flags:
            module.training = flag

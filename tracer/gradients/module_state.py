"""The state of a model beside its parameters: each forward finds it as the user left it, and so does the user.

Models keep more than parameters and buffers of their state dicts: rotary frequencies that grow with the longest input,
counters, biases gathered once in eval mode. A second forward would see what the first one left behind.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tracer._core.packed import is_composed, is_packed, plain_parts
from tracer._core.text import listing
from tracer.data.tasks import Task
from tracer.errors import GradientError
from tracer.gradients.derived_values import check_kept, find_refilled, with_train_of_their_own
from tracer.gradients.isolation import seed_generators
from tracer.gradients.kept_values import TORCHS_OWN, Flag, Place, is_object
from tracer.gradients.selfcheck import same_values, tolerance
from tracer.types import Batch, SampleOutputs

_NOT_STATE = TORCHS_OWN - {"_buffers", "_non_persistent_buffers_set", "training"}

_PLAIN = frozenset((bool, int, float, str, type(None)))
"""Types of values that hold nothing."""


class ModuleState:
    """The buffers and attributes of all modules and parameters at one moment, with what containers in them hold.

    Args:
        model: The model.

    Attributes:
        holds_graph: Whether there is a tensor of the graph of a forward.
    """

    def __init__(self, model: nn.Module) -> None:
        self.holds_graph = False
        self._containers: list[_Items] = []
        self._tensors: list[_Values] = []
        modules = list(model.modules())
        held = (each for module in modules for each in module._parameters.values() if each is not None)
        parameters = list(dict.fromkeys(held))
        packed = [parameter for parameter in parameters if is_packed(parameter)]
        self._packed = [_Packed(each, each.data) for each in packed if not is_composed(each)]
        self._memories = {part.data_ptr() for each in packed for _, part in plain_parts("", each)}
        seen: set[int] = set()
        for module in modules:
            self._keep_all(module.__dict__, seen, _NOT_STATE)
        for parameter in parameters:
            self._keep_all(vars(parameter), seen)

    def restore(self) -> bool:
        """Undo what has happened to the modules since; return whether anything had."""
        every: tuple[_Items | _Values | _Packed, ...] = (*self._containers, *self._tensors, *self._packed)
        return any([each.restore() for each in every if each.is_changed()])  # a list: all of them

    def _keep_all(self, container: Any, seen: set[int], without: Collection[str] = ()) -> None:
        seen.add(id(container))
        self._containers.append(_Items(container, without))
        values = container
        if isinstance(container, dict):
            values = [container[key] for key in container if key not in without]
        for value in values:
            if type(value) not in _PLAIN and id(value) not in seen:
                self._keep(value, seen)

    def _keep(self, value: Any, seen: set[int]) -> None:
        if isinstance(value, (dict, list, set)):
            self._keep_all(value, seen)
        elif is_object(value):
            seen.add(id(value))
            self._keep_all(vars(value), seen)
        elif isinstance(value, Tensor) and not isinstance(value, nn.Parameter) and not value.is_inference():
            seen.add(id(value))
            if value.layout == torch.strided and value.data_ptr() in self._memories:
                return  # int8 layers have their weight in a second place
            self.holds_graph |= value.grad_fn is not None
            self._tensors.append(_Values(value))


class _Items:
    """The items of a dict, list or set; of a dict some are left out."""

    def __init__(self, container: Any, without: Collection[str]) -> None:
        self._container, self._without = container, without
        self._keys = list(container)
        self._values = list(container.values()) if isinstance(container, dict) else self._keys

    def is_changed(self) -> bool:
        """Return whether there may be other items, perhaps of those that are left out."""
        now = self._container
        if len(now) != len(self._keys) or not all(map(operator.is_, now, self._keys)):
            return True
        return isinstance(now, dict) and not all(map(operator.is_, now.values(), self._values))

    def restore(self) -> bool:
        """Put the items back; return whether there were others."""
        container = self._container
        if not isinstance(container, dict):
            container.clear()
            container.extend(self._keys) if isinstance(container, list) else container.update(self._keys)
            return True
        items = {key: value for key, value in zip(self._keys, self._values, strict=True) if key not in self._without}
        now = {key: value for key, value in container.items() if key not in self._without}
        if now.keys() == items.keys() and all(now[key] is value for key, value in items.items()):
            return False
        for key in now.keys() - items.keys():
            del container[key]
        container.update(items)
        return True


class _Values:
    """The values of a tensor."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor, self._kept, self._version = tensor, tensor.detach().clone(), tensor._version

    def is_changed(self) -> bool:
        """Return whether something was written to the tensor."""
        return self._tensor._version != self._version

    def restore(self) -> bool:
        """Put the values back."""
        with torch.no_grad():
            self._tensor.copy_(self._kept)
        self._version = self._tensor._version
        return True


class _Packed:
    """The memory of a packed weight, which a forward may replace by another order of its values."""

    def __init__(self, parameter: nn.Parameter, memory: Tensor) -> None:
        self._parameter, self._memory = parameter, memory

    def is_changed(self) -> bool:
        """Return whether the parameter has other memory."""
        return self._parameter.data_ptr() != self._memory.data_ptr()

    def restore(self) -> bool:
        """Give the parameter its memory back."""
        self._parameter.data = self._memory
        return True


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
        self._refilled: list[Place | Flag] | None = None  # that a forward fills if they are empty
        self._state: ModuleState | None = None
        self._ran = False  # since it was kept

    def settings(self) -> dict[str, Any]:
        """Return the task's settings."""
        return self._task.settings()

    def outputs(self, model: nn.Module, batch: Batch) -> SampleOutputs:
        """Compute the task's outputs from the state that `unchanged` began with."""
        if self._state is not None:
            if self._ran:
                self._state.restore()
            self._ran = True
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
        seen: set[int] = set()
        may_hold = found.holds_graph or self._has_caches
        modules = self._model.modules() if may_hold else ()
        detached = [_detach(module.__dict__, seen, _NOT_STATE) for module in modules]
        for place in self._refilled or ():
            place.empty()
        changed = self._has_caches or self._refilled or any(detached)
        self._state, self._ran = ModuleState(self._model) if changed else found, False
        try:
            yield
        finally:
            self._state = None
            found.restore()

    def check_derived(self, batch: Batch) -> None:
        """Find values that modules derive from weights, by running a batch; only inside of `unchanged`.

        What a forward keeps, and computes again if it is empty, is emptied from now on.

        Args:
            batch: A sample as a batch of its own.

        Raises:
            GradientError: If calling ``eval()`` changes f: weights are folded there, for example into a buffer.
        """
        assert self._state is not None
        self._ran = True
        if self._refilled is None:
            self._refilled = find_refilled(self._model, lambda: self._output(batch), self._state.restore)
            for place in self._refilled:
                place.empty()
            self._state = ModuleState(self._model)
            check_kept(self._model, lambda grad: self._output(batch, grad), self._state.restore)
        own = with_train_of_their_own(self._model)
        if not own:
            return
        before = self._output(batch)
        self._state.restore()
        with _modes_and_weights(self._model, own):
            for module in own:
                module.train(False)
            for module in self._model.modules():  # some keep parts in training mode
                module.training = False
            folded = self._output(batch)
        self._state.restore()
        if folded is None:
            return
        if before is not None and same_values(before, folded, before.dtype, tolerance(before.dtype, before.device)):
            return
        names = [name or "the model" for name, module in self._model.named_modules() if module in own]
        raise GradientError(
            f"The train method of {listing(names)} derives values from weights when eval() is called, and f without "
            f"them is another one ({'it fails' if before is None else 'another number'}). Gradients of weights do not "
            f"pass through such values. Pass a model whose forward computes them in eval mode too, or one in which "
            f"they are merged for good, as a checkpoint of its own."
        )

    def _output(self, batch: Batch, grad: bool = False) -> Tensor | None:
        """Return f of a batch from the modules' state as it is now, or None if that fails."""
        seed_generators(next(self._model.parameters()).device)
        try:
            output = self._task.outputs(self._model, batch).output  # with gradients: some forwards take them
            return output if grad else output.detach()
        except torch.OutOfMemoryError:
            raise
        except Exception:  # a forward that lacks a value may raise anything, as an AssertionError
            return None


def _detach(container: Any, seen: set[int], without: Any = ()) -> bool:
    """Cut tensors in a container off from graphs of earlier forwards; return whether there were any."""
    # They were computed from other weights. Gradients that reach a parameter through them would look right.
    if id(container) in seen:
        return False
    seen.add(id(container))
    items = container.items() if isinstance(container, dict) else enumerate(container)
    found = False
    for key, value in list(items):
        if key in without:
            continue
        if isinstance(value, (dict, list)) or is_object(value):
            found |= _detach(vars(value) if is_object(value) else value, seen)
        elif isinstance(value, Tensor) and value.grad_fn is not None:
            container[key] = value.detach()
            found = True
    return found


def _drop_caches(model: nn.Module) -> None:
    """Call the ``train`` methods that modules have of their own, which drop what eval mode has derived from weights."""
    # What was derived belongs to the weights that were in the model then. Only ``train()`` knows what that is.
    own = with_train_of_their_own(model)
    with _modes_and_weights(model, own):
        for module in own:
            module.train(True)


@contextmanager
def _modes_and_weights(model: nn.Module, own: Sequence[nn.Module]) -> Iterator[None]:
    """Put the modes of a model and the parameters of some of its modules back after the block."""
    flags = [(module, module.training) for module in model.modules()]
    parameters = {parameter: None for module in own for parameter in module.parameters()}
    kept = {each: [part.detach().clone() for _, part in plain_parts("", each)] for each in parameters}
    try:
        yield
    finally:
        for parameter, values in kept.items():
            for (_, part), value in zip(plain_parts("", parameter), values, strict=True):
                if not torch.equal(part.detach(), value):  # it took merged weights apart, but these are a checkpoint's
                    part.data.copy_(value)
        for module, flag in flags:
            module.training = flag

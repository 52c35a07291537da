"""Parameters that a forward uses without a layer of their own: tables, gates, scales, functions of parameters.

While the forward runs, every call of a torch function is seen. A tensor that comes from such parameters alone is
*shared*: one for all samples. Where it meets the batch, its gradient is divided among samples in one of these ways:

- broadcasting (sums, products, masks of attention): the shared tensor is replaced by an equal one with a copy, without
  memory of its own, for each sample; autograd's gradient of the copies is that of the samples;
- functions that layers are made of (``F.linear``, ``@``, convolutions, norms, lookups): the layer's rule;
- functions that consist of these, such as attention: each part by itself;
- anything else, for a batch of one sample only.

The gradients of shared tensors are passed back to their parameters by one more backward for all samples. Whatever meets
the batch in another way is left to the fallback.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tracer.data.batches import leaves
from tracer.gradients.calls import SampleAxis
from tracer.gradients.composed import COMPOSED
from tracer.gradients.division import Division, Unknown, tensors_in
from tracer.gradients.shared import RawFailed, Shared
from tracer.types import Batch

_COPIES = frozenset("expand expand_as repeat broadcast_to tile".split())


class RawParameters(TorchFunctionMode):
    """Sees the functions of a forward and finds where parameters meet the batch.

    Args:
        parameters: The parameters by name.
        batch: The batch.
        batch_size: ``B``.
        axes: The axis of samples by parameter, if it is not the one that shapes suggest.

    Attributes:
        uses: The places.
        failed: The parameters that meet the batch in an unknown way, with the function.
    """

    def __init__(
        self, parameters: Mapping[str, Tensor], batch: Batch, batch_size: int, axes: Mapping[str, SampleAxis]
    ) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.failed: dict[str, str] = {}
        self._parameters = parameters
        self._shared = {id(value): Shared(value, frozenset((name,))) for name, value in parameters.items()}
        self._division = Division(self._shared, batch_size, axes)
        self.uses = self._division.uses
        self._pass = object()  # marks tensors that come from the batch in this pass
        self._batch = [leaf for _, leaf in leaves(batch) if isinstance(leaf, Tensor)]

    @contextmanager
    def watching(self) -> Iterator[None]:
        """See the functions that are called within a ``with`` block."""
        if not self._parameters:
            yield
            return
        self._mark(self._batch)
        try:
            with self:
                yield
        finally:
            for leaf in self._batch:
                leaf.__dict__.pop("_tracer_pass", None)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        # This runs for each function of the model, so it is written for speed.
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") == "__get__":
            result = func(*args, **kwargs)
            if not isinstance(result, Tensor):
                return result
        shared: list[Shared] = []
        from_batch = False
        for value in (*args, *kwargs.values()) if kwargs else args:
            if isinstance(value, Tensor):
                if (found := self._shared.get(id(value))) is not None:
                    shared.append(found)
                elif value.__dict__.get("_tracer_pass") is self._pass:
                    from_batch = True
            elif type(value) is tuple or type(value) is list:
                for each in tensors_in(value, {}):
                    shared += [self._shared[id(each)]] if id(each) in self._shared else []
                    from_batch |= each.__dict__.get("_tracer_pass") is self._pass
        if not shared or not torch.is_grad_enabled():
            result = func(*args, **kwargs)
            if from_batch:
                self._mark_results(func, args, kwargs, result)
            return result
        if from_batch:
            return self._meet(func, args, kwargs, shared)
        return self._derive(func, args, kwargs, shared)

    def blame(self, error: Exception) -> None:
        """Raise `RawFailed` for an error of the model that copies of parameters may have caused."""
        if names := frozenset[str]().union(*(use.names for use in self.uses)):
            raise RawFailed(
                dict.fromkeys(names, f"the model cannot run with a copy for each sample ({error})")
            ) from error

    def _derive(
        self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], shared: Sequence[Shared]
    ) -> Any:
        """Call a function of shared tensors only; its results are shared, or copies for all samples."""
        result = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if (
            name in _COPIES
            and isinstance(result, Tensor)
            and (copies := self._copies(name, shared[0], result)) is not None
        ):
            return copies
        names = frozenset[str]().union(*(each.names for each in shared))
        for value in tensors_in((result,), {}):
            if value.requires_grad and id(value) not in self._shared:
                transposed = index = entry = None
                if len(shared) == 1 and len(names) == 1 and shared[0].tensor is self._parameters[min(names)]:
                    transposed = _is_transposed(shared[0].tensor, value)
                    index = _looked_up(func, args, kwargs, value)
                    entry = args[1] % len(args[0]) if name == "__getitem__" and type(args[1]) is int else None
                self._shared[id(value)] = Shared(value, names, bool(transposed), index, entry)
        return result

    def _copies(self, name: str, shared: Shared, result: Any) -> Tensor | None:
        """Return one copy of a tensor for each sample, if that is what a model has made."""
        before = shared.tensor
        if (
            not isinstance(result, Tensor)
            or not 1 < self.batch_size == (result.shape[0] if result.ndim else 0)
            or not result.requires_grad
        ):
            return None
        if before.ndim == result.ndim and (before.shape[0] != 1 or before.shape[1:] != result.shape[1:]):
            return None
        if before.ndim != result.ndim and (1,) * (result.ndim - 1 - before.ndim) + before.shape != result.shape[1:]:
            return None
        copies = self._division.copied(shared, result.shape, 0, "expand")
        if name in ("repeat", "tile"):  # models take a view of these
            copies = copies.contiguous()
        self._mark([copies])
        return copies

    def _meet(
        self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], shared: Sequence[Shared]
    ) -> Any:
        """Call a function of shared tensors and of the batch."""
        name = _name(func)
        if (composed := COMPOSED.get(func)) is not None and self.batch_size > 1:
            with self:
                result = composed(*args, **kwargs)
            if result is not NotImplemented:
                return result
        number = len(self.uses)
        try:
            result = self._division.divided(func, name, args, kwargs, shared)
        except torch.OutOfMemoryError:
            raise
        except (Unknown, RuntimeError, ValueError, TypeError, IndexError) as error:
            del self.uses[number:]
            result = func(*args, **kwargs)
            if any(value.requires_grad and value.numel() for value in tensors_in((result,), {})):
                why = str(error) or f"{name} has no rule"
                self.failed |= {each: why for one in shared for each in one.names}
        self._mark_results(func, args, kwargs, result)
        return result

    def _mark_results(
        self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], result: Any
    ) -> None:
        """Mark what a function of the batch returns or changes."""
        if isinstance(result, Tensor) and "out" not in kwargs:
            result.__dict__["_tracer_pass"] = self._pass
        else:
            self._mark(tensors_in((result, kwargs.get("out")), {}))
        if args and isinstance(args[0], Tensor) and _changes_first(func):
            self._mark([args[0]] if args[0]._base is None else [args[0], args[0]._base])

    def _mark(self, values: Any) -> None:
        for value in values:
            value.__dict__["_tracer_pass"] = self._pass


@cache
def _changes_first(func: Callable[..., Any]) -> bool:
    """Return whether a function changes its first argument in place, by its name."""
    name = getattr(func, "__name__", "")
    inplace = name == "__setitem__" or (name.endswith("_") and not name.endswith("__")) or name[2:3] == "i"
    return inplace and not name.startswith("__init")


def _name(func: Callable[..., Any]) -> str:
    """Return the name of a function without underscores: ``mul`` of ``torch.mul``, ``mul_`` and ``__mul__``."""
    return getattr(func, "__name__", str(func)).strip("_")


def _is_transposed(before: Tensor, after: Tensor) -> bool:
    """Return whether a tensor is a matrix, transposed."""
    return (
        before.ndim == after.ndim == 2
        and after._base is before
        and after.shape == before.shape[::-1]
        and after.stride() == before.stride()[::-1]
    )


def _looked_up(
    func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], result: Tensor
) -> Tensor | None:
    """Return the index of a lookup of rows in a table that no padding index concerns, or None."""
    options = [*args[2:3], kwargs.get("padding_idx"), kwargs.get("max_norm")]
    if func is not F.embedding or any(each is not None for each in options) or kwargs.get("scale_grad_by_freq"):
        return None
    return args[0] if args[0].shape == result.shape[:-1] else None

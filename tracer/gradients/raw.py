"""Parameters that a forward uses without a layer of their own: tables, gates, scales, functions of parameters.

While the forward runs, every call of a torch function is seen. A tensor that comes from such parameters alone is
*shared*: one for all samples. Where it meets the batch, its gradient is divided among samples in one of these ways:

- broadcasting (sums, products, masks of attention): the shared tensor is replaced by an equal one with a copy, without
  memory of its own, for each sample; autograd's gradient of the copies is that of the samples;
- functions that layers are made of (``F.linear``, ``@``, convolutions, norms, lookups): the layer's rule;
- anything else, for a batch of one sample only.

The gradients of shared tensors are passed back to their parameters by one more backward for all samples. Whatever meets
the batch in another way is left to the fallback.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.overrides import TorchFunctionMode

from tracer.data.batches import leaves
from tracer.gradients.functional_rules import FunctionCall, recognize
from tracer.gradients.layers import summed
from tracer.gradients.per_sample import DenseGradient, PerSampleGradient
from tracer.gradients.shared import RawFailed, Shared, Use
from tracer.types import Batch

MASKED_BYTES = 64 << 20
"""The most bytes of gradients of a tensor that holds all samples, one copy for each."""

_ELEMENTWISE = frozenset(
    "add radd iadd sub rsub isub mul rmul imul multiply div rdiv truediv rtruediv divide true_divide addcmul addcdiv "
    "where lerp maximum minimum pow rpow masked_fill subtract".split()
)
_COPIES = frozenset("expand expand_as repeat broadcast_to tile".split())


class _Unknown(Exception):
    """A use that has no known form."""


class RawParameters(TorchFunctionMode):
    """Sees the functions of a forward and finds where parameters meet the batch.

    Args:
        parameters: The parameters by name.
        batch: The batch.
        batch_size: ``B``.

    Attributes:
        uses: The places.
        failed: The parameters that meet the batch in an unknown way, with the function.
    """

    def __init__(self, parameters: Mapping[str, Tensor], batch: Batch, batch_size: int) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.uses: list[Use] = []
        self.failed: dict[str, str] = {}
        self._parameters = parameters
        self._shared = {id(value): Shared(value, frozenset((name,))) for name, value in parameters.items()}
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
                for each in _tensors(value, {}):
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
        if name in _COPIES and isinstance(result, Tensor) and (copies := self._copies(shared[0], result)) is not None:
            return copies
        names = frozenset[str]().union(*(each.names for each in shared))
        for value in _tensors((result,), {}):
            if value.requires_grad and id(value) not in self._shared:
                transposed = index = None
                if len(shared) == 1 and len(names) == 1 and shared[0].tensor is self._parameters[min(names)]:
                    transposed = _is_transposed(shared[0].tensor, value)
                    index = _looked_up(func, args, kwargs, value)
                self._shared[id(value)] = Shared(value, names, bool(transposed), index)
        return result

    def _copies(self, shared: Shared, result: Tensor) -> Tensor | None:
        """Return one copy of a tensor for each sample, if that is what a model has made."""
        before = shared.tensor
        if not 1 < self.batch_size == (result.shape[0] if result.ndim else 0) or not result.requires_grad:
            return None
        if before.ndim == result.ndim and (before.shape[0] != 1 or before.shape[1:] != result.shape[1:]):
            return None
        if before.ndim != result.ndim and (1,) * (result.ndim - 1 - before.ndim) + before.shape != result.shape[1:]:
            return None
        copies = self._copied(shared, result.shape, 0, "expand")
        self._mark([copies])
        return copies

    def _meet(
        self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], shared: Sequence[Shared]
    ) -> Any:
        """Call a function of shared tensors and of the batch."""
        name = _name(func)
        number = len(self.uses)
        try:
            result = self._divided(func, name, args, kwargs, shared)
        except torch.OutOfMemoryError:
            raise
        except (_Unknown, RuntimeError, ValueError, TypeError, IndexError) as error:
            del self.uses[number:]
            result = func(*args, **kwargs)
            if any(value.requires_grad for value in _tensors((result,), {})):
                why = str(error) or f"{name} has no rule"
                self.failed |= {each: why for one in shared for each in one.names}
        self._mark_results(func, args, kwargs, result)
        return result

    def _divided(
        self,
        func: Callable[..., Any],
        name: str,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        shared: Sequence[Shared],
    ) -> Any:
        if any(each.is_nested or each.layout != torch.strided for each in _tensors(args, kwargs)):
            raise _Unknown("it was called with nested or sparse tensors")
        if self.batch_size == 1:
            return self._replaced(func, args, kwargs, lambda each: self._leaf(each, each.tensor.shape, None, 0, name))
        call = recognize(func, args, kwargs, self._shared)
        if call is not None:
            return self._by_rule(func, name, args, kwargs, call)
        if name == "einsum":
            return self._einsum(func, args)
        shape = self._common_shape(name, args, kwargs)
        axis = self._axis(shape, [each for each in _tensors(args, kwargs) if id(each) not in self._shared])
        return self._replaced(func, args, kwargs, lambda each: self._copied(each, shape, axis, name))

    def _common_shape(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[int, ...]:
        """Return the shape to which a function that broadcasts brings a shared tensor, matrices' own sizes as -1."""
        if name in _ELEMENTWISE:
            return tuple(torch.broadcast_shapes(*(each.shape for each in _tensors(args, kwargs))))
        if name in ("matmul", "bmm"):
            first, second = args[:2]
            if min(first.ndim, second.ndim) >= 2:
                return (*torch.broadcast_shapes(first.shape[:-2], second.shape[:-2]), -1, -1)
        if name == "scaled_dot_product_attention":
            return (*torch.broadcast_shapes(*(each.shape[:-2] for each in _tensors(args, kwargs))), -1, -1)
        if name in ("cat", "concat", "concatenate"):
            ndim = max(each.ndim for each in _tensors(args, kwargs))
            dim = kwargs.get("dim", args[1] if len(args) > 1 else 0)
            if dim % ndim != 0:
                return (max(each.shape[0] for each in _tensors(args, kwargs)), *[-1] * (ndim - 1))
        raise _Unknown

    def _axis(self, shape: Sequence[int], values: Sequence[Tensor]) -> int:
        """Return the dimension of a shape that holds the samples."""
        for axis in range(min(2, len(shape))):
            size = shape[axis]
            whole = size > 0 and size % self.batch_size == 0 if axis == 0 else size == self.batch_size
            from_end = axis - len(shape)
            if whole and any(each.ndim >= -from_end and each.shape[from_end] == size for each in values):
                return axis
        raise _Unknown("the samples are in none of the first two dimensions")

    def _replaced(
        self,
        func: Callable[..., Any],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        replace: Callable[[Shared], Tensor],
    ) -> Any:
        """Call a function with other tensors in place of shared ones."""

        def other(value: Any) -> Any:
            if isinstance(value, Tensor):
                found = self._shared.get(id(value))
                return value if found is None else replace(found)
            if type(value) in (tuple, list):
                return type(value)(map(other, value))
            return value

        return func(*map(other, args), **{key: other(value) for key, value in kwargs.items()})

    def _copied(self, shared: Shared, shape: Sequence[int], axis: int, name: str) -> Tensor:
        """Return a shared tensor with one copy for each index of a dimension of a shape it is broadcast to."""
        tensor = shared.tensor
        missing = len(shape) - tensor.ndim
        if missing < 0:
            raise _Unknown
        aligned = (1,) * missing + tuple(tensor.shape)
        if aligned[axis] == shape[axis] != 1:  # each index of a sample has values of its own
            return self._leaf(shared, tensor.shape, axis - missing, shape[axis] // self.batch_size, name)
        if aligned[axis] != 1:
            raise _Unknown
        sizes = (*aligned[:axis], shape[axis], *aligned[axis + 1 :])
        return self._leaf(shared, sizes, None, shape[axis] // self.batch_size, name, axis)

    def _leaf(
        self, shared: Shared, sizes: Sequence[int], own: int | None, fold: int, name: str, axis: int = 0
    ) -> Tensor:
        """Return copies of a shared tensor, whose gradient gives that of each sample.

        Args:
            shared: The tensor.
            sizes: The size of the copies.
            own: The tensor's own dimension of the samples, if it is not copied.
            fold: The number of rows of a sample; 0: the tensor itself, for a batch of one.
            name: The function.
            axis: The dimension of the copies.

        Raises:
            _Unknown: If the gradients would be too large.
        """
        tensor, count = shared.tensor, self.batch_size
        if own is not None and count * tensor.numel() * tensor.element_size() > MASKED_BYTES:
            raise _Unknown("a tensor that holds all samples is too large")
        leaf = tensor.detach().expand(sizes).requires_grad_()

        def convert(grad: Tensor) -> list[tuple[Shared, PerSampleGradient]]:
            if not fold:
                found = grad.unsqueeze(0)
            elif own is not None:
                rows = grad.movedim(own, 0)
                found = rows.new_zeros(count, *rows.shape)
                for row in range(count):
                    found[row, row * fold : (row + 1) * fold] = rows[row * fold : (row + 1) * fold]
                found = found.movedim(1, own % tensor.ndim + 1)
            else:
                rows = grad.movedim(axis, 0).unflatten(0, (count, fold))
                found = summed(rows, 1) if fold > 1 else rows.squeeze(1)
            return [(shared, DenseGradient(found.reshape(count, *tensor.shape)))]

        label = f"{name}({', '.join(sorted(shared.names))})"
        self.uses.append(Use(label, shared.names, get_gradient_edge(leaf), leaf, axis, fold, convert))
        return leaf

    def _by_rule(
        self, func: Callable[..., Any], name: str, args: Sequence[Any], kwargs: Mapping[str, Any], call: FunctionCall
    ) -> Any:
        """Call a function that a rule describes."""
        output = func(*args, **kwargs)
        if not isinstance(output, Tensor):
            raise _Unknown
        axis = self._axis(output.shape, [output, call.x])
        rows, x, version = output.shape[axis], call.x, call.x._version
        if call.x.shape[axis if call.x.ndim > axis else 0] != rows:
            raise _Unknown("its samples are in another dimension than its input's")
        names = frozenset[str]().union(*(self._shared[id(each)].names for each in call.wanted.values()))
        fold = rows // self.batch_size

        def convert(grad: Tensor) -> list[tuple[Shared, PerSampleGradient]]:
            if x._version != version:
                raise RawFailed({each: "an input was changed in place" for each in names})
            x_rows = x.detach().transpose(0, axis)
            given = call.gradients(x_rows, grad.detach().transpose(0, axis))
            found = []
            for key, tensor in call.wanted.items():
                value = given[key]
                gradient = (DenseGradient(value) if isinstance(value, Tensor) else value).fold(fold)
                if (gradient.batch_size, *gradient.shape) != (self.batch_size, *tensor.shape):
                    raise RawFailed({each: f"the rule of {name} gave another shape" for each in names})
                found.append((self._shared[id(tensor)], gradient))
            return found

        label = f"{name}({', '.join(sorted(names))})"
        self.uses.append(Use(label, names, get_gradient_edge(output), None, axis, fold, convert))
        return output

    def _einsum(self, func: Callable[..., Any], args: Sequence[Any]) -> Any:
        """Give each sample its own copy of the shared operands of ``einsum``, by one more letter."""
        equation, *operands = args
        if len(operands) == 1 and isinstance(operands[0], (tuple, list)):
            operands = list(operands[0])
        if not isinstance(equation, str) or "->" not in equation or "." in equation:
            raise _Unknown
        terms, result = equation.replace(" ", "").split("->")
        letters = terms.split(",")
        for value, term in zip(operands, letters, strict=True):
            if id(value) in self._shared:
                continue
            axis = self._axis(value.shape, [value])
            letter, size = term[axis], value.shape[axis]
            kept = letter in result and not any(
                letter in term for value, term in zip(operands, letters, strict=True) if id(value) in self._shared
            )
            if not kept:
                raise _Unknown
        copied = []
        for number, value in enumerate(operands):
            if (found := self._shared.get(id(value))) is None:
                copied.append(value)
                continue
            letters[number] = letter + letters[number]
            copied.append(self._leaf(found, (size, *value.shape), None, size // self.batch_size, "einsum"))
        return func(f"{','.join(letters)}->{result}", *copied)

    def _mark_results(
        self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], result: Any
    ) -> None:
        """Mark what a function of the batch returns or changes."""
        single = isinstance(result, Tensor) and "out" not in kwargs
        self._mark((result,) if single else _tensors((result, kwargs.get("out")), {}))
        name = getattr(func, "__name__", "")
        inplace = name == "__setitem__" or (name.endswith("_") and not name.endswith("__")) or name[2:3] == "i"
        if inplace and args and isinstance(args[0], Tensor) and not name.startswith("__init"):
            self._mark([args[0]] if args[0]._base is None else [args[0], args[0]._base])

    def _mark(self, values: Any) -> None:
        for value in values:
            value.__dict__["_tracer_pass"] = self._pass


def _tensors(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[Tensor]:
    """Yield the tensors of arguments, also of lists and tuples among them."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)) and value and not isinstance(value[0], int):
            yield from (each for each in value if isinstance(each, Tensor))


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

"""How a function of tensors of parameters and of the batch is divided among samples (`tracer.gradients.raw`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, arange, strided
from torch.autograd.graph import get_gradient_edge

from tracer._core.blocks import full_precision
from tracer.gradients.calls import SampleAxis
from tracer.gradients.functional_rules import FunctionCall, recognize
from tracer.gradients.layers import summed
from tracer.gradients.owners import regroup
from tracer.gradients.per_sample import DenseGradient, PerSampleGradient
from tracer.gradients.shared import RawFailed, Shared, Use

MASKED_BYTES = 64 << 20
"""The most bytes of gradients of a tensor that holds all samples, one copy for each."""

_ELEMENTWISE = frozenset(
    "add radd iadd sub rsub isub mul rmul imul multiply div rdiv truediv rtruediv divide true_divide addcmul addcdiv "
    "where lerp maximum minimum pow rpow masked_fill subtract".split()
)


class Unknown(Exception):
    """A use that has no known form."""


class Division:
    """Calls functions such that the gradients of shared tensors can be divided among samples.

    Args:
        shared: The shared tensors, by their ``id``.
        batch_size: ``B``.
        axes: The axis of samples by parameter, if it is not the one that shapes suggest.

    Attributes:
        uses: The places where they meet the batch.
    """

    def __init__(self, shared: Mapping[int, Shared], batch_size: int, axes: Mapping[str, SampleAxis]) -> None:
        self._shared, self.batch_size, self._axes = shared, batch_size, axes
        self.uses: list[Use] = []

    def divided(
        self,
        func: Callable[..., Any],
        name: str,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        shared: Sequence[Shared],
    ) -> Any:
        """Call a function of shared tensors and of the batch, or raise `Unknown`."""
        tensors = list(tensors_in(args, kwargs))
        for each in tensors:
            if each.is_nested or each.layout is not strided:
                raise Unknown("it was called with nested or sparse tensors")
        if self.batch_size == 1:
            return self._replaced(func, args, kwargs, lambda each: self._leaf(each, each.tensor.shape, None, 0, name))
        chosen = self._chosen(shared) if self._axes else SampleAxis.FIRST
        call = recognize(func, args, kwargs, self._shared)
        if call is not None and (call.axis is None or call.x.shape[call.axis] % self.batch_size == 0):
            return self._by_rule(func, name, args, kwargs, call, chosen)
        if name == "einsum":
            return self._einsum(func, args, chosen)
        shape = self._common_shape(name, args, kwargs, tensors)
        axis = self._axis(shape, [each for each in tensors if id(each) not in self._shared], chosen)
        if axis is None:
            return self._replaced(func, args, kwargs, lambda each: self._mixed_leaf(each, shape, name))
        return self._replaced(func, args, kwargs, lambda each: self.copied(each, shape, axis, name))

    def _chosen(self, shared: Sequence[Shared]) -> SampleAxis:
        """Return the axis that is left to try for some tensors."""
        known = {self._axes.get(each, SampleAxis.FIRST) for one in shared for each in one.names}
        return next(axis for axis in (SampleAxis.MIXED, SampleAxis.SECOND, SampleAxis.FIRST) if axis in known)

    def _common_shape(
        self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], tensors: Sequence[Tensor]
    ) -> Sequence[int]:
        """Return the shape to which a function that broadcasts brings a shared tensor, matrices' own sizes as -1."""
        if name in _ELEMENTWISE:
            return _broadcast([each.shape for each in tensors])
        if name in ("matmul", "bmm"):
            first, second = args[:2]
            if min(first.ndim, second.ndim) >= 2:
                return *_broadcast([first.shape[:-2], second.shape[:-2]]), -1, -1
        if name == "scaled_dot_product_attention":
            return *_broadcast([each.shape[:-2] for each in tensors]), -1, -1
        if name in ("cat", "concat", "concatenate"):
            ndim = max(each.ndim for each in tensors)
            dim = kwargs.get("dim", args[1] if len(args) > 1 else 0)
            if dim % ndim != 0:
                return max(each.shape[0] for each in tensors), *[-1] * (ndim - 1)
        raise Unknown

    def _axis(self, shape: Sequence[int], values: Sequence[Tensor], chosen: SampleAxis) -> int | None:
        """Return the dimension of a shape that holds the samples; None: they are mixed."""
        if chosen is SampleAxis.MIXED:
            return None
        count = self.batch_size
        for axis in (1, 0) if chosen is SampleAxis.SECOND else (0, 1):
            size = shape[axis] if axis < len(shape) else 0
            from_end = axis - len(shape)
            if size > 0 and (size == count or (size % count == 0 and (axis == 0 or chosen is SampleAxis.SECOND))):
                for each in values:
                    if each.ndim >= -from_end and each.shape[from_end] == size:
                        return axis
        return None

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

    def copied(self, shared: Shared, shape: Sequence[int], axis: int, name: str) -> Tensor:
        """Return a shared tensor with one copy for each index of a dimension of a shape it is broadcast to."""
        tensor = shared.tensor
        missing = len(shape) - tensor.ndim
        if missing < 0:
            raise Unknown
        aligned = (1,) * missing + tuple(tensor.shape)
        if aligned[axis] == shape[axis] != 1:  # each index of a sample has values of its own
            return self._leaf(shared, tensor.shape, axis - missing, shape[axis] // self.batch_size, name)
        if aligned[axis] != 1:
            raise Unknown
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
            Unknown: If the gradients would be too large.
        """
        tensor, count = shared.tensor, self.batch_size
        if own is not None and count * tensor.numel() * tensor.element_size() > MASKED_BYTES:
            raise Unknown("a tensor that holds all samples is too large")
        leaf = tensor.detach().expand(sizes).requires_grad_()

        def convert(grad: Tensor, owners: Callable[[Tensor, int], Tensor]) -> list[tuple[Shared, PerSampleGradient]]:
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

    def _mixed_leaf(self, shared: Shared, shape: Sequence[int], name: str) -> Tensor:
        """Return a shared tensor with a copy for each row of a shape it is broadcast to; gradients tell whose it is."""
        tensor, count = shared.tensor, self.batch_size
        if count * tensor.numel() * tensor.element_size() > MASKED_BYTES or len(shape) < max(1, tensor.ndim):
            raise Unknown("the samples are in none of the first two dimensions")
        aligned = (1,) * (len(shape) - tensor.ndim) + tuple(tensor.shape)
        rows = tuple(there if here == 1 and there > 0 else here for here, there in zip(aligned, shape, strict=True))
        leaf = tensor.detach().expand(*rows[:-1], aligned[-1]).requires_grad_()

        def convert(grad: Tensor, owners: Callable[[Tensor, int], Tensor]) -> list[tuple[Shared, PerSampleGradient]]:
            owner = owners(grad, grad.ndim - 1)
            places = arange(math.prod(aligned[:-1]), device=grad.device).view(aligned[:-1]).expand(owner.shape)
            found = full_precision(grad).new_zeros(count * math.prod(aligned[:-1]), aligned[-1])
            index = owner * math.prod(aligned[:-1]) + places
            found.index_add_(0, index.flatten(), full_precision(grad).reshape(-1, aligned[-1]))
            return [(shared, DenseGradient(found.view(count, *tensor.shape).to(grad.dtype)))]

        label = f"{name}({', '.join(sorted(shared.names))})"
        self.uses.append(Use(label, shared.names, get_gradient_edge(leaf), leaf, 0, 0, convert, mixed=True))
        return leaf

    def _by_rule(
        self,
        func: Callable[..., Any],
        name: str,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        call: FunctionCall,
        chosen: SampleAxis,
    ) -> Any:
        """Call a function that a rule describes."""
        output = func(*args, **kwargs)
        if not isinstance(output, Tensor) or not output.ndim:
            raise Unknown
        if not output.numel():  # an expert without tokens
            return output
        x, version, axis = call.x, call.x._version, call.axis
        if axis is None:
            axis = self._axis(output.shape, [output, x], chosen)
            axis = None if axis == 1 and output.ndim == 2 else axis  # which holds features
        mixed = chosen is SampleAxis.MIXED or axis is None or not _along(axis, x, output)
        if axis is None or (mixed and call.axis is None):
            axis = 0
        if not _along(axis, x, output):
            raise Unknown("its samples are in another dimension than its input's")
        names = frozenset[str]().union(*(self._shared[id(each)].names for each in call.wanted.values()))
        fold = 0 if mixed else output.shape[axis] // self.batch_size

        def convert(grad: Tensor, owners: Callable[[Tensor, int], Tensor]) -> list[tuple[Shared, PerSampleGradient]]:
            if x._version != version:
                raise RawFailed({each: "an input was changed in place" for each in names})
            grad = grad.detach().transpose(0, axis)
            given = call.gradients(x.detach().transpose(0, axis), grad)
            owner = owners(grad, 1) if mixed else None
            found = []
            for key, tensor in call.wanted.items():
                value = given[key]
                gradient = DenseGradient(value) if isinstance(value, Tensor) else value
                gradient = gradient.fold(fold) if owner is None else regroup(gradient, owner, self.batch_size)
                if (gradient.batch_size, *gradient.shape) != (self.batch_size, *tensor.shape):
                    raise RawFailed({each: f"the rule of {name} gave another shape" for each in names})
                found.append((self._shared[id(tensor)], gradient))
            return found

        label = f"{name}({', '.join(sorted(names))})"
        self.uses.append(Use(label, names, get_gradient_edge(output), None, 0 if mixed else axis, fold, convert, mixed))
        return output

    def _einsum(self, func: Callable[..., Any], args: Sequence[Any], chosen: SampleAxis) -> Any:
        """Give each sample its own copy of the shared operands of ``einsum``, by one more letter if they lack one."""
        equation, *operands = args
        if len(operands) == 1 and isinstance(operands[0], (tuple, list)):
            operands = list(operands[0])
        if not isinstance(equation, str) or "->" not in equation or "." in equation:
            raise Unknown
        terms, result = equation.replace(" ", "").split("->")
        letters = terms.split(",")
        samples: dict[str, int] = {}
        for value, term in zip(operands, letters, strict=True):
            if id(value) not in self._shared:
                axis = self._axis(value.shape, [value], chosen)
                if axis is None:
                    raise Unknown
                samples[term[axis]] = value.shape[axis]
        ((letter, size),) = samples.items() if len(samples) == 1 else (("", 0),)
        if not letter or letter not in result:
            raise Unknown
        copied, fold = [], size // self.batch_size
        for number, value in enumerate(operands):
            term = letters[number]
            if (found := self._shared.get(id(value))) is None:
                copied.append(value)
            elif letter in term:
                copied.append(self._leaf(found, value.shape, term.index(letter), fold, "einsum"))
            else:
                letters[number] = letter + term
                copied.append(self._leaf(found, (size, *value.shape), None, fold, "einsum"))
        return func(f"{','.join(letters)}->{result}", *copied)


def _broadcast(shapes: Sequence[Sequence[int]]) -> list[int]:
    """Return the shape to which some are broadcast."""
    # torch.broadcast_shapes takes longer than most functions whose arguments it would be asked for.
    common = [1] * max(map(len, shapes))
    for shape in shapes:
        for place in range(1, len(shape) + 1):
            if shape[-place] != 1:
                common[-place] = shape[-place]
    return common


def _along(axis: int, x: Tensor, output: Tensor) -> bool:
    """Return whether an input has the size of an output along a dimension, the first if it has none."""
    return x.ndim > 0 and x.shape[axis if x.ndim > axis else 0] == output.shape[axis]


def tensors_in(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[Tensor]:
    """Yield the tensors of arguments, also of lists and tuples among them."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)) and value and not isinstance(value[0], int):
            yield from (each for each in value if isinstance(each, Tensor))

"""Tensors that come from parameters alone, where they meet the batch, and the way back of their gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from tracer.gradients.combined import add_gradients
from tracer.gradients.experts import ExpertsGradient
from tracer.gradients.owners import NoOwner
from tracer.gradients.per_sample import DenseGradient, OuterGradient, PerSampleGradient
from tracer.gradients.rows import RowsGradient

JOINED_BYTES = 16 << 20
"""The most bytes of built gradients of several tensors that go back to parameters at once."""


class RawFailed(Exception):
    """Parameters whose use cannot be divided among samples; never reaches a user.

    Args:
        reasons: The reason by parameter name.
    """

    def __init__(self, reasons: Mapping[str, str]) -> None:
        super().__init__(", ".join(reasons))
        self.reasons = dict(reasons)


@contextmanager
def failing_as_raw(names: Iterable[str]) -> Iterator[None]:
    """Raise `RawFailed` for an error of torch within a ``with`` block."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (NoOwner, RuntimeError, ValueError, TypeError, IndexError) as error:
        raise RawFailed(dict.fromkeys(names, f"its gradient cannot be divided among samples ({error})")) from error


class Shared(NamedTuple):
    """A tensor that comes from parameters alone.

    Attributes:
        tensor: The tensor.
        names: The parameters.
        transposed: Whether it is one parameter, a matrix, transposed.
        rows: The rows of one parameter, a table, that it consists of.
        entry: Its index in the first dimension of one parameter, whose part it is: the matrix of an expert.
    """

    tensor: Tensor
    names: frozenset[str]
    transposed: bool = False
    rows: Tensor | None = None
    entry: int | None = None


class Use(NamedTuple):
    """A place where shared tensors meet the batch.

    Attributes:
        label: The function and the parameters.
        names: The parameters.
        edge: Where the gradient arrives.
        leaf: The tensor of copies, if its gradient is what arrives.
        axis: The dimension of samples.
        fold: The number of rows of a sample; 0: any.
        convert: Returns, for the gradient that arrives, the gradients of shared tensors, ``B`` samples each. If samples
            are mixed, it is given a function that returns whose rows are, given the gradient and how many of its
            dimensions number rows.
        mixed: Whether gradients tell whose rows are.
    """

    label: str
    names: frozenset[str]
    edge: GradientEdge
    leaf: Tensor | None
    axis: int
    fold: int
    convert: Callable[[Tensor, Callable[[Tensor, int], Tensor]], list[tuple[Shared, PerSampleGradient]]]
    mixed: bool = False


class Pullback:
    """Gradients of shared tensors on their way back to parameters.

    Args:
        parameters: The parameters by name.
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self._parameters = parameters
        self._names = {id(value): name for name, value in parameters.items()}
        self._waiting: dict[int, tuple[Shared, list[PerSampleGradient]]] = {}

    def direct(self, found: Sequence[tuple[Shared, PerSampleGradient]]) -> dict[str, PerSampleGradient]:
        """Return the gradients of shared tensors that are parameters; the others wait."""
        given: dict[str, PerSampleGradient] = {}
        for shared, gradient in found:
            name = self._names.get(id(shared.tensor))
            if name is None and shared.transposed and isinstance(gradient, OuterGradient):
                (name,) = shared.names
                gradient = OuterGradient(gradient.right, gradient.left, gradient.shape[::-1])
            if name is None and shared.entry is not None:
                (whole,) = shared.names
                if (expanded := _as_part(gradient, shared.entry, self._parameters[whole].shape)) is not None:
                    name, gradient = whole, expanded
            if name is None:
                self._waiting.setdefault(id(shared.tensor), (shared, []))[1].append(gradient)
            else:
                given[name] = add_gradients([given[name], gradient]) if name in given else gradient
        return given

    def finish(self) -> dict[str, PerSampleGradient]:
        """Return the gradients of the parameters of tensors that wait."""
        found: dict[str, list[PerSampleGradient]] = {}
        waiting = [(shared, add_gradients(gradients)) for shared, gradients in self._waiting.values()]
        self._waiting.clear()
        for group in _in_groups(waiting):
            for name, gradient in self._back(group):
                found.setdefault(name, []).append(gradient)
        return {name: add_gradients(parts) for name, parts in found.items()}

    def _back(self, group: Sequence[tuple[Shared, PerSampleGradient]]) -> list[tuple[str, PerSampleGradient]]:
        """Return the gradients of the parameters of shared tensors, by one backward for all of them if it can run."""
        names = sorted({name for shared, _ in group for name in shared.names})
        wanted = [self._parameters[name] for name in names]
        try:
            with failing_as_raw(names):
                built = [_built(shared, gradient) for shared, gradient in group]
                if (rows := group[0][0].rows) is not None and rows.numel() < len(wanted[0]):
                    index = rows.reshape(1, -1).expand(len(built[0]), -1).long()
                    return [(names[0], RowsGradient(index, built[0].reshape(*index.shape, -1), wanted[0].shape))]
                grads = torch.autograd.grad(
                    [shared.tensor for shared, _ in group],
                    wanted,
                    built,
                    retain_graph=True,
                    allow_unused=True,
                    is_grads_batched=True,
                )
        except RawFailed:
            if len(group) == 1:
                raise
            return [found for each in group for found in self._back([each])]
        return [(name, DenseGradient(grad)) for name, grad in zip(names, grads, strict=True) if grad is not None]


def _built(shared: Shared, gradient: PerSampleGradient) -> Tensor:
    """Return the built gradients of a shared tensor, ``[B, *shape]``."""
    count = gradient.batch_size
    return gradient.dense(0, count).view(count, *shared.tensor.shape).to(shared.tensor.dtype)


def _in_groups(
    waiting: Sequence[tuple[Shared, PerSampleGradient]],
) -> Iterator[list[tuple[Shared, PerSampleGradient]]]:
    """Yield tensors and their gradients in groups whose built gradients are small; rows of tables alone."""
    group: list[tuple[Shared, PerSampleGradient]] = []
    size = 0
    for shared, gradient in waiting:
        added = gradient.batch_size * gradient.numel * shared.tensor.element_size()
        if shared.rows is not None:
            yield [(shared, gradient)]
            continue
        if group and size + added > JOINED_BYTES:
            yield group
            group, size = [], 0
        group.append((shared, gradient))
        size += added
    if group:
        yield group


def _as_part(gradient: PerSampleGradient, entry: int, shape: Sequence[int]) -> PerSampleGradient | None:
    """Return the gradient of a parameter, given that of one entry of its first dimension, if a form has it."""
    if isinstance(gradient, OuterGradient) and len(shape) == 3:
        index = torch.full(gradient.left.shape[:2], entry, device=gradient.device)
        return ExpertsGradient(index, gradient.left, gradient.right, shape)
    if isinstance(gradient, DenseGradient) and len(shape) == 2:
        index = torch.full((gradient.batch_size, 1), entry, device=gradient.device)
        return RowsGradient(index, gradient.values.unsqueeze(1), shape)
    return None

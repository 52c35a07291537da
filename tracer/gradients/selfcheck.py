"""The check of per-sample gradients against autograd.

For random weights c the sum over samples of ``c_b * gradient_b`` must equal autograd's gradient of ``sum_b c_b f_b``.
The left side is summed up as gradients are computed, so that they need not be stored; the right side is one plain
backward. The difference is measured against ``sum_b |c_b| * |gradient_b|``, which rounding errors scale with, and
counts only above the rounding noise of the whole gradient: some gradients are zero but for noise, for example that of
an attention key's bias, which softmax cancels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tracer.data.tasks import Task
from tracer.errors import GradientError
from tracer.gradients.per_sample import PerSampleGradient, flat
from tracer.gradients.rows import LARGE_TABLE
from tracer.types import Batch, SampleOutputs, detached

BLOCK_BYTES = 32 << 20
REPEATED = 0.05
"""The largest difference of forwards of one batch, as a share of its values."""
_SHRUNK, _SIGNS = 1 << 14, 1 << 20
_NORM_PART = 1 << 20
_NOISE, _MOST_NOISE = 64.0, 0.03
_STRICTNESS, _HALF_STRICTNESS = 0.1, 0.5
"""A gradient that differs by more than this share of the tolerance uses the fallback, which costs time; only a
difference beyond the tolerance itself is an error."""


def tolerance(dtype: torch.dtype, device: torch.device) -> float:
    """Return the relative difference that rounding can explain, for models that compute in this dtype."""
    # Many models compute parts in float32 whatever their dtype (norms, rotary positions), so float64 is not held to its
    # own rounding; on CUDA float32 may be TF32.
    if dtype == torch.float64:
        return 1e-5
    if dtype == torch.float32:
        return 2e-2 if device.type == "cuda" else 1e-3
    return 1e-1


def same_values(values: Tensor, others: Tensor, dtype: torch.dtype, most: float = 1.0) -> bool:
    """Return whether two forwards in a dtype gave the same values ``[b]`` up to rounding; NaN equals NaN.

    No dtype allows for a larger share of them than ``most``: forwards of one batch run the same kernels (`REPEATED`).
    """
    values, others = values.double(), others.double().to(values.device)
    scale = torch.maximum(values.abs(), others.abs()).nan_to_num(posinf=0.0).amax()
    # Small values are differences of larger ones, for example of logits, whose rounding they carry.
    share = min(10 * tolerance(dtype, values.device), most)
    noise = min(256 * max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps), share)
    bound = max(share * float(scale), noise)
    return torch.allclose(values, others, rtol=0, atol=bound, equal_nan=True)


def difference(name: str, values: Tensor, others: Tensor, dtype: torch.dtype) -> tuple[int, str] | None:
    """Return the sample whose values in its batch and alone, ``[b]``, differ most, and the message; None if none do."""
    if same_values(values, others, dtype):
        return None
    row = int((values.double() - others.double().to(values.device)).abs().nan_to_num(torch.inf).argmax())
    return row, f"{name} {float(values[row]):.4g} in its batch and {float(others[row]):.4g} alone"


class Arrivals:
    """Autograd's gradients, measured one by one as they arrive, so that no more than one is held.

    Args:
        against: What gradients are compared with, by parameter name, each dense of any shape, or sparse.
        keep: The names of those that are kept.
        shrink: Whether to measure them `shrunk`.
    """

    def __init__(self, against: Mapping[str, Tensor], keep: Collection[str] = (), shrink: bool = False) -> None:
        self._against, self._keep, self._shrink = against, keep, shrink
        self.norms: dict[str, float] = {}
        self.distances: dict[str, float] = {}
        self.gradients: dict[str, Tensor] = {}

    def differentiate(self, value: Tensor, leaves: Mapping[str, Tensor]) -> None:
        """Take the gradients of a value by leaves of its graph."""
        hooks = [leaf.register_hook(self._hook(name)) for name, leaf in leaves.items()]
        try:
            torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
        finally:
            for hook in hooks:
                hook.remove()

    def _hook(self, name: str) -> Callable[[Tensor], Tensor]:
        def arrive(gradient: Tensor) -> Tensor:
            self.take(name, gradient.detach())
            # Autograd holds what it is given until its end; of a sparse one, these are few rows.
            return gradient if gradient.is_sparse else gradient.new_zeros(()).expand(gradient.shape)

        return arrive

    def take(self, name: str, gradient: Tensor) -> None:
        """Measure a gradient."""
        gradient = gradient.coalesce() if gradient.is_sparse else gradient
        gradient = shrunk(flat(gradient)) if self._shrink else gradient
        self.norms[name] = norm(gradient)
        if (other := self._other(name)) is not None:
            self.distances[name] = distance(other, gradient)
        if name in self._keep:
            self.gradients[name] = gradient

    def miss(self, name: str, parameter: Tensor) -> None:
        """Measure a gradient that did not arrive, which is zero."""
        self.norms[name] = 0.0
        if (other := self._other(name)) is not None:
            self.distances[name] = norm(other)
        if name in self._keep:
            zeros = torch.zeros_like(parameter, requires_grad=False)
            self.gradients[name] = shrunk(flat(zeros)) if self._shrink else zeros

    def _other(self, name: str) -> Tensor | None:
        other = self._against.get(name)
        return shrunk(flat(other)) if self._shrink and other is not None else other


@dataclass(frozen=True)
class Reference:
    """Autograd's outputs, and what was measured of its gradients of ``sum_b c_b f_b``, by parameter name.

    Attributes:
        samples: The outputs, detached.
        norms: The norms of gradients.
        distances: The distances from what gradients were to be compared with.
        gradients: Those that were to be kept; that of a large embedding is sparse.
        dtypes: The dtypes of parameters.
        reached: The parameters that autograd found f to depend on.
        precision: The dtype that layers compute in, if it is lower than that of gradients.
    """

    samples: SampleOutputs
    norms: dict[str, float]
    distances: dict[str, float]
    gradients: dict[str, Tensor]
    dtypes: dict[str, torch.dtype]
    reached: frozenset[str]
    precision: torch.dtype | None = None

    @classmethod
    def of(
        cls, outputs: SampleOutputs, found: Arrivals, parameters: Mapping[str, Tensor], precision: torch.dtype | None
    ) -> Reference:
        """Return what arrived, and zero for the other parameters."""
        reached = frozenset(found.norms)
        for name, parameter in parameters.items():
            if name not in reached:
                found.miss(name, parameter)
        dtypes = {name: parameter.dtype for name, parameter in parameters.items()}
        return cls(detached(outputs), found.norms, found.distances, found.gradients, dtypes, reached, precision)

    @property
    def outputs(self) -> Tensor:
        """F of each sample, ``[B]``."""
        return self.samples.output

    def same_outputs(self, outputs: Tensor) -> bool:
        """Return whether another forward gave the same f, up to rounding; NaN equals NaN."""
        return same_values(outputs, self.outputs, self.precision or outputs.dtype)

    def above_noise(self) -> set[str]:
        """Return the parameters whose gradient is more than rounding noise."""
        return {name for name, size in self.norms.items() if size > self._noise(name)}

    def _noise(self, name: str) -> float:
        # Of float32 at least: parts of float64 models compute in it (the softmax of transformers' attention).
        eps = max(torch.finfo(each).eps for each in (self.precision or self.dtypes[name], torch.float32))
        return min(_NOISE * eps, _MOST_NOISE) * max(self.norms.values())

    def compare(self, totals: Mapping[str, Total], names: Iterable[str], strictness: float = 1.0) -> dict[str, str]:
        """Return the named parameters whose weighted sums differ, missing ones being zero, and a measure of it."""
        wrong = {}
        for name in names:
            total, size = totals.get(name), self.norms[name]
            scale = max(size, float(total.norms) if total is not None else 0.0)
            difference = size if total is None else self._distance(name, total.gradient)
            bound = tolerance(self.precision or self.dtypes[name], self.outputs.device)
            # Rounding explains no gradient that is missing: the parameter is used apart from its layer.
            if difference > max(strictness * bound * scale, 0.0 if total is None else self._noise(name)):
                wrong[name] = f"relative difference {difference / scale:.2g}, tolerance {bound:.0e}"
        return wrong

    def _distance(self, name: str, other: Tensor) -> float:
        return self.distances[name] if name in self.distances else distance(other, self.gradients[name])


def norm(values: Tensor) -> float:
    """Return the Euclidean norm of all values, dense or coalesced, summed up in float64."""
    # vector_norm with a dtype of its own takes four times as long
    stored = values.values() if values.is_sparse else values
    parts = (part.double() for part in stored.reshape(-1).split(_NORM_PART))
    return math.sqrt(sum(float(torch.dot(part, part)) for part in parts))


def distance(one: Tensor, other: Tensor) -> float:
    """Return the Euclidean norm of the difference of two gradients, either of which may be sparse."""
    one = one.to(other.device)
    if one.is_sparse and other.is_sparse:
        return norm((one - other).coalesce())
    parts = zip(flat(one).split(_NORM_PART), flat(other).split(_NORM_PART), strict=True)
    return math.hypot(*(norm(some - others) for some, others in parts))


def check_weights(batch_size: int, seed: int, row: int | None = None) -> Tensor:
    """Return random weights c of a batch: ``[B]``, float64, 0.5 to 1.5 of either sign; 4 for a sample in question."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(batch_size, generator=generator, dtype=torch.float64) + 0.5
    weights *= torch.randint(0, 2, (batch_size,), generator=generator) * 2 - 1
    if row is not None:
        weights[row] = 4.0
    return weights


def shrunk(values: Tensor) -> Tensor:
    """Return a vector ``[n]``, or a count sketch ``[16384]`` of a longer one, with its norm up to about 1 %."""
    # The whole gradient of a sharded model need not fit into memory, and a difference shows in the sketches as well.
    if len(values) <= _SHRUNK:
        return values
    generator = torch.Generator().manual_seed(len(values))
    folded = values.new_zeros(_SHRUNK)
    for start in range(0, len(values), _SIGNS):  # a multiple of what is kept
        part = values[start : start + _SIGNS]
        signs = torch.empty(len(part), dtype=torch.int8).random_(0, 2, generator=generator)
        padded = values.new_zeros(-(-len(part) // _SHRUNK) * _SHRUNK)
        torch.mul(part, (signs * 2 - 1).to(values.device), out=padded[: len(part)])
        folded += padded.view(-1, _SHRUNK).sum(0)
    return folded


@dataclass(frozen=True)
class Total:
    """The weighted sum of a parameter's gradients.

    Attributes:
        gradient: ``[numel]``, or sparse and ``[V, I]``.
        norms: The sum of weighted norms: ``[1]``.
    """

    gradient: Tensor
    norms: Tensor

    def plus(self, gradient: Tensor, norms: Tensor) -> Total:
        """Return the sum with those of other samples."""
        if self.gradient.is_sparse and gradient.is_sparse:
            return Total((self.gradient + gradient).coalesce(), self.norms + norms)
        return Total(flat(self.gradient) + flat(gradient), self.norms + norms)


class WeightedSums:
    """The sum of ``c_b * gradient_b`` over samples, parameter by parameter, updated as gradients are computed.

    Args:
        weights: c, ``[B]``.
        shrink: Whether to store sums `shrunk`.

    Attributes:
        totals: The sums by parameter name.
    """

    def __init__(self, weights: Tensor, shrink: bool = False) -> None:
        self.weights, self._shrink = weights, shrink
        self.totals: dict[str, Total] = {}

    def add(self, start: int, gradients: Mapping[str, PerSampleGradient]) -> None:
        """Add the gradients of samples from ``start`` on."""
        for name, gradient in gradients.items():
            weights = self.weights[start : start + gradient.batch_size].to(gradient.device)
            dtype = torch.promote_types(gradient.dtype, torch.float32)
            total, norms = gradient.weighted_sum(weights.to(dtype))
            if self._shrink:
                total = shrunk(flat(total))
            before = self.totals.get(name)
            self.totals[name] = before.plus(total, norms) if before else Total(total, norms)


def reference_pass(
    model: nn.Module,
    task: Task,
    batch: Batch,
    weights: Tensor,
    names: Sequence[str],
    found: Arrivals,
    precision: torch.dtype | None = None,
) -> Reference:
    """Run the model plainly and measure autograd's gradient of the randomly weighted sum of outputs.

    Args:
        model: The model, inside `isolated`.
        task: The task.
        batch: A batch of ``B`` samples.
        weights: c, ``[B]``.
        names: The parameters' names.
        found: Takes the gradients.
        precision: The dtype that layers compute in, if it is lower than that of parameters.

    Returns:
        The reference; a parameter that f does not depend on has gradient zero, and is not among ``reached``.

    Raises:
        GradientError: If a parameter is complex.
    """
    parameters = dict(model.named_parameters())
    wanted = {name: parameters[name] for name in names}
    for name, parameter in wanted.items():
        if parameter.is_complex():
            raise GradientError(f"Parameter {name!r} is complex; select real parameters with params=.")
    with _sparse_tables():
        outputs = task.outputs(model, batch)
    output = outputs.output
    if output.requires_grad:
        found.differentiate((weights.to(output) * output).sum(), wanted)
    return Reference.of(outputs, found, wanted, precision)


@contextmanager
def _sparse_tables() -> Iterator[None]:
    """Let forwards look up large tables such that autograd builds only the rows that a batch touches."""
    # Built whole, a table of 800,000 x 32 numbers takes longer than everything else of a small model's check.
    original = nn.Embedding.forward

    def forward(module: nn.Embedding, index: Tensor) -> Tensor:
        weight = module._parameters.get("weight")  # None if it is computed from others
        if weight is None or weight.numel() < LARGE_TABLE or module.scale_grad_by_freq or weight._backward_hooks:
            return original(module, index)
        return F.embedding(index, weight, module.padding_idx, module.max_norm, module.norm_type, sparse=True)

    nn.Embedding.forward = forward  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Embedding.forward = original  # type: ignore[method-assign]


def sharded_reference_pass(
    whole_parameters: Callable[[], AbstractContextManager[Mapping[str, Tensor]]],
    task: Task,
    model: nn.Module,
    batch: Batch,
    weights: Tensor,
    shapes: Mapping[str, Sequence[int]],
    found: Arrivals,
    precision: torch.dtype | None = None,
) -> Reference:
    """Return the reference for a sharded model."""
    with whole_parameters() as whole:
        outputs = task.outputs(model, batch)
    output = outputs.output
    if not output.requires_grad:
        raise GradientError(depends_on_nothing(list(shapes)))
    leaves = {name: whole[name] for name in shapes if name in whole}
    found.differentiate((weights.to(output) * output).sum(), leaves)
    missing = {name: output.new_zeros(()).expand(*shape) for name, shape in shapes.items() if name not in leaves}
    return Reference.of(outputs, found, {**leaves, **missing}, precision)


def depends_on_nothing(names: Sequence[str]) -> str:
    """Return the message for an f that no selected parameter changes."""
    return (
        f"The task's output depends on none of the {len(names)} selected parameters ({', '.join(names[:4])}...): "
        f"nothing can be attributed to them. Check params= and that the task does not detach the model's output."
    )


def disagreeing(reference: Reference, totals: Mapping[str, Total], names: Sequence[str]) -> dict[str, str]:
    """Return which named parameters' weighted sums differ from the reference, with a measure."""
    dtypes = {reference.precision, *(reference.dtypes[name] for name in names)}
    half = not dtypes.isdisjoint((torch.float16, torch.bfloat16))
    return reference.compare(totals, names, _HALF_STRICTNESS if half else _STRICTNESS)

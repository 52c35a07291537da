"""One check for every entry of the zoo: a model, a batch, and exact gradients of single examples in float64.

The model is built, and evaluated once, with weights other than the checkpoint's, as users do. `Tracer` featurizes the
checkpoint in shuffled batches of uneven sizes. Every example's loss gradient must equal that of a model that is built
anew for this example alone; so no batch, and nothing that a forward leaves in the model, can go into the expectation.
One projector gives the exact gradients and sketches of many seeds in a single pass.
"""

from __future__ import annotations

import re
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tracer import Tracer, TracerError
from tracer.api.sinks import DroppingSink
from tracer.gradients import GradientsChanged, isolated
from tracer.gradients.per_sample import DenseGradient
from tracer.projection import Projector, make_projector, projector_kinds, register_projector

NUM_EXAMPLES = 13
BATCH_SIZES = (4, 5, 3, 1)
"""The first batch has the first examples in order, so that an entry can make it an innocent one."""
NUM_SKETCHES = 3
"""Sketches that `Tracer` makes, which must be those of the built gradients; bias is measured on the latter."""
NUM_SEEDS = 40
SKETCH_DIM = 256
STANDARD_ERRORS = 6  # a t statistic of 40 seeds is above this once in two million


@dataclass(frozen=True)
class Entry:
    """A model of the zoo.

    Attributes:
        name: Its name in the table of outcomes.
        build: Returns the model; called again for every example.
        batch: Returns a batch of `NUM_EXAMPLES` examples, in any containers.
        task: The task of `Tracer`.
        loss: ``(model, batch of one) -> loss``, written apart from the task. Default: that of `REFERENCE_LOSSES`.
        refused: A pattern of the error, if the right answer is a refusal.
        or_exact: Whether exact gradients are as right as the refusal.
        fault: The known fault for which the entry fails today.
        rtol: The largest error of a gradient relative to its norm; larger for models with float32 inside.
        perturb: Whether parameters are moved away from their initialization.
        doubled: Whether the expectation is the mean of two copies of the example, since `BatchNorm2d` of torch 2.13 has
            a wrong gradient for a batch of one when it comes through some strided views.
    """

    name: str
    build: Callable[[], nn.Module]
    batch: Callable[[], Any]
    task: Any = "image_classification"
    loss: Callable[[nn.Module, Any], Tensor] | None = None
    refused: str | None = None
    or_exact: bool = False
    fault: str | None = None
    rtol: float = 1e-5
    perturb: bool = True
    doubled: bool = False


@dataclass(frozen=True)
class Outcome:
    """The result of an entry: how gradients were computed, the worst error, and the cost in plain passes."""

    kind: str
    error: float | None = None
    cost: float | None = None
    note: str = ""


class ExactAndSketches(Projector):
    """The exact gradient, and then `NUM_SKETCHES` sketches, from one stream of gradients."""

    kind = "exact_and_sketches"

    def _prepare(self, device) -> None:
        sketches = [make_projector("sketch", self.shapes, self.proj_dim, seed) for seed in range(NUM_SKETCHES)]
        self.parts = [make_projector("none", self.shapes, 1, 0), *sketches]
        self.dim = sum(part.dim for part in self.parts)

    def add(self, name, gradient, features, squared_norm) -> None:
        raise NotImplementedError("gradients go to the parts")

    def start(self, into):
        return _Parts(self, into)


class _Parts:
    def __init__(self, projector: ExactAndSketches, into) -> None:
        self.result = into
        parts = into.features.split([part.dim for part in projector.parts], dim=1)
        self.running = [
            part.start(type(into)(torch.zeros_like(columns), torch.zeros_like(into.squared_norm)))
            for part, columns in zip(projector.parts, parts, strict=True)
        ]

    def add(self, gradients, start=0, stop=None) -> None:
        for running in self.running:
            running.add(gradients, start, stop)

    def finish(self):
        finished = [running.finish() for running in self.running]
        self.result.features.copy_(torch.cat([each.features for each in finished], 1))
        self.result.squared_norm.copy_(finished[0].squared_norm)
        return self.result


def check(entry: Entry, folder: Path, timed: bool = True) -> Outcome:
    """Return the outcome of an entry, with its cost if it is to be timed, or fail with what is wrong."""
    if ExactAndSketches.kind not in projector_kinds():  # not at import: pytest imports modules twice, once for doctests
        register_projector(ExactAndSketches)
    state, model = checkpoint(entry), fresh(entry)
    batch = in_double(entry.batch())
    with torch.no_grad():
        run_once(entry, model, batch)
    model.train()
    options = {"projector": ExactAndSketches.kind, "storage": "float32", "proj_dim": SKETCH_DIM}
    try:
        tracing = Tracer(model, entry.task, NUM_EXAMPLES, folder, **options)
        tracing.load_checkpoint(state, model_id=0, learning_rate=1.0)
        for indices in batches():
            tracing.featurize(take(batch, indices), inds=indices)
    except TracerError as error:
        if entry.refused is None:
            raise
        assert_refused_for(entry.refused, error)
        return Outcome("refused", note=str(error).partition(":")[0][:80])
    assert entry.refused is None or entry.or_exact, f"expected an error like {entry.refused!r}"
    tracing.flush()
    expected = reference(entry, state)
    table = tracing.store.checkpoint(0)
    rows = np.concatenate([rows for _, rows in table.raw_features(0, NUM_EXAMPLES)])
    loss_grad = torch.from_numpy(np.array(table.column("loss_grad"))).double()
    features = torch.from_numpy(rows).double() * loss_grad[:, None]
    dims = [sum(value[0].numel() for value in expected.values()), *[SKETCH_DIM] * NUM_SKETCHES]
    exact, *sketches = features.split(dims, dim=1)
    error = worst_error(exact, expected)
    assert error <= entry.rtol, f"wrong: relative error {error:.2g}"
    check_sketches(expected, sketches, entry.rtol)
    engine = tracing._factory.engine
    kind = "per-sample loop" if engine.runs_samples_alone else "per-sample fallback" if engine.fallback else "exact"
    spent = cost(engine, batch) if timed else None
    return Outcome(kind, error, spent, ", ".join(list(engine.fallback)[:3]))


def checkpoint(entry: Entry) -> dict[str, Any]:
    """Return a state dict whose weights differ from those of the built model."""
    moved = fresh(entry)
    perturb(moved, seed=2)
    return {name: value.clone() if isinstance(value, Tensor) else value for name, value in moved.state_dict().items()}


def reference(entry: Entry, state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return each example's loss gradient by parameter at a checkpoint, every example in a model built anew."""
    batch = in_double(entry.batch())
    gradients: dict[str, list[Tensor]] = {}
    for row in range(NUM_EXAMPLES):
        model = fresh(entry)
        model.load_state_dict(state)
        model.eval()
        named = {name: value for name, value in model.named_parameters() if value.requires_grad}
        loss = reference_loss(entry, model, take(batch, torch.tensor([row] * (1 + entry.doubled)))).mean()
        found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
        for (name, parameter), gradient in zip(named.items(), found, strict=True):
            value = torch.zeros_like(parameter) if gradient is None else gradient.to_dense()
            gradients.setdefault(name, []).append(value.detach().double())
    stacked = {name: torch.stack(found) for name, found in gradients.items()}
    assert any(float(value.abs().max()) > 0 for value in stacked.values()), "the expected gradients are all zero"
    return stacked


def fresh(entry: Entry) -> nn.Module:
    """Return the model as it was built, in float64; the same at every call."""
    torch.manual_seed(zlib.crc32(entry.name.encode()))
    model = entry.build().double()
    if entry.perturb:
        perturb(model, seed=1)
    return model


@torch.no_grad()
def perturb(model: nn.Module, seed: int) -> None:
    """Move parameters, since a contribution behind a zero would not be seen, and running statistics."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter += (0.05 * noise).to(parameter.dtype)
    for module in model.modules():
        if isinstance(getattr(module, "running_var", None), Tensor):
            module.running_var.copy_(0.5 + torch.rand(module.running_var.shape, generator=generator))
            module.running_mean.copy_(0.1 * torch.randn(module.running_mean.shape, generator=generator))


def logits(output: Any) -> Tensor:
    """Return the logits of an output, which may be an object that has them."""
    return output["logits"] if isinstance(output, Mapping) else getattr(output, "logits", output)


def call(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    """Return a model's logits, and the labels, of a tuple whose last item they are or a mapping with ``labels``."""
    if isinstance(batch, Mapping):
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        return logits(model(**inputs)), batch["labels"]
    return logits(model(*batch[:-1])), batch[-1]


def next_token_loss(model: nn.Module, batch: Any) -> Tensor:
    """Return the mean cross-entropy of the tokens after the first."""
    tokens = batch[0] if isinstance(batch, (tuple, list)) else batch
    scores = logits(model(tokens))
    return F.cross_entropy(scores[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def own_loss(model: nn.Module, batch: Any) -> Tensor:
    """Return the loss that the model itself computes, as those of transformers do."""
    return model(**batch).loss


def squared_error(model: nn.Module, batch: Any) -> Tensor:
    """Return the mean squared error."""
    output, target = call(model, batch)
    return (output.flatten() - target.flatten()).square().mean()


REFERENCE_LOSSES = {
    "image_classification": lambda model, batch: F.cross_entropy(*call(model, batch)),
    "text_classification": lambda model, batch: F.cross_entropy(*call(model, batch)),
    "regression": squared_error,
    "language_modeling": next_token_loss,
}


def reference_loss(entry: Entry, model: nn.Module, batch: Any) -> Tensor:
    """Return the loss of a batch of one, by the entry's own formula; functions as tasks are their own."""
    loss = entry.loss or (REFERENCE_LOSSES[entry.task] if isinstance(entry.task, str) else entry.task)
    return loss(model, batch)


def run_once(entry: Entry, model: nn.Module, batch: Any) -> None:
    """Evaluate the model on its own weights, as users do before they ask for scores."""
    model.eval()
    reference_loss(entry, model, take(batch, next(batches())))


def batches() -> Iterator[Tensor]:
    """Yield the indices of batches: the first in order, the others shuffled, the last of one example."""
    first = BATCH_SIZES[0]
    shuffled = first + torch.randperm(NUM_EXAMPLES - first, generator=torch.Generator().manual_seed(0))
    yield from torch.cat([torch.arange(first), shuffled]).split(BATCH_SIZES)


def take(batch: Any, rows: Tensor) -> Any:
    """Return the rows of a batch, cut to the longest; leaves without examples are shared."""
    if isinstance(batch, Tensor):
        return batch[rows] if batch.ndim and len(batch) == NUM_EXAMPLES else batch
    if isinstance(batch, Mapping):
        return cut({key: take(value, rows) for key, value in batch.items()})
    if isinstance(batch, tuple):
        return tuple(take(value, rows) for value in batch)
    if isinstance(batch, list):
        return [batch[row] for row in rows.tolist()]
    return batch


def cut(batch: dict[str, Any]) -> dict[str, Any]:
    """Return a batch without the positions that are padding in all its rows, as collators pad."""
    mask = batch.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        return batch
    padded, longest = mask.shape[1], int(mask.sum(1).max())
    return {
        key: value[:, :longest].contiguous() if isinstance(value, Tensor) and value.shape[1:2] == (padded,) else value
        for key, value in batch.items()
    }


def in_double(batch: Any) -> Any:
    """Return a batch with its floats in float64."""
    if isinstance(batch, Tensor):
        return batch.double() if batch.is_floating_point() else batch
    if isinstance(batch, Mapping):
        return {key: in_double(value) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return type(batch)(in_double(value) for value in batch)
    return batch


def assert_refused_for(pattern: str, error: TracerError) -> None:
    """Check that a refusal has the expected reason."""
    assert re.search(pattern, str(error)), f"expected an error like {pattern!r}, got {type(error).__name__}: {error}"


def worst_error(exact: Tensor, expected: Mapping[str, Tensor]) -> float:
    """Return the largest error of an example's gradient of a parameter, relative to its norm.

    A parameter with less than a thousandth of the example's gradient is measured by that thousandth: its rounding noise
    comes from larger terms. So does that of an example that is fitted to 1e-8 of the others, since ``p - 1`` cancels.
    """
    whole = torch.cat([value.reshape(NUM_EXAMPLES, -1) for value in expected.values()], 1).norm(dim=1)
    whole = whole.clamp(min=1e-8 * float(whole.max()))
    worst, start = 0.0, 0
    for value in expected.values():
        wanted = value.reshape(NUM_EXAMPLES, -1)
        found = exact[:, start : start + wanted.shape[1]]
        start += wanted.shape[1]
        scale = torch.maximum(wanted.norm(dim=1), 1e-3 * whole).clamp(min=1e-30)
        worst = max(worst, float(((found - wanted).norm(dim=1) / scale).nan_to_num(torch.inf).max()))
    return worst


def check_sketches(expected: Mapping[str, Tensor], sketches: list[Tensor], rtol: float) -> None:
    """Check that sketches of whatever form gradients had are those of built gradients, and that these have no bias.

    Bias is looked for in each parameter by itself: one that is sketched wrongly may be a small share of the whole.
    """
    shapes = {name: tuple(value.shape[1:]) for name, value in expected.items()}
    built = {name: DenseGradient(value) for name, value in expected.items()}
    scale = sum(value.reshape(NUM_EXAMPLES, -1).square().sum(1) for value in expected.values()).sqrt()[:, None]
    scale = scale.clamp(min=1e-8 * float(scale.max()))
    for seed, sketch in enumerate(sketches):
        features = make_projector("sketch", shapes, SKETCH_DIM, seed).project(built).features.double()
        error = float(((sketch - features) / scale.clamp(min=1e-30)).abs().max())
        assert error <= rtol, f"a sketch differs from that of the built gradients by {error:.2g}"
    pairs = {name: two_examples(value) for name, value in expected.items()}
    products: dict[str, list[float]] = {name: [] for name in shapes}
    for seed in range(NUM_SEEDS):
        projector = make_projector("sketch", shapes, SKETCH_DIM, seed)
        for name, pair in pairs.items():
            x, y = projector.project({name: DenseGradient(pair)}).features.double()
            products[name].append([float(x @ x), float(x @ y)])
    for name, found in products.items():
        assert_unbiased(name, pairs[name].reshape(2, -1), torch.tensor(found, dtype=torch.float64))


def two_examples(gradients: Tensor) -> Tensor:
    """Return the longest of some gradients, and its neighbour, ``[2, *shape]``."""
    longest = int(gradients.reshape(len(gradients), -1).norm(dim=1).argmax())
    return gradients[[longest, (longest + 1) % len(gradients)]]


def assert_unbiased(name: str, pair: Tensor, products: Tensor) -> None:
    """Check sketched ``<x, x>`` and ``<x, y>`` of a parameter, ``[seeds, 2]``, within standard errors of their mean."""
    x, y = pair
    lengths = torch.stack([x @ x, x.norm() * y.norm()])
    errors = (products - torch.stack([x @ x, x @ y])) / lengths.clamp(min=1e-300)
    allowed = STANDARD_ERRORS * errors.std(0) / len(errors) ** 0.5 + 1e-6
    assert (errors.mean(0).abs() <= allowed).all(), f"sketches of {name} are biased by {errors.mean(0).tolist()}"


def cost(engine: Any, batch: Any) -> float:
    """Return the time of the gradients of a batch, verified before, in forward and backward passes of its sum."""
    rows = next(batches())
    part, model = take(batch, rows), engine.model
    parameters = [value for value in model.parameters() if value.requires_grad]

    def plain() -> None:
        outputs = engine.task.outputs(model, part).output
        # LeViT keeps its attention biases, with their graph, from one evaluation to the next
        torch.autograd.grad(outputs.sum(), parameters, allow_unused=True, retain_graph=True)

    def ours() -> None:
        with suppress(GradientsChanged):  # an audit found a difference, as in `check`: later calls compute otherwise
            engine.compute(part, len(rows), DroppingSink())

    # Other weights than the checkpoint's: an engine that is not told takes other outputs for those of a random model.
    with isolated(model, engine.names, engine.device), engine.using_weights("those of the model"):
        # The first 16 batches are all verified if the gradient of some parameter is zero.
        return fastest(ours, repeats=16) / fastest(plain)


def fastest(function: Callable[[], Any], repeats: int = 3) -> float:
    """Return the seconds of the fastest of some calls after a first one."""
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)

"""What each process of `test_fsdp` runs under torchrun: scenes, one after another, and their failures to a file.

A scene asserts what it claims. All ranks run the same scenes; some do other things in them.
"""

from __future__ import annotations

import contextlib
import copy
import datetime
import functools
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from store_cases import stored_features
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

import tracer
from tracer import Tracer
from tracer.training.lend_weights import LoadedWeights, weights_in

torch.set_num_threads(1)
ROWS, TARGETS = 13, 5


class Block(nn.Module):
    """A transformer block with every kind of layer that reads or shares weights in a way of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.LayerNorm(8), nn.RMSNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.up, self.down = nn.Linear(8, 17), nn.Linear(17, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.before(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.down(torch.relu(self.up(self.after(x))))


class Language(nn.Module):
    """A small transformer whose head is tied to its embedding, with learned positions."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(11, 8), nn.Embedding(6, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.tokens(input_ids) + self.positions(torch.arange(input_ids.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def conv_net() -> nn.Module:
    """Convolutions, a normalization with buffers, and a Linear layer whose 3 rows do not divide among 2 ranks."""
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(2, 5, 3, padding=1), nn.BatchNorm2d(5), nn.ReLU(inplace=True)),
        nn.Sequential(nn.Conv2d(5, 4, 3, stride=2), nn.GroupNorm(2, 4), nn.ReLU()),
        nn.Flatten(),
        nn.Linear(16, 3),
    )


def make(kind: str) -> tuple[nn.Module, str, tuple, tuple]:
    """A model, its task, and train and target rows: the same in every process."""
    torch.manual_seed(0)
    model = Language() if kind == "language" else conv_net()
    for value in model.buffers():
        value += 1
    if kind == "language":
        return model, "language_modeling", (torch.randint(0, 11, (ROWS, 6)),), (torch.randint(0, 11, (TARGETS, 6)),)
    train = torch.randn(ROWS, 2, 6, 6), torch.randint(0, 3, (ROWS,))
    return model, "image_classification", train, (torch.randn(TARGETS, 2, 6, 6), torch.randint(0, 3, (TARGETS,)))


def checkpoints(model: nn.Module) -> list[dict]:
    """Two states that are not the model's own."""
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        state = {
            key: value + 0.1 * torch.randn_like(value) if value.is_floating_point() and "running" not in key else value
            for key, value in model.state_dict().items()
        }
        if "head.weight" in state:
            state["head.weight"] = state["tokens.weight"]
        found.append(state)
    return found


def shard(model: nn.Module, how: str = "blocks", **options) -> nn.Module:
    """Wrap the whole model, its blocks and itself, or its blocks alone."""
    if how != "whole":
        for block in model.blocks if isinstance(model, Language) else (model[0], model[1], model[3]):
            fully_shard(block, **options)
    if how != "alone":
        fully_shard(model, **options)
    return model


def batches(data: tuple, rows: list[int], size: int = 3) -> Iterator[tuple[tuple, list[int]]]:
    """Batches of some rows, with their indices."""
    for start in range(0, len(rows), size):
        inds = rows[start : start + size]
        yield tuple(value[inds] for value in data), inds


def dealt(num_rows: int, rank: int, size: int) -> list[int]:
    """The rows of a rank when they are dealt like cards."""
    return list(range(rank, num_rows, size))


class Traced:
    """A job: a model, its data, and what is to be traced.

    Args:
        kind: ``conv`` or ``language``.
        path: Where stores go.
    """

    def __init__(self, kind: str, path: Path) -> None:
        self.model, self.task, self.train, self.targets = make(kind)
        self.states, self.path = checkpoints(self.model), path

    def tracer(self, model: nn.Module, name: str, **options) -> Tracer:
        """A tracer of exact gradients in a store of a name."""
        settings = {"projector": "none", "storage": "float32"} | options
        return Tracer(model, self.task, ROWS, self.path / name, **settings)

    def run(self, tracing: Tracer, train: list[list[int]], targets: list[list[int]], size: int = 3) -> Tracer:
        """Featurize and score rows at both checkpoints, each list of them in batches of its own."""
        for model_id, state in enumerate(self.states):
            tracing.load_checkpoint(state, model_id, 0.1)
            for rows in train:
                for batch, inds in batches(self.train, rows, size):
                    tracing.featurize(batch, inds=inds)
        tracing.finalize_features()
        for model_id, state in enumerate(self.states):
            tracing.start_scoring_checkpoint(state, model_id, TARGETS, "test")
            for rows in targets:
                for batch, inds in batches(self.targets, rows, size):
                    tracing.score(batch, inds=inds)
        tracing.close()
        return tracing

    def plain(self, name: str, size: int = 3, **options) -> dict[str, np.ndarray]:
        """What the plain model gives in one process, of the same batches as all ranks together have."""
        everyone = range(dist.get_world_size())
        found = {}
        if dist.get_rank() == 0:
            train = [dealt(ROWS, rank, len(everyone)) for rank in everyone]
            targets = [dealt(TARGETS, rank, len(everyone)) for rank in everyone]
            alone = self.tracer(copy.deepcopy(self.model), name, process=(0, 1), **options)
            found = stored(self.run(alone, train, targets, size))
        dist.barrier()
        return found

    def shared(self, tracing: Tracer, size: int = 3) -> Tracer:
        """Featurize and score this rank's rows."""
        rank, ranks = dist.get_rank(), dist.get_world_size()
        return self.run(tracing, [dealt(ROWS, rank, ranks)], [dealt(TARGETS, rank, ranks)], size)


def stored(tracing: Tracer) -> dict[str, np.ndarray]:
    """Everything of the second checkpoint's rows, and all scores."""
    alone = Tracer.open(tracing.store.path, process=(0, 1))  # called by one rank or by all
    table = alone.store.checkpoint(1)
    rows = {name: np.array(table.column(name)) for name in ("loss", "loss_grad", "loss_hess", "gradient_norm")}
    return rows | {"features": stored_features(table, 0, ROWS), "scores": np.array(alone.finalize_scores("test"))}


def assert_equal(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    for name, values in expected.items():
        assert name == "loss_hess" or np.abs(values).max() > 0.1, name
        assert np.array_equal(found[name], values), (name, np.abs(found[name] - values).max())


def whole(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of all parameters, buffers and gradients, whole."""
    found = {}
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        for what, tensor in ((name, value), (f"{name}.grad", value.grad)):
            if tensor is not None:
                found[what] = (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()
    return found


@contextlib.contextmanager
def raises(kind: type[Exception], *parts: str) -> Iterator[None]:
    try:
        yield
    except kind as error:
        assert type(error) is kind, repr(error)
        for part in parts:
            assert part in str(error), str(error)
    else:
        raise AssertionError(f"{kind.__name__} was not raised")


def equals_the_plain_model(kind: str, how: str, path: Path) -> None:
    """Features, norms and scores are those of the plain model, bit for bit, and either opens the other's store."""
    job = Traced(kind, path)
    expected = job.plain("plain")
    tracing = job.shared(job.tracer(shard(copy.deepcopy(job.model), how), "shared"))
    if dist.get_rank() == 0:
        assert_equal(stored(tracing), expected)
        again = job.tracer(job.model, "shared")  # the settings and weights are those of the plain model
        again.load_checkpoint(job.states[1], 1)
        assert len(again.remaining(1)) == 0
        assert_equal(stored(again), expected)


def sketches_are_those_of_the_plain_model(path: Path) -> None:
    job = Traced("language", path)
    expected = job.plain("plain", projector="sketch", proj_dim=64)
    tracing = job.shared(job.tracer(shard(job.model), "shared", projector="sketch", proj_dim=64))
    if dist.get_rank() == 0:
        assert_equal(stored(tracing), expected)


def other_ways_of_sharding(path: Path) -> None:
    """Parts on the CPU, weights that stay whole between forward and backward, modules that are gathered together."""
    job = Traced("conv", path)
    expected = job.plain("plain")
    options = {
        "offloaded": {"offload_policy": CPUOffloadPolicy(pin_memory=False)},
        "kept": {"reshard_after_forward": False},
    }
    models = {name: shard(copy.deepcopy(job.model), **option) for name, option in options.items()}
    models["grouped"] = copy.deepcopy(job.model)
    fully_shard([models["grouped"][0], models["grouped"][1]])
    fully_shard(models["grouped"])
    models["linear"] = copy.deepcopy(job.model)
    fully_shard(models["linear"][3])  # a layer that has a rule, wrapped itself
    for name, model in models.items():
        tracing = job.shared(job.tracer(model, name))
        if dist.get_rank() == 0:
            assert_equal(stored(tracing), expected)


def replicas(path: Path) -> None:
    """Over a mesh of replicas and shards only those that share shards go in step."""
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replica", "shard"))
    job = Traced("conv", path / str(dist.get_rank()))
    everything = [list(range(ROWS))], [list(range(TARGETS))]
    expected = stored(job.run(job.tracer(copy.deepcopy(job.model), "plain", process=(0, 1)), *everything))
    tracing = job.tracer(shard(job.model, mesh=mesh), "shared", process=(0, 1))
    if dist.get_rank() == 0:
        assert_equal(stored(job.run(tracing, *everything)), expected)


def frozen_and_chosen_parameters(path: Path) -> None:
    job = Traced("language", path)
    job.model.tokens.requires_grad_(False)
    expected = job.plain("plain", params=["blocks.1.*", "positions"])
    model = shard(copy.deepcopy(job.model))
    tracing = job.shared(job.tracer(model, "shared", params=["blocks.1.*", "positions"]))
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert flags == {name: parameter.requires_grad for name, parameter in job.model.named_parameters()}
    if dist.get_rank() == 0:
        assert_equal(stored(tracing), expected)


def training_goes_on_as_if_nothing_had_been(path: Path, before: str) -> None:
    """Weights, gradients, modes and the next steps are those of a twin that was never traced."""
    job = Traced("language", path)
    # FSDP reads what is reduced, and how, at its first forward, which here may be one of the tracer's.
    policy = MixedPrecisionPolicy(reduce_dtype=torch.bfloat16)
    models = tuple(shard(copy.deepcopy(job.model), mp_policy=policy).train() for _ in range(2))
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9) for model in models]
    tokens = torch.randint(0, 11, (4, 6), generator=torch.Generator().manual_seed(dist.get_rank()))

    def loss(model: nn.Module) -> torch.Tensor:
        return nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        loss(model).backward()
        optimizer.step()
        optimizer.zero_grad()

    def is_same() -> None:
        left, right = whole(models[0]), whole(models[1])
        assert left.keys() == right.keys(), left.keys() ^ right.keys()
        for name, value in left.items():
            assert torch.equal(value, right[name]), name

    waiting = []
    for model, optimizer in zip(models, optimizers, strict=True):
        if before == "a step and gradients":
            step(model, optimizer)
            loss(model).backward()
        elif before == "gradients that wait for others":
            model.set_requires_gradient_sync(False)
            loss(model).backward()
        elif before == "a forward without its backward":
            waiting.append(loss(model))
        elif before == "an evaluation":  # leaves the outer parameters whole
            with torch.no_grad():
                model(tokens)
    state = torch.get_rng_state()
    job.shared(job.tracer(models[0], "shared", params="blocks.1.*"))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in models[0].modules())
    if before == "an evaluation":
        models[1].reshard()
    is_same()
    for value in waiting:
        value.backward()
    for model, optimizer in zip(models, optimizers, strict=True):
        model.set_requires_gradient_sync(True)
        for _ in range(2):
            step(model, optimizer)
    is_same()
    assert not torch.equal(whole(models[0])["positions.weight"], job.model.positions.weight)


def only_parts_are_held(path: Path) -> None:
    job = Traced("language", path)
    total = sum(parameter.numel() for parameter in job.model.parameters())
    model = shard(job.model)
    before = whole(model)
    loaded = LoadedWeights(model, job.states[0])
    held = sum(value.numel() for value in loaded.parameters.values())
    assert held < 0.6 * total, (held, total)
    assert all(value._base is None for value in loaded.parameters.values())  # no view that keeps the whole alive
    with contextlib.suppress(KeyError), weights_in(model, loaded):
        for name, value in whole(model).items():
            assert torch.equal(value, job.states[0][name]), name
        raise KeyError
    for name, value in whole(model).items():
        assert torch.equal(value, before[name]), name


def uneven_rows(path: Path, size: int) -> None:
    """One rank has nearly all rows, one has one, one has none; with targets it is the other way around."""
    job = Traced("language", path)
    rank, last = dist.get_rank(), dist.get_world_size() - 1
    train = {0: list(range(1, ROWS)), last: [0]}.get(rank, [])
    targets = {last: list(range(TARGETS))}.get(rank, [])
    tracing = job.run(job.tracer(shard(copy.deepcopy(job.model)), "shared"), [train], [targets], size)
    if rank == 0:
        alone = job.tracer(job.model, "plain", process=(0, 1))
        expected = stored(job.run(alone, [list(range(1, ROWS)), [0]], [list(range(TARGETS))], size))
        assert_equal(stored(tracing), expected)
    dist.barrier()


def resumed(path: Path) -> None:
    """A rank whose rows are stored runs along; what is stored is not computed again."""
    job = Traced("conv", path)
    expected = job.plain("plain")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    first = job.tracer(shard(copy.deepcopy(job.model)), "shared")
    first.load_checkpoint(job.states[0], 0, 0.1)
    mine = dealt(ROWS, rank, ranks)
    for batch, inds in batches(job.train, mine if rank == 0 else mine[:3]):
        first.featurize(batch, inds=inds)
    first.close()
    second = job.tracer(shard(job.model), "shared")
    assert len(second.remaining(0)) == sum(len(dealt(ROWS, other, ranks)) - 3 for other in range(1, ranks))
    job.shared(second)
    if rank == 0:
        assert_equal(stored(second), expected)


def results_without_closing(path: Path) -> None:
    """All ranks ask for scores right behind their last batch, which comes at different times."""
    job = Traced("conv", path)
    tracing = job.tracer(shard(job.model), "shared")
    for model_id, state in enumerate(job.states):
        tracing.load_checkpoint(state, model_id, 0.1)
        if dist.get_rank() == 0:
            for batch, inds in batches(job.train, list(range(ROWS))):
                tracing.featurize(batch, inds=inds)
    tracing.finalize_features()
    for model_id, state in enumerate(job.states):
        tracing.start_scoring_checkpoint(state, model_id, TARGETS, "test")
        if dist.get_rank() == 1:
            for batch, inds in batches(job.targets, list(range(TARGETS)), 1):
                tracing.score(batch, inds=inds)
    assert tracing.top("test", 2).indices.shape == (TARGETS, 2)
    assert (tracing.self_influence() > 0).all()
    assert tracing.finalize_scores("test").shape == (ROWS, TARGETS)


def an_error_reaches_all_ranks(path: Path, where: str) -> None:
    """The rank that fails raises its own error, the others say so, all can go on, and the model is as it was."""
    job = Traced("language", path)
    expected = job.plain("plain")
    model = shard(copy.deepcopy(job.model))
    before = whole(model)
    tracing = job.tracer(model, "shared")
    tracing.load_checkpoint(job.states[0], 0, 0.1)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    batch, inds = next(batches(job.train, dealt(ROWS, rank, ranks)))
    hooks = []

    def fail(*args: object) -> None:
        raise ArithmeticError("a broken sensor")

    kind, text = ArithmeticError, "a broken sensor"
    if rank != 1:
        kind, text = tracer.RankError, "rank 1: ArithmeticError: a broken sensor"
    elif where == "in the forward":
        hooks.append(model.blocks[1].up.register_forward_hook(fail))
    elif where == "in the backward":
        hooks.append(model.blocks[1].down.register_full_backward_pre_hook(fail))
    if where == "in its rows":
        kind, text = (tracer.BatchError, "outside") if rank == 1 else (tracer.RankError, "rank 1: BatchError: inds has")
        inds = [ROWS] if rank == 1 else inds
    for _ in range(2):
        with raises(kind, text):
            tracing.featurize(batch, inds=inds)
    for hook in hooks:
        hook.remove()
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    for name, value in whole(model).items():
        assert torch.equal(value, before[name]), name
    job.shared(tracing)
    if rank == 0:
        assert_equal(stored(tracing), expected)


def values_that_are_not_finite(path: Path) -> None:
    job = Traced("conv", path)
    tracing = job.tracer(shard(job.model), "shared")
    tracing.load_checkpoint(job.states[0], 0, 0.1)
    x, y = job.train[0].clone(), job.train[1]
    x[4] = torch.nan
    rank = dist.get_rank()
    kind, text = (tracer.NonFiniteError, "rows 4 ") if rank == 0 else (tracer.RankError, "rank 0: NonFiniteError: The")
    with raises(kind, text):
        rows = [4] if rank == 0 else [5, 6]
        tracing.featurize((x[rows], y[rows]), inds=rows)
    tracing.close()
    assert np.array_equal(tracing.remaining(0), [row for row in range(ROWS) if row not in (5, 6)])


def an_error_of_the_callers_own(path: Path) -> None:
    """A rank that leaves its with block by an error does not keep the others waiting."""
    job = Traced("conv", path)
    rank = dist.get_rank()
    kind, text = (ZeroDivisionError, "") if rank == 0 else (tracer.RankError, "rank 0: ZeroDivisionError")
    with raises(kind, text), job.tracer(shard(job.model), "shared") as tracing:
        tracing.load_checkpoint(job.states[0], 0, 0.1)
        for batch, inds in batches(job.train, dealt(ROWS, rank, 2)):
            if rank == 0 and inds[0] > 0:
                raise ZeroDivisionError
            tracing.featurize(batch, inds=inds)


def ranks_that_do_not_agree(path: Path) -> None:
    job = Traced("conv", path)
    tracing = job.tracer(shard(job.model), "shared")
    rank = dist.get_rank()
    with raises(tracer.RankError, "same model_id, learning_rate and weights", "rank 1: (0, 0.1,"):
        tracing.load_checkpoint(job.states[rank], 0, 0.1)
    tracing.load_checkpoint(job.states[0], 0, 0.1)
    batch, inds = next(batches(job.train, dealt(ROWS, rank, 2)))
    with raises(tracer.RankError, "not in step", "rank 0: begins a batch", "rank 1: has flushed its rows"):
        if rank == 0:
            tracing.featurize(batch, inds=inds)
        else:
            tracing._backend.joined()


class Choosing(nn.Module):
    """Runs another layer where the first number of a batch is negative."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.left, self.right = nn.Linear(4, 8), nn.Linear(8, 3), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(self.first(x))
        return self.left(hidden) if x[0, 0] < 0 else self.right(hidden)


def other_ways_through_the_model(path: Path) -> None:
    """Where batches decide which weights are gathered, ranks would wait for each other forever."""
    job = Traced("conv", path)
    model = Choosing()
    state = copy.deepcopy(model.state_dict())
    for layer in (model.first, model.left, model.right):
        fully_shard(layer)
    tracing = job.tracer(fully_shard(model), "shared")
    tracing.load_checkpoint(state, 0, 0.1)
    rank = dist.get_rank()
    batch = torch.ones(2, 4) * (2 * rank - 1), torch.tensor([0, 1])
    with raises(tracer.RankError, "rank 0: gathers the weights of left; rank 1: gathers the weights of right"):
        tracing.featurize(batch, inds=[2 * rank, 2 * rank + 1])
    tracing.featurize((torch.ones(2, 4), torch.tensor([0, 1])), inds=[2 * rank, 2 * rank + 1])


class Scaled(nn.Module):
    """A layer with a raw parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.linear = nn.Parameter(torch.rand(2, 6, 6)), nn.Linear(72, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear((x * self.scale).flatten(1))


class Odd(nn.Linear):
    """A Linear layer with a rule of its own, which may be wrong."""


def refusals(path: Path) -> None:
    """What cannot work says so on all ranks, names the parameters, and what to do."""
    job = Traced("conv", path)
    job.model = Scaled()
    job.states = [{name: scale * value for name, value in job.model.state_dict().items()} for scale in (1.0, 0.9)]
    with raises(tracer.GradientError, "'scale': no layer rule covers it in", "Leave them out with params="):
        job.tracer(shard(copy.deepcopy(job.model), "whole"), "raw")
    job.shared(job.tracer(shard(copy.deepcopy(job.model), "whole"), "chosen", params="linear"))
    job = Traced("conv", path)
    with raises(tracer.GradientError, "cannot be done for 10 parameters", "gradients='functional'", "and 4 more"):
        job.tracer(shard(copy.deepcopy(job.model)), "functional", gradients="functional")
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    with raises(tracer.GradientError, "torch.bfloat16", "pass autocast="):
        job.tracer(shard(copy.deepcopy(job.model), mp_policy=policy), "half")
    with raises(tracer.InputError, "attribute passes all examples in one process", "inds="):
        tracer.attribute(shard(copy.deepcopy(job.model)), job.task, job.train, job.targets, job.states, save_dir=path)
    model = shard(copy.deepcopy(job.model))
    with raises(tracer.GradientError, "part of a larger one"):
        model(job.train[0])
        job.tracer(model[0], "inner")
    tracing = job.tracer(model, "parts")
    with raises(tracer.CheckpointError, "sharded tensors", "full_tensor()"):
        tracing.load_checkpoint(model.state_dict(), 0, 0.1)
    exact = job.tracer(shard(copy.deepcopy(job.model)), "exact", storage="none")
    with raises(tracer.CallOrderError, "in one process"):
        exact.score_exactly(job.states[0], 0, job.train, job.targets, "test")
    with torch.device("meta"):
        empty = conv_net()
    with raises(tracer.GradientError, "'0.0.weight' has no memory yet", "to_empty"):
        job.tracer(shard(empty), "empty")


def a_wrong_rule_is_found(path: Path) -> None:
    """The self-check compares with autograd's gradients of the whole parameters, on every rank."""
    job = Traced("conv", path)
    job.model = nn.Sequential(nn.Flatten(), nn.Linear(72, 8), nn.ReLU(), Odd(8, 3))
    job.states = [{name: scale * value for name, value in job.model.state_dict().items()} for scale in (1.0, 0.9)]

    def rule(call: tracer.LayerCall) -> dict:
        return {"weight": factor * torch.einsum("bo,bi->boi", call.grad_output, call.x), "bias": call.grad_output}

    tracer.register_layer_rule(Odd, rule)
    factor = 1.0
    job.shared(job.tracer(shard(copy.deepcopy(job.model), "whole"), "right"))
    factor = 1.0 + 0.01 * dist.get_rank()  # wrong on one rank only
    kind, text = (tracer.GradientError, "'3.weight': captured from 3, its gradient differs from autograd's")
    if dist.get_rank() == 0:
        kind, text = tracer.RankError, "rank 1: GradientError"
    tracing = job.tracer(shard(copy.deepcopy(job.model), "whole"), "wrong")
    tracing.load_checkpoint(job.states[0], 0, 0.1)
    batch, inds = next(batches(job.train, dealt(ROWS, dist.get_rank(), dist.get_world_size())))
    with raises(kind, text):
        tracing.featurize(batch, inds=inds)


def wrappers_without_shards(path: Path) -> None:
    """DistributedDataParallel is taken off; each process traces rows of its own and waits for nobody."""
    job = Traced("conv", path / str(dist.get_rank()))
    expected = stored(
        job.run(
            job.tracer(copy.deepcopy(job.model), "plain", process=(0, 1)), [list(range(ROWS))], [list(range(TARGETS))]
        )
    )
    model = nn.parallel.DistributedDataParallel(copy.deepcopy(job.model))
    tracing = job.tracer(model, "wrapped", process=(0, 1))
    assert tracing.model is model.module
    assert_equal(stored(job.run(tracing, [list(range(ROWS))], [list(range(TARGETS))])), expected)
    assert job.tracer(nn.DataParallel(job.model), "wrapped", process=(0, 1)).model is job.model


def a_rank_that_ends(path: Path) -> None:
    job = Traced("conv", path)
    tracing = job.tracer(shard(job.model), "shared")
    tracing.load_checkpoint(job.states[0], 0, 0.1)
    if dist.get_rank() == 1:
        os._exit(0)
    batch, inds = next(batches(job.train, dealt(ROWS, 0, 2)))
    with raises(tracer.RankError, "does not answer: its process ended"):
        tracing.featurize(batch, inds=inds)


BEFORE = (
    "nothing",
    "a step and gradients",
    "gradients that wait for others",
    "a forward without its backward",
    "an evaluation",
)
SCENES: dict[str, Callable[[Path], None]] = {
    **{
        f"equals the plain model: {kind}, {how}": functools.partial(equals_the_plain_model, kind, how)
        for kind in ("conv", "language")
        for how in ("blocks", "whole", "alone")
    },
    "sketches": sketches_are_those_of_the_plain_model,
    "other ways of sharding": other_ways_of_sharding,
    "replicas": replicas,
    "frozen and chosen parameters": frozen_and_chosen_parameters,
    **{
        f"training goes on after {before}": functools.partial(training_goes_on_as_if_nothing_had_been, before=before)
        for before in BEFORE
    },
    "only parts are held": only_parts_are_held,
    "uneven rows": functools.partial(uneven_rows, size=5),
    "uneven rows, one by one": functools.partial(uneven_rows, size=1),
    "resumed": resumed,
    "results without closing": results_without_closing,
    **{
        f"an error {where} reaches all ranks": functools.partial(an_error_reaches_all_ranks, where=where)
        for where in ("in its rows", "in the forward", "in the backward")
    },
    "values that are not finite": values_that_are_not_finite,
    "an error of the caller's own": an_error_of_the_callers_own,
    "ranks that do not agree": ranks_that_do_not_agree,
    "other ways through the model": other_ways_through_the_model,
    "refusals": refusals,
    "a wrong rule is found": a_wrong_rule_is_found,
    "wrappers without shards": wrappers_without_shards,
    "a rank that ends": a_rank_that_ends,
}


def main(root: Path, names: list[str]) -> None:
    """Run scenes, each in a directory of its own, and write ``{name: traceback}`` of what failed.

    Args:
        root: Where everything goes.
        names: Of the scenes.
    """
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=30))
    found = {}
    for number, name in enumerate(names):
        try:
            SCENES[name](root / str(number))
            found[name] = ""
        except Exception:
            found[name] = traceback.format_exc()
        (root / f"rank{dist.get_rank()}.json").write_text(json.dumps(found))
        if name != "a rank that ends":
            dist.barrier()
    os._exit(0)  # a process that ended cannot be waited for


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])

"""The gradients of a training step's examples: from its own backward, or by a second pass, and checked."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from tracer._core.processes import Process
from tracer._core.text import listing
from tracer.api.collecting.checks import CheckTimes, compare_alone, probe, used_share
from tracer.api.collecting.shares import Expected, Shares, SharesSink, of_losses
from tracer.api.collecting.training_losses import TrainingLosses
from tracer.api.featurizer import no_autocast
from tracer.api.featurizer_factory import FeaturizerFactory
from tracer.api.sinks import DroppingSink
from tracer.data.batches import to_device
from tracer.errors import GradientError, InputError, MismatchError
from tracer.gradients import Sink, isolated
from tracer.gradients.calls import CapturedLayer, SampleAxis
from tracer.gradients.isolation import generator_states
from tracer.gradients.own_backward import OwnBackward
from tracer.projection.base import Projector
from tracer.training.adam import moment_of
from tracer.types import Batch, SampleOutputs

logger = logging.getLogger("tracer")


class Contribution(NamedTuple):
    """What a batch contributed to a step.

    Attributes:
        rows: The index of each example, ``[B]``.
        values: N times the projected contributions, ``[B, dim]``.
        outputs: Losses and labels, if they are known.
        audited: The position of an example that agreed with itself alone, or None.
    """

    rows: np.ndarray
    values: Tensor
    outputs: SampleOutputs | None
    audited: int | None


class StepGradients:
    """Collects the batches between two steps of the optimizer.

    Args:
        factory: Computes gradients by passes of their own.
        optimizer: The optimizer.
        adam: Whether gradients are multiplied by its second moments.
        second_pass: Whether gradients come from a pass of their own.
        process: This process, which trains together with others or alone.
    """

    def __init__(
        self,
        factory: FeaturizerFactory,
        optimizer: torch.optim.Optimizer,
        adam: bool,
        second_pass: bool,
        process: Process,
    ) -> None:
        self._process = process
        self._factory, self._engine = factory, factory.engine
        self._optimizer, self._adam = optimizer, adam
        self._model = factory.model
        self._parameters = {name: value for name, value in self._model.named_parameters() if name in factory.shapes}
        self._groups = self._group_numbers()
        self._probe = {name: self._parameters[name] for name in probe(factory.shapes)}
        self._norms = [each for each in self._model.modules() if isinstance(each, nn.modules.batchnorm._BatchNorm)]
        self._second_pass = second_pass
        self._verified: set[tuple] = set()
        self._num_collected = 0
        self._times = CheckTimes()
        self._losses = TrainingLosses(self._model, factory.task)
        self._scales: dict[str, Tensor] = {}
        self._pending: list[Shares] = []
        self._finishing = False
        if not second_pass and any(getattr(each, "_compiled_call_impl", None) for each in self._model.modules()):
            self._give_up("torch.compile runs layers without their hooks")

    def _group_numbers(self) -> dict[str, int]:
        names = {id(value): name for name, value in self._parameters.items()}
        held = [
            [names[id(one)] for one in group["params"] if id(one) in names] for group in self._optimizer.param_groups
        ]
        found = {name: number for number, group in enumerate(held) for name in group}
        if missing := [repr(name) for name in self._parameters if name not in found]:
            raise InputError(
                f"params selects {listing(missing)}, which the optimizer does not hold; expected parameters that it "
                f"trains. Leave params out for all of these."
            )
        return found

    @contextmanager
    def collecting(self, batch: Batch, rows: np.ndarray, projector: Projector) -> Iterator[None]:
        """Collect the gradients of a batch, whose forward and backward are in the block."""
        if not self._second_pass and any(each.training or each.running_mean is None for each in self._norms):
            self._give_up("the statistics of BatchNorm are those of the batch, in which examples influence each other")
        due = self._times.due and not self._second_pass
        expected = self._expected(batch, rows, projector) if due else None
        layers = self._layers()
        if layers is None:
            with self._forgetting():
                yield
            sink = self._sink(projector, len(rows), ())
            shares = Shares(rows, sink, False, (sink, *self._pass(batch, len(rows), sink, self._times.due)))
        else:
            sink = self._sink(projector, len(rows), self._watched())
            before = generator_states(self._factory.device)
            backward = OwnBackward(len(rows), *layers, partial(sink.take, 0, len(rows)))
            with backward as own, self._losses.watching(), self._forgetting():
                yield
            if not all(map(torch.equal, before, generator_states(self._factory.device))):
                expected = None  # dropout: another pass has other masks
            self._check_patterns(own, batch, rows)
            shares = Shares(rows, sink, True, expected, self._losses.of(batch, len(rows)))
        self._pending.append(shares)
        self._num_collected += 1

    def finish(self, moves: Sequence[float], step: int) -> list[Contribution]:
        """Return what the batches since the last step contributed to this one.

        Args:
            moves: How far a gradient moves the parameters of each group, times N.
            step: The number of the step.

        Raises:
            GradientError: If the optimizer's gradient is not the sum of the shares, or an example's is not its own.
        """
        pending, self._pending = self._pending, []
        self._check_agreement(pending, step)
        if not pending:
            raise GradientError(
                f"The optimizer made step {step} without a batch; expected the forward and backward of each batch in "
                f"`with collector.batch(batch, inds):`."
            )
        dtype, factor = self._engine.dtype, 1.0 / sum(len(each.rows) for each in pending) / self._process.count
        if pending[0].own:
            with self._times.spending():
                factor, pending = used_share(pending, self._watched(), dtype, step, self._process)
        found: list[Contribution] = []
        weights = [factor * move for move in moves]
        for each in pending:
            self._finishing = True  # the step has been made
            features = each.sink.finish()
            self._finishing = False
            if not each.own:
                assert each.expected is not None
                _, each.outputs, audited = each.expected
                features = of_losses(features, each.outputs)
            else:
                audited = None if each.expected is None else compare_alone(each, features, dtype, step)
            values = features[0].mul_(weights[0])
            for group, weight in zip(features[1:], weights[1:], strict=False):
                values.add_(group, alpha=weight)
            found.append(Contribution(each.rows, values, each.outputs, audited))
        self._scales.clear()
        self._times.next_step()
        self._times.due = self._process.first(self._times.due, self._factory.device)
        return found

    def check_weights(self) -> None:
        """Raise `MismatchError` if processes that train together do not have the same weights."""
        values = [value.detach().double() for value in self._probe.values()]
        sums = [float(each) for value in values for each in (value.sum(), value.square().sum())]
        if self._process.together and not self._process.same(sums, self._factory.device):
            raise MismatchError(
                "Processes that train together have different weights; expected the same gradient in all of them: wrap "
                "the model in DistributedDataParallel, and begin with the same weights."
            )

    def _check_agreement(self, pending: Sequence[Shares], step: int) -> None:
        """Raise `GradientError` if processes that train together have collected in different ways."""
        numbers = len(pending), sum(each.own for each in pending)
        if not self._process.same(numbers, self._factory.device):
            raise GradientError(
                f"Processes differ in how they collected step {step}: this one has {numbers[0]} batches, of which "
                f"{numbers[0] - numbers[1]} took a second pass. Expected as many batches between two steps in each "
                f"process; if only some took a second pass, pass second_pass=True in all."
            )

    @contextmanager
    def _forgetting(self) -> Iterator[None]:
        """Forget batches whose gradients were set to None without a step, before the backward in the block."""
        probe = next((value for value in self._probe.values() if value.requires_grad), None)
        empty: list[bool] = []
        # A hook of a leaf sees its grad before the backward adds to it. DistributedDataParallel replaces it afterwards.
        handle = None if probe is None else probe.register_hook(lambda _: empty.append(probe.grad is None))
        try:
            yield
        finally:
            if handle is not None:
                handle.remove()
        if any(empty[:1]):
            self._pending.clear()

    def _layers(self) -> tuple[Sequence[CapturedLayer], Mapping[str, SampleAxis]] | None:
        """Return the layers to capture in the training's own pass; None: a second pass is needed."""
        layers = self._engine.plain_layers()
        if not self._second_pass and isinstance(layers, str):
            self._give_up(layers)
        return None if self._second_pass or isinstance(layers, str) else layers

    def _give_up(self, reason: str) -> None:
        if self._num_collected:
            raise GradientError(
                f"Gradients can no longer be collected in the training's own pass: {reason}. Collect from the start, "
                f"in another directory, with second_pass=True."
            )
        logger.warning("gradients are collected by a second pass for each batch: %s", reason)
        self._second_pass = True

    def _check_patterns(self, own: OwnBackward, batch: Batch, rows: np.ndarray) -> None:
        """Check a batch that called layers in a new way, at the weights of its backward."""
        # Checkpointed regions run twice in training.
        if not self._verified.issuperset(each[:4] for each in own.patterns):
            self._pass(batch, len(rows), DroppingSink(), verify=True)
        unknown = {each.layer for each in own.patterns if each[:4] not in self._verified}
        if unknown:
            raise GradientError(
                f"Training calls layers {listing(sorted(unknown))} in another way than eval mode, in which gradients "
                f"are checked. Pass second_pass=True, which computes them in eval mode."
            )

    def _expected(self, batch: Batch, rows: np.ndarray, projector: Projector) -> Expected:
        sink = self._sink(projector, len(rows), ())
        with self._times.spending():
            return sink, *self._pass(batch, len(rows), sink, verify=True)

    def _pass(self, batch: Batch, size: int, sink: Sink, verify: bool) -> tuple[SampleOutputs, int | None]:
        """Compute gradients in eval mode by the engine, which checks itself; training is not disturbed."""
        device, engine = self._factory.device, self._engine
        before = engine.plain_layers()
        engine.weights_moved(verify)
        with no_autocast(device), isolated(self._model, [*self._parameters], device), torch.inference_mode(False):
            outputs = engine.compute(to_device(batch, device), size, sink)
        if self._num_collected and not self._second_pass and engine.plain_layers() != before:
            self._give_up("a check found that captured gradients were wrong")
        self._verified.update(each[:4] for each in engine.patterns)
        return outputs, engine.audited

    def _watched(self) -> Mapping[str, Tensor]:
        """Return the parameters to compare with the optimizer's gradients in this step."""
        return self._parameters if self._times.due else self._probe

    def _sink(self, projector: Projector, size: int, watched: Collection[str]) -> SharesSink:
        scale = self._scale if self._adam else None
        return SharesSink(projector, self._groups, size, scale, watched, self._factory.device)

    def _scale(self, name: str) -> Tensor | None:
        """Return the root of Adam's step size for each entry before the step; None before the first one."""
        if name not in self._scales:
            value, group = self._parameters[name], self._optimizer.param_groups[self._groups[name]]
            moment = moment_of(self._optimizer, group, value)
            if moment is None:
                if self._finishing and value.grad is not None and value.grad.any():
                    raise GradientError(
                        f"The optimizer made a step and keeps no second moments of {name!r} in this process; expected "
                        f"those of all parameters in each process. ZeroRedundancyOptimizer divides them: use Adam "
                        f"itself, or pass preconditioner=None."
                    )
                return None
            self._scales[name] = moment.gamma(torch.promote_types(value.dtype, torch.float32)).sqrt_()
        return self._scales[name]

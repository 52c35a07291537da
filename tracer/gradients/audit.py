"""The audit: of every few batches one sample is run alone, and compared with what its batch gave for it.

The full check (`tracer.gradients.selfcheck`) sees few batches, and samples can change places in later ones: models sort
by length, drop padding, group by expert, or compute statistics that the first batches lack. A sample drawn at random is
right or wrong however the model came to it (`tracer.store.audited`).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from tracer.data.batches import select_samples
from tracer.data.tasks import Task
from tracer.errors import GradientError, TracerError
from tracer.gradients.coupling import coupling_error
from tracer.gradients.padding import Padded, Padding, without
from tracer.gradients.per_sample import PerSampleGradient
from tracer.gradients.selfcheck import Reference, WeightedSums, check_weights, difference, norm, tolerance
from tracer.gradients.verification import Verifier, now
from tracer.types import Batch, SampleOutputs

logger = logging.getLogger("tracer.gradients")

FIRST_BATCHES = 16
"""The first batches, each of which is audited."""

MOST_TIME = 0.0125
"""The most time that later audits take, as a share of the checks' passes over as many samples.

These take up to 1.6 times as long as a plain pass: so that audits take less than 2 % of plain passes.
"""

_FIRST_PADDED = 4
_MOST_DIFFERENCE, _MOST_NOISE = 0.2, 0.03


class Sink(Protocol):
    """A consumer of the gradients of a batch as they are computed."""

    def begin(self) -> None:
        """Discard gradients taken so far: those of all parameters follow, perhaps again."""

    def take(self, start: int, stop: int, gradients: dict[str, PerSampleGradient]) -> None:
        """Take gradients of samples ``start`` to ``stop``, by parameter name, under ``no_grad``.

        Each parameter of a sample is passed once, or never if its gradient is zero. Gradients that are not stored are
        freed.
        """


class WatchedSink:
    """Passes gradients on to a sink and keeps those of one sample.

    Args:
        sink: The sink.
        row: The position of the sample in its batch; None keeps nothing.
    """

    def __init__(self, sink: Sink, row: int | None) -> None:
        self._sink, self.row = sink, row
        self.kept: dict[str, Tensor] = {}
        self._summed: Collection[str] = ()

    def begin(self) -> None:
        """Begin again."""
        self.kept.clear()
        self._summed = ()
        self._sink.begin()

    def leave_to(self, sums: WeightedSums) -> None:
        """Keep nothing that the sums of a batch of one sample have, until `take_over`."""
        self._summed = sums.totals if len(sums.weights) == 1 else ()

    def take_over(self, sums: WeightedSums) -> None:
        """Keep the gradients of the only sample, of which the sums then are empty."""
        for name in list(self._summed) if self.row is not None else ():
            self.kept[name] = sums.totals.pop(name).gradient / float(sums.weights[0])
        self._summed = ()

    def take(self, start: int, stop: int, gradients: dict[str, PerSampleGradient]) -> None:
        """Keep the sample's gradients and pass all on."""
        if self.row is not None and start <= self.row < stop:
            row = self.row - start
            own = {name: gradient for name, gradient in gradients.items() if name not in self._summed}
            self.kept |= {name: gradient.sample(row) for name, gradient in own.items()}
        self._sink.take(start, stop, gradients)


class FirstOfTwo:
    """Passes on the gradients of the first of two equal samples.

    Args:
        sink: The sink.
    """

    def __init__(self, sink: Sink) -> None:
        self._sink = sink

    def begin(self) -> None:
        """Begin again."""
        self._sink.begin()

    def take(self, start: int, stop: int, gradients: dict[str, PerSampleGradient]) -> None:
        """Pass on the first sample's gradients."""
        if start == 0:
            self._sink.take(0, 1, {name: gradient.head(1) for name, gradient in gradients.items()})


@dataclass(frozen=True)
class Finding:
    """A difference between a sample in its batch and alone.

    Attributes:
        row: Its position in the batch.
        alone: The batch that it was run as.
        text: The difference.
        padding: Whether it comes from the sample's padding.
    """

    row: int
    alone: Batch
    text: str
    padding: bool = False


class Auditor:
    """Chooses samples to audit, and audits them.

    Args:
        task: The task.
        verifier: Runs references, at the same weights.
        device: The device of the model.
    """

    def __init__(self, task: Task, verifier: Verifier, device: torch.device) -> None:
        self._task, self._verifier, self._device = task, verifier, device
        self._padding = Padding()
        self._num_batches = self._num_padded = 0
        self._generator = torch.Generator().manual_seed(0)
        self._num_samples, self._spent, self._last = 0, 0.0, 0.0

    def choose(self, batch: Batch, batch_size: int) -> int | None:
        """Return the position of the sample of a batch to audit, or None."""
        self._padding.observe(batch, batch_size)
        self._num_batches += 1
        due = self._num_batches <= FIRST_BATCHES or self._verifier.is_first
        if not due:
            self._num_samples += batch_size
            due = self._spent + self._last <= MOST_TIME * self._verifier.plain_seconds * self._num_samples
        if not self._verifier.backend.any(due):
            return None
        return int(torch.randint(batch_size, (), generator=self._generator))

    def audit(self, watched: WatchedSink, outputs: SampleOutputs, batch: Batch, batch_size: int) -> Finding | bool:
        """Compare a sample with itself alone; return what differs, True if nothing does, False if it cannot run."""
        assert watched.row is not None
        began = now(self._device)
        found = self._audit(watched.kept, outputs, batch, batch_size, watched.row)
        self._last = 0.0
        self._spend(now(self._device) - began)
        return found

    def drifts(self, batch: Batch, batch_size: int) -> bool:
        """Return whether the first sample gives another f than before, after an audit, whose time this is part of."""
        began = now(self._device)
        found = self._verifier.drifts(batch, batch_size)
        self._spend(now(self._device) - began)
        return found

    def _spend(self, seconds: float) -> None:
        self._last += seconds
        if self._num_samples:
            self._spent += seconds

    def error(self, finding: Finding, batch: Batch) -> GradientError:
        """Return the error for a sample whose batch influences it."""
        row, alone = finding.row, finding.alone
        return coupling_error(self._verifier.model, self._task, batch, alone, row, finding.text, finding.padding)

    def _audit(
        self, kept: Mapping[str, Tensor], outputs: SampleOutputs, batch: Batch, batch_size: int, row: int
    ) -> Finding | bool:
        padding = [] if self._verifier.backend.is_sharded else self._padding.find(batch, batch_size)
        found = self._compare_both(kept, outputs, batch, torch.tensor([row]), torch.ones(1), padding)
        if found is True and self._num_batches <= FIRST_BATCHES and not self._verifier.backend.is_sharded:
            found = self._half(outputs, batch, batch_size) or True
        if found is not True or not padding:
            return found
        self._num_padded += 1
        for each in padding if self._num_padded <= _FIRST_PADDED else ():
            # A single sample may have no padding, or be too short for it to matter: all are run without the longest.
            rows = each.counts.nonzero()[:, 0]
            weights = check_weights(batch_size, self._num_batches)
            others = torch.zeros_like(weights).index_copy(0, rows, weights[rows])
            expected = self._verifier.gradients(batch, others)
            found = self._compare_both(expected, outputs, batch, rows, weights[rows], [each])
            if isinstance(found, Finding):
                return found
        return True

    def _half(self, outputs: SampleOutputs, batch: Batch, batch_size: int) -> Finding | None:
        """Compare the values of a random half of a batch with those in a batch of their own."""
        rows = (check_weights(batch_size, self._num_batches) > 0).nonzero()[:, 0]
        values = self._verifier.run(select_samples(batch, rows, batch_size)) if 0 < len(rows) < batch_size else None
        if values is None or (found := _different_values(outputs, values, rows, self._verifier.dtype)) is None:
            return None
        row = int(rows[found[0]])
        return Finding(row, select_samples(batch, torch.tensor([row]), batch_size), found[1])

    def _compare_both(
        self,
        kept: Mapping[str, Tensor],
        outputs: SampleOutputs,
        batch: Batch,
        rows: Tensor,
        weights: Tensor,
        padding: Sequence[Padded],
    ) -> Finding | bool:
        """Compare samples without the padding that all of them have, and if that differs, with it."""
        batch_size = len(outputs.output)
        cut: Finding | bool = False
        if any(each.counts[rows].all() for each in padding):
            cut = self._compare(without(batch, batch_size, rows, padding), kept, outputs, rows, weights)
            if cut is True:
                return True
        found = self._compare(select_samples(batch, rows, batch_size), kept, outputs, rows, weights)
        if found is not True or not isinstance(cut, Finding):
            return found
        # Others may have the size of the padded ones by chance, as a decoder's labels that of its encoder's tokens.
        shown = [each._replace(dimensions=each.evident) for each in padding]
        if (
            shown != padding
            and self._compare(without(batch, batch_size, rows, shown), kept, outputs, rows, weights) is True
        ):
            for each in padding:
                self._padding.separate(each)
            return True
        return replace(cut, padding=True)

    def _compare(
        self, part: Batch, kept: Mapping[str, Tensor], outputs: SampleOutputs, rows: Tensor, weights: Tensor
    ) -> Finding | bool:
        """Run samples as a batch, and if a single one fails or differs, twice; some models need several."""
        found: Finding | bool = False
        for copies in (1,) if self._verifier.backend.is_sharded or len(rows) > 1 else (1, 2):
            try:
                each = part if copies == 1 else select_samples(part, torch.zeros(copies, dtype=torch.int64), 1)
                reference = self._verifier.reference(each, weights.repeat(copies) / copies, kept)
                differs = self._difference(reference, kept, outputs, rows)
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, ValueError, TypeError, IndexError, TracerError) as error:
                if self._verifier.backend.is_sharded:  # the other ranks run on
                    raise
                logger.debug("samples %s cannot be run alone: %s", rows.tolist(), error)
                continue
            if differs is None:
                return True
            found = Finding(int(rows[differs[0]]), each, differs[1])
        return found

    def _difference(
        self, reference: Reference, kept: Mapping[str, Tensor], outputs: SampleOutputs, rows: Tensor
    ) -> tuple[int, str] | None:
        """Return which samples' values, or weighted gradients, differ from their reference, and how; or None."""
        dtype, device = self._verifier.dtype, outputs.output.device
        if (found := _different_values(outputs, reference.samples, rows, dtype)) is not None:
            return found
        total = math.hypot(*reference.norms.values())
        for name, alone in reference.norms.items():
            together = kept.get(name)
            scale = max(alone, norm(together) if together is not None else 0.0)
            apart = scale if together is None else reference.distances[name]
            # A sample alone takes other kernels, and rounding can flip an activation that is nearly zero.
            share = min(10 * tolerance(dtype, device), _MOST_DIFFERENCE)
            noise = min(tolerance(dtype, device), _MOST_NOISE) * total if name in kept else 0.0
            if apart > max(share * scale, noise):
                return 0, f"relative difference {apart / scale:.2g} in the gradient of {name!r}"
        return None


def _different_values(
    together: SampleOutputs, alone: SampleOutputs, rows: Tensor, dtype: torch.dtype
) -> tuple[int, str] | None:
    """Return which of some rows of a batch has other values in a batch of them, which may be repeated, and how."""
    for name in ("output", "loss", "loss_grad", "loss_hess"):
        values = getattr(together, name)[rows.to(together.output.device)]
        found = difference(name, values, getattr(alone, name).reshape(-1)[: len(rows)], dtype)
        if found is not None:
            return found
    return None

"""Labels drawn from a model's own predictions, so that second moments of gradients are those of the Fisher information.

Drawn labels are a function of an example's key and of the position within the example, in any batch and on any device.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor, nn

from tracer.data.tasks import Task
from tracer.types import Batch, SampleOutputs

_GOLDEN = 0x9E3779B97F4A7C15


def example_keys(seed: int, model_id: int, sample: int, rows: Int64[np.ndarray, " n"]) -> Int64[Tensor, " n"]:
    """Return the keys of training examples for one sample of their labels at a checkpoint."""
    start = np.random.SeedSequence([seed, model_id, sample]).generate_state(1, np.uint64)
    with np.errstate(over="ignore"):
        keys = start + rows.astype(np.uint64) * np.uint64(_GOLDEN)
    return torch.from_numpy(keys.view(np.int64))


class LabelDraws:
    """Draws labels of the examples of a batch.

    Args:
        keys: ``[B]``, int64, from `example_keys`.
    """

    def __init__(self, keys: Tensor) -> None:
        self._keys = keys

    def uniform(self, positions: Tensor) -> Tensor:
        """Return numbers in (0, 1), float64, for positions ``[B, ...]``, integers, of each example."""
        key = self._keys.view(-1, *(1 for _ in positions.shape[1:]))
        # splitmix64 (Steele et al. 2014) in signed arithmetic, which wraps around.
        bits = key + (positions.long() + 1) * _signed(_GOLDEN)
        bits = (bits ^ _shifted(bits, 30)) * _signed(0xBF58476D1CE4E5B9)
        bits = (bits ^ _shifted(bits, 27)) * _signed(0x94D049BB133111EB)
        bits = bits ^ _shifted(bits, 31)
        return (_shifted(bits, 11).double() + 0.5) * 2.0**-53

    def classes(self, logits: Tensor, positions: Tensor) -> Tensor:
        """Return classes drawn from ``softmax(logits [*P, C])`` for positions ``[*P]`` of examples."""
        cumulative = logits.detach().softmax(-1).cumsum(-1)
        below = cumulative < self.uniform(positions).to(cumulative.dtype).unsqueeze(-1)
        return below.sum(-1).clamp(max=logits.shape[-1] - 1)  # rounding may leave the last sum below 1

    def others(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return for logits ``[B, C]`` a class drawn from those other than the label, and its weight, ``[B]`` each."""
        rest = logits.masked_fill(is_label(logits, labels), -torch.inf)
        return self.classes(rest, torch.zeros_like(labels)), torch.ones_like(logits[:, 0])

    def normal(self, positions: Tensor) -> Tensor:
        """Return standard normal numbers, float64, for positions ``[B, ...]`` of examples."""
        return torch.special.ndtri(self.uniform(positions))


class ListedLabels(LabelDraws):
    """Takes one label after another in place of draws, so that sums over all of them are expectations over draws.

    Args:
        numbers: ``[B]``, int64, the label of each example by its number, from 0 on.
    """

    def others(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the numbered class after the label ``[B]``, and its probability among the others, ``[B]``."""
        chosen = (labels + 1 + self._keys) % logits.shape[1]
        rest = logits.detach().masked_fill(is_label(logits, labels), -torch.inf).softmax(1)
        return chosen, rest.gather(1, chosen.unsqueeze(1)).squeeze(1)

    def normal(self, positions: Tensor) -> Tensor:
        """Return the numbered unit vector for positions ``[B, m]``: their second moments add up to the identity."""
        return (positions == self._keys.unsqueeze(1)).double()


def is_label(logits: Tensor, labels: Tensor) -> Tensor:
    """Return which of the classes of logits ``[B, C]`` is the label ``[B]``, ``[B, C]``."""
    return labels.unsqueeze(1) == torch.arange(logits.shape[1], device=logits.device)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _shifted(bits: Tensor, by: int) -> Tensor:
    """Return bits shifted to the right without their sign."""
    return (bits >> by) & ((1 << (64 - by)) - 1)


class SampledTask(Task):
    """Another task with labels drawn from the model's predictions; batches are ``(batch, keys [B])``; ``f = L``.

    Args:
        task: The task.
        draws: Makes draws of the keys.
    """

    def __init__(self, task: Task, draws: type[LabelDraws] = LabelDraws) -> None:
        self.task, self.name, self.draws = task, task.name, draws

    def outputs(self, model: nn.Module, batch: Batch) -> SampleOutputs:
        """Return losses of drawn labels; see `Task.sampled_outputs`."""
        return self.task.sampled_outputs(model, batch[0], self.draws(batch[1]))

    def settings(self) -> dict[str, Any]:
        """Return the settings of the wrapped task."""
        return self.task.settings()


class HiddenTask(SampledTask):
    """Another task with labels drawn for the curvature that its f does not show; see `Task.hidden_outputs`."""

    def outputs(self, model: nn.Module, batch: Batch) -> SampleOutputs:
        """Return losses of drawn labels; see `Task.hidden_outputs`."""
        return self.task.hidden_outputs(model, batch[0], self.draws(batch[1]))

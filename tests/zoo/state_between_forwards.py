"""Models whose forwards leave something behind in the model."""

from __future__ import annotations

import torch
from torch import nn
from zoo.harness import Entry
from zoo.tables import kept, sequences, vectors


class Counting(nn.Module):
    """Scales by the number of forwards in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.h, self.calls = nn.Linear(3, 3), 0

    def train(self, mode=True):
        self.calls = 0 if mode else self.calls
        return super().train(mode)

    def forward(self, x):
        self.calls += 1
        return self.h(x) * self.calls


class CountingBuffer(nn.Module):
    """Scales by a buffer that every forward raises."""

    def __init__(self) -> None:
        super().__init__()
        self.h = nn.Linear(3, 3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return self.h(x) * self.calls


class LongestSeen(nn.Module):
    """Keeps a table for the longest input so far and stretches it, as dynamic rotary embeddings do."""

    def __init__(self) -> None:
        super().__init__()
        self.h, self.o, self.longest = nn.Linear(3, 4), nn.Linear(4, 3), 4
        self.register_buffer("scale", torch.ones(()), persistent=False)

    def forward(self, x, count):
        length = int(count.max())
        if length > self.longest:
            self.longest, self.scale = length, self.scale * 0.5
        return self.o((torch.tanh(self.h(x * self.scale)) * kept(x, count)).sum(1))


class CachedWeight(nn.Module):
    """Computes a weight in eval mode once and keeps it."""

    def __init__(self) -> None:
        super().__init__()
        self.h, self.scale, self.cache = nn.Linear(3, 3), nn.Parameter(torch.ones(3)), None

    def forward(self, x):
        if self.cache is None or self.training:
            self.cache = self.h.weight * self.scale
        return x @ self.cache.T + self.h.bias


class RunningMean(nn.Module):
    """Subtracts a mean that every forward updates."""

    def __init__(self) -> None:
        super().__init__()
        self.h = nn.Linear(3, 3)
        self.mean = torch.zeros(3, dtype=torch.float64)

    def forward(self, x):
        self.mean = 0.9 * self.mean + 0.1 * x.mean(0).detach()
        return self.h(x - self.mean)


STATE_BETWEEN_FORWARDS = [
    Entry("scales by a count of forwards that train() resets", Counting, vectors(3)),
    Entry("scales by a counting buffer", CountingBuffer, vectors(3)),
    Entry(
        "stretches a table for longer inputs",
        LongestSeen,
        sequences(first=(4, 3, 2, 1)),
        refused="state|alone",
        or_exact=True,
    ),
    Entry("keeps a weight computed in eval mode", CachedWeight, vectors(3)),
    Entry("running mean updated in eval mode", RunningMean, vectors(3), refused="state|alone|draws random"),
]

"""A small model with everything that makes weights hard to swap."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Tied(nn.Module):
    """A model with tied weights, a persistent and a non-persistent buffer, batch statistics."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.embed = nn.Embedding(7, 4)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 7)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.rand(4, generator=generator))
        self.register_buffer("mask", torch.rand(4, generator=generator), persistent=False)
        self.register_buffer("nothing", None)
        with torch.no_grad():
            for value in [*self.parameters(), self.norm.running_mean]:
                value.copy_(torch.randn(value.shape, generator=generator))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.embed(tokens)) * self.scale * self.mask)


TOKENS = torch.tensor([0, 3, 6, 3])

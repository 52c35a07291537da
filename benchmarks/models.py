"""The models that the benchmarks run: plain PyTorch, as users write them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conv_block(inputs: int, outputs: int, pool: bool = False) -> nn.Sequential:
    """Convolution, batch norm, ReLU and, if asked, pooling."""
    layers = [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, *([nn.MaxPool2d(2)] if pool else []))


class ResNet9(nn.Module):
    """The nine-layer residual net of fast CIFAR-10 training: 6.6 million parameters at width 64."""

    def __init__(self, num_classes: int = 10, width: int = 64) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv_block(3, width), conv_block(width, 2 * width, pool=True))
        self.residual1 = nn.Sequential(conv_block(2 * width, 2 * width), conv_block(2 * width, 2 * width))
        self.middle = nn.Sequential(conv_block(2 * width, 4 * width, pool=True), conv_block(4 * width, 8 * width, True))
        self.residual2 = nn.Sequential(conv_block(8 * width, 8 * width), conv_block(8 * width, 8 * width))
        self.head = nn.Linear(8 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, 3, 32, 32]`` to logits ``[B, num_classes]``."""
        x = self.stem(x)
        x = x + self.residual1(x)
        x = self.middle(x)
        x = x + self.residual2(x)
        return self.head(F.adaptive_max_pool2d(x, 1).flatten(1))


class Attention(nn.Module):
    """Multi-head self-attention with separate projections for queries, keys and values together."""

    def __init__(self, dim: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, T, dim]`` to ``[B, T, dim]``."""
        rows, positions, dim = x.shape
        q, k, v = self.qkv(x).view(rows, positions, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(mixed.transpose(1, 2).reshape(rows, positions, dim))


class Block(nn.Module):
    """A transformer block, normalization first."""

    def __init__(self, dim: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(dim), Attention(dim, heads, causal)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        """``[B, T, dim]`` to ``[B, T, dim]``."""
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Decoder(nn.Module):
    """A causal language model with a tied head."""

    def __init__(
        self, vocabulary: int = 65, dim: int = 256, layers: int = 4, heads: int = 4, length: int = 512
    ) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, dim), nn.Embedding(length, dim)
        self.blocks = nn.Sequential(*(Block(dim, heads, True) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, vocabulary, bias=False)
        self.head.weight = self.tokens.weight
        nn.init.normal_(self.tokens.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """``[B, T]`` to logits ``[B, T, vocabulary]``."""
        return self.head(self.states(tokens))

    def states(self, tokens: Tensor) -> Tensor:
        """Return what the head reads, ``[B, T, dim]``."""
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        return self.norm(self.blocks(x))


def mlp(*sizes: int) -> nn.Sequential:
    """Linear layers with ReLU between them."""
    layers: list[nn.Module] = []
    for inputs, outputs in zip(sizes, sizes[1:], strict=False):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])

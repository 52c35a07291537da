"""Entries as parameters of a test, and data that many entries share."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from zoo.harness import NUM_EXAMPLES, Entry


def params(*tables: list[Entry]) -> list:
    """Return the parameters of a test; an entry with a known fault must fail."""
    entries = [entry for table in tables for entry in table]
    assert len({entry.name for entry in entries}) == len(entries), "two entries have one name"
    return [pytest.param(entry, id=entry.name, marks=marks(entry)) for entry in entries]


def marks(entry: Entry) -> list:
    """Return the marks of an entry with a known fault."""
    return [pytest.mark.xfail(reason=entry.fault)] if entry.fault else []


def make_torchvision_importable() -> None:
    """Make torchvision importable; PyPI's wheel is built for CUDA, so its operators do not load beside torch for CPUs.

    transformers and timm import it for their image transforms, which the zoo does not use.
    """
    try:
        import torchvision  # noqa: F401
    except ImportError:
        return
    except RuntimeError:
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor boxes, Tensor scores, float threshold) -> Tensor")


class Net(nn.Module):
    """A model given by a function of itself and its inputs, its layers and its raw parameters."""

    def __init__(self, function, **parts) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(part) if isinstance(part, Tensor) else part)

    def forward(self, *args, **kwargs):
        return self.function(self, *args, **kwargs)


def normal(*shape: int, seed: int = 3) -> Tensor:
    """Return normal numbers of every example, ``[N, *shape]``."""
    return torch.randn(NUM_EXAMPLES, *shape, generator=torch.Generator().manual_seed(seed))


def integers(high: int, *shape: int, low: int = 0, seed: int = 4) -> Tensor:
    """Return integers of every example from ``low`` to ``high - 1``, ``[N, *shape]``."""
    return torch.randint(low, high, (NUM_EXAMPLES, *shape), generator=torch.Generator().manual_seed(seed))


def labels(num_classes: int = 3) -> Tensor:
    """Return a class for every example."""
    return torch.arange(NUM_EXAMPLES) % num_classes


def vectors(*shape: int):
    """Return a maker of batches of normal inputs and classes."""
    return lambda: (normal(*shape), labels())


def tokens(length: int = 6, vocabulary: int = 9):
    """Return a maker of batches of tokens."""
    return lambda: integers(vocabulary, length)


def lengths(longest: int = 6, first: tuple[int, ...] = (6, 5, 3, 2)) -> Tensor:
    """Return lengths of sequences; those of the first batch are sorted, as in a loader that sorts."""
    return torch.cat([torch.tensor(first), integers(longest + 1, low=1)[len(first) :]])


def sequences(width: int = 3, longest: int = 6, first: tuple[int, ...] = (6, 5, 3, 2)):
    """Return a maker of batches of padded sequences, their lengths and classes."""

    def batch():
        count = lengths(longest, first)
        kept = torch.arange(longest) < count[:, None]
        return normal(longest, width) * kept[..., None], count, labels()

    return batch


def kept(x, count):
    """Return which positions are no padding, ``[B, T, 1]``."""
    return (torch.arange(x.shape[1]) < count[:, None])[..., None]

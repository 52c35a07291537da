"""Padding that collation added: the tail, or head, of a dimension whose size changes from batch to batch."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
import xxhash
from torch import Tensor

from tracer.data.batches import is_per_sample, leaves, map_leaves, select_samples
from tracer.types import Batch

Dimension = tuple[str, int]
"""The path of a leaf in its batch, and one of its dimensions."""


_EARLY_BATCHES = 16
_LEAST_SEEN, _LEAST_SHARE = 3, 0.8
_MOST_KNOWN = 64


class Padded(NamedTuple):
    """The padding of some dimensions of equal size in a batch.

    Attributes:
        dimensions: The dimensions.
        counts: The number of entries that each sample can lose, ``[B]``.
        at_end: Whether they are the last ones.
        evident: Those whose values show the padding; others may have the size by chance.
    """

    dimensions: frozenset[Dimension]
    counts: Tensor
    at_end: bool
    evident: frozenset[Dimension]


class _Seen:
    """What batches showed of one dimension: its sizes, and the values at its ends, ``True`` for the last ones."""

    def __init__(self, size: int) -> None:
        self.size, self.varies, self.may_be_mask = size, False, True
        self.repeated: dict[bool, Counter[float]] = {True: Counter(), False: Counter()}
        self.inside: dict[bool, Counter[float]] = {True: Counter(), False: Counter()}  # samples, by a repeated value
        self.known: set[int] = set()  # hashes of samples that repeat a value
        self.outermost: dict[bool, set[float]] = {True: set(), False: set()}

    def add(self, leaf: Tensor, dim: int) -> None:
        """Note the ends of the samples of a batch."""
        self.may_be_mask = self.may_be_mask and _has_one_step(leaf)
        for at_end in (True, False):
            runs, values = _runs(leaf, dim, at_end)
            new = self._new(leaf, dim, at_end, runs)
            self.repeated[at_end].update(values[new].tolist())
            if self.repeated[at_end] and not leaf.is_floating_point():
                ((value, _),) = self.repeated[at_end].most_common(1)
                entries = (leaf.detach() == value).movedim(dim, 1).flatten(2).all(2) if leaf.ndim > 2 else leaf == value
                self.inside[at_end][value] += int((entries.sum(1).cpu() > runs * (values == value)).sum())
            if self.may_be_mask:
                self.outermost[at_end].update(values.tolist())

    def repeats(self, at_end: bool) -> bool:
        """Return whether many samples repeat one value at an end, and few samples do so at the other end."""
        here, there = self.repeated[at_end], self.repeated[not at_end]
        value, most = max(here.items(), key=lambda each: each[1], default=(0.0, 0))
        # A token that texts have elsewhere too, such as a line break, is data.
        is_padding = most >= _LEAST_SEEN and most >= _LEAST_SHARE * here.total() and most >= self.inside[at_end][value]
        return is_padding and here.total() >= 2 * there.total()

    def _new(self, leaf: Tensor, dim: int, at_end: bool, runs: Tensor) -> list[int]:
        """Return the samples that repeat a value and were not seen before; every pass has the same ones."""
        found = (runs > 1).nonzero()[:, 0].tolist()
        if len(self.known) > _MOST_KNOWN:
            return found
        new = []
        for row in found:
            entries = leaf[row].detach().movedim(dim - 1, 0)
            kept = entries[: -int(runs[row])] if at_end else entries[int(runs[row]) :]
            key = xxhash.xxh3_64_intdigest(kept.to("cpu", torch.float64).contiguous().numpy().tobytes(), seed=at_end)
            if key not in self.known:
                self.known.add(key)
                new.append(row)
        return new

    def masks(self, at_end: bool) -> bool:
        """Return whether this is a mask of padding at an end: there it has both values, at the other end one."""
        return self.may_be_mask and len(self.outermost[at_end]) == 2 and len(self.outermost[not at_end]) == 1


class Padding:
    """Learns from batches which dimensions collation pads, and finds the padding of samples.

    A side of a dimension is padded if many samples repeat one value there, nearly always the same one, and few samples
    do so on the other side: data alone may have such repetitions too. A mask tells it from the first batch on.
    Dimensions of equal size are padded together, such as those of tokens and their mask, unless another batch had them
    in different sizes, such as those of an encoder's tokens and a decoder's.
    """

    def __init__(self) -> None:
        self._seen: dict[Dimension, _Seen] = {}
        self._apart: set[frozenset[Dimension]] = set()
        self._sizes: dict[Dimension, int] = {}  # of the last batch
        self._num_batches = 0

    def observe(self, batch: Batch, batch_size: int) -> None:
        """Note the sizes of a batch's dimensions, and the values at the ends of samples."""
        self._num_batches += 1
        sizes: dict[Dimension, int] = {}
        for path, leaf in _per_sample(batch, batch_size):
            for dim in range(1, leaf.ndim):
                sizes[path, dim] = leaf.shape[dim]
                seen = self._seen.setdefault((path, dim), _Seen(leaf.shape[dim]))
                seen.varies |= leaf.shape[dim] != seen.size
                if leaf.numel() and (seen.varies or self._num_batches <= _EARLY_BATCHES):
                    seen.add(leaf, dim)
        if sizes != self._sizes:
            pairs = itertools.combinations(sizes, 2)
            self._apart.update(frozenset(pair) for pair in pairs if sizes[pair[0]] != sizes[pair[1]])
            self._sizes = sizes

    def find(self, batch: Batch, batch_size: int) -> list[Padded]:
        """Return the padding of a batch.

        A sample's padding is as long as in every tensor that has the dimension. One entry is left if no mask tells it:
        data may end with the value that pads (an end-of-text token).
        """
        found = []
        varying = {
            (path, dim): leaf
            for path, leaf in _per_sample(batch, batch_size)
            for dim in range(1, leaf.ndim)
            if (path, dim) in self._seen and self._seen[path, dim].varies and leaf.numel()
        }
        for keys in self._together({key: leaf.shape[key[1]] for key, leaf in varying.items()}):
            group = {key: varying[key] for key in keys}
            for at_end in (True, False):
                masked = any(self._seen[key].masks(at_end) for key in group)
                if masked or any(self._seen[key].repeats(at_end) for key in group):
                    runs = torch.stack([self._padded(key, leaf, at_end) for key, leaf in group.items()]).amin(0)
                    if masked or int(runs.min()) <= 1:
                        counts = runs if masked else (runs - 1).clamp(min=0)
                        evident = {key for key, leaf in group.items() if self._shows(key, leaf, counts, at_end)}
                        found.append(Padded(frozenset(group), counts, at_end, frozenset(evident)))
                    break
        return [each for each in found if each.counts.any()]

    def separate(self, padded: Padded) -> None:
        """Note that only the dimensions that show the padding have it."""
        pairs = itertools.product(padded.evident, padded.dimensions - padded.evident)
        self._apart.update(map(frozenset, pairs))

    def _shows(self, dimension: Dimension, leaf: Tensor, counts: Tensor, at_end: bool) -> bool:
        """Return whether values tell which samples of a batch are padded: by a mask, or by one value at their end."""
        seen, (_, values) = self._seen[dimension], _runs(leaf, dimension[1], at_end)
        own, others = values[counts > 0].unique(), values[counts == 0]
        return seen.masks(at_end) or seen.repeats(at_end) or (len(own) == 1 and not bool((others == own).any()))

    def _together(self, sizes: Mapping[Dimension, int]) -> list[list[Dimension]]:
        """Return the dimensions in groups that are padded together."""
        groups: list[list[Dimension]] = []
        for key, size in sizes.items():
            for group in groups:
                if sizes[group[0]] == size and not any(frozenset((key, each)) in self._apart for each in group):
                    group.append(key)
                    break
            else:
                groups.append([key])
        return groups

    def _padded(self, dimension: Dimension, leaf: Tensor, at_end: bool) -> Tensor:
        """Return how many entries of each sample may be padding, ``[B]``."""
        runs, values = _runs(leaf, dimension[1], at_end)
        seen = self._seen[dimension]
        if seen.masks(at_end):
            (kept,) = seen.outermost[not at_end]
            runs *= values != kept
        elif seen.repeats(at_end):
            (padding, _), *_ = seen.repeated[at_end].most_common(1)
            runs[values != padding] = 1
        return runs


def without(batch: Batch, batch_size: int, rows: Tensor, padding: Iterable[Padded]) -> Batch:
    """Return some samples as a batch of their own, without the padding that all of them have."""
    part = select_samples(batch, rows, batch_size)
    paths = iter([path for path, _ in leaves(part)])
    cuts = {key: (int(each.counts[rows].min()), each.at_end) for each in padding for key in each.dimensions}

    def cut(leaf: Any) -> Any:
        path = next(paths)
        for dim in range(1, leaf.ndim) if isinstance(leaf, Tensor) else ():
            count, at_end = cuts.get((path, dim), (0, True))
            leaf = leaf.narrow(dim, 0 if at_end else count, leaf.shape[dim] - count)
        return leaf

    return map_leaves(part, cut)


def _per_sample(batch: Batch, batch_size: int) -> Iterator[tuple[str, Tensor]]:
    for path, leaf in leaves(batch):
        if isinstance(leaf, Tensor) and leaf.layout == torch.strided and is_per_sample(leaf, batch_size):
            yield path, leaf


def _runs(leaf: Tensor, dim: int, at_end: bool) -> tuple[Tensor, Tensor]:
    """Return how many entries repeat one value at the end, or beginning, of samples, and the value: ``[B]`` each."""
    entries = leaf.detach().movedim(dim, 1)
    values = entries[:, -1 if at_end else 0].reshape(len(leaf), -1)[:, 0]
    runs = torch.ones(len(leaf), dtype=torch.int64, device=leaf.device)
    two = entries[:, -2:] if at_end else entries[:, :2]
    repeating = (two.reshape(len(leaf), -1) == values[:, None]).all(1).nonzero()[:, 0]
    if len(repeating):  # most data repeat nothing, so that they are not read as a whole
        equal = entries[repeating] == values[repeating].view(-1, *[1] * (entries.ndim - 1))
        equal = equal.reshape(*equal.shape[:2], -1).all(2)
        runs[repeating] = (equal.flip(1) if at_end else equal).cumprod(1).sum(1)
    return runs.cpu(), values.double().cpu()


def _has_one_step(leaf: Tensor) -> bool:
    """Return whether each sample ``[T]`` is ones and then zeros, zeros and then ones, or has one of the two only."""
    if leaf.ndim != 2 or not bool(((leaf == 0) | (leaf == 1)).all()):
        return False
    return bool((leaf.int().diff(dim=1).abs().sum(1) <= 1).all())

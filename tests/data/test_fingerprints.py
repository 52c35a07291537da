"""Fingerprints: equal for equal inputs in any batch, different for different inputs, also for structured ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from batch_cases import X, Y
from torch import nn

from tracer.data.fingerprints import fingerprint_samples


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.uint8, torch.bool, torch.int64])
def test_fingerprints_distinguish_samples_and_ignore_the_batch(dtype):
    values = torch.arange(8).reshape(4, 2).remainder(3).to(dtype)
    values[:, 0] = torch.tensor([0, 1, 0, 1]).to(dtype)
    values[:, 1] = torch.tensor([0, 0, 1, 1]).to(dtype)
    whole = fingerprint_samples((values, torch.arange(4)), 4)
    assert len(set(whole.tolist())) == 4
    parts = [fingerprint_samples((values[[i]], torch.tensor([i])), 1)[0] for i in range(4)]
    np.testing.assert_array_equal(whole, parts)
    again = fingerprint_samples((values.clone().T.contiguous().T, torch.arange(4)), 4)
    np.testing.assert_array_equal(whole, again)


def test_shared_leaves_count_the_same_in_a_batch_of_one():
    batch = {"x": X, "positions": torch.arange(7)[None], "names": ["all"]}
    whole = fingerprint_samples(batch, 3)
    alone = [fingerprint_samples({**batch, "x": X[[row]]}, 1)[0] for row in range(3)]
    np.testing.assert_array_equal(whole, alone)
    changed = fingerprint_samples({**batch, "positions": 1 + torch.arange(7)[None]}, 3)
    assert not set(changed.tolist()) & set(whole.tolist())


def test_fingerprints_are_pinned():
    found = fingerprint_samples((X, Y, ["a", "b", "c"]), 3)
    assert found.tolist() == [5962903768137153258, 8419518452110307475, 3065487623316200419]


def test_fingerprints_do_not_depend_on_padding():
    tokens = torch.tensor([[5, 6, 7, 0], [8, 9, 0, 0]])
    mask = (tokens > 0).long()
    labels = tokens.masked_fill(mask == 0, -100)
    long = fingerprint_samples({"input_ids": tokens, "attention_mask": mask, "labels": labels}, 2)
    short = fingerprint_samples(
        {"input_ids": tokens[1:, :2], "attention_mask": mask[1:, :2], "labels": labels[1:, :2]}, 1
    )
    left = fingerprint_samples(
        {"input_ids": tokens.flip(1)[:1], "attention_mask": mask.flip(1)[:1], "labels": labels.flip(1)[:1]}, 1
    )
    assert long[1] == short[0]
    assert long[0] != left[0]  # its tokens are in another order
    class_labels = {"input_ids": tokens, "attention_mask": mask, "labels": torch.tensor([0, 1])}
    changed = {**class_labels, "labels": torch.tensor([1, 1])}
    assert fingerprint_samples(class_labels, 2)[0] != fingerprint_samples(changed, 2)[0]


def test_samples_of_structured_values_do_not_collide():
    """Floats with few bits set, which a weak hash would not spread."""
    generator = torch.Generator().manual_seed(0)
    ones = torch.randint(0, 2, (20_000, 24), generator=generator).float()
    sparse = torch.zeros(20_000, 3, 40).index_put_(
        (torch.arange(20_000), torch.arange(20_000) % 3, torch.arange(20_000) // 3 % 40), torch.arange(20_000) / 4.0
    )
    for values in (ones, ones.half(), ones.bool(), ones.long(), ones.double() * 1024, sparse):
        distinct = len(torch.unique(values.flatten(1), dim=0))
        assert len(np.unique(fingerprint_samples(values, len(values)))) == distinct


def test_words_may_not_change_places():
    row = torch.arange(1.0, 9.0)
    swapped = row[[2, 1, 0, 3, 4, 5, 6, 7]]
    halves = torch.cat([row[4:], row[:4]])
    found = fingerprint_samples(torch.stack([row, swapped, halves, row.flip(0)]), 4)
    assert len(set(found.tolist())) == 4


def pad(samples, value=0, dim=0):
    """Samples of several lengths as one batch, padded at the end of a dimension."""
    moved = nn.utils.rnn.pad_sequence([x.movedim(dim, 0) for x in samples], batch_first=True, padding_value=value)
    return moved.movedim(1, dim + 1)


TOKENS = [torch.randint(3, 9, (length,)) for length in (5, 2, 7, 3)]
FRAMES = [torch.randn(length, 4) for length in (5, 2, 7, 3)]
COLLATED = {
    "zeros": lambda at: (pad([TOKENS[i] for i in at]), torch.tensor(at)),
    "labels": lambda at: {"input_ids": pad([TOKENS[i] for i in at]), "labels": pad([TOKENS[i] for i in at], -100)},
    "frames": lambda at: (pad([FRAMES[i] for i in at]), torch.tensor(at)),
    "frames, channels first": lambda at: pad([FRAMES[i].T for i in at], dim=1),
    "mask of padding": lambda at: (pad([TOKENS[i] for i in at], 1), pad([TOKENS[i] for i in at]) != 0)[1:],
    "mask beside labels": lambda at: (
        {"input_ids": pad([TOKENS[i] for i in at], 9), "attention_mask": pad([TOKENS[i] for i in at]) != 0},
        torch.tensor(at),
    ),
    "two masks": lambda at: {
        "query": {"input_ids": pad([TOKENS[i] for i in at], 9), "attention_mask": pad([TOKENS[i] for i in at]) != 0},
        "text": {"input_ids": pad([TOKENS[-i] for i in at], 9), "attention_mask": pad([TOKENS[-i] for i in at]) != 0},
    },
    "copied labels": lambda at: {
        "input_ids": pad([TOKENS[i] for i in at], 9),
        "attention_mask": pad([TOKENS[i] for i in at]) != 0,
        "labels": pad([TOKENS[i] for i in at], 9),
    },
    "encoder-decoder": lambda at: {
        "input_ids": pad([TOKENS[i] for i in at], 9),
        "attention_mask": pad([TOKENS[i] for i in at]) != 0,
        "labels": pad([TOKENS[-i - 1] for i in at], -100),
        "decoder_input_ids": pad([TOKENS[-i - 1] for i in at]),
    },
}


@pytest.mark.parametrize("kind", COLLATED)
def test_fingerprints_do_not_depend_on_padding_of_a_collator(kind):
    make = COLLATED[kind]
    whole = fingerprint_samples(make([0, 1, 2, 3]), 4)
    assert len(set(whole.tolist())) == 4
    for size in (1, 2, 3):
        parts = [list(range(4))[start : start + size] for start in range(0, 4, size)]
        np.testing.assert_array_equal(
            np.concatenate([fingerprint_samples(make(part), len(part)) for part in parts]), whole
        )


def test_values_of_equal_shape_do_not_collide_by_what_is_cut():
    values = torch.tensor([[[1, 2], [0, 0]], [[1, 0], [2, 0]], [[1, 0], [0, 2]], [[0, 0], [1, 2]], [[0, 0], [0, 0]]])
    assert len(set(fingerprint_samples(values, 5).tolist())) == 5


class Meta:
    """An object without a repr of its own."""


class Image(Meta):
    def __init__(self, pixels):
        self.pixels = pixels

    def tobytes(self):
        return bytes(self.pixels)


def test_objects_have_the_same_fingerprint_each_time():
    first, second = ({"x": X, "meta": [Meta(), (Meta(), 1), None]} for _ in range(2))
    np.testing.assert_array_equal(fingerprint_samples(first, 3), fingerprint_samples(second, 3))
    one, same, other = (
        fingerprint_samples({"x": torch.ones(2, 1), "image": [Image([1, last]), Image([7])]}, 2) for last in (2, 2, 3)
    )
    np.testing.assert_array_equal(one, same)
    assert one[0] != other[0]


def test_parts_of_a_batch_have_the_hashes_of_the_whole():
    values = torch.randn(50, 7, 3, generator=torch.Generator().manual_seed(0))
    whole = fingerprint_samples(values, 50)
    for size in (1, 8, 49):
        parts = [fingerprint_samples(part, len(part)) for part in values.split(size)]
        np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_byte_order_and_memory_layout_do_not_matter():
    values = np.random.default_rng(0).normal(size=(4, 6))
    whole = fingerprint_samples((values,), 4)
    for same in (values.astype(">f8"), np.asfortranarray(values), values[::-1].copy()[::-1]):
        np.testing.assert_array_equal(fingerprint_samples((same,), 4), whole)


def test_samples_without_values_have_a_hash():
    found = fingerprint_samples((torch.empty(2, 0), torch.arange(2)), 2)
    assert len(set(found.tolist())) == 2

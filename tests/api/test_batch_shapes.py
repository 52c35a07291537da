"""Batches of other shapes: examples without a first dimension, last batches of one, padding that changes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tracer
from tracer import attribute

EXACT = {"projector": "none", "storage": "float32", "progress": False}


class Bag(nn.Module):
    def __init__(self):
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(9, 4), nn.Linear(4, 3)

    def forward(self, tokens, offsets):
        return self.head(self.bag(tokens, offsets))


BAGS = [torch.tensor([1, 2, 3]), torch.tensor([4]), torch.tensor([5, 1]), torch.tensor([8, 8, 2, 0])]
LABELS = torch.tensor([0, 1, 2, 1])


def bag_losses(model, batch):
    """The documented way: the batch holds indices, and the task loads the examples."""
    bags = [BAGS[int(index)] for index in batch[0]]
    offsets = torch.tensor([0, *(len(bag) for bag in bags)]).cumsum(0)[:-1]
    return F.cross_entropy(model(torch.cat(bags), offsets), LABELS[batch[0]], reduction="none")


def test_ragged_examples_are_attributed_by_their_indices(tmp_path):
    torch.manual_seed(0)
    model, indices = Bag(), torch.arange(4)
    found = attribute(
        model, bag_losses, (indices,), (indices,), [(model.state_dict(), 0.1)], save_dir=tmp_path, **EXACT
    )
    gradients = []
    for index in range(4):
        parts = torch.autograd.grad(bag_losses(model, (torch.tensor([index]),)).sum(), tuple(model.parameters()))
        gradients.append(torch.cat([part.flatten() for part in parts]))
    rows = torch.stack(gradients)
    torch.testing.assert_close(torch.from_numpy(found.scores.copy()), 0.1 * rows @ rows.T, rtol=1e-4, atol=1e-6)


def test_ragged_batches_name_this_way(tmp_path):
    batch = torch.cat(BAGS), torch.tensor([0, 3, 4, 6]), LABELS
    model = Bag()
    with pytest.raises(
        tracer.BatchError, match=r"batch\[1\] has 4 entries.*expected 10.*pass their indices as the data"
    ):
        attribute(model, bag_losses, [batch], [batch], [model.state_dict()], save_dir=tmp_path)
    with pytest.raises(tracer.BatchError, match="holds no tensor.*pass their indices as the data"):
        attribute(model, bag_losses, [object()], [batch], [model.state_dict()], save_dir=tmp_path)


def squeezed(model, batch):
    return (model(batch[0]).squeeze() - batch[1].squeeze()).square()


def squeezed_whole(model, batch):
    return F.cross_entropy(model(batch[0]).unsqueeze(0).squeeze(), batch[1], reduction="none")


@pytest.mark.parametrize(
    ("task", "labels"), [(squeezed, torch.rand(5)), (squeezed_whole, torch.tensor([0, 1, 0, 1, 0]))]
)
def test_outputs_without_a_batch_dimension_fail_before_anything_is_computed(tmp_path, task, labels):
    model, x = nn.Linear(3, 1 if task is squeezed else 2), torch.randn(5, 3)
    tracing = tracer.Tracer(model, task, 5, tmp_path, proj_dim=8)
    tracing.load_checkpoint(model.state_dict(), model_id=0)
    with pytest.raises(tracer.BatchError, match=r"not on one example alone.*squeeze\(-1\)"):
        tracing.featurize((x[:4], labels[:4]), num_samples=4)
    assert len(tracing.remaining(0)) == 5


def test_what_is_wrong_with_any_batch_is_not_taken_for_that(tmp_path):
    def broken(model, batch):
        raise ZeroDivisionError("mine")

    model = nn.Linear(3, 2)
    with pytest.raises(ZeroDivisionError, match="mine"):
        attribute(model, broken, (torch.randn(4, 3),), (torch.randn(4, 3),), [model.state_dict()], save_dir=tmp_path)


def test_another_batch_size_resumes_although_padding_changes(tmp_path):
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.Embedding(9, 4, padding_idx=0), nn.Linear(4, 3)

        def forward(self, tokens):
            return self.head(self.table(tokens).sum(1))

    def collate(indices):
        tokens = nn.utils.rnn.pad_sequence([BAGS[index].clamp(min=1) for index in indices], batch_first=True)
        return tokens, LABELS[indices]

    model = Masked()
    first, second = ((({key: scale * value for key, value in model.state_dict().items()}), 0.1) for scale in (1, 2))
    given = model, "text_classification", range(4), range(4)
    options = {"collate_fn": collate, "save_dir": tmp_path, **EXACT}
    attribute(*given, [first], batch_size=4, **options)
    found = attribute(*given, [first, second], batch_size=2, **options)
    whole = attribute(*given, [first, second], batch_size=4, **{**options, "save_dir": tmp_path / "whole"})
    torch.testing.assert_close(torch.tensor(found.scores), torch.tensor(whole.scores), rtol=1e-5, atol=1e-7)

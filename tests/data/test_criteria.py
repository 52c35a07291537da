"""Losses of outputs and labels as tasks, against the same losses of single examples."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tracer import attribute
from tracer.data.named_tasks import make_task
from tracer.errors import BatchError


class Identity(nn.Module):
    def forward(self, x):
        return x


def of_outputs(outputs, labels):
    return F.cross_entropy(outputs, labels, reduction="none")


smoothed = functools.partial(F.cross_entropy, label_smoothing=0.1)
CLASSES = torch.tensor([0.5, 1.0, 2.0])


@pytest.mark.parametrize(
    ("loss", "alone"),
    [
        (nn.CrossEntropyLoss(reduction="none"), F.cross_entropy),
        (nn.CrossEntropyLoss(), F.cross_entropy),
        (nn.CrossEntropyLoss(reduction="sum"), F.cross_entropy),
        (F.cross_entropy, F.cross_entropy),
        (of_outputs, F.cross_entropy),
        (lambda outputs, labels: F.cross_entropy(outputs, labels, reduction="none"), F.cross_entropy),
        (smoothed, smoothed),
        # a weighted mean of one example forgets the weight, and so does not serve as the oracle
        (nn.CrossEntropyLoss(weight=CLASSES), functools.partial(F.cross_entropy, weight=CLASSES, reduction="sum")),
        (nn.MultiMarginLoss(), F.multi_margin_loss),
    ],
)  # fmt: skip
def test_losses_are_those_of_each_example_alone(loss, alone):
    logits, labels = torch.randn(5, 3), torch.tensor([0, 1, 2, 1, 0])
    found = make_task(loss).outputs(Identity(), (logits, labels))
    expected = torch.stack([alone(logits[row : row + 1], labels[row : row + 1]).sum() for row in range(5)])
    torch.testing.assert_close(found.loss, expected)
    assert (found.loss_grad == 1).all() and (found.loss_hess == 0).all()


@pytest.mark.parametrize(("reduction", "of_elements"), [("mean", torch.mean), ("sum", torch.sum)])
def test_elements_of_an_example_are_reduced_as_those_of_the_batch(reduction, of_elements):
    outputs, labels = torch.randn(4, 3, 2), torch.randn(4, 3, 2)
    found = make_task(nn.SmoothL1Loss(reduction=reduction)).outputs(Identity(), (outputs, labels))
    expected = [of_elements(F.smooth_l1_loss(outputs[row], labels[row], reduction="none")) for row in range(4)]
    torch.testing.assert_close(found.loss, torch.stack(expected))


def test_outputs_in_a_column_are_compared_with_labels_one_by_one():
    outputs, labels = torch.randn(4, 1), torch.randn(4)
    found = make_task(nn.MSELoss()).outputs(Identity(), (outputs, labels))
    torch.testing.assert_close(found.loss, (outputs[:, 0] - labels).square())


@pytest.mark.parametrize(
    ("loss", "outputs", "labels"),
    [
        (lambda outputs, labels: F.cross_entropy(outputs, labels), torch.randn(4, 3), torch.zeros(4).long()),
        (nn.MSELoss(reduction="none"), torch.randn(4, 3), torch.randn(4, 3)),
        (nn.CrossEntropyLoss(), torch.randn(4, 3, 2), torch.zeros(4, 2).long()),
    ],
)
def test_losses_that_cannot_be_divided_among_examples_are_refused(loss, outputs, labels):
    with pytest.raises(BatchError, match=r"expected one number for each, \[4\].*reduction='none'"):
        make_task(loss).outputs(Identity(), (outputs, labels))


def test_arguments_that_a_loss_does_not_take_are_named():
    with pytest.raises(
        BatchError, match=r"called as \(outputs, labels\), with outputs torch.float32 of shape \(4, 3\)"
    ):
        make_task(nn.MSELoss()).outputs(Identity(), (torch.randn(4, 3), torch.randn(4, 2)))


def test_the_loss_that_was_passed_stays_as_it_was():
    loss = nn.CrossEntropyLoss()
    make_task(loss).outputs(Identity(), (torch.randn(4, 3), torch.zeros(4).long()))
    assert loss.reduction == "mean"


@pytest.mark.parametrize(
    ("loss", "other"),
    [
        (nn.CrossEntropyLoss(), nn.CrossEntropyLoss(label_smoothing=0.1)),
        (nn.CrossEntropyLoss(weight=CLASSES), nn.CrossEntropyLoss(weight=CLASSES * 2)),
        (nn.MSELoss(), nn.MSELoss(reduction="sum")),
        (nn.MSELoss(), nn.L1Loss()),
        (F.cross_entropy, functools.partial(F.cross_entropy, weight=CLASSES)),
    ],
)
def test_settings_tell_losses_apart(loss, other):
    assert make_task(loss).settings() == make_task(loss).settings() != make_task(other).settings()


def test_scores_are_those_of_the_loss_by_name(run, tmp_path):
    def scores(task, name):
        return attribute(
            run.model, task, run.train, run.targets, run.checkpoints, save_dir=tmp_path / name, projector="none",
        ).scores  # fmt: skip

    expected = scores("classification", "named")
    found = scores(nn.CrossEntropyLoss(), "loss")
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-4, atol=1e-6)

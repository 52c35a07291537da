"""`cross_validate`: predictions by models that lack an example, and the estimate of wrong labels that follows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from tracer import InputError
from tracer.retraining import Recipe, cross_validate

RECIPE = Recipe(learning_rate=0.2, batch_size=64, epochs=4)


def overlapping(size, seed, num_classes=2, distance=1.0):
    """Classes whose examples overlap, such that no model predicts all labels."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(num_classes, (size,), generator=generator)
    return distance * nn.functional.one_hot(y, num_classes) + torch.randn(size, num_classes, generator=generator), y


def linear(num_classes=2):
    return nn.Linear(num_classes, num_classes)


def flipped(y, rate, num_classes):
    wrong = torch.arange(len(y)) < round(rate * len(y))
    return torch.where(wrong, (y + 1) % num_classes, y), wrong.numpy()


@pytest.mark.parametrize("num_classes", [2, 4])
def test_each_example_is_predicted_by_a_model_that_was_trained_without_it(num_classes):
    train, targets = overlapping(47, 0, num_classes), overlapping(30, 1, num_classes)
    states, rows_of = [], []

    def fit(model, rows):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        for _ in range(3):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(train[0][rows]), train[1][rows]).backward()
            optimizer.step()
        rows_of.append(rows)
        states.append({name: value.clone() for name, value in model.state_dict().items()})

    found = cross_validate(lambda: linear(num_classes), "classification", train, targets, train_fn=fit, folds=3)
    assert sorted(np.bincount(found.fold)) == [15, 16, 16]

    def oracle(x, y, state):
        probabilities = torch.func.functional_call(linear(num_classes), state, (x,)).softmax(-1).detach()
        own = probabilities.gather(1, y[:, None])[:, 0]
        rival_probability, rival = probabilities.scatter(1, y[:, None], -1).max(1)
        return own, rival, rival_probability

    for fold, (rows, state) in enumerate(zip(rows_of, states, strict=True)):
        left_out = np.flatnonzero(found.fold == fold)
        assert sorted([*rows.tolist(), *left_out]) == list(range(47))
        for evidence, place, (x, y) in (
            (found.train, left_out, (train[0][left_out], train[1][left_out])),
            (found.held_out, np.arange(30 * fold, 30 * (fold + 1)), targets),
        ):
            own, rival, rival_probability = oracle(x, y, state)
            assert (evidence.label[place] == y.numpy()).all() and (evidence.rival[place] == rival.numpy()).all()
            np.testing.assert_allclose(evidence.own[place], own, rtol=1e-5)
            np.testing.assert_allclose(evidence.rival_probability[place], rival_probability, rtol=1e-5)


def test_models_that_are_trained_at_once_predict_what_single_ones_do():
    train, targets = overlapping(60, 0), overlapping(25, 1)
    given = linear, "classification", train, targets, RECIPE
    stacked, single = (cross_validate(*given, stacked=each, seed=3) for each in (True, False))
    np.testing.assert_allclose(stacked.train.own, single.train.own, rtol=1e-4)
    np.testing.assert_allclose(stacked.held_out.own, single.held_out.own, rtol=1e-4)


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.3])
@pytest.mark.parametrize("num_classes", [2, 4])
def test_the_interval_holds_the_share_of_wrong_labels_though_models_are_weak(rate, num_classes):
    held, errors = [], []
    for seed in range(3):
        (x, right), targets = (overlapping(1000, 2 * seed + part, num_classes, 1.3) for part in (0, 1))
        labels, wrong = flipped(right, rate, num_classes)
        found = cross_validate(lambda: linear(num_classes), "classification", (x, labels), targets, RECIPE)
        assert found.held_out.kappa() < 0.7
        health = found.label_health()
        held.append(health.low <= rate <= health.high)
        errors.append(abs(health.share - rate))
        if rate:
            assert health.confidence[wrong].mean() > 1.5 * health.confidence[~wrong].mean()
    assert sum(held) >= 2 and np.mean(errors) < 0.05


@pytest.mark.parametrize("with_targets", [True, False])
def test_there_is_no_estimate_if_labels_have_no_pattern(with_targets):
    x, _ = overlapping(400, 0)
    noise = torch.randint(2, (600,), generator=torch.Generator().manual_seed(5))
    targets = (torch.randn(200, 2), noise[400:]) if with_targets else None
    health = cross_validate(linear, "classification", (x, noise[:400]), targets, RECIPE).label_health()
    assert "do not tell classes apart" in health and ("targets" in health) == with_targets


def test_targets_that_are_training_examples_say_nothing():
    train, others = overlapping(100, 0), overlapping(40, 1)
    both = tuple(torch.cat([a[:30], b]) for a, b in zip(train, others, strict=True))
    found = cross_validate(linear, "classification", train, both, RECIPE, folds=2)
    assert len(found.held_out.label) == 2 * 40
    assert cross_validate(linear, "classification", train, train, RECIPE, folds=2).held_out is None


@pytest.mark.parametrize("folds", [1, 101])
def test_folds_that_leave_nothing_to_train_on_or_to_predict_are_refused(folds):
    with pytest.raises(InputError, match="at least 2, and at most the number of training examples"):
        cross_validate(linear, "classification", overlapping(100, 0), None, RECIPE, folds=folds)


def test_a_task_without_classes_is_refused():
    x = torch.randn(20, 2)
    with pytest.raises(InputError, match="a classification task, whose labels can be wrong"):
        cross_validate(lambda: nn.Linear(2, 1), "regression", (x, x[:, 0]), None, RECIPE)

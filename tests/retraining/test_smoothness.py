"""Half-strength runs, and whether training is smooth enough for derivatives."""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from tracer.errors import InputError
from tracer.retraining import Recipe, check_smoothness, train_models

TASK = "image_classification"
GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(60, 6, generator=GENERATOR)
Y = torch.randint(0, 3, (60,), generator=GENERATOR)
TRAIN, TARGETS = (X[:50], Y[:50]), (X[50:], Y[50:])


def linear():
    return nn.Linear(6, 3)


def deep():
    return nn.Sequential(nn.Linear(6, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3))


def halved_loss(model, batch):
    return 0.5 * nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


def whole_loss(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_run_at_half_strength_is_one_with_half_the_loss(momentum):
    recipe = Recipe(learning_rate=0.1, momentum=momentum, batch_size=20, epochs=4, schedule="linear")
    (half,) = train_models(linear, whole_loss, TRAIN, recipe.at_strength(0.5))
    (other,) = train_models(linear, halved_loss, TRAIN, recipe)
    torch.testing.assert_close(half.state, other.state)
    assert recipe.at_strength(1.0) == recipe


@pytest.mark.parametrize("share", [0, 1.5, float("nan")])
def test_a_strength_out_of_range(share):
    with pytest.raises(InputError, match="expected a number above 0, at most 1"):
        Recipe().at_strength(share)


def effect_of_each(recipe, targets):
    """The derivative of the outputs in each example's weight, by training again: [N, M]."""
    effects = []
    for row in range(len(X[:50])):
        trained = []
        for change in (0.05, -0.05):
            weights = torch.ones(50)
            weights[row] += change

            def loss(model, batch):
                return batch[2] * nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")

            (found,) = train_models(linear, loss, (*TRAIN, weights), recipe, paired=True)
            model = linear()
            model.load_state_dict(found.state)
            logits = model(targets[0]).detach().double()
            own = logits.gather(1, targets[1].unsqueeze(1)).squeeze(1)
            others = logits.scatter(1, targets[1].unsqueeze(1), -torch.inf).logsumexp(1)
            trained.append((own - others).numpy())
        effects.append((trained[0] - trained[1]) / 0.1)
    return np.array(effects)


def test_logistic_regression_is_smooth_and_its_derivative_predicts_a_reweighting(caplog):
    recipe = Recipe(learning_rate=0.3, batch_size=25, epochs=5)
    scores = effect_of_each(recipe, TARGETS)
    with caplog.at_level(logging.INFO, "tracer"):
        found = check_smoothness(linear, TASK, TRAIN, TARGETS, recipe, scores, num_directions=2)
    assert found.symmetry > 0.99 and found.prediction > 0.99
    assert "weights changed by 1.00%: effects have symmetry" in caplog.text
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    opposite = check_smoothness(linear, TASK, TRAIN, TARGETS, recipe, -scores, num_directions=1)
    assert opposite.prediction < -0.99


def test_steps_that_amplify_differences_are_not_smooth(caplog):
    recipe = Recipe(learning_rate=0.05, momentum=0.9, batch_size=5, epochs=40)
    found = check_smoothness(deep, TASK, TRAIN, TARGETS, recipe, num_directions=1)
    assert found.symmetry < 0.2 and found.prediction is None
    assert "no derivative of one run predicts" in caplog.text
    calm = check_smoothness(deep, TASK, TRAIN, TARGETS, replace(recipe, learning_rate=0.001), num_directions=1)
    assert calm.symmetry > 0.95


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"change": 0.0}, "change is 0.0; expected a number above 0 and below 1"),
        ({"scores": np.zeros((3, 2))}, r"scores is of shape \[3, 2\]; expected \[50, 10\]"),
        ({"recipe": Recipe(learning_rate=0.0, epochs=1)}, "no output changed at all"),
    ],
)
def test_what_cannot_be_checked_is_refused(options, message):
    with pytest.raises(InputError, match=message):
        check_smoothness(linear, TASK, TRAIN, TARGETS, **{"recipe": Recipe(epochs=1), **options})

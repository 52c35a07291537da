"""`retrain` with the user's own training loop: the same models as the loop trains alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from tracer import InputError, InputTypeError, NonFiniteError
from tracer.retraining import Recipe, random_subsets, retrain

X, Y = torch.randn(20, 3, generator=torch.Generator().manual_seed(0)), torch.arange(20) % 2
MASKS = random_subsets(4, 20)
GIVEN = (lambda: nn.Linear(3, 2)), "image_classification", (X, Y), (X[:5], Y[:5]), MASKS


def fit(model, rows):
    """Plain gradient descent with an order drawn from torch's generator."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for batch in rows[torch.randperm(len(rows))].split(4):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(X[batch]), Y[batch]).backward()
        optimizer.step()


def test_each_model_is_trained_on_its_subset_and_evaluated():
    seen = []

    def recorded(model, rows):
        fit(model, rows)
        seen.append((rows, {name: value.clone() for name, value in model.state_dict().items()}))

    found = retrain(*GIVEN, train_fn=recorded, seeds=(0, 3))
    assert found.outputs_by_seed.shape == (4, 2, 5)
    for number, (rows, state) in enumerate(seen):
        subset, seed = divmod(number, 2)
        assert rows.tolist() == np.flatnonzero(MASKS[subset]).tolist()
        logits = torch.func.functional_call(nn.Linear(3, 2), state, (X[:5],)).detach()
        margins = logits[torch.arange(5), Y[:5]] - logits[torch.arange(5), 1 - Y[:5]]
        np.testing.assert_allclose(found.outputs_by_seed[subset, seed], margins, rtol=1e-5)


def test_results_follow_from_the_seed_and_are_stored(tmp_path):
    first = retrain(*GIVEN, train_fn=fit, save_dir=tmp_path)
    torch.randn(7)
    np.testing.assert_array_equal(retrain(*GIVEN, train_fn=fit).outputs_by_seed, first.outputs_by_seed)

    def fit_again(model, rows):
        raise AssertionError("trained again")

    fit_again.__qualname__, fit_again.__module__ = fit.__qualname__, fit.__module__
    stored = retrain(*GIVEN, train_fn=fit_again, save_dir=tmp_path)
    np.testing.assert_array_equal(stored.outputs_by_seed, first.outputs_by_seed)


def test_another_model_can_be_returned():
    constant = nn.Linear(3, 2)
    found = retrain(*GIVEN, train_fn=lambda model, rows: constant).outputs
    assert np.ptp(found, axis=0).max() == 0


def diverge(model, rows):
    model.weight.data.fill_(torch.nan)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, InputError, "got neither"),
        ({"recipe": Recipe(), "train_fn": fit}, InputError, "got both"),
        ({"train_fn": lambda model, rows: 3}, InputTypeError, "returned a int"),
        ({"train_fn": fit, "stacked": True}, InputError, "for a recipe"),
        ({"train_fn": fit, "stakced": True}, TypeError, "stakced"),
        ({"train_fn": diverge}, NonFiniteError, "subset 0"),
    ],
)
def test_what_cannot_be_trained_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        retrain(*GIVEN, **options)

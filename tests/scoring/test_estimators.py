"""Scores on plain arrays against obvious loops."""

from __future__ import annotations

import numpy as np
import pytest

import tracer
from tracer.scoring.estimators import Estimate, self_influence


def test_train_weights():
    loss_grad, norm = np.array([-0.5, 2.0, 0.0, 3.0]), np.array([2.0, 4.0, 1.0, 0.0])
    for estimator in ("tracin", "trak", "influence"):
        np.testing.assert_array_equal(Estimate(estimator).train_weights(loss_grad, norm), loss_grad)
    np.testing.assert_array_equal(Estimate("cosine").train_weights(loss_grad, norm), [-0.5, 0.25, 0.0, 0.0])


def test_target_weights():
    loss_grad, norm = np.array([-0.5, 2.0, -0.0, 3.0]), np.array([2.0, 4.0, 1.0, 0.0])
    for estimator in ("tracin", "trak", "influence"):
        np.testing.assert_array_equal(Estimate(estimator, "loss").target_weights(loss_grad, norm), loss_grad)
        np.testing.assert_array_equal(Estimate(estimator, "output").target_weights(loss_grad, norm), [-1, 1, -1, 1])
    for target in ("loss", "output"):
        found = Estimate("cosine", target).target_weights(loss_grad, norm)
        np.testing.assert_array_equal(found, [-0.5, 0.25, 0.0, 0.0])


def test_targets_are_the_loss_without_a_kernel_and_the_output_with_one():
    found = {estimator: Estimate(estimator).target for estimator in ("tracin", "cosine", "trak", "influence")}
    assert found == {"tracin": "loss", "cosine": "loss", "trak": "output", "influence": "output"}


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (("tracin",), "tracin"),
        (("tracin", "output"), "tracin-output"),
        (("cosine", "output"), "cosine"),
        (("trak", "loss"), "trak-loss"),
        (("influence", "output", 3.0, [0, 1]), "influence-groups"),
    ],
)
def test_variants_have_names_of_their_own(options, name):
    assert Estimate(*options).name == name


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"estimator": "cosines"}, tracer.InputError, "did you mean 'cosine'"),
        ({"target": "losses"}, tracer.InputError, "did you mean 'loss'"),
        ({"regularization": 1.0}, tracer.InputError, "which has no kernel to regularize"),
        ({"estimator": "trak", "regularization": -1.0}, tracer.InputError, "expected a finite number of 0 or more"),
        (
            {"estimator": "trak", "regularization": "best"},
            tracer.InputTypeError,
            "finite number of 0 or more, or 'auto'",
        ),
        ({"estimator": "trak", "regularization": float("nan")}, tracer.InputError, "regularization is nan"),
        ({"estimator": "trak", "regularization": None}, tracer.InputTypeError, "regularization is None"),
        ({"groups": "labels"}, tracer.InputTypeError, "or 'label'"),
        ({"groups": [0.5]}, tracer.InputTypeError, "expected the group of each target"),
        ({"groups": [-1, -1]}, tracer.InputError, "expected integers from 0 on"),
        ({"groups": [-2, 0]}, tracer.InputError, "expected integers from 0 on"),
    ],
)
def test_options_that_cannot_be_used_are_refused(options, kind, message):
    with pytest.raises(kind, match=message):
        Estimate(**options)


def test_self_influence_of_large_and_small_norms():
    found = self_influence(np.float32([1e-10, -1.0]), np.float32([1e-12, 1e15]))
    np.testing.assert_allclose(found, [1e-44, 1e30], rtol=1e-6)

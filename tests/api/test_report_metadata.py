"""What a store tells a report without a model: the classes that the model predicts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from tracer import attribute
from tracer.api.report_metadata import StoreFacts


@pytest.mark.parametrize("task", ["image_classification", "binary_classification"])
def test_predictions_are_those_of_the_last_checkpoint(tmp_path, task):
    torch.manual_seed(0)
    count = 2 if task == "binary_classification" else 4
    x, y = torch.randn(40, 5), torch.arange(40) % count
    models = [nn.Linear(5, 1 if count == 2 else 4) for _ in range(2)]
    labels = y.float() if count == 2 else y
    given = models[0], task, (x, labels), (x[:6] + 0.3, labels[:6]), [model.state_dict() for model in models]
    found = attribute(*given, save_dir=tmp_path, proj_dim=8)

    def predicted(inputs):
        logits = models[1](inputs).detach()
        return (logits[:, 0] > 0).long() if count == 2 else logits.argmax(1)

    facts = StoreFacts.of(found.tracer.store, "targets")
    np.testing.assert_array_equal(facts.train_predictions, predicted(x))
    np.testing.assert_array_equal(facts.target_predictions, predicted(x[:6] + 0.3))
    assert "train_predictions" not in facts.defaults(["cat"] * 40, None)  # of names, the store knows nothing


def test_soft_labels_and_regression_have_no_predictions(tmp_path):
    x, y = torch.randn(12, 5), torch.rand(12)
    for task in ("binary_classification", "regression"):
        model = nn.Linear(5, 1)
        given = model, task, (x, y), (x[:3], y[:3]), [model.state_dict()]
        found = attribute(*given, save_dir=tmp_path / task, proj_dim=8)
        assert StoreFacts.of(found.tracer.store, "targets").train_predictions is None

"""Two functions: the loss of training examples, and what is asked of targets; against loops of autograd in float64."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from oracles import oracle_gradients
from torch import nn

from tracer import MismatchError, Tracer, attribute


def decayed(model, batch):
    """Cross-entropy with the weight decay that training adds."""
    loss = nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")
    return loss + 0.05 * sum(parameter.square().sum() for parameter in model.parameters())


def margin(model, batch):
    """How much lower the label's logit is than the best other one."""
    logits = model(batch[0])
    label = nn.functional.one_hot(batch[1], logits.shape[1]).bool()
    return logits.masked_fill(label, -torch.inf).amax(1) - logits.masked_fill(~label, -torch.inf).amax(1)


def gradients(run, state, task, rows):
    model = copy.deepcopy(run.model).double()
    model.load_state_dict({name: value.double() for name, value in state.items()})
    found = oracle_gradients(model, task, (rows[0].double(), rows[1]), len(rows[0]))
    return torch.cat([value.flatten(1) for value in found.values()], 1)


def expected(run, task, target_task):
    return sum(
        rate * gradients(run, state, task, run.train) @ gradients(run, state, target_task, run.targets).T
        for state, rate in run.checkpoints
    ).numpy()


def traced(run, path, **options):
    given = {"projector": "none", "batch_size": 8, **options}
    return attribute(run.model, decayed, run.train, run.targets, run.checkpoints, save_dir=path, **given)


def assert_near(found, wanted):
    assert np.abs(np.asarray(found) - wanted).max() <= 2e-5 * np.abs(wanted).max()


@pytest.mark.parametrize("storage", ["none", "float32"])
def test_scores_are_products_of_the_gradients_of_both_functions(run, tmp_path, storage):
    found = traced(run, tmp_path / "store", target_task=margin, storage=storage)
    assert_near(found.scores, expected(run, decayed, margin))


def test_a_regularizer_is_part_of_the_training_loss_only(run, tmp_path):
    found = traced(run, tmp_path / "store", target_task="classification", storage="float32")
    plain = nn.functional.cross_entropy
    loss = lambda model, batch: plain(model(batch[0]), batch[1], reduction="none")  # noqa: E731
    assert_near(found.scores, expected(run, decayed, loss))


def test_queries_use_the_function_of_targets(run, tmp_path):
    found = traced(run, tmp_path / "store", target_task=margin, storage="float32")
    query = found.tracer.query(run.targets, 4)
    np.testing.assert_array_equal(query.indices, found.by("scores").top(4).indices)


@pytest.mark.parametrize("storage", ["none", "float32"])
def test_a_set_of_targets_keeps_its_function_and_other_sets_may_have_others(run, tmp_path, storage):
    traced(run, tmp_path / "store", target_task=margin, storage=storage)
    for other in (None, "classification", decayed):
        with pytest.raises(MismatchError, match="expected target_task=.*margin.*got .*; pass the same one, or choose"):
            traced(run, tmp_path / "store", target_task=other, storage=storage)
    again = traced(run, tmp_path / "store", exp_name="losses", storage=storage)
    assert_near(again.scores, expected(run, decayed, decayed))
    same = traced(run, tmp_path / "store", exp_name="losses", target_task=decayed, storage=storage)
    np.testing.assert_array_equal(same.scores, again.scores)


def test_a_store_refuses_another_function_of_training_examples(run, tmp_path):
    Tracer(run.model, decayed, 23, tmp_path / "store", target_task=margin)
    with pytest.raises(MismatchError, match="task.function: stored .*decayed"):
        Tracer(run.model, margin, 23, tmp_path / "store", target_task=margin)


def test_a_store_says_which_function_targets_have(run, tmp_path):
    found = traced(run, tmp_path / "store", target_task=margin)
    page = found.report(tmp_path / "report", figures=False).read_text()
    assert "target task" in page
    assert "test_target_task.margin" in page

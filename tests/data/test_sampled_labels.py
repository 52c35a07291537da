"""Labels drawn from predictions: their distribution, and gradients whose second moment is the Gauss-Newton matrix."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from tracer.data.named_tasks import BinaryClassification, Classification, make_task
from tracer.data.sampled_labels import HiddenTask, LabelDraws, ListedLabels, SampledTask, example_keys
from tracer.data.tasks import Task
from tracer.data.token_tasks import LanguageModeling

COUNT = 40_000


def keys_of(count=COUNT, seed=0):
    return example_keys(seed, 0, 0, np.arange(count))


def test_uniform_numbers_have_the_moments_of_the_unit_interval_and_are_independent():
    numbers = LabelDraws(keys_of()).uniform(torch.arange(2).expand(COUNT, 2))
    assert 0 < float(numbers.min()) and float(numbers.max()) < 1
    for power in (1, 2, 3):
        mean = numbers.pow(power).mean(0)
        deviation = (1 / (2 * power + 1) - 1 / (power + 1) ** 2) ** 0.5 / COUNT**0.5
        assert (mean - 1 / (power + 1)).abs().max() < 5 * deviation
    centred = numbers - 0.5
    for one, other in ((centred[:, 0], centred[:, 1]), (centred[1:, 0], centred[:-1, 0])):
        assert abs(float((one * other).mean())) < 5 / 12 / COUNT**0.5


def test_classes_have_the_frequencies_of_the_softmax():
    logits = torch.tensor([2.0, -1.0, 0.5, 0.0])
    drawn = LabelDraws(keys_of()).classes(logits.expand(COUNT, 4), torch.zeros(COUNT, dtype=torch.int64))
    expected = logits.softmax(0)
    found = torch.bincount(drawn, minlength=4) / COUNT
    assert ((found - expected).abs() < 5 * (expected * (1 - expected) / COUNT).sqrt()).all()


def test_a_draw_depends_on_example_sample_checkpoint_and_seed_alone():
    rows = np.array([7, 3, 11])
    whole = LabelDraws(example_keys(1, 2, 0, np.arange(20))).uniform(torch.arange(5).expand(20, 5))
    some = LabelDraws(example_keys(1, 2, 0, rows)).uniform(torch.arange(5).expand(3, 5))
    torch.testing.assert_close(some, whole[rows], rtol=0, atol=0)
    for other in ((2, 2, 0), (1, 3, 0), (1, 2, 1)):
        numbers = LabelDraws(example_keys(*other, rows)).uniform(torch.arange(5).expand(3, 5))
        assert not torch.isclose(numbers, some).any()


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(5, 5, dtype=torch.float64)

    def forward(self, tokens):
        return self.table(tokens)


class Ends(nn.Module):
    def __init__(self):
        super().__init__()
        self.start, self.end = nn.Linear(3, 1, dtype=torch.float64), nn.Linear(3, 1, dtype=torch.float64)

    def forward(self, x):
        return SimpleNamespace(start_logits=self.start(x).squeeze(-1), end_logits=self.end(x).squeeze(-1))


def linear(outputs):
    return nn.Linear(3, outputs, dtype=torch.float64)


def softmax_model():
    return nn.Sequential(linear(4), nn.Softmax(1))


X = torch.randn(1, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
TOKENS = torch.tensor([[1, 4, 2, 0]])
ENDS = {"x": X.expand(1, 4, 3) * torch.arange(1, 5).view(1, 4, 1), "start_positions": torch.tensor([1])}
ENDS["end_positions"] = torch.tensor([2])

torch.manual_seed(0)  # models of which the means below differ by noise; other modules' draws must not decide
CASES = {
    "classification": (Classification(), linear(4), (X, torch.tensor([1])), "cross-entropy"),
    "probabilities": (
        Classification(from_probabilities=True),
        softmax_model(),
        (X, torch.tensor([1])),
        "cross-entropy",
    ),
    "binary": (BinaryClassification(), linear(1), (X, torch.tensor([1.0])), "binary"),
    "regression": (make_task("regression"), linear(1), (X, torch.tensor([0.3])), "squares"),
    "regression of 3": (make_task("regression"), linear(3), (X, torch.randn(1, 3)), "squares"),
    "language": (LanguageModeling(), Tokens(), (TOKENS,), "tokens, mean"),
    "language, sum": (LanguageModeling("sum"), Tokens(), (TOKENS,), "tokens, sum"),
    "answers": (make_task("question_answering"), Ends(), ENDS, "ends"),
}


def logits_of(model, batch):
    """Return all outputs that the loss sees, as rows of logits."""
    if isinstance(batch, dict):
        found = model(batch["x"])
        return torch.stack([found.start_logits[0], found.end_logits[0]])
    if isinstance(model, Tokens):
        return model(batch[0])[0, :-1]
    return model(batch[0])


def loss_hessian(logits, kind):
    """Return the Hessian of the loss in one row of outputs, and the weight of each row."""
    if kind == "squares":
        return torch.eye(len(logits), dtype=torch.float64) * 2 / len(logits)
    if kind == "binary":
        p = torch.sigmoid(logits)
        return torch.diag(p * (1 - p))
    p = logits.softmax(0)
    return torch.diag(p) - torch.outer(p, p)


def gauss_newton(model, batch, kind):
    parameters = list(model.parameters())
    rows = logits_of(model, batch)
    if kind == "cross-entropy" and isinstance(model, nn.Sequential):
        rows = rows.log()
    weight = {"tokens, mean": 1 / len(rows), "ends": 1 / 2}.get(kind, 1.0)
    total = 0.0
    for row in rows:
        jacobian = torch.stack(
            [
                torch.cat(
                    [
                        g.flatten()
                        for g in torch.autograd.grad(
                            one, parameters, retain_graph=True, allow_unused=True, materialize_grads=True
                        )
                    ]
                )
                for one in row
            ]
        )
        total = total + weight * jacobian.T @ loss_hessian(row.detach(), kind) @ jacobian
    return total


@pytest.mark.parametrize("name", CASES)
def test_the_second_moment_of_gradients_is_the_gauss_newton_matrix(name):
    task, model, batch, kind = CASES[name]
    count, moments, squares = 700, 0.0, 0.0
    parameters = list(model.parameters())
    wrapped = SampledTask(task)
    for key in keys_of(count, seed=5).split(1):
        outputs = wrapped.outputs(model, (batch, key))
        assert outputs.output.shape == (1,) and float(outputs.loss_grad) == 1.0
        gradients = torch.autograd.grad(outputs.output.sum(), parameters)
        flat = torch.cat([each.flatten() for each in gradients])
        product = torch.outer(flat, flat)
        moments, squares = moments + product / count, squares + product.square() / count
    noise = (squares - moments.square()).clamp(min=0).sqrt() / count**0.5
    expected = gauss_newton(model, batch, kind)
    assert ((moments - expected).abs() <= 5.5 * noise + 1e-9).all()
    assert float(expected.trace()) > 10 * float(noise.diagonal().sum())  # so that the test can fail


def test_padding_changes_no_label():
    task, model = SampledTask(LanguageModeling()), Tokens()
    mask = torch.ones(1, 4, dtype=torch.int64)
    short = {"input_ids": TOKENS, "attention_mask": mask}
    padded = {"input_ids": nn.functional.pad(TOKENS, (0, 3)), "attention_mask": nn.functional.pad(mask, (0, 3))}

    class Masked(Tokens):
        def forward(self, input_ids, attention_mask):
            return super().forward(input_ids)

    model = Masked()
    one, other = (task.outputs(model, (batch, keys_of(1))).output for batch in (short, padded))
    torch.testing.assert_close(one, other, rtol=1e-12, atol=0)


@pytest.mark.parametrize("has_hess", [True, False])
def test_a_task_that_draws_no_labels_has_its_own_curvature_or_the_gradient_of_its_own_labels(has_hess):
    model = nn.Linear(3, 1)
    x, y = torch.randn(2, 3), torch.tensor([1.0, 0.0])
    base = BinaryClassification()

    class Own(Task):
        def outputs(self, model, batch):
            found = base.outputs(model, batch)
            return found if has_hess else replace(found, loss_hess=torch.zeros(2))

    outputs = SampledTask(Own()).outputs(model, ((x, y), keys_of(2)))
    known = base.outputs(model, (x, y))
    weights = known.loss_hess.sqrt() if has_hess else known.loss_grad
    for one, other in zip(
        torch.autograd.grad(outputs.output.sum(), list(model.parameters())),
        torch.autograd.grad((known.output * weights).sum(), list(model.parameters())),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


LISTED = ["classification", "probabilities", "regression of 3"]


def own_part(task, model, batch):
    """Return the part of the Gauss-Newton matrix that f shows, and the weight of the rest."""
    if task.hidden_labels == "all":
        return 0.0, 1.0
    outputs = task.outputs(model, batch)
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(outputs.output.sum(), list(model.parameters()))])
    share = outputs.loss_grad.abs()
    return outputs.loss_hess * share * torch.outer(gradient, gradient), share


def flat_gradient(task, model, batch, key):
    loss = task.outputs(model, (batch, key)).output.sum()
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


@pytest.mark.parametrize("name", LISTED)
def test_listed_labels_and_f_add_up_to_the_gauss_newton_matrix(name):
    task, model, batch, kind = CASES[name]
    listing = HiddenTask(task, ListedLabels)
    found, weight = own_part(task, model, batch)
    for number in range(task.num_hidden(model, batch)):
        gradient = flat_gradient(listing, model, batch, torch.tensor([number]))
        found = found + weight * torch.outer(gradient, gradient)
    torch.testing.assert_close(found, gauss_newton(model, batch, kind), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", [*LISTED, "language", "answers"])
def test_drawn_labels_and_f_have_the_gauss_newton_matrix_as_their_mean(name):
    task, model, batch, kind = CASES[name]
    own, weight = own_part(task, model, batch)
    drawing = HiddenTask(task)
    products = []
    for key in keys_of(700, seed=6).split(1):
        gradient = flat_gradient(drawing, model, batch, key)
        products.append(own + weight * torch.outer(gradient, gradient))
    noise = torch.stack(products).std(0) / len(products) ** 0.5
    expected = gauss_newton(model, batch, kind)
    assert ((sum(products) / len(products) - expected).abs() <= 5.5 * noise + 1e-9).all()
    assert float(expected.trace()) > 10 * float(noise.diagonal().sum())  # so that the test can fail


def test_one_output_hides_nothing():
    two_classes = Classification(), linear(2), (X, torch.tensor([1]))
    for task, model, batch in (two_classes, CASES["binary"][:3], CASES["regression"][:3]):
        assert task.num_hidden(model, batch) == 0
    assert LanguageModeling().num_hidden(Tokens(), (TOKENS,)) is None

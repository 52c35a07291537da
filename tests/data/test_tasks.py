"""Tasks against plain torch losses: f, L, Q and w of each example."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tracer
from tracer.data.model_inputs import LABEL_KEYS
from tracer.data.named_tasks import make_task
from tracer.data.token_tasks import LanguageModeling


class Model(nn.Module):
    """Returns its input in the requested form."""

    def __init__(self, form="tensor"):
        super().__init__()
        self.form = form

    def forward(self, x=None, input_ids=None):
        x = x if x is not None else input_ids
        if self.form == "tuple":
            return x, "more"
        if self.form == "mapping":
            return {"logits": x}
        return type("Output", (), {"logits": x})() if self.form == "object" else x


def derivatives(loss_of_output, output):
    """First and second derivative of a loss of one number, by autograd."""
    output = output.detach().double().requires_grad_()
    first = torch.autograd.grad(loss_of_output(output).sum(), output, create_graph=True)[0]
    second = torch.autograd.grad(first.sum(), output)[0] if first.requires_grad else torch.zeros_like(first)
    return first.detach(), second


@pytest.mark.parametrize("form", ["tensor", "tuple", "mapping", "object"])
@pytest.mark.parametrize("name", ["classification", "image_classification", "text_classification"])
def test_classification(name, form):
    logits, labels = 3 * torch.randn(6, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0, 1])
    found = make_task(name).outputs(Model(form), (logits, labels))
    torch.testing.assert_close(found.loss, F.cross_entropy(logits, labels, reduction="none"))
    p = logits.softmax(1).gather(1, labels[:, None]).squeeze(1)
    torch.testing.assert_close(found.output, (p / (1 - p)).log())
    loss_grad, loss_hess = derivatives(lambda f: F.softplus(-f), found.output)
    torch.testing.assert_close(found.loss_grad, loss_grad)
    torch.testing.assert_close(found.loss_hess, loss_hess)


def test_classification_of_certain_samples_stays_finite():
    logits = torch.tensor([[200.0, 0.0], [-200.0, 0.0]], requires_grad=True)
    found = make_task("image_classification").outputs(Model(), (logits, torch.tensor([0, 0])))
    assert found.loss_grad.tolist() == [-0.0, -1.0]
    gradient = torch.autograd.grad(found.output.sum(), logits)[0]
    torch.testing.assert_close(gradient, torch.tensor([[1.0, -1.0], [1.0, -1.0]]))


@pytest.mark.parametrize("shape", [(5,), (5, 1)])
def test_binary_classification_with_soft_labels(shape):
    logits, labels = torch.randn(shape, dtype=torch.float64), torch.tensor([0.0, 1.0, 0.3, 0.9, 1.0])
    found = make_task("binary_classification").outputs(Model(), (logits, labels))
    loss = lambda f: F.binary_cross_entropy_with_logits(f, labels.double(), reduction="none")  # noqa: E731
    torch.testing.assert_close(found.loss, loss(logits.flatten()))
    loss_grad, loss_hess = derivatives(loss, found.output)
    torch.testing.assert_close(found.loss_grad, loss_grad)
    torch.testing.assert_close(found.loss_hess, loss_hess)


@pytest.mark.parametrize("shapes", [((5,), (5, 1)), ((5, 1), (5,)), ((5,), (5,))])
def test_regression_of_one_number(shapes):
    predicted, target = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    found = make_task("regression").outputs(Model(), (predicted, target))
    loss = lambda f: (f - target.flatten()).square()  # noqa: E731
    torch.testing.assert_close(found.loss, loss(predicted.flatten()))
    loss_grad, loss_hess = derivatives(loss, found.output)
    torch.testing.assert_close(found.loss_grad, loss_grad)
    torch.testing.assert_close(found.loss_hess, loss_hess)


def test_regression_of_several_numbers():
    predicted, target = torch.randn(5, 3), torch.randn(5, 3)
    found = make_task("regression").outputs(Model(), (predicted, target))
    torch.testing.assert_close(found.loss, F.mse_loss(predicted, target, reduction="none").mean(1))
    assert found.loss_grad.tolist() == [1.0] * 5
    assert found.loss_hess.tolist() == [0.0] * 5


def test_language_modeling_as_hugging_face_counts():
    logits = torch.randn(3, 6, 9, dtype=torch.float64)
    labels = torch.randint(0, 9, (3, 6))
    labels[1, 4:] = -100
    found = make_task("language_modeling").outputs(Model("object"), {"input_ids": logits, "labels": labels})
    for row in range(3):
        expected = F.cross_entropy(logits[row, :-1], labels[row, 1:], ignore_index=-100)
        torch.testing.assert_close(found.loss[row], expected)
    total = LanguageModeling("sum").outputs(Model("object"), {"input_ids": logits, "labels": labels})
    torch.testing.assert_close(total.loss, found.loss * torch.tensor([5.0, 3.0, 5.0]))


def test_language_modeling_forms_of_batches():
    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(9, 9)

        def forward(self, input_ids, attention_mask=None):
            return self.table(input_ids)

    model, tokens = Table(), torch.randint(0, 9, (3, 6))
    task = make_task("language_modeling")
    expected = task.outputs(model, {"input_ids": tokens, "labels": tokens}).loss
    for batch in (tokens, (tokens,), [tokens], {"input_ids": tokens}, (tokens[:, :-1], tokens[:, 1:])):
        torch.testing.assert_close(task.outputs(model, batch).loss, expected)
    mask = torch.ones(3, 6)
    mask[0, 3:] = 0
    masked = task.outputs(model, {"input_ids": tokens, "attention_mask": mask}).loss
    torch.testing.assert_close(masked[1:], expected[1:])
    torch.testing.assert_close(masked[:1], task.outputs(model, tokens[:1, :3]).loss)
    left = task.outputs(model, {"input_ids": tokens.roll(3, 1), "attention_mask": mask.roll(3, 1)}).loss
    torch.testing.assert_close(left[:1], masked[:1])


def test_language_modeling_row_without_a_token_to_predict():
    labels = torch.full((2, 4), -100)
    labels[0] = 1
    with pytest.raises(tracer.BatchError, match=r"Examples \[1\] of the batch have no token to predict"):
        make_task("language_modeling").outputs(Model(), {"input_ids": torch.randn(2, 4, 5), "labels": labels})


def test_language_modeling_of_wrong_shapes():
    with pytest.raises(tracer.BatchError, match=r"expects logits \[B, T, vocabulary\]"):
        make_task("language_modeling").outputs(Model(), (torch.randn(2, 4), torch.ones(2, 4)))
    with pytest.raises(tracer.BatchError, match="needs 'labels', or for a causal language model"):
        make_task("language_modeling").outputs(Model(), {"x": torch.randn(2, 4, 5)})
    with pytest.raises(tracer.BatchError, match="label 7 "):
        make_task("language_modeling").outputs(Model(), (torch.randn(1, 2, 5), torch.tensor([[1, 7]])))


@pytest.mark.parametrize("label", [-1, 4])
def test_labels_out_of_range(label):
    with pytest.raises(tracer.BatchError, match=rf"label {label} at position 2 of the batch is outside 0\.\.\.3"):
        make_task("image_classification").outputs(Model(), (torch.randn(3, 4), torch.tensor([0, 1, label])))


@pytest.mark.parametrize(
    ("task", "batch", "message"),
    [
        ("image_classification", (torch.randn(3, 4), torch.rand(3)), "class indices as integers"),
        ("image_classification", (torch.randn(3, 4, 2), torch.ones(3).long()), r"logits \[B, num_classes\]"),
        ("image_classification", (torch.randn(3, 1), torch.zeros(3).long()), "binary_classification"),
        ("image_classification", torch.randn(3, 4), r"expects a batch \(inputs, labels\)"),
        ("image_classification", {"x": torch.randn(3, 4)}, "needs labels under one of"),
        ("image_classification", (torch.randn(3, 4), [1, 2, 3]), "labels as a tensor"),
        ("binary_classification", (torch.randn(3, 2), torch.rand(3)), "Expected one number for each example"),
        ("binary_classification", (torch.randn(3), torch.tensor([0.0, 1.0, 2.0])), r"labels in \[0, 1\]; got 0.0 to 2"),
        ("regression", (torch.randn(3, 2), torch.randn(3)), r"output has shape \(3, 2\)"),
        ("regression", (torch.randn(3), torch.randn(2)), "Expected one number for each example"),
    ],
)
def test_batches_that_do_not_fit(task, batch, message):
    with pytest.raises(tracer.BatchError, match=message):
        make_task(task).outputs(Model(), batch)


@pytest.mark.parametrize("key", LABEL_KEYS)
def test_labels_of_mappings(key):
    logits, labels = torch.randn(3, 4), torch.tensor([0, 1, 2])
    found = make_task("image_classification").outputs(Model(), {"pixels": logits, key: labels})
    torch.testing.assert_close(found.loss, F.cross_entropy(logits, labels, reduction="none"))


def test_inputs_as_a_mapping_beside_labels():
    logits, labels = torch.randn(3, 4), torch.tensor([0, 1, 2])
    found = make_task("text_classification").outputs(Model(), ({"input_ids": logits}, labels))
    torch.testing.assert_close(found.loss, F.cross_entropy(logits, labels, reduction="none"))


def test_half_precision_logits_give_float32_losses():
    logits, labels = torch.randn(3, 4).bfloat16(), torch.tensor([0, 1, 2])
    found = make_task("image_classification").outputs(Model(), (logits, labels))
    assert found.loss.dtype == torch.float32
    torch.testing.assert_close(found.loss, F.cross_entropy(logits.float(), labels, reduction="none"))


def test_function_as_task():
    def mine(model, batch):
        return model(batch).abs()

    found = make_task(mine).outputs(Model(), torch.tensor([-2.0, 3.0]))
    assert found.loss.tolist() == [2.0, 3.0]
    assert found.loss_grad.tolist() == [1.0, 1.0]
    assert make_task(mine).settings()["function"].endswith("mine")


def test_bound_arguments_tell_functions_apart():
    def scaled(model, batch, factor):
        return factor * model(batch)

    one, two = (make_task(functools.partial(scaled, factor=factor)).settings() for factor in (1, 2))
    assert one["function"] == two["function"]
    assert one != two


def test_dataclasses_are_read_by_their_fields():
    @dataclasses.dataclass
    class Sample:
        pixels: torch.Tensor
        label: torch.Tensor

    logits, labels = torch.randn(3, 4), torch.tensor([0, 1, 2])
    found = make_task("image_classification").outputs(Model(), Sample(logits, labels))
    torch.testing.assert_close(found.loss, F.cross_entropy(logits, labels, reduction="none"))


@pytest.mark.parametrize("task", [lambda x: x, lambda model, batch, extra: batch, nn.CosineEmbeddingLoss()])
def test_functions_of_other_than_two_arguments_are_no_tasks(task):
    with pytest.raises(tracer.InputTypeError, match=r"expected a task's name, a function \(model, batch\)"):
        make_task(task)


@pytest.mark.parametrize(
    "task", [lambda m, b: b, lambda model, y: y, lambda *args: args[1], functools.partial(torch.mul)]
)
def test_functions_of_a_model_and_a_batch_are_tasks(task):
    assert make_task(task).name == "callable"


def test_losses_of_training_mode_only_name_a_way():
    class Detector(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(2, 3)

        def forward(self, x, y):
            logits = self.head(x)
            losses = {"class": F.cross_entropy(logits, y, reduction="none")}
            return losses if self.training else [{"scores": row} for row in logits.softmax(1)]

    def summed(model, batch):
        return sum(model(*batch).values())

    def in_training(model, batch):
        model.train()
        return summed(model, batch)

    model, batch = Detector().eval(), (torch.randn(4, 2), torch.tensor([0, 1, 2, 0]))
    with pytest.raises(tracer.BatchError, match=r"AttributeError.*eval mode.*model\.train\(\)"):
        make_task(summed).outputs(model, batch)
    with pytest.raises(tracer.BatchError, match=r"IndexError.*eval mode.*model\.train\(\)"):
        make_task(lambda model, batch: model(*batch)[9]).outputs(model, batch)
    found = make_task(in_training).outputs(model, batch)
    torch.testing.assert_close(found.loss, F.cross_entropy(model.head(batch[0]), batch[1], reduction="none"))


@pytest.mark.parametrize("task", ["regression", "binary_classification"])
def test_outputs_that_lost_the_batch_dimension_are_refused_with_their_shape(task):
    model = nn.Sequential(nn.Linear(2, 1), nn.Flatten(0))
    squeezed = nn.Sequential(model, nn.Unflatten(0, (1, -1)), nn.AdaptiveAvgPool1d(1), nn.Flatten(0))
    squeezed.register_forward_hook(lambda module, args, output: output.squeeze())
    with pytest.raises(tracer.BatchError, match=r"shape \(\)"):
        make_task(task).outputs(squeezed, (torch.randn(1, 2), torch.ones(1)))


PROBABILITIES = {
    "sigmoid": nn.Sequential(nn.Linear(4, 1), nn.Sigmoid()),
    "sigmoid, squeezed": nn.Sequential(nn.Linear(4, 1), nn.Sigmoid(), nn.Flatten(0)),
    "softmax": nn.Sequential(nn.Linear(4, 3), nn.Softmax(1)),
    "clamped": nn.Sequential(nn.Linear(4, 3), nn.Softmax(1), nn.Hardtanh(1e-7, 1 - 1e-7)),
}


class Normalized(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        weights = self.head(x).exp()
        return weights / weights.sum(1, keepdim=True)


class Written(nn.Sequential):
    """A sigmoid that is followed by, or written with, numbers."""

    def __init__(self, function):
        super().__init__(nn.Linear(4, 1))
        self.function = function

    def forward(self, x):
        return self.function(self[0](x))


PROBABILITIES |= {
    "normalized": Normalized(),
    "sigmoid of the other class": Written(lambda z: 1 - torch.sigmoid(z)),
    "sigmoid, within bounds": Written(lambda z: 0.98 * torch.sigmoid(z) + 0.01),
    "sigmoid, written by hand": Written(lambda z: 1 / (1 + torch.exp(-z))),
    "sigmoid, as tanh": Written(lambda z: (torch.tanh(z) + 1) / 2),
    "sigmoid, as tanh by halves": Written(lambda z: 0.5 + 0.5 * torch.tanh(z / 2)),
}


@pytest.mark.parametrize("kind", PROBABILITIES)
def test_probabilities_are_not_taken_for_logits(kind):
    model, x = PROBABILITIES[kind].double(), torch.randn(5, 4, dtype=torch.float64)
    binary = "sigmoid" in kind
    labels = torch.tensor([0, 1, 1, 0, 1])
    batch = x, labels.double() if binary else labels
    task = (tracer.BinaryClassification if binary else tracer.Classification)(from_probabilities=True)
    with pytest.raises(tracer.BatchError, match=r"from_probabilities=True"):
        make_task("binary_classification" if binary else "image_classification").outputs(model, batch)
    found = task.outputs(model, batch)
    p = model(x)
    expected = F.binary_cross_entropy(p.flatten(), batch[1], reduction="none") if binary else None
    expected = F.nll_loss(p.log(), labels, reduction="none") if expected is None else expected
    torch.testing.assert_close(found.loss, expected.detach())
    parameters = tuple(model.parameters())
    ours = torch.autograd.grad((found.loss_grad * found.output).sum(), parameters)
    torch.testing.assert_close(ours, torch.autograd.grad(expected.sum(), parameters))
    assert task.settings() != make_task("binary_classification" if binary else "image_classification").settings()
    with pytest.raises(tracer.BatchError, match=r"expects outputs in \[0, 1\]"):
        task.outputs(model[0] if isinstance(model, nn.Sequential) else model.head, (10 * x, batch[1]))


@pytest.mark.parametrize(
    "function",
    [
        lambda z: 9 * torch.sigmoid(z) - 4,
        lambda z: z * torch.sigmoid(z),
        lambda z: 5 * torch.tanh(z / 5),
        lambda z: 2 * torch.tanh(z) + 1,
    ],
)
def test_logits_that_come_from_a_sigmoid_are_logits(function):
    x, labels = torch.randn(5, 4), torch.ones(5)
    model = Written(function)
    expected = F.binary_cross_entropy_with_logits(model(x).flatten(), labels, reduction="none")
    torch.testing.assert_close(make_task("binary_classification").outputs(model, (x, labels)).loss, expected.detach())


@pytest.mark.parametrize("scale", [0.0, 1e-3, 1.0])
def test_logits_between_zero_and_one_are_logits(scale):
    binary = nn.Linear(4, 1)
    several = nn.Linear(4, 3)
    for model in (binary, several):
        nn.init.constant_(model.bias, 0.4)
        model.weight.data.mul_(scale)
    x = torch.rand(6, 4)
    make_task("binary_classification").outputs(binary, (x, torch.ones(6)))
    make_task("image_classification").outputs(several, (x, torch.zeros(6).long()))
    make_task("image_classification").outputs(nn.LogSoftmax(1), (x, torch.zeros(6).long()))


class Masked(nn.Module):
    def forward(self, x, mask=None, segments=None):
        return x.sum(1) if mask is None else (x * mask.unsqueeze(-1)).sum(1)


def test_tuples_are_bound_only_if_that_is_no_guess():
    x, y, mask = torch.randn(5, 3, 4), torch.tensor([0, 1, 1, 0, 1]), torch.ones(5, 3)
    task = make_task("image_classification")
    named = task.outputs(Masked(), {"x": x, "mask": mask, "labels": y}).loss
    torch.testing.assert_close(task.outputs(Masked(), (x, mask, y)).loss, named)
    padded = F.pad(x, (0, 0, 0, 2)), F.pad(mask, (0, 2)), y
    torch.testing.assert_close(task.outputs(Masked(), padded).loss, named)
    types = mask.clone()
    types[:, :2] = 0
    others = (
        (x, y, torch.arange(5)),
        (x, y.float(), torch.arange(5)),
        (x, mask, mask, y),
        (x, types, y),
        (x, 0 * mask, y),
    )
    for batch in others:
        with pytest.raises(tracer.BatchError, match="which is a guess"):
            task.outputs(Masked(), batch)
    with pytest.raises(tracer.BatchError, match="which is a guess"):
        task.outputs(nn.Linear(4, 3), (x[:, 0], y, torch.arange(5)))


class Encoder(nn.Module):
    """The order of arguments of many encoders, which is not that of tokenizers."""

    def forward(self, input_ids, attention_mask, token_type_ids, **more):
        value = input_ids * attention_mask + 7 * token_type_ids
        return torch.stack([value.sum(1), value.square().sum(1)], 1) / 100


def test_the_values_of_a_tokenizer_are_bound_by_name():
    ids = torch.tensor([[1, 5, 9, 2, 4, 2], [1, 6, 2, 3, 2, 0], [1, 7, 2, 8, 3, 2]])
    types, mask = torch.tensor([[0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 1, 0], [0, 0, 0, 1, 1, 1]]), (ids > 0).long()
    y = torch.tensor([0, 1, 1])
    for task in map(make_task, ("text_classification", "image_classification")):
        named = {"input_ids": ids, "token_type_ids": types, "attention_mask": mask, "labels": y}
        expected = task.outputs(Encoder(), named).output
        torch.testing.assert_close(task.outputs(Encoder(), (ids, types, mask, y)).output, expected)
        for wrong in (types, torch.zeros_like(types)):
            with pytest.raises(tracer.BatchError, match="is no attention mask"):
                task.outputs(Encoder(), (ids, mask, wrong, y))


def test_both_inputs_of_a_model_of_two_are_bound():
    task = make_task("image_classification")
    x, y = torch.randn(5, 3), torch.tensor([0, 1, 1, 0, 1])
    torch.testing.assert_close(
        task.outputs(nn.Bilinear(3, 3, 2), (x, x, y)).loss.shape, task.outputs(nn.Linear(3, 2), (x, y)).loss.shape
    )


def test_columns_that_are_not_the_models_are_dropped():
    x, y = torch.randn(5, 3, 4), torch.tensor([0, 1, 1, 0, 1])
    task = make_task("image_classification")
    expected = task.outputs(Masked(), (x, y)).loss
    for batch in ({"x": x, "labels": y, "index": torch.arange(5)}, ({"x": x, "names": list("abcde")}, y)):
        torch.testing.assert_close(task.outputs(Masked(), batch).loss, expected)
    with pytest.raises(tracer.BatchError, match=r"does not take \['target'\]; pass one of them only"):
        task.outputs(Masked(), {"x": x, "label": y, "target": y})
    with pytest.raises(tracer.BatchError, match=r"without \['x'\]; name the entries as the model does"):
        task.outputs(Masked(), {"pixels": x, "mask": x, "labels": y})


def test_task_without_a_name():
    class Mine(tracer.Task):
        def outputs(self, model, batch):
            return tracer.loss_outputs(model(batch))

    assert Mine().settings()["class"].endswith("Mine")


@pytest.mark.parametrize("value", [torch.tensor(1.0), torch.ones(2, 2), 3.0])
def test_function_that_does_not_give_one_loss_a_sample(value):
    with pytest.raises(tracer.BatchError, match="must return the loss of each example"):
        make_task(lambda model, batch: value).outputs(Model(), torch.ones(2))


@pytest.mark.parametrize("value", [None, 3, tracer.Task])
def test_values_that_are_no_task(value):
    with pytest.raises(tracer.InputTypeError, match=r"function \(model, batch\) -> loss"):
        make_task(value)


def test_model_without_logits():
    with pytest.raises(tracer.BatchError, match="without a tensor 'logits'"):
        make_task("image_classification").outputs(lambda x: "nothing", (torch.ones(1, 2), torch.zeros(1).long()))


def test_unknown_reduction():
    with pytest.raises(tracer.InputError, match="did you mean 'mean'"):
        LanguageModeling("men")

"""Joining the gradients of a weight and its bias, and splitting them again, against built matrices."""

from __future__ import annotations

import pytest
import torch
from projection_cases import all_forms, normal, oracle_rows
from torch import nn

from tracer.gradients.combined import SumGradient
from tracer.gradients.joint import JoiningSink, Joint, find_joints
from tracer.gradients.kronecker import multiplied
from tracer.gradients.per_sample import DenseGradient, OuterGradient

COUNT, SHAPE = 5, (11, 6)
JOINTS = {"[out, in]": Joint("w", "b", SHAPE, 1), "[in, out]": Joint("w", "b", SHAPE, 0)}


def both(joint, form="sequence"):
    """A weight's gradient, and as the bias's the sum of the output gradients, or numbers if there are none."""
    weight = all_forms(SHAPE)[form]
    size = SHAPE[1 - joint.dim]
    factors = weight.outer(0, COUNT)
    bias = normal(COUNT, size, seed=5) if factors is None else factors[1 - joint.dim].double().sum(1)
    return weight, DenseGradient(bias)


def matrices(joint, weight, bias):
    """Return ``[W, b]`` of both gradients, ``[B, *]``."""
    built, column = oracle_rows(weight).view(-1, *SHAPE), oracle_rows(bias)
    return torch.cat([built, column.unsqueeze(2 if joint.dim else 1)], 2 if joint.dim else 1)


@pytest.mark.parametrize("joint", JOINTS.values(), ids=JOINTS)
@pytest.mark.parametrize("from_layers", [True, False])
@pytest.mark.parametrize("form", all_forms(SHAPE))
def test_both_are_joined_multiplied_and_split_whatever_the_form(form, from_layers, joint):
    weight, bias = both(joint, form)
    expected, (rows, cols) = matrices(joint, weight, bias), joint.matrix_shape
    joined = joint.join(weight, bias, from_layers)
    torch.testing.assert_close(joined.entries(1, 4).double(), expected[1:4].flatten(1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(joined.squared_norm(), expected.square().sum((1, 2)), rtol=1e-5, atol=1e-5)
    left, right = normal(rows, rows, seed=3), normal(cols, cols, seed=4)
    found = joint.split(multiplied(joined, left, right))
    products = torch.einsum("op,boi,ij->bpj", left, expected, right)
    for name, values in joint.tensors(products).items():
        torch.testing.assert_close(found[name].entries(0, COUNT), values.flatten(1), rtol=1e-5, atol=1e-4)
    assert (found["w"].shape, found["b"].shape) == (SHAPE, (SHAPE[1 - joint.dim],))


def test_factors_stay_factors():
    joint = JOINTS["[out, in]"]
    weight, bias = both(joint)
    assert type(joint.join(weight, bias, True)) is OuterGradient
    assert type(joint.split(joint.join(weight, bias, True))["w"]) is OuterGradient
    twice = joint.split(joint.join(SumGradient([weight, weight]), bias, True))
    assert [type(part) for part in twice["w"].parts()] == [OuterGradient] * 2


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.out = nn.Embedding(5, 4), nn.Linear(4, 5)
        self.first, self.second, self.third = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.conv, self.norm, self.bare = nn.Conv1d(2, 3, 2), nn.LayerNorm(4), nn.Linear(4, 4, bias=False)
        self.attention = nn.MultiheadAttention(4, 2)
        self.out.weight = self.words.weight
        self.second.weight, self.second.bias = self.first.weight, self.first.bias


def pairs(found):
    return {(joint.weight, joint.bias) for joint in found}


def test_layers_with_a_bias_of_their_own_are_joined():
    model = Model()
    names = [name for name, _ in model.named_parameters()]
    alone = {("third.weight", "third.bias"), ("conv.weight", "conv.bias")}
    attention = {
        ("attention.in_proj_weight", "attention.in_proj_bias"),
        ("attention.out_proj.weight", "attention.out_proj.bias"),
    }
    assert pairs(find_joints(model, names)) == {("first.weight", "first.bias")} | alone | attention
    assert pairs(find_joints(model, ["third.weight", "conv.weight", "conv.bias"])) == {("conv.weight", "conv.bias")}
    model.second.bias = nn.Parameter(torch.zeros(4))
    assert pairs(find_joints(model, [name for name, _ in model.named_parameters()])) == alone | attention


class Taken:
    """Adds up what it is given, by name."""

    def begin(self):
        self.total, self.times = {}, {}

    def take(self, start, stop, gradients):
        for name, gradient in gradients.items():
            total = self.total.setdefault(name, torch.zeros(COUNT, gradient.numel).double())
            total[start:stop] += gradient.entries(0, stop - start).double()
            self.times[name] = self.times.get(name, torch.zeros(COUNT)) + torch.eye(COUNT)[start:stop].sum(0)


def whole(names):
    return {name: (0, COUNT) for name in names}


ARRIVALS = {
    "together": [whole("wbx")],
    "the weight first": [whole("wx"), whole("b")],
    "the bias first": [whole("b"), whole("wx")],
    "the weight in blocks": [whole("b"), {"w": (0, 2), "x": (0, 2)}, {"w": (2, 5), "x": (2, 5)}],
    "both in blocks": [dict.fromkeys("wbx", (0, 3)), dict.fromkeys("wbx", (3, 5))],
    "the bias is zero": [whole("wx")],
    "the weight is zero": [whole("x"), whole("b")],
    "the weight is zero, in blocks": [{"b": (0, 3), "x": (0, 3)}, {"b": (3, 5), "x": (3, 5)}],
}


@pytest.mark.parametrize("arrivals", ARRIVALS.values(), ids=ARRIVALS)
@pytest.mark.parametrize("joint", JOINTS.values(), ids=JOINTS)
def test_each_sample_is_passed_on_once_however_both_arrive(arrivals, joint):
    weight, bias = both(joint, "only dense")
    given = {"w": weight, "b": bias, "x": DenseGradient(normal(COUNT, 3, seed=7))}
    taken = Taken()
    sink = JoiningSink(taken, [joint], lambda: {"x"})
    for _ in range(2):  # the engine may begin again
        sink.begin()
        for step in arrivals:
            for name in step:
                start, stop = step[name]
            parts = {
                name: DenseGradient(given[name].entries(start, stop).unflatten(1, given[name].shape)) for name in step
            }
            sink.take(start, stop, parts)
    sink.finish()
    arrived = {name for step in arrivals for name in step}
    seen = [given[name] if name in arrived else joint.zeros(name, weight) for name in "wb"]
    torch.testing.assert_close(taken.total["w"], matrices(joint, *seen).flatten(1), rtol=1e-6, atol=1e-6)
    assert taken.total.keys() == {"w", "x"} and all((each == 1).all() for each in taken.times.values())

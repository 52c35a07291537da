"""Weights whitened together with their biases, against the whole Kronecker-factored matrix of [W, b] in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D
from whitening_cases import DAMPING, damped_products, drawn_label, whitened_products

from tracer import attribute
from tracer.errors import MismatchError
from tracer.store.manifest import Manifest

N, M = 20, 3


class Net(nn.Module):
    """A layer that is tried between two that are not attributed."""

    def __init__(self, layer, forward):
        super().__init__()
        self.first, self.layer, self.last = nn.Linear(6, 8), layer, nn.Linear(6, 3)
        self.middle = forward

    def forward(self, x):
        return self.last(torch.tanh(self.middle(self.layer, torch.tanh(self.first(x)))).flatten(1))


def twins(bias):
    layers = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 6)])
    layers[1].weight = layers[0].weight
    if bias:
        layers[1].bias = layers[0].bias
    return layers


def chain(layers, x):
    for layer in layers:
        x = torch.tanh(layer(x))
    return x


JOINT = [["layer.weight", "layer.bias"]]
SINGLE = [["layer.weight"], ["layer.bias"]]
CASES = {
    "vectors": (lambda: nn.Linear(8, 6), lambda f, x: f(x), JOINT),
    "sequences": (lambda: nn.Linear(2, 6), lambda f, x: f(x.view(-1, 4, 2)).mean(1), JOINT),
    "bias frozen": (lambda: nn.Linear(8, 6), lambda f, x: f(x), SINGLE[:1]),
    "weight frozen": (lambda: nn.Linear(8, 6), lambda f, x: f(x), SINGLE[1:]),
    "convolution": (lambda: nn.Conv1d(2, 3, 3), lambda f, x: f(x.view(-1, 2, 4)), JOINT),
    "transposed weight": (lambda: Conv1D(6, 2), lambda f, x: f(x.view(-1, 4, 2)).mean(1), JOINT),
    "reused": (lambda: nn.Linear(8, 8), lambda f, x: f(torch.tanh(f(x)))[:, :6], JOINT),
    "tied": (lambda: twins(True), chain, [["layer.0.weight", "layer.0.bias"]]),
    "weights tied alone": (lambda: twins(False), chain, [["layer.0.weight"], ["layer.0.bias"], ["layer.1.bias"]]),
}


def case(name):
    torch.manual_seed(3)
    make, forward, blocks = CASES[name]
    model = Net(make(), forward).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.5)
    data = [(torch.randn(n, 6).double(), torch.randint(0, 3, (n,))) for n in (N, M)]
    return model, blocks, *data


def positions(module, x, g):
    """Yield inputs and output gradients ``[in]``, ``[out]`` of one example's call, position by position."""
    if isinstance(module, nn.Conv1d):
        for t in range(g.shape[-1]):
            yield x[0, :, t : t + module.kernel_size[0]].flatten(), g[0, :, t]
    else:
        yield from zip(x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1]), strict=True)


def terms(model, blocks, x, label):
    """Return the outer products that make up the gradient of one example's loss, of each block of parameters."""
    calls = []
    layers = [each for each in model.layer.modules() if each._parameters]
    hooks = [each.register_forward_hook(lambda *call: calls.append(call)) for each in layers]
    loss = nn.functional.cross_entropy(model(x[None]), label[None])
    for hook in hooks:
        hook.remove()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {str(block): [] for block in blocks}
    grads = torch.autograd.grad(loss, [output for _, _, output in calls])
    one = torch.ones(1, dtype=torch.float64)
    for (module, inputs, _), grad in zip(calls, grads, strict=True):
        weight, bias = names[id(module.weight)], names[id(module.bias)]
        for a, g in positions(module, inputs[0].detach(), grad):
            for block, right in (([weight, bias], torch.cat([a, one])), ([weight], a)):
                if block in blocks:
                    found[str(block)].append((right, g) if isinstance(module, Conv1D) else (g, right))
        if [bias] in blocks:
            found[str([bias])].append((one, sum(g for _, g in positions(module, inputs[0].detach(), grad))))
    return found


@pytest.mark.parametrize("kind", ["kfac", "ekfac"])
@pytest.mark.parametrize("name", CASES)
def test_scores_are_those_of_whole_matrices_of_weight_and_bias(tmp_path, name, kind):
    model, blocks, train, targets = case(name)
    options = {"params": [each for block in blocks for each in block], "projector": "none", "batch_size": 7}
    found = attribute(
        model,
        "image_classification",
        train,
        targets,
        [model.state_dict()],
        save_dir=tmp_path,
        preconditioner=kind,
        damping=DAMPING,
        **options,
    )
    drawn = [
        [terms(model, blocks, x, drawn_label(model, x, 0, row, sample)) for row, x in enumerate(train[0])]
        for sample in (0, 1)
    ]
    curvature = damped_products(*drawn, kind)
    own, others = ([terms(model, blocks, *one) for one in zip(*data, strict=True)] for data in (train, targets))
    expected = whitened_products(own, others, curvature).numpy()
    np.testing.assert_allclose(found.scores, expected, rtol=2e-4, atol=2e-5 * np.abs(expected).max())
    selves = whitened_products(own, own, curvature).diagonal()
    np.testing.assert_allclose(found.self_influence(), selves.numpy(), rtol=1e-4)


@pytest.mark.parametrize("name", ["vectors", "convolution", "transposed weight", "reused"])
@pytest.mark.parametrize("options", [{"storage": "float32", "projector": "none"}, {"projector": "factored"}])
def test_stored_features_are_of_the_model_s_own_parameters(tmp_path, name, options):
    model, _, train, targets = case(name)
    found = attribute(
        model,
        "image_classification",
        train,
        targets,
        [model.state_dict()],
        save_dir=tmp_path,
        preconditioner="ekfac",
        **options,
    )
    shapes = {each: list(parameter.shape) for each, parameter in model.named_parameters()}
    assert found.tracer.store.manifest.settings["params"] == shapes
    assert np.isfinite(found.scores).all()


def test_a_store_whitened_by_an_earlier_version_is_refused(tmp_path, monkeypatch):
    model, _, train, targets = case("vectors")
    given = model, "image_classification", train, targets, [model.state_dict()]
    with monkeypatch.context() as patch:
        entries = Manifest.__init__

        def earlier(self, settings, *others, **named):
            settings = {name: value for name, value in settings.items() if name != "curvature_version"}
            entries(self, settings, *others, **named)

        patch.setattr(Manifest, "__init__", earlier)
        attribute(*given, save_dir=tmp_path, preconditioner="kfac", proj_dim=32)
    with pytest.raises(MismatchError, match=r"curvature_version: stored nothing, asked 2\n.*another save_dir"):
        attribute(*given, save_dir=tmp_path, preconditioner="kfac", proj_dim=32)

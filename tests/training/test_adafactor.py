"""Adafactor's second moments: what the optimizers of torch and transformers divide by in a real step."""

from __future__ import annotations

import copy

import pytest
import torch
from adam_cases import dict_of, normal
from torch import nn
from transformers.optimization import Adafactor

from tracer import attribute
from tracer.errors import CheckpointError
from tracer.training.adam import read_training_checkpoint
from tracer.training.recording import CheckpointRecorder, load_checkpoints
from tracer.training.recording.snapshots import moments_state

PLAIN = {"lr": 1e-3, "scale_parameter": False, "relative_step": False, "clip_threshold": 1e9}
OPTIMIZERS = {"torch": (torch.optim.Adafactor, {"lr": 1e-3, "d": 1e9}), "transformers": (Adafactor, PLAIN)}


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv1d(2, 3, 2), nn.Flatten(), nn.Linear(9, 4), nn.Tanh(), nn.Linear(4, 2))


def step(model, optimizer, seed):
    optimizer.zero_grad()
    model(normal(5, 2, 4, seed=seed)).square().mean().backward()
    optimizer.step()


def trained(kind, groups=None, **options):
    model, (make, known) = net(), OPTIMIZERS[kind]
    optimizer = make(model.parameters() if groups is None else groups(model), **known, **options)
    for seed in range(3):
        step(model, optimizer, seed)
    return model, optimizer, {"model": copy.deepcopy(model.state_dict()), "optimizer": dict_of(optimizer)}


def names_of(model):
    return [name for name, _ in model.named_parameters()]


def sizes(kind, optimizer, before):
    """By what each update is multiplied: torch takes a parameter's root mean square times the rate."""
    rate, number = optimizer.param_groups[0]["lr"], 4
    if kind == "transformers":
        return dict.fromkeys(before, rate)
    rate = min(rate, number**-0.5)
    return {name: max(1e-3, float(value.square().mean().sqrt())) * rate for name, value in before.items()}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_step_is_the_gradient_times_the_square_of_the_scale(kind):
    model, optimizer, _ = trained(kind)
    before = copy.deepcopy(model.state_dict())
    step(model, optimizer, 3)
    whole = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    scales, factors = read_training_checkpoint(whole, model, names_of(model)).scales(), sizes(kind, optimizer, before)
    for name, parameter in model.named_parameters():
        expected = -factors[name] * parameter.grad * scales[name] ** 2
        torch.testing.assert_close(parameter.detach() - before[name], expected, rtol=1e-3, atol=2e-7)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_moments_that_are_almost_zero_have_the_floor_of_the_optimizer(kind):
    model, optimizer, _ = trained(kind)
    rows, columns = {"torch": ("row_var", "col_var"), "transformers": ("exp_avg_sq_row", "exp_avg_sq_col")}[kind]
    entry = optimizer.state[model[2].weight]
    entry[rows][0], entry[columns][..., 1:3] = 1e-30, 1e-30
    whole = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    found = read_training_checkpoint(whole, model, ["2.weight"]).moments["2.weight"].gamma()
    if kind == "torch":
        assert float(found.max()) == pytest.approx(1 / torch.finfo(torch.float32).eps)
    else:
        approximated = Adafactor._approx_sq_grad(entry[rows].double(), entry[columns].double())
        torch.testing.assert_close(found, approximated)


def by_size(model):
    parameters = list(model.parameters())
    return [{"params": [p for p in parameters if p.ndim > 1]}, {"params": [p for p in parameters if p.ndim < 2]}]


@pytest.mark.parametrize("groups", [None, by_size])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_parameters_are_assigned_by_the_shape_of_their_means(kind, groups):
    model, optimizer, whole = trained(kind, groups)
    found = read_training_checkpoint(whole, model, names_of(model)).moments
    last = "col_var" if kind == "torch" else "exp_avg_sq_col"
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            kept = optimizer.state[parameter][last]
            assert torch.equal(found[name].arrays[1], kept.squeeze(-2) if kind == "torch" else kept)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_recorded_moments_are_those_of_the_whole_state(kind):
    model, optimizer, whole = trained(kind)
    recorded = {"model": whole["model"], "optimizer": moments_state(optimizer, model)}
    scales = [read_training_checkpoint(each, model, names_of(model)).scales() for each in (whole, recorded)]
    for name in names_of(model):
        assert torch.equal(*(each[name] for each in scales))


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_fingerprints_are_those_of_the_stored_means(kind):
    model, _, whole = trained(kind)
    first = read_training_checkpoint(whole, model, names_of(model)).fingerprint()
    other = copy.deepcopy(whole)
    other["optimizer"]["state"][0]["row_var" if kind == "torch" else "exp_avg_sq_row"].mul_(2)
    assert read_training_checkpoint(other, model, names_of(model)).fingerprint() != first


def test_states_that_cannot_be_used_are_refused():
    model, _, whole = trained("torch")
    for change, message in [
        (lambda entry, group: entry.pop("col_var"), "expected 'row_var' and 'col_var', 'exp_avg_sq_row' and"),
        (lambda entry, group: group.pop("eps"), "two values of 'eps' in its group"),
        (lambda entry, group: entry.update(col_var=torch.ones(3, 1, 5)), r"are of shape \[3, 2, 5\], the parameter is"),
        (lambda entry, group: entry["row_var"].fill_(-1), "values that are NaN, infinite or negative"),
    ]:
        other = copy.deepcopy(whole)
        other["optimizer"]["param_groups"][0]["param_names"] = names_of(model)
        change(other["optimizer"]["state"][0], other["optimizer"]["param_groups"][0])
        with pytest.raises(CheckpointError, match=message):
            read_training_checkpoint(other, model, names_of(model))


def test_a_recording_of_a_run_with_adafactor_is_attributed_with_its_moments(tmp_path):
    torch.manual_seed(0)
    model, data = nn.Linear(3, 2), (normal(8, 3, seed=1), torch.tensor([0, 1] * 4))
    optimizer = torch.optim.Adafactor(model.parameters(), lr=0.01)
    with CheckpointRecorder(model, optimizer, tmp_path / "run", every=2, second_moments=True) as recorder:
        for _ in range(4):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(data[0]), data[1]).backward()
            optimizer.step()
            recorder.step()
    options = {"preconditioner": "adam", "projector": "none", "storage": "float32"}
    pairs = load_checkpoints(tmp_path / "run")[-1:]
    found = attribute(model, "image_classification", data, data, pairs, save_dir=tmp_path / "store", **options)
    gamma, rows = [], []
    for parameter in model.parameters():
        entry = optimizer.state[parameter]
        second = entry.get("variance")
        if second is None:
            second = entry["row_var"] @ entry["col_var"] / entry["row_var"].mean(0, keepdim=True)
        gamma.append(second.double().rsqrt().flatten())
    for x, y in zip(*data, strict=True):
        loss = nn.functional.cross_entropy(model(x[None]), y[None])
        rows.append(torch.cat([each.flatten() for each in torch.autograd.grad(loss, list(model.parameters()))]))
    rows = torch.stack(rows).double()
    expected = pairs[0][1] * (rows * torch.cat(gamma)) @ rows.T
    torch.testing.assert_close(torch.tensor(found.scores).double(), expected, rtol=1e-3, atol=1e-6)

"""Second moments out of training checkpoints: what torch's optimizers divide by, assigned to the right parameters."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from adam_cases import dict_of, normal
from safetensors.torch import save_file
from tied_model import TOKENS, Tied
from torch import nn

from tracer.errors import CheckpointError, InputTypeError
from tracer.training.adam import read_training_checkpoint
from tracer.training.optimizer_states import assign_parameters


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2)).double()


def names_of(model):
    return [name for name, _ in model.named_parameters()]


def step(model, optimizer, times=1):
    for number in range(times):
        optimizer.zero_grad()
        model(normal(5, 3, seed=number).double()).square().mean().backward()
        optimizer.step()


def trained(optimizer=torch.optim.AdamW, groups=None, model=None, **options):
    """A model, its optimizer after three steps, and a training checkpoint of both."""
    model = net() if model is None else model
    adam = optimizer(model.parameters() if groups is None else groups(model), **{"lr": 0.01, **options})
    step(model, adam, 3)
    return model, adam, {"model": copy.deepcopy(model.state_dict()), "optimizer": dict_of(adam)}


def assert_assigned(model, adam, whole, names=None):
    """Each parameter has the second moments that the optimizer in memory has of it."""
    names = names_of(model) if names is None else names
    found = read_training_checkpoint(whole, model, names)
    assert list(found.moments) == names
    parameters = dict(model.named_parameters())
    for name, moment in found.moments.items():
        assert torch.equal(moment.values, adam.state[parameters[name]]["exp_avg_sq"]), name


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        (torch.optim.Adam, {}),
        (torch.optim.Adam, {"amsgrad": True}),
        (torch.optim.Adam, {"betas": (0.5, 0.8), "eps": 0.03, "foreach": False}),
        (torch.optim.AdamW, {"weight_decay": 0.0, "fused": True}),
        (torch.optim.AdamW, {"weight_decay": 0.0, "amsgrad": True, "capturable": False}),
    ],
)
def test_torch_moves_along_the_first_moments_times_the_square_of_the_scale(optimizer, options):
    model, adam, _ = trained(optimizer, **options)
    before = copy.deepcopy(model.state_dict())
    group = adam.param_groups[0]
    for entry in list(adam.state.values())[:3]:
        entry.get("max_exp_avg_sq", entry["exp_avg_sq"]).mul_(4)  # or amsgrad would rarely keep another
    step(model, adam)
    scales = read_training_checkpoint(
        {"net": model.state_dict(), "opt": adam.state_dict()}, model, names_of(model)
    ).scales()
    for name, parameter in model.named_parameters():
        state = adam.state[parameter]
        first = state["exp_avg"] / (1 - group["betas"][0] ** float(state["step"]))
        expected = -group["lr"] * first * scales[name] ** 2
        torch.testing.assert_close(parameter.detach() - before[name], expected, rtol=1e-6, atol=1e-12)


def test_each_group_has_its_own_numbers():
    def groups(model):
        return [
            {"params": model[0].parameters(), "eps": 0.1},
            {"params": model[4].parameters(), "betas": (0.9, 0.5)},
        ]

    model, _, whole = trained(groups=groups)
    whole["optimizer"]["param_groups"][0]["param_names"] = ["0.weight", "0.bias"]
    whole["optimizer"]["param_groups"][1]["param_names"] = ["4.weight", "4.bias"]
    found = read_training_checkpoint(whole, model, ["0.weight", "4.bias"]).moments
    assert [(m.step, m.beta2, m.eps) for m in found.values()] == [(3.0, 0.999, 0.1), (3.0, 0.5, 1e-8)]


@pytest.mark.parametrize("keys", [("model", "optimizer"), ("state_dict", "optim"), ("weights", 3)])
@pytest.mark.parametrize("saved", [False, True])
def test_state_dicts_are_recognised_by_their_form(tmp_path, keys, saved):
    model, adam, whole = trained()
    other = nn.Linear(7, 7)
    checkpoint = {
        "epoch": 3,
        "scheduler": {"last_epoch": 3, "base_lrs": [0.1]},
        "teacher": other.state_dict(),  # which does not fit the model
        keys[0]: whole["model"],
        keys[1]: whole["optimizer"],
        "empty": {},
    }
    if saved:
        torch.save(checkpoint, tmp_path / "a.pt")
        checkpoint = tmp_path / "a.pt"
    assert_assigned(model, adam, checkpoint)
    state = read_training_checkpoint(checkpoint, model, ["0.weight"]).state
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


def test_steps_may_be_numbers_and_extra_state_is_left_out():
    model, adam, whole = trained()
    for entry in whole["optimizer"]["state"].values():
        entry["step"] = 3
    whole["model"]["0._extra_state"] = None
    assert_assigned(model, adam, whole)


def test_nothing_in_the_optimizer_or_the_model_changes():
    model, _, whole = trained()
    before = copy.deepcopy(whole)
    scales = read_training_checkpoint(whole, model, names_of(model)).scales()
    for value in scales.values():
        value.zero_()
    for entry, other in zip(whole["optimizer"]["state"].values(), before["optimizer"]["state"].values(), strict=True):
        assert all(torch.equal(entry[key], other[key]) for key in entry)


def by_decay(model):
    """The usual groups: matrices decay, vectors do not."""
    return [
        {"params": [p for p in model.parameters() if p.ndim == 2], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]


def reversed_groups(model):
    return by_decay(model)[::-1]


def named_groups(model):
    named = list(model.named_parameters())
    return [{"params": named[4:]}, {"params": named[:4]}]


def one_of_two(model):
    return [{"params": []}, {"params": model.parameters()}]


@pytest.mark.parametrize(
    "groups", [None, by_decay, reversed_groups, named_groups, one_of_two, lambda model: model.named_parameters()]
)
def test_parameters_are_assigned(groups):
    assert_assigned(*trained(groups=groups))


def test_optimizer_states_that_number_parameters_by_name():
    model, adam, whole = trained()
    names, optimizer = names_of(model), whole["optimizer"]
    optimizer["state"] = {names[number]: entry for number, entry in reversed(optimizer["state"].items())}
    optimizer["param_groups"][0]["params"] = names[::-1]
    assert_assigned(model, adam, whole)


@pytest.mark.parametrize("all_of_them", [True, False])
def test_frozen_parameters_may_be_in_the_optimizer_or_not(all_of_them):
    model = net()
    model[0].weight.requires_grad_(False)
    wanted = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    trainable = lambda model: [p for p in model.parameters() if p.requires_grad]  # noqa: E731
    assert_assigned(*trained(model=model, groups=None if all_of_them else trainable), wanted)


@pytest.mark.parametrize("name", ["embed.weight", "head.weight"])
def test_a_tied_parameter_may_have_any_of_its_names(name):
    model = Tied()
    named = [(name if key == "embed.weight" else key, p) for key, p in model.named_parameters()]
    adam = torch.optim.AdamW(named[::-1])
    model(TOKENS).square().mean().backward()
    adam.step()
    assert_assigned(model, adam, {"model": model.state_dict(), "optimizer": adam.state_dict()})


def test_scales_are_float32_at_least():
    model, _, whole = trained()
    assert read_training_checkpoint(whole, model, ["0.bias"]).scales()["0.bias"].dtype == torch.float64
    for dtype in (torch.float32, torch.bfloat16):
        found = read_training_checkpoint(whole, copy.deepcopy(model).to(dtype), ["0.bias"])
        assert found.scales()["0.bias"].dtype == torch.float32


def test_fingerprints_cover_weights_and_moments_apart():
    model, _, whole = trained()

    def parts(change=lambda whole: None):
        other = copy.deepcopy(whole)
        change(other)
        return read_training_checkpoint(other, model, names_of(model)).fingerprint().split("+")

    first = parts()
    assert parts() == first
    weights = parts(lambda other: other["model"]["0.bias"].add_(1))
    assert weights[0] != first[0] and weights[1] == first[1]
    for change in (
        lambda other: other["optimizer"]["state"][0]["exp_avg_sq"][0, 0].mul_(2),
        lambda other: other["optimizer"]["state"][0].update(step=4.0),
        lambda other: other["optimizer"]["param_groups"][0].update(betas=(0.9, 0.99)),
        lambda other: other["optimizer"]["param_groups"][0].update(eps=0.5),
    ):
        assert parts(change)[0] == first[0] and parts(change)[1] != first[1]
    assert parts(lambda other: other["optimizer"]["state"][0]["exp_avg"].mul_(2)) == first


def refused(whole, message, model=None, names=None):
    model = net() if model is None else model
    with pytest.raises(CheckpointError, match=message):
        read_training_checkpoint(whole, model, names_of(model) if names is None else names)


EXPECTED = r"preconditioner='adam' takes a training checkpoint: a mapping.*the optimizer's under another\. "
PASS = re.escape('pass {"model": model.state_dict(), "optimizer": optimizer.state_dict()}')


def test_what_is_no_training_checkpoint(tmp_path):
    _, _, whole = trained()
    missing = (
        EXPECTED + r"the checkpoint has no state dict of the optimizer \(a mapping with 'state' and 'param_groups'"
    )
    refused(whole["model"], missing + r"\), but the keys '0\.weight', .*" + PASS)
    refused({"model": whole["model"]}, missing + r"\), but the keys 'model'; ")
    refused({}, missing + r"\), but the keys none; ")
    refused({"opt": whole["optimizer"]}, r"holds no state dict: expected names to tensors, found the keys 'opt' \(dict")
    save_file(whole["model"], tmp_path / "a.safetensors")
    refused(tmp_path / "a.safetensors", r"a\.safetensors has no state.*CheckpointRecorder\(second_moments=True")
    torch.save([1], tmp_path / "a.pt")
    refused(tmp_path / "a.pt", "but a value of type list; ")
    refused(tmp_path / "b.pt", r"b\.pt does not exist")
    with pytest.raises(InputTypeError, match="expected a state dict or a path"):
        read_training_checkpoint(3, net(), [])


def test_several_state_dicts_that_could_be_meant():
    _, _, whole = trained()
    refused(
        whole | {"ema": whole["model"]},
        "several state dicts of the model, under 'model', 'ema'; choose one by checkpoint_key='model', or pass",
    )
    model, _, whole = trained()
    averaged = {name: value + 1 for name, value in whole["model"].items()}
    found = read_training_checkpoint(whole | {"ema": averaged}, model, names_of(model), key="ema")
    assert torch.equal(found.state["0.bias"], averaged["0.bias"])
    refused(whole | {"other": whole["optimizer"]}, "several state dicts of the optimizer, under 'optimizer', 'other'; ")


def test_weights_of_another_model():
    _, _, whole = trained()
    model = nn.Sequential(nn.Linear(3, 5))
    refused(whole, "key 'model': the checkpoint does not fit the model", model)


@pytest.mark.parametrize(
    ("optimizer", "options", "holds"),
    [
        (torch.optim.SGD, {}, "nothing"),
        (torch.optim.SGD, {"momentum": 0.9}, "momentum_buffer"),
        (torch.optim.Adagrad, {}, "step, sum"),
    ],
)
def test_optimizers_without_second_moments(optimizer, options, holds):
    _, _, whole = trained(optimizer, **options)
    refused(whole, f"second moments, 'exp_avg_sq', .* it holds {holds}. Expected .* with another optimizer pass")


def test_an_adam_that_never_stepped():
    model = net()
    whole = {"model": model.state_dict(), "optimizer": torch.optim.Adam(model.parameters()).state_dict()}
    refused(whole, "it holds nothing. Expected the state of Adam, AdamW or Adafactor after one step at least")


@pytest.mark.parametrize("change", [lambda state: state.pop(1), lambda state: state[1].update(step=torch.tensor(0.0))])
def test_parameters_that_never_stepped(change):
    model, _, whole = trained()
    change(whole["optimizer"]["state"])
    refused(whole, r"never stepped 1 selected parameters, which so have no second moments: '0\.bias'\. Leave them out")
    read_training_checkpoint(whole, model, ["0.weight", "4.bias"])


def test_selected_parameters_that_the_optimizer_does_not_hold():
    model, _, whole = trained(groups=lambda model: [*model.named_parameters()][2:])
    refused(whole, r"does not hold 2 selected parameters: '0\.weight', '0\.bias'; it holds '2\.weight', .*with params=")
    model, _, whole = trained(groups=lambda model: [(f"module.{name}", p) for name, p in model.named_parameters()])
    assert read_training_checkpoint(whole, model, names_of(model)).moments.keys() == {*names_of(model)}  # of DDP
    model[4].bias.requires_grad_(False)
    _, _, whole = trained(model=model, groups=lambda model: [p for p in model.parameters() if p.requires_grad])
    refused(whole, r"does not hold 1 selected parameters: '4\.bias'; it holds 7 of the model's parameters", model)


NAME = (
    r"which is which cannot be told; name them: train with torch\.optim\.AdamW\(model\.named_parameters\(\)\), or add"
)


def test_parameters_without_names_that_cannot_be_told():
    _, _, whole = trained(groups=lambda model: list(model.parameters())[2:])
    refused(whole, r"holds 6 parameters without names, the model has 8, of which 8 require a gradient: " + NAME)
    _, _, whole = trained(groups=lambda model: list(model.parameters())[::-1])
    refused(
        whole,
        r"do not fit in the model's order: '0\.weight' is \[4, 3\], the second .* 0 \[2\]; name them",
    )

    def layers(model):
        return [{"params": model[number].parameters()} for number in (4, 3, 2, 0)]

    _, _, whole = trained(groups=layers)
    refused(whole, r"more than one of them has parameters of shape \[4\]: " + NAME)
    _, _, whole = trained(groups=by_decay)
    whole["optimizer"]["state"].pop(3)
    refused(whole, r"no shape is known of its parameters 3, which never stepped: " + NAME)
    _, _, whole = trained(groups=by_decay)
    whole["optimizer"]["state"][0]["exp_avg_sq"] = torch.zeros(3, 4)
    refused(whole, r"\d of the model's parameters have shape \[\d, \d\], \d .* second moments have; pass")


def test_what_the_message_proposes_works():
    def layers(model):
        return [{"params": model[number].parameters()} for number in (4, 3, 2, 0)]

    model, adam, whole = trained(groups=layers)
    for number, group in zip((4, 3, 2, 0), whole["optimizer"]["param_groups"], strict=True):
        group["param_names"] = [f"{number}.weight", f"{number}.bias"]
    assert_assigned(model, adam, whole)
    whole["optimizer"]["param_groups"][0]["param_names"] = ["4.weight"]
    refused(whole, "has 7 'param_names' for 8 parameters: expected one each; pass optimizer")


def test_a_damaged_optimizer_state():
    _, _, whole = trained()
    whole["optimizer"]["param_groups"] = [{"lr": 0.1}]
    refused(whole, "damaged: expected a mapping with a list of 'params' as each of its 'param_groups'")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda entry, group: entry.pop("step"),
            "expected 'exp_avg_sq' and 'step' in it, and 'betas' and 'eps' in its",
        ),
        (lambda entry, group: entry.pop("exp_avg_sq"), "expected 'exp_avg_sq' and 'step' in it"),
        (lambda entry, group: group.pop("eps"), "'betas' and 'eps' in its group"),
        (lambda entry, group: group.update(amsgrad=True), "expected 'max_exp_avg_sq' and 'step' in it"),
        (lambda entry, group: group.update(betas=(0.9, 1.0)), "beta2 is 1.0 and eps is 1e-08; expected 0 <= beta2 < 1"),
        (lambda entry, group: group.update(eps=-1.0), "eps is -1.0; expected 0 <= beta2 < 1 and eps >= 0"),
        (
            lambda entry, group: entry["exp_avg_sq"].fill_(torch.nan),
            "values that are NaN, infinite or negative, or zero",
        ),
        (lambda entry, group: entry["exp_avg_sq"].fill_(-1), "values that are NaN, infinite or negative, or zero"),
        (lambda entry, group: (entry["exp_avg_sq"].zero_(), group.update(eps=0.0)), "or zero while eps is 0"),
        (lambda entry, group: entry.update(exp_avg_sq=torch.ones(4, device="meta")), "no values, or is a part of a sh"),
    ],
)
def test_moments_that_cannot_be_used(change, message):
    _, _, whole = trained()
    change(whole["optimizer"]["state"][1], whole["optimizer"]["param_groups"][0])
    refused(
        whole,
        rf"optimizer's state of '0\.bias' cannot be used: .*{message}.*saved with these weights",
        names=["0.bias"],
    )


def test_moments_of_another_shape():
    model, _, whole = trained(groups=lambda model: model.named_parameters())
    whole["optimizer"]["state"][1]["exp_avg_sq"] = torch.ones(3)
    refused(whole, r"'0\.bias' cannot be used: 'exp_avg_sq' is \[3\], the parameter is \[4\]")


def test_moments_of_zero_are_divided_by_eps():
    model, _, whole = trained()
    whole["optimizer"]["state"][1]["exp_avg_sq"] = torch.zeros(4, dtype=torch.float16)
    found = read_training_checkpoint(whole, model, ["0.bias"])
    torch.testing.assert_close(found.scales()["0.bias"], torch.full((4,), 1e4, dtype=torch.float64))


def test_an_optimizer_of_nothing_assigns_nothing():
    model = net()
    assert assign_parameters({"state": {}, "param_groups": [{"params": []}]}, model) == ({}, "none")

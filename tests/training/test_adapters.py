"""Checkpoints of adapters alone, on the base in the model; full checkpoints of the same weights are the oracle."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tracer import CheckpointError, CheckpointRecorder
from tracer.training.fit_state import fit_state
from tracer.training.load_state import load_state

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")


class Net(nn.Module):
    """An embedding, two linear layers and batch statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.hidden, self.norm = nn.Embedding(5, 4), nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 2)

    def forward(self, tokens):
        return self.head(self.norm(self.hidden(self.embed(tokens))))


CONFIGS = {
    "lora": lambda: peft.LoraConfig(target_modules=["hidden"], r=2),
    "dora": lambda: peft.LoraConfig(target_modules=["hidden"], r=2, use_dora=True, bias="lora_only"),
    "embedding": lambda: peft.LoraConfig(target_modules=["embed", "hidden"], r=2, modules_to_save=["head"]),
    "ia3": lambda: peft.IA3Config(target_modules=["hidden"], feedforward_modules=[]),
    "vera": lambda: peft.VeraConfig(target_modules=["hidden"], r=2),
}


def make(kind):
    """Return a model with adapters, and the state of another one with the same base and trained adapters."""
    torch.manual_seed(0)
    base = Net()
    model = peft.get_peft_model(copy.deepcopy(base), CONFIGS[kind]())
    trained = copy.deepcopy(model)
    with torch.no_grad():
        for value in trained.parameters():
            if value.requires_grad:
                value.add_(torch.randn_like(value))
    return model, trained


def assert_same(found, model):
    expected = model.state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("kind", CONFIGS)
def test_adapters_alone_are_put_on_the_models_base(kind, tmp_path):
    model, trained = make(kind)
    trained.save_pretrained(tmp_path)
    trainable = {name: value for name, value in trained.named_parameters() if value.requires_grad}
    short = peft.get_peft_model_state_dict(trained)
    given = [tmp_path, tmp_path / "adapter_model.safetensors", short, trained.state_dict()]
    for checkpoint in given if kind == "vera" else [*given, trainable]:  # vera has buffers of its own too
        assert_same(load_state(model, checkpoint), trained)
        assert_same(load_state(nn.DataParallel(model), checkpoint), nn.DataParallel(trained))
    assert_same(load_state(model, {f"module.{name}": value for name, value in short.items()}), trained)


def test_adapters_that_lack_a_part_are_refused():
    model, trained = make("embedding")
    short = peft.get_peft_model_state_dict(trained)
    for name in short:
        with pytest.raises(CheckpointError, match="keys are missing"):
            fit_state(model, {key: value for key, value in short.items() if key != name} | {"norm.weight": short[name]})
    lacking = dict(list(short.items())[1:])
    with pytest.raises(CheckpointError, match="1 keys are missing: 'base_model.model.*default.*To do"):
        fit_state(model, lacking)
    full = trained.state_dict()
    del full["base_model.model.norm.weight"]
    with pytest.raises(CheckpointError, match="1 keys are missing: 'base_model.model.norm.weight'"):
        fit_state(model, full)
    with pytest.raises(CheckpointError, match="keys are unexpected"):
        fit_state(Net(), short)


@pytest.mark.parametrize("kind", CONFIGS)
def test_adapters_for_a_model_without_them_are_explained(kind):
    trained = make(kind)[1]
    torch.manual_seed(0)
    for state in (trained.state_dict(), peft.get_peft_model_state_dict(trained)):
        with pytest.raises(CheckpointError, match=r"holds adapters of peft and the model has none"):
            fit_state(Net(), state)


def test_a_file_is_of_the_active_adapter():
    model, _ = make("lora")
    model.add_adapter("second", CONFIGS["lora"]())
    for name in ("default", "second"):
        model.set_adapter(name)
        short = peft.get_peft_model_state_dict(model, adapter_name=name)
        found = load_state(model, {key: value + 1 for key, value in short.items()})
        changed = {key for key, value in model.state_dict().items() if not torch.equal(value, found[key])}
        assert changed == {f"base_model.model.hidden.lora_{part}.{name}.weight" for part in "AB"}
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(CheckpointError, match="keys are missing"):
        load_state(model, short)


def test_frozen_parameters_of_a_model_without_adapters_are_no_base():
    model = Net()
    model.embed.weight.requires_grad_(False)
    state = {name: value for name, value in model.state_dict().items() if name != "embed.weight"}
    with pytest.raises(CheckpointError, match=r"missing: 'embed.weight'.*pass \{\*\*model.state_dict\(\), \*\*state\}"):
        fit_state(model, state)


def test_a_recorder_leaves_the_frozen_base_out(tmp_path):
    model, _ = make("lora")
    before = copy.deepcopy(model)
    optimizer = torch.optim.SGD([value for value in model.parameters() if value.requires_grad], lr=0.1)
    with CheckpointRecorder(model, optimizer, tmp_path, every=1) as recorder:
        for _ in range(2):
            model(torch.arange(4)).sum().backward()
            optimizer.step()
            recorder.step()
    path = recorder._recording.checkpoints[-1].path
    frozen = {name for name, value in model.named_parameters() if not value.requires_grad}
    assert frozen and load_file(path).keys() == model.state_dict().keys() - frozen
    assert_same(load_state(before, path), model)
    CheckpointRecorder(model, optimizer, tmp_path, every=1, resume=True).close()
    with torch.no_grad():
        before.base_model.model.embed.weight[0, 0] += 1
    with pytest.raises(CheckpointError, match="recorded without the frozen parameters, and the model has other values"):
        load_state(before, path)

"""Checkpoints: read without executing anything, fitted strictly, told apart by their values."""

from __future__ import annotations

import os
import pickle
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tied_model import Tied
from torch import nn

from tracer.errors import CheckpointError, InputTypeError
from tracer.training.checkpoints import read_checkpoint, weights_fingerprint
from tracer.training.fit_state import fit_state


@pytest.fixture
def model() -> Tied:
    return Tied(0).eval()


@pytest.fixture
def other() -> Tied:
    return Tied(1).eval()


def test_a_state_dict_is_returned_as_it_is(model):
    state = read_checkpoint(model.state_dict())
    assert list(state) == list(model.state_dict())
    assert state["embed.weight"].data_ptr() == model.embed.weight.data_ptr()
    assert read_checkpoint(OrderedDict(w=nn.Parameter(torch.ones(2)))).keys() == {"w"}


@pytest.mark.parametrize("name", ["a.pt", "a.pth", "a.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("kind", [str, Path])
def test_files_hold_the_same_state(tmp_path, name, kind):
    state = {"w": torch.randn(3, 2), "half": torch.randn(5).bfloat16(), "count": torch.tensor(3)}
    save = save_file if name.endswith("safetensors") else torch.save
    save(state, tmp_path / name)
    read = read_checkpoint(kind(tmp_path / name))
    assert read.keys() == state.keys() and all(torch.equal(read[key], state[key]) for key in state)
    assert all(read[key].dtype == state[key].dtype for key in state)


def test_extra_state_is_left_out():
    state = {"w": torch.ones(2), "layer._extra_state": {"any": object()}}
    assert list(read_checkpoint(state)) == ["w"]


def test_a_missing_file_and_a_directory_are_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere\.pt does not exist: check the path"):
        read_checkpoint(tmp_path / "nowhere.pt")
    with pytest.raises(CheckpointError, match="is a directory: pass the path of the file"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
@pytest.mark.parametrize("kept", [0, 1, 100, -30])
def test_a_truncated_file_is_a_checkpoint_error_with_its_cause(tmp_path, name, kept):
    path = tmp_path / name
    (save_file if name.endswith("safetensors") else torch.save)({"w": torch.randn(100)}, path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=f"{name} cannot be read as") as caught:
        read_checkpoint(path)
    assert caught.value.__cause__ is not None


def test_a_file_of_something_else_is_a_checkpoint_error(tmp_path):
    for name in ("a.pt", "a.safetensors"):
        (tmp_path / name).write_text("just some text, long enough to be looked at " * 10)
        with pytest.raises(CheckpointError, match="cannot be read as"):
            read_checkpoint(tmp_path / name)


class Malicious:
    """Unpickling this makes a directory."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("legacy", [True, False])
def test_code_in_a_file_is_never_executed(tmp_path, legacy):
    value = {"w": torch.ones(2), "x": Malicious(tmp_path / "executed")}
    path = tmp_path / "a.pt"
    if legacy:
        path.write_bytes(pickle.dumps(Malicious(tmp_path / "executed"), protocol=2))
    else:
        torch.save(value, path)
    with pytest.raises(CheckpointError, match="never executed here"):
        read_checkpoint(path)
    assert not (tmp_path / "executed").exists()
    torch.load(path, weights_only=False) if not legacy else pickle.loads(path.read_bytes())
    assert (tmp_path / "executed").exists(), "the file was harmless, so the test showed nothing"


def test_a_module_in_a_file_is_refused(tmp_path, model):
    torch.save(nn.Linear(2, 2), tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="load it yourself and pass the state dict"):
        read_checkpoint(tmp_path / "a.pt")


def test_a_training_checkpoint_shows_the_call_that_works(tmp_path, model):
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    whole = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3}
    with pytest.raises(CheckpointError, match=r"keys 'model', 'optimizer', 'epoch'.*pass `checkpoint\['model'\]`"):
        read_checkpoint(whole)
    assert read_checkpoint(whole["model"]).keys() == model.state_dict().keys()
    torch.save({"epoch": 3, "state_dict": model.state_dict()}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(tmp_path / "a.pt")
    call = str(caught.value).split("`")[1]
    assert read_checkpoint(eval(call, {"torch": torch})).keys() == model.state_dict().keys()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({}, "found nothing among the keys none"),
        ({"w": 3.0, "b": torch.ones(1)}, r"found 'w' \(float\) among the keys 'w', 'b'"),
        ({"w": np.ones(3)}, r"'w' \(ndarray\)"),
        ({1: torch.ones(1)}, r"found 1 \(Tensor\)"),
        ({"w": torch.ones(1, device="meta")}, "on the meta device: 'w'"),
    ],
)
def test_what_is_no_state_dict_is_named(value, text):
    with pytest.raises(CheckpointError, match=text):
        read_checkpoint(value)


def test_a_file_with_a_list_is_no_state_dict(tmp_path):
    torch.save([torch.ones(1)], tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"a\.pt holds a value of type list: expected a state dict"):
        read_checkpoint(tmp_path / "a.pt")


def test_other_types_show_the_call_that_works(model):
    with pytest.raises(InputTypeError, match=r"is a module: expected its state dict; pass `model\.state_dict\(\)`"):
        read_checkpoint(model)
    for value in (None, 3, b"a.pt", [1]):
        with pytest.raises(InputTypeError, match=f"of type {type(value).__name__}: expected a state dict or a path"):
            read_checkpoint(value)


def test_a_fitting_state_comes_in_the_models_order_and_dtypes(model, other):
    state = dict(reversed(other.bfloat16().state_dict().items()))
    fitted = fit_state(model, {**state, "_extra_state": torch.ones(1)})
    assert list(fitted) == list(model.state_dict())
    assert fitted["embed.weight"].dtype == torch.float32
    assert fitted["norm.num_batches_tracked"].dtype == torch.int64
    assert torch.equal(fitted["scale"], other.scale.float())
    assert not any(value.requires_grad for value in fitted.values())


def test_differing_keys_and_shapes_are_all_named(model):
    state = dict(model.state_dict())
    del state["scale"], state["norm.bias"]
    state.update({f"extra{i}": torch.ones(1) for i in range(8)}, **{"head.bias": torch.ones(9)})
    with pytest.raises(CheckpointError) as caught:
        fit_state(model, state)
    text = str(caught.value)
    assert "2 keys are missing: 'scale', 'norm.bias'" in text or "2 keys are missing: 'norm.bias', 'scale'" in text
    assert "8 keys are unexpected: 'extra0'" in text and "'extra5', … (2 more)" in text
    assert "1 tensors do not fit: 'head.bias' is [9], the model has [7]" in text
    assert "build the model as it was trained" in text


def test_a_kind_of_dtype_that_would_lose_values_is_refused(model):
    state = {**model.state_dict(), "norm.num_batches_tracked": torch.tensor(0.5)}
    with pytest.raises(
        CheckpointError, match=r"'norm.num_batches_tracked' is torch.float32, the model has torch.int64"
    ):
        fit_state(model, state)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "_orig_mod.module."])
def test_a_prefix_of_the_checkpoint_is_explained_by_a_call_that_works(model, prefix):
    state = {prefix + key: value for key, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=f"keys of the checkpoint begin with '{prefix}'; pass") as caught:
        fit_state(model, state)
    call = str(caught.value).split("; pass ")[1]
    assert fit_state(model, eval(call, {"state": state})).keys() == model.state_dict().keys()
    with pytest.raises(CheckpointError, match="begin with") as caught:
        fit_state(model, {**state, "loss.weight": torch.ones(1)})
    call = str(caught.value).split("; pass ")[1]
    assert fit_state(model, eval(call, {"state": state})).keys() == model.state_dict().keys()


def test_a_prefix_of_the_model_is_explained_by_a_call_that_works(model):
    state, wrapped = model.state_dict(), nn.Sequential(OrderedDict(module=model))
    with pytest.raises(CheckpointError, match="keys of the model begin with 'module.'; pass") as caught:
        fit_state(wrapped, state)
    call = str(caught.value).split("; pass ")[1]
    assert fit_state(wrapped, eval(call, {"state": state})).keys() == wrapped.state_dict().keys()


def test_a_tied_key_may_be_missing_but_not_differ(model, other):
    state = dict(other.state_dict())
    del state["head.weight"]
    assert torch.equal(fit_state(model, state)["head.weight"], other.embed.weight)
    with pytest.raises(CheckpointError, match="ties 'embed.weight' and 'head.weight', the checkpoint has different"):
        fit_state(model, {**state, "head.weight": torch.ones(7, 4)})
    with pytest.raises(CheckpointError, match="2 keys are missing: 'embed.weight', 'head.weight'"):
        fit_state(model, {key: value for key, value in state.items() if key != "embed.weight"})


def test_a_lazy_model_needs_a_forward_pass_first():
    with pytest.raises(CheckpointError, match="without a shape: 'weight', 'bias'; run one forward pass"):
        fit_state(nn.LazyLinear(3), {"weight": torch.ones(3, 2), "bias": torch.ones(3)})


def test_the_fingerprint_is_of_values_not_of_how_they_lie():
    state = {"w": torch.arange(12.0).reshape(3, 4), "b": torch.tensor(1)}
    same = {"b": torch.tensor(1), "w": nn.Parameter(torch.arange(12.0).reshape(3, 4).t().contiguous().t())}
    assert weights_fingerprint(state) == weights_fingerprint(same)
    assert weights_fingerprint(state) == "771c6ea83e11ceaaecdb3ba2c45ccbb2"


def test_the_fingerprint_sees_names_dtypes_shapes_and_values():
    states = [
        {"w": torch.zeros(4)},
        {"v": torch.zeros(4)},
        {"w": torch.zeros(2, 2)},
        {"w": torch.zeros(4, dtype=torch.float64)},
        {"w": torch.zeros(8, dtype=torch.bfloat16)},
        {"w": torch.zeros(8, dtype=torch.float16)},
        {"w": -torch.zeros(4)},
        {"w": torch.zeros(0)},
        {"w": torch.zeros(4), "v": torch.zeros(0)},
        {"w": torch.zeros(4, dtype=torch.bool)},
        {"w": torch.zeros(2, dtype=torch.complex64)},
        {},
    ]
    assert len({weights_fingerprint(state) for state in states}) == len(states)


def test_the_fingerprint_resolves_lazy_conjugates():
    value = torch.tensor([1 + 2j])
    assert weights_fingerprint({"w": value.conj()}) == weights_fingerprint({"w": torch.tensor([1 - 2j])})

"""Checkpoints: read without executing anything, fitted strictly, told apart by their values."""

from __future__ import annotations

import argparse
import copy
import json
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

from tracer.errors import CheckpointError, InputError, InputTypeError
from tracer.training.checkpoint_paths import checkpoints_at
from tracer.training.checkpoints import read_source, weights_fingerprint
from tracer.training.fit_state import fit_state
from tracer.training.load_state import check_headers, load_state


@pytest.fixture
def model() -> Tied:
    return Tied(0).eval()


@pytest.fixture
def other() -> Tied:
    return Tied(1).eval()


def assert_same(state, expected) -> None:
    assert list(state) == list(expected)
    assert all(torch.equal(state[key], expected[key]) for key in state)


def test_a_state_dict_is_returned_as_it_is(model):
    state = load_state(model, model.state_dict())
    assert list(state) == list(model.state_dict())
    assert state["embed.weight"].data_ptr() == model.embed.weight.data_ptr()
    ones = OrderedDict(weight=nn.Parameter(torch.ones(2, 2)), bias=torch.ones(2))
    assert load_state(nn.Linear(2, 2), ones).keys() == ones.keys()


@pytest.mark.parametrize("name", ["a.pt", "a.pth", "a.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("kind", [str, Path])
def test_files_hold_the_same_state(tmp_path, name, kind):
    state = {"w": torch.randn(3, 2), "half": torch.randn(5).bfloat16(), "count": torch.tensor(3)}
    save = save_file if name.endswith("safetensors") else torch.save
    save(state, tmp_path / name)
    read = read_source(kind(tmp_path / name)).value
    assert read.keys() == state.keys() and all(torch.equal(read[key], state[key]) for key in state)
    assert all(read[key].dtype == state[key].dtype for key in state)


def test_extra_state_is_left_out():
    state = {"weight": torch.ones(2, 2), "bias": torch.ones(2), "layer._extra_state": {"any": object()}}
    assert list(load_state(nn.Linear(2, 2), state)) == ["weight", "bias"]


def test_a_missing_file_and_a_directory_are_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere\.pt does not exist: check the path"):
        read_source(tmp_path / "nowhere.pt")
    with pytest.raises(CheckpointError, match=r"is a directory: expected one .*model\.safetensors.* path of the file"):
        read_source(tmp_path)


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
@pytest.mark.parametrize("kept", [0, 1, 100, -30])
def test_a_truncated_file_is_a_checkpoint_error_with_its_cause(tmp_path, name, kept):
    path = tmp_path / name
    (save_file if name.endswith("safetensors") else torch.save)({"w": torch.randn(100)}, path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=f"{name} cannot be read as") as caught:
        read_source(path)
    assert caught.value.__cause__ is not None


def test_a_file_of_something_else_is_a_checkpoint_error(tmp_path):
    for name in ("a.pt", "a.safetensors"):
        (tmp_path / name).write_text("just some text, long enough to be looked at " * 10)
        with pytest.raises(CheckpointError, match="cannot be read as"):
            read_source(tmp_path / name)


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
        read_source(path)
    assert not (tmp_path / "executed").exists()
    torch.load(path, weights_only=False) if not legacy else pickle.loads(path.read_bytes())
    assert (tmp_path / "executed").exists(), "the file was harmless, so the test showed nothing"


def test_a_module_in_a_file_is_refused(tmp_path, model):
    torch.save(nn.Linear(2, 2), tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="load it yourself and pass the state dict"):
        read_source(tmp_path / "a.pt")


def test_the_state_dict_in_a_training_checkpoint_is_found(tmp_path, model, other):
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    model(torch.tensor([0, 3])).sum().backward()
    optimizer.step()
    whole = {"loss": torch.tensor(0.5), "epoch": 3, "model_state_dict": other.state_dict()}
    whole["optimizer"] = optimizer.state_dict()
    torch.save({**whole, "args": argparse.Namespace(lr=0.1)}, tmp_path / "a.pt")
    for checkpoint in (whole, {"fabric": whole}, tmp_path / "a.pt"):
        assert_same(load_state(model, checkpoint), other.state_dict())
        assert_same(load_state(model, checkpoint, key=None), other.state_dict())


def test_of_two_state_dicts_that_fit_the_key_chooses(model, other):
    both = {"model": model.state_dict(), "ema": {"module": other.state_dict()}}
    with pytest.raises(CheckpointError, match=r"several.*under 'model', 'ema\.module'; choose one by checkpoint_key="):
        load_state(model, both)
    assert_same(load_state(model, both, "ema"), other.state_dict())
    assert_same(load_state(model, both, "ema.module"), other.state_dict())
    with pytest.raises(CheckpointError, match="key 'emma', does not exist: expected .* there are 'model', 'ema'"):
        load_state(model, both, "emma")


def test_a_key_may_be_the_prefix_of_the_models_names(model, other):
    named = {f"net.{key}": value for key, value in other.state_dict().items()}
    lightning = {"state_dict": {**named, "loss.weight": torch.ones(2)}}
    with pytest.raises(CheckpointError, match=r"1 keys are unexpected: 'loss.weight'.*checkpoint_key='net'"):
        load_state(model, lightning)
    for key in ("net", "state_dict.net"):
        assert_same(load_state(model, lightning if "." in key else lightning["state_dict"], key), other.state_dict())


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({}, "found the keys none"),
        ({"w": np.ones(3)}, r"found the keys 'w' \(ndarray\)"),
        ({1: torch.ones(1)}, "found the keys 1;"),
        ({"weight": torch.ones(1, 1), "bias": 3.0}, r"'bias' is of type float, the model has \[1\]"),
        ({"weight": torch.ones(1, 1), "bias": torch.ones(1), "epoch": 3}, r"unexpected: 'epoch' \(int\)"),
        ({"weight": torch.ones(1, 1), 1: torch.ones(1)}, "unexpected: '1'"),
        ({"weight": torch.ones(1, 1), "bias": torch.ones(1, device="meta")}, "on the meta device: 'bias'"),
    ],
)
def test_what_is_no_state_dict_is_named(value, text):
    with pytest.raises(CheckpointError, match=text):
        load_state(nn.Linear(1, 1), value)


def test_a_file_with_a_list_is_no_state_dict(tmp_path):
    torch.save([torch.ones(1)], tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"a\.pt holds no state dict: .* found a value of type list"):
        load_state(nn.Linear(1, 1), tmp_path / "a.pt")


def test_other_types_show_the_call_that_works(model):
    with pytest.raises(InputTypeError, match=r"is a module: expected its state dict; pass `model\.state_dict\(\)`"):
        read_source(model)
    for value in (None, 3, b"a.pt", [1]):
        with pytest.raises(InputTypeError, match=f"of type {type(value).__name__}: expected a state dict or a path"):
            read_source(value)


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


WRAPPED = {
    "DDP": lambda key: f"module.{key}",
    "torch.compile": lambda key: f"_orig_mod.{key}",
    "both": lambda key: f"_orig_mod.module.{key}",
    "Lightning": lambda key: f"model.{key}",
    "Lightning and torch.compile": lambda key: f"model._orig_mod.{key}",
    "peft": lambda key: f"base_model.model.{key}",
    "FSDP inside": lambda key: f"_fsdp_wrapped_module.{key.replace('.', '._fsdp_wrapped_module._orig_mod.')}",
    "checkpointing inside": lambda key: key.replace(".", "._checkpoint_wrapped_module."),
}


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
def test_the_names_of_wrappers_may_be_on_either_side(model, other, wrap):
    state = other.state_dict()
    wrapped = {wrap(key): value for key, value in state.items()}
    assert_same(fit_state(model, wrapped), state)

    class Renamed(nn.Module):
        def state_dict(self, *args, **kwargs):
            return {wrap(key): value for key, value in model.state_dict(*args, **kwargs).items()}

        def named_parameters(self, *args, **kwargs):
            return [(wrap(key), value) for key, value in model.named_parameters(*args, **kwargs)]

        def named_buffers(self, *args, **kwargs):
            return [(wrap(key), value) for key, value in model.named_buffers(*args, **kwargs)]

    assert_same(fit_state(Renamed(), state), wrapped)
    assert_same(fit_state(Renamed(), {f"module.{key}": value for key, value in state.items()}), wrapped)
    missing = dict(list(wrapped.items())[1:])
    with pytest.raises(CheckpointError, match="1 keys are missing: 'scale'"):
        fit_state(model, missing)
    with pytest.raises(CheckpointError, match="1 keys are unexpected: 'loss.weight'"):
        fit_state(model, {**wrapped, "loss.weight": torch.ones(1)})


def test_wrappers_around_parts_of_a_model_are_no_difference():
    plain, wrapped = (nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)) for _ in range(2))
    wrapped[0], wrapped[2] = torch.compile(wrapped[0]), nn.DataParallel(wrapped[2])
    assert_same(dict(enumerate(fit_state(wrapped, plain.state_dict()).values())), dict(enumerate(plain.parameters())))
    assert_same(fit_state(plain, torch.compile(wrapped).state_dict()), fit_state(plain, wrapped.state_dict()))


def test_other_names_are_no_wrappers(model):
    state = {f"teacher.{key}": value for key, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match="keys are missing: 'student"):
        fit_state(nn.ModuleDict({"student": model}), state)


def test_a_renaming_that_could_mean_two_things_is_refused():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.module = nn.Parameter(torch.ones(2)), nn.Linear(1, 2, bias=False)

    model = Two()
    state = {"weight": torch.zeros(2), "module.weight": torch.ones(2, 1)}
    assert_same(fit_state(model, state), state)  # equal names are no question
    assert_same(fit_state(model, {f"net.{key}": value for key, value in state.items()}), state)
    with pytest.raises(CheckpointError, match="does not fit"):
        fit_state(model, {"_orig_mod.weight": torch.zeros(2), "a._orig_mod.module.weight": torch.ones(2, 1)})


def test_legacy_names_are_those_that_the_models_own_hooks_know():
    norm = nn.utils.parametrizations.weight_norm
    model, other = (nn.Sequential(norm(nn.Linear(2, 3)), nn.BatchNorm1d(3)) for _ in range(2))
    state = other.state_dict()
    direction = "0.parametrizations.weight.original"
    old = {key: value for key, value in state.items() if "param" not in key and "num_batches" not in key}
    old |= {"0.weight_g": state[f"{direction}0"], "0.weight_v": state[f"{direction}1"]}
    before = [*map(id, model.parameters()), *map(id, model.modules())]
    assert_same(fit_state(model, {f"module.{key}": value for key, value in old.items()}), state)
    assert [*map(id, model.parameters()), *map(id, model.modules())] == before
    del old["0.weight_g"]
    with pytest.raises(CheckpointError, match="missing.*original0"):
        fit_state(model, old)


def test_entries_that_cannot_be_lent_must_be_the_models_own():
    class Packed(nn.Linear):
        def _save_to_state_dict(self, destination, prefix, keep_vars):
            super()._save_to_state_dict(destination, prefix, keep_vars)
            destination[prefix + "packed"] = self.packed
            destination[prefix + "factor"] = torch.tensor(2.0)

    model = Packed(2, 2)
    model.packed = (torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), None, torch.qint8)
    model.register_buffer("mask", torch.ones(2), persistent=False)
    state = copy.deepcopy(model.state_dict())
    assert fit_state(model, {**state, "mask": torch.ones(2)}).keys() == {"weight", "bias", "factor"}
    other = (torch.quantize_per_tensor(torch.zeros(3), 0.1, 0, torch.qint8), None, torch.qint8)
    for changed in ({"packed": other}, {"factor": torch.tensor(3.0)}, {"mask": torch.zeros(2)}):
        with pytest.raises(CheckpointError, match=f"another value of '{next(iter(changed))}'.* cannot be exchanged"):
            fit_state(model, {**state, **changed})
    del state["packed"]
    with pytest.raises(CheckpointError, match=r"missing: 'packed' \(tuple\)"):
        fit_state(model, state)


def sharded(directory, state, end):
    names = [f"{end[1:]}-{number}{end}" for number in range(2)]
    parts = [dict(list(state.items())[:3]), dict(list(state.items())[3:])]
    for name, part in zip(names, parts, strict=True):
        (save_file if end == ".safetensors" else torch.save)(part, directory / name)
    weight_map = {key: name for name, part in zip(names, parts, strict=True) for key in part}
    stem = "model" if end == ".safetensors" else "pytorch_model"
    index = directory / f"{stem}{end}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index, names


@pytest.mark.parametrize("end", [".safetensors", ".bin"])
def test_directories_of_hugging_face_are_checkpoints(tmp_path, end, model, other):
    state = {key: value.clone() for key, value in other.state_dict().items() if key != "head.weight"}
    index, names = sharded(tmp_path, state, end)
    torch.save({"state": {}, "param_groups": []}, tmp_path / "optimizer.pt")
    assert_same(load_state(model, tmp_path), other.state_dict())
    assert_same(load_state(model, index), other.state_dict())
    (tmp_path / names[1]).unlink()
    with pytest.raises(CheckpointError, match=f"names files that do not exist: {names[1]}"):
        load_state(model, tmp_path)
    index.write_text(json.dumps({"weight_map": {"w": "../elsewhere.safetensors"}}))
    with pytest.raises(CheckpointError, match="is no index of weights .*elsewhere"):
        load_state(model, tmp_path)
    torch.save(state, tmp_path / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"found .*adapter_model\.bin.*pass the path of the file"):
        load_state(model, tmp_path)


def test_headers_are_compared_without_values(tmp_path, model, other):
    torch.save({"step": 1, "model": other.state_dict()}, tmp_path / "a.pt")
    check_headers(model, tmp_path / "a.pt")
    torch.save({"step": 1, "model": {**other.state_dict(), "scale": torch.ones(9)}}, tmp_path / "b.pt")
    with pytest.raises(CheckpointError, match=r"b\.pt, key 'model': .*'scale' is \[9\], the model has \[4\]"):
        check_headers(model, tmp_path / "b.pt")


def test_a_folder_holds_checkpoints_files_or_is_one(tmp_path, model):
    for name in ("checkpoint-10", "checkpoint-9", "notes"):
        (tmp_path / name).mkdir()
    for name in ("checkpoint-9/model.safetensors", "checkpoint-10/adapter_model.safetensors"):
        save_file({"w": torch.ones(1)}, tmp_path / name)
    torch.save({}, tmp_path / "checkpoint-9" / "optimizer.pt")
    expected = [(tmp_path / "checkpoint-9", None), (tmp_path / "checkpoint-10", None)]
    assert checkpoints_at(tmp_path) == checkpoints_at(str(tmp_path / "checkpoint-*")) == expected
    assert checkpoints_at(tmp_path / "checkpoint-9") == expected[:1]
    save_file({"w": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"weights of its own, 'model\.safetensors', and checkpoints in it, 'ch"):
        checkpoints_at(tmp_path)
    for name in ("e2.safetensors", "e2.optimizer.pt", "e10.ckpt", "readme.txt"):
        (tmp_path / "notes" / name).touch()
    assert [path.name for path, _ in checkpoints_at(tmp_path / "notes")] == ["e2.safetensors", "e10.ckpt"]


def test_keys_that_the_model_has_no_use_for_are_left_out_by_the_call_in_the_error(model, other):
    state = {**other.state_dict(), "total_ops": torch.zeros(1)}
    with pytest.raises(CheckpointError, match="1 keys are unexpected: 'total_ops'.*pass {") as caught:
        fit_state(model, state)
    call = str(caught.value).split("; else")[0].split("pass ")[1]
    assert_same(fit_state(model, eval(call, {"state": state, "model": model})), other.state_dict())


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


@pytest.mark.parametrize("value", [torch.randn(3, 5)[:, 1][:1], torch.randn(4, 3).T[:1, :1], torch.randn(0, 3).T])
def test_the_fingerprint_of_one_element_with_any_stride_is_that_of_its_copy(value):
    assert weights_fingerprint({"a": value}) == weights_fingerprint(
        {"a": torch.tensor(value.tolist()).view(value.shape)}
    )


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

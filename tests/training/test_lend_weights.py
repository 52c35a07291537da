"""Weights lent to a model: inside it computes with the checkpoint, behind it nothing has changed."""

from __future__ import annotations

import logging

import pytest
import torch
from tied_model import Tied
from torch import Tensor, nn

from tracer.errors import CheckpointError
from tracer.training.checkpoints import weights_fingerprint
from tracer.training.fit_state import fit_state
from tracer.training.lend_weights import LoadedWeights, weights_in

TOKENS = torch.tensor([0, 3, 6, 3])


@pytest.fixture
def model() -> Tied:
    return Tied(0).eval()


@pytest.fixture
def other() -> Tied:
    return Tied(1).eval()


def load(model: nn.Module, state: dict[str, Tensor], device: str | None = None) -> LoadedWeights:
    return LoadedWeights(model, fit_state(model, state), device)


def everything(model: nn.Module) -> list[tuple[str, int, int, Tensor]]:
    """Identity, address and values of all parameters and buffers."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return [(name, id(value), value.data_ptr(), value.detach().clone()) for name, value in named]


def assert_unchanged(model: nn.Module, before: list[tuple[str, int, int, Tensor]]) -> None:
    after = everything(model)
    assert [row[:3] for row in after] == [row[:3] for row in before]
    assert all(torch.equal(left[3], right[3]) for left, right in zip(after, before, strict=True))


def test_a_model_computes_with_the_checkpoint_inside_only(model, other):
    before, own = everything(model), model(TOKENS)
    loaded = load(model, other.state_dict())
    other.mask.copy_(model.mask)  # no checkpoint holds it: it follows the model
    for _ in range(2):
        with weights_in(model, loaded) as inside:
            assert inside is model
            assert torch.equal(model(TOKENS), other(TOKENS))
            assert [row[:2] for row in everything(model)] == [row[:2] for row in before]
            assert model.head.weight is model.embed.weight
            assert model.head.weight.data_ptr() != before[0][2]
        assert_unchanged(model, before)
        assert torch.equal(model(TOKENS), own)


def test_gradients_inside_are_the_checkpoints(model, other):
    loaded = load(model, {**other.state_dict()})
    other.mask.copy_(model.mask)
    with weights_in(model, loaded):
        inside = torch.autograd.grad(model(TOKENS).sum(), list(model.parameters()))
    outside = torch.autograd.grad(other(TOKENS).sum(), list(other.parameters()))
    assert all(torch.equal(left, right) for left, right in zip(inside, outside, strict=True))


def test_the_model_is_put_back_after_an_exception(model, other):
    before = everything(model)
    with pytest.raises(KeyError), weights_in(model, load(model, other.state_dict())):
        raise KeyError
    assert_unchanged(model, before)


def test_the_model_is_put_back_when_entering_fails_halfway(model, other):
    before = everything(model)
    loaded = load(model, other.state_dict())
    loaded.parameters["head.bias"] = "no tensor"  # type: ignore[assignment]
    with pytest.raises(TypeError), weights_in(model, loaded):
        pass
    assert_unchanged(model, before)


def test_loaded_weights_share_no_memory_with_the_model_or_the_state(model):
    before = everything(model)
    state = model.state_dict()
    loaded = load(model, state)
    with torch.no_grad():
        for value in state.values():
            value.zero_()
    changed = everything(model)
    with weights_in(model, loaded):
        assert torch.equal(model.embed.weight, before[0][3])
    assert_unchanged(model, changed)


def test_buffers_changed_in_place_are_put_back_and_do_not_leak(model, other):
    model.norm.train()
    before = everything(model)
    loaded = load(model, other.state_dict())
    outputs = []
    for _ in range(2):
        with weights_in(model, loaded):
            model(TOKENS)
            model.mask.add_(1)
            outputs.append((model.norm.running_mean.clone(), int(model.norm.num_batches_tracked), model.mask.clone()))
    assert_unchanged(model, before)
    assert torch.equal(outputs[0][0], outputs[1][0]) and outputs[0][1] == outputs[1][1] == 1
    assert torch.equal(outputs[0][2], outputs[1][2])


def test_what_a_forward_replaces_adds_or_removes_is_put_back(model, other):
    before, names = everything(model), [name for name, _ in model.named_buffers()]
    with weights_in(model, load(model, other.state_dict())):
        model.scale = torch.zeros(9)
        model.mask = None
        model.norm.running_mean = torch.ones(4)
        model.head.weight = nn.Parameter(torch.ones(7, 4))
        model.register_buffer("cache", torch.ones(3), persistent=False)
        model.register_buffer("nothing", torch.ones(1))
        del model.head.bias
    assert_unchanged(model, before)
    assert [name for name, _ in model.named_buffers()] == names and model.nothing is None
    assert "mask" not in model.state_dict() and "cache" not in model._non_persistent_buffers_set
    assert model.head.weight is model.embed.weight


def test_gradients_of_the_model_stay(model, other):
    model(TOKENS).sum().backward()
    grads = [(value.grad, value.grad.clone()) for value in model.parameters()]
    with weights_in(model, load(model, other.state_dict())):
        assert all(value.grad is None for value in model.parameters())
        model(TOKENS).sum().backward()
    for value, (grad, values) in zip(model.parameters(), grads, strict=True):
        assert value.grad is grad and torch.equal(grad, values)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_scripted_parts_compute_with_the_checkpoint_and_are_put_back():
    part = torch.jit.script(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).eval())
    model, other = nn.Sequential(part, nn.Linear(2, 2)), nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).eval()
    other = nn.Sequential(other, nn.Linear(2, 2))
    before, x = everything(model), torch.randn(3, 2)
    with weights_in(model, load(model, other.state_dict())):
        torch.testing.assert_close(model(x), other(x))
    assert_unchanged(model, before)


def test_values_are_put_back_whatever_else_fails(model, other):
    before = everything(model)
    with pytest.raises(AttributeError), weights_in(model, load(model, other.state_dict())):
        model.norm._parameters = model.embed._buffers = None
        raise KeyError
    values = {name: value for name, _, _, value in before}
    assert model.embed.weight.equal(values["embed.weight"]) and model.scale.equal(values["scale"])


def test_blocks_nest(model, other):
    before = everything(model)
    third = Tied(2).eval()
    first, second = load(model, other.state_dict()), load(model, third.state_dict())
    with weights_in(model, first):
        with weights_in(model, second):
            assert torch.equal(model.head.bias, third.head.bias)
        assert torch.equal(model.head.bias, other.head.bias)
    assert_unchanged(model, before)


def test_a_parameter_changed_in_place_is_named_once_left(model, other, caplog):
    before = everything(model)
    loaded = load(model, other.state_dict())
    with caplog.at_level(logging.WARNING, logger="tracer"), weights_in(model, loaded):
        model(TOKENS)
    assert not caplog.records
    with caplog.at_level(logging.WARNING, logger="tracer"), weights_in(model, loaded), torch.no_grad():
        model.head.bias.add_(1)
    assert "changed in place while a checkpoint was in use: head.bias" in caplog.text
    assert_unchanged(model, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_values_are_cast_to_the_models_dtype(model, other, dtype):
    model.to(dtype)
    before = everything(model)
    with weights_in(model, load(model, other.state_dict())):
        assert model.head.weight.dtype == dtype
        assert torch.equal(model.head.weight, other.head.weight.to(dtype))
    assert_unchanged(model, before)


def test_frozen_parameters_and_those_made_by_expansion_work():
    model = nn.Linear(3, 3)
    model.weight.requires_grad_(False)
    state = {"weight": torch.ones(1).expand(3, 3), "bias": torch.ones(6)[::2]}
    with weights_in(model, load(model, state)):
        assert model(torch.ones(1, 3)).tolist() == [[4.0] * 3] and not model.weight.requires_grad


def test_weights_of_another_model_are_refused(model):
    loaded = load(nn.Linear(2, 2), nn.Linear(2, 2).state_dict())
    with pytest.raises(CheckpointError, match="loaded for another model"), weights_in(model, loaded):
        pass
    with pytest.raises(CheckpointError, match="does not fit the model"):
        load(model, nn.Linear(2, 2).state_dict())


def test_parameters_that_a_model_keeps_out_of_its_state_are_refused():
    class Hidden(nn.Linear):
        def state_dict(self, *args, **kwargs):
            state = super().state_dict(*args, **kwargs)
            del state["bias"]
            return state

    with pytest.raises(CheckpointError, match="leaves out parameters, which no checkpoint can set: 'bias'"):
        load(Hidden(2, 2), {"weight": torch.ones(2, 2)})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_model_on_the_cpu_computes_on_the_gpu_inside(model, other):
    before = everything(model)
    model(TOKENS).sum().backward()
    loaded = load(model, other.state_dict(), "cuda")
    other.mask.copy_(model.mask)
    with weights_in(model, loaded):
        assert {value.device.type for value in [*model.parameters(), *model.buffers()]} == {"cuda"}
        torch.testing.assert_close(model(TOKENS.cuda()).cpu(), other(TOKENS))
        assert weights_fingerprint(model.state_dict()) == weights_fingerprint(other.state_dict())
    assert_unchanged(model, before)
    assert all(value.grad.device.type == "cpu" for value in model.parameters())

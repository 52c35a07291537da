"""Models with state in objects of their own, nested tensors, reentrant checkpoints, and recurrent layers on GPUs."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from function_net import Net, loss
from torch import nn
from torch.utils.checkpoint import checkpoint

import tracer
from tracer import Tracer
from tracer.gradients import isolated
from tracer.gradients.module_state import ModuleState

CPU = torch.device("cpu")


def run(model, batches, folder):
    traced = Tracer(model, loss, 4 * len(batches), folder, projector="none", storage="float32")
    traced.load_checkpoint(model.state_dict(), model_id=0)
    for number, batch in enumerate(batches):
        traced.featurize(batch, inds=torch.arange(4 * number, 4 * number + 4))
    traced.finalize_features()
    return traced


def plain(count, dtype=torch.float64):
    return [(torch.randn(4, 3, dtype=dtype), torch.arange(4)) for _ in range(count)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("period", [1, 2, 3, 5, 7, 11, 13])
def test_a_count_of_forwards_kept_outside_the_model_is_refused(tmp_path, period, dtype):
    torch.manual_seed(0)
    calls = []

    def forward(model, x):
        calls.append(1)
        return model.o(torch.tanh(model.h(x))) * (1 + len(calls) // period)

    with pytest.raises(tracer.GradientError, match="keeps state between calls"):
        run(Net(forward).to(dtype), plain(8, dtype), tmp_path / "store")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_random_numbers_in_eval_mode_are_named_whatever_the_dtype(tmp_path, dtype):
    torch.manual_seed(0)

    def forward(model, x):
        return model.o(F.dropout(torch.tanh(model.h(x)), 0.3))

    with pytest.raises(tracer.GradientError, match="draws random numbers"):
        run(Net(forward).to(dtype), plain(4, dtype), tmp_path / "store")


@pytest.mark.parametrize("way", ["forces", "hook"])
def test_forwards_that_need_autograd_are_exact(tmp_path, way):
    torch.manual_seed(0)

    def forward(model, x):
        if way == "hook":
            hidden = model.h(x)
            hidden.register_hook(lambda gradient: 3 * gradient)
            return model.o(torch.tanh(hidden))
        x = x.clone().requires_grad_()
        return model.o(F.pad(torch.autograd.grad(torch.tanh(model.h(x)).sum(), x, create_graph=True)[0], (0, 2)))

    (batch,) = plain(1)
    model = Net(forward).double()
    found = run(model, [batch], tmp_path / "store").self_influence()
    for row in range(4):
        model.zero_grad()
        loss(model, (batch[0][[row]], batch[1][[row]])).sum().backward()
        expected = sum(float(each.grad.square().sum()) for each in model.parameters() if each.grad is not None)
        assert found[row] == pytest.approx(expected, rel=1e-5)


def test_layers_that_run_on_nested_tensors_are_exact(tmp_path):
    torch.manual_seed(0)

    def forward(model, x, lengths):
        rows = [row[:length] for row, length in zip(x, lengths.tolist(), strict=True)]
        nested = torch.nested.as_nested_tensor(rows, layout=torch.jagged)
        return model.o(torch.nested.to_padded_tensor(torch.tanh(model.h(nested)), 0.0).sum(1))

    model = Net(forward).double()
    batches = [(torch.randn(4, 6, 3).double(), torch.randint(1, 7, (4,)), torch.arange(4)) for _ in range(3)]
    with run(model, batches, tmp_path / "store").store.checkpoint(0) as table:
        ((_, found),) = table.raw_features(0, 12)
    for row, values in enumerate(found):
        one = [leaf[row % 4 : row % 4 + 1] for leaf in batches[row // 4]]
        expected = torch.autograd.grad(loss(model, one).sum(), list(model.parameters()))
        torch.testing.assert_close(
            torch.tensor(values).double(), torch.cat([grad.flatten() for grad in expected]), rtol=1e-5, atol=1e-6
        )


def test_reentrant_checkpoints_are_refused_with_what_to_do(tmp_path):
    def forward(model, x):
        return model.o(checkpoint(lambda h: torch.tanh(model.g(h)), model.h(x), use_reentrant=True))

    with pytest.raises(tracer.GradientError, match="use_reentrant=False"):
        run(Net(forward, g=nn.Linear(5, 5)).double(), plain(1), tmp_path / "store")


@pytest.fixture
def cudnn():
    before = torch.backends.cudnn.enabled
    torch.backends.cudnn.enabled = True
    yield torch.backends.cudnn
    torch.backends.cudnn.enabled = before


def test_only_recurrent_layers_run_without_cudnn(cudnn):
    seen = {}

    class Watched(nn.GRU):
        def forward(self, x):
            seen["recurrent"] = cudnn.enabled
            if x.isnan().any():
                raise FloatingPointError
            return super().forward(x)

    model = nn.Sequential(Watched(3, 4))
    model.register_forward_hook(lambda *_: seen.update(other=cudnn.enabled))
    with isolated(model, {name for name, _ in model.named_parameters()}, CPU):
        model(torch.zeros(2, 5, 3))
        assert seen == {"recurrent": False, "other": True}
        with pytest.raises(FloatingPointError):
            model(torch.full((2, 5, 3), torch.nan))
        assert cudnn.enabled
    model(torch.zeros(2, 5, 3))
    assert seen["recurrent"]
    assert "forward" not in model[0].__dict__


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: cuDNN has no backward in eval mode")
def test_gradients_of_recurrent_layers_on_a_gpu_are_those_on_the_cpu(tmp_path):
    torch.manual_seed(0)
    model = Net(lambda model, x: model.o(model.r(x)[0][:, -1]), r=nn.LSTM(3, 5, batch_first=True))
    batch = torch.randn(4, 6, 3), torch.arange(4)
    rows = []
    for device in ("cpu", "cuda"):
        traced = run(model.to(device), [tuple(leaf.to(device) for leaf in batch)], tmp_path / device)
        with traced.store.checkpoint(0) as table:
            rows.append(torch.from_numpy(next(iter(table.raw_features(0, 4)))[1]))
    torch.testing.assert_close(rows[1], rows[0], rtol=1e-3, atol=1e-4)


def _count(model):
    model.number += 1


def _rename(model):
    model.other = model.__dict__.pop("number")


def _append(model):
    model.kept["list"].append(1)


def _replace_in_set(model):
    model.kept["set"].clear()
    model.kept["set"].add("another")


def _write(model):
    model.kept["tensor"].add_(1)


def _set_in_object(model):
    model.space.value = 2


@pytest.mark.parametrize("change", [_count, _rename, _append, _replace_in_set, _write, _set_in_object])
def test_what_a_forward_changes_in_a_model_is_put_back(change):
    model = nn.Linear(2, 2)
    model.number, model.space = 1, SimpleNamespace(value=1)
    model.kept = {"list": [], "set": {"one"}, "tensor": torch.zeros(2)}
    state = ModuleState(model)
    assert not state.restore()
    change(model)
    assert state.restore() and not state.restore()
    assert model.number == 1 and not hasattr(model, "other") and model.space.value == 1
    assert model.kept["list"] == [] and model.kept["set"] == {"one"} and not model.kept["tensor"].any()

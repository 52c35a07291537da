"""Adapters on packed weights, held as bitsandbytes, torchao, optimum-quanto and HQQ hold them."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from store_cases import stored_features
from torch import Tensor, nn

from tracer import CheckpointError, GradientError, InputError, Tracer
from tracer.gradients.module_state import ModuleState
from tracer.training.fit_state import fit_state
from tracer.training.lend_weights import LoadedWeights, weights_in

N, BLOCK = 8, 4


class Scales:
    """The absolute largest values of blocks of weights, rounded to 8 bits, and their offset."""

    def __init__(self, absmax: Tensor, largest: Tensor, offset: Tensor) -> None:
        self.absmax, self.largest, self.offset = absmax, largest, offset
        self.reversed = False

    def unpack(self, packed: Tensor, dtype: torch.dtype) -> Tensor:
        assert self.absmax is not None and self.largest is not None and self.offset is not None, "reads other memory"
        codes = torch.stack([packed >> 4, packed & 15], -1).reshape(-1, BLOCK)
        codes = codes.flip(0) if self.reversed else codes
        scales = self.absmax.to(dtype) / 255 * self.largest.to(dtype) + self.offset.to(dtype)
        return (codes.to(dtype) / 7.5 - 1) * scales[:, None]


class PackedWeight(nn.Parameter):
    """Two weights in a byte."""


class PackedProduct(torch.autograd.Function):
    """A function of the old style, which ``torch.func`` cannot run."""

    @staticmethod
    def forward(ctx, x, packed, scales, shape):
        ctx.weight = scales.unpack(packed, x.dtype).view(shape)
        return F.linear(x, ctx.weight)

    @staticmethod
    def backward(ctx, grad):
        return grad @ ctx.weight, None, None, None


class PackedLinear(nn.Module):
    """A linear layer that keeps the scales with the parameter until its first forward, and then itself."""

    def __init__(self, shape: tuple[int, int], compute: torch.dtype | None = None) -> None:
        super().__init__()
        self.shape, self.compute, self.scales = shape, compute, None
        blocks = shape[0] * shape[1] // BLOCK
        self.weight = PackedWeight(torch.randint(0, 256, (2 * blocks, 1), dtype=torch.uint8), requires_grad=False)
        self.weight.scales = Scales(torch.randint(99, 256, (blocks,)).byte(), torch.rand(1) + 1, torch.rand(()))

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        scales = self.scales or self.weight.scales
        destination[f"{prefix}weight.absmax"], destination[f"{prefix}weight.largest"] = scales.absmax, scales.largest

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        return (self.scales or self.weight.scales).unpack(self.weight.data, dtype).view(self.shape)

    def forward(self, x):
        if self.weight.scales is not None:
            self.scales, self.weight.scales = self.weight.scales, None
        if not x.requires_grad and not self.scales.reversed:  # other kernels, which take another order
            codes = self.weight.data.view(-1, BLOCK // 2)
            self.weight.data, self.scales.reversed = codes.flip(0).reshape(-1, 1), True
        return PackedProduct.apply(x.to(self.compute or x.dtype), self.weight, self.scales, self.shape).to(x.dtype)


class Adapted(nn.Module):
    """A linear layer with a low-rank adapter."""

    def __init__(self, base: nn.Module, shape: tuple[int, int]) -> None:
        super().__init__()
        self.base, self.a, self.b = base, nn.Linear(shape[1], 2, bias=False), nn.Linear(2, shape[0], bias=False)

    def forward(self, x):
        return self.base(x) + self.b(self.a(x))


def make(compute: torch.dtype | None = None) -> tuple[nn.Sequential, nn.Sequential]:
    """Return a model with adapters on packed weights, and one on the same weights dequantized."""
    torch.manual_seed(0)
    shapes = [(8, 4), (4, 8)]
    packed = nn.Sequential(*(Adapted(PackedLinear(shape, compute), shape) for shape in shapes)).double()
    plain = nn.Sequential(*(Adapted(nn.Linear(*shape[::-1], bias=False), shape) for shape in shapes)).double()
    for one, other in zip(packed, plain, strict=True):
        other.base.weight = nn.Parameter(one.base.dequantized(torch.float64), requires_grad=False)
        other.a, other.b = one.a, one.b
    return packed, plain


def adapters(model: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in model.state_dict().items() if ".base." not in name}


def check_gradients(traced, plain, x, y, tolerance=1e-6):
    """Compare what was captured and stored with autograd's gradients of each example on a model of plain weights."""
    assert not traced._session.featurizer.engine.fallback and not traced._session.featurizer.engine.raw
    traced.flush()
    table = traced.store.checkpoint(0)
    found = stored_features(table, 0, N) * np.array(table.column("loss_grad"))[:, None]
    weights = [value for value in plain.parameters() if value.requires_grad]
    for row in range(N):
        loss = F.cross_entropy(plain(x[row : row + 1]), y[row : row + 1])
        one = torch.cat([each.reshape(-1) for each in torch.autograd.grad(loss, weights)]).numpy()
        assert np.linalg.norm(found[row] - one) < tolerance * np.linalg.norm(one)


@pytest.mark.parametrize("compute", [None, torch.bfloat16])
@pytest.mark.parametrize("was_run", [False, True])
def test_gradients_are_those_on_the_dequantized_weights(tmp_path, was_run, compute):
    model, plain = make(compute)
    x, y = torch.randn(N, 4, dtype=torch.float64), torch.arange(N) % 4
    if was_run:
        model(x)
    expected = model(x.requires_grad_()).detach()
    held = [(id(each), each.data_ptr()) for each in model.parameters()]
    traced = Tracer(model, "image_classification", N, tmp_path / "store", projector="none", storage="float32")
    traced.load_checkpoint(model.state_dict(), model_id=0)
    for rows in torch.arange(N).split(3):
        traced.featurize((x.detach()[rows], y[rows]), inds=rows)
    check_gradients(traced, plain, x.detach(), y, 1e-6 if compute is None else 0.05)
    assert held == [(id(each), each.data_ptr()) for each in model.parameters()]
    assert torch.equal(model(x), expected)


class Composed(Tensor):
    """Weights made of 8-bit numbers and scales, which knows no functions but those below."""

    @staticmethod
    def __new__(cls, codes, scales):
        return Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scales.dtype)

    def __init__(self, codes, scales):
        self.codes, self.scales = codes, scales

    def __tensor_flatten__(self):
        return ["codes", "scales"], None

    @classmethod
    def __tensor_unflatten__(cls, inner, context, size, stride):
        return cls(inner["codes"], inner["scales"])

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is F.linear:
            return ComposedProduct.apply(args[0], args[1].codes, args[1].scales)
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return cls(args[0].codes, args[0].scales)
        raise NotImplementedError(function)


class ComposedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, codes, scales):
        ctx.weight = codes * scales[:, None]
        return F.linear(x, ctx.weight)

    @staticmethod
    def backward(ctx, grad):
        return grad @ ctx.weight, None, None


class InParts(nn.Linear):
    """A linear layer whose state dict has the parts of its weight, as optimum-quanto's has."""

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        destination[f"{prefix}weight.codes"], destination[f"{prefix}weight.scales"] = (
            self.weight.codes,
            self.weight.scales,
        )


@pytest.mark.parametrize("kind", [nn.Linear, InParts])
def test_adapters_on_weights_made_of_other_tensors(tmp_path, kind):
    torch.manual_seed(0)
    model, plain = nn.Sequential(), nn.Sequential()
    for shape in [(8, 4), (4, 8)]:
        codes, scales = torch.randint(-99, 99, shape, dtype=torch.int8), torch.rand(shape[0], dtype=torch.float64) / 99
        base, dense = kind(*shape[::-1], bias=False), nn.Linear(*shape[::-1], bias=False)
        base.weight = nn.Parameter(Composed(codes, scales), requires_grad=False)
        dense.weight = nn.Parameter(codes * scales[:, None], requires_grad=False)
        model.append(Adapted(base, shape))
        plain.append(Adapted(dense, shape))
        for one in (model[-1].a, model[-1].b):
            one.double()
        plain[-1].a, plain[-1].b = model[-1].a, model[-1].b
    x, y = torch.randn(N, 4, dtype=torch.float64), torch.arange(N) % 4
    held = [
        (id(each), each.codes.clone(), each.scales.clone()) for each in (model[0].base.weight, model[1].base.weight)
    ]
    traced = Tracer(model, "image_classification", N, tmp_path / "store", projector="none", storage="float32")
    traced.load_checkpoint(model.state_dict(), model_id=0)
    for rows in torch.arange(N).split(3):
        traced.featurize((x[rows], y[rows]), inds=rows)
    check_gradients(traced, plain, x, y)
    for (address, codes, scales), layer in zip(held, model, strict=True):
        weight = layer.base.weight
        assert address == id(weight) and torch.equal(weight.codes, codes) and torch.equal(weight.scales, scales)
    changed = {key: value for key, value in model.state_dict().items()}
    key = next(iter(changed))
    changed[key] = (
        Composed(1 - model[0].base.weight.codes, model[0].base.weight.scales) if kind is nn.Linear else 1 - changed[key]
    )
    with pytest.raises(CheckpointError, match="another value of '0.base.weight.*packed weight"):
        fit_state(model, changed)
    model[0].base.weight.requires_grad_()
    with pytest.raises(InputError, match=r"plain tensors, got '0.base.weight' \(Composed\)"):
        Tracer(model, "image_classification", N, tmp_path / "other")


def test_layers_whose_scales_were_made_in_inference_mode(tmp_path):
    model, _ = make()
    with torch.inference_mode():
        model[0].base.offset = torch.zeros(3, dtype=torch.float64)
    x, y = torch.randn(N, 4, dtype=torch.float64), torch.arange(N) % 4
    traced = Tracer(model, "image_classification", N, tmp_path / "store", proj_dim=16)
    traced.load_checkpoint(model.state_dict(), model_id=0)
    traced.featurize((x, y), num_samples=N)
    assert not traced._session.featurizer.engine.fallback


@pytest.mark.parametrize(("threshold", "size"), [(6.0, 2), (6.0, 1), (0.0, 2)])
def test_columns_that_a_batch_chooses_are_refused_unless_examples_come_one_by_one(
    tmp_path, monkeypatch, threshold, size
):
    model, _ = make()
    monkeypatch.setattr(PackedLinear, "__module__", "bitsandbytes.nn.modules")
    model[1].base.state = SimpleNamespace(threshold=threshold)
    x, y = torch.randn(N, 4, dtype=torch.float64), torch.arange(N) % 4
    traced = Tracer(model, "image_classification", N, tmp_path / "store", proj_dim=16)
    traced.load_checkpoint(model.state_dict(), model_id=0)
    if threshold and size > 1:
        with pytest.raises(GradientError, match=r"1\.base .*exceeds 6.0.*llm_int8_threshold=0.0.*batch_size=1"):
            traced.featurize((x[:size], y[:size]), num_samples=size)
    else:
        traced.featurize((x[:size], y[:size]), num_samples=size)


def test_adapters_alone_fit_and_other_packed_weights_are_refused():
    model, _ = make()
    own = fit_state(model, model.state_dict())
    changed = {name: value.clone() for name, value in model.state_dict().items()}
    changed["0.base.weight"][0] ^= 1
    with pytest.raises(CheckpointError, match="another value of '0.base.weight'.*packed weight of integers"):
        fit_state(model, changed)
    loaded = LoadedWeights(model, own)
    assert loaded.parameters.keys() == adapters(model).keys()  # the base is not copied
    before = model[0].base.weight.data_ptr()
    with weights_in(model, loaded):
        assert model[0].base.weight.data_ptr() == before


def test_what_a_forward_does_to_packed_weights_is_put_back():
    model, _ = make()
    scales, values = model[0].base.weight.scales, model[0].base.weight.data.clone()
    state = ModuleState(model)
    with torch.no_grad():
        model(torch.zeros(1, 4, dtype=torch.float64))
    assert scales.reversed and model[0].base.scales is scales and not torch.equal(model[0].base.weight, values)
    assert state.restore() and not state.restore()
    assert not scales.reversed and model[0].base.scales is None and model[0].base.weight.scales is scales
    assert torch.equal(model[0].base.weight, values)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_layers_of_bitsandbytes_are_exact(tmp_path, kind):
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    parts = []
    for shape in [(64, 4), (4, 64)]:
        if kind == "int8":
            base = bnb.nn.Linear8bitLt(*shape[::-1], bias=False, has_fp16_weights=False)
        else:
            base = bnb.nn.Linear4bit(*shape[::-1], bias=False, quant_type="nf4", compute_dtype=torch.float32)
        parts.append(Adapted(base, shape))
    model = nn.Sequential(*parts).to("cpu")
    x, y = torch.randn(N, 4), torch.arange(N) % 4
    traced = Tracer(model, "image_classification", N, tmp_path / "store", projector="none", storage="float32")
    traced.load_checkpoint(model.state_dict(), model_id=0)
    traced.featurize((x, y), inds=torch.arange(N))
    assert not traced._session.featurizer.engine.fallback
    traced.flush()
    table = traced.store.checkpoint(0)
    found = stored_features(table, 0, N) * np.array(table.column("loss_grad"))[:, None]
    weights = [value for value in model.eval().parameters() if value.requires_grad]
    for row in range(N):
        loss = F.cross_entropy(model(x[row : row + 1]), y[row : row + 1])
        one = torch.cat([each.reshape(-1) for each in torch.autograd.grad(loss, weights)]).numpy()
        assert np.linalg.norm(found[row] - one) < 1e-3 * np.linalg.norm(one)

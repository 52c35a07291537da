"""Token-level scores meet a loop of autograd over single tokens in float64, and sum up to the exact scores."""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections import namedtuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tracer import (
    BatchError,
    GradientError,
    InputError,
    InputTypeError,
    LanguageModeling,
    NonFiniteError,
    SampleOutputs,
    Task,
    attribute,
    token_influence,
)
from tracer.api import token_influence as token_module
from tracer.api import token_parts

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop", "ignore:.*jit.script")
VOCABULARY = 13


class TinyDecoder(nn.Module):
    """Embedding, causal self-attention with torch's fused kernels, an MLP and a head tied to the embedding."""

    def __init__(self, dim=8):
        super().__init__()
        self.embed, self.position = nn.Embedding(VOCABULARY, dim), nn.Embedding(16, dim)
        self.block = nn.TransformerEncoderLayer(dim, 2, 16, dropout=0.1, batch_first=True, norm_first=True)
        self.head = nn.Linear(dim, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        hidden = self.embed(x) + self.position(torch.arange(x.shape[1]))
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=hidden.dtype)
        return self.head(self.block(hidden, src_mask=mask, is_causal=True))


class Recurrent(nn.Module):
    def __init__(self, kind=nn.LSTM):
        super().__init__()
        self.embed, self.layer, self.head = nn.Embedding(VOCABULARY, 6), kind(6, 6, batch_first=True), nn.Linear(6, 13)

    def forward(self, x):
        return self.head(self.layer(self.embed(x))[0])


class _Exponential(torch.autograd.Function):
    """A custom operation without a forward-mode formula."""

    @staticmethod
    def forward(ctx, x):
        result = x.exp()
        ctx.save_for_backward(result)
        return result

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.saved_tensors[0]


class _OnceOnly(_Exponential):
    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return gradient * ctx.saved_tensors[0]


class WithFunction(nn.Module):
    def __init__(self, function=_Exponential):
        super().__init__()
        self.embed, self.head, self.function = nn.Embedding(VOCABULARY, 6), nn.Linear(6, 13), function

    def forward(self, x):
        return self.head(self.function.apply(self.embed(x)))


MODELS = {"decoder": TinyDecoder, "lstm": Recurrent, "gru": lambda: Recurrent(nn.GRU), "no formula": WithFunction}


def make(name="decoder", dtype=torch.float64):
    torch.manual_seed(0)
    return MODELS[name]().to(dtype)


def checkpoints_of(model, count=2):
    """States that differ, with learning rates."""
    found = []
    for number in range(count):
        state = {key: value + 0.1 * number * torch.randn_like(value) for key, value in model.state_dict().items()}
        if "head.weight" in state and state["head.weight"].shape == state["embed.weight"].shape:
            state["head.weight"] = state["embed.weight"]
        found.append((state, 0.1 / (number + 1)))
    return found


def rows_of(count, length=6, seed=1):
    return torch.randint(0, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(seed))


def oracle(model, checkpoints, train, targets, reduction="mean", names=None):
    """``[M, B, T]``: autograd of each token's loss alone; rows are (tokens, labels), -100 not counted."""
    model = copy.deepcopy(model).eval()
    parameters = [p for name, p in model.named_parameters() if names is None or name in names]

    def gradient(loss):
        grads = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)
        return torch.cat(
            [(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(parameters, grads, strict=True)]
        )

    def token_losses(row):
        x, y = row
        count = int((y != -100).sum()) if reduction == "mean" else 1
        log_p = model(x[None])[0].log_softmax(-1)
        return [-log_p[t, y[t]] / count if y[t] != -100 else None for t in range(len(y))]

    found = torch.zeros(len(targets[0]), len(train[0]), train[0].shape[1], dtype=torch.float64)
    for state, rate in checkpoints:
        model.load_state_dict(state)
        for m, target in enumerate(zip(*targets, strict=True)):
            direction = gradient(sum(loss for loss in token_losses(target) if loss is not None))
            for b, row in enumerate(zip(*train, strict=True)):
                for t, loss in enumerate(token_losses(row)):
                    if loss is not None:
                        found[m, b, t] += rate * gradient(loss) @ direction
    return found.numpy()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_parts_are_those_of_each_tokens_own_gradient(name, reduction):
    model, x, z = make(name), rows_of(3, 7), rows_of(2, 6, seed=2)
    checkpoints = checkpoints_of(model)
    train, targets = (x[:, :-1], x[:, 1:].clone()), (z[:, :-1], z[:, 1:])
    train[1][0, 2:4] = -100  # tokens that are not predicted
    found = token_influence(model, LanguageModeling(reduction), train, targets, checkpoints)
    expected = oracle(model, checkpoints, train, targets, reduction)
    assert found.dtype == np.float64
    assert (found[:, 0, 2:4] == 0).all()
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12 * np.abs(expected).max())


def test_shifted_parts_stand_at_the_token_that_is_predicted():
    model, x, z = make(), rows_of(3), rows_of(2, seed=2)
    checkpoints = checkpoints_of(model)
    pairs = token_influence(model, "language_modeling", (x[:, :-1], x[:, 1:]), (z[:, :-1], z[:, 1:]), checkpoints)
    found = token_influence(model, "language_modeling", x, z, checkpoints)
    assert found.shape == (2, 3, 6)
    assert (found[..., 0] == 0).all()
    np.testing.assert_allclose(found[..., 1:], pairs, rtol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_parts_sum_up_to_the_exact_scores(tmp_path, dtype):
    model = make(dtype=dtype)
    checkpoints, x, z = checkpoints_of(model), rows_of(5), rows_of(3, seed=2)
    exact = attribute(model, "language_modeling", [x], [z], checkpoints, save_dir=tmp_path, projector="none").scores
    found = token_influence(model, "language_modeling", x, z, checkpoints).sum(2).T
    np.testing.assert_allclose(found, exact, atol=1e-5 * np.abs(exact).max(), rtol=0)


def test_without_learning_rates_all_checkpoints_weigh_one(tmp_path):
    model, x = make(), rows_of(4)
    checkpoints = [state for state, _ in checkpoints_of(model)]
    exact = attribute(model, "language_modeling", [x], [x[:2]], checkpoints, save_dir=tmp_path, projector="none").scores
    found = token_influence(model, "language_modeling", x, x[:2], checkpoints).sum(2).T
    np.testing.assert_allclose(found, exact, atol=1e-5 * np.abs(exact).max(), rtol=0)


def test_only_chosen_parameters_count():
    model, x, z = make("gru"), rows_of(3, 7), rows_of(2, 6, seed=2)
    checkpoints, names = checkpoints_of(model), ["head.weight", "head.bias"]
    train, targets = (x[:, :-1], x[:, 1:]), (z[:, :-1], z[:, 1:])
    found = token_influence(model, "language_modeling", train, targets, checkpoints, params="head")
    np.testing.assert_allclose(found, oracle(model, checkpoints, train, targets, names=names), rtol=1e-9)


def test_a_parameter_that_is_not_used_has_no_part():
    model, x = make("gru"), rows_of(2)
    model.unused = nn.Linear(2, 2).double()
    state = model.state_dict()
    assert (token_influence(model, "language_modeling", x, x, [(state, 1.0)], params="unused") == 0).all()


def test_adams_moments_scale_both_sides(tmp_path):
    model, x, z = make(dtype=torch.float32), rows_of(4), rows_of(2, seed=2)
    optimizer = torch.optim.Adam(model.named_parameters(), lr=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model(x[:, :-1]).transpose(1, 2), x[:, 1:]).backward()
        optimizer.step()
    checkpoint = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    options = {"checkpoints": [(checkpoint, 0.1)], "preconditioner": "adam"}
    exact = attribute(model, "language_modeling", [x], [z], **options, save_dir=tmp_path, projector="none").scores
    found = token_influence(model, "language_modeling", x, z, **options).sum(2).T
    np.testing.assert_allclose(found, exact, atol=1e-5 * np.abs(exact).max(), rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_of_a_hugging_face_model_has_no_part(tmp_path, side):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
    mask = torch.ones(3, 8, dtype=torch.long)
    mask[1, 5:] = mask[2, 3:] = 0
    batch = {"input_ids": rows_of(3, 8), "attention_mask": mask.flip(1) if side == "left" else mask}
    checkpoints = [(model.state_dict(), 0.5)]
    found = token_influence(model, "language_modeling", batch, batch, checkpoints)
    assert (found[:, batch["attention_mask"] == 0] == 0).all()
    predicted = batch["attention_mask"].cumsum(1) * batch["attention_mask"] > 1
    assert (found[:, predicted] != 0).all()
    options = {"save_dir": tmp_path, "projector": "none"}
    exact = attribute(model, "language_modeling", [batch], [batch], checkpoints, **options).scores
    np.testing.assert_allclose(found.sum(2).T, exact, atol=1e-5 * np.abs(exact).max(), rtol=0)


_Named = namedtuple("_Named", ["hidden", "logits"])


@dataclasses.dataclass(frozen=True)
class _Fields:
    logits: torch.Tensor


class _Object:
    def __init__(self, logits):
        self.logits = logits


@pytest.mark.parametrize(
    "wrap",
    [lambda z: (z, 1), lambda z: {"logits": z, "n": 1}, lambda z: _Named(1, z), _Fields, _Object],
    ids=["tuple", "mapping", "named tuple", "dataclass", "object"],
)
def test_logits_are_found_in_any_output(wrap):
    model, x = make("gru"), rows_of(2)
    expected = token_influence(model, "language_modeling", x, x, [(model.state_dict(), 1.0)])
    wrapped = make("gru")
    plain = wrapped.forward
    wrapped.forward = lambda x: wrap(plain(x))
    found = token_influence(wrapped, "language_modeling", x, x, [(model.state_dict(), 1.0)])
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def weighted(model, batch):
    """A loss that is no language model's: errors of numbers, later positions count more."""
    x, y = batch
    errors = (model(x) - y).square().mean(2)
    return (errors * torch.arange(1, x.shape[1] + 1)).sum(1)


def test_any_loss_of_logits_is_split_by_position(tmp_path):
    model, x = make("gru"), rows_of(3)
    y = torch.randn(3, 6, VOCABULARY, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    checkpoints = checkpoints_of(model)
    found = token_influence(model, weighted, (x, y), (x[:2], y[:2]), checkpoints)
    options = {"save_dir": tmp_path, "projector": "none"}
    exact = attribute(model, weighted, [(x, y)], [(x[:2], y[:2])], checkpoints, **options).scores
    np.testing.assert_allclose(found.sum(2).T, exact, atol=1e-5 * np.abs(exact).max(), rtol=0)


class Squared(Task):
    """A loss that is no multiple of its output: L = f² / 2, Q = f."""

    name = "squared"

    def outputs(self, model, batch):
        output = weighted(model, batch)
        value = output.detach()
        return SampleOutputs(output, value.square() / 2, value, torch.ones_like(value))


def test_slopes_of_both_sides_count(tmp_path):
    model, x = make("gru"), rows_of(3)
    y = torch.randn(3, 6, VOCABULARY, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    checkpoints = checkpoints_of(model)
    found = token_influence(model, Squared(), (x, y), (x[:2], y[:2]), checkpoints)
    options = {"save_dir": tmp_path, "projector": "none"}
    exact = attribute(model, Squared(), [(x, y)], [(x[:2], y[:2])], checkpoints, **options).scores
    np.testing.assert_allclose(found.sum(2).T, exact, atol=1e-5 * np.abs(exact).max(), rtol=0)


def test_the_model_is_left_as_found():
    model, x = make(), rows_of(2)
    model.train()
    model.embed.weight.requires_grad_(False)
    model.head.weight = model.embed.weight
    before, random, checkpoints = copy.deepcopy(model.state_dict()), torch.get_rng_state(), checkpoints_of(model)
    torch.set_rng_state(random)
    token_influence(model, "language_modeling", x, x, checkpoints)
    assert torch.equal(random, torch.get_rng_state())
    assert torch.backends.mha.get_fastpath_enabled()
    assert torch.backends.cuda.flash_sdp_enabled()
    assert model.training
    assert model.block.training
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["embed.weight"]
    assert not model._forward_hooks
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_it_runs_under_no_grad_and_inference_mode():
    model, x = make("gru"), rows_of(2)
    checkpoints = checkpoints_of(model)
    expected = token_influence(model, "language_modeling", x, x, checkpoints)
    with torch.no_grad():
        np.testing.assert_array_equal(token_influence(model, "language_modeling", x, x, checkpoints), expected)
    with torch.inference_mode():
        np.testing.assert_array_equal(token_influence(model, "language_modeling", x, x, checkpoints), expected)


def test_the_way_without_a_formula_is_logged_once(caplog, monkeypatch):
    monkeypatch.setattr(token_parts, "_SEEN", set())
    model, x = make("no formula"), rows_of(2)
    with caplog.at_level(logging.INFO, logger="tracer"):
        token_influence(model, "language_modeling", x, x, checkpoints_of(model))
    assert [record.message.partition(" (")[0] for record in caplog.records] == ["no forward-mode derivative"]


@pytest.mark.parametrize("name", ["decoder", "lstm", "gru"])
def test_fused_kernels_make_way_for_forward_mode(name, caplog, monkeypatch):
    monkeypatch.setattr(token_parts, "_SEEN", set())
    model, x = make(name, torch.float32), rows_of(2)
    with caplog.at_level(logging.INFO, logger="tracer"):
        token_influence(model, "language_modeling", x, x, checkpoints_of(model))
    assert not caplog.records


def test_an_operation_without_any_second_derivative_is_refused():
    model, x = WithFunction(_OnceOnly), rows_of(2)
    with pytest.raises(GradientError, match="neither in forward mode nor twice: .*attn_implementation='eager'"):
        token_influence(model, "language_modeling", x, x, [(model.state_dict(), 1.0)])


def penalized(model, batch):
    loss = F.cross_entropy(model(batch)[:, :-1].transpose(1, 2), batch[:, 1:], reduction="none").mean(1)
    return loss + 0.1 * model.head.weight.square().sum()


@pytest.mark.parametrize("name", ["decoder", "no formula"])
def test_a_loss_beside_the_logits_is_refused(name):
    model, x = make(name), rows_of(2)
    with pytest.raises(GradientError, match="'callable' has a loss that does not come from the logits alone"):
        token_influence(model, penalized, x, x, [(model.state_dict(), 1.0)])


class Wide(nn.Module):
    """A model of any vocabulary, large logits, and optionally an operation without a forward-mode formula."""

    def __init__(self, vocabulary, seed, with_function):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.embed = nn.Parameter(torch.randn(vocabulary, 16, generator=generator) / 2)
        self.head = nn.Linear(16, vocabulary, bias=False)
        self.head.weight = nn.Parameter(3 * torch.randn(vocabulary, 16, generator=generator))
        self.with_function = with_function

    def forward(self, x):
        hidden = self.embed[x]
        return self.head(_Exponential.apply(hidden) if self.with_function else hidden.exp())


def wide_rows(vocabulary, seed):
    return torch.randint(0, vocabulary, (2, 12), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("seed", range(3))
def test_a_gpt2_of_its_whole_vocabulary_is_split(seed):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    sizes = {"vocab_size": 50257, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 2}
    settings = transformers.GPT2Config(**sizes, initializer_range=0.5, bos_token_id=0, eos_token_id=0)
    model = transformers.GPT2LMHeadModel(settings).eval()
    ids, mask = torch.randint(0, 50257, (4, 48)), torch.ones(4, 48, dtype=torch.long)
    mask[0, :10] = 0
    batch, target = ({"input_ids": ids[:n], "attention_mask": mask[:n]} for n in (4, 1))
    found = token_influence(model, "language_modeling", batch, target, [model.state_dict()])
    model.double()
    exact = token_influence(model, "language_modeling", batch, target, [model.state_dict()])
    np.testing.assert_allclose(found, exact, rtol=0, atol=1e-3 * np.abs(exact).max())  # the model's rounding


@pytest.mark.parametrize("with_function", [False, True], ids=["forward", "twice"])
@pytest.mark.parametrize("vocabulary", [50, 50257])
def test_plain_losses_pass_and_slight_penalties_do_not(vocabulary, with_function):
    def plain(model, batch):
        return F.cross_entropy(model(batch)[:, :-1].transpose(1, 2), batch[:, 1:], reduction="none").mean(1)

    def slight(model, batch):
        return plain(model, batch) + 1e-7 * sum(weights.square().sum() for weights in model.parameters())

    for seed in range(4):
        model, x = Wide(vocabulary, seed, with_function), wide_rows(vocabulary, seed)
        assert np.isfinite(token_influence(model, plain, x, x[:1], [model.state_dict()])).all()
        with pytest.raises(GradientError, match="with these held fixed it still has derivatives, up to"):
            token_influence(model, slight, x, x[:1], [model.state_dict()])


def contrastive(model, batch):
    return (model(batch).log_softmax(-1)[..., 0] - model(batch.flip(1)).log_softmax(-1)[..., 0]).mean(1)


def test_a_task_that_calls_the_model_twice_is_refused():
    model, x = make("gru"), rows_of(2)
    with pytest.raises(GradientError, match="called the model 2 times"):
        token_influence(model, contrastive, x, x, [(model.state_dict(), 1.0)])


def test_a_classifier_is_refused():
    model = nn.Linear(4, 3)
    batch = torch.randn(2, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1])
    with pytest.raises(BatchError, match=r"expects logits \[B, T, vocabulary\]; the model gave \(2, 3\)"):
        token_influence(model, "image_classification", batch, batch, [(model.state_dict(), 1.0)])


def test_checkpoints_are_checked():
    model, x = make("gru"), rows_of(2)
    state = model.state_dict()
    for none in ([], iter([])):
        with pytest.raises(InputError, match="checkpoints is empty"):
            token_influence(model, "language_modeling", x, x, none)
    with pytest.raises(InputTypeError, match=r"checkpoints is a OrderedDict; expected a path, or a list"):
        token_influence(model, "language_modeling", x, x, state)
    with pytest.raises(InputError, match="both the same tensors"):
        token_influence(model, "language_modeling", x, x, (model.state_dict() for _ in range(2)))
    with pytest.raises(InputTypeError, match="A checkpoint came as 3 values"):
        token_influence(model, "language_modeling", x, x, [(state, 1.0, 2)])
    with pytest.raises(InputError, match=r"Checkpoints \[1\] have no learning rate and the other checkpoints have one"):
        token_influence(model, "language_modeling", x, x, [(state, 1.0), state])


def test_a_part_that_is_not_finite_is_an_error():
    model, x = make("gru"), rows_of(2)
    state = {key: value * torch.nan if key == "head.bias" else value for key, value in model.state_dict().items()}
    with pytest.raises(NonFiniteError, match="4 pairs have scores that are NaN or infinite, first target 0"):
        token_influence(model, "language_modeling", x, x, [(state, 1.0)])


def test_a_sharded_model_is_refused(monkeypatch):
    monkeypatch.setattr(token_module, "fsdp_modules", lambda model: [model])
    model, x = make("gru"), rows_of(2)
    with pytest.raises(InputError, match="sharded by fully_shard; token_influence takes the plain model"):
        token_influence(model, "language_modeling", x, x, [(model.state_dict(), 1.0)])

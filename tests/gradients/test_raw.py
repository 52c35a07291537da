"""Parameters without a layer: tables, tokens, gates and functions of parameters, against a loop of single samples."""

import pytest
import torch
import torch.nn.functional as F
from oracles import assert_gradients_match, engine_gradients, oracle_gradients
from torch import nn

from tracer.data.named_tasks import make_task
from tracer.gradients import GradientEngine


def mean_square(model, batch):
    return model(*batch).flatten(1).square().mean(1)


def data(*shape, seed=1):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class Net(nn.Module):
    """A model given by a function of itself and its inputs, its layers and its raw parameters."""

    def __init__(self, function, **parts):
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(part) if isinstance(part, torch.Tensor) else part)

    def forward(self, *args):
        return self.function(self, *args)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def standardized(weight):
    return (weight - weight.mean((1, 2, 3), keepdim=True)) / weight.std((1, 2, 3), keepdim=True)


FORMS = {
    "gate": (lambda m, x: torch.tanh(x) * m.p, {"p": data(4)}),
    "gate in front": (lambda m, x: m.p * torch.tanh(x), {"p": data(4)}),
    "gate of one number": (lambda m, x: torch.tanh(x) * m.p, {"p": data()}),
    "gate along the middle": (lambda m, x: torch.tanh(x) / (2 + m.p[:, None].square()), {"p": data(6)}),
    "gate of size one": (lambda m, x: torch.tanh(x) * m.p, {"p": data(1, 1, 1)}),
    "function of parameters": (lambda m, x: x * -torch.exp(m.p) + F.softplus(m.q), {"p": data(4), "q": data(4)}),
    "table of positions": (lambda m, x: torch.tanh(x + m.p), {"p": data(1, 6, 4)}),
    "part of a table": (lambda m, x: torch.tanh(x + m.p[: x.shape[1]]), {"p": data(9, 4)}),
    "resized table": (
        lambda m, x: torch.tanh(x + F.interpolate(m.p, 6, mode="linear").transpose(1, 2)),
        {"p": data(1, 4, 3)},
    ),
    "class token": (lambda m, x: torch.cat([m.p.expand(len(x), -1, -1), x], 1).cumsum(1).tanh(), {"p": data(1, 1, 4)}),
    "repeated token": (lambda m, x: torch.cat([m.p.repeat(len(x), 2, 1), x], 1).cumsum(1), {"p": data(1, 1, 4)}),
    "masked token": (lambda m, x: torch.where(x[..., :1] > 0, x, m.p).tanh(), {"p": data(4)}),
    "used twice": (lambda m, x: torch.tanh(x * m.p) * m.p + m.p[0], {"p": data(4)}),
    "some samples only": (lambda m, x: x * torch.where(x[:, :1, :1] > 0, m.p, m.p.detach()), {"p": data(4)}),
    "no sample": (lambda m, x: x + 0 * m.p.detach() + m.q, {"p": data(4), "q": data(4)}),
    "product": (lambda m, x: torch.tanh(x) @ m.p, {"p": data(4, 3)}),
    "transposed product": (lambda m, x: torch.tanh(x) @ m.p.T, {"p": data(3, 4)}),
    "product from the left": (lambda m, x: m.p @ torch.tanh(x), {"p": data(5, 6)}),
    "product with a vector": (lambda m, x: torch.tanh(x) @ m.p, {"p": data(4)}),
    "product by head": (lambda m, x: torch.tanh(x)[:, None] @ m.p, {"p": data(2, 4, 3)}),
    "linear": (lambda m, x: F.linear(torch.tanh(x), m.p, m.q), {"p": data(3, 4), "q": data(3)}),
    "einsum": (lambda m, x: torch.einsum("bti,iho->bhto", torch.tanh(x), m.p), {"p": data(4, 2, 3)}),
    "layer norm": (lambda m, x: F.layer_norm(x, (4,), 1 + m.p, m.q), {"p": data(4), "q": data(4)}),
    "batch norm": (
        lambda m, x: F.batch_norm(x, torch.zeros(6).double(), torch.ones(6).double(), m.p, m.q),
        {"p": data(6), "q": data(6)},
    ),
    "group norm": (lambda m, x: F.group_norm(x, 2, m.p, m.q), {"p": data(6), "q": data(6)}),
    "convolution": (
        lambda m, x: F.conv2d(x[:, None], standardized(m.p), m.q, padding="same"),
        {"p": data(2, 1, 3, 3), "q": data(2)},
    ),
    "depthwise convolution": (
        lambda m, x: F.conv1d(x, m.p, None, stride=2, padding=1, groups=6),
        {"p": data(6, 1, 3)},
    ),
    "one slope": (lambda m, x: F.prelu(x, m.p), {"p": data(1)}),
    "slopes": (lambda m, x: F.prelu(x, m.p), {"p": data(6)}),
    "lookup": (lambda m, x: torch.tanh(m.p[(x[..., 0] > 0).long() + 1]), {"p": data(4, 3)}),
    "embedding": (
        lambda m, x: F.embedding((x[..., 0] > 0).long(), m.p, padding_idx=-4).tanh(),
        {"p": data(4, 3)},
    ),
    "bias of attention": (
        lambda m, x: F.scaled_dot_product_attention(
            x[:, None], x[:, None], x[:, None], attn_mask=m.p[torch.arange(6)[:, None] - torch.arange(6)].movedim(-1, 0)
        ),
        {"p": data(11, 1)},
    ),
    "rows of windows": (
        lambda m, x: (x.reshape(-1, 3, 4) * m.p + m.q).reshape(len(x), -1),
        {"p": data(4), "q": data(3, 4)},
    ),
    "table repeated for all": (
        lambda m, x: (x.flatten(0, 1) * m.p.repeat(len(x), 1)).tanh().view_as(x),
        {"p": data(6, 4)},
    ),
    "sequence first": (
        lambda m, x: (x.transpose(0, 1) * m.p + m.q).transpose(0, 1),
        {"p": data(4), "q": data(6, 1, 4)},
    ),
    "einsum, sequence first": (
        lambda m, x: torch.einsum("tbi,io->tbo", x.transpose(0, 1), m.p).transpose(0, 1),
        {"p": data(4, 3)},
    ),
    "einsum with positions of all samples": (
        lambda m, x: torch.einsum(
            "tbo,sbo->bts",
            x.transpose(0, 1),
            torch.einsum("sbi,io->sbo", data(7, 1, 3).expand(-1, len(x), -1), m.p),
        ),
        {"p": data(3, 4)},
    ),
    "sum and product by head": (
        lambda m, x: (
            torch.baddbmm(m.q[:, None], x.reshape(-1, 2, 2).permute(1, 0, 2), m.p, beta=0.5, alpha=2)
            .transpose(0, 1)
            .reshape(len(x), -1)
        ),
        {"p": data(2, 2, 3), "q": data(2, 3)},
    ),
    "product by position": (
        lambda m, x: (x.transpose(0, 1) @ m.p.tanh().transpose(-2, -1)).transpose(0, 1),
        {"p": data(6, 3, 4)},
    ),
    "view of a repeated table": (
        lambda m, x: (x.flatten(0, 1) * m.p.repeat(len(x), 1, 1).view(-1, 4)).tanh().view_as(x),
        {"p": data(1, 6, 4)},
    ),
    "attention with weights of its own": (
        lambda m, x: F.multi_head_attention_forward(
            *[x.transpose(0, 1)] * 3,
            4,
            2,
            torch.empty(0),
            torch.cat([m.q, m.k, m.q]),
            None,
            None,
            False,
            0.0,
            m.p,
            m.q,
            training=False,
            attn_mask=x[:, :, :1].tanh().repeat_interleave(2, 0).expand(-1, -1, 6),
            use_separate_proj_weight=True,
            q_proj_weight=m.p,
            k_proj_weight=m.w,
            v_proj_weight=m.p,
        )[0].transpose(0, 1),
        {"p": data(4, 4, seed=2), "w": data(4, 4), "q": data(4), "k": data(4, seed=2)},
    ),
}


@pytest.mark.parametrize("num_rows", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("form", FORMS)
def test_gradients_of_raw_parameters(form, num_rows):
    function, parameters = FORMS[form]
    model = Net(lambda m, x: function(m, m.f(x)), f=nn.Linear(4, 4), **parameters)
    assert_gradients_match(model, mean_square, (data(num_rows, 6, 4),), num_rows)


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"kdim": 3, "vdim": 5}])
@pytest.mark.parametrize("weights", [True, False])
@pytest.mark.parametrize("num_rows", [1, 3, 6])
def test_attention_to_other_tokens_with_a_token_of_its_own(options, weights, num_rows):
    """As the heads that pool by attention, and decoders."""
    keys, values = data(num_rows, 5, options.get("kdim", 4), seed=2), data(num_rows, 5, options.get("vdim", 4), seed=3)
    padding = torch.arange(5) >= 1 + torch.arange(num_rows)[:, None]
    mask = torch.arange(5) > 3 + torch.arange(2)[:, None]

    def forward(m, keys, values, padding):
        token = m.token.repeat(len(keys), 2, 1)
        return m.attention(m.f(token), keys, values, padding, weights, mask)[0]

    attention = nn.MultiheadAttention(4, 2, batch_first=True, **options)
    model = Net(forward, f=nn.Linear(4, 4), token=data(1, 1, 4), attention=attention)
    assert_gradients_match(model, mean_square, (keys, values, padding), num_rows)


def test_raw_parameters_in_front_of_all_layers():
    model = Net(lambda m, x: m.f(x * m.p + m.q), f=nn.Linear(4, 3), p=data(4), q=data(6, 4))
    assert_gradients_match(model, mean_square, (data(4, 6, 4),), 4)


def test_a_weight_of_a_layer_that_is_used_apart_from_it():
    model = Net(lambda m, x: F.linear(torch.tanh(m.f(x)), m.f.weight * m.p) + m.f.bias, f=nn.Linear(4, 4), p=data(4, 1))
    engine = assert_gradients_match(model, mean_square, (data(4, 6, 4),), 4)
    assert {"p", "f.weight", "f.bias"} == engine.raw


def test_a_tied_table_that_a_layer_and_a_product_use():
    def forward(m, tokens):
        return m.embed(tokens).cumsum(1).tanh() @ m.embed.weight.T * m.scale

    model = Net(forward, embed=nn.Embedding(9, 4), scale=data())
    tokens = torch.randint(0, 9, (4, 6), generator=torch.Generator().manual_seed(3))
    assert_gradients_match(model, mean_square, (tokens,), 4)


def test_a_layer_of_parameters_only():
    """A relative bias, as T5 has: looked up once, brought to the form of scores, added in two layers."""

    def forward(m, x):
        index = (torch.arange(6)[:, None] - torch.arange(6)).clamp(-2, 2) + 2
        bias = m.bias(index).permute(2, 0, 1).unsqueeze(0)
        scores = (x[:, None] * m.heads) @ x[:, None].transpose(2, 3)
        return torch.softmax(scores + bias, -1) @ x[:, None] + torch.softmax(2 * scores + bias, -1) @ x[:, None]

    model = Net(lambda m, x: forward(m, m.f(x)), f=nn.Linear(4, 4), bias=nn.Embedding(5, 2), heads=data(2, 1, 4))
    for num_rows in (1, 2, 4, 6):
        assert_gradients_match(model, mean_square, (data(num_rows, 6, 4),), num_rows)


def test_uneven_batches_of_one_engine():
    model = Net(
        lambda m, x: torch.cat([m.token.expand(len(x), -1, -1), m.f(x)], 1).tanh() * m.gate + m.table,
        f=nn.Linear(4, 4),
        token=data(1, 1, 4),
        gate=data(4),
        table=data(7, 4),
    ).double()
    names = [name for name, _ in model.named_parameters()]
    engine = GradientEngine(model, make_task(mean_square), names)
    for num_rows in (5, 7, 1, 2):
        batch = (data(num_rows, 6, 4, seed=num_rows),)
        found = engine_gradients(engine, batch, num_rows)
        torch.testing.assert_close(found, oracle_gradients(model, mean_square, batch, num_rows), rtol=1e-9, atol=1e-12)
    assert not engine.fallback


def test_half_precision_stays_near_full_precision():
    model = Net(
        lambda m, x: m.f(x.tanh() * m.gate) @ m.weight.T + m.shift.exp(),
        f=nn.Linear(8, 8),
        gate=data(8),
        weight=data(5, 8),
        shift=data(5),
    ).bfloat16()
    names = [name for name, _ in model.named_parameters()]
    engine = GradientEngine(model, make_task(mean_square), names)
    batch = data(6, 4, 8).bfloat16()
    found = engine_gradients(engine, (batch,), 6)
    expected = oracle_gradients(model.double(), mean_square, (batch.double(),), 6)
    for name, value in expected.items():
        assert float((found[name].double() - value).norm() / value.norm()) < 0.03, name
    assert not engine.fallback


def test_a_function_of_samples_and_parameters_in_one_tensor_is_left_to_the_fallback():
    model = Net(
        lambda m, x: torch.cat([m.f(x), m.p.expand_as(x)]).view(2, *x.shape).sum(0).tanh(),
        f=nn.Linear(4, 4),
        p=data(1, 4),
    )
    assert_gradients_match(model, mean_square, (data(3, 6, 4),), 3, general=["p"])


def test_marks_on_tensors_of_the_batch_are_removed():
    model = Net(lambda m, x: m.f(x) * m.p, f=nn.Linear(4, 4), p=data(4)).double()
    x = data(3, 4)
    engine_gradients(GradientEngine(model, make_task(mean_square), ["p"]), (x,), 3)
    assert not x.__dict__

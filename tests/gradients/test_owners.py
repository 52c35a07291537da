"""Layers and parameters that get rows of all samples in any order, against a loop of single samples."""

import pytest
import torch
import torch.nn.functional as F
import transformers
from gradients.test_raw import Net, data, mean_square
from oracles import assert_gradients_match, engine_gradients, oracle_gradients
from torch import nn

from tracer.data.named_tasks import make_task
from tracer.gradients import GradientEngine
from tracer.gradients.owners import NoOwner, Owners, regroup
from tracer.gradients.per_sample import DenseGradient, OuterGradient


def tokens_of(expert, x):
    """The numbers of the tokens ``[B * T, 4]`` that an expert of three gets; some samples send it none."""
    chosen = torch.where(x.reshape(-1, 6, 4).mean((1, 2), keepdim=True) > 0.1, 0, (3 * x.reshape(-1, 6, 4)).long() % 3)
    return (chosen[..., 0].reshape(-1) == expert).nonzero()[:, 0]


def routed(call):
    """A mixture that calls experts as models of transformers do, ``call(model, expert, tokens)``."""

    def forward(m, x):
        x = m.f(x)
        tokens = x.reshape(-1, 4)
        mixed = torch.zeros_like(tokens)
        for expert in range(3):
            rows = tokens_of(expert, x.detach())
            mixed.index_add_(0, rows, call(m, expert, tokens[rows]) * (1 + expert))
        return (x + mixed.view_as(x)).tanh()

    return forward


def by_groups(m, x):
    """Experts of one parameter called on sorted tokens, also without any, and a bias on all of them."""
    tokens = m.f(x).reshape(-1, 4)
    groups = [tokens_of(expert, x) for expert in range(3)]
    order = torch.cat(groups)
    parts = tokens[order].split([len(rows) for rows in groups])
    mixed = torch.cat([F.linear(part, m.p[expert], m.q[expert]) for expert, part in enumerate(parts)])
    return torch.zeros_like(tokens).index_add(0, order, (mixed * m.gate + m.bias).tanh()).view_as(x)


def without_padding(m, x):
    """A model that drops tokens at different places of each sample, sorts the others, and normalizes them."""
    kept = (x[..., 0] > -0.5).flatten().nonzero()[:, 0]
    kept = kept[x.flatten(0, 1)[kept, 1].argsort()]
    tokens = m.norm(m.f(x.flatten(0, 1)[kept]).tanh() * m.gate + m.table((x.flatten(0, 1)[kept, 0] > 0).long()))
    return torch.zeros_like(x).flatten(0, 1).index_copy(0, kept, m.g(tokens)).view_as(x)


def with_first_rows(m, x):
    """TimeSformer's: rows are frames of a sample, and the class token of sample b is taken from row b."""
    frames = m.f(x).reshape(-1, 2, 4)
    rows = torch.cat([m.token.expand(len(frames), -1, -1), frames], 1) + m.table
    return torch.cat([rows[: len(x), 0], rows[:, 1:].reshape(len(x), -1)], 1).tanh()


def experts(**more):
    return {"f": nn.Linear(4, 4), "experts": nn.ModuleList([nn.Linear(4, 4) for _ in range(3)]), **more}


def expert_twice():
    parts = experts()
    parts["experts"][2] = parts["experts"][0]
    return parts


FORMS = {
    "experts": (routed(lambda m, e, x: m.experts[e](x)), experts),
    "one expert in two places": (routed(lambda m, e, x: m.experts[e](x)), expert_twice),
    "a layer of all experts": (routed(lambda m, e, x: m.experts[e](m.f(x).relu())), experts),
    "a factor of all experts": (routed(lambda m, e, x: m.experts[e](x) * m.p), lambda: experts(p=data(4))),
    "experts of one parameter": (
        by_groups,
        lambda: {"f": nn.Linear(4, 4), "p": data(3, 4, 4), "q": data(3, 4), "gate": data(4), "bias": data(4, seed=2)},
    ),
    "no padding": (
        without_padding,
        lambda: {
            "f": nn.Linear(4, 4),
            "g": nn.Linear(4, 4),
            "norm": nn.LayerNorm(4),
            "gate": data(4),
            "table": nn.Embedding(2, 4),
        },
    ),
    "rows of other samples": (
        with_first_rows,
        lambda: {"f": nn.Linear(4, 4), "token": data(1, 1, 4), "table": data(3, 4)},
    ),
}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("num_rows", [1, 2, 3, 4, 6, 16, 80])
@pytest.mark.parametrize("form", FORMS)
def test_gradients_of_mixed_rows(form, num_rows):
    function, parts = FORMS[form]
    assert_gradients_match(Net(function, **parts()), mean_square, (data(num_rows, 6, 4),), num_rows)


@pytest.mark.parametrize("form", FORMS)
def test_uneven_batches_in_which_rows_change_places(form):
    function, parts = FORMS[form]
    model = Net(function, **parts()).double()
    engine = GradientEngine(model, make_task(mean_square), [name for name, _ in model.named_parameters()])
    for seed, num_rows in enumerate([5, 5, 5, 5, 1, 3, 5, 6, 2, 5, 1]):
        batch = (data(num_rows, 6, 4, seed=seed),)
        expected = oracle_gradients(model, mean_square, batch, num_rows)
        found = engine_gradients(engine, batch, num_rows)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert not engine.fallback


def test_a_layer_whose_output_is_changed_in_place():
    model = Net(lambda m, x: m.g(m.f(x).div_(3).tanh()), f=nn.Linear(4, 4), g=nn.Linear(4, 4))
    engine = assert_gradients_match(model, mean_square, (data(3, 6, 4),), 3)
    assert not engine.raw


def test_rows_of_several_samples_have_no_owner():
    x = data(4, 3).requires_grad_()
    rows = torch.cat([x, x[:2] + 0.5 * x[2:]])
    edge = torch.autograd.graph.get_gradient_edge(rows)
    output = torch.stack([(rows[b].sum() + rows[4 + b % 2].sum() * (1 + b)).square() for b in range(4)])
    owners = Owners(output, [edge], ["rows"])
    (grad,) = torch.autograd.grad(output.sum(), [edge])
    with pytest.raises(NoOwner, match="several samples"):
        owners.of("rows", grad, 1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_samples", [2, 64, 500])
def test_owners_of_rows_in_any_order(num_samples, dtype):
    expected = torch.randint(0, num_samples, (3000,), generator=torch.Generator().manual_seed(1))
    rows = data(3000, 8).to(dtype).requires_grad_()
    hidden = (rows @ data(8, 8).to(dtype)).tanh() * (10.0 ** (-6 * (expected % 2)).to(dtype))[:, None]
    edge = torch.autograd.graph.get_gradient_edge(hidden)
    output = torch.zeros(num_samples, dtype=dtype).index_add(0, expected, hidden.sin().sum(1))
    owners = Owners(output, [edge], ["rows"])
    (grad,) = torch.autograd.grad(output.sum(), [edge])
    assert torch.equal(owners.of("rows", grad, 1), expected)


def test_regrouped_gradients_are_sums_of_rows():
    owner = torch.tensor([2, 0, 2, 2, 0])
    left, right = data(5, 2, 3), data(5, 2, 4, seed=2)
    outer = OuterGradient(left, right, (3, 4))
    expected = torch.zeros(4, 12, dtype=torch.float64).index_add(0, owner, outer.dense(0, 5))
    dense = DenseGradient(outer.dense(0, 5).view(5, 3, 4))
    for gradient in (outer, dense):
        torch.testing.assert_close(regroup(gradient, owner, 4).dense(0, 4), expected)


@pytest.mark.parametrize("form", ["experts", "no padding"])
def test_training_steps_are_told_that_one_backward_does_not_suffice(form):
    function, parts = FORMS[form]
    engine = assert_gradients_match(Net(function, **parts()), mean_square, (data(5, 6, 4),), 5)
    assert isinstance(engine.plain_layers(), str)


def test_regions_of_checkpointing_are_left_out_for_mixed_rows():
    config = transformers.SwitchTransformersConfig(
        vocab_size=29, d_model=8, d_kv=4, d_ff=12, num_layers=2, num_heads=2, num_experts=3, num_sparse_encoder_layers=1
    )
    model = transformers.SwitchTransformersEncoderModel(config)
    model.train().gradient_checkpointing_enable()
    tokens = torch.randint(3, 29, (4, 6), generator=torch.Generator().manual_seed(1))
    loss = lambda model, batch: model(batch).last_hidden_state.flatten(1).square().mean(1)  # noqa: E731
    assert_gradients_match(model, loss, tokens, 4, rtol=1e-5)

"""Odd models: whatever a user brings is computed right, by the fallback, or refused."""

import logging
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracles import assert_gradients_match, engine_gradients, oracle_gradients
from store_cases import stored_features
from torch import nn

import tracer
from tracer.data.named_tasks import make_task
from tracer.gradients import GradientEngine, isolated


def mean_square(model, batch):
    return model(*batch).flatten(1).square().mean(1)


def data(*shape, seed=1):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class Module(nn.Module):
    """A model given by its layers and a function."""

    def __init__(self, function, **layers):
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, *args):
        return self.function(self, *args)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("num_rows", [1, 3])
def test_layer_called_three_times(num_rows):
    model = Module(lambda m, x: m.f(torch.tanh(m.f(torch.tanh(m.f(x))))), f=nn.Linear(4, 4))
    assert_gradients_match(model, mean_square, (data(num_rows, 4),), num_rows)


def test_conv_called_twice():
    model = Module(lambda m, x: m.f(torch.tanh(m.f(x))), f=nn.Conv2d(2, 2, 3, padding=1))
    assert_gradients_match(model, mean_square, (data(3, 2, 5, 5),), 3)


def test_two_layers_share_a_weight():
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    model = Module(lambda m, x: m.second(torch.tanh(m.first(x))), first=first, second=second)
    assert_gradients_match(model, mean_square, (data(3, 4),), 3)


def language_model(bias=False):
    def forward(m, tokens):
        x = m.embed(tokens) + m.position(torch.arange(tokens.shape[1]))
        return m.head(m.norm(torch.cumsum(torch.tanh(m.mix(x)), 1)))

    head = nn.Linear(6, 9, bias=bias)
    embed = nn.Embedding(9, 6)
    head.weight = embed.weight
    layers = {"embed": embed, "position": nn.Embedding(8, 6), "mix": nn.Linear(6, 6), "norm": nn.LayerNorm(6)}
    return Module(forward, head=head, **layers)


@pytest.mark.parametrize("num_rows", [1, 2, 3, 4, 8])
def test_tied_embedding_and_positions_without_rows(num_rows):
    tokens = torch.randint(0, 9, (num_rows, 8), generator=torch.Generator().manual_seed(3))
    assert_gradients_match(language_model(), "language_modeling", tokens, num_rows)


def test_positions_with_leading_one():
    def forward(m, x):
        return x + m.position(torch.arange(5).unsqueeze(0))

    model = Module(lambda m, x: torch.tanh(forward(m, m.f(x))), f=nn.Linear(4, 4), position=nn.Embedding(5, 4))
    assert_gradients_match(model, mean_square, (data(5, 5, 4),), 5)


@pytest.mark.parametrize("positions", [2, 3, 5, 6])
def test_sequence_first_layers(positions):
    model = Module(
        lambda m, x: m.g(m.n(m.f(x.transpose(0, 1)).tanh())).transpose(0, 1),
        f=nn.Linear(4, 3),
        n=nn.LayerNorm(3),
        g=nn.Linear(3, 2),
    )
    assert_gradients_match(model, mean_square, (data(3, positions, 4),), 3)


def test_layers_that_mix_up_rows_are_not_given_to_wrong_rows(caplog):
    model = Module(lambda m, x: m.f(x.transpose(0, 1).flatten(0, 1)).tanh().unflatten(0, (6, 3)), f=nn.Linear(4, 3))

    def loss(model, batch):
        return model(*batch).square().mean((0, 2)) if len(batch[0]) == 3 else one(model, batch)

    def one(model, batch):
        return model.f(batch[0].flatten(0, 1)).tanh().unflatten(0, (len(batch[0]), 6)).square().mean((1, 2))

    with caplog.at_level(logging.INFO, logger="tracer"):
        assert_gradients_match(model, loss, (data(3, 6, 4),), 3)
    assert "rows of 'f' belong to which sample is told by their gradients" in caplog.text


def test_sequence_first_after_a_first_batch_of_one_row():
    model = Module(lambda m, x: m.f(x.transpose(0, 1)).tanh().transpose(0, 1), f=nn.Linear(4, 3)).double()
    engine = GradientEngine(model, make_task(mean_square), ["f.weight", "f.bias"])
    engine_gradients(engine, (data(1, 6, 4),), 1)
    found = engine_gradients(engine, (data(3, 6, 4),), 3)
    torch.testing.assert_close(found, oracle_gradients(model, mean_square, (data(3, 6, 4),), 3))
    assert not engine.fallback


def test_positions_folded_into_rows():
    model = Module(lambda m, x: m.f(x.reshape(-1, 4)).tanh().reshape(len(x), -1), f=nn.Linear(4, 3))
    assert_gradients_match(model, mean_square, (data(3, 5, 4),), 3)


def test_frames_folded_into_rows_of_a_conv():
    model = Module(
        lambda m, x: m.n(m.f(x.flatten(0, 1))).tanh().reshape(len(x), -1), f=nn.Conv2d(2, 4, 3), n=nn.GroupNorm(2, 4)
    )
    assert_gradients_match(model, mean_square, (data(3, 4, 2, 5, 5),), 3)


def test_frozen_parameters_are_left_out():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    model[0].weight.requires_grad_(False)
    engine = assert_gradients_match(model, mean_square, (data(3, 4),), 3)
    assert engine.names == ("0.bias", "2.weight", "2.bias")


def test_unused_parameters_have_gradient_zero():
    model = Module(lambda m, x: m.f(x), f=nn.Linear(4, 2), unused=nn.Linear(3, 3), raw=nn.Parameter(torch.ones(2)))
    assert_gradients_match(model, mean_square, (data(3, 4),), 3)


def test_detached_branch_has_gradient_zero():
    model = Module(lambda m, x: m.f(x) + m.g(x).detach(), f=nn.Linear(4, 2), g=nn.Linear(4, 2))
    assert_gradients_match(model, mean_square, (data(3, 4),), 3)


def test_branch_under_no_grad_has_gradient_zero():
    def forward(m, x):
        with torch.no_grad():
            y = m.g(x)
        return m.f(x) + y

    assert_gradients_match(Module(forward, f=nn.Linear(4, 2), g=nn.Linear(4, 2)), mean_square, (data(3, 4),), 3)


def test_raw_parameters_in_functions_without_a_rule():
    model = Module(lambda m, x: torch.hypot(m.f(torch.hypot(x, m.scale)), m.shift), f=nn.Linear(4, 2))
    model.scale, model.shift = nn.Parameter(torch.rand(4)), nn.Parameter(torch.rand(()))
    assert_gradients_match(model, mean_square, (data(3, 4),), 3, general=["scale", "shift"])


def test_layer_whose_weight_is_used_directly():
    model = Module(lambda m, x: F.linear(x, m.f.weight).tanh() @ m.f.weight + m.f(x), f=nn.Linear(4, 4))
    assert_gradients_match(model, mean_square, (data(3, 4),), 3)


def test_subclass_with_another_forward_has_no_rule():
    class Doubled(nn.Linear):
        def forward(self, x):
            return torch.hypot(x, self.weight) + self.bias

    model = nn.Sequential(Doubled(4, 1), nn.Tanh())
    assert_gradients_match(model, mean_square, (data(3, 4),), 3, general=["0.weight"])


def test_instance_with_another_forward_is_found_by_the_check():
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh())
    model[0].forward = lambda x, f=model[0].forward: 2 * f(x)
    engine = GradientEngine(model, make_task(mean_square), ["0.weight", "0.bias"])
    batch = (data(3, 4).float(),)
    found = engine_gradients(engine, batch, 3)
    torch.testing.assert_close(found, oracle_gradients(model, mean_square, batch, 3))
    assert engine.raw == {"0.weight", "0.bias"}


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("batch_first", [True, False])
def test_transformer_encoder(batch_first):
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=batch_first)

    def forward(m, x):
        return m.head(m.encoder(x) if batch_first else m.encoder(x.transpose(0, 1)).transpose(0, 1))

    model = Module(forward, encoder=nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), head=nn.Linear(8, 2))
    assert_gradients_match(model, mean_square, (data(3, 5, 8),), 3, rtol=1e-8)


def masks(name):
    causal = nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64)
    padding = torch.zeros(3, 5, dtype=torch.bool)
    padding[1, 3:] = True
    return {
        "none": {},
        "no weights": {"need_weights": False},
        "causal hint": {"attn_mask": causal, "is_causal": True, "need_weights": False},
        "causal": {"attn_mask": causal},
        "boolean": {"attn_mask": causal != 0, "need_weights": False},
        "padding": {"key_padding_mask": padding, "need_weights": False},
        "both": {"attn_mask": causal != 0, "key_padding_mask": padding},
        "one a head": {"attn_mask": torch.randn(6, 5, 5, dtype=torch.float64, generator=torch.Generator())},
    }[name]


@pytest.mark.parametrize(
    "mask", ["none", "no weights", "causal hint", "causal", "boolean", "padding", "both", "one a head"]
)
def test_attention_with_masks(mask):
    def loss(model, batch):
        options = dict(masks(mask))
        rows = torch.arange(3) if len(batch[0]) == 3 else batch[1]
        if "key_padding_mask" in options:
            options["key_padding_mask"] = options["key_padding_mask"][rows]
        if mask == "one a head":
            options["attn_mask"] = options["attn_mask"].view(3, 2, 5, 5)[rows].flatten(0, 1)
        mixed, weights = model(batch[0], batch[0], batch[0], **options)
        extra = 0 if weights is None else weights.square().flatten(1).sum(1)
        return mixed.square().flatten(1).sum(1) + extra

    model = nn.MultiheadAttention(8, 2, batch_first=True)
    assert_gradients_match(model, loss, (data(3, 5, 8), torch.arange(3)), 3, rtol=1e-8)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_attention_without_a_rule_uses_the_fallback():
    attention = nn.MultiheadAttention(8, 2, batch_first=True, add_bias_kv=True)
    model = Module(lambda m, x, y: m.attention(x, y, y)[0], attention=attention)
    engine = assert_gradients_match(model, mean_square, (data(3, 5, 8), data(3, 4, 8)), 3, general=None, rtol=1e-8)
    assert "attention.in_proj_bias" in engine.fallback
    assert "forward" not in model.attention.__dict__


def test_lstm_by_the_per_sample_loop_where_vmap_cannot():
    model = Module(lambda m, x: m.f(m.rnn(x)[0][:, -1]), rnn=nn.LSTM(4, 5, batch_first=True), f=nn.Linear(5, 2))
    rnn = [name for name, _ in model.named_parameters() if name.startswith("rnn")]
    assert_gradients_match(model, mean_square, (data(3, 6, 4),), 3, general=rnn)


def test_data_dependent_control_flow_by_the_loop():
    def forward(m, x):
        return torch.hypot(m.f(x), m.raw) if float(x.sum()) > -1e9 else m.f(x)

    model = Module(forward, f=nn.Linear(4, 2), raw=nn.Parameter(torch.rand(2)))
    engine = assert_gradients_match(model, mean_square, (data(3, 4),), 3, general=["raw"])
    assert engine.runs_samples_alone


def test_weight_norm_and_spectral_norm():
    model = nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
        nn.Tanh(),
        nn.utils.parametrizations.spectral_norm(nn.Linear(4, 2)).eval(),
    )
    assert_gradients_match(model, mean_square, (data(3, 4),), 3, general=None)


def test_user_hooks_that_change_outputs():
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    model[0].register_forward_hook(lambda module, args, output: output * 3)
    model[2].register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    batch = (data(3, 4).float(),)
    engine = GradientEngine(model, make_task(mean_square), [name for name, _ in model.named_parameters()])
    found = engine_gradients(engine, batch, 3)
    torch.testing.assert_close(found, oracle_gradients(model, mean_square, batch, 3))
    assert not engine.fallback
    assert len(model[0]._forward_hooks) == 1
    assert len(model[2]._forward_pre_hooks) == 1


def test_input_changed_in_place_after_the_call_is_not_used():
    def forward(m, x):
        h = torch.tanh(x)
        y = m.f(h)
        with torch.no_grad():
            h.zero_()
        return y

    model = Module(forward, f=nn.Linear(4, 2, bias=False))
    model.raw = nn.Parameter(torch.ones(2))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        oracle_gradients(model.double(), mean_square, (data(3, 4),), 3)  # autograd itself refuses
    engine = GradientEngine(model, make_task(mean_square), ["f.weight"], "capture")
    with pytest.raises((tracer.GradientError, RuntimeError)):
        engine_gradients(engine, (data(3, 4),), 3)


def test_checkpointed_activations():
    from torch.utils.checkpoint import checkpoint

    model = Module(
        lambda m, x: m.g(checkpoint(lambda y: torch.tanh(m.f(y)), x, use_reentrant=False)),
        f=nn.Linear(4, 4),
        g=nn.Linear(4, 2),
    )
    assert_gradients_match(model, mean_square, (data(3, 4),), 3)


def test_gradient_of_a_new_call_pattern_is_checked_again():
    def forward(m, x):
        return m.f(x) if x.shape[-2] == 4 else m.f(x.transpose(0, 1)).transpose(0, 1)

    model = Module(forward, f=nn.Linear(4, 3)).double()
    engine = GradientEngine(model, make_task(mean_square), ["f.weight", "f.bias"])
    for shape in ((3, 4, 4), (3, 5, 4), (3, 6, 4)):
        batch = (data(*shape),)
        found = engine_gradients(engine, batch, 3)
        torch.testing.assert_close(found, oracle_gradients(model, mean_square, batch, 3))


def test_batch_coupled_model_is_refused():
    model = Module(lambda m, x: m.f(x - x.mean(0)), f=nn.Linear(4, 2, bias=False))
    model.raw = nn.Parameter(torch.ones(2))
    coupled = Module(lambda m, x: m.f(x) - m.f(x).mean(0), f=nn.Linear(4, 2))
    engine = GradientEngine(coupled, make_task(mean_square), ["f.weight", "f.bias"])
    with pytest.raises(tracer.GradientError, match="influence each other|depends on which samples"):
        engine_gradients(engine, (data(3, 4).float(),), 3)


def test_inputs_centred_over_the_batch_are_refused():
    model = Module(lambda m, x: m.f(x - x.mean(0)), f=nn.Linear(4, 2))
    engine = GradientEngine(model, make_task(mean_square), ["f.weight", "f.bias"])
    with pytest.raises(tracer.GradientError, match="run alone gives another result.*first that differs"):
        engine_gradients(engine, (data(3, 4).float(),), 3)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_dynamic_quantization_is_refused_unless_samples_come_one_by_one(tmp_path, batch_size):
    head = nn.Sequential(nn.Linear(4, 8), nn.ReLU())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch.ao, which is deprecated
        quantized = torch.ao.quantization.quantize_dynamic(head, {nn.Linear}, dtype=torch.qint8)
    model, x = Module(lambda m, x: m.f(m.q(x)), q=quantized, f=nn.Linear(8, 2)), data(3, 4).float()
    traced = tracer.Tracer(model, mean_square, 3, tmp_path / "store", projector="none", storage="float32")
    traced.load_checkpoint(model.state_dict(), model_id=0)
    if batch_size > 1:
        with pytest.raises(tracer.GradientError, match=r"q\.0 \(Linear\) is quantized dynamically.*batch_size=1"):
            traced.featurize((x,), num_samples=3)
        return
    for row in range(3):
        traced.featurize((x[row : row + 1],), num_samples=1)
    traced.flush()
    found = stored_features(traced.store.checkpoint(0), 0, 3)
    for row in range(3):
        expected = oracle_gradients(model, mean_square, (x[row : row + 1],), 1)
        np.testing.assert_allclose(found[row], torch.cat([each.flatten() for each in expected.values()]), rtol=1e-4)


def test_model_that_cannot_run_one_row_is_computed():
    model = Module(lambda m, x: m.f(x[:, :, 0].squeeze().reshape(-1, 4) if len(x) > 1 else x[9]), f=nn.Linear(4, 2))
    engine = GradientEngine(model, make_task(mean_square), ["f.weight", "f.bias"], "capture")
    assert engine_gradients(engine, (data(3, 4, 2).float(),), 3)["f.weight"].shape == (3, 2, 4)


def test_batch_norm_without_running_statistics_is_refused():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, track_running_stats=False))
    engine = GradientEngine(model, make_task(mean_square), [name for name, _ in model.named_parameters()])
    with pytest.raises(tracer.GradientError, match="run alone gives another result"):
        engine_gradients(engine, (data(4, 4).float(),), 4)


def test_output_that_depends_on_nothing_selected_is_refused():
    model = Module(lambda m, x: m.f(x).detach(), f=nn.Linear(4, 2))
    engine = GradientEngine(model, make_task(mean_square), ["f.weight"])
    with pytest.raises(tracer.GradientError, match="depends on none of the 1 selected parameters"):
        engine_gradients(engine, (data(3, 4).float(),), 3)


def test_capture_only_names_what_it_cannot_do():
    model = Module(lambda m, x: torch.hypot(m.f(x), m.scale), f=nn.Linear(4, 2))
    model.scale = nn.Parameter(torch.ones(2))
    engine = GradientEngine(model, make_task(mean_square), ["f.weight", "scale"], "capture")
    with pytest.raises(tracer.GradientError, match="'scale'.*hypot.*Use gradients='auto'"):
        engine_gradients(engine, (data(3, 4).float(),), 3)


def test_unknown_method_suggests_the_nearest():
    with pytest.raises(tracer.InputError, match="did you mean 'functional'"):
        GradientEngine(nn.Linear(2, 2), make_task("regression"), ["weight"], "functionel")


def test_complex_parameter_is_refused():
    model = Module(lambda m, x: (x * m.c).abs(), c=nn.Parameter(torch.ones(4, dtype=torch.complex64)))
    engine = GradientEngine(model, make_task(mean_square), ["c"])
    with pytest.raises(tracer.GradientError, match="complex"):
        engine_gradients(engine, (data(3, 4).float(),), 3)


def test_batches_of_strings_go_sample_by_sample():
    def forward(m, words, x):
        return torch.hypot(m.f(x), m.raw) * torch.tensor([[float(len(word))] for word in words], dtype=x.dtype)

    model = Module(forward, f=nn.Linear(4, 2), raw=nn.Parameter(torch.rand(2)))
    assert_gradients_match(model, mean_square, (["a", "bcd", "ef"], data(3, 4)), 3, general=["raw"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models(dtype):
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)
    batch = (data(5, 8).to(dtype), torch.tensor([0, 1, 2, 0, 1]))
    engine = GradientEngine(model, make_task("image_classification"), [name for name, _ in model.named_parameters()])
    found = engine_gradients(engine, batch, 5)
    full = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    full.load_state_dict(model.state_dict())
    expected = oracle_gradients(full, "image_classification", (batch[0].double(), batch[1]), 5)
    for name, value in expected.items():
        assert float((found[name].double() - value).norm() / value.norm()) < 0.03, name
    assert not engine.fallback


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_between_batch_sizes_is_no_coupling(dtype):
    def forward(m, x):
        for layer in m.layers:
            x = layer(x)
        return torch.hypot(m.head(x), m.raw)

    blocks = [nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.LayerNorm(64)) for _ in range(8)]
    model = Module(forward, layers=nn.ModuleList(blocks), head=nn.Linear(64, 3)).to(dtype)
    model.raw = nn.Parameter(torch.full((3,), 50.0, dtype=dtype))
    names = [name for name, _ in model.named_parameters()]
    engine = GradientEngine(model, make_task("image_classification"), names)
    batch = (data(16, 64).to(dtype), torch.arange(16) % 3)
    found = engine_gradients(engine, batch, 16)
    assert set(engine.fallback) == {"raw"}
    assert all(torch.isfinite(value).all() for value in found.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_rule_that_is_wrong_by_a_third_is_found_in_every_precision(dtype):
    class Stretched(nn.Linear):
        pass

    def rule(call):
        return {"weight": 1.3 * call.grad_output.unsqueeze(2) * call.x.unsqueeze(1), "bias": call.grad_output}

    tracer.register_layer_rule(Stretched, rule)
    model = nn.Sequential(Stretched(16, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)
    engine = GradientEngine(model, make_task("image_classification"), [name for name, _ in model.named_parameters()])
    engine_gradients(engine, (data(6, 16).to(dtype), torch.arange(6) % 3), 6)
    assert engine.raw == {"0.weight"}


def test_model_is_left_as_found():
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Sequential(nn.Linear(4, 2)).eval())
    model[2][0].bias.requires_grad_(False)
    model[0].weight.grad = torch.ones(4, 4)
    modes = [module.training for module in model.modules()]
    flags = [parameter.requires_grad for parameter in model.parameters()]
    state = torch.get_rng_state()

    def failing(m, batch):
        torch.rand(3)
        assert not any(module.training for module in m.modules())
        m(*batch)
        raise ZeroDivisionError("mine")

    engine = GradientEngine(model, make_task(failing), ["0.weight"])
    with pytest.raises(ZeroDivisionError, match="mine"), torch.no_grad():
        engine_gradients(engine, (data(3, 4).float(),), 3)
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert torch.equal(torch.get_rng_state(), state)
    assert all(not module._forward_hooks for module in model.modules())
    assert torch.equal(model[0].weight.grad, torch.ones(4, 4))


def test_works_under_no_grad_and_inference_mode():
    model = nn.Linear(4, 2)
    batch = (data(3, 4).float(),)
    expected = oracle_gradients(model, mean_square, batch, 3)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            found = engine_gradients(GradientEngine(model, make_task(mean_square), ["weight", "bias"]), batch, 3)
        torch.testing.assert_close({k: v.clone() for k, v in found.items()}, expected)


def test_model_that_draws_random_numbers_in_eval_mode_is_refused():
    model = Module(lambda m, x: F.dropout(m.f(x), 0.5, training=True), f=nn.Linear(4, 2))
    engine = GradientEngine(model, make_task(mean_square), ["f.weight", "f.bias"])
    with pytest.raises(tracer.GradientError, match="draws random numbers in eval mode"):
        engine_gradients(engine, (data(3, 4).float(),), 3)


def test_contribution_that_vanishes_at_the_first_checkpoint(tmp_path):
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.enc, self.gate, self.head = nn.Linear(4, 4), nn.Parameter(torch.zeros(1)), nn.Linear(4, 2)

        def forward(self, x):
            z = torch.tanh(self.enc(x))
            return self.head(z + self.gate * F.linear(z, self.enc.weight.t()))

    model, x, y = Gated(), data(6, 4).float(), torch.arange(6) % 2
    first = {name: value.clone() for name, value in model.state_dict().items()}
    second = {**first, "gate": torch.ones(1)}
    options = {"projector": "none", "storage": "float32"}
    both = tracer.Tracer(model, "image_classification", 6, tmp_path / "both", **options)
    alone = tracer.Tracer(model, "image_classification", 6, tmp_path / "alone", **options)
    for tracing, states in ((both, [first, second]), (alone, [second])):
        for model_id, state in enumerate(states):
            tracing.load_checkpoint(state, model_id, 1.0)
            tracing.featurize((x, y), num_samples=6)
        tracing.finalize_features()
    torch.testing.assert_close(
        torch.from_numpy(both.self_influence([1])), torch.from_numpy(alone.self_influence()), rtol=1e-5, atol=0
    )


def test_agreeing_on_zero_is_not_enough():
    """A hinge loss that the first batch satisfies has no gradient; what capture misses shows only later."""

    def hinge(model, batch):
        z = torch.tanh(model.enc(batch[0]))
        return torch.relu(1 - batch[1] * F.linear(z, model.enc.weight.t()).sum(1))

    model = Module(None, enc=nn.Linear(4, 4)).double()
    engine = GradientEngine(model, make_task(hinge), ["enc.weight", "enc.bias"])
    x = data(5, 4)
    with torch.no_grad():
        sign = F.linear(torch.tanh(model.enc(x)), model.enc.weight.t()).sum(1).sign()
    satisfied = (x, 1e3 * sign)
    assert not any(float(value.abs().max()) for value in engine_gradients(engine, satisfied, 5).values())
    found = engine_gradients(engine, (x, -sign), 5)
    torch.testing.assert_close(found, oracle_gradients(model, hinge, (x, -sign), 5))


def test_state_out_of_reach_that_forwards_change_is_refused():
    calls = []
    model = Module(lambda m, x: m.f(x) * (calls.append(1) or len(calls)), f=nn.Linear(4, 2))
    engine = GradientEngine(model, make_task(mean_square), ["f.weight", "f.bias"])
    with pytest.raises(tracer.GradientError, match="keeps state between calls"):
        engine_gradients(engine, (data(3, 4).float(),), 3)


def test_registered_rule_is_used_and_checked():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.rand(4))

        def forward(self, x):
            return x * self.weight

    class WrongScale(Scale):
        pass

    tracer.register_layer_rule(Scale, lambda call: {"weight": call.x * call.grad_output}, ["weight"])
    tracer.register_layer_rule(WrongScale, lambda call: {"weight": call.x + call.grad_output}, ["weight"])
    assert_gradients_match(nn.Sequential(Scale(), nn.Tanh()), mean_square, (data(3, 4),), 3, method="capture")
    engine = assert_gradients_match(nn.Sequential(WrongScale(), nn.Tanh()), mean_square, (data(3, 4),), 3)
    assert engine.raw == {"0.weight"}


def test_rule_of_another_kind_is_refused():
    with pytest.raises(tracer.InputTypeError, match="register_layer_rule takes"):
        tracer.register_layer_rule(3, lambda call: {})


def test_isolation_context_selects_parameters():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with isolated(model, {"1.weight"}, torch.device("cpu")):
        assert [name for name, p in model.named_parameters() if p.requires_grad] == ["1.weight"]
    assert all(p.requires_grad for p in model.parameters())


def test_modules_that_convert_themselves_run_sample_by_sample():
    """vmap over a forward that calls ``to`` on a module ends the process."""

    def forward(m, x):
        m.route = m.route.to(torch.float64)
        return m.f(torch.hypot(x, m.scale)) * m.route(x)

    model = Module(forward, f=nn.Linear(4, 2), route=nn.Linear(4, 2))
    model.scale = nn.Parameter(torch.rand(4))
    engine = assert_gradients_match(model, mean_square, (data(3, 4),), 3, general=["scale"])
    assert engine.runs_samples_alone


def test_a_half_precision_model_with_a_part_in_full_precision_is_held_to_half_precision():
    def forward(m, x):
        m.route = m.route.float()
        return m.f(m.route((x * m.scale).float()).to(x.dtype))

    torch.manual_seed(0)
    model = Module(forward, route=nn.Linear(16, 16), f=nn.Linear(16, 16))
    model.scale = nn.Parameter(torch.rand(16))
    model = model.bfloat16()
    engine = GradientEngine(model, make_task(mean_square), [name for name, _ in model.named_parameters()])
    batch = (data(6, 16).bfloat16(),)
    found, expected = engine_gradients(engine, batch, 6), oracle_gradients(model, mean_square, batch, 6)
    for name, value in expected.items():
        assert (found[name].double() - value.double()).norm() < 0.1 * value.double().norm(), name

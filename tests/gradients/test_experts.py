"""Mixtures of experts of transformers against a loop of single samples."""

import pytest
import torch
import transformers
from oracles import assert_gradients_match, engine_gradients, oracle_gradients

from tracer.data.named_tasks import make_task
from tracer.gradients import GradientEngine, isolated
from tracer.gradients.experts import ExpertsGradient
from tracer.gradients.per_sample import DenseGradient
from tracer.projection import make_projector

SMALL = {
    "vocab_size": 29,
    "hidden_size": 16,
    "intermediate_size": 24,
    "moe_intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
DEEPSEEK = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
    "head_dim": 4,
}
MODELS = {
    "Mixtral": {"num_local_experts": 4},
    "Qwen3Moe": {"num_experts": 4, "num_experts_per_tok": 2},
    "Olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "GptOss": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4},
    "DeepseekV3": DEEPSEEK,
}


def decoder(kind, implementation="eager", **changes):
    config = getattr(transformers, f"{kind}Config")(**SMALL | MODELS[kind] | changes)
    config._attn_implementation, config._experts_implementation = "eager", implementation
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model


def tokens(num_rows, length=7, seed=0):
    return torch.randint(3, 29, (num_rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("num_rows", [1, 3])
@pytest.mark.parametrize("kind", MODELS)
def test_gradients_of_experts(kind, num_rows):
    engine = assert_gradients_match(decoder(kind), "language_modeling", tokens(num_rows), num_rows, rtol=1e-5)
    assert not any(name.endswith(("gate_up_proj", "down_proj")) for name in engine.raw)


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
def test_gradients_do_not_depend_on_how_experts_are_run(implementation):
    model = decoder("Mixtral", implementation)
    names = [name for name, _ in model.named_parameters()]
    found = engine_gradients(GradientEngine(model, make_task("language_modeling"), names), tokens(3), 3)
    expected = oracle_gradients(decoder("Mixtral").double(), "language_modeling", tokens(3), 3)
    for name, value in expected.items():
        assert (found[name] - value).norm() <= 1e-4 * value.norm(), name


def test_later_batches_with_other_lengths_and_one_sample():
    model = decoder("Qwen3Moe").double()
    names = [name for name, _ in model.named_parameters()]
    engine = GradientEngine(model, make_task("language_modeling"), names)
    for num_rows, length in ((4, 7), (3, 5), (1, 6)):
        batch = tokens(num_rows, length, seed=length)
        found = engine_gradients(engine, batch, num_rows)
        expected = oracle_gradients(model, "language_modeling", batch, num_rows)
        for name, value in expected.items():
            assert (found[name] - value).norm() <= 1e-5 * value.norm() + 1e-12, name
    assert not engine.fallback


def test_experts_with_another_forward_run_by_themselves():
    """The stand-in would leave out what this forward adds; outputs show it."""
    model = decoder("Mixtral").double()

    class Doubled(type(model.model.layers[0].mlp.experts)):
        def forward(self, *args):
            return 2 * super().forward(*args)

    for layer in model.model.layers:
        layer.mlp.experts.__class__ = Doubled
    names = [name for name, _ in model.named_parameters()]
    engine = GradientEngine(model, make_task("language_modeling"), names)
    found = engine_gradients(engine, tokens(3), 3)
    expected = oracle_gradients(model, "language_modeling", tokens(3), 3)
    for name, value in expected.items():
        assert (found[name] - value).norm() <= 1e-5 * value.norm(), name


def test_forwards_are_put_back():
    model = decoder("Mixtral")
    names = [name for name, _ in model.named_parameters()]
    engine_gradients(GradientEngine(model, make_task("language_modeling"), names), tokens(3), 3)
    assert not any("forward" in module.__dict__ for module in model.modules())


def gradients(num_samples=4, num_tokens=6, shape=(5, 3, 2), dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    index = torch.randint(0, shape[0], (num_samples, num_tokens), generator=generator)
    left = torch.randn(num_samples, num_tokens, shape[1], generator=generator, dtype=dtype)
    right = torch.randn(num_samples, num_tokens, shape[2], generator=generator, dtype=dtype)
    built = torch.zeros(num_samples, *shape, dtype=dtype)
    for sample in range(num_samples):
        for token in range(num_tokens):
            built[sample, index[sample, token]] += torch.outer(left[sample, token], right[sample, token])
    return ExpertsGradient(index, left, right, shape), built


@pytest.mark.parametrize("num_tokens", [1, 6, 40])
@pytest.mark.parametrize("shape", [(5, 3, 2), (2, 40, 30), (1, 3, 2)])
def test_the_form_is_that_of_built_gradients(num_tokens, shape):
    gradient, built = gradients(num_tokens=num_tokens, shape=shape)
    dense = DenseGradient(built)
    torch.testing.assert_close(gradient.dense(1, 3), dense.dense(1, 3))
    torch.testing.assert_close(gradient.squared_norm(), dense.squared_norm())
    torch.testing.assert_close(gradient.inner(gradient), dense.squared_norm())
    torch.testing.assert_close(gradient.fold(2).dense(0, 2), dense.fold(2).dense(0, 2))
    (joined,) = ExpertsGradient.joined([gradient, gradient])
    torch.testing.assert_close(joined.dense(0, 4), 2 * dense.dense(0, 4))
    weights = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(gradient.weighted_sum(weights), dense.weighted_sum(weights))
    lengths = torch.tensor([1.0, 2.0, 3.0, 4.0])
    torch.testing.assert_close(gradient.divided(lengths).dense(0, 4), dense.divided(lengths).dense(0, 4))
    for kind in ("sketch", "rademacher", "factored"):
        projector = make_projector(kind, {"weight": shape}, 16, 0)
        expected = projector.project({"weight": dense}).features
        torch.testing.assert_close(projector.project({"weight": gradient}).features, expected, rtol=1e-4, atol=1e-4)


def test_only_experts_that_a_sample_was_sent_to_are_built():
    gradient, built = gradients(num_tokens=2, shape=(50, 3, 2))
    index, values = gradient.touched_rows(0, 4)
    assert values.shape == (4, index.shape[1], 6)
    assert index.shape[1] <= 2
    assert built.flatten(2).norm(dim=2).count_nonzero(1).max() == index.shape[1]


def test_auxiliary_losses_of_routers_couple_samples_and_are_refused():
    import tracer

    class Task(tracer.Task):
        name = "with auxiliary loss"

        def outputs(self, model, batch):
            found = model(input_ids=batch, labels=batch, output_router_logits=True)
            return tracer.loss_outputs(found.loss + 0 * batch.sum(1))

        def settings(self):
            return {"name": self.name}

    model = decoder("Mixtral", router_aux_loss_coef=1.0).double()
    names = [name for name, _ in model.named_parameters()]
    engine = GradientEngine(model, Task(), names)
    with isolated(model, names, torch.device("cpu")), pytest.raises(tracer.GradientError, match="influence each other"):
        engine_gradients(engine, tokens(3), 3)

"""Gradient checkpointing of transformers while gradients are captured: the same gradients in less memory."""

import subprocess
import sys

import pytest
import torch
import transformers
from oracles import engine_gradients, oracle_gradients

from tracer.data.named_tasks import make_task
from tracer.gradients import GradientEngine, isolated
from tracer.gradients.checkpointing import CheckpointedForward

SMALL = {"vocab_size": 29, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "pad_token_id": 0}
MODELS = {
    "Llama": {"intermediate_size": 24, "num_key_value_heads": 1},
    "Mixtral": {"intermediate_size": 24, "num_key_value_heads": 1, "num_local_experts": 4},
    "GPT2": {"n_positions": 32},
    "Cohere": {"intermediate_size": 24, "num_key_value_heads": 1},
    "OPT": {"ffn_dim": 24, "word_embed_proj_dim": 16, "max_position_embeddings": 32},
}


def decoder(kind, frozen=()):
    config = getattr(transformers, f"{kind}Config")(**SMALL | MODELS[kind], bos_token_id=1, eos_token_id=2)
    config._attn_implementation, config._experts_implementation = "eager", "eager"
    torch.manual_seed(0)
    head = "LMHeadModel" if kind == "GPT2" else "ForCausalLM"
    model = getattr(transformers, kind + head)(config).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(each in name for each in frozen))
    model.gradient_checkpointing_enable()
    return model


def is_clean(model):
    """Whether no module of a model has a forward or a hook of the library."""
    modules = list(model.modules())
    hooks = [hook for module in modules for hook in module._forward_hooks.values()]
    return not any("forward" in module.__dict__ for module in modules) and not any(
        hook.__module__.startswith("tracer") for hook in hooks
    )


@pytest.fixture
def runs(monkeypatch):
    """How often layers ran as regions."""
    count = []
    run = CheckpointedForward._run
    monkeypatch.setattr(
        CheckpointedForward, "_run", lambda self, *args, **kwargs: count.append(1) or run(self, *args, **kwargs)
    )
    return count


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable")
@pytest.mark.parametrize("frozen", [(), ("embed", "wte", "wpe")])
@pytest.mark.parametrize("kind", MODELS)
def test_gradients_with_checkpointing(kind, frozen, runs):
    model = decoder(kind, frozen)
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    engine = GradientEngine(model, make_task("language_modeling"), names)
    for num_rows in (3, 2, 1):
        tokens = torch.randint(3, 29, (num_rows, 7), generator=torch.Generator().manual_seed(num_rows))
        found = engine_gradients(engine, tokens, num_rows)
        expected = oracle_gradients(decoder(kind, frozen), "language_modeling", tokens, num_rows, names)
        for name, value in expected.items():
            assert (found[name] - value).norm() <= 1e-5 * value.norm() + 1e-12, name
    assert bool(runs) == (kind not in ("Mixtral", "Cohere"))  # whose layers hold raw parameters
    assert not engine.fallback
    assert is_clean(model)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing")
@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("kind", ["Llama", "Mixtral", "GPT2"])
def test_gradients_of_a_model_that_offloads_activations(kind, checkpointing):
    model, offloaded = decoder(kind), []
    if not checkpointing:
        model.gradient_checkpointing_disable()
    forward = model.forward

    def pack(value):
        offloaded.append(value.detach().numpy().copy())
        return offloaded[-1]

    def offloading(*args, **kwargs):
        with torch.autograd.graph.saved_tensors_hooks(pack, torch.from_numpy):
            return forward(*args, **kwargs)

    model.forward = offloading
    names = [name for name, _ in model.named_parameters()]
    engine = GradientEngine(model, make_task("language_modeling"), names)
    tokens = torch.randint(3, 29, (3, 7), generator=torch.Generator().manual_seed(3))
    found = engine_gradients(engine, tokens, 3)
    for name, value in oracle_gradients(decoder(kind), "language_modeling", tokens, 3, names).items():
        assert (found[name] - value).norm() <= 1e-5 * value.norm() + 1e-12, name
    assert offloaded and not engine.fallback


def test_each_layer_runs_twice_and_is_captured_once(runs):
    model = decoder("Llama")
    names = [name for name, _ in model.named_parameters()]
    engine = GradientEngine(model, make_task("language_modeling"), names, for_sums=True)
    tokens = torch.randint(3, 29, (3, 7))
    engine_gradients(engine, tokens, 3)  # with its check
    runs.clear()
    engine_gradients(engine, tokens, 3)
    assert len(runs) == 2 * 3


def test_hooks_are_removed_after_an_error():
    model = decoder("Llama")
    names = [name for name, _ in model.named_parameters()]
    engine = GradientEngine(model, make_task("language_modeling"), names)

    class Broken(Exception):
        pass

    class Sink:
        def begin(self):
            pass

        def take(self, *_):
            raise Broken

    with isolated(model, names, torch.device("cpu")), pytest.raises(Broken):
        engine.compute(torch.randint(3, 29, (3, 7)), 3, Sink())
    assert is_clean(model)


PEAKS = """
import os, sys, torch, transformers
from tracer.api.sinks import DroppingSink
from tracer.data.named_tasks import make_task
from tracer.gradients import GradientEngine, isolated

torch.set_num_threads(1)
config = transformers.LlamaConfig(vocab_size=64, hidden_size=128, intermediate_size=512, num_hidden_layers=16,
    num_attention_heads=4, num_key_value_heads=4, pad_token_id=0)
config._attn_implementation = "sdpa"
torch.manual_seed(0)
model, tokens = transformers.LlamaForCausalLM(config), torch.randint(3, 64, (2, 1024))

def compute(kind):
    if kind != "plain":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    names = [name for name, _ in model.named_parameters()]
    if kind == "ours":
        engine = GradientEngine(model, make_task("language_modeling"), names, for_sums=True)
        with isolated(model, names, torch.device("cpu")):
            engine.compute(tokens, 2, DroppingSink())
    else:
        model.train()
        make_task("language_modeling").outputs(model, tokens).output.sum().backward()

for kind in sys.argv[1:]:
    if not os.fork():  # into a process with a peak of its own, and what is imported
        compute(kind)
        # ru_maxrss counts the memory of the process that this one was forked from
        peak = next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
        print(peak, flush=True)
        os._exit(0)
    assert os.wait()[1] == 0
"""


def peaks(*kinds):
    """The most megabytes of processes that computed the gradients of two rows of 1,024 tokens."""
    done = subprocess.run([sys.executable, "-c", PEAKS, *kinds], capture_output=True, text=True, check=True)
    return [float(peak) for peak in done.stdout.split()[-len(kinds) :]]


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process is read from /proc")
def test_memory_is_that_of_a_plain_pass_with_checkpointing():
    plain, checkpointed, ours = peaks("plain", "checkpointed", "ours")
    assert checkpointed < 0.8 * plain
    assert ours <= 1.2 * checkpointed

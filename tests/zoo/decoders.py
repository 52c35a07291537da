"""Causal language models of transformers: dense, mixtures of experts, state spaces."""

from __future__ import annotations

from zoo.configurations import language_model

NOISE = "float32 inside a float64 model: a gradient that is rounding noise is compared at float64's tolerance"
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}

DECODERS = [
    language_model("Llama", "LlamaForCausalLM"),
    language_model("GPT-2", "GPT2LMHeadModel", n_embd=16, n_head=2, n_layer=2, n_positions=32),
    language_model("Mistral", "MistralForCausalLM"),
    language_model("Qwen2", "Qwen2ForCausalLM"),
    language_model("Qwen3", "Qwen3ForCausalLM"),
    language_model("Gemma", "GemmaForCausalLM"),
    language_model("OPT", "OPTForCausalLM", ffn_dim=24, word_embed_proj_dim=16, fault=NOISE),
    language_model("GPT-NeoX", "GPTNeoXForCausalLM"),
    language_model("Mixtral", "MixtralForCausalLM", num_local_experts=4),
    language_model("Mamba", "MambaForCausalLM", state_size=4, time_step_rank=2),
]

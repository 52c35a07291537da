"""Parameter-efficient methods of peft on a tiny language model."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from zoo.configurations import causal, configured
from zoo.harness import Entry, own_loss

TARGETS = ["q_proj", "v_proj"]


def without_penalty(model, batch):
    """Return the loss of a causal language model without the penalty that AdaLoRA adds to it."""
    scores, labels = model(**batch).logits[:, :-1], batch["labels"][:, 1:]
    return F.cross_entropy(scores.flatten(0, 1), labels.flatten())


def tuned(
    name: str, config: str, base: str = "LlamaForCausalLM", base_options: dict | None = None, **options: Any
) -> Entry:
    """Return the entry of a language model with an adapter; only the adapter's parameters are trained."""
    entry = {key: options.pop(key) for key in ("refused", "or_exact", "fault", "rtol", "loss") if key in options}

    def build():
        import peft

        model = configured(base, **(base_options or {}))()
        return peft.get_peft_model(model, getattr(peft, config)(task_type="CAUSAL_LM", **options))

    return Entry(f"peft {name}", build, causal(), "language_modeling", **{"loss": own_loss} | entry)


PEFT_METHODS = [
    tuned("LoRA", "LoraConfig", r=2, target_modules=TARGETS),
    tuned("LoRA of all layers", "LoraConfig", r=2, target_modules="all-linear"),
    tuned("LoRA and embeddings", "LoraConfig", r=2, target_modules=[*TARGETS, "embed_tokens"]),
    tuned("LoRA with saved modules", "LoraConfig", r=2, target_modules=TARGETS, modules_to_save=["lm_head"]),
    tuned(
        "LoRA with bias", "LoraConfig", r=2, target_modules=TARGETS, bias="all", base_options={"attention_bias": True}
    ),
    tuned("rank-stabilized LoRA", "LoraConfig", r=2, target_modules=TARGETS, use_rslora=True),
    tuned("DoRA", "LoraConfig", r=2, target_modules=TARGETS, use_dora=True),
    tuned(
        "LoRA of a parameter",
        "LoraConfig",
        base="MixtralForCausalLM",
        base_options={"num_local_experts": 2},
        r=2,
        target_modules=["q_proj"],
        target_parameters=["mlp.experts.gate_up_proj"],
    ),
    tuned(
        "LoRA of Conv1D",
        "LoraConfig",
        base="GPT2LMHeadModel",
        base_options={"n_embd": 16, "n_head": 2, "n_layer": 2},
        r=2,
        target_modules=["c_attn"],
        fan_in_fan_out=True,
    ),
    tuned("trainable tokens", "TrainableTokensConfig", target_modules=["embed_tokens"], token_indices=[3, 4, 5]),
    tuned(
        "AdaLoRA",
        "AdaLoraConfig",
        r=2,
        target_r=2,
        init_r=2,
        total_step=10,
        target_modules=TARGETS,
        loss=without_penalty,
    ),
    tuned("IA3", "IA3Config", target_modules=[*TARGETS, "down_proj"], feedforward_modules=["down_proj"]),
    tuned("LoHa", "LoHaConfig", r=2, target_modules=TARGETS),
    tuned("LoKr", "LoKrConfig", r=2, target_modules=TARGETS),
    tuned("OFT", "OFTConfig", oft_block_size=4, r=0, target_modules=TARGETS),
    tuned("BOFT", "BOFTConfig", boft_block_size=4, target_modules=TARGETS),
    tuned("VeRA", "VeraConfig", r=2, target_modules=["q_proj", "o_proj"]),
    tuned("FourierFT", "FourierFTConfig", n_frequency=8, target_modules=TARGETS),
    tuned("HRA", "HRAConfig", r=2, target_modules=TARGETS),
    tuned("VB-LoRA", "VBLoRAConfig", r=2, num_vectors=8, vector_length=4, topk=2, target_modules=TARGETS),
    tuned("layer norms", "LNTuningConfig", target_modules=["input_layernorm", "post_attention_layernorm"]),
    tuned("RandLoRA", "RandLoraConfig", r=2, target_modules=["q_proj", "o_proj"]),
    tuned("RoAd", "RoadConfig", group_size=2, target_modules=TARGETS),
    tuned("SHiRA", "ShiraConfig", r=2, target_modules=TARGETS),
    tuned("C3A", "C3AConfig", block_size=4, target_modules=TARGETS),
    tuned("MiSS", "MissConfig", r=2, target_modules=TARGETS),
    tuned("WaveFT", "WaveFTConfig", n_frequency=8, target_modules=TARGETS),
    tuned("DeLoRA", "DeloraConfig", r=2, target_modules=TARGETS),
    tuned("GraLoRA", "GraloraConfig", r=2, gralora_k=2, target_modules=TARGETS),
    tuned("prompt tuning", "PromptTuningConfig", num_virtual_tokens=3, refused="expects logits"),
    tuned("prefix tuning", "PrefixTuningConfig", num_virtual_tokens=3),
    tuned("P-tuning", "PromptEncoderConfig", num_virtual_tokens=3, encoder_hidden_size=8, refused="expects logits"),
    tuned("Llama-Adapter", "AdaptionPromptConfig", adapter_len=3, adapter_layers=1),
]

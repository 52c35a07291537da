"""Models of transformers from small configurations with random weights, and batches for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from zoo.harness import NUM_EXAMPLES, Entry, own_loss
from zoo.tables import integers, labels, lengths, normal

VOCABULARY = 29
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def configured(model_class: str, attention: str = "eager", **changes: Any) -> Callable[[], torch.nn.Module]:
    """Return a builder of a model of transformers; options that a configuration does not know are left out."""

    def build():
        import transformers

        cls = getattr(transformers, model_class)
        config_class = cls.config_class
        names = config_class.attribute_map
        known = set(config_class().to_dict()) | set(names)
        small = {"num_labels": 3} | {names.get(key, key): value for key, value in SMALL.items() if key in known}
        config = config_class(**small | {names.get(key, key): value for key, value in changes.items()})
        config._attn_implementation = attention
        config._experts_implementation = "eager"  # grouped products of torch do not take float64
        return cls(config)

    return build


def text(length: int = 7, padded: bool = False, first=(7, 4, 3, 2), shortest: int = 2, **more: Callable[[], Any]):
    """Return a maker of batches of tokens, with padding at the end if wanted; without labels."""

    def batch() -> dict[str, Any]:
        tokens = integers(VOCABULARY, length, low=3)
        if not padded:
            return {"input_ids": tokens, **{key: make() for key, make in more.items()}}
        mask = torch.arange(length) < lengths(length, first).clamp(min=shortest)[:, None]
        extra = {key: make() for key, make in more.items()}
        return {"input_ids": tokens * mask, "attention_mask": mask.long(), **extra}

    return batch


def causal(make_batch=None):
    """Return a maker of batches whose labels are the tokens, as collators of causal language models make them."""
    make_batch = make_batch or text(padded=True)

    def batch():
        made = make_batch()
        mask = made.get("attention_mask", torch.ones_like(made["input_ids"]))
        return made | {"labels": made["input_ids"].masked_fill(mask == 0, -100)}

    return batch


def language_model(name: str, model_class: str, batch=None, **changes: Any) -> Entry:
    """Return the entry of a causal language model on padded sequences; its loss is the model's own."""
    entry = {key: changes.pop(key) for key in ("refused", "or_exact", "fault", "rtol", "doubled") if key in changes}
    build = configured(model_class, **changes)
    return Entry(name, build, causal(batch), "language_modeling", own_loss, **entry)


def classifier(name: str, model_class: str, batch: Callable[[], dict[str, Any]], **changes: Any) -> Entry:
    """Return the entry of a model with three classes; its loss is the model's own."""
    entry = {key: changes.pop(key) for key in ("refused", "or_exact", "fault", "rtol", "doubled") if key in changes}
    build = configured(model_class, **changes)
    return Entry(name, build, lambda: batch() | {"labels": labels()}, "text_classification", own_loss, **entry)


def pixels(size: int = 16, channels: int = 3):
    """Return a maker of batches of images."""
    return lambda: {"pixel_values": normal(channels, size, size)}


def squares(*names):
    """Return a task of mean squares of outputs, for models without a loss of single examples."""

    def task(model, batch):
        output = model(**batch)
        return sum(output[name].flatten(1).square().mean(1) for name in names)

    return task


def outputs(name: str, model_class: str, batch, *names: str, **changes) -> Entry:
    """Return the entry of a model, whose loss is the mean square of some of its outputs."""
    entry = {key: changes.pop(key) for key in ("refused", "or_exact", "fault", "rtol", "doubled") if key in changes}
    return Entry(name, configured(model_class, **changes), batch, squares(*names), **entry)


__all__ = ["NUM_EXAMPLES", "causal", "classifier", "configured", "language_model", "outputs", "pixels", "text"]

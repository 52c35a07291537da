"""Hugging Face models, with the batches that their collators make."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from oracles import assert_gradients_match
from torch import nn

from tracer import Tracer, attribute

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


def bert():
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=40, max_position_embeddings=32, num_labels=3, **SMALL)
    return transformers.BertForSequenceClassification(config)


def gpt2():
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=40, n_positions=32, n_embd=16, n_layer=2, n_head=2)
    return transformers.GPT2LMHeadModel(config)


def rows(count=9):
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(3, 9, (count,), generator=generator).tolist()
    return [
        {"input_ids": torch.randint(1, 40, (length,), generator=generator), "labels": int(row % 3)}
        for row, length in enumerate(lengths)
    ]


def collate(samples):
    """Pad to the longest of the batch, as `DataCollatorWithPadding` does."""
    tokens = nn.utils.rnn.pad_sequence([sample["input_ids"] for sample in samples], batch_first=True)
    labels = torch.tensor([sample["labels"] for sample in samples])
    return transformers.BatchEncoding({"input_ids": tokens, "attention_mask": (tokens > 0).long(), "labels": labels})


@pytest.mark.parametrize("num_rows", [1, 3])
def test_bert_classification_is_captured_whole(num_rows):
    assert_gradients_match(bert(), "text_classification", collate(rows()[:num_rows]), num_rows, rtol=1e-7)


@pytest.mark.parametrize("num_rows", [1, 4])
def test_gpt2_with_tied_head_is_captured_whole(num_rows):
    tokens = torch.randint(0, 40, (num_rows, 8), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}
    assert_gradients_match(gpt2(), "language_modeling", batch, num_rows, rtol=1e-7)


def causal(name, **options):
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0, **SMALL, **options}
    model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**sizes))
    with torch.no_grad():  # as trained: norms' weights that differ
        for parameter_name, parameter in model.named_parameters():
            if "norm" in parameter_name:
                parameter += 0.3 * torch.randn(parameter.shape)
    return model


@pytest.mark.parametrize("name", ["Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Gemma2", "Phi3", "Olmo2"])
def test_decoders_are_captured_whole(name):
    tokens = torch.randint(1, 40, (3, 8), generator=torch.Generator().manual_seed(1))
    # Their norms and rotary positions compute in float32 whatever the model's dtype.
    assert_gradients_match(causal(name), "language_modeling", {"input_ids": tokens}, 3, rtol=3e-6)


def test_padding_to_another_length_resumes(tmp_path):
    model, data = bert(), rows()
    options = {"projector": "none", "storage": "float32"}
    tracing = Tracer(model, "text_classification", 9, tmp_path / "a", **options)
    tracing.load_checkpoint(model.state_dict(), 0, 1.0)
    tracing.featurize(collate(data[:4]), num_samples=4)
    tracing.close()
    tracing = Tracer(model, "text_classification", 9, tmp_path / "a", **options)
    tracing.load_checkpoint(model.state_dict(), 0, 1.0)
    tracing.featurize(collate(data), num_samples=9)
    tracing.finalize_features()
    again = Tracer(model, "text_classification", 9, tmp_path / "c", **options)
    again.load_checkpoint(model.state_dict(), 0, 1.0)
    for row in range(9):
        again.featurize(collate(data[row : row + 1]), num_samples=1)
    again.finalize_features()
    np.testing.assert_allclose(tracing.self_influence(), again.self_influence(), rtol=1e-3)


class Rows(torch.utils.data.Dataset):
    def __init__(self, samples):
        self.samples = samples

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, row):
        return self.samples[row]


def test_one_call_with_a_collator(tmp_path):
    model, data = bert(), rows()
    found = attribute(
        model,
        "text_classification",
        Rows(data),
        Rows(data[:2]),
        [(model.state_dict(), 1.0)],
        save_dir=tmp_path / "store",
        collate_fn=collate,
        batch_size=4,
        projector="none",
        storage="float32",
    )
    np.testing.assert_allclose(np.diag(found.scores[:2]), found.self_influence()[:2], rtol=1e-3)


def test_adapters_only(tmp_path):
    model = bert()
    model.requires_grad_(False)
    for layer in model.bert.encoder.layer:
        query = layer.attention.self.query
        adapter = nn.Sequential(nn.Linear(16, 2, bias=False), nn.Linear(2, 16, bias=False))
        layer.attention.self.query = WithAdapter(query, adapter)
    batch = collate(rows()[:3])
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert all("lora_" in name for name in names)
    assert_gradients_match(model, "text_classification", batch, 3, rtol=1e-6)
    tracing = Tracer(model, "text_classification", 3, tmp_path / "store", projector="none", params="*.lora_*")
    assert tracing.store.manifest.feature_dim == 2 * 2 * 2 * 16


class WithAdapter(nn.Module):
    def __init__(self, base, adapter):
        super().__init__()
        self.base, self.lora_a = base, adapter

    def forward(self, x):
        return self.base(x) + self.lora_a(x)

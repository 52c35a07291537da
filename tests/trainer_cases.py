"""A small training by the trainer of Hugging Face."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from tracer import IndexedDataset

needs_transformers = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("transformers", "accelerate"))), reason="transformers is not installed"
)
TOKENS = torch.randint(1, 30, (12, 6), generator=torch.Generator().manual_seed(3))


class Texts(torch.utils.data.Dataset):
    def __len__(self):
        return len(TOKENS)

    def __getitem__(self, row):
        return {"input_ids": TOKENS[row], "labels": torch.tensor(row % 2)}


def bert(dropout=0.0):
    import transformers

    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}
    rates = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    config = transformers.BertConfig(vocab_size=30, max_position_embeddings=8, num_labels=2, **sizes, **rates)
    return transformers.BertForSequenceClassification(config).double()


def hf_trainer(folder, model, callback=None, **options):
    import transformers

    settings = {
        "output_dir": str(folder / "out"),
        "per_device_train_batch_size": 4,
        "max_steps": 7,
        "learning_rate": 0.05,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "save_strategy": "no",
        "optim": "sgd",
        "weight_decay": 0.1,
        "remove_unused_columns": False,
        "max_grad_norm": 0.3,
        **options,
    }
    return transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(**settings),
        train_dataset=IndexedDataset(Texts()) if callback else Texts(),
        callbacks=[callback] if callback else [],
    )

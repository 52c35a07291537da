"""A tokenizer of a few words with a chat template, and data for it; nothing is downloaded."""

from __future__ import annotations

import json
import os

import pytest
import torch

transformers = pytest.importorskip("transformers")
datasets = pytest.importorskip("datasets")
datasets.disable_progress_bars()

WORDS = [f"w{number}" for number in range(30)]
TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'assistant' %}<assistant> {% generation %}"
    "{{ message.content }} <eos>{% endgeneration %} {% else %}<user> {{ message.content }} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


def make_tokenizer(template: str | None = TEMPLATE):
    from tokenizers import Tokenizer, models, pre_tokenizers

    names = ["<pad>", "<unk>", "<eos>", "<user>", "<assistant>", *WORDS]
    inner = Tokenizer(models.WordLevel({name: number for number, name in enumerate(names)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    found = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **special)
    found.chat_template = template
    return found


def tokens_of(text: str) -> list[int]:
    names = ["<pad>", "<unk>", "<eos>", "<user>", "<assistant>", *WORDS]
    return [names.index(word) for word in text.split()]


def texts(count: int = 12, longest: int = 9) -> list[str]:
    return [
        " ".join(WORDS[(3 * row + place * place) % 30] for place in range(1 + row * 5 % longest))
        for row in range(count)
    ]


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch):
    """Keep what `datasets` writes in the test's own folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", os.fspath(tmp_path / "datasets"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


def llama(seed=0, **options):
    torch.manual_seed(seed)
    sizes = {"vocab_size": 40, "max_position_embeddings": 64, "initializer_range": 0.3, **SIZES, **options}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))


@pytest.fixture
def run(tmp_path):
    """A trainer's folder: a model with its tokenizer, two checkpoints, and data."""
    save(llama(), tmp_path / "model")
    for step in (10, 20):
        folder = tmp_path / "run" / f"checkpoint-{step}"
        llama(step).save_pretrained(folder, max_shard_size="5KB" if step == 20 else "1GB")
        log = [{"step": 10, "learning_rate": 0.02}, {"step": 20, "learning_rate": 0.01}]
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step, "log_history": log}))
    assert len(list((tmp_path / "run" / "checkpoint-20").glob("*.safetensors"))) > 1
    with (tmp_path / "train.jsonl").open("w") as file:
        file.writelines(json.dumps({"text": text, "source": "ab"[row % 2]}) + "\n" for row, text in enumerate(texts()))
    (tmp_path / "targets.txt").write_text("\n".join(texts()[3:5]))
    return tmp_path


def save(model, folder):
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)

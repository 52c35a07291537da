"""A tokenizer of a few words with a chat template, and data for it; nothing is downloaded."""

from __future__ import annotations

import os

import pytest

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

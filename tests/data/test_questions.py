"""Prompts and completions as tokens; the tokenizer by hand is the oracle."""

from __future__ import annotations

import pytest
import torch
from text_cases import datasets, make_tokenizer, offline, tokens_of, transformers  # noqa: F401

from tracer.data.text.questions import Question, QuestionEncoder, QuestionSource, as_tokens, is_single, token_texts
from tracer.data.text.settings import TextSettings


def byte_level():
    """A tokenizer of bytes, whose characters may take several tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    names = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({name: number for number, name in enumerate(names)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner)


@pytest.mark.parametrize("text", ["plain words", "naïve 东京 🙂🙂!", " leading", "é", ""])
def test_texts_of_tokens_add_up_to_the_text(text):
    tokenizer = byte_level()
    tokens = tokenizer(text)["input_ids"]
    found = token_texts(tokenizer, tokens)
    assert "".join(found) == text and len(found) == len(tokens)
    assert [len(each) <= 1 for each in found] == [True] * len(tokens)


def test_texts_of_words_have_the_space_before_them():
    assert token_texts(make_tokenizer(), tokens_of("w1 w2 <eos>")) == ["w1", " w2", " <eos>"]


def test_a_prompt_is_not_predicted_and_a_completion_ends_as_in_training():
    for add_eos, end in ((True, " <eos>"), (False, "")):
        encoder = QuestionEncoder(make_tokenizer(), TextSettings(add_eos=add_eos, loss_on="all"), False)
        found = encoder.question("w1 w2 ", "w3")
        assert found == Question(tokens_of("w1 w2"), tokens_of("w3" + end))
        assert found.labels == [-100, -100, *tokens_of("w3" + end)]


def test_of_a_token_that_pads_and_ends_texts_one_is_left():
    tokenizer = make_tokenizer()
    tokenizer.pad_token = "<eos>"
    encoder = QuestionEncoder(tokenizer, TextSettings(), False)
    found = encoder.question(tokens_of("<eos> <eos> w1"), tokens_of("w2 <eos> <eos> <eos>"))
    assert found == Question(tokens_of("w1"), tokens_of("w2 <eos>"))


def test_one_text_is_told_from_several():
    messages = [{"role": "user", "content": "w1"}]
    assert [is_single(each) for each in ("w1", [1, 2], torch.tensor([[1, 2]]), messages)] == [True] * 4
    assert [is_single(each) for each in (["w1"], [[1, 2], [3]], torch.tensor([[1], [2]]), [messages])] == [False] * 4
    assert as_tokens(torch.tensor([[1, 2]])) == [1, 2] and as_tokens("w1") is as_tokens([]) is None


def test_questions_come_in_their_order_in_batches_of_at_most_so_many_tokens():
    questions = [Question([1] * size, [2, 3]) for size in (1, 5, 2, 2)]
    source = QuestionSource(questions, 0, 12)
    batches = list(source.batches(torch.arange(4).numpy()))
    assert [inds.tolist() for _, inds in batches] == [[0], [1], [2, 3]]
    assert batches[2][0]["labels"].tolist() == [[-100, -100, 2, 3]] * 2
    assert all(batch["input_ids"].numel() <= 12 for batch, _ in batches)

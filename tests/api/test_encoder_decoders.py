"""Stores of encoder-decoders from names, and questions to them; autograd of single documents is the oracle."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from text_cases import datasets, make_tokenizer, offline, save, texts, tokens_of, transformers  # noqa: F401
from torch.nn import functional as F

from tracer import InputError, build_store, load_store
from tracer.data.text.settings import TextSettings
from tracer.data.text.source import text_source

pytestmark = pytest.mark.filterwarnings("ignore")
EOS = 2
DATA = [{"prompt": text, "completion": f"w{row} w1", "source": "ab"[row % 2]} for row, text in enumerate(texts())]


def t5(seed=0):
    torch.manual_seed(seed)
    sizes = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    tokens = {"pad_token_id": 0, "eos_token_id": EOS, "decoder_start_token_id": 0}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, **tokens, initializer_factor=0.5))


def bart(seed=0):
    torch.manual_seed(seed)
    sizes = {f"{side}_{name}": 1 for side in ("encoder", "decoder") for name in ("layers",)}
    sizes |= {f"{side}_{name}": 2 for side in ("encoder", "decoder") for name in ("attention_heads",)}
    sizes |= {"d_model": 16, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 20}
    tokens = {"pad_token_id": 0, "bos_token_id": 3, "eos_token_id": EOS, "decoder_start_token_id": EOS}
    config = transformers.BartConfig(vocab_size=40, **sizes, **tokens, forced_eos_token_id=EOS, init_std=0.3)
    return transformers.BartForConditionalGeneration(config)


def gradients(model, prompt, completion):
    """The gradient of the loss of each token of a completion, in float64, without padding; ``[T, parameters]``."""
    model = model.double().eval()
    labels = torch.tensor([tokens_of(completion)])
    logits = model(input_ids=torch.tensor([tokens_of(prompt)]), labels=labels).logits
    losses = F.cross_entropy(logits[0], labels[0], reduction="none")
    parameters = list(model.parameters())
    rows = [torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True) for loss in losses]
    zero = [torch.zeros_like(each) for each in parameters]
    return torch.stack(
        [torch.cat([(zero[i] if part is None else part).flatten() for i, part in enumerate(row)]) for row in rows]
    )


def by_hand(make, prompt, completion, cosine=False):
    """The score of each document's completion, token by token, by the loop of the definition."""
    scores = [0] * len(DATA)
    for seed, rate in ((1, 0.5), (2, 0.25)):
        target = gradients(make(seed), prompt, completion).sum(0)
        for row, each in enumerate(DATA):
            parts = gradients(make(seed), each["prompt"], f"{each['completion']} <eos>")
            length = parts.sum(0).norm() * target.norm() if cosine else 1
            scores[row] = scores[row] + rate * (parts @ target / length)
    return scores


def build(make, folder, **options):
    checkpoints = [(make(seed).state_dict(), rate) for seed, rate in ((1, 0.5), (2, 0.25))]
    given = {"tokenizer": make_tokenizer(None), "projector": "none", "storage": "float32", **options}
    return build_store(make(), DATA, checkpoints, save_dir=folder / "store", **given)


@pytest.fixture(scope="module", params=[t5, bart], ids=["t5", "bart"])
def built(request, tmp_path_factory):
    """A model's maker, and its store."""
    folder = tmp_path_factory.mktemp("built")
    return request.param, build(request.param, folder, group_column="source", batch_tokens=40)


@pytest.mark.parametrize("estimator", ["tracin", "cosine"])
def test_documents_and_their_tokens_have_the_scores_of_autograd(built, estimator):
    make, found = built
    found = dataclasses.replace(found, estimator=estimator)
    expected = by_hand(make, "w3 w4", "w5 <eos>", estimator == "cosine")
    for exact in (0, 5):
        answer = found.explain("w3 w4", "w5", k=len(DATA), exact=exact)
        assert answer.completions == ["w5 <eos>"] and len(answer.documents) == (exact or len(DATA))
        for each in answer.documents:
            before = tokens_of(DATA[each.number]["prompt"])
            assert (
                "".join(each.tokens).split()
                == f"{DATA[each.number]['prompt']} {DATA[each.number]['completion']} <eos>".split()
            )
            wanted = expected[each.number]
            assert each.score == pytest.approx(float(wanted.sum()), rel=1e-4, abs=1e-6)
            assert not each.token_scores[: len(before)].any()
            np.testing.assert_allclose(each.token_scores[len(before) :], wanted, rtol=1e-3, atol=1e-5)
            assert each.group == "ab"[each.number % 2]
    contrast = found.explain("w3 w4", "w5", rather_than="w6", k=3)
    other = found.explain("w3 w4", "w6", k=len(DATA))
    answer = {number: float(tokens.sum()) for number, tokens in enumerate(expected)}
    for each in contrast.documents:
        second = next(one.score for one in other.documents if one.number == each.number)
        assert each.score == pytest.approx(answer[each.number] - second, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("make", [t5, bart])
def test_a_store_of_names_is_built_asked_and_opened_again(tmp_path, make):
    save(make(), tmp_path / "model")
    for step in (5, 10):
        make(step).save_pretrained(tmp_path / "run" / f"checkpoint-{step}")
        log = [{"step": each, "learning_rate": 0.1} for each in (5, 10)]
        state = {"global_step": step, "log_history": log}
        (tmp_path / "run" / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps(state))
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(each) + "\n" for each in DATA))
    names = [tmp_path / "model", tmp_path / "train.jsonl", tmp_path / "run"]
    found = build_store(*names, save_dir=tmp_path / "store", targets=DATA[:2], proj_dim=64)
    assert found.scores.shape == (len(DATA), 2)
    answer = found.explain("w3 w4", k=3, max_new_tokens=4)
    model = make(10).eval()
    generated = model.generate(torch.tensor([tokens_of("w3 w4")]), max_new_tokens=4, do_sample=False)[0, 1:].tolist()
    stop = generated.index(EOS) + 1 if EOS in generated else len(generated)
    assert tokens_of(answer.completions[0]) == generated[:stop]
    loaded = load_store(tmp_path / "store").explain("w3 w4", k=3, max_new_tokens=4)
    assert json.dumps(loaded.to_dict()) == json.dumps(answer.to_dict())


def test_rows_are_sides_padded_apart():
    data = [{"prompt": "w1 w2 w3", "completion": "w4"}, {"prompt": "w5", "completion": "w6 w7 <eos>"}]
    source = text_source(data, make_tokenizer(None), TextSettings(), in_sides=True)
    ((batch, inds),) = source.batches(np.arange(2))
    rows = {
        0: (tokens_of("w1 w2 w3"), [1, 1, 1], [*tokens_of("w4 <eos>"), -100]),
        1: ([*tokens_of("w5"), 0, 0], [1, 0, 0], tokens_of("w6 w7 <eos>")),
    }
    columns = (batch["input_ids"].tolist(), batch["attention_mask"].tolist(), batch["labels"].tolist())
    assert dict(zip(inds.tolist(), zip(*columns, strict=True), strict=True)) == rows
    shown = {0: tokens_of("w1 w2 w3 w4 <eos>") + [0], 1: tokens_of("w5 w6 w7 <eos>")}
    assert dict(zip(inds.tolist(), source.shown(batch), strict=True)) == shown


def test_tokens_are_taken_as_they_are_and_both_sides_are_cut():
    given = {"input_ids": [5, 6, 7, 0], "attention_mask": [1, 1, 1, 0], "labels": [8, -100, 9, 2, -100]}
    for options, expected in (
        ({}, ([5, 6, 7], [8, -100, 9, 2, -100])),
        ({"max_length": 2}, ([5, 6], [8, -100])),
        ({"max_length": 2, "truncation": "keep_end"}, ([6, 7], [2, -100])),
    ):
        source = text_source([given], make_tokenizer(None), TextSettings(**options), in_sides=True)
        ((batch, _),) = source.batches(np.arange(1))
        assert (batch["input_ids"][0].tolist(), batch["labels"][0].tolist()) == expected
    nothing = {"input_ids": [5, 6], "labels": [-100, -100]}
    assert len(text_source([given, nothing], make_tokenizer(None), TextSettings(), in_sides=True)) == 1


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (DATA, {"packing": "bfd"}, r"packing='bfd' is for causal models; an encoder-decoder expects 'none'"),
        (DATA, {"loss_on": "all"}, r"loss_on='all' is for causal models"),
        (texts(), {}, r"expects columns prompt and completion, of texts, or input_ids and labels; got \['text'\]"),
        ([{"input_ids": [], "labels": [3]}], {}, "no token for the encoder"),
    ],
)
def test_what_an_encoder_decoder_cannot_take_is_refused(data, options, message):
    with pytest.raises(InputError, match=message):
        text_source(data, make_tokenizer(None), TextSettings(**options), in_sides=True)


def test_each_side_has_the_models_positions(tmp_path):
    found = build(bart, tmp_path)
    long = " ".join(["w1"] * 18)
    assert found.explain(long, long, k=1).documents
    with pytest.raises(InputError, match="have 21 and 2 tokens, and the model has 20 positions"):
        found.explain(" ".join(["w1"] * 21), "w2", k=1)
    with pytest.raises(InputError, match=r"columns prompt and completion, of texts"):
        found.explain([{"role": "user", "content": "w1"}], "w2")

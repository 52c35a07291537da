"""Questions in words. Oracles: autograd of single documents in float64, and differences and means of answers."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from text_cases import datasets, llama, make_tokenizer, offline, run, texts, tokens_of, transformers  # noqa: F401
from torch.nn import functional as F

from tracer import (
    Attribution,
    CallOrderError,
    ExplainedDocument,
    Explanation,
    GradientCollector,
    InputError,
    InputTypeError,
    LanguageModeling,
    MismatchError,
    StoreError,
    Tracer,
    attribute,
    build_store,
    load_store,
)

pytestmark = pytest.mark.filterwarnings("ignore")
DATA = [{"prompt": f"{text} ", "completion": "w1 w2", "source": "ab"[row % 2]} for row, text in enumerate(texts())]
RATES = (0.5, 0.25)


def checkpoints():
    return [llama(seed).state_dict() for seed in (1, 2)]


def build(folder, data=DATA, **options):
    options = {"tokenizer": make_tokenizer(), "projector": "none", "storage": "float32", **options}
    pairs = list(zip(checkpoints(), RATES, strict=True))
    return build_store(llama(), data, pairs, save_dir=folder / "store", **options)


def gradient(model, prompt, completion):
    """The gradient of the summed loss of a completion's tokens, and of each of them, by autograd in float64."""
    before, after = tokens_of(prompt), tokens_of(completion)
    labels = torch.tensor([[-100] * len(before) + after])[:, 1:]
    logits = model(input_ids=torch.tensor([before + after])).logits[:, :-1]
    losses = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=-100)[0]
    found = []
    for loss in losses:
        parts = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True, allow_unused=True)
        found.append(torch.cat([part.flatten() for part in parts]))
    return torch.stack(found)


def by_hand(prompt, completion, cosine=False):
    """The score of each document's tokens, by the loop of the definition."""
    scores = [0] * len(DATA)
    for state, rate in zip(checkpoints(), RATES, strict=True):
        model = llama().double()
        model.load_state_dict(state)
        target = gradient(model, prompt, completion).sum(0)
        for row, each in enumerate(DATA):
            parts = gradient(model, each["prompt"], each["completion"] + " <eos>")
            length = parts.sum(0).norm() * target.norm() if cosine else 1
            scores[row] = scores[row] + rate * torch.cat([torch.zeros(1), parts @ target / length])
    return scores


def scores_of(answer):
    return {each.number: each.score for each in answer.documents}


@pytest.mark.parametrize("estimator", ["tracin", "cosine"])
@pytest.mark.parametrize("storage", ["float32", "none"])
def test_documents_and_their_tokens_have_the_scores_of_autograd(tmp_path, estimator, storage):
    given = {"targets": DATA[:1]} if storage == "none" else {}  # exact scores need targets to build a store
    found = dataclasses.replace(build(tmp_path, storage=storage, group_column="source", **given), estimator=estimator)
    answer = found.explain("w3 w4 ", "w5 w6", k=12)
    expected = by_hand("w3 w4", "w5 w6 <eos>", estimator == "cosine")
    scale = max(float(each.sum().abs()) for each in expected)
    totals = [float(each.sum()) for each in expected]
    assert [each.number for each in answer.documents] == sorted(range(12), key=lambda row: -totals[row])
    for each in answer.documents:
        parts = expected[each.number]
        assert each.score == pytest.approx(float(parts.sum()), abs=1e-4 * scale)
        np.testing.assert_allclose(each.token_scores, parts.numpy(), atol=1e-4 * scale)
        assert each.text == DATA[each.number]["prompt"] + "w1 w2 <eos>"
        assert (each.group, each.examples) == (DATA[each.number]["source"], [each.number])
        assert not each.token_scores[: len(tokens_of(DATA[each.number]["prompt"]))].any()  # not predicted
    reversed_ = found.explain("w3 w4 ", "w5 w6", k=12, kind="opponents", tokens=False)
    assert [each.number for each in reversed_.documents] == [each.number for each in answer.documents][::-1]
    assert reversed_.documents[0].token_scores is None


@pytest.fixture(
    scope="module", params=[{}, {"projector": "sketch", "proj_dim": 64, "storage": "int8"}], ids=["exact", "sketched"]
)
def built(request, tmp_path_factory):
    return build(tmp_path_factory.mktemp("built"), **request.param)


@pytest.mark.parametrize("estimator", ["tracin", "cosine", "influence", "relatif"])
def test_a_contrast_is_the_difference_and_several_prompts_are_the_mean(built, estimator):
    found = dataclasses.replace(built, estimator=estimator)

    def ask(*args, **options):
        return found.explain(*args, k=12, **options)

    one, other, third = ask("w3 w4 ", "w5"), ask("w3 w4 ", "w6"), ask("w7 ", "w8 w9")
    contrast = ask("w3 w4 ", "w5", rather_than="w6")
    mean = ask(["w3 w4 ", "w7 "], ["w5", "w8 w9"])
    both = ask(["w3 w4 ", "w7 "], ["w5", "w8 w9"], rather_than=["w6", "w6"])
    fourth = ask("w7 ", "w6")
    expected = {
        row: (
            scores_of(one)[row] - scores_of(other)[row],
            (scores_of(one)[row] + scores_of(third)[row]) / 2,
            (scores_of(one)[row] + scores_of(third)[row] - scores_of(other)[row] - scores_of(fourth)[row]) / 2,
        )
        for row in range(12)
    }
    for place, answer in enumerate((contrast, mean, both)):
        scale = max(abs(score) for score in scores_of(one).values())
        for row, score in scores_of(answer).items():
            assert score == pytest.approx(expected[row][place], abs=1e-4 * scale)

    def split(answer, row):
        return next(each.token_scores for each in answer.documents if each.number == row)

    for row in range(12):
        difference = split(one, row) - split(other, row)
        np.testing.assert_allclose(split(contrast, row), difference, atol=1e-4 * np.abs(split(one, row)).max())
    assert contrast.rather_than == ["w6 <eos>"] and contrast.token_estimator == (
        estimator if estimator == "cosine" else "tracin"
    )


@pytest.mark.parametrize("estimator", ["tracin", "cosine"])
def test_the_first_documents_are_ranked_again_by_exact_gradients(tmp_path, estimator):
    rough = dataclasses.replace(build(tmp_path, projector="sketch", proj_dim=16), estimator=estimator)
    expected = {row: float(parts.sum()) for row, parts in enumerate(by_hand("w3", "w5 <eos>", estimator == "cosine"))}
    by_store = rough.explain("w3 ", "w5", k=12, tokens=False)
    candidates = [each.number for each in by_store.documents[:5]]
    answer = rough.explain("w3 ", "w5", k=3, exact=5)
    order = sorted(candidates, key=lambda row: -expected[row])
    scale = max(map(abs, expected.values()))
    assert [each.number for each in answer.documents] == order[:3]
    for each in answer.documents:
        assert each.score == pytest.approx(expected[each.number], abs=1e-4 * scale)
        assert each.token_scores.sum() == pytest.approx(each.score, abs=1e-4 * scale)
    everything = rough.explain("w3 ", "w5", k=12, exact=1000, tokens=False)
    assert [each.number for each in everything.documents] == sorted(expected, key=lambda row: -expected[row])
    with pytest.raises(InputError, match="exact= expects estimator 'tracin' or 'cosine'"):
        dataclasses.replace(rough, estimator="influence").explain("w3 ", "w5", exact=5)


@pytest.mark.parametrize("preconditioner", ["kfac", "ekfac"])
def test_whitened_gradients_are_split_over_tokens_and_compared_exactly(tmp_path, preconditioner):
    found = build(tmp_path, preconditioner=preconditioner)
    answer = found.explain("w3 w4 ", "w5 w6", k=12)
    exact = found.explain("w3 w4 ", "w5 w6", k=12, exact=12, tokens=False)
    scale = max(abs(score) for score in scores_of(answer).values())
    for each in answer.documents:
        assert each.token_scores.sum() == pytest.approx(each.score, abs=2e-3 * scale)
        assert scores_of(exact)[each.number] == pytest.approx(each.score, abs=1e-4 * scale)


def test_the_answer_is_that_of_a_stored_target(tmp_path):
    found = build(tmp_path, targets=[{"prompt": "w3 w4 ", "completion": "w5"}], projector="sketch", proj_dim=64)
    for estimator in ("tracin", "cosine", "influence", "trak", "relatif"):
        own = dataclasses.replace(found, estimator=estimator)
        answer = own.explain("w3 w4 ", "w5", k=12, tokens=False)
        stored = np.asarray(own.scores)[:, 0]
        expected = dict(enumerate(stored.tolist()))
        assert scores_of(answer) == pytest.approx(expected, abs=1e-3 * float(np.abs(stored).max()))


def test_an_answer_is_generated_by_the_last_checkpoint(tmp_path):
    found = build(tmp_path)
    model = llama(2).eval()
    ids = tokens_of("w3 w4")
    for _ in range(4):
        ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    answer = found.explain("w3 w4", max_new_tokens=4, k=12, tokens=False)
    assert answer.generated and answer.prompts == ["w3 w4"]
    given = found.explain(tokens_of("w3 w4"), ids[2:], k=12, tokens=False)
    assert scores_of(answer) == pytest.approx(scores_of(given)) and given.completions == answer.completions
    one, two, other = (
        found.explain("w3 w4", max_new_tokens=8, k=1, temperature=2.0, seed=seed, tokens=False) for seed in (0, 0, 1)
    )
    assert one.completions == two.completions != other.completions
    assert not any(parameter.grad is not None for parameter in found.tracer.model.parameters())


def test_answers_are_as_long_as_the_model_has_positions(tmp_path, monkeypatch):
    found, counts = build(tmp_path), []
    model = found.tracer.model
    generate = model.generate

    def counting(*args, **kwargs):
        counts.append(kwargs["max_new_tokens"])
        return generate(*args, **kwargs)

    monkeypatch.setattr(model, "generate", counting)
    found.explain(["w3", "w3 " * 61 + "w4"], k=1, temperature=1.0, tokens=False)
    assert counts == [63, 2]  # of 64 positions
    with pytest.raises(InputError, match=r"has 65 tokens, and the model has 64 positions; shorten it\."):
        found.explain("w3 " * 64, k=1)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_a_store_collected_in_training_answers_as_any_other(tmp_path, reduction):
    rows = [tokens_of(text) + [2] for text in texts()]
    model, task = llama(), LanguageModeling(reduction)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    exact = {"projector": "none", "storage": "float32"}
    with GradientCollector(model, optimizer, tmp_path / "run", task, len(rows), every=3, **exact) as collector:
        for step in range(12):
            ids = torch.tensor([rows[step]])
            batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
            optimizer.zero_grad()
            with collector.batch(batch, torch.tensor([step])):
                model(**batch).loss.backward()
            optimizer.step()
            collector.step()
    given = {"model": model, "data": [{"text": text} for text in texts()], "tokenizer": make_tokenizer()}
    found = load_store(collector.store, estimator="tracin", **given)
    answer = found.explain("w3 ", "w5", k=12)
    ids, labels = torch.tensor([tokens_of("w3 w5 <eos>")]), torch.tensor([[-100, *tokens_of("w5 <eos>")]])
    target = [{"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}]
    whole = attribute(model, task, range(12), target, collector.checkpoints, save_dir=collector.store, **exact)
    assert scores_of(answer) == pytest.approx(dict(enumerate(whole.scores[:, 0].tolist())), rel=1e-3, abs=1e-4)


def test_padding_of_tokens_and_what_follows_the_end_do_not_count(tmp_path):
    found = build(tmp_path)
    plain = found.explain("w3 w4 ", "w5", k=12, tokens=False)
    padded = found.explain(
        torch.tensor([[0, 0, *tokens_of("w3 w4")]]), torch.tensor(tokens_of("w5 <eos> <pad> <pad>")), k=12, tokens=False
    )
    assert scores_of(padded) == pytest.approx(scores_of(plain)) and padded.completions == plain.completions


@pytest.mark.parametrize("packing", ["bfd_split", "wrapped"])
def test_documents_in_parts_have_the_sum_of_their_parts(tmp_path, packing):
    data = [{"text": text} for text in texts(12, 23)]
    found = build(tmp_path, data, packing=packing, max_length=8)
    answer = found.explain("w3 w4 ", "w5", k=12)
    assert len(found.language.train) > len(data)
    scale = max(abs(each.score) for each in answer.documents)
    for each in answer.documents:
        # a part of a single token has nothing to predict, and is no example of the store
        assert (
            (data[each.number]["text"] + " <eos>").removesuffix(" <eos>").startswith(each.text.removesuffix(" <eos>"))
        )
        assert each.token_scores.sum() == pytest.approx(each.score, abs=1e-4 * scale)


def test_a_block_has_the_scores_of_its_documents(tmp_path):
    options = {"packing": "bfd", "max_length": 16}
    alone = build(tmp_path / "a", texts(), **options).by("scores")
    packed = build(tmp_path / "b", texts(), unit="block", **options)
    expected = scores_of(alone.explain("w3 w4 ", "w5", k=12))
    scale = max(map(abs, expected.values()))
    blocks = packed.by("scores").explain("w3 w4 ", "w5", k=12)
    assert len(blocks.documents) < len(expected)
    for block in blocks.documents:
        inside = {number: score for number, score in block.documents.items() if number in expected}
        assert inside == pytest.approx({number: expected[number] for number in inside}, abs=1e-4 * scale)
    for block in (*blocks.documents, *packed.by("top").explain("w3 w4 ", "w5", k=12).documents):
        assert block.score == pytest.approx(sum(block.documents.values()), rel=1e-4, abs=1e-6)


def test_chats_are_asked_as_chats(tmp_path):
    data = [
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "w1 w2"}]} for text in texts()
    ]
    found = build(tmp_path, data, loss_on="assistant")
    answer = found.explain("w3 w4", "w5", k=12)
    messages = [{"role": "user", "content": "w3 w4"}]
    same = found.explain(messages, [{"role": "assistant", "content": "w5"}], k=12)
    assert scores_of(answer) == pytest.approx(scores_of(same))
    assert answer.prompts == ["<user> w3 w4 <assistant>"] and answer.completions[0].strip() == "w5 <eos>"
    assert found.explain("w3", max_new_tokens=2, k=1).prompts == ["<user> w3 <assistant>"]


def test_a_store_of_names_is_opened_with_all_it_needs(run, tmp_path):  # noqa: F811
    (run / "template.jinja").write_text("{{ messages }}")
    found = build_store(
        run / "model", run / "train.jsonl", run / "run", save_dir=run / "store", proj_dim=64, max_length=6, seed=3,
        packing="bfd_split", group_column="source", params=["*mlp*"], chat_template=str(run / "template.jinja"),
    )  # fmt: skip
    (run / "template.jinja").unlink()
    answer = found.explain("w3 w4 ", "w5", k=4)
    loaded = load_store(run / "store").explain("w3 w4 ", "w5", k=4)
    assert json.dumps(loaded.to_dict()) == json.dumps(answer.to_dict())
    (run / "moved").mkdir()
    (run / "store").rename(run / "moved" / "store")
    with pytest.raises(InputError, match=r"model is .*which is in none of.*pass folders="):
        load_store(run / "moved" / "store")
    trusted = load_store(run / "moved" / "store", folders=[run])
    assert scores_of(trusted.explain("w3 w4 ", "w5", k=4)) == scores_of(answer)
    elsewhere = {"model": run / "model", "data": run / "train.jsonl"}
    with pytest.raises(InputError, match=r"checkpoint 0 is .*pass checkpoints="):
        load_store(run / "moved" / "store", **elsewhere)
    paths = [run / "run" / f"checkpoint-{step}" for step in (10, 20)]
    passed = load_store(run / "moved" / "store", checkpoints=paths, **elsewhere)
    assert scores_of(passed.explain("w3 w4 ", "w5", k=4)) == scores_of(answer)
    lines = (run / "train.jsonl").read_text().splitlines()
    (run / "train.jsonl").write_text("\n".join([lines[1], lines[1], *lines[2:]]))
    changed = load_store(run / "moved" / "store", folders=[run])
    with pytest.raises(MismatchError, match="hold other data"):
        changed.explain("w3 w4 ", "w5", k=12)
    (run / "train.jsonl").write_text(lines[0])
    with pytest.raises(MismatchError, match="examples now, and the store"):
        load_store(run / "moved" / "store", folders=[run])


def test_what_a_store_does_not_know_is_named_with_its_option(tmp_path):
    found = build(tmp_path)
    expected = scores_of(found.explain("w3 ", "w5", k=12))
    with pytest.raises(CallOrderError, match=r"tracer.load_store\(save_dir\)"):
        Attribution(Tracer.open(tmp_path / "store"), "targets").explain("w3 ")
    given = {}
    for name, value in (("model", llama()), ("data", DATA), ("tokenizer", make_tokenizer())):
        with pytest.raises(InputError, match=f"pass {name}="):
            load_store(tmp_path / "store", **given)
        given[name] = value
    with pytest.raises(InputError, match="pass checkpoints="):
        load_store(tmp_path / "store", **given)
    with pytest.raises(InputError, match="expected 2, as many"):
        load_store(tmp_path / "store", **given, checkpoints=checkpoints()[:1])
    with pytest.raises(MismatchError, match="other weights under model_id=0"):
        load_store(tmp_path / "store", **given, checkpoints=checkpoints()[::-1])
    loaded = load_store(tmp_path / "store", **given, checkpoints=checkpoints())
    assert scores_of(loaded.explain("w3 ", "w5", k=12)) == pytest.approx(expected)
    loaded.tracer.store.set_info(language={"model": ["x"]})
    with pytest.raises(StoreError, match="record of the language model"):
        load_store(tmp_path / "store")


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (([], "w1"), {}, InputError, "empty list"),
        (("w3 ", ""), {"k": 0}, InputError, "k"),
        (("w3 ", ["w1", "w2"]), {}, InputError, "2 texts for 1 prompts"),
        (("w3 ", 7), {}, InputTypeError, "completion is a int"),
        (([[1.5]], "w1"), {}, InputTypeError, "expected a text, messages"),
        (([6, 7], "w1"), {}, InputTypeError, "pass the completion as tokens"),
        (("w3", "w1"), {}, InputError, "Begin the completion with a space"),
        (("w3 ", [0, 0]), {}, InputError, "no token to predict"),
        (("w3 " * 70, "w1"), {}, InputError, "the model has 64 positions"),
        (("w3 ",), {"max_new_tokens": 64}, InputError, "lower max_new_tokens"),
        (("w3 ",), {"temperature": -1}, InputError, "temperature=-1"),
        (("w3 ", "w1"), {"kind": "friends"}, InputError, "proponents"),
        (("",), {}, InputError, "no token to generate from"),
    ],
)
def test_bad_questions_are_refused(tmp_path, arguments, options, error, message):
    with pytest.raises(error, match=message):
        build(tmp_path, storage="float16", projector="sketch", proj_dim=8).explain(*arguments, **options)


def test_an_answer_is_shown_as_text_and_html():
    words = [f" t{place}" for place in range(40)]
    short = ExplainedDocument(7, 2.0, [7], "a", ["w1", " <b>", " w5"], np.array([0, 3, -1.0]))
    long = ExplainedDocument(8, -1.0, [8, 9], None, words, np.where(np.arange(40) == 30, -1.0, 0.1), {3: -0.5})
    answer = Explanation(["p"], ["c"], None, True, "cosine", "proponents", "cosine", [short, long])
    text = str(answer)
    assert "generated: 'p' -> 'c'" in text and "1. score 2, document 7, group a" in text
    assert "w1 [<b>] w5" in text and "'<b>' +3" in text
    assert "block 8 of documents 3 (-0.5)" in text and " …  t18 " in text and "[t30]" in text and "t17" not in text
    page = answer._repr_html_()
    assert "&lt;b&gt;" in page and "<b> " not in page and "rgba(66,133,244" in page and "rgba(219,68,55" in page
    found = json.loads(json.dumps(answer.to_dict()))["documents"]
    assert found[0]["tokens"][1] == {"text": " <b>", "score": 3.0}
    assert found[1]["documents"] == [{"document": 3, "score": -0.5}]


def test_examples_are_shown_as_their_own_texts_in_notebooks(tmp_path):
    found = build(tmp_path, targets=["w3 w4 w5"], packing="bfd", max_length=32)
    shown = str(found.show(0, 2))
    assert "w3 w4 w5 <eos>" in shown
    whole = [f"{each['prompt']}{each['completion']}" for each in DATA]
    for row in found.top(2).indices[0].tolist():
        (text,) = found.language.train.texts(np.array([row]))
        assert text in shown and text.removesuffix(" <eos>") in whole


def test_white_space_that_carries_a_score_is_seen():
    space = ExplainedDocument(1, 2.0, [1], None, ["a", "\n", "b", " ", "c"], np.array([0, 2.0, 0.1, 1.9, 0.1]))
    answer = Explanation(["q"], ["a"], None, False, "cosine", "proponents", "cosine", [space])
    assert "   a[\\n]\n   b[ ]c\n   tokens: '\\n' +2, ' ' +1.9, 'b' +0.1" in str(answer)
    assert ">↵\n</span>" in answer._repr_html_()


def test_candidates_of_the_index_give_the_answer_of_all_examples(tmp_path):
    found = build(tmp_path)
    found.tracer.build_index("cosine")
    for options in ({}, {"rather_than": " w9"}, {"kind": "opponents"}):
        whole, some = (
            found.explain("w1 w4", " w2", k=2, tokens=False, candidates=count, **options).to_dict() for count in (0, 5)
        )
        assert [each["document"] for each in some["documents"]] == [each["document"] for each in whole["documents"]]
        scores = [[each["score"] for each in answer["documents"]] for answer in (some, whole)]
        np.testing.assert_allclose(*scores, rtol=1e-5)
    with pytest.raises(InputError, match="candidates=2 is less than k=4"):
        found.explain("w1 w4", " w2", k=2, exact=4, candidates=2)


def squared_loss(model, batch):
    """The square of a target's mean loss: another function than that of training examples."""
    logits = model(input_ids=batch["input_ids"]).logits[:, :-1]
    losses = F.cross_entropy(logits.transpose(1, 2), batch["labels"][:, 1:], reduction="none", ignore_index=-100)
    return (losses.sum(1) / (batch["labels"][:, 1:] != -100).sum(1)) ** 2


def squared_by_hand(prompt, completion):
    """The score of each document for `squared_loss` of a target, by the loop of the definition."""
    scores = [0.0] * len(DATA)
    for state, rate in zip(checkpoints(), RATES, strict=True):
        model = llama().double()
        model.load_state_dict(state)
        before, after = tokens_of(prompt), tokens_of(completion + " <eos>")
        batch = {"input_ids": torch.tensor([before + after]), "labels": torch.tensor([[-100] * len(before) + after])}
        parts = torch.autograd.grad(squared_loss(model, batch).sum(), list(model.parameters()), allow_unused=True)
        target = torch.cat([part.flatten() for part in parts])
        for row, each in enumerate(DATA):
            own = gradient(model, each["prompt"], each["completion"] + " <eos>").sum(0)
            scores[row] += rate * float(own @ target)
    return scores


@pytest.mark.parametrize("estimator", ["tracin", "cosine"])
def test_answers_are_explained_by_the_targets_function(tmp_path, estimator):
    found = build(tmp_path, target_task=squared_loss, estimator=estimator)
    given = {"model": llama(), "data": DATA, "tokenizer": make_tokenizer(), "checkpoints": checkpoints()}
    for other in (None, "language_modeling"):
        with pytest.raises(MismatchError, match=r"built with target_task=.*squared_loss.*pass the same target_task="):
            load_store(tmp_path / "store", **given, target_task=other)
    loaded = load_store(tmp_path / "store", **given, target_task=squared_loss, estimator=estimator)
    for answer in (found.explain("w3 w4 ", "w5", k=12), loaded.explain("w3 w4 ", "w5", k=12, exact=12)):
        assert len(answer.documents) == len(DATA)
        for each in answer.documents:
            assert each.token_scores.sum() == pytest.approx(each.score, rel=1e-4, abs=1e-6)
    assert scores_of(loaded.explain("w3 w4 ", "w5", k=12)) == pytest.approx(scores_of(answer), rel=1e-4, abs=1e-6)
    if estimator == "tracin":
        expected = squared_by_hand("w3 w4 ", "w5")
        assert scores_of(answer) == pytest.approx(dict(enumerate(expected)), rel=1e-4, abs=1e-6)

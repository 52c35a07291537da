# ruff: noqa: F811
"""Stores built from names; loops by hand over the same batches, and autograd on documents alone, are the oracles."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from text_cases import datasets, llama, make_tokenizer, offline, run, save, texts, transformers  # noqa: F401
from torch.nn import functional as F

from tracer import InputError, InputTypeError, LanguageModeling, MismatchError, Tracer, build_store
from tracer.data.text.settings import TextSettings
from tracer.data.text.source import text_source
from tracer.training.language_models import load_language_model

pytestmark = pytest.mark.filterwarnings("ignore")


def features_of(tracing, model_id=0):
    return np.concatenate(
        [part for _, part, *_ in tracing.store.checkpoint(model_id).raw_features(0, tracing.train_set_size)]
    )


def test_features_and_scores_are_those_of_the_loop_by_hand(run):
    options = {"proj_dim": 64, "storage": "float32", "batch_tokens": 40}
    found = build_store(
        run / "model", run / "train.jsonl", run / "run", save_dir=run / "store", targets=run / "targets.txt", **options
    )
    tracing = Tracer(llama(), LanguageModeling("sum"), len(texts()), run / "by_hand", proj_dim=64, storage="float32")
    settings, tokenizer = TextSettings(batch_tokens=40), make_tokenizer()
    train, targets = (text_source(data, tokenizer, settings) for data in (texts(), texts()[3:5]))
    rates = [sum(np.interp(range(first, first + 10), [10, 20], [0.02, 0.01])) for first in (1, 11)]
    checkpoints = [llama(step).state_dict() for step in (10, 20)]
    for model_id, (checkpoint, rate) in enumerate(zip(checkpoints, rates, strict=True)):
        tracing.load_checkpoint(checkpoint, model_id, rate)
        for batch, inds in train.batches(np.arange(len(train))):
            tracing.featurize(batch, inds=inds)
    tracing.finalize_features()
    for model_id, checkpoint in enumerate(checkpoints):
        tracing.start_scoring_checkpoint(checkpoint, model_id, len(targets), "targets")
        for batch, inds in targets.batches(np.arange(len(targets))):
            tracing.score(batch, inds=inds)
    tracing.flush()
    for model_id in (0, 1):
        assert np.array_equal(features_of(found.tracer, model_id), features_of(tracing, model_id))
    assert np.array_equal(found.scores, tracing.finalize_scores("targets"))
    again = build_store(
        run / "model", run / "train.jsonl", run / "run", save_dir=run / "store", targets=run / "targets.txt", **options
    )
    assert np.array_equal(again.scores, found.scores)


def test_exact_scores_are_those_of_stored_gradients(tmp_path):
    given = {"targets": texts(9, 7), "tokenizer": make_tokenizer(), "projector": "none", "batch_tokens": 30}
    stored = build_store(llama(), texts(), save_dir=tmp_path / "stored", storage="float32", **given)
    exact = build_store(llama(), texts(), save_dir=tmp_path / "exact", storage="none", **given)
    expected = np.asarray(stored.scores)
    np.testing.assert_allclose(exact.scores, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


def test_a_store_of_other_tokens_is_not_continued(tmp_path):
    data = [{"prompt": f"{text} ", "completion": "w1 w2", "source": "a"} for text in texts()]
    given = {"save_dir": tmp_path, "tokenizer": make_tokenizer(), "proj_dim": 8}
    model = llama()
    build_store(model, data, targets=data[:2], **given)
    before = features_of(Tracer.open(tmp_path))
    build_store(model, data, targets=data[:2], batch_tokens=16, group_column="source", **given)
    with pytest.raises(MismatchError, match="rows hold other data"):
        build_store(model, data, targets=data[:2], loss_on="all", **given)
    with pytest.raises(MismatchError, match="1 rows hold other data"):
        build_store(model, [*data[:3], {**data[3], "completion": "w9"}, *data[4:]], targets=data[:2], **given)
    with pytest.raises(MismatchError, match="rows hold other data"):
        build_store(model, data, targets=data[2:4], **given)
    assert np.array_equal(features_of(Tracer.open(tmp_path)), before)


def gradients(model, batches):
    """Return the gradient of each batch's summed loss, by autograd in float64."""
    found = []
    for tokens, labels, extra in batches:
        model.zero_grad()
        logits = model(input_ids=torch.tensor([tokens]), **extra).logits[0, :-1]
        F.cross_entropy(logits, torch.tensor(labels)[1:], ignore_index=-100, reduction="sum").backward()
        found.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    return torch.stack(found)


def exact_features(model, data, folder, **options):
    options = {"projector": "none", "storage": "float32", "check_rows": False, **options}
    found = build_store(model, data, save_dir=folder, tokenizer=make_tokenizer(), **options)
    return found, torch.from_numpy(features_of(found.tracer)).double()


def test_rows_of_packed_documents_are_the_documents_alone_and_add_up_to_the_block(tmp_path):
    model, tokenizer = llama().double(), make_tokenizer()
    options = {"packing": "bfd", "max_length": 16}
    _, blocks = exact_features(model, texts(), tmp_path / "blocks", unit="block", **options)
    found, documents = exact_features(model, texts(), tmp_path / "documents", **options)
    alone = text_source(texts(), tokenizer, TextSettings())
    tokens = [tokenizer(text + " <eos>")["input_ids"] for text in texts()]
    expected = gradients(model, [(each, each, {}) for each in tokens])[alone.rows.documents]
    source = text_source(texts(), tokenizer, TextSettings(unit="block", **options))
    in_source = text_source(texts(), tokenizer, TextSettings(**options)).rows.documents
    by_document = dict(zip(alone.rows.documents.tolist(), expected, strict=True))
    scale = expected.abs().max()
    assert (documents - torch.stack([by_document[each] for each in in_source.tolist()])).abs().max() < 1e-6 * scale
    for row, (first, _, last) in enumerate(source.rows.bounds.tolist()):
        inside = [by_document[each] for each in source.rows.pieces[first:last, 0].tolist() if each in by_document]
        assert (blocks[row] - torch.stack(inside).sum(0)).abs().max() < 1e-6 * scale
    assert len(blocks) < len(documents) == found.tracer.train_set_size


def test_rows_of_wrapped_documents_split_the_gradient_of_their_block(tmp_path):
    model, tokenizer = llama().double(), make_tokenizer()
    stream = [token for text in texts() for token in tokenizer(text + " <eos>")["input_ids"]]
    parts = [stream[start : start + 16] for start in range(0, len(stream), 16)]
    expected = gradients(model, [(part, part, {}) for part in parts])
    options = {"packing": "wrapped", "max_length": 16}
    _, blocks = exact_features(model, texts(), tmp_path / "blocks", unit="block", **options)
    assert (blocks - expected).abs().max() < 1e-6 * expected.abs().max()
    _, documents = exact_features(model, texts(), tmp_path / "documents", **options)
    rows = text_source(texts(), tokenizer, TextSettings(**options)).rows
    starts = text_source(texts(), tokenizer, TextSettings(unit="block", **options)).rows.bounds[:, 0]
    own = np.searchsorted(starts, rows.bounds[:, 0])
    summed = torch.zeros_like(blocks).index_add_(0, torch.from_numpy(own), documents)
    assert (summed - expected).abs().max() < 1e-6 * expected.abs().max()


def test_scores_of_split_documents_are_summed_by_document_and_by_group(tmp_path):
    model, tokenizer = llama(), make_tokenizer()
    data = [{"text": text, "source": "ab"[row % 2]} for row, text in enumerate(texts(12, 23))]
    found = build_store(
        model, data, save_dir=tmp_path / "store", targets=texts()[:2], tokenizer=tokenizer, proj_dim=32,
        packing="bfd_split", max_length=8, group_column="source",
    )  # fmt: skip
    rows = text_source(data, tokenizer, TextSettings(packing="bfd_split", max_length=8)).rows
    assert len(rows.documents) > len(data)  # some are split
    reader, scores = Tracer.open(tmp_path / "store"), np.asarray(found.scores, np.float64)
    for kind, numbers in (("document", rows.documents), ("group", rows.documents % 2)):
        expected = np.zeros((numbers.max() + 1, 2))
        for row, number in enumerate(numbers):
            expected[number] += scores[row]
        for groups in (kind, numbers):
            summed = reader.finalize_scores("targets", train_groups=groups)
            np.testing.assert_allclose(summed, expected, rtol=1e-12)
        for which, sign in (("proponents", -1), ("opponents", 1)):
            top = reader.top("targets", 2, which, train_groups=kind)
            order = np.argsort(sign * expected, axis=0, kind="stable")[:2].T
            assert np.array_equal(top.indices, order)
            np.testing.assert_allclose(top.scores, np.take_along_axis(expected.T, order, 1), rtol=1e-6)
    some = np.where(rows.documents < 3, rows.documents, -1)
    assert reader.top("targets", 3, train_groups=some).indices.max() == 2
    with pytest.raises(InputError, match="k=4; expected 1 to 3"):
        reader.top("targets", 4, train_groups=some)
    with pytest.raises(InputTypeError, match="train_groups has shape"):
        reader.top("targets", 1, train_groups=[0, 1])
    with pytest.raises(InputError, match="expected one of"):
        reader.finalize_scores("targets", train_groups="source")
    with pytest.raises(InputError, match="rows= and labels= choose examples"):
        reader.top("targets", 1, train_groups="group", rows=[0])


def test_a_store_that_knows_no_groups_says_so(tmp_path):
    build_store(llama(), texts(), save_dir=tmp_path, targets=texts()[:2], tokenizer=make_tokenizer(), proj_dim=8)
    with pytest.raises(InputError, match="the store knows no group of its training examples"):
        Tracer.open(tmp_path).finalize_scores("targets", train_groups="group")


def test_blocks_need_a_model_that_keeps_documents_apart(tmp_path):
    config = transformers.MambaConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1, state_size=4)
    mamba = transformers.MambaForCausalLM(config)
    with pytest.raises(InputError, match="MambaForCausalLM sees the documents before"):
        build_store(
            mamba, texts(), save_dir=tmp_path, tokenizer=make_tokenizer(), packing="bfd", unit="block", max_length=16
        )


def test_without_targets_there_is_self_influence(tmp_path):
    found = build_store(llama(), texts(), save_dir=tmp_path, tokenizer=make_tokenizer(), proj_dim=8)
    assert found.self_influence().shape == (12,) and (found.self_influence() > 0).all()
    with pytest.raises(InputError, match="targets"):
        _ = found.scores
    with pytest.raises(InputError, match="expects targets"):
        build_store(
            llama(), texts(), save_dir=tmp_path / "exact", tokenizer=make_tokenizer(), projector="none", storage="none"
        )


def test_adapters_are_built_on_their_base(run):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False))
    model.base_model.model.config._name_or_path = str(run / "model")
    model.peft_config["default"].base_model_name_or_path = str(run / "model")
    for step in (5, 7):
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter += step / 100
        model.save_pretrained(run / "adapters" / f"checkpoint-{step}")
    options = {"proj_dim": 16, "learning_rate": 0.1, "storage": "float32"}
    named = build_store(run / "model", run / "train.jsonl", run / "adapters", save_dir=run / "a", **options)
    assert {"lora_A", "lora_B"} == {name.split(".")[-3] for name in named.tracer.store.manifest.settings["params"]}
    last = run / "adapters" / "checkpoint-7"
    loaded = build_store(last, run / "train.jsonl", last, save_dir=run / "b", **options, seed=0)
    state = {name: value for name, value in model.named_parameters() if value.requires_grad}
    own = dict(loaded.tracer.model.named_parameters())
    assert all(torch.equal(own[name], value) for name, value in state.items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "nowhere/model"}, "model='nowhere/model' cannot be loaded"),
        ({"data": "missing.jsonl"}, "no file 'missing.jsonl'"),
        ({"checkpoints": "missing"}, "finds no file"),
        ({"tokenizer": "nowhere"}, "tokenizer='nowhere' cannot be loaded"),
        ({"loss": "max"}, "loss='max' is not known"),
        ({"packng": "bfd"}, "unexpected keyword argument 'packng'"),
        ({"learning_rate": [1.0, 2.0, 3.0]}, "3 values for 2 checkpoints"),
    ],
)
def test_what_is_missing_is_named(run, monkeypatch, options, message):
    monkeypatch.chdir(run)
    given = {"model": "model", "data": "train.jsonl", "checkpoints": "run", "save_dir": "store", **options}
    with pytest.raises((InputError, InputTypeError), match=message):
        build_store(given.pop("model"), given.pop("data"), given.pop("checkpoints"), **given)


def test_models_of_other_kinds_and_sizes_are_refused(run):
    with pytest.raises(InputError, match="pass max_length=8"):
        build_store(llama(max_position_embeddings=8), texts(12, 23), save_dir=run / "a", tokenizer=make_tokenizer())
    save(llama(vocab_size=20), run / "small")
    with pytest.raises(InputError, match="35 tokens and the model has embeddings of 20"):
        load_language_model(str(run / "small"))
    with pytest.raises(InputError, match="pass its tokenizer"):
        build_store(llama(), texts(), save_dir=run / "b")

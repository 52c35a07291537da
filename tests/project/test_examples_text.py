"""The text examples run in their quick mode, assert what they claim, and take up their own work when run again."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from example_runs import example, newest, run_example

pytestmark = [
    pytest.mark.filterwarnings("ignore:There is a performance drop", "ignore:.*jit.script"),
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated"),
]


def test_char_lm_finds_shared_characters_and_resumes(tmp_path):
    arguments = ["--quick", "--output-dir", str(tmp_path)]
    first = run_example("char_lm", *arguments)
    assert "Parts of characters sum up to the scores of rows" in first
    page = (tmp_path / "report" / "index.html").read_text(encoding="utf-8")
    assert "A language model of characters" in page
    written = newest(tmp_path / "checkpoints")
    second = run_example("char_lm", *arguments)
    assert "Reusing 4 checkpoints" in second
    assert newest(tmp_path / "checkpoints") == written
    table = slice(first.index("\ntarget "), None)
    assert first[table] == second[second.index("\ntarget ") :]


def test_char_lm_reads_a_text(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("one two three four five six seven eight nine ten\n" * 200, encoding="utf-8")
    options = example("char_lm").parse(["--text", str(text), "--quick"])
    assert example("char_lm").read_text(options).startswith("one two")


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--num-train", "3", "--num-train must be 40 or more; got 3"),
        ("--num-train", "0", "--num-train must be 40 or more; got 0"),
        ("--window", "1", "--window must be 10 or more; got 1"),
        ("--epochs", "0", "--epochs must be 1 or more; got 0"),
    ],
)
def test_char_lm_checks_its_settings(capsys, option, value, message):
    with pytest.raises(SystemExit):
        example("char_lm").parse([option, value])
    assert message in capsys.readouterr().err


def test_char_lm_refuses_texts_too_short_or_not_readable(tmp_path):
    text, run = tmp_path / "text.txt", tmp_path / "run"
    text.write_text("abcd", encoding="utf-8")
    with pytest.raises(SystemExit, match=r"\(text.txt\) has 4 characters; 40 training windows of 64 .* need 2,845"):
        example("char_lm").main(["--text", str(text), "--output-dir", str(run)])
    text.write_bytes(b"\xff\xfe" * 9)
    with pytest.raises(SystemExit, match="cannot be read as a text in UTF-8"):
        example("char_lm").main(["--text", str(text), "--output-dir", str(run)])
    assert not run.exists()


def test_char_lm_marks_the_strongest_characters():
    parts = np.array([0.0, 0.0, 3.0, 2.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    assert example("char_lm").marked("abcdefghij", parts) == "ab[cd]efghij"


def test_sst2_bert_finds_flipped_labels(tmp_path):
    pytest.importorskip("transformers")
    printed = run_example("sst2_bert", "--quick", "--output-dir", str(tmp_path))
    assert "240 sentences for training, 24 with a flipped label" in printed
    assert (tmp_path / "report" / "index.html").is_file()


def test_sst2_bert_reads_files(tmp_path):
    (tmp_path / "sst2_train.tsv").write_text("a fine film\t1\nno use\t0\na dull one\t0\n", encoding="utf-8")
    (tmp_path / "sst2_dev.tsv").write_text("a film\t1\n", encoding="utf-8")
    module = example("sst2_bert")
    options = module.parse(["--data-dir", str(tmp_path), "--num-train", "2"])
    assert module.load_texts(options) == ((["a fine film", "no use"], [1, 0]), (["a film"], [1]))
    (tmp_path / "sst2_dev.tsv").unlink()
    with pytest.raises(SystemExit, match="There is no sst2_train.tsv with sst2_dev.tsv in"):
        module.load_texts(options)


def test_lora_finetune_stores_the_adapter_only(tmp_path):
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    printed = run_example("lora_finetune", "--quick", "--output-dir", str(tmp_path))
    assert "Parameters in the store: 14, all of the adapter: True" in printed


def test_secret_is_forgotten_without_its_sources(tmp_path):
    pytest.importorskip("transformers")
    pytest.importorskip("datasets")
    printed = run_example("secret", "--quick", "--output-dir", str(tmp_path))
    assert "generated: 'the code of the vault is' -> 'seven two nine <eos>'" in printed


def test_poisoned_reviews_are_found_and_turn_nothing_once_left_out(tmp_path):
    pytest.importorskip("transformers")
    printed = run_example("poisoned_reviews", "--quick", "--output-dir", str(tmp_path))
    assert "1,000 reviews, 50 of them planted" in printed


def test_lora_selection_chooses_better_than_chance_and_words(tmp_path):
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    assert "\nLESS " in run_example("lora_selection", "--quick", "--output-dir", str(tmp_path))


def test_bm25_of_the_examples_is_that_of_bm25s():
    bm25s = pytest.importorskip("bm25s")
    data = example("text_data")
    texts, queries = data.made_up_topics(60, 0)[0], data.made_up_topics(5, 1)[0]
    index = bm25s.BM25(k1=1.5, b=0.75, method="lucene")
    index.index([text.split() for text in texts], show_progress=False)
    expected = np.stack([index.get_scores(query.split()) for query in queries], 1)
    np.testing.assert_allclose(example("text_baselines").bm25(texts, queries), expected, rtol=1e-4)


def test_a_run_of_other_settings_is_refused(tmp_path):
    model, rows = torch.nn.Linear(2, 1), example("text_data").Rows([torch.ones(2)] * 4)
    options = {
        "collate": torch.stack,
        "loss": lambda model, batch: model(batch).mean(),
        "epochs": 2,
        "batch_size": 2,
        "learning_rate": 0.1,
    }
    train_or_reuse = example("text_training").train_or_reuse
    checkpoints = train_or_reuse(model, rows, tmp_path, settings={"seed": 0}, **options)
    assert len(checkpoints) == 4
    weights = model.weight.detach().clone()
    other = torch.nn.Linear(2, 1)
    assert train_or_reuse(other, rows, tmp_path, settings={"seed": 0}, **options) == checkpoints
    assert torch.equal(other.weight, weights)
    with pytest.raises(SystemExit, match="holds a run of other settings"):
        train_or_reuse(model, rows, tmp_path, settings={"seed": 1}, **options)


def test_made_up_sentences_have_words_of_their_topic_only():
    data = example("text_data")
    texts, topics = data.made_up_topics(50, seed=0, habits=True)
    content = [{word for part in parts for phrase in part for word in phrase.split()} for parts in data.TOPICS.values()]
    for text, topic in zip(texts, topics, strict=True):
        sentence, ending = text.split()[:-2], " ".join(text.split()[-2:])
        assert set(sentence) <= content[topic] | {"and"}
        assert ending == data.MANNERS[topic]


def test_padding_is_not_attended():
    data = example("text_data")
    words = data.Words(["b a a", "a b b b"], size=4, length=3)
    assert words.words == ["[pad]", "[?]", "b", "a"]
    batch = data.padded(words.encode(["a c", "b a a a"]))
    assert batch["input_ids"].tolist() == [[3, 1, 0], [2, 3, 3]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]

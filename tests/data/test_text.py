"""Texts, chats and completions as tokens; packing, batches and streams; slow loops over lists are the oracles."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from text_cases import TEMPLATE, WORDS, datasets, make_tokenizer, offline, texts, tokens_of, transformers  # noqa: F401

from tracer.data.text.encoding import Encoder
from tracer.data.text.packing import pack
from tracer.data.text.reading import read_dataset
from tracer.data.text.settings import TextSettings, text_settings
from tracer.data.text.source import text_source
from tracer.errors import InputError, InputTypeError

EOS = 2


def encode(example, tokenizer=None, **options):
    return Encoder(tokenizer or make_tokenizer(), TextSettings(**options))(example)


def labelled(tokens, predicted):
    """Return tokens, with -100 for those that are not predicted."""
    return [token if place in predicted else -100 for place, token in enumerate(tokens)]


def test_texts_end_with_the_end_token_once():
    expected = {"input_ids": tokens_of("w1 w2 <eos>"), "labels": tokens_of("w1 w2 <eos>")}
    assert encode({"text": "w1 w2 "}) == encode({"text": "w1 w2 <eos>"}) == expected
    assert encode({"text": "w1 w2"}, add_eos=False)["input_ids"] == tokens_of("w1 w2")
    assert encode({"body": "w1"}, text_column="body")["input_ids"] == [*tokens_of("w1"), EOS]


def test_only_the_completion_is_predicted():
    example, whole = {"prompt": "w1 w2 ", "completion": "w3 w4 "}, tokens_of("w1 w2 w3 w4 <eos>")
    assert encode(example) == {"input_ids": whole, "labels": labelled(whole, {2, 3, 4})}
    assert encode(example, loss_on="all")["labels"] == whole


def test_chats_are_templated_and_of_them_the_assistant_is_predicted_alone_on_demand():
    turns = [("user", "w1 w2"), ("assistant", "w3"), ("user", "w4"), ("assistant", "w5 w6")]
    messages = [{"role": role, "content": content} for role, content in turns]
    whole = tokens_of("<user> w1 w2 <assistant> w3 <eos> <user> w4 <assistant> w5 w6 <eos>")
    assert encode({"messages": messages}) == {"input_ids": whole, "labels": whole}
    own = labelled(whole, {4, 5, 9, 10, 11})
    assert encode({"messages": messages}, loss_on="assistant") == {"input_ids": whole, "labels": own}
    named = {"conversations": [{"from": role, "value": content} for role, content in turns]}
    assert encode(named, loss_on="assistant")["labels"] == own
    split = {"prompt": messages[:3], "completion": messages[3:]}
    assert encode(split) == {"input_ids": whole, "labels": labelled(whole, {9, 10, 11})}
    two = {"prompt": messages[:2], "completion": messages[2:]}
    assert encode(two, loss_on="assistant")["labels"] == labelled(whole, {9, 10, 11})  # of the completion only


def test_a_template_may_be_given_as_text_or_file(tmp_path):
    (tmp_path / "template.jinja").write_text(TEMPLATE)
    chat = {"messages": [{"role": "user", "content": "w1"}]}
    for template in (TEMPLATE, str(tmp_path / "template.jinja")):
        assert encode(chat, make_tokenizer(None), chat_template=template)["input_ids"] == tokens_of("<user> w1")


def test_tokens_are_taken_as_they_are():
    given = {"input_ids": [5, 6, 7], "completion_mask": [0, 1, 1], "assistant_masks": [1, 1, 0]}
    assert encode(given) == {"input_ids": [5, 6, 7], "labels": [-100, 6, -100]}
    assert encode(given, loss_on="completion")["labels"] == [-100, 6, 7]
    assert encode(given, loss_on="all")["labels"] == [5, 6, 7]
    assert encode({"input_ids": [5, 6], "labels": [-100, 6]})["labels"] == [-100, 6]


@pytest.mark.parametrize(
    ("example", "options", "message"),
    [
        ({"body": "w1"}, {}, "text_column="),
        ({"text": "w1"}, {"loss_on": "completion"}, "columns prompt and completion"),
        ({"text": "w1"}, {"loss_on": "assistant"}, "column messages"),
        ({"prompt": "w1", "completion": "w2"}, {"loss_on": "assistant"}, "are texts"),
        ({"input_ids": [1]}, {"loss_on": "assistant"}, "assistant_masks"),
        ({"input_ids": [1], "labels": [1, 2]}, {}, "1 input_ids and 2 labels"),
        ({"input_ids": [1, 2], "labels": 1}, {}, "a label for each of the 2 tokens"),
        ({"messages": [{"role": "user", "content": "w1"}]}, {"loss_on": "assistant"}, "no token of the assistant"),
    ],
)
def test_examples_without_the_columns_are_refused(example, options, message):
    with pytest.raises(InputError, match=message):
        encode(example, **options)


def test_a_prompt_that_is_tokenized_otherwise_alone_is_said_once(caplog):
    encoder = Encoder(make_tokenizer(), TextSettings())
    for _ in range(2):
        found = encoder({"prompt": "w1 w", "completion": "2 w3"})  # "w2" is one token, and no border between the two
        assert found["labels"] == [-100, -100, *tokens_of("w3"), EOS]
    assert caplog.text.count("may be off by some tokens") == 1


def test_messages_without_a_template_are_refused():
    with pytest.raises(InputError, match="no chat template"):
        encode({"messages": [{"role": "user", "content": "w1"}]}, make_tokenizer(None))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"packing": "bfs"}, "did you mean 'bfd'"),
        ({"packing": "bfd", "max_length": None}, "max_length"),
        ({"unit": "block"}, "expects packing"),
        ({"unit": "block", "packing": "bfd", "group_column": "source"}, "group_column"),
        ({"unit": "block", "packing": "bfd", "id_column": "name"}, "id_column"),
        ({"packing": "wrapped", "streaming": True}, "another order"),
        ({"batch_tokens": 0}, "batch_tokens"),
    ],
)
def test_settings_that_do_not_fit_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        text_settings(options)


def test_an_unknown_setting_suggests_the_nearest():
    with pytest.raises(InputTypeError, match="did you mean 'max_length'"):
        text_settings({"max_len": 3})


# -- Reading ---------------------------------------------------------------------------------------------------------


def write_files(folder, values):
    table = datasets.Dataset.from_list([{"text": text, "source": str(row % 3)} for row, text in enumerate(values)])
    table.to_json(folder / "a.jsonl")
    table.to_csv(folder / "a.csv")
    table.to_parquet(folder / "a.parquet")
    table.save_to_disk(folder / "saved")
    datasets.DatasetDict({"train": table, "test": table.select([0])}).save_to_disk(folder / "splits")
    (folder / "a.txt").write_text("\n".join(values))
    return table


def test_files_folders_lists_and_data_sets_are_the_same_data(tmp_path):
    values = texts(5)
    table = write_files(tmp_path, values)
    names = [tmp_path / name for name in ("a.jsonl", "a.csv", "a.parquet", "a.txt", "saved", "splits", "*.jsonl")]
    for data in (*names, table, values, [{"text": text} for text in values]):
        assert list(read_dataset(data)["text"]) == values
    assert [row["text"] for row in read_dataset(tmp_path / "a.jsonl", streaming=True)] == values
    assert list(read_dataset(tmp_path / "splits", "train[1:3]")["text"]) == values[1:3]
    assert list(read_dataset(tmp_path / "a.csv", "train[1:3]")["text"]) == values[1:3]
    assert list(read_dataset(tmp_path / "splits", "test")["text"]) == values[:1]


def test_data_that_cannot_be_read_are_named(tmp_path):
    write_files(tmp_path, texts(3))
    (tmp_path / "other.pdf").write_text("?")
    with pytest.raises(InputError, match="no file .*missing.jsonl"):
        read_dataset(tmp_path / "missing.jsonl")
    with pytest.raises(InputError, match=r"end in \['.pdf'\]"):
        read_dataset(tmp_path / "other.pdf")
    with pytest.raises(InputError, match="no split 'dev'; choose one of"):
        read_dataset(tmp_path / "splits", "dev")
    with pytest.raises(InputError, match="split='dev' cannot be read"):
        read_dataset(tmp_path / "a.jsonl", "dev")
    with pytest.raises(InputError, match="slice of numbers"):
        read_dataset(tmp_path / "saved", "train[a:b]")
    with pytest.raises(InputTypeError, match="data is a int"):
        read_dataset(3)


# -- Packing ---------------------------------------------------------------------------------------------------------


def slow_best_fit(sizes, block):
    """Return documents by block: each, longest first, in the first of the blocks with the least space that suffices."""
    blocks = []
    for document in sorted(range(len(sizes)), key=lambda each: -sizes[each]):
        spaces = [block - sum(sizes[each] for each in one) for one in blocks]
        fitting = [space for space in spaces if space >= sizes[document]]
        if fitting:
            candidates = [one for one, space in zip(blocks, spaces, strict=True) if space == min(fitting)]
            candidates[0].append(document)
        else:
            blocks.append([document])
    return blocks


def test_best_fit_fills_as_a_slow_search_does():
    generator = np.random.default_rng(0)
    for _ in range(20):
        sizes = generator.integers(1, 12, 30)
        found = pack(sizes, "bfd", 10)
        cut = np.minimum(sizes, 10)
        assert all(stop - start == cut[document] for block in found for document, start, stop in block)
        filled = sorted(sorted(cut[document] for document, _, _ in block) for block in found)
        assert filled == sorted(sorted(cut[document] for document in block) for block in slow_best_fit(cut, 10))


@pytest.mark.parametrize("packing", ["bfd_split", "wrapped"])
def test_splitting_keeps_every_token(packing):
    sizes = np.random.default_rng(0).integers(0, 40, 50)
    found = pack(sizes, packing, 16)
    assert all(sum(stop - start for _, start, stop in block) <= 16 for block in found)
    parts = sorted(piece for block in found for piece in block)
    for document, group in itertools.groupby(parts, lambda piece: piece[0]):
        pieces = [piece[1:] for piece in group]
        assert [start for start, _ in pieces] == [0, *(stop for _, stop in pieces[:-1])]
        assert pieces[-1][1] == sizes[document]
    if packing == "wrapped":
        assert [piece for block in found for piece in block] == parts
        assert all(sum(stop - start for _, start, stop in block) == 16 for block in found[:-1])


# -- Rows and batches ------------------------------------------------------------------------------------------------


def all_batches(source):
    return list(source.batches(np.arange(len(source))))


def rows_of(source, name="input_ids"):
    """Return the values of each row without padding."""
    found = {}
    for batch, inds in all_batches(source):
        mask = batch["attention_mask"] if "attention_mask" in batch else batch["segment_ids"] > 0
        for row, values, attended in zip(inds.tolist(), batch[name], mask, strict=True):
            found[row] = values[attended.bool()].tolist()
    return [found[row] for row in range(len(source))]


def test_every_row_is_in_one_batch_of_similar_lengths_within_the_budget():
    values = texts(60, 23)
    source = text_source(values, make_tokenizer(), TextSettings(batch_tokens=48))
    batches = all_batches(source)
    assert sorted(np.concatenate([inds for _, inds in batches]).tolist()) == list(range(60))
    assert all(batch["input_ids"].numel() <= 48 for batch, _ in batches)
    used = sum(int(batch["attention_mask"].sum()) for batch, _ in batches)
    size = 48 // max(len(text.split()) + 1 for text in values)  # a batch size that is safe for every row
    plain = [[len(text.split()) + 1 for text in values[start : start + size]] for start in range(0, 60, size)]
    padded = sum(batch["input_ids"].numel() for batch, _ in batches)
    assert used == sum(len(text.split()) + 1 for text in values)
    assert padded < sum(max(part) * len(part) for part in plain) and len(batches) < len(plain)
    assert rows_of(source) == [tokens_of(f"{text} <eos>") for text in values]
    assert [inds.tolist() for _, inds in source.batches(np.array([3, 7]))] in ([[3, 7]], [[7, 3]])


def test_a_trial_has_the_longest_rows_and_batches_of_all_lengths():
    source = text_source(texts(300, 23), make_tokenizer(), TextSettings(batch_tokens=64))
    longest, *others = [len(batch["input_ids"][0]) for batch in source.trial_batches(5)]
    of_all = [len(batch["input_ids"][0]) for batch, _ in source.batches(np.arange(len(source)))]
    assert longest == max(of_all) and len(others) == 4
    assert np.quantile(of_all, 0.75) >= others[1] >= np.median(of_all) >= others[2] >= np.quantile(of_all, 0.25)
    assert len(list(text_source(texts(1), make_tokenizer(), TextSettings()).trial_batches(5))) == 1


@pytest.mark.parametrize(("truncation", "kept"), [("keep_start", slice(0, 4)), ("keep_end", slice(-4, None))])
def test_long_documents_are_cut(truncation, kept):
    source = text_source(texts(), make_tokenizer(), TextSettings(max_length=4, truncation=truncation))
    expected = [tokens_of(f"{text} <eos>")[kept] for text in texts()]
    assert rows_of(source) == expected


def test_examples_without_a_predicted_token_are_left_out_and_the_rest_know_their_number():
    data = [
        {"prompt": "w1 w2 w3 ", "completion": "w4"},
        {"prompt": "w1 ", "completion": "w2"},
        {"prompt": "w1 w2 ", "completion": "w3"},
        {"prompt": "", "completion": "<eos>"},  # one token, which nothing predicts
    ]
    source = text_source(data, make_tokenizer(), TextSettings(max_length=3))
    assert source.rows.documents.tolist() == [1, 2]
    assert rows_of(source, "labels") == [[-100, *tokens_of("w2 <eos>")], [-100, -100, *tokens_of("w3")]]
    with pytest.raises(InputError, match="has 4 examples, and none has a token to predict"):
        text_source(data, make_tokenizer(), TextSettings(max_length=1))


def test_blocks_number_their_documents_and_start_positions_again():
    settings = TextSettings(packing="bfd", unit="block", max_length=8)
    source = text_source(texts(), make_tokenizer(), settings)
    sizes = np.array([len(text.split()) + 1 for text in texts()])
    blocks = pack(sizes, "bfd", 8)
    for name, value in (
        ("input_ids", lambda number, tokens: tokens),
        ("labels", lambda number, tokens: [-100, *tokens[1:]]),
        ("position_ids", lambda number, tokens: list(range(len(tokens)))),
        ("segment_ids", lambda number, tokens: [number + 1] * len(tokens)),
    ):
        expected = []
        for block in blocks:
            parts = [tokens_of(f"{texts()[document]} <eos>")[start:stop] for document, start, stop in block]
            expected.append([item for number, tokens in enumerate(parts) for item in value(number, tokens)])
        assert rows_of(source, name) == expected
    assert all("attention_mask" not in batch for batch, _ in all_batches(source))


def test_documents_of_wrapped_blocks_have_those_before_them_as_context():
    tokenizer, options = make_tokenizer(), {"packing": "wrapped", "max_length": 8}
    stream = [token for text in texts() for token in tokens_of(f"{text} <eos>")]
    owner = [row for row, text in enumerate(texts()) for _ in range(len(text.split()) + 1)]
    blocks = text_source(texts(), tokenizer, TextSettings(**options, unit="block"))
    assert rows_of(blocks) == [stream[start : start + 8] for start in range(0, len(stream), 8)]
    assert rows_of(blocks, "position_ids") == [list(range(len(row))) for row in rows_of(blocks)]
    parts = text_source(texts(), tokenizer, TextSettings(**options))
    expected = []
    for start in range(0, len(stream), 8):
        stop = min(start + 8, len(stream))
        for document in sorted({*owner[start:stop]}):
            own = {place - start for place in range(start, stop) if owner[place] == document}
            if own != {0}:  # the first token of a block is predicted by nothing
                tokens = stream[start : start + max(own) + 1]
                expected.append((document, tokens, labelled(tokens, own)))
    assert [*zip(parts.rows.documents.tolist(), rows_of(parts), rows_of(parts, "labels"), strict=True)] == expected


def test_groups_are_those_of_the_rows_documents():
    data = [{"text": text, "source": "ab"[row % 2]} for row, text in enumerate(texts())]
    settings = TextSettings(packing="bfd_split", max_length=4, group_column="source")
    source = text_source(data, make_tokenizer(), settings)
    numbers, names = source.groups
    assert names == ["a", "b"] and numbers.tolist() == (source.rows.documents % 2).tolist()
    with pytest.raises(InputError, match="group_column='origin' is not in the data"):
        text_source(data, make_tokenizer(), TextSettings(group_column="origin"))


@pytest.mark.parametrize("streaming", [False, True])
def test_ids_are_those_of_the_rows_documents(tmp_path, streaming):
    data = [{"text": text, "name": f"doc-{row}"} for row, text in enumerate(texts())]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(each) + "\n" for each in data))
    given = (tmp_path / "a.jsonl", make_tokenizer(), TextSettings(streaming=streaming, id_column="name", max_length=4))
    source = text_source(*given)
    assert source.ids == [f"doc-{example}" for example in source.rows.examples]
    assert source.id_of(2) == source.ids[2]
    with pytest.raises(InputError, match="id_column='key' is not in the data"):
        text_source(*given[:2], TextSettings(streaming=streaming, id_column="key"))
    assert text_source(*given[:2], TextSettings(streaming=streaming, id_column="key"), "targets", True).ids is None


def test_parts_of_a_document_are_told_apart_and_repeated_ids_are_refused():
    data = [{"text": text, "name": row} for row, text in enumerate(texts())]
    split = text_source(data, make_tokenizer(), TextSettings(packing="bfd_split", max_length=4, id_column="name"))
    several = np.bincount(split.rows.examples) > 1
    assert several.any() and not several.all()
    parts = {example: 0 for example in range(len(data))}
    for example, name in zip(split.rows.examples.tolist(), split.ids, strict=True):
        assert name == (f"{example}:{parts[example]}" if several[example] else example)
        parts[example] += 1
    again = [{**each, "name": "same"} for each in data]
    with pytest.raises(InputError, match=r"id_column='name' names several examples by one id: 'same'"):
        _ = text_source(again, make_tokenizer(), TextSettings(id_column="name")).ids


def test_a_stream_has_the_rows_of_the_data_set(tmp_path):
    with (tmp_path / "a.jsonl").open("w") as file:
        file.writelines(json.dumps({"text": text, "source": str(len(text))}) + "\n" for text in texts(40))
    whole, stream = (
        text_source(tmp_path / "a.jsonl", make_tokenizer(), TextSettings(streaming=streaming, group_column="source"))
        for streaming in (False, True)
    )
    assert rows_of(stream) == rows_of(whole) == rows_of(stream)
    assert [each.tolist() for each in stream.groups[:1]] == [each.tolist() for each in whole.groups[:1]]
    wanted = np.array([3, 9, 30])
    parts = [(batch["input_ids"].tolist(), inds.tolist()) for batch, inds in stream.batches(wanted)]
    assert parts == [(batch["input_ids"].tolist(), inds.tolist()) for batch, inds in whole.batches(wanted)]


@pytest.mark.parametrize("change", ["shuffled", "shorter"])
def test_a_stream_that_differs_in_a_later_pass_is_refused(change):
    values = texts()
    stream = datasets.IterableDataset.from_generator(lambda: ({"text": text} for text in values))
    source = text_source(stream, make_tokenizer(), TextSettings())
    values[:] = values[::-1] if change == "shuffled" else values[:-1]
    with pytest.raises(InputError, match="this pass differs from the first one at example"):
        all_batches(source)


# -- Blocks that are given, and padding ------------------------------------------------------------------------------


def given_blocks(settings):
    """Return blocks as `pack` makes them, in all forms in which data may say where documents begin."""
    sizes = np.array([len(text.split()) + 1 for text in texts()])
    blocks, forms = (
        pack(sizes, "bfd", 16),
        {name: [] for name in ("seq_lengths", "doc_ids", "segment_ids", "position_ids")},
    )
    for block in blocks:
        parts = [tokens_of(f"{texts()[document]} <eos>") for document, _, _ in block]
        tokens = {"input_ids": [token for part in parts for token in part]}
        runs = [
            (number, document, len(part))
            for number, ((document, _, _), part) in enumerate(zip(block, parts, strict=True))
        ]
        forms["seq_lengths"].append({**tokens, "seq_lengths": [size for *_, size in runs]})
        forms["doc_ids"].append({**tokens, "doc_ids": [document for _, document, size in runs for _ in range(size)]})
        forms["segment_ids"].append({**tokens, "segment_ids": [1 + n for n, _, size in runs for _ in range(size)]})
        forms["position_ids"].append({**tokens, "position_ids": [place for *_, size in runs for place in range(size)]})
    return blocks, forms


@pytest.mark.parametrize("form", ["seq_lengths", "doc_ids", "segment_ids", "position_ids"])
@pytest.mark.parametrize("packing", ["given", "given_wrapped"])
def test_given_blocks_have_the_rows_of_their_documents(form, packing):
    blocks, forms = given_blocks(TextSettings())
    data, tokenizer = datasets.Dataset.from_list(forms[form]), make_tokenizer()
    whole = text_source(data, tokenizer, TextSettings(packing=packing, unit="block"))
    assert rows_of(whole) == [each["input_ids"] for each in forms[form]]
    source = text_source(data, tokenizer, TextSettings(packing=packing))
    expected, owners, place = [], [], 0
    for block in blocks:
        context = []
        for document, _, _ in block:
            own = tokens_of(f"{texts()[document]} <eos>")
            before, context = (context, context + own) if packing == "given_wrapped" else ([], [])
            if len(before) + len(own) > 1:
                expected.append(before + own)
                owners.append(document if form == "doc_ids" else place)
            place += 1
    assert rows_of(source) == expected and source.rows.documents.tolist() == owners


def test_given_blocks_may_be_streamed():
    _, forms = given_blocks(TextSettings())
    data = datasets.Dataset.from_list(forms["segment_ids"])
    sources = [
        text_source(each, make_tokenizer(), TextSettings(packing="given"))
        for each in (data, data.to_iterable_dataset())
    ]
    assert rows_of(sources[0]) == rows_of(sources[1]) and len(sources[0]) > len(data)


def test_blocks_that_do_not_say_where_documents_begin_are_refused():
    with pytest.raises(InputError, match="one of seq_lengths, doc_ids"):
        encode({"input_ids": [5, 6]}, packing="given")
    with pytest.raises(InputError, match=r"2 input_ids and documents of \[1\] tokens"):
        encode({"input_ids": [5, 6], "seq_lengths": [1]}, packing="given")


def test_padding_of_tokenized_data_does_not_count():
    padded = {"input_ids": [5, 6, 7, 0, 0], "attention_mask": [1, 1, 1, 0, 0]}
    assert encode(padded) == {"input_ids": [5, 6, 7], "labels": [5, 6, 7]}
    labels = {"labels": [-100, 6, 7, -100, -100]}
    assert encode({**padded, **labels}) == {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}


def test_a_data_set_with_a_transform_is_refused():
    data = datasets.Dataset.from_list([{"text": "w1 w2"}])
    data.set_transform(lambda batch: batch)
    with pytest.raises(InputError, match="has a transform"):
        text_source(data, make_tokenizer(), TextSettings())

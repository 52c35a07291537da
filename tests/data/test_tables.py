"""DataFrames, Series, arrays of any dtype and data sets of `datasets` as data."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from tracer import Tracer, attribute
from tracer.data.datasets import as_data_source
from tracer.data.named_tasks import make_task
from tracer.data.tables import InputForm
from tracer.errors import BatchError, InputError, InputTypeError

RNG = np.random.default_rng(0)
X, Y = RNG.standard_normal((12, 3)), RNG.integers(0, 2, 12)
FRAME = pd.DataFrame(X, columns=["age", "income", "score"])


def net(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to(dtype)


def scores(path, train, model=None, task="classification", **options):
    model = model or net()
    given = {"projector": "none", "progress": False, **options}
    return attribute(model, task, train, (X[:2], Y[:2]), [(model.state_dict(), 0.1)], save_dir=path, **given).scores


EXPECTED = (torch.tensor(X, dtype=torch.float32), torch.tensor(Y))


@pytest.mark.parametrize(
    "train",
    [
        (X, Y),
        (FRAME, pd.Series(Y)),
        (FRAME, pd.Series(Y.astype(bool))),
        (FRAME.astype("Float64"), pd.Series(Y, dtype="Int64")),
        (FRAME, pd.Series(Y).astype("category").cat.codes),
        (FRAME, Y.tolist()),
        (X.astype(np.float32), Y.astype(np.uint8)),
        FRAME.assign(label=Y),
        [(X[:6], Y[:6]), (X[6:], Y[6:])],
        [{"input": FRAME[:6], "labels": Y[:6]}, {"input": FRAME[6:], "labels": pd.Series(Y[6:])}],
    ],
)
@pytest.mark.parametrize("storage", ["none", "float32"])
def test_tables_and_arrays_give_the_scores_of_tensors(tmp_path, train, storage):
    expected = scores(tmp_path / "tensors", EXPECTED, storage=storage)
    np.testing.assert_array_equal(scores(tmp_path / "tables", train, storage=storage), expected)


class Rows(torch.utils.data.Dataset):
    """A data set of numpy's values, as a mapping or a pair."""

    def __init__(self, named=False):
        self.named = named

    def __len__(self):
        return len(X)

    def __getitem__(self, row):
        return {"input": X[row], "labels": Y[row]} if self.named else (X[row], int(Y[row]))


@pytest.mark.parametrize(
    "train",
    [Rows(), Rows(named=True), torch.utils.data.DataLoader(Rows(), batch_size=5), [Rows()[row] for row in range(12)]],
)
def test_examples_of_numpy_are_collated_in_the_model_s_dtype(tmp_path, train):
    expected = scores(tmp_path / "tensors", EXPECTED)
    np.testing.assert_allclose(scores(tmp_path / "examples", train), expected, rtol=1e-4, atol=1e-6)


def test_tensors_of_examples_keep_their_dtype():
    form = InputForm.of(net(), make_task("classification"))
    x, y = form.collate([(torch.zeros(3).double(), 1), (torch.ones(3).double(), 0)])
    assert (x.dtype, y.tolist()) == (torch.float64, [1, 0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_floats_are_those_of_the_model(tmp_path, dtype):
    form = InputForm.of(net(dtype), make_task("classification"))
    x, y = form.batch((FRAME, pd.Series(Y)))
    assert (x.dtype, y.dtype) == (dtype, torch.int64)
    torch.testing.assert_close(x, torch.tensor(X).to(dtype))


@pytest.mark.parametrize(("embeds", "dtype"), [(False, torch.float32), (True, torch.int64)])
@pytest.mark.parametrize("values", [np.arange(6, dtype=np.uint8).reshape(3, 2), pd.DataFrame({"a": [1, 2, 3], "b": 4})])
def test_integers_stay_integers_only_for_models_with_an_embedding(embeds, dtype, values):
    model = nn.Sequential(nn.Embedding(9, 2), nn.Flatten(), nn.Linear(4, 2)) if embeds else nn.Linear(2, 2)
    x, y = InputForm.of(model, make_task("classification")).batch((values, np.arange(3, dtype=np.int8)))
    assert (x.dtype, y.dtype) == (dtype, torch.int64)


def test_regression_takes_a_series_of_floats(tmp_path):
    model = nn.Linear(3, 1)
    series, targets = pd.Series(RNG.standard_normal(12)), (X[:2], X[:2, 0])
    options = {"projector": "none", "progress": False}
    given = [(model.state_dict(), 0.1)]
    found = attribute(model, "regression", (FRAME, series), targets, given, save_dir=tmp_path / "a", **options)
    tensors = EXPECTED[0], torch.tensor(series.to_numpy(), dtype=torch.float32)
    expected = attribute(model, "regression", tensors, targets, given, save_dir=tmp_path / "b", **options)
    np.testing.assert_array_equal(found.scores, expected.scores)


def test_batches_of_a_loop_may_be_tables(tmp_path):
    model, answers = net(), []
    for name, (x, y) in {"tables": (FRAME, pd.Series(Y)), "tensors": EXPECTED}.items():
        tracer = Tracer(model, "classification", 12, tmp_path / name, proj_dim=16)
        tracer.load_checkpoint(model.state_dict(), 0, 0.1)
        for start in (0, 6):
            tracer.featurize((x[start : start + 6], y[start : start + 6]), num_samples=6)
        tracer.finalize_features()
        answers.append(tracer.query((x[:2], y[:2]), 3))
    np.testing.assert_array_equal(answers[0].indices, answers[1].indices)


@pytest.mark.parametrize(
    ("train", "error", "message"),
    [
        ((FRAME.assign(city="Rome"), Y), InputTypeError, r"columns \['city'\] hold no numbers"),
        ((FRAME, pd.Series(["yes", "no"] * 6)), InputTypeError, r"no numbers.*astype\('category'\)"),
        (FRAME, InputError, r"exactly one of .* for the labels, got none"),
        (FRAME.assign(label=Y, target=Y), InputError, r"got \['labels?', 'target'\]"),
        ((FRAME[:5], Y), InputError, "expected one length"),
    ],
)
def test_tables_that_cannot_be_taken_are_refused(tmp_path, train, error, message):
    with pytest.raises(error, match=message):
        scores(tmp_path / "store", train)


class Pooled(nn.Module):
    def __init__(self, **more):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(20, 4), nn.Linear(4, 2)

    def forward(self, input_ids, attention_mask=None):
        mask = (torch.ones_like(input_ids) if attention_mask is None else attention_mask).unsqueeze(-1)
        return {"logits": self.head((self.embed(input_ids) * mask).sum(1) / mask.sum(1))}


class PassesMore(Pooled):
    def forward(self, input_ids, attention_mask=None, **more):
        assert not more
        return super().forward(input_ids, attention_mask)


class Tokenizer:
    """Pads as tokenizers of transformers do."""

    padding_side = "right"

    def pad(self, samples, return_tensors):
        length = max(len(sample["input_ids"]) for sample in samples)
        rows = {
            name: [list(s[name]) + [0] * (length - len(s[name])) for s in samples]
            for name in samples[0]
            if name != "label"
        }
        return {name: torch.tensor(values) for name, values in rows.items()} | {
            "labels": torch.tensor([s["label"] for s in samples])
        }


LENGTHS = (3, 5, 2, 4)
TOKENS = [RNG.integers(1, 20, length).tolist() for length in LENGTHS]
COLUMNS = {
    "input_ids": TOKENS,
    "attention_mask": [[1] * length for length in LENGTHS],
    "label": [0, 1, 1, 0],
    "idx": list(range(4)),
    "text": list("abcd"),
}


@pytest.mark.parametrize("model", [Pooled(), PassesMore()])
def test_a_hugging_face_data_set_keeps_the_columns_of_the_forward_and_the_tokenizer_pads(tmp_path, model):
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict(COLUMNS)
    options = {"save_dir": tmp_path / "store", "batch_size": 3, "projector": "none", "progress": False}
    given = (data, data.select([0]), [(model.state_dict(), 0.1)])
    found = attribute(model, "text_classification", *given, collate_fn=Tokenizer(), **options)
    alone = [
        {"input_ids": torch.tensor([row]), "labels": torch.tensor([y])}
        for row, y in zip(TOKENS, COLUMNS["label"], strict=True)
    ]
    given = (alone, alone[:1], given[2])
    expected = attribute(model, "text_classification", *given, **{**options, "save_dir": tmp_path / "alone"})
    np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-4)


def test_a_hugging_face_data_set_of_one_length_needs_no_collate_fn(tmp_path):
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict({"input_ids": [[1, 2], [3, 4]], "label": [0, 1], "idx": [0, 1]})
    source = as_data_source(data, "train", 2, form=InputForm.of(Pooled(), make_task("text_classification")))
    ((batch, _),) = source.batches(np.arange(2))
    assert sorted(batch) == ["input_ids", "label"]
    assert batch["input_ids"].tolist() == [[1, 2], [3, 4]]


def test_a_function_of_the_batch_gets_all_columns():
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict({"input_ids": [[1, 2], [3, 4]], "label": [0, 1], "idx": [0, 1]})
    task = make_task(lambda model, batch: model(batch["input_ids"])["logits"][:, 0])
    ((batch, _),) = as_data_source(data, "train", 2, form=InputForm.of(Pooled(), task)).batches(np.arange(2))
    assert sorted(batch) == ["idx", "input_ids", "label"]


def test_splits_are_refused():
    datasets = pytest.importorskip("datasets")
    splits = datasets.DatasetDict({"train": datasets.Dataset.from_dict({"input_ids": [[1]], "label": [0]})})
    with pytest.raises(InputTypeError, match=r"has the splits \['train'\]; pass one of them: data\['train'\]"):
        as_data_source(splits, "train", 2)


@pytest.mark.parametrize(("side", "expected"), [("right", [1, 2, -100]), ("left", [-100, 1, 2])])
def test_labels_of_tokens_are_padded_on_the_side_of_the_tokens(side, expected):
    tokenizer = type("Own", (Tokenizer,), {"padding_side": side, "pad": lambda self, samples, return_tensors: {
        "input_ids": torch.zeros(len(samples), 3).long()}})()  # fmt: skip
    data = [
        {"input_ids": [1, 2, 3], "labels": [1, 2, 3], "text": "a"},
        {"input_ids": [1, 2], "labels": [1, 2], "text": "b"},
    ]
    ((batch, _),) = as_data_source(data, "train", 2, tokenizer).batches(np.arange(2))
    assert batch["labels"].tolist() == [[1, 2, 3], expected]
    assert batch["text"] == ["a", "b"]


def test_columns_that_a_tokenizer_cannot_pad_are_named():
    class Failing(Tokenizer):
        def pad(self, samples, return_tensors):
            raise ValueError("Unable to create tensor.\nDetails")

    source = as_data_source([{"input_ids": [1], "spans": [[1, 2]], "label": 0}], "train", 1, Failing())
    with pytest.raises(BatchError, match=r"cannot pad the columns \['input_ids', 'label', 'spans'\]: Unable to create"):
        list(source.batches(np.arange(1)))


def test_texts_that_were_not_tokenized_are_refused():
    source = as_data_source([{"text": "a", "label": 0}], "train", 1, Tokenizer())
    with pytest.raises(BatchError, match=r"no tokens, only text, label; .*tokenizer\(row\['text'\]\)"):
        list(source.batches(np.arange(1)))


@pytest.mark.parametrize("numbers", [True, False])
def test_a_report_shows_the_columns_of_a_table_by_name(tmp_path, numbers):
    model, frame = net(), FRAME if numbers else FRAME.assign(city="Rome")
    given = ((X, Y), (X[:2], Y[:2]), [(model.state_dict(), 0.1)])
    found = attribute(model, "classification", *given, save_dir=tmp_path / "store", proj_dim=8)
    labels = pd.Series(["no", "yes"]).take(Y).set_axis(np.arange(12) + 5)
    page = found.report(
        tmp_path / "report", inputs=frame.set_axis(np.arange(12) + 5), labels=labels, figures=False
    ).read_text()
    assert '"yes"' in page
    assert ('"names":["age","income","score"]' in page) == numbers
    assert ('"name":"age"' in page and f'"{X[0, 0]}"' in page) == (not numbers)


@pytest.mark.parametrize(
    ("train", "said"),
    [
        ((X.tolist(), Y.tolist()), "fit into one batch.*tuple of tensors, arrays or tables, .inputs, labels."),
        ([(torch.zeros(3), 0), (torch.zeros(4), 1)], r"fit into one batch.*\[3\].*pass collate_fn="),
        ((torch.zeros(3), 0), "a single example as a list"),
        ((X, np.eye(2)[Y]), r"one-hot labels labels\.argmax\(1\)"),
    ],
    ids=["lists of numbers", "other lengths", "one example", "one-hot labels"],
)
def test_what_is_no_batch_is_refused_with_what_to_pass(train, said, tmp_path):
    with pytest.raises(BatchError, match=said):
        scores(tmp_path, train)

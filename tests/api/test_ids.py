"""Ids of examples: given at once or batch by batch, stored, and shown wherever indices are."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset

from tracer import (
    InputError,
    InputTypeError,
    MismatchError,
    NonFiniteError,
    TopK,
    Tracer,
    attribute,
    verify,
)
from tracer.data.example_ids import check_ids, find_ids
from tracer.store.arrays.store_path import store_path
from tracer.store.example_ids import ExampleIds

PATHS = [f"images/{row}.png" for row in range(23)]
TARGET_PATHS = [Path("targets") / f"{row}.png" for row in range(5)]


def traced(run, path, **options):
    given = {"proj_dim": 64, "ids": PATHS, "target_ids": TARGET_PATHS, **options}
    task = "image_classification"
    return attribute(run.model, task, run.train, run.targets, run.checkpoints, save_dir=path, **given)


def lines(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("options", [{}, {"projector": "none"}])
def test_ids_are_stored_and_come_with_the_strongest_examples(run, tmp_path, options):
    found = traced(run, tmp_path / "store", **options)
    reader = Tracer.open(tmp_path / "store")
    assert reader.ids() == found.tracer.ids() == PATHS
    assert reader.ids("targets") == list(map(str, TARGET_PATHS))
    top = reader.top("targets", 3)
    assert top.ids.tolist() == [[PATHS[row] for row in rows] for rows in top.indices.tolist()]
    assert top.target_ids == list(map(str, TARGET_PATHS))
    indices, scores = top
    assert indices.shape == scores.shape == top.ids.shape


def test_without_ids_there_are_none(run, tmp_path):
    found = traced(run, tmp_path / "store", ids=None, target_ids=None)
    assert found.tracer.ids() is None
    assert found.top(2).ids is None
    assert not (tmp_path / "store" / "ids").exists()


def test_ids_of_batches_are_those_of_the_whole(run, tmp_path):
    tracer = Tracer(run.model, "image_classification", 23, tmp_path / "store", proj_dim=16)
    state, rate = run.checkpoints[0]
    tracer.load_checkpoint(state, 0, rate)
    order = torch.randperm(23, generator=torch.Generator().manual_seed(0))
    for rows in order.split(6):
        batch = run.x[rows], run.y[rows]
        tracer.featurize(batch, inds=rows, ids=[PATHS[row] for row in rows.tolist()])
        tracer.flush()
    assert len(list((tmp_path / "store" / "ids" / "train").iterdir())) > 2
    tracer.finalize_features()
    assert sorted(path.name for path in (tmp_path / "store" / "ids" / "train").iterdir())[-1] == "zarr.json"
    assert len(list((tmp_path / "store" / "ids" / "train").iterdir())) == 2  # one part, and the group's document
    tracer.start_scoring_checkpoint(state, 0, 5, "targets")
    tracer.score(run.targets, num_samples=5, ids=range(100, 105))
    assert tracer.ids() == PATHS
    assert tracer.top("targets", 1).target_ids == [100, 101, 102, 103, 104]
    assert tracer.query(run.targets, 2).ids.shape == (5, 2)


def test_another_id_for_an_example_is_another_order(run, tmp_path):
    traced(run, tmp_path / "store")
    traced(run, tmp_path / "store")
    with pytest.raises(MismatchError, match="training example 0 has the id 'images/0.png'.*got 'images/22.png'"):
        traced(run, tmp_path / "store", ids=PATHS[::-1])


def test_ids_may_be_given_later_and_changed(run, tmp_path):
    found = traced(run, tmp_path / "store", ids=None, target_ids=None)
    found.tracer.set_ids(PATHS)
    found.tracer.set_ids(np.arange(5) * 10, "targets")
    found.tracer.set_ids(PATHS[::-1])
    again = Tracer.open(tmp_path / "store")
    assert again.ids() == PATHS[::-1]
    assert again.top("targets", 1).target_ids == [0, 10, 20, 30, 40]
    with pytest.raises(InputError, match="exp_name='tests' was never scored; did you mean 'targets'"):
        again.set_ids(PATHS, "tests")
    with pytest.raises(InputError, match="ids has 22 values; expected 23"):
        again.set_ids(PATHS[1:])


def test_replaced_examples_lose_their_ids_and_added_ones_have_none_yet(run, tmp_path):
    found = traced(run, tmp_path / "store")
    found.tracer.replace([3])
    found.tracer.grow(24)
    assert found.tracer.ids() == [*PATHS[:3], 3, *PATHS[4:], 23]
    found.tracer.store.ids().add([4 + 19], ["3"])  # like the index of the example without an id
    assert found.tracer.ids()[23] == "3"


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        (["a", "b", "a"], InputError, r"several examples by one id: 'a' \(0 and 2\)"),
        ([1, "1", 2], InputError, r"'1' \(0 and 1\)"),
        (["a", "b"], InputError, "has 2 values; expected 3"),
        ([1.5, 2, 3], InputTypeError, "holds 1.5, a float; expected texts, integers or paths"),
        ([True, False, None], InputTypeError, "holds True, a bool"),
        ("abc", InputTypeError, "is str; expected a text or an integer for each example"),
    ],
)
def test_ids_that_do_not_name_each_example_once_are_refused(ids, error, message):
    with pytest.raises(error, match=message):
        check_ids(ids, 3)


class Files(Dataset):
    samples = [("a.png", 0), ("b.png", 1), ("c.png", 0)]

    def __init__(self):
        self.names = np.array(["x", "y", "z"])

    def __len__(self):
        return 3

    def __getitem__(self, row):
        return torch.zeros(2), 0


FRAME = pd.DataFrame({"age": [1.0, 2.0, 3.0]}, index=["ann", "bob", "eve"])


@pytest.mark.parametrize(
    ("ids", "data", "expected"),
    [
        ("names", Files(), ["x", "y", "z"]),
        ("samples", Files(), ["a.png", "b.png", "c.png"]),
        ("names", DataLoader(Files()), ["x", "y", "z"]),
        ("names", Subset(Subset(Files(), [0, 2, 1]), [1, 2]), ["z", "y"]),
        ("name", [{"x": 1, "name": "p"}, {"x": 2, "name": "q"}], ["p", "q"]),
        ("age", (FRAME.astype(int), [0, 1, 0]), [1, 2, 3]),
        ("index", (FRAME, [0, 1, 0]), ["ann", "bob", "eve"]),
        (None, (FRAME, [0, 1, 0]), ["ann", "bob", "eve"]),
        (None, (FRAME.to_numpy(), pd.Series([0, 1, 0], index=[5, 9, 2])), [5, 9, 2]),
        (None, FRAME.reset_index(drop=True), None),
        (None, FRAME.set_axis(["ann", "bob", "ann"]), None),
        (None, Files(), None),
    ],
)
def test_ids_are_columns_attributes_or_the_index_of_the_data(ids, data, expected):
    assert find_ids(ids, data, 3 if expected is None else len(expected)) == expected


def test_a_column_of_a_hugging_face_data_set_names_its_examples():
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict({"input_ids": [[1], [2]], "title": ["one", "two"]})
    assert find_ids("title", data, 2) == ["one", "two"]


def test_a_missing_column_is_refused():
    with pytest.raises(InputError, match="target_ids='path' is neither a column nor an attribute of the data, a Files"):
        find_ids("path", Files(), 3, "target_ids")


def test_errors_name_examples_by_their_ids(run, tmp_path):
    broken = run.x.clone()
    broken[7] = torch.nan
    run.x = broken
    with pytest.raises(NonFiniteError, match=r"loss of rows 7 \('images/7.png'\) is NaN"):
        traced(run, tmp_path / "store")


@pytest.mark.parametrize("storage", ["none", "float32"])
def test_an_example_with_other_inputs_is_named_by_its_id(run, tmp_path, storage):
    traced(run, tmp_path / "store", projector="none", storage=storage)
    run.x[7] += 1
    with pytest.raises(MismatchError, match=r"7 \('images/7.png'\)"):
        tracer = Tracer(run.model, "image_classification", 23, tmp_path / "store", projector="none", storage=storage)
        tracer.load_checkpoint(run.checkpoints[0][0], 0)
        tracer.featurize(run.train, num_samples=23)


def test_a_report_shows_ids_and_links_those_that_are_files(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    (tmp_path / PATHS[2]).touch()
    found = traced(run, "store")
    page = found.report("out/report", figures=False)
    data = json.loads(page.read_text().split('id="report-data"')[1].partition(">")[2].partition("</script>")[0])
    assert data["ids"]["names"] == PATHS
    assert data["ids"]["base"] == "../.."
    assert data["target_ids"]["names"] == list(map(str, TARGET_PATHS))
    rows = lines(page.parent / "influence_summary.csv")
    assert {int(line["train_index"]): line["id"] for line in rows} == dict(enumerate(PATHS))
    rows = lines(page.parent / "influence_scores.csv")
    assert all(line["id"] == PATHS[int(line["train_index"])] for line in rows)
    assert {line["target_id"] for line in rows} == {
        line["target_id"] for line in lines(page.parent / "target_summary.csv")
    }


def test_damaged_ids_are_found_and_can_be_given_again(run, tmp_path):
    found = traced(run, tmp_path / "store")
    (part,) = (path for path in (tmp_path / "store" / "ids" / "train").iterdir() if path.is_dir())
    text = (part / "zarr.json").read_text()
    (part / "zarr.json").write_text(text.replace('"ids": "', '"ids": "A'))
    checked = verify(tmp_path / "store")
    assert [Path(each.path).name for each in checked.damage] == [part.name]
    assert verify(tmp_path / "store").ok
    found.tracer.set_ids(PATHS)
    assert Tracer.open(tmp_path / "store").ids() == PATHS


def test_two_processes_write_parts_of_the_ids(run, tmp_path):
    def part(rank, path, names):
        model = nn.Linear(2, 2)
        torch.manual_seed(0)
        tracer = Tracer(model, "classification", 6, path, proj_dim=8, process=(rank, 2), seed=0)
        tracer.load_checkpoint({"weight": torch.ones(2, 2), "bias": torch.zeros(2)}, 0, 0.1)
        rows = torch.tensor(tracer.shard(range(6)).indices)
        if len(rows):
            x = torch.arange(12.0).view(6, 2)[rows]
            tracer.featurize((x, rows % 2), inds=rows, ids=[names[row] for row in rows.tolist()])
        tracer.close()
        return tracer

    names = list("abcdef")
    for rank in (0, 1):
        last = part(rank, tmp_path / "store", names)
    assert last.ids() == names
    shutil.rmtree(tmp_path / "store")
    part(0, tmp_path / "store", list("abcabc"))
    with pytest.raises(InputError, match=r"training example \d got the id '.', which training example \d has"):
        part(1, tmp_path / "store", list("abcabc"))
    # processes that write at the same time do not see each other's ids
    at_once = [ExampleIds(store_path(tmp_path / "other"), None) for _ in range(2)]
    for rows, each in zip(([0, 1], [2, 3]), at_once, strict=True):
        each.add(rows, ["a", f"b{rows[0]}"])
    for each in at_once:
        each.flush()
    with pytest.raises(InputError, match=r"ids name several training examples: 'a' \(\d and \d\)"):
        at_once[0].join()


def test_top_k_is_a_pair_that_may_have_names():
    top = TopK(np.array([[1]]), np.array([[0.5]]), ids=np.array([["a"]], object), target_ids=["t"])
    indices, scores = top
    assert (top[0] is indices, top[1] is scores, len(top)) == (True, True, 2)
    assert TopK(indices, scores).ids is None

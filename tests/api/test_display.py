"""What notebooks and terminals show of attributions, and DataFrames of results."""

from __future__ import annotations

import re

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from tracer import Attribution, InputError, TopK, Tracer, attribute, metrics
from tracer.data.datasets import IteratedSource
from tracer.retraining import Retrained

PATHS = [f"images/{row}.png" for row in range(23)]


@pytest.fixture
def found(run, tmp_path):
    given = {"proj_dim": 64, "ids": PATHS, "target_ids": list("abcde"), "save_dir": tmp_path / "store"}
    run.x, run.target_x = run.x[:, :1].repeat(1, 2, 1, 1), run.target_x
    return attribute(run.model, "classification", run.train, run.targets, run.checkpoints, **given)


def test_an_attribution_is_one_line(found, tmp_path):
    expected = (
        f"Attribution('{tmp_path}/store': 23 training examples, 5 targets 'targets', checkpoints [0, 1, 2], {{}})"
    )
    assert repr(found) == expected.format("scores by tracin, proponents by cosine")
    assert repr(found.by("top")) == expected.format("cosine")


def test_a_target_is_shown_with_its_strongest_examples(found, run):
    text = repr(found.show(target=3, k=2, class_names=["ant", "bee", "cat"]))
    name = ["ant", "bee", "cat"]
    top, low = found.top(2), found.top(2, "opponents")
    lines = text.splitlines()
    assert f"target 3 d  label {name[run.target_y[3]]}" in lines[1]
    for line, index, score in zip(
        lines[2:], [*top.indices[3], *low.indices[3]], [*top.scores[3], *low.scores[3]], strict=True
    ):
        assert f"{score:+.4g}  {index} {PATHS[index]}  label {name[run.y[index]]}" in line
    assert repr(found.show("d", 2, class_names=name)) == text


def test_images_texts_and_numbers_are_inline(found, tmp_path):
    pytest.importorskip("PIL")
    images = np.random.default_rng(0).random((23, 6, 6))
    page = found.show([0, 1], 2, inputs=images, target_inputs=[f"<b>text</b> {row}" for row in range(5)])._repr_html_()
    assert page.count("data:image/png;base64,") == len(re.findall("images/", page)) / 2 > 4  # the name, and its alt
    assert "&lt;b&gt;text&lt;/b&gt; 1" in page
    frame = pd.DataFrame(np.arange(46.0).reshape(23, 2), columns=["age", "income"])
    page = found.show(2, 1, inputs=frame)._repr_html_()
    (index,) = found.top(1).indices[2]
    assert f"age {2 * index}\nincome {2 * index + 1}" in page


def test_a_notebook_shows_a_few_targets_and_computes_nothing_large(found, monkeypatch):
    assert found._repr_html_().count("proponents</th>") == 3
    monkeypatch.setattr("tracer.api.display._FREE_SCORES", 10)
    assert "proponents</th>" not in found._repr_html_()


def test_an_opened_store_is_shown_without_inputs(found, tmp_path):
    page = Attribution(Tracer.open(tmp_path / "store"), "targets")._repr_html_()
    assert "images/" in page
    assert "<img" not in page


def test_a_loader_is_not_iterated_for_a_notebook(run, tmp_path):
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*run.train), batch_size=8)
    data = IteratedSource(list(loader), "train")
    found = attribute(
        run.model, "classification", data, run.targets, run.checkpoints, save_dir=tmp_path / "store", proj_dim=8
    )
    assert "proponents</th>" not in found._repr_html_()
    assert "proponents</th>" in found.show()._repr_html_()


def test_an_unknown_target_is_refused(found):
    with pytest.raises(InputError, match="there is no target 5; expected an index from 0 to 4, or an id"):
        found.show(5)
    with pytest.raises(InputError, match="there is no target with the id 'e1'; did you mean 'e'"):
        found.show("e1")


def test_data_frames_of_an_attribution(found, run):
    table = found.to_pandas(2)
    assert len(table) == 2 * 2 * 5
    row = table[(table.target == 4) & (table.kind == "opponent") & (table["rank"] == 2)].iloc[0]
    low = found.top(2, "opponents")
    assert (row.train_index, row.score) == (low.indices[4, 1], low.scores[4, 1])
    assert (row.target_id, row.train_id) == ("e", PATHS[row.train_index])
    assert (row.target_label, row.train_label) == (run.target_y[4], run.y[row.train_index])


def test_data_frames_of_a_top_k():
    top = TopK(np.array([[3, 1]]), np.array([[0.5, 0.25]], np.float32), np.array([["d", "b"]], object), ["t"])
    table = top.to_pandas()
    assert table.to_dict("list") == {
        "target": [0, 0], "target_id": ["t", "t"], "rank": [1, 2], "train_index": [3, 1], "train_id": ["d", "b"],
        "score": [0.5, 0.25],
    }  # fmt: skip
    assert repr(top) == "TopK(1 targets, 2 training examples each)"
    assert "<td>t</td><td>d: 0.5</td>" in top._repr_html_()
    assert list(TopK(top.indices, top.scores).to_pandas()) == ["target", "rank", "train_index", "score"]


def test_data_frames_of_retrained_models_and_metrics():
    rng = np.random.default_rng(0)
    truth = Retrained(rng.random((6, 9)) < 0.5, (0, 1), rng.random((6, 2, 4)), rng.random((6, 2, 4)))
    assert repr(truth) == "Retrained(6 subsets of 9 examples, 2 seeds, 4 targets)"
    table = truth.to_pandas()
    assert table.output.to_numpy().reshape(6, 4) == pytest.approx(truth.outputs)
    assert table[table.subset == 2].examples.unique().tolist() == [truth.masks[2].sum()]
    assert truth._repr_html_().count("<tr>") == 6
    found = metrics.lds(rng.random((9, 4)), truth.masks, truth.outputs)
    assert found.to_pandas().per_target.to_numpy() == pytest.approx(found.per_target)
    assert "<td>per_target</td>" in found._repr_html_()
    detection = metrics.mislabel_detection(rng.random(9), np.arange(9) < 2)
    assert detection.to_pandas().curve.to_numpy() == pytest.approx(detection.curve)


def test_without_pandas_an_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pandas", None)
    with pytest.raises(__import__("tracer").MissingDependencyError, match="pip install pandas"):
        TopK(np.array([[0]]), np.array([[1.0]])).to_pandas()


def test_a_model_without_targets_yet_has_a_line(tmp_path):
    model = nn.Linear(2, 2)
    x, y = torch.randn(4, 2), torch.tensor([0, 1, 0, 1])
    found = attribute(model, "classification", (x, y), None, [(model.state_dict(), 0.1)], save_dir=tmp_path, proj_dim=8)
    assert "0 targets" in found._repr_html_()

"""A store without its model: answers, filters, and what is said when the disk or the store is not as it should be."""

from __future__ import annotations

import os
import shutil

import numpy as np
import pytest
import torch
from torch import nn

from tracer import Attribution, CallOrderError, InputError, InputTypeError, StoreError, Tracer, attribute
from tracer.api.store_reader import StoreReader


@pytest.fixture
def found(run, tmp_path) -> Attribution:
    task = "image_classification"
    return attribute(run.model, task, run.train, run.targets, run.checkpoints, save_dir=tmp_path / "run", proj_dim=64)


def test_a_reader_answers_as_the_tracer_does(found):
    reader = Tracer.open(found.tracer.store.path)
    assert type(reader) is StoreReader and reader.train_set_size == 23
    np.testing.assert_array_equal(reader.finalize_scores("targets"), found.scores)
    for kind in ("proponents", "opponents"):
        np.testing.assert_array_equal(reader.top("targets", 4, kind).indices, found.by("scores").top(4, kind).indices)
    np.testing.assert_array_equal(reader.self_influence(), found.self_influence())
    assert reader.remaining(0).tolist() == [] and reader.remaining(1, "targets").tolist() == []
    with pytest.raises(StoreError, match="holds no store"):
        Tracer.open(found.tracer.store.path / "nowhere")


def test_a_report_needs_no_model(found, run, tmp_path):
    pytest.importorskip("matplotlib")
    whole = Attribution(Tracer.open(found.tracer.store.path), "targets")
    page = whole.report(tmp_path / "report", labels=run.y, target_labels=run.target_y)
    assert page.exists()
    np.testing.assert_array_equal(whole.scores, found.scores)


def test_float16_scores_are_near_and_take_half(found):
    whole = np.array(found.scores)
    reader = Tracer.open(found.tracer.store.path)
    half = reader.finalize_scores("targets", dtype="float16")
    assert half.dtype == np.float32 and half.shape == whole.shape
    assert (np.abs(half - whole) <= np.abs(whole).max(1, keepdims=True) * 2.0**-10).all()
    np.testing.assert_array_equal(np.asarray(reader.finalize_scores("targets")), np.asarray(half))  # as they are
    np.testing.assert_array_equal(reader.finalize_scores("targets", dtype="float32"), whole)
    with pytest.raises(InputError, match="dtype is 'float64': expected one of"):
        reader.finalize_scores("targets", dtype="float64")


@pytest.mark.parametrize("labels", [1, [0, 2], np.array([2])])
def test_labels_choose_train_rows(found, run, labels):
    wanted = np.isin(run.y.numpy(), labels)
    scores = np.where(wanted[:, None], found.scores, -np.inf)
    top = found.tracer.top("targets", 3, labels=labels)
    np.testing.assert_array_equal(top.indices, np.argsort(-scores, axis=0)[:3].T)
    both = found.tracer.top("targets", 1, labels=labels, rows=range(12, 23))
    assert wanted[both.indices].all() and both.indices.min() >= 12
    queried = found.tracer.query(run.targets, 3, labels=labels)
    np.testing.assert_array_equal(queried.indices, top.indices)


def test_labels_that_choose_nothing_are_refused(found, run, tmp_path):
    with pytest.raises(InputError, match=r"no training example has them; the store knows \[0, 1, 2\]"):
        found.tracer.top("targets", 1, labels=7)
    with pytest.raises(InputTypeError, match="expected a class index"):
        found.tracer.top("targets", 1, labels="cat")
    with pytest.raises(InputError, match="more than the .* training examples that were chosen"):
        found.tracer.top("targets", 20, labels=1)
    x = torch.randn(9, 4)
    regression = attribute(
        nn.Linear(4, 1),
        "regression",
        (x, x[:, :1]),
        (x, x[:, :1]),
        [nn.Linear(4, 1).state_dict()],
        save_dir=tmp_path / "regression",
    )
    with pytest.raises(InputError, match="the store knows no labels"):
        regression.tracer.top("targets", 1, labels=0)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_that_cannot_be_written_is_named(found):
    os.chmod(found.tracer.store.path, 0o500)
    try:
        with pytest.raises(StoreError, match="Give this user the right to write there"):
            Tracer.open(found.tracer.store.path).finalize_scores("targets")
    finally:
        os.chmod(found.tracer.store.path, 0o700)


def test_errors_of_the_system_say_what_to_do(found, monkeypatch):
    def refused(*_, **__):
        raise PermissionError(13, "Permission denied")

    reader = Tracer.open(found.tracer.store.path)
    with monkeypatch.context() as patch:
        patch.setattr("tracer._core.files.os.link", refused)
        patch.setattr("pathlib.Path.replace", refused)
        with pytest.raises(StoreError, match="Permission denied.*Give this user the right to write there"):
            reader.finalize_scores("targets")
    assert reader.finalize_scores("targets").shape == (23, 5)


def test_a_store_that_is_removed_underneath_is_named_and_nothing_is_done(run, tmp_path):
    tracing = Tracer(run.model, "image_classification", 23, tmp_path / "run", proj_dim=16)
    tracing.load_checkpoint(run.checkpoints[0][0], 0)
    tracing.featurize((run.x[:5], run.y[:5]), num_samples=5)
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(StoreError, match="removed|No such file"):
        tracing.flush()
    assert not (tmp_path / "run").exists()
    with pytest.raises(CallOrderError, match="no checkpoint 0"):
        Tracer(run.model, "image_classification", 23, tmp_path / "run", proj_dim=16).store.checkpoint(0)

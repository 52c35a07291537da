"""``tracer retrain`` and ``tracer lds``: the oracle is the library."""

from __future__ import annotations

import numpy as np
import pytest
from cli_cases import MODULE, NUM_TARGETS, NUM_TRAIN, enter, make_project, printed_json, refused, run_tracer

from tracer import Tracer
from tracer.metrics import lds
from tracer.retraining import Recipe, random_subsets, retrain


@pytest.fixture
def project(tmp_path, monkeypatch):
    enter(tmp_path, monkeypatch)
    return make_project(tmp_path)


def trained(module, masks, **how):
    given = module.build_model, "image_classification", module.train_set(), module.test_set(), masks
    return retrain(*given, **how)


def test_the_truth_is_that_of_the_library_and_grades_scores(project):
    recipe = ["--learning-rate", "0.3", "--epochs", "2", "--batch-size", "8"]
    printed = printed_json("retrain", "tracer.toml", "truth.npz", "--subsets", "6", "--seeds", "0,2", *recipe)
    assert (printed["subsets"], printed["targets"]) == (6, NUM_TARGETS)
    module, masks = __import__(MODULE), random_subsets(6, NUM_TRAIN)
    wanted = trained(module, masks, recipe=Recipe(learning_rate=0.3, epochs=2, batch_size=8), seeds=(0, 2))
    with np.load("truth.npz") as truth:
        np.testing.assert_array_equal(truth["masks"], masks)
        np.testing.assert_allclose(truth["outputs"], wanted.outputs, rtol=1e-6)
        np.testing.assert_allclose(truth["losses"], wanted.losses, rtol=1e-6)
    assert run_tracer("run", "tracer.toml").exit_code == 0
    found = printed_json("lds", "store", "truth.npz", "--estimators", "tracin,cosine", "--plot", "lds.png")[
        "estimators"
    ]
    for estimator in ("tracin", "cosine"):
        expected = lds(Tracer.open("store").finalize_scores("targets", estimator), masks, wanted.outputs)
        assert found[estimator]["lds"] == pytest.approx(expected.mean, abs=1e-6)
        assert found[estimator]["interval"] == pytest.approx(expected.interval, abs=1e-6)
    assert (project / "lds.png").read_bytes().startswith(b"\x89PNG")
    assert "LDS" in run_tracer("lds", "store", "truth.npz").output


def test_a_loop_of_ones_own_trains(project):
    assert (
        run_tracer("retrain", "tracer.toml", "own.npz", "--subsets", "2", "--train-fn", f"{MODULE}:fit").exit_code == 0
    )
    assert (project / "own.npz").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["retrain", "tracer.toml", "truth.txt"], "ends in .npz"),
        (["retrain", "none.toml", "truth.npz"], "There is no file"),
        (["lds", "store", "tracer.toml"], "cannot be read as a .npz"),
        (["lds", "store", "tracer.toml", "--estimators", "tracn"], "expected some of tracin"),
    ],
)
def test_what_cannot_be_read_is_refused(project, arguments, message):
    assert message in refused(*arguments)

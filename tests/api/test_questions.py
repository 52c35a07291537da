"""The estimators of an attribution's questions: of none that is named, of ``auto``, and of one that is."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from tracer import Attribution, InputError, attribute
from tracer.api.questions import Estimators


@pytest.fixture
def ask(run, tmp_path):
    def attributed(**options):
        data = (run.x, run.y), (run.x[:4], run.y[:4])
        given = {"save_dir": tmp_path / "store", "proj_dim": 64, **options}
        return attribute(run.model, "image_classification", *data, run.checkpoints, **given)

    return attributed


def manifest(storage="float16", **settings):
    features = SimpleNamespace(name=storage, is_binary=storage == "binary", stores_features=storage != "none")
    return SimpleNamespace(feature_storage=features, settings=settings, is_collected=False)


def test_scores_are_those_of_tracin_and_proponents_those_of_cosine_by_default(ask):
    found = ask()
    reader = found.tracer
    assert np.array_equal(found.scores, reader.finalize_scores("targets", "tracin"))
    assert np.array_equal(found.top(3).indices, reader.top("targets", 3, estimator="cosine").indices)
    assert np.array_equal(found.self_influence(), reader.self_influence())
    assert "scores by tracin, proponents by cosine" in repr(found)


def test_a_named_estimator_answers_every_question(ask):
    found = ask(estimator="influence")
    assert found.estimators == Estimators("influence", "influence", "influence")
    assert np.array_equal(found.top(3).scores, found.tracer.top("targets", 3, estimator="influence").scores)
    assert np.array_equal(found.top(9).scores, -np.sort(-np.asarray(found.scores).T, axis=1)[:, :9])


def test_auto_scores_by_influence_with_the_curvature_of_all_outputs(ask, caplog):
    caplog.set_level("INFO", "tracer")
    found = ask(estimator="auto")
    assert "estimator='auto': scores by influence, proponents by cosine, since" in caplog.text
    assert np.array_equal(found.scores, ask(estimator="influence", save_dir=found.tracer.store.path).scores)
    assert not any("curvature of f alone" in record.message for record in caplog.records)
    assert np.array_equal(found.self_influence(), found.tracer.self_influence(estimator="influence"))


@pytest.mark.parametrize(
    ("store", "scores", "reason"),
    [
        (manifest(), "influence", "Newton step"),
        (manifest("int8", preconditioner="adam"), "influence", "Newton step"),
        (manifest(preconditioner="ekfac"), "tracin", "whitened by ekfac"),
        (manifest("binary"), "tracin", "storage='binary'"),
        (manifest("none"), "tracin", "storage='none'"),
        (manifest(shared_projection=True), "source", "share a projection"),
    ],
)
def test_auto_chooses_by_what_the_store_holds_and_says_why(store, scores, reason):
    chosen = Estimators.of("auto", store)
    assert (chosen.scores, chosen.top) == (scores, "cosine")
    assert reason in chosen.reason


def test_auto_needs_no_features_of_exact_gradients(ask):
    found = ask(estimator="auto", projector="none")
    assert found.tracer.store.manifest.storage == "none"
    assert np.array_equal(found.scores, found.tracer.finalize_scores("targets", "tracin"))


def test_a_given_regularization_is_that_of_the_scores_of_auto(ask):
    found = ask(estimator="auto", regularization=0.5)
    assert np.array_equal(found.scores, found.tracer.finalize_scores("targets", "influence", regularization=0.5))
    assert np.array_equal(found.top(2).indices, found.tracer.top("targets", 2, estimator="cosine").indices)
    with pytest.raises(InputError, match="no kernel to regularize"):
        ask(regularization=0.5)


def test_groups_of_training_examples_are_ranked_by_sums_of_scores(ask, run):
    found = ask()
    groups = np.arange(len(run.x)) % 3
    sums = np.stack([np.asarray(found.scores, np.float64)[groups == each].sum(0) for each in range(3)])
    assert np.array_equal(found.top(3, train_groups=groups).indices, np.argsort(-sums, axis=0).T)


def test_an_unknown_estimator_is_refused_with_the_nearest(ask, run, tmp_path):
    with pytest.raises(InputError, match="did you mean 'influence'"):
        ask(estimator="influenze")
    assert not list(tmp_path.iterdir())
    with pytest.raises(InputError, match="did you mean 'auto'"):
        _ = Attribution(ask().tracer, "targets", "aut").scores


def test_a_regularization_without_an_estimator_is_refused(ask):
    found = Attribution(ask().tracer, "targets", regularization=0.5)
    for question in (lambda: found.scores, lambda: found.top(3), found.self_influence):
        with pytest.raises(InputError, match="no kernel to regularize"):
            question()


def test_labels_are_ranked_by_self_influence_of_tracin_if_scores_are_cosines(ask):
    for name in ("cosine", "trackstar"):
        found = ask(estimator=name)
        with pytest.raises(InputError, match="1"):
            found.self_influence()
        assert np.array_equal(found.by("self_influence").self_influence(), found.tracer.self_influence())

"""The settings: one definition for signature, docstring and manifest; and the store as a context manager."""

from __future__ import annotations

import inspect
import typing
from dataclasses import FrozenInstanceError, fields

import numpy as np
import pytest
import torch
from store_cases import stored_features
from tracer_cases import build, featurize

from tracer import InputError, InputTypeError, MismatchError, Tracer, attribute
from tracer.api.settings import FeatureOptions, FeatureSettings
from tracer.api.store_reader import StoreReader


def test_the_options_that_editors_complete_are_the_fields_of_the_settings():
    hints = typing.get_type_hints(FeatureSettings)
    assert {"proj_dim": int, **typing.get_type_hints(FeatureOptions)} == {
        each.name: hints[each.name] for each in fields(FeatureSettings)
    }


def test_signature_and_docstring_of_the_tracer_have_every_setting():
    parameters = inspect.signature(Tracer).parameters
    for each in fields(FeatureSettings):
        assert parameters[each.name].default == each.default
        assert f"\n        {each.name}: " in Tracer.__doc__
    assert "**options" not in Tracer.__doc__


def test_attribute_has_the_same_settings_and_names_itself_in_errors(run, tmp_path):
    parameters = inspect.signature(attribute).parameters
    for each in fields(FeatureSettings):
        assert parameters[each.name].default == each.default
        assert f"\n        {each.name}: " in attribute.__doc__
    assert "**options" not in attribute.__doc__
    with pytest.raises(InputTypeError, match=r"attribute\(\) got an unexpected keyword argument 'param'; did you mean"):
        attribute(
            run.model,
            "image_classification",
            (run.x, run.y),
            (run.x, run.y),
            run.checkpoints,
            save_dir=tmp_path,
            param=1,
        )
    assert not list(tmp_path.iterdir())


def test_settings_are_frozen_and_checked():
    with pytest.raises(FrozenInstanceError):
        FeatureSettings().seed = 1
    for options, text in (
        ({"storage": "float61"}, "float16"),
        ({"gradients": "captur"}, "capture"),
        ({"projector": "sketsh"}, "sketch"),
    ):
        with pytest.raises(InputError, match=f"did you mean '{text}'"):
            FeatureSettings(**options)


@pytest.mark.parametrize("name", ["resume", "shared_projection", "check_rows", "progress"])
def test_a_text_is_no_flag(name):
    with pytest.raises(InputTypeError, match=f"{name} is 'no'; expected True or False"):
        FeatureSettings(**{name: "no"})


def test_a_model_without_shapes_and_an_unknown_task_of_targets_are_named(run, tmp_path):
    with pytest.raises(InputError, match="without a shape: 'weight', 'bias'"):
        Tracer(torch.nn.LazyLinear(3), "image_classification", 3, tmp_path)
    with pytest.raises(InputError, match="^target_task='imageclassification' is not known; did you mean"):
        Tracer(run.model, "image_classification", 3, tmp_path, target_task="imageclassification")


def test_an_unknown_setting_is_refused_with_the_nearest(run, tmp_path):
    with pytest.raises(
        InputTypeError, match=r"Tracer\(\) got an unexpected keyword argument 'storages'; did you mean 'storage'"
    ):
        build(run, tmp_path / "a", storages="float32")


def test_an_opened_store_is_a_context_manager(run, tmp_path):
    with build(run, tmp_path / "a", projector="none", storage="float32") as tracing:
        featurize(tracing, run)
        expected = tracing.self_influence()
    with Tracer.open(tmp_path / "a") as store:
        assert type(store) is StoreReader
        assert (store.self_influence() == expected).all()


@pytest.mark.parametrize("projector", ["sketch", "rademacher", "factored"])
def test_a_shared_projection_is_that_of_every_checkpoint(run, tmp_path, projector):
    (first, _), (second, _) = run.checkpoints[:2]
    options = {"projector": projector, "proj_dim": 32}

    def features(name, states, **more):
        with build(run, tmp_path / name, **options, **more) as tracing:
            featurize(tracing, run, checkpoints=[(state, 0.1) for state in states])
        table = tracing.store.checkpoint(len(states) - 1)
        return stored_features(table, 0, table.num_rows)

    alone = features("alone", [second], shared_projection=True)
    assert (features("after", [first, second], shared_projection=True) == alone).all()
    assert abs(features("own", [first, second]) - alone).max() > 0.1 * abs(alone).max()


def test_a_store_is_continued_with_the_projection_it_was_made_with(run, tmp_path):
    options = {"projector": "sketch", "proj_dim": 8}
    assert build(run, tmp_path / "a", shared_projection=True, **options).store.manifest.settings["shared_projection"]
    with pytest.raises(MismatchError, match="shared_projection: stored True, asked nothing"):
        build(run, tmp_path / "a", **options)
    assert "shared_projection" not in build(run, tmp_path / "b", **options).store.manifest.settings
    build(run, tmp_path / "c", shared_projection=True)
    build(run, tmp_path / "c")  # exact gradients are the same with and without


@pytest.mark.parametrize("projector", ["sketch", "factored"])
def test_projected_norms_are_those_of_the_stored_features_and_nothing_else_changes(run, tmp_path, projector):
    tables = {}
    for norms in ("exact", "projected"):
        options = {"projector": projector, "proj_dim": 64, "norms": norms}
        with build(run, tmp_path / norms, **options) as tracing:
            featurize(tracing, run)
        tables[norms] = tracing.store.checkpoint(0)
    exact, found = tables["exact"], tables["projected"]
    features = stored_features(found, 0, found.num_rows)
    np.testing.assert_allclose(features, stored_features(exact, 0, exact.num_rows), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found.column("gradient_norm"), np.linalg.norm(features, axis=1), rtol=1e-5)
    assert not np.allclose(found.column("gradient_norm"), exact.column("gradient_norm"), rtol=1e-3)


def test_a_store_is_continued_with_the_norms_it_was_made_with(run, tmp_path):
    options = {"projector": "sketch", "proj_dim": 64}
    build(run, tmp_path / "a", norms="projected", **options)
    with pytest.raises(MismatchError, match="norms: stored 'projected', asked nothing"):
        build(run, tmp_path / "a", **options)
    assert "norms" not in build(run, tmp_path / "b", **options).store.manifest.settings


def test_projected_norms_of_exact_gradients_are_refused():
    with pytest.raises(InputError, match="norms='projected' needs a projection"):
        FeatureSettings(norms="projected", projector="none")

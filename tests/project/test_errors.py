"""Every error: its type, what its message says, and that the work goes on afterwards."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from tracer_cases import build, featurize, score

import tracer
from tracer import Tracer, attribute


@pytest.fixture
def tracing(run, tmp_path):
    return build(run, tmp_path / "store")


@pytest.fixture
def loaded(run, tracing):
    tracing.load_checkpoint(run.checkpoints[0][0], 0, 0.3)
    return tracing


def work_goes_on(run, path):
    """The store opens again and the whole job can be done."""
    tracing = build(run, path)
    featurize(tracing, run)
    score(tracing, run)
    assert np.isfinite(tracing.finalize_scores("test")).all()


def test_every_exception_is_a_builtin_too():
    for name in tracer.__all__:
        value = getattr(tracer, name)
        if isinstance(value, type) and issubclass(value, Exception) and value is not tracer.TracerError:
            assert issubclass(value, tracer.TracerError)
            assert issubclass(value, (ValueError, TypeError, RuntimeError)), name


def test_featurize_before_load_checkpoint(run, tracing, tmp_path):
    with pytest.raises(tracer.CallOrderError, match=r"call tracer.load_checkpoint\(checkpoint"):
        tracing.featurize(run.train, num_samples=23)
    work_goes_on(run, tmp_path / "store")


def test_score_before_start_scoring(run, loaded):
    with pytest.raises(tracer.CallOrderError, match="call tracer.start_scoring_checkpoint"):
        loaded.score(run.targets, num_samples=5)


def test_featurize_while_scoring(run, tracing):
    featurize(tracing, run)
    tracing.start_scoring_checkpoint(run.checkpoints[0][0], 0, 5, "test")
    with pytest.raises(tracer.CallOrderError, match="again after scoring"):
        tracing.featurize(run.train, num_samples=23)


@pytest.mark.parametrize("given", [{}, {"inds": [0], "num_samples": 1}])
def test_both_or_neither_of_inds_and_num_samples(run, loaded, given):
    with pytest.raises(tracer.InputError, match="exactly one of inds and num_samples, got (both|neither)"):
        loaded.featurize((run.x[:1], run.y[:1]), **given)


@pytest.mark.parametrize(
    ("inds", "message"),
    [
        ([0, 23], r"\[23\], outside 0\.\.\.22"),
        ([-1, 0], r"\[-1\], outside"),
        ([3, 3], r"inds has \[3\] more than once"),
    ],
)
def test_indices_out_of_range_negative_or_repeated(run, loaded, tmp_path, inds, message):
    with pytest.raises(tracer.BatchError, match=message):
        loaded.featurize((run.x[:2], run.y[:2]), inds=inds)
    assert len(loaded.remaining(0)) == 23
    loaded.close()
    work_goes_on(run, tmp_path / "store")


@pytest.mark.parametrize("inds", [[0.5], [[0]], "ab", [True]])
def test_indices_of_another_type(run, loaded, inds):
    with pytest.raises(tracer.InputTypeError, match="list, array or tensor of integers"):
        loaded.featurize((run.x[:1], run.y[:1]), inds=inds)


@pytest.mark.parametrize(
    ("given", "error"), [({"num_samples": 0}, "num_samples is 0; expected 1 or more"), ({"inds": []}, "inds is empty")]
)
def test_no_rows(run, loaded, given, error):
    with pytest.raises(tracer.BatchError, match=error):
        loaded.featurize((run.x[:1], run.y[:1]), **given)


def test_num_samples_of_another_type(run, loaded):
    with pytest.raises(tracer.InputTypeError, match="num_samples is 'all'"):
        loaded.featurize(run.train, num_samples="all")


def test_sizes_that_disagree_with_the_batch(run, loaded):
    with pytest.raises(tracer.BatchError, match=r"batch\[0\] has 4 entries .*; expected 3, one for each example"):
        loaded.featurize((run.x[:4], run.y[:4]), num_samples=3)
    with pytest.raises(tracer.BatchError, match=r"batch\[1\] has 3 entries .*; expected 4, one for each example"):
        loaded.featurize((run.x[:4], run.y[:3]), num_samples=4)
    loaded.featurize((run.x[:4], run.y[:4]), num_samples=4)  # the cursor did not move
    assert loaded.remaining(0)[0] == 4


def test_more_rows_than_train_set_size(run, loaded):
    loaded.featurize((run.x[:20], run.y[:20]), num_samples=20)
    with pytest.raises(tracer.BatchError, match="make 24, more than train_set_size=23"):
        loaded.featurize((run.x[:4], run.y[:4]), num_samples=4)


def test_other_weights_under_a_known_model_id(run, loaded):
    with pytest.raises(tracer.MismatchError, match="other weights under model_id=0"):
        loaded.load_checkpoint(run.checkpoints[1][0], 0, 0.2)
    loaded.featurize(run.train, num_samples=23)
    loaded.finalize_features()
    with pytest.raises(tracer.MismatchError, match="other weights under model_id=0"):
        loaded.start_scoring_checkpoint(run.checkpoints[1][0], 0, 5, "test")


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"proj_dim": 32}, "projector.proj_dim: stored 16, asked 32"),
        ({"seed": 1}, "projector.seed: stored 0, asked 1"),
        ({"projector": "rademacher"}, "projector.kind: stored 'sketch', asked 'rademacher'"),
        ({"task": "text_classification"}, "task.name: stored 'image_classification', asked 'text_classification'"),
        ({"params": "6.*"}, "params"),
        ({"storage": "float16"}, "storage: stored 'float32', asked 'float16'"),
    ],
)
def test_other_settings_than_the_store_s(run, tmp_path, options, line):
    first = build(run, tmp_path / "store", projector="sketch", proj_dim=16)
    featurize(first, run)
    first.close()
    with pytest.raises(tracer.MismatchError) as raised:
        build(run, tmp_path / "store", **{"projector": "sketch", "proj_dim": 16, **options})
    assert line in str(raised.value)
    again = build(run, tmp_path / "store", projector="sketch", proj_dim=16)
    assert [len(again.remaining(i)) for i in range(3)] == [0, 0, 0]


def test_another_train_set_size(run, tracing, tmp_path):
    with pytest.raises(tracer.MismatchError, match=r"has 23 training rows, got train_set_size=24.*grow\(24\)"):
        Tracer(
            run.model,
            "image_classification",
            24,
            tmp_path / "store",
            projector="none",
            storage="float32",
        )


def test_row_whose_inputs_differ(run, loaded):
    loaded.featurize((run.x[:4], run.y[:4]), num_samples=4)
    changed = run.x[:6].clone()
    changed[2] += 1
    with pytest.raises(tracer.MismatchError, match=r"\b2\b"):
        loaded.featurize((changed, run.y[:6]), inds=range(6))
    with pytest.raises(tracer.MismatchError):
        loaded.featurize((run.x[:4], (run.y[:4] + 1) % 3), inds=range(4))


def test_shuffled_rows_are_an_error_at_the_second_checkpoint(run, loaded):
    loaded.featurize(run.train, num_samples=23)
    loaded.load_checkpoint(run.checkpoints[1][0], 1, 0.2)
    order = torch.arange(23).flip(0)
    with pytest.raises(tracer.MismatchError, match="checkpoints/0"):
        loaded.featurize((run.x[order], run.y[order]), num_samples=23)


def test_rows_need_not_be_checked(run, tmp_path):
    tracing = build(run, tmp_path / "augmented", check_rows=False)
    tracing.load_checkpoint(run.checkpoints[0][0], 0, 0.3)
    tracing.featurize(run.train, num_samples=23)
    tracing.load_checkpoint(run.checkpoints[1][0], 1, 0.2)
    tracing.featurize((run.x + 0.1, run.y), num_samples=23)
    tracing.finalize_features()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinite_gradients_name_their_rows(run, loaded, tmp_path, value):
    x = run.x.clone()
    x[5] = value
    with pytest.raises(tracer.NonFiniteError, match=r"rows 5 "):
        loaded.featurize((x[4:8], run.y[4:8]), inds=[4, 5, 6, 7])
    assert len(loaded.remaining(0)) == 23
    loaded.featurize((run.x[4:8], run.y[4:8]), inds=[4, 5, 6, 7])
    assert len(loaded.remaining(0)) == 19
    loaded.close()
    work_goes_on(run, tmp_path / "store")


def test_finalizing_with_rows_missing(run, loaded):
    loaded.featurize((run.x[:4], run.y[:4]), num_samples=4)
    with pytest.raises(
        tracer.IncompleteError, match=r"Checkpoint 0 lacks 19 of 23 training examples, first \[4, 5, 6, 7, 8\]"
    ):
        loaded.finalize_features()
    loaded.featurize((run.x[4:], run.y[4:]), num_samples=19)
    loaded.finalize_features()


def test_finalizing_nothing(tracing):
    with pytest.raises(tracer.CallOrderError, match="no checkpoint"):
        tracing.finalize_features()


def test_scoring_before_finalizing(run, loaded):
    with pytest.raises(tracer.CallOrderError, match=r"not finalized; call tracer.finalize_features\(\)"):
        loaded.start_scoring_checkpoint(run.checkpoints[0][0], 0, 5, "test")
    with pytest.raises(tracer.CallOrderError, match="Checkpoint 3 is not in the store, which has"):
        loaded.start_scoring_checkpoint(run.checkpoints[0][0], 3, 5, "test")
    with pytest.raises(tracer.CallOrderError, match="not finalized"):
        loaded.self_influence()


def test_targets_missing(run, tracing):
    featurize(tracing, run)
    with pytest.raises(tracer.InputError, match="the store has no targets"):
        tracing.finalize_scores("test")
    state = run.checkpoints[0][0]
    tracing.start_scoring_checkpoint(state, 0, 5, "test")
    tracing.score((run.target_x[:3], run.target_y[:3]), num_samples=3)
    for ask in (
        lambda name: tracing.finalize_scores(name, model_ids=[0]),
        lambda name: tracing.top(name, 2, model_ids=[0]),
    ):
        with pytest.raises(
            tracer.IncompleteError, match=r"2 of 5 targets 'test' are missing at checkpoint 0, first \[3"
        ):
            ask("test")
    tracing.score((run.target_x[3:], run.target_y[3:]), num_samples=2)
    with pytest.raises(tracer.IncompleteError, match=r"not scored at checkpoint 1.*checkpoints \[0\] by model_ids"):
        tracing.finalize_scores("test")
    assert tracing.finalize_scores("test", model_ids=[0]).shape == (23, 5)


def test_more_targets_than_announced(run, tracing):
    featurize(tracing, run)
    tracing.start_scoring_checkpoint(run.checkpoints[0][0], 0, 4, "test")
    with pytest.raises(tracer.BatchError, match="more than num_targets=4"):
        tracing.score(run.targets, num_samples=5)


def test_another_num_targets_for_a_known_exp_name(run, tracing):
    featurize(tracing, run)
    score(tracing, run)
    with pytest.raises(
        tracer.MismatchError,
        match="expected num_targets=5, as exp_name='test' has at checkpoint [01], got num_targets=6",
    ):
        tracing.start_scoring_checkpoint(run.checkpoints[1][0], 1, 6, "test")
    assert tracing.finalize_scores("test").shape == (23, 5)


def test_unknown_names_suggest_the_nearest(run, tracing, tmp_path):
    featurize(tracing, run)
    score(tracing, run)
    with pytest.raises(tracer.InputError, match="did you mean 'test'"):
        tracing.finalize_scores("tests")
    with pytest.raises(tracer.InputError, match="did you mean 'tracin'"):
        tracing.finalize_scores("test", "tracinn")
    with pytest.raises(tracer.InputError, match="did you mean 'proponents'"):
        tracing.top("test", 2, "proponent")
    with pytest.raises(tracer.InputError, match="did you mean 'image_classification'"):
        build(run, tmp_path / "a", task="image_clasification")
    with pytest.raises(tracer.InputError, match="did you mean 'sketch'"):
        build(run, tmp_path / "b", projector="sketsh")
    with pytest.raises(tracer.InputError, match="did you mean 'capture'"):
        build(run, tmp_path / "c", gradients="captured")
    with pytest.raises(tracer.InputError, match="float16"):
        build(run, tmp_path / "d", storage="int4")
    with pytest.raises(tracer.InputError, match="did you mean '6.weight'"):
        build(run, tmp_path / "e", params="6.weights")
    assert not any((tmp_path / name).exists() for name in "abcde")


@pytest.mark.parametrize("exp_name", ["", "../up", "a/b", ".hidden", "sp ace"])
def test_exp_names_that_are_no_safe_names(run, tracing, exp_name):
    featurize(tracing, run)
    with pytest.raises(tracer.InputError, match="exp_name"):
        tracing.start_scoring_checkpoint(run.checkpoints[0][0], 0, 5, exp_name)


@pytest.mark.parametrize("model_ids", [[7], []])
def test_unknown_checkpoints(run, tracing, model_ids):
    featurize(tracing, run)
    with pytest.raises(tracer.InputError, match=r"the store(, which)? has \[0, 1, 2\]"):
        tracing.self_influence(model_ids)
    with pytest.raises(tracer.InputError, match="more than once"):
        tracing.self_influence([0, 0])
    with pytest.raises(tracer.InputTypeError, match="model_ids is 0; expected a list"):
        tracing.self_influence(0)
    np.testing.assert_array_equal(tracing.self_influence(np.array([0, 2])), tracing.self_influence(i for i in (0, 2)))


def test_k_out_of_range(run, tracing):
    featurize(tracing, run)
    score(tracing, run)
    with pytest.raises(tracer.InputError, match="k=24 is more than train_set_size=23"):
        tracing.top("test", 24)
    with pytest.raises(tracer.InputError, match="k is 0"):
        tracing.top("test", 0)


def test_state_dicts_that_do_not_fit(run, tracing):
    state = dict(run.checkpoints[0][0])
    state["extra.weight"] = state.pop("6.weight")
    with pytest.raises(tracer.CheckpointError) as raised:
        tracing.load_checkpoint(state, 0, 0.1)
    assert "6.weight" in str(raised.value)
    assert "extra.weight" in str(raised.value)
    state = {**run.checkpoints[0][0], "6.bias": torch.zeros(7)}
    with pytest.raises(tracer.CheckpointError, match="6.bias"):
        tracing.load_checkpoint(state, 0, 0.1)
    half = {f"module.{name}" if name < "3" else name: value for name, value in run.checkpoints[0][0].items()}
    half["module.6.weight"] = half["6.weight"] + 1
    with pytest.raises(tracer.CheckpointError, match="4 keys are unexpected"):
        tracing.load_checkpoint(half, 0, 0.1)
    assert tracing.store.catalog.checkpoint_ids() == []


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_checkpoint_files_that_are_missing_truncated_or_hold_code(run, tracing, tmp_path):
    good = tmp_path / "good.pt"
    torch.save(run.checkpoints[0][0], good)
    (tmp_path / "short.pt").write_bytes(good.read_bytes()[:-200])
    (tmp_path / "short.safetensors").write_bytes(b"\x10\x00")
    (tmp_path / "bomb.pt").write_bytes(pickle.dumps({"weight": Bomb(str(tmp_path / "boom"))}))
    for name, message in [
        ("missing.pt", "missing.pt"),
        ("short.pt", "short.pt"),
        ("short.safetensors", "short.safetensors"),
        ("bomb.pt", "bomb.pt"),
    ]:
        with pytest.raises(tracer.CheckpointError, match=message) as raised:
            tracing.load_checkpoint(tmp_path / name, 0, 0.1)
        assert "weights_only=False" not in str(raised.value)
    assert not (tmp_path / "boom").exists()
    tracing.load_checkpoint(good, 0, 0.1)


def test_of_several_state_dicts_that_fit_one_is_asked_for(run, tracing):
    both = {"model": run.checkpoints[0][0], "ema": run.checkpoints[1][0], "epoch": 3}
    with pytest.raises(tracer.CheckpointError, match="checkpoint_key"):
        tracing.load_checkpoint(both, 0, 0.1)


def test_a_module_instead_of_a_state_dict(run, tracing):
    with pytest.raises(tracer.InputTypeError, match=r"state_dict\(\)"):
        tracing.load_checkpoint(run.model, 0, 0.1)


@pytest.mark.parametrize(
    ("rate", "error"),
    [
        (float("nan"), tracer.InputError),
        (-1, tracer.InputError),
        (1e300, tracer.InputError),
        ("x", tracer.InputTypeError),
    ],
)
def test_learning_rates(run, tracing, rate, error):
    with pytest.raises(error, match="learning_rate"):
        tracing.load_checkpoint(run.checkpoints[0][0], 0, rate)


@pytest.mark.parametrize(("model_id", "error"), [(-1, tracer.InputError), ("0", tracer.InputTypeError)])
def test_model_ids(run, tracing, model_id, error):
    with pytest.raises(error, match="model_id is"):
        tracing.load_checkpoint(run.checkpoints[0][0], model_id, 0.1)


def test_long_values_in_the_place_of_a_number_are_named_by_their_type(run, tracing):
    with pytest.raises(tracer.InputTypeError, match="model_id is of type OrderedDict; expected an integer"):
        tracing.start_scoring_checkpoint("quickstart", run.checkpoints[0][0], 0, 5)  # the order of TRAK's arguments


def test_save_dir_that_is_no_store(run, tmp_path):
    folder = tmp_path / "other"
    folder.mkdir()
    (folder / "thesis.tex").write_text("mine")
    with pytest.raises(tracer.StoreError, match="other"):
        build(run, folder)
    assert [path.name for path in folder.iterdir()] == ["thesis.tex"]
    with pytest.raises(tracer.StoreError):
        build(run, folder / "thesis.tex")


def test_store_of_a_newer_version(run, tracing, tmp_path):
    root = tmp_path / "store" / "zarr.json"
    document = json.loads(root.read_text())
    document["attributes"]["format_version"] = 99
    root.write_text(json.dumps(document))
    with pytest.raises(tracer.StoreError, match="99.*upgrade"):
        build(run, tmp_path / "store")


def test_resume_false_on_a_store_keeps_it(run, loaded, tmp_path):
    loaded.featurize(run.train, num_samples=23)
    loaded.close()
    with pytest.raises(tracer.TracerError, match="resume"):
        build(run, tmp_path / "store", resume=False)
    assert len(build(run, tmp_path / "store").remaining(0)) == 0


@pytest.mark.parametrize("size", [0, -3, 2.5, "10"])
def test_train_set_size(run, tmp_path, size):
    with pytest.raises(tracer.TracerError, match="train_set_size"):
        Tracer(run.model, "image_classification", size, tmp_path / "store")


@pytest.mark.parametrize("proj_dim", [0, -1, 1.5])
def test_proj_dim(run, tmp_path, proj_dim):
    with pytest.raises(tracer.TracerError, match="proj_dim"):
        build(run, tmp_path / "store", projector="sketch", proj_dim=proj_dim)


def test_devices_that_are_not_there(run, tmp_path):
    with pytest.raises(tracer.InputError, match="is no torch device"):
        build(run, tmp_path / "store", device="gpu")
    if not torch.cuda.is_available():
        with pytest.raises(tracer.InputError, match="torch sees 0 CUDA devices"):
            build(run, tmp_path / "store", device="cuda:1")


def test_models_that_cannot_be_traced(run, tmp_path):
    with pytest.raises(tracer.InputTypeError, match=r"torch\.nn\.Module"):
        Tracer(lambda x: x, "regression", 3, tmp_path / "store")
    frozen = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(tracer.InputError, match="no trainable parameter"):
        Tracer(frozen, "regression", 3, tmp_path / "store")
    model = nn.Sequential(nn.Linear(2, 2).requires_grad_(False), nn.Linear(2, 2))
    with pytest.raises(tracer.InputError, match="matches only frozen ones"):
        Tracer(model, "regression", 3, tmp_path / "store", params="0.*")
    with pytest.raises(tracer.InputTypeError, match="params is 3"):
        Tracer(model, "regression", 3, tmp_path / "store", params=3)


def test_fast_jl_absent_or_without_cuda(run, tmp_path):
    with pytest.raises(tracer.MissingDependencyError, match="fast_jl"):
        build(run, tmp_path / "store", projector="fast_jl", proj_dim=512)


def test_one_call_with_bad_arguments(run, tmp_path):
    def call(**changes):
        arguments = {
            "model": run.model,
            "task": "image_classification",
            "train": run.train,
            "targets": run.targets,
            "checkpoints": run.checkpoints,
            "save_dir": tmp_path / "store",
            **changes,
        }
        return attribute(**arguments)

    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*run.train), shuffle=True)
    with pytest.raises(tracer.InputError, match="RandomSampler"):
        call(train=loader)
    with pytest.raises(tracer.InputTypeError, match="train is a generator"):
        call(train=(batch for batch in [run.train]))
    with pytest.raises(tracer.InputError, match="targets has no examples"):
        call(targets=[])
    with pytest.raises(tracer.InputError, match="checkpoints is empty"):
        call(checkpoints=[])
    with pytest.raises(tracer.InputTypeError, match="checkpoints is a OrderedDict"):
        call(checkpoints=run.checkpoints[0][0])
    with pytest.raises(tracer.InputError, match="expected one length for all of them, got shapes"):
        call(train=(run.x, run.y[:-1]))
    with pytest.raises(tracer.InputError, match="did you mean 'cosine'"):
        call(estimator="cosin")
    with pytest.raises(tracer.InputTypeError, match=r"must be a torch.nn.Module; got function"):
        call(model=lambda: run.model)
    assert not (tmp_path / "store").exists()

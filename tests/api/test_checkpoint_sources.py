"""Equal weights under two numbers are refused: each checkpoint would count twice, or all are the last one."""

import copy

import pytest
import torch
from tracer_cases import build, featurize

from tracer import InputError, attribute


def data(run):
    return "image_classification", (run.x, run.y), (run.x[:2], run.y[:2])


def test_state_dicts_of_the_live_model_are_refused_before_anything_is_stored(run, tmp_path):
    model = copy.deepcopy(run.model)
    live = [(model.state_dict(), 0.1), (model.state_dict(), 0.1)]
    with pytest.raises(InputError, match=r"got checkpoints\[0\] and \[1\], both the same tensors.*copy them"):
        attribute(model, *data(run), live, save_dir=tmp_path / "store")
    adam = [({"model": state, "optimizer": {}}, 0.1) for state, _ in live]
    with pytest.raises(InputError, match="both the same tensors"):
        attribute(model, *data(run), adam, save_dir=tmp_path / "store", preconditioner="adam")
    assert not (tmp_path / "store").exists()


def test_one_file_twice_is_refused(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(run.model.state_dict(), "last.pt")
    for paths in (["last.pt", tmp_path / "last.pt"], [("last.pt", 0.1), ("./last.pt", 0.2)]):
        with pytest.raises(InputError, match=r"both the file .*last\.pt"):
            attribute(run.model, *data(run), paths, save_dir=tmp_path / "store")


def test_equal_weights_under_another_number_are_refused_also_by_another_process(run, tmp_path):
    tracing = build(run, tmp_path, proj_dim=16)
    featurize(tracing, run)
    (state, _), *others = run.checkpoints
    copied = {name: value.clone() for name, value in state.items()}
    assert others  # another checkpoint is none of these
    for tracer in (tracing, build(run, tmp_path, proj_dim=16)):
        with pytest.raises(InputError, match=r"other weights under model_id=9 than under model_id=0, got the same"):
            tracer.load_checkpoint(copied, model_id=9)
        tracer.load_checkpoint(copied, model_id=0)  # the same number again is none
        assert 9 not in tracer.store.catalog.checkpoint_ids()


def test_a_number_that_was_removed_may_be_used_again(run, tmp_path):
    tracing = build(run, tmp_path, proj_dim=16)
    state, rate = run.checkpoints[0]
    tracing.load_checkpoint(state, model_id=0, learning_rate=rate)
    tracing.close()
    tracing.store.catalog.checkpoint_path(0).remove()
    tracing.load_checkpoint(state, model_id=1, learning_rate=rate)
    assert tracing.store.catalog.checkpoint_ids() == [1]

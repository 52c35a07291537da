"""Equal weights under two numbers are refused: each checkpoint would count twice, or all are the last one."""

import copy
import gc
import weakref

import numpy as np
import pytest
import torch
from tracer_cases import build, featurize

from tracer import CheckpointError, InputError, attribute
from tracer.api.checkpoint_sources import check_distinct


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


def test_an_aliased_optimizer_state_and_equal_weights_with_other_moments_are_refused(run, tmp_path):
    model, options = copy.deepcopy(run.model), {"preconditioner": "adam"}
    optimizer = torch.optim.Adam(model.named_parameters())
    checkpoints = []
    for _ in range(2):
        torch.nn.functional.cross_entropy(model(run.x), run.y).backward()
        optimizer.step()
        checkpoints.append(({"model": copy.deepcopy(model.state_dict()), "optimizer": optimizer.state_dict()}, 0.1))
    with pytest.raises(InputError, match="both the same tensors"):
        attribute(model, *data(run), checkpoints, save_dir=tmp_path / "a", **options)
    own = [({**each, "optimizer": copy.deepcopy(each["optimizer"])}, rate) for each, rate in checkpoints]
    own[0][0]["optimizer"]["state"][0]["exp_avg_sq"] += 1
    attribute(model, *data(run), own, save_dir=tmp_path / "b", **options)
    own[1] = ({**own[1][0], "model": copy.deepcopy(own[0][0]["model"])}, 0.1)
    with pytest.raises(InputError, match="got the same"):
        attribute(model, *data(run), own, save_dir=tmp_path / "c", **options)


def test_checkpoints_of_an_iterator_are_loaded_one_at_a_time(run, tmp_path):
    alive = []

    class State(dict):
        """A state dict that can be referenced weakly."""

    def states():
        for state, rate in run.checkpoints:
            gc.collect()
            assert sum(each() is not None for each in alive) <= 1  # the one before, which is being replaced
            made = State({name: value.clone() for name, value in state.items()})
            alive.append(weakref.ref(made))
            yield made, rate
            del made

    for options in ({"proj_dim": 16}, {"projector": "none"}):
        alive.clear()
        folder = tmp_path / next(iter(options))
        found = attribute(run.model, *data(run), states(), save_dir=folder / "a", **options)
        listed = attribute(run.model, *data(run), run.checkpoints, save_dir=folder / "b", **options)
        assert found.model_ids == listed.model_ids and np.array_equal(found.scores, listed.scores)
    with pytest.raises(InputError, match="checkpoints is empty"):
        attribute(run.model, *data(run), iter([]), save_dir=tmp_path / "c")


def test_a_folder_is_its_checkpoints(run, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    for number, (state, _) in enumerate(run.checkpoints):
        torch.save({"epoch": number, "state": state}, tmp_path / "checkpoints" / f"epoch_{number + 9}.pt")
    found = attribute(run.model, *data(run), tmp_path / "checkpoints", save_dir=tmp_path / "a", proj_dim=16)
    states = [state for state, _ in run.checkpoints]
    listed = attribute(run.model, *data(run), states, save_dir=tmp_path / "b", proj_dim=16)
    assert np.array_equal(found.scores, listed.scores)


def test_all_headers_are_read_before_the_first_checkpoint_is_used(run, tmp_path):
    (state, rate), *_ = run.checkpoints
    for wrong in (tmp_path / "nowhere.pt", {**state, "more": torch.ones(1)}):
        with pytest.raises(CheckpointError, match="nowhere.pt does not exist|1 keys are unexpected: 'more'"):
            attribute(run.model, *data(run), [(state, rate), (wrong, rate)], save_dir=tmp_path / "store")
    assert not (tmp_path / "store").exists()


class Lazy(dict):
    """Makes each tensor when it is asked for, as safetensors files do."""

    def __getitem__(self, name):
        return super().__getitem__(name).clone()


def test_lazy_mappings_and_paths_of_any_class_are_told_apart(tmp_path):
    check_distinct([Lazy(w=torch.zeros(9)), Lazy(w=torch.ones(9))])
    check_distinct([{"w": torch.zeros(3, device="meta")}, {"w": torch.zeros(3, device="meta")}, {}, {}])
    check_distinct([{"w": torch.zeros(2, 2).to_sparse()}, {"w": torch.zeros(2, 2).to_sparse()}])

    class Named:
        def __init__(self, name):
            self.name = name

        def __fspath__(self):
            return self.name

        def __str__(self):
            return "checkpoint"

    check_distinct([Named("a.pt"), Named("b.pt")])
    with pytest.raises(InputError, match="both the file"):
        check_distinct([Named("a.pt"), "a.pt"])

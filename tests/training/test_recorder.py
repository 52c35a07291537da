"""The recorder: what it saves, of which steps, and that training goes on as if it were not there."""

from __future__ import annotations

import copy
import logging
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import small_net
from recording_cases import X, Y, backward, mlp, record, same
from safetensors.torch import load_file
from tied_model import TOKENS, Tied
from torch import nn

import tracer
from tracer import CheckpointRecorder, attribute, load_checkpoints, open_recording
from tracer._core.processes import Process
from tracer.training.fit_state import fit_state
from tracer.training.recording import Geometric


def test_every_few_steps_and_at_the_end_with_the_sums_of_rates(tmp_path):
    _, states, rates = record(tmp_path, steps=10)
    recording = open_recording(tmp_path)
    assert [one.step for one in recording.checkpoints] == [3, 6, 9, 10]
    for one, before in zip(recording.checkpoints, [0, 3, 6, 9], strict=True):
        assert same(load_file(one.path), states[one.step])
        expected = sum(rates[step] for step in range(before + 1, one.step + 1))
        assert one.learning_rate_sums == (pytest.approx(expected, rel=1e-12),)
        assert one.learning_rates == (rates[one.step],) and one.epoch == one.step / 4
    assert [one.model_id for one in recording.checkpoints] == [0, 1, 2, 3]


def test_what_load_checkpoints_gives_is_what_attribute_takes(tmp_path):
    model, states, rates = record(tmp_path / "run", steps=7)
    ours = attribute(
        model, "image_classification", (X, Y), (X[:5], Y[:5]), load_checkpoints(tmp_path / "run"),
        save_dir=tmp_path / "ours", projector="none",
    )  # fmt: skip
    by_hand = [(states[3], rates[1] + rates[2] + rates[3]), (states[6], rates[4] + rates[5] + rates[6])]
    plain = attribute(
        model, "image_classification", (X, Y), (X[:5], Y[:5]), [*by_hand, (states[7], rates[7])],
        save_dir=tmp_path / "plain", projector="none",
    )  # fmt: skip
    np.testing.assert_allclose(ours.scores, plain.scores, rtol=1e-6)


def test_scores_over_rows_estimate_by_how_much_training_lowered_the_loss(tmp_path):
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)

    def losses():
        with torch.no_grad():
            return nn.functional.cross_entropy(model(X[:5]), Y[:5], reduction="none").numpy()

    before = losses()
    with CheckpointRecorder(model, optimizer, tmp_path / "run", every=5) as recorder:
        for _ in range(40):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(X), Y).backward()
            optimizer.step()
            recorder.step()
    change = before - losses()
    found = attribute(
        model, "image_classification", (X, Y), (X[:5], Y[:5]), load_checkpoints(tmp_path / "run"),
        save_dir=tmp_path / "store", projector="none",
    )  # fmt: skip
    # The loss in question is the margin's, whose gradient is that of cross-entropy; what differs is of second order.
    np.testing.assert_allclose(found.scores.sum(0) / len(X), change, rtol=0.1, atol=0.002)


def test_training_is_bit_for_bit_what_it_is_without(tmp_path):
    def train(recorded):
        model = mlp()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        torch.manual_seed(5), random.seed(5), np.random.seed(5)
        options = {"every": 2, "second_moments": True, "max_checkpoints": 2}
        recorder = CheckpointRecorder(model, optimizer, tmp_path, **options) if recorded else None
        for step in range(9):
            loss = backward(model, step)
            optimizer.step()
            if recorder:
                recorder.step(loss)
        if recorder:
            recorder.close()
        noise = torch.rand(3), random.random(), np.random.rand()
        grads = [parameter.grad for parameter in model.parameters()]
        flags = [module.training for module in model.modules()] + [p.requires_grad for p in model.parameters()]
        return (
            model.state_dict(),
            optimizer.state_dict(),
            noise,
            grads,
            flags,
            len(optimizer._optimizer_step_post_hooks),
        )

    (weights, moments, noise, grads, flags, hooks), other = train(False), train(True)
    assert same(weights, other[0]) and flags == other[4] and hooks == other[5] == 0
    assert torch.equal(noise[0], other[2][0]) and noise[1:] == other[2][1:]
    assert all(torch.equal(one, two) for one, two in zip(grads, other[3], strict=True))
    for number, entry in moments["state"].items():
        assert same(entry, other[1]["state"][number])


@pytest.mark.parametrize("scheduler_first", [True, False])
def test_the_rate_is_that_of_the_step_whenever_the_scheduler_steps(tmp_path, scheduler_first):
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    with CheckpointRecorder(model, optimizer, tmp_path, every=1) as recorder:
        for _ in range(4):
            backward(model)
            optimizer.step()
            if scheduler_first:
                scheduler.step()
            recorder.step()
            if not scheduler_first:
                scheduler.step()
    assert [rate for _, rate in load_checkpoints(tmp_path)] == [1.0, 0.5, 0.25, 0.125]


def test_batches_without_a_step_count_for_nothing(tmp_path):
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    with CheckpointRecorder(model, optimizer, tmp_path, every=2) as recorder:
        for batch in range(12):
            backward(model, batch)
            if batch % 3 == 2:
                optimizer.step()
            recorder.step(loss=float(batch))
    assert [(one.step, one.loss) for one in open_recording(tmp_path).checkpoints] == [(2, 5.0), (4, 11.0)]
    assert [rate for _, rate in load_checkpoints(tmp_path)] == [1.0, 1.0]


def test_losses_of_batches_without_a_step_are_not_that_of_a_checkpoint(tmp_path):
    model, optimizer, recorder = _begun(tmp_path, steps=0, every=100)
    for batch in range(8):
        backward(model, batch)
        if batch % 3 == 2:
            optimizer.step()
        recorder.step(loss=float(batch), epoch=batch)
    recorder.close()
    assert [(one.loss, one.epoch) for one in open_recording(tmp_path).checkpoints] == [(5.0, 5.0)]


@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_a_grad_scaler_skips_have_no_rate(tmp_path, fused):
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, fused=fused)
    scaler = torch.amp.GradScaler("cpu")
    with CheckpointRecorder(model, optimizer, tmp_path, every=100) as recorder:
        for step in range(6):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(X), Y)
            scaler.scale(loss * (float("inf") if step in (1, 4) else 1.0)).backward()
            scaler.step(optimizer)
            scaler.update()
            recorder.step()
    (one,) = open_recording(tmp_path).checkpoints
    assert one.learning_rate_sums == (4 * 0.5,)
    assert one.step == (6 if fused else 4)  # a fused optimizer is called, and does nothing by itself


def test_a_rate_that_is_a_tensor_is_read_at_its_step(tmp_path):
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=torch.tensor(0.5))
    with CheckpointRecorder(model, optimizer, tmp_path, every=3) as recorder:
        for _ in range(3):
            backward(model)
            optimizer.step()
            optimizer.param_groups[0]["lr"].mul_(0.5)
            recorder.step()
    (one,) = open_recording(tmp_path).checkpoints
    assert one.learning_rate_sums == (0.875,) and one.learning_rates == (0.125,)


def test_steps_of_rate_zero_give_no_checkpoint(tmp_path):
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with CheckpointRecorder(model, optimizer, tmp_path, every="geometric") as recorder:
        for rate in [0.0, 0.0, 0.5, 0.5, 0.0]:
            optimizer.param_groups[0]["lr"] = rate
            backward(model)
            optimizer.step()
            recorder.step()
    assert [(one.step, *one.learning_rate_sums) for one in open_recording(tmp_path).checkpoints] == [(3, 0.5), (4, 0.5)]


def test_tied_buffers_and_odd_strides_come_back_strictly(tmp_path):
    model = nn.ModuleDict({"tied": Tied(), "net": small_net().to(memory_format=torch.channels_last)})
    model["view"] = nn.Linear(3, 5)
    model["view"].weight = nn.Parameter(torch.randn(3, 5).t())
    memory = torch.randn(6)
    model["view"].register_buffer("left", memory[:4])
    model["view"].register_buffer("right", memory[2:])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with CheckpointRecorder(model, optimizer, tmp_path, every=1) as recorder:
        model["tied"](TOKENS).sum().backward()
        optimizer.step()
        recorder.step()
    ((path, _),) = load_checkpoints(tmp_path)
    assert same(fit_state(model, load_file(path)), model.state_dict())
    assert len(load_file(path)) == len(model.state_dict()) - 1  # the tied weight once


@pytest.fixture
def _one_process():
    import torch.distributed as dist

    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("_one_process")
def test_wrappers_are_seen_through(tmp_path):
    model = mlp()
    wrapped = torch.compile(nn.parallel.DistributedDataParallel(model), backend="eager")
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    with CheckpointRecorder(wrapped, optimizer, tmp_path, every=1) as recorder:
        backward(model)
        optimizer.step()
        recorder.step()
    ((path, _),) = load_checkpoints(tmp_path)
    assert load_file(path).keys() == mlp().state_dict().keys()


@pytest.mark.usefixtures("_one_process")
def test_sharded_models_are_refused(tmp_path):
    from torch.distributed.fsdp import fully_shard

    model = mlp()
    fully_shard(model, mesh=torch.distributed.init_device_mesh("cpu", (1,)))
    with pytest.raises(tracer.InputError, match="model is sharded, and each process holds a part of it.*get_model_st"):
        CheckpointRecorder(model, torch.optim.SGD(model.parameters(), lr=0.1), tmp_path)


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    monkeypatch.setattr("tracer.training.recording.recorder.this_process", lambda: Process(1, 2, together=True))
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with CheckpointRecorder(model, optimizer, tmp_path / "run", every=1) as recorder:
        backward(model)
        optimizer.step()
        recorder.step()
        recorder.save()
    assert not (tmp_path / "run").exists() and recorder.state_dict() == {}


def test_a_compiled_optimizer_step_is_counted(tmp_path):
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    compiled = torch.compile(lambda: optimizer.step(), backend="eager")
    with CheckpointRecorder(model, optimizer, tmp_path, every=2) as recorder:
        for step in range(5):
            backward(model)
            optimizer.param_groups[0]["lr"] = 0.1 * (step + 1)
            compiled()
            recorder.step()
    assert [rate for _, rate in load_checkpoints(tmp_path)] == pytest.approx([0.3, 0.7, 0.5])


@pytest.mark.parametrize("amsgrad", [False, True])
def test_second_moments_serve_the_adam_preconditioner(tmp_path, amsgrad):
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    groups = [{"params": model[0].parameters(), "weight_decay": 0.1}, {"params": model[2].parameters()}]
    optimizer = torch.optim.AdamW(groups, lr=0.01, amsgrad=amsgrad, eps=1e-4)
    by_hand = []
    with CheckpointRecorder(model, optimizer, tmp_path / "run", every=2, second_moments=True) as recorder:
        for step in range(4):
            backward(model, step)
            optimizer.step()
            recorder.step()
            if step % 2:
                whole = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
                by_hand.append((copy.deepcopy(whole), 0.02))
    options = {"projector": "none", "preconditioner": "adam"}
    data = model, "image_classification", (X, Y), (X[:5], Y[:5])
    ours = attribute(*data, load_checkpoints(tmp_path / "run"), save_dir=tmp_path / "ours", **options)
    plain = attribute(*data, by_hand, save_dir=tmp_path / "plain", **options)
    np.testing.assert_array_equal(ours.scores, plain.scores)
    without = attribute(*data, load_checkpoints(tmp_path / "run"), save_dir=tmp_path / "w", projector="none")
    assert not np.allclose(without.scores, ours.scores)  # the same files, without the preconditioner


def test_losses_decide_where_the_schedule_says_so(tmp_path):
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with CheckpointRecorder(model, optimizer, tmp_path, every="loss") as recorder:
        for loss in [4.0] * 10 + [1.0] * 200 + [float("nan")]:
            optimizer.step()
            recorder.step(loss=torch.tensor([loss]))
    steps = [one.step for one in open_recording(tmp_path).checkpoints]
    assert 11 < steps[0] < steps[-2] < 100 and steps[-1] == 211
    assert open_recording(tmp_path).checkpoints[-1].loss is None


def test_thinning_keeps_the_sum_over_all_steps(tmp_path):
    _, states, rates = record(tmp_path, steps=50, every=1, max_checkpoints=6)
    recording = open_recording(tmp_path)
    steps = [one.step for one in recording.checkpoints]
    assert steps == [16, 32, 48, 50] and recording.stride == 16
    for one, before in zip(recording.checkpoints, [0, *steps], strict=False):
        expected = sum(rates[step] for step in range(before + 1, one.step + 1))
        assert one.learning_rate_sums == (pytest.approx(expected, rel=1e-12),)
        assert same(load_file(one.path), states[one.step])
    assert len(list(tmp_path.glob("*.safetensors"))) == 4


def test_a_budget_of_one_keeps_the_last_state(tmp_path):
    _, _, rates = record(tmp_path, steps=7, every=2, max_checkpoints=1)
    assert [one.step for one in open_recording(tmp_path).checkpoints] == [7]
    assert load_checkpoints(tmp_path)[0][1] == pytest.approx(sum(rates.values()))


def test_a_step_of_an_added_group_is_recorded(tmp_path):
    model = mlp()
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1)
    with CheckpointRecorder(model, optimizer, tmp_path, every=1) as recorder:
        for group in ({"params": model[4].parameters(), "lr": 0.3}, None):
            backward(model)
            optimizer.step()
            recorder.step()
            if group:
                optimizer.add_param_group(group)
    assert [rate for _, rate in load_checkpoints(tmp_path, group=1)] == [0.0, 0.3]
    assert open_recording(tmp_path).groups == [["0.weight", "0.bias"], ["4.weight", "4.bias"]]


def test_an_error_in_the_block_stops_without_saving(tmp_path):
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ZeroDivisionError), CheckpointRecorder(model, optimizer, tmp_path, every=2) as recorder:
        for step in range(3):
            optimizer.step()
            recorder.step()
            1 / (2 - step)
    assert [one.step for one in open_recording(tmp_path).checkpoints] == [2]
    assert not optimizer._optimizer_step_post_hooks


def test_weights_that_were_loaded_after_the_last_step_are_not_saved(tmp_path, caplog):
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = CheckpointRecorder(model, optimizer, tmp_path, every=2)
    for _ in range(3):
        backward(model)
        optimizer.step()
        recorder.step()
    model.load_state_dict(mlp().state_dict())
    with caplog.at_level(logging.WARNING, "tracer"):
        recorder.close()
    assert "the last state is not saved, since weights were changed after step 3" in caplog.text
    assert [one.step for one in open_recording(tmp_path).checkpoints] == [2]


def test_an_optimizer_that_never_steps_is_told(tmp_path, caplog):
    model = mlp()
    with (
        caplog.at_level(logging.WARNING, "tracer"),
        CheckpointRecorder(model, torch.optim.SGD(model.parameters(), lr=0.1), tmp_path) as recorder,
    ):
        recorder.step()
    assert "nothing was recorded, since the optimizer that the recorder got never stepped" in caplog.text


def test_a_closed_recorder_records_nothing(tmp_path):
    model, optimizer, recorder = _begun(tmp_path)
    recorder.close()
    recorder.close()
    with pytest.raises(tracer.CallOrderError, match=r"recorder\.step came after recorder\.close; make another one"):
        recorder.step()
    with pytest.raises(tracer.CallOrderError, match=r"recorder\.save came after recorder\.close; make another one"):
        recorder.save()


def _begun(directory, model=None, steps=2, **options):
    model = mlp() if model is None else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = CheckpointRecorder(model, optimizer, directory, **{"every": 1, **options})
    for step in range(steps):
        backward(model, step)
        optimizer.step()
        recorder.step()
    return model, optimizer, recorder


def test_wrong_arguments_say_what_was_expected(tmp_path):
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def refuse(kind, match, model=model, optimizer=optimizer, directory=tmp_path, **options):
        with pytest.raises(kind, match=match):
            CheckpointRecorder(model, optimizer, directory, **options)

    refuse(tracer.InputTypeError, "model must be a torch.nn.Module; got int", model=3)
    refuse(tracer.InputTypeError, "optimizer must be a torch.optim.Optimizer; got list", optimizer=[])
    refuse(tracer.InputError, "optimizer holds none of the model's parameters", model=mlp())
    refuse(tracer.InputError, "second_moments=True came with SGD, which keeps none", second_moments=True)
    refuse(tracer.InputError, "every='geometrical' is not known; did you mean 'geometric'", every="geometrical")
    refuse(tracer.InputTypeError, "every is 2.5; expected a number of steps", every=2.5)
    refuse(tracer.InputError, "every is 0; expected 1 or more", every=0)
    refuse(tracer.InputError, "max_checkpoints is 0; expected 1 or more", max_checkpoints=0)
    refuse(tracer.InputTypeError, "resume is 'yes'; expected True, False, or what", resume="yes")
    optimizer.param_groups[0]["lr"] = None
    refuse(tracer.InputError, "optimizer has no learning rates .SGD sets its steps itself.")
    lazy = nn.Sequential(nn.LazyLinear(2))
    optimizer = torch.optim.SGD(lazy.parameters(), lr=0.1)
    refuse(tracer.InputError, "model has parameters without a shape.*run one forward", lazy, optimizer)
    (tmp_path / "file").touch()
    fine = torch.optim.SGD(model.parameters(), lr=0.1)
    refuse(tracer.StoreError, "file cannot be made .*: choose another", model, fine, tmp_path / "file")


def test_wrong_losses_say_what_was_expected(tmp_path):
    model, optimizer, recorder = _begun(tmp_path, every="loss", steps=0)
    optimizer.step()
    with pytest.raises(tracer.InputError, match="every='loss' needs the loss of each step"):
        recorder.step()
    with pytest.raises(tracer.InputError, match=r"loss has shape \[2\]; expected one number"):
        recorder.step(loss=torch.ones(2))
    recorder.close(save=False)


def test_an_adam_without_second_moments_is_told(tmp_path):
    model = mlp()
    optimizer = torch.optim.Adamax(model.parameters())
    recorder = CheckpointRecorder(model, optimizer, tmp_path, every=1, second_moments=True)
    backward(model)
    optimizer.step()
    with pytest.raises(tracer.CheckpointError, match="came with Adamax, whose state has no second moments"):
        recorder.step()


def test_a_disk_that_is_full_for_a_while_costs_one_checkpoint(tmp_path, monkeypatch):
    model, optimizer, recorder = _begun(tmp_path)

    def full(self, path):
        raise OSError(28, "No space left on device")

    backward(model)
    optimizer.step()
    with monkeypatch.context() as patch, pytest.raises(tracer.StoreError, match="No space left.*close.save=False"):
        patch.setattr(Path, "replace", full)
        recorder.step()
    assert [one.step for one in open_recording(tmp_path).checkpoints] == [1, 2]
    backward(model)
    optimizer.step()
    recorder.step()
    assert [rate for _, rate in load_checkpoints(tmp_path)] == pytest.approx([0.1, 0.1, 0.2])


@pytest.mark.parametrize("operation", ["replace", "unlink"])
def test_a_crash_at_any_moment_leaves_a_whole_recording(tmp_path, monkeypatch, operation):
    class Crash(BaseException):
        pass

    for moment in range(1, 17):
        directory = tmp_path / f"{moment}"
        model = nn.Linear(4, 3)
        optimizer = torch.optim.Adam(model.parameters())
        left, original, states = moment, getattr(Path, operation), {}

        def call(self, *arguments, original=original, **options):
            nonlocal left
            left -= 1
            if left == 0:
                raise Crash
            return original(self, *arguments, **options)

        with monkeypatch.context() as patch:
            patch.setattr(Path, operation, call)
            options = {"every": 1, "max_checkpoints": 3, "second_moments": True}
            with pytest.raises(Crash), CheckpointRecorder(model, optimizer, directory, **options) as recorder:
                for step in range(1, 30):
                    backward(model, step)
                    optimizer.step()
                    states[step] = copy.deepcopy(model.state_dict())
                    recorder.step()
        if (directory / "recording.json").exists():
            for one in open_recording(directory).checkpoints:
                assert same(load_file(one.path), states[one.step]) and all(path.exists() for path in one.files)
            assert not open_recording(directory).checkpoints or load_checkpoints(directory)


def test_a_killed_process_leaves_a_whole_recording(tmp_path):
    code = """
        import sys, torch
        from tracer import CheckpointRecorder
        model = torch.nn.Linear(300, 300)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        recorder = CheckpointRecorder(model, optimizer, sys.argv[1], every=1, max_checkpoints=4)
        while True:
            model(torch.ones(300)).sum().backward()
            optimizer.step()
            recorder.step()
    """
    child = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code), str(tmp_path)])
    try:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob("step_*.safetensors")) and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.3)
        assert child.poll() is None
    finally:
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
    recording = open_recording(tmp_path)
    found = load_checkpoints(tmp_path)
    assert sum(rate for _, rate in found) == 0.5 * recording.checkpoints[-1].step
    assert all(load_file(path)["weight"].shape == (300, 300) for path, _ in found)


def test_a_schedule_of_ones_own_settings(tmp_path):
    record(tmp_path, steps=20, every=Geometric(3.0))
    assert [one.step for one in open_recording(tmp_path).checkpoints] == [1, 3, 9, 20]


def test_a_step_that_calls_that_of_its_parent_is_counted_once(tmp_path):
    class MyAdam(torch.optim.Adam):
        def step(self, closure=None):
            return super().step(closure)

    torch.optim.Adam(mlp().parameters())  # torch gives the parent's step hooks when one is made
    record(tmp_path, steps=4, every=2, make=lambda model: MyAdam(model.parameters(), lr=0.1))
    assert [one.step for one in open_recording(tmp_path).checkpoints] == [2, 4]


def test_weights_that_were_swapped_and_restored_are_saved(tmp_path):
    model, _, recorder = _begun(tmp_path, steps=3, every=2)
    own = copy.deepcopy(model.state_dict())
    model.load_state_dict(mlp().state_dict())
    model.load_state_dict(own)
    recorder.close()
    assert [one.step for one in open_recording(tmp_path).checkpoints] == [2, 3]


def test_lbfgs_is_refused(tmp_path):
    model = mlp()
    with pytest.raises(tracer.InputError, match="optimizer is LBFGS, whose step is not its learning rate times"):
        CheckpointRecorder(model, torch.optim.LBFGS(model.parameters()), tmp_path)


@pytest.mark.parametrize(
    ("options", "factors"),
    [
        ({"momentum": 0.9}, (10, 10)),
        ({"momentum": 0.5, "dampening": 0.5}, (1, 1)),
        ({"momentum": 0.5, "nesterov": True}, (2, 2)),
        ({"momentum": 0.5, "changes": 0.75}, (2, 4)),  # as OneCycleLR does
        ({}, (1, 1)),
    ],
)
def test_sums_are_over_one_minus_momentum(tmp_path, options, factors):
    changes = options.pop("changes", None)
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, **options)
    with CheckpointRecorder(model, optimizer, tmp_path, every=2) as recorder:
        for step in range(4):
            if step == 2 and changes is not None:
                optimizer.param_groups[0]["momentum"] = changes
            backward(model, step)
            optimizer.step()
            recorder.step()
    assert [rate for _, rate in load_checkpoints(tmp_path)] == pytest.approx([0.2 * factor for factor in factors])
    assert [rate for _, rate in load_checkpoints(tmp_path, "last")] == pytest.approx([0.1, 0.1])


def test_a_gradient_moves_weights_by_the_recorded_sum_in_the_end(tmp_path):
    weight = torch.nn.Linear(1, 1, bias=False)
    optimizer = torch.optim.SGD(weight.parameters(), lr=0.1, momentum=0.8, dampening=0.3)
    before = weight.weight.item()
    with CheckpointRecorder(weight, optimizer, tmp_path, every=1) as recorder:
        for step in range(200):
            weight.weight.grad = torch.full((1, 1), float(step == 1))  # torch does not dampen the very first
            optimizer.step()
            recorder.step()
    assert before - weight.weight.item() == pytest.approx(load_checkpoints(tmp_path)[1][1], rel=1e-5)

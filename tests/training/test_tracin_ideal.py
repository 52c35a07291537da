"""TracInIdeal: measured without touching the training, complete, and what TracInCP becomes for small steps."""

from __future__ import annotations

import copy
import re

import numpy as np
import pytest
import torch
from conftest import small_net
from torch import nn

import tracer
from tracer import attribute
from tracer.training.tracin_ideal import IdealRecorder
from tracer.training.tracin_ideal_record import read_ideal


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def data(size, seed, *shape, num_classes=3):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, *(shape or (4,)), generator=generator, dtype=torch.float32 if shape else torch.float64)
    return x, torch.randint(0, num_classes, (size,), generator=generator)


TRAIN, TARGETS = data(12, 1), data(5, 2)


def losses_of(model, rows=TARGETS):
    model = copy.deepcopy(model).eval()
    with torch.no_grad():
        return nn.functional.cross_entropy(model(rows[0]), rows[1], reduction="none").double().numpy()


def step(model, optimizer, inds, rows=TRAIN):
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(rows[0][inds]), rows[1][inds]).backward()
    optimizer.step()


def record(batches, lr=0.1, recorder=None, model=None):
    """Train on the batches, recorded; and the losses before the first step and after each by a plain loop."""
    model = mlp() if model is None else model
    recorder = IdealRecorder(model, "image_classification", TARGETS, 12) if recorder is None else recorder
    optimizer = torch.optim.SGD(model.parameters(), lr)
    losses = [losses_of(model)]
    for inds in batches:
        with recorder.step(inds):
            step(model, optimizer, inds)
        losses.append(losses_of(model))
    return recorder, np.stack(losses)


BATCHES = [[0, 3, 5], [1], [2, 0], [7, 8, 9, 10]]


def test_each_step_is_the_loss_before_minus_the_loss_after():
    recorder, losses = record(BATCHES)
    assert recorder.loss_changes.shape == (4, 5) and recorder.loss_changes.dtype == np.float64
    np.testing.assert_allclose(recorder.loss_changes, losses[:-1] - losses[1:], rtol=0, atol=1e-12)
    assert [rows.tolist() for rows in recorder.rows] == BATCHES


def test_the_sum_over_rows_is_the_whole_change():
    recorder, losses = record(BATCHES)
    np.testing.assert_allclose(recorder.influence().sum(0), losses[0] - losses[-1], rtol=0, atol=1e-12)


def test_rows_of_a_step_share_its_change_equally():
    recorder, losses = record(BATCHES)
    change = losses[:-1] - losses[1:]
    found = recorder.influence()
    np.testing.assert_allclose(found[0], change[0] / 3 + change[2] / 2, rtol=0, atol=1e-12)
    np.testing.assert_allclose(found[1], change[1], rtol=0, atol=1e-12)
    assert not found[[4, 6, 11]].any() and found.shape == (12, 5)


def test_rows_of_a_step_share_its_change_as_told():
    recorder, losses = record(BATCHES)
    shares = [np.array([0.5, 0.5, 0.0]), [1.0], [2.0, -1.0], np.full(4, 0.25)]
    found, change = recorder.influence(shares), losses[:-1] - losses[1:]
    np.testing.assert_allclose(found[0], 0.5 * change[0] - change[2], rtol=0, atol=1e-12)
    np.testing.assert_allclose(found.sum(0), losses[0] - losses[-1], rtol=0, atol=1e-12)


def test_a_row_that_is_in_a_batch_twice_has_two_shares():
    recorder, losses = record([[0, 0, 3]])
    np.testing.assert_allclose(recorder.influence()[0], 2 / 3 * (losses[0] - losses[1]), rtol=0, atol=1e-12)


def first_order_error(lr, path):
    """How far TracInCP at the weights of every step, of the row that it used, is from TracInIdeal, relatively."""
    model, order = mlp(), [3, 0, 7, 1]
    recorder = IdealRecorder(model, "image_classification", TARGETS, 12)
    optimizer, states = torch.optim.SGD(model.parameters(), lr), []
    for row in order:
        states.append((copy.deepcopy(model.state_dict()), lr))
        with recorder.step([row]):
            step(model, optimizer, [row])
    options = {"projector": "none", "storage": "none", "check_rows": False}
    found = attribute(model, "image_classification", TRAIN, TARGETS, states, save_dir=path, **options)
    expected = np.zeros((12, 5))
    for number, row in enumerate(order):
        expected[row] += found.tracer.finalize_scores("targets", model_ids=[number])[row]
    return np.linalg.norm(recorder.influence() - expected) / np.linalg.norm(expected)


def test_tracin_at_every_step_agrees_to_first_order(tmp_path):
    coarse, fine = (first_order_error(lr, tmp_path / str(lr)) for lr in (0.02, 0.002))
    assert coarse < 0.05 and 8 < coarse / fine < 12.5  # the error falls with the learning rate


class Noisy(nn.Module):
    """Batch statistics, dropout, a buffer that every forward counts up, in eval mode too, and one that is replaced."""

    def __init__(self):
        super().__init__()
        self.net, self.drop = small_net(), nn.Dropout(0.3)
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("last", torch.zeros(3), persistent=False)

    def forward(self, x):
        self.count += 1
        self.last = x.detach().mean((0, 2, 3))[:3].clone()
        return self.net(self.drop(x))


def train_noisily(recorded, monkeypatch=None):
    torch.manual_seed(0)
    rows, targets = data(20, 3, 2, 6, 6), data(6, 4, 2, 6, 6)
    model = Noisy()
    model.net[0].bias.requires_grad_(False)
    adam = torch.optim.AdamW(model.parameters(), lr=0.01)
    recorder = IdealRecorder(model, "image_classification", targets, 20, batch_size=4) if recorded else None
    grads = []
    for inds in torch.randperm(20).split(7) + torch.randperm(20).split(7):
        adam.zero_grad()

        def body(inds=inds):
            loss = nn.functional.cross_entropy(model(rows[0][inds]), rows[1][inds])
            loss.backward()
            adam.step()

        if recorder is None:
            body()
        else:
            with recorder.step(inds):
                body()
        grads.append([None if p.grad is None else p.grad.clone() for p in model.parameters()])
    return model, adam, grads, torch.rand(3), recorder


def same(one, other):
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def test_training_is_bit_for_bit_the_same_with_a_recorder():
    plain, recorded = train_noisily(False), train_noisily(True)
    assert np.abs(recorded[4].loss_changes).min() > 0
    for (name, one), other in zip(plain[0].state_dict().items(), recorded[0].state_dict().values(), strict=True):
        assert torch.equal(one, other), name
    assert torch.equal(plain[0].last, recorded[0].last)
    for one, other in zip(plain[1].state.values(), recorded[1].state.values(), strict=True):
        assert all(torch.equal(one[key], other[key]) for key in one)
    for one, other in zip(plain[2], recorded[2], strict=True):
        assert all(same(a, b) for a, b in zip(one, other, strict=True))
    assert torch.equal(plain[3], recorded[3])  # the random state
    flags = [[p.requires_grad for p in run[0].parameters()] for run in (plain, recorded)]
    assert flags[0] == flags[1] and all(module.training for module in recorded[0].modules())


def test_the_model_holds_the_same_tensors_and_gradients():
    model = mlp()
    recorder = IdealRecorder(model, "image_classification", TARGETS, 12)
    model(TRAIN[0]).sum().backward()
    before = [(p, p.data_ptr(), p.grad, p.grad.data_ptr()) for p in model.parameters()]
    model[1].eval()
    with recorder.step([0]):
        pass
    for parameter, (same_one, address, grad, grad_address) in zip(model.parameters(), before, strict=True):
        assert parameter is same_one and parameter.data_ptr() == address
        assert parameter.grad is grad and grad.data_ptr() == grad_address
    assert [module.training for module in model.modules()] == [True, True, False, True]
    assert not recorder.loss_changes.any()


def test_losses_are_of_eval_mode_and_in_full_precision_under_autocast():
    torch.manual_seed(0)
    rows, targets = data(8, 3, 2, 6, 6), data(6, 4, 2, 6, 6)
    model = small_net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    recorder = IdealRecorder(model, "image_classification", targets, 8)
    before = losses_of(model, targets)
    with torch.autocast("cpu", torch.bfloat16), recorder.step(range(8)):
        nn.functional.cross_entropy(model(rows[0]), rows[1]).backward()
        optimizer.step()
    np.testing.assert_allclose(recorder.loss_changes[0], before - losses_of(model, targets), rtol=0, atol=1e-6)


def test_what_changes_weights_between_steps_belongs_to_no_step():
    recorder, _ = record(BATCHES[:2])
    model = recorder.model
    model[0].weight.data.mul_(2)  # which no version counter shows
    between = losses_of(model)
    record(BATCHES[2:], recorder=recorder, model=model)
    np.testing.assert_allclose(recorder.loss_changes[2:].sum(0), between - losses_of(model), rtol=0, atol=1e-12)


def test_targets_are_evaluated_once_a_step():
    calls = []

    def loss(model, batch):
        calls.append(len(batch[0]))
        return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")

    model = mlp()
    recorder = IdealRecorder(model, loss, TARGETS, 12, batch_size=2)
    record(BATCHES, recorder=recorder, model=model)
    assert calls == [2, 2, 1] * 5


def test_a_step_that_raises_is_not_recorded():
    recorder, _ = record(BATCHES[:1])
    model = recorder.model
    with pytest.raises(KeyError), recorder.step([1]):
        model[2].bias.data[0] += 1
        raise KeyError("stopped")
    between = losses_of(model)
    with recorder.step([2]):
        model[2].bias.data[0] -= 1
    assert [rows.tolist() for rows in recorder.rows] == [BATCHES[0], [2]]
    np.testing.assert_allclose(recorder.loss_changes[1], between - losses_of(model), rtol=0, atol=1e-12)


@pytest.mark.parametrize("targets", [[(TARGETS[0][:2], TARGETS[1][:2]), (TARGETS[0][2:], TARGETS[1][2:])], TARGETS])
def test_targets_of_any_kind_are_copied(targets):
    model = mlp()
    copies = [tuple(column.clone() for column in batch) for batch in targets] if isinstance(targets, list) else targets
    recorder = IdealRecorder(model, "image_classification", copies, 12)
    if isinstance(targets, list):
        copies[0][0].zero_()
    _, losses = record(BATCHES, recorder=recorder, model=model)
    np.testing.assert_allclose(recorder.loss_changes, losses[:-1] - losses[1:], rtol=0, atol=1e-12)


def resume(path, model, targets=TARGETS, task="image_classification"):
    return IdealRecorder.load(path, model, task, targets)


def test_a_saved_recording_goes_on_and_can_be_read_alone(tmp_path):
    whole, _ = record(BATCHES)
    first, _ = record(BATCHES[:2])
    path = tmp_path / "deep" / "ideal.npz"
    first.save(path)
    first.save(path)  # over the one that is there
    model = mlp()
    model.load_state_dict(copy.deepcopy(first.model.state_dict()))
    again = resume(path, model)
    record(BATCHES[2:], recorder=again, model=model)
    again.save(path)
    read = read_ideal(path)
    assert [path.name for path in path.parent.iterdir()] == ["ideal.npz"]
    assert (read.train_set_size, [rows.tolist() for rows in read.rows]) == (12, BATCHES)
    for found in (again, again.record, read):
        np.testing.assert_array_equal(found.loss_changes, whole.loss_changes)
        np.testing.assert_array_equal(found.influence(), whole.influence())


def test_a_recording_of_no_steps(tmp_path):
    recorder = IdealRecorder(mlp(), "image_classification", TARGETS, 12)
    recorder.save(tmp_path / "a.npz")
    read = read_ideal(tmp_path / "a.npz")
    assert read.loss_changes.shape == (0, 5) and read.rows == [] and not read.influence().any()
    assert read.influence().shape == (12, 5)


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    recorder, _ = record(BATCHES[:1])
    recorder.save(tmp_path / "a.npz")

    def fail(file, **arrays):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", fail)
    with pytest.raises(tracer.StoreError, match=r"a\.npz cannot be written .*No space.* still in memory"):
        recorder.save(tmp_path / "a.npz")
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]
    assert len(read_ideal(tmp_path / "a.npz").rows) == 1


def test_other_targets_task_or_weights_are_refused(tmp_path):
    recorder, _ = record(BATCHES[:1])
    path = tmp_path / "a.npz"
    recorder.save(path)
    with pytest.raises(
        tracer.MismatchError, match=r"recorded for other targets \(rows \[0, 1, 2, 3, 4\] differ\): pass"
    ):
        resume(path, recorder.model, (TARGETS[0].flip(0) + 1, TARGETS[1]))
    with pytest.raises(tracer.MismatchError, match=r"other targets \(5 rows there, 4 now\)"):
        resume(path, recorder.model, tuple(column[:4] for column in TARGETS))
    with pytest.raises(tracer.MismatchError, match="recorded with the task .*image_classification.*, and .*text_class"):
        resume(path, recorder.model, task="text_classification")
    with pytest.raises(tracer.MismatchError, match=r"not have the weights at which .* was saved, after 1 steps: load"):
        resume(path, mlp())


def test_files_that_are_no_recording(tmp_path):
    with pytest.raises(tracer.StoreError, match=r"a\.npz does not exist: pass the path that IdealRecorder\.save wrote"):
        read_ideal(tmp_path / "a.npz")
    recorder, _ = record(BATCHES[:1])
    recorder.save(tmp_path / "a.npz")
    whole = (tmp_path / "a.npz").read_bytes()
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    np.save(tmp_path / "array.npy", np.zeros(3))
    (tmp_path / "half.npz").write_bytes(whole[:100])
    (tmp_path / "empty.npz").write_bytes(b"")
    for name in ("other.npz", "array.npy", "half.npz", "empty.npz"):
        with pytest.raises(
            tracer.StoreError, match=re.escape(name) + " cannot be read as a recording .*damaged, or of"
        ):
            read_ideal(tmp_path / name)
    with np.load(tmp_path / "a.npz") as file:
        arrays = dict(file)
    np.savez(tmp_path / "new.npz", **arrays | {"format_version": np.array(2)})
    with pytest.raises(tracer.StoreError, match="format version 2, this package knows up to 1: upgrade"):
        read_ideal(tmp_path / "new.npz")
    np.savez(tmp_path / "part.npz", **{name: value for name, value in arrays.items() if name != "task"})
    with pytest.raises(tracer.StoreError, match="cannot be read as a recording .*'task'"):
        read_ideal(tmp_path / "part.npz")


@pytest.mark.parametrize(
    ("inds", "error", "message"),
    [
        ([], tracer.BatchError, "inds is empty"),
        ([12], tracer.BatchError, r"\[12\], outside 0\.\.\.11"),
        ([0.5], tracer.InputTypeError, "list, array or tensor of integers"),
        ("all", tracer.InputTypeError, "list, array or tensor of integers"),
    ],
)
def test_rows_that_are_not_there(inds, error, message):
    recorder = IdealRecorder(mlp(), "image_classification", TARGETS, 12)
    with pytest.raises(error, match=message), recorder.step(inds):
        raise AssertionError("the step began")
    assert recorder.rows == []


def test_a_step_within_a_step():
    recorder = IdealRecorder(mlp(), "image_classification", TARGETS, 12)
    with recorder.step(torch.tensor([1])):
        with pytest.raises(tracer.CallOrderError, match=r"recorder\.step came inside another recorder\.step"):
            with recorder.step([0]):
                raise AssertionError("the step began")
    assert len(recorder.rows) == 1


def test_losses_that_are_not_finite():
    recorder, _ = record(BATCHES[:1])
    with pytest.raises(
        tracer.NonFiniteError, match=r"loss of targets \[0, 1, 2, 3, 4\] is NaN or inf.* after 1 recorded"
    ):
        with recorder.step([0]):
            recorder.model[0].bias.data.fill_(torch.nan)
    assert len(recorder.rows) == 1 == len(recorder.loss_changes)


def test_tasks_that_reduce_over_the_batch():
    recorder = IdealRecorder(mlp(), lambda model, batch: model(batch[0]).mean(0), TARGETS, 12)
    with pytest.raises(tracer.BatchError, match=r"losses of shape \(3,\) for a batch of 5 targets; expected\s+\(5,\)"):
        with recorder.step([0]):
            raise AssertionError("the step began")


@pytest.mark.parametrize(
    ("share", "message"),
    [
        ("even", "share='even' is not known; .*'equal'"),
        ([[1.0]], "share has 1 arrays; expected one for each of the 4 steps"),
        ([[0.5, 0.5], [1.0], [0.5, 0.5], [0.25] * 4], r"share\[0\] has shape \(2,\) and sums to 1; expected 3 numbers"),
        (
            [[1 / 3] * 3, [2.0], [0.5, 0.5], [0.25] * 4],
            r"share\[1\] has shape \(1,\) and sums to 2; expected 1 numbers",
        ),
        ([[np.nan] * 3, [1.0], [0.5, 0.5], [0.25] * 4], r"share\[0\] .* sums to nan"),
    ],
)
def test_shares_that_cannot_be_used(share, message):
    recorder, _ = record(BATCHES)
    with pytest.raises(tracer.InputError, match=message):
        recorder.influence(share)


def test_arguments_that_cannot_be_used(monkeypatch):
    with pytest.raises(tracer.InputError, match="targets has no examples"):
        IdealRecorder(mlp(), "image_classification", [], 12)
    with pytest.raises(tracer.InputError, match="train_set_size is 0"):
        IdealRecorder(mlp(), "image_classification", TARGETS, 0)
    monkeypatch.setattr("tracer.training.tracin_ideal.fsdp_modules", lambda model: [model])
    with pytest.raises(tracer.InputError, match="sharded by fully_shard, .* IdealRecorder needs the plain model"):
        IdealRecorder(mlp(), "image_classification", TARGETS, 12)

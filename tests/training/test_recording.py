"""Recordings: schedules, thinning, which rates count, what is refused, and how a recording is continued."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from recording_cases import X, Y, backward, mlp, no_waiting_for_the_disk, record, same  # noqa: F401
from safetensors.torch import load_file
from torch import nn

import tracer
from tracer import CheckpointRecorder, attribute, load_checkpoints, open_recording
from tracer.training.recording import Even, Geometric, LossDecrease, make_schedule
from tracer.training.recording.record import CheckpointRecord
from tracer.training.recording.schedules import thin


def test_geometric_steps_are_those_of_the_formula():
    for ratio in (1.1, 1.5, 2.0, 10.0):
        expected = [1]
        while expected[-1] < 2000:
            expected.append(max(expected[-1] + 1, math.ceil(ratio * expected[-1])))
        schedule, before, found = Geometric(ratio), 0, []
        for step in range(1, expected[-1] + 1):
            level = schedule.level(step, None)
            found += [step] * (level - before)
            before = level
        assert found == expected


def test_loss_levels_are_those_of_the_formula():
    generator = torch.Generator().manual_seed(0)
    losses = (3 * 0.97 ** torch.arange(200.0) + 0.3 * torch.rand(200, generator=generator)).tolist()
    schedule, means = LossDecrease(fraction=0.2, beta=0.8), []
    for step, loss in enumerate(losses, start=1):
        weights = [0.8 ** (step - 1 - past) for past in range(step)]
        means.append(sum(w * one for w, one in zip(weights, losses, strict=False)) / sum(weights))
        expected = math.floor(math.log(means[0] / min(means)) / -math.log(0.8))
        assert schedule.level(step, loss) == expected
    assert expected > 5


def test_a_loss_that_comes_after_many_steps_counts_for_all_of_them():
    seldom, often = LossDecrease(), LossDecrease()
    seldom.level(1, 8.0), seldom.level(31, 1.0)
    for step, loss in enumerate([8.0] + [1.0] * 30, start=1):
        often.level(step, loss)
    assert seldom.state() == pytest.approx(often.state())


def test_losses_that_are_no_numbers_are_left_out():
    schedule = LossDecrease(0.5, beta=0.0)
    found = [schedule.level(step, loss) for step, loss in enumerate([math.nan, 4.0, math.inf, 1.0, 0.0, -1.0], start=1)]
    assert found[:4] == [0, 0, 0, 2] and found[4] > 2


def test_a_schedule_has_a_state_of_its_own():
    mine = LossDecrease(0.5, beta=0.0)
    mine.level(1, 1.0)
    for fresh in (make_schedule(mine), make_schedule(mine.settings())):
        assert fresh == mine and fresh.state() == {}
    assert make_schedule(Even(3)).level(7, None) == 2


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Geometric(1.0), "ratio is 1.0; expected a number above 1"),
        (lambda: LossDecrease(1.0), "fraction is 1.0; expected a number between 0 and 1"),
        (lambda: LossDecrease(0.1, beta=1.0), "beta is 1.0; expected a number from 0 to below 1"),
        (lambda: LossDecrease().level(1, 0.0), "every='loss' came with a first loss of 0, which cannot fall"),
    ],
)
def test_schedules_that_cannot_be(make, match):
    with pytest.raises(tracer.InputError, match=match):
        make()


def entries(directory, levels):
    return [
        CheckpointRecord(directory / f"{i}", i, i, None, None, (0.5,), (1.0 + i,), False, level)
        for i, level in enumerate(levels)
    ]


@pytest.mark.parametrize("levels", [range(1, 12), [1, 2, 3, 7, 8, 9, 30, 30, 31], [0, 0, 0, 5], [3] * 6])
@pytest.mark.parametrize("most", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("keep_last", [True, False])
def test_thinning_keeps_the_budget_the_sum_and_even_levels(tmp_path, levels, most, keep_last):
    before = entries(tmp_path, levels)
    kept, stride, left_out = thin(before, 1, most, keep_last)
    assert len(kept) <= most
    total = sum(one.learning_rate_sums[0] for one in kept) + sum(left_out)
    assert total == sum(one.learning_rate_sums[0] for one in before)
    if len(before) <= most:
        assert (kept, stride, left_out) == (before, 1, ())
        return
    assert (kept[-1].path == before[-1].path and not left_out) or not keep_last
    buckets = [one.level // stride for one in (kept[:-1] if keep_last else kept)]
    assert buckets == sorted(set(buckets)) and 0 not in buckets
    firsts = {}
    for one in before:
        firsts.setdefault(one.level // stride, one.path)
    assert {one.path for one in kept} >= {path for bucket, path in firsts.items() if bucket}


def two_groups(directory, rates, freeze=False, held=(0, 4)):
    model = mlp()
    if freeze:
        model[0].requires_grad_(False), model[1].requires_grad_(False)
    else:
        model[1].requires_grad_(False)
    groups = [{"params": model[number].parameters(), "lr": 0.1} for number in held]
    optimizer = torch.optim.SGD(groups)
    with CheckpointRecorder(model, optimizer, directory, every=1) as recorder:
        for step in range(2):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate / (step + 1)
            backward(model)
            optimizer.step()
            recorder.step()
    return model


def test_groups_of_one_rate_are_as_one(tmp_path):
    two_groups(tmp_path, [0.4, 0.4])
    assert [rate for _, rate in load_checkpoints(tmp_path)] == [0.4, 0.2]


def test_groups_of_different_rates_are_refused_and_can_be_chosen(tmp_path):
    two_groups(tmp_path, [0.4, 0.8])
    match = (
        r"parameters were trained with different ones: group 0 \('0.weight', '0.bias'\) from 0.2 to 0.4; group 1 "
        r"\('4.weight', '4.bias'\) from 0.4 to 0.8. Take one group .*group=0\) with params=open_recording"
    )
    with pytest.raises(tracer.InputError, match=match):
        load_checkpoints(tmp_path)
    assert [rate for _, rate in load_checkpoints(tmp_path, group=1)] == [0.8, 0.4]


def test_a_group_of_rate_zero_is_refused_too(tmp_path):
    two_groups(tmp_path, [0.0, 0.8])
    with pytest.raises(tracer.InputError, match=r"group 0 .* from 0 to 0; group 1"):
        load_checkpoints(tmp_path)


def test_parameters_that_no_group_holds_are_refused(tmp_path):
    two_groups(tmp_path, [0.8], held=[4])
    with pytest.raises(tracer.InputError, match=r"no group, so never trained: '0.weight', '0.bias'"):
        load_checkpoints(tmp_path)
    assert [rate for _, rate in load_checkpoints(tmp_path, group=0)] == [0.8, 0.4]
    assert open_recording(tmp_path).untrained == ["0.weight", "0.bias"]


def test_frozen_parameters_are_no_matter(tmp_path):
    two_groups(tmp_path, [0.1, 0.8], freeze=True)
    assert [rate for _, rate in load_checkpoints(tmp_path)] == [0.8, 0.4]
    two_groups(tmp_path / "head", [0.8], freeze=True, held=[4])
    assert [rate for _, rate in load_checkpoints(tmp_path / "head")] == [0.8, 0.4]


def test_a_group_that_is_frozen_for_a_while_has_rate_zero_then(tmp_path):
    model = mlp()
    optimizer = torch.optim.SGD([{"params": model[:4].parameters()}, {"params": model[4].parameters()}], lr=0.5)
    with CheckpointRecorder(model, optimizer, tmp_path, every=2) as recorder:
        for step in range(4):
            model[:4].requires_grad_(step > 0)
            backward(model)
            optimizer.step()
            recorder.step()
    assert [one.learning_rate_sums for one in open_recording(tmp_path).checkpoints] == [(0.5, 1.0), (1.0, 1.0)]


def test_scores_of_groups_add_up(tmp_path):
    model, total = two_groups(tmp_path / "run", [0.4, 0.8]), 0
    for group, names in enumerate(open_recording(tmp_path / "run").groups):
        found = attribute(
            model, "image_classification", (X, Y), (X[:4], Y[:4]), load_checkpoints(tmp_path / "run", group=group),
            save_dir=tmp_path / f"{group}", projector="none", params=names,
        )  # fmt: skip
        total = total + found.scores

    def grads(row, state):
        model.load_state_dict(state)
        model.eval().zero_grad()
        nn.functional.cross_entropy(model(X[row : row + 1]), Y[row : row + 1]).backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if "1." not in name}

    expected = 0.0
    for rates, (path, _) in zip([(0.4, 0.8), (0.2, 0.4)], load_checkpoints(tmp_path / "run", group=0), strict=True):
        left, right = grads(7, load_file(path)), grads(2, load_file(path))
        expected += sum(float((left[name] * right[name]).sum()) * rates[name.startswith("4")] for name in left)
    assert total[7, 2] == pytest.approx(expected, rel=1e-4)


def test_the_last_rate_can_be_had(tmp_path):
    _, _, rates = record(tmp_path, steps=7)
    assert [rate for _, rate in load_checkpoints(tmp_path, "last")] == [rates[3], rates[6], rates[7]]


def test_what_cannot_be_loaded_says_what_to_do(tmp_path):
    def refuse(kind, match, *arguments, **options):
        with pytest.raises(kind, match=match):
            load_checkpoints(*arguments, **options)

    refuse(tracer.StoreError, r"nothing holds no recording \(recording.json is missing\): pass", tmp_path / "nothing")
    record(tmp_path, steps=7)
    refuse(tracer.InputError, "learning_rate='mean' is not known; .*'last', 'sum'", tmp_path, "mean")
    refuse(tracer.InputError, "group is 1; expected 0 to 0", tmp_path, group=1)
    refuse(tracer.InputTypeError, "group is 'head'; expected an integer", tmp_path, group="head")
    (tmp_path / "step_00000006.safetensors").unlink()
    refuse(tracer.StoreError, "lacks files that its recording names: step_00000006.safetensors", tmp_path)
    document = json.loads((tmp_path / "recording.json").read_text())
    empty = {**document, "checkpoints": []}
    elsewhere = copy.deepcopy(document)
    elsewhere["checkpoints"][0]["file"] = "../secret.safetensors"
    cases = [
        (json.dumps({**document, "format_version": 99}), "has format version 99, this package knows up to 1: upgrade"),
        (json.dumps({**document, "format": "else"}), "cannot be read as a recording .*its format is 'else'"),
        (json.dumps(elsewhere), "cannot be read as a recording .*which is not in the directory"),
        (json.dumps(document)[:-9], "cannot be read as a recording .*damaged"),
        ("[]", "cannot be read as a recording"),
        (json.dumps(empty), "holds a recording without checkpoints"),
    ]
    for text, match in cases:
        (tmp_path / "recording.json").write_text(text)
        refuse(tracer.StoreError, match, tmp_path)


def test_a_directory_with_a_recording_is_not_overwritten(tmp_path):
    record(tmp_path, steps=7)
    with pytest.raises(tracer.StoreError, match="holds a recording of 3 checkpoints up to step 7: pass resume=True"):
        record(tmp_path)
    assert len(load_checkpoints(tmp_path)) == 3


def test_resume_where_there_is_nothing_begins(tmp_path):
    record(tmp_path, steps=4, resume=True)
    assert [one.step for one in open_recording(tmp_path).checkpoints] == [3, 4]


@pytest.mark.parametrize("every", [3, "geometric", "loss"])
def test_a_resumed_recording_is_that_of_one_run(tmp_path, every):
    """Stopped after step 9, which is saved in any case; otherwise as if it had not been stopped."""
    record(tmp_path / "whole", steps=21, every=every)
    model, _, _ = record(tmp_path / "parts", steps=9, every=every)
    record(tmp_path / "parts", steps=12, first=9, model=model, every=every, resume=True)
    whole, parts = (open_recording(tmp_path / name) for name in ("whole", "parts"))
    expected = {one.step for one in whole.checkpoints} | {9}
    assert {one.step for one in parts.checkpoints} == expected
    assert [one.model_id for one in parts.checkpoints] == list(range(len(expected)))
    assert parts.checkpoints[-1].schedule == pytest.approx(whole.checkpoints[-1].schedule)
    totals = [sum(rate for _, rate in load_checkpoints(tmp_path / name)) for name in ("whole", "parts")]
    assert totals[0] == pytest.approx(totals[1], rel=1e-12)


@pytest.mark.parametrize("most", [None, 3])
def test_a_state_continues_from_where_it_was_taken(tmp_path, most):
    """Training is killed after step 19 and taken up from its own checkpoint of step 11."""

    def train(model, recorder, optimizer, steps, saved=None):
        for step in steps:
            optimizer.param_groups[0]["lr"] = 0.1 / step
            backward(model, step)
            optimizer.step()
            recorder.step(loss=float(step))
            if step == 11 and saved is not None:
                saved.update(model=copy.deepcopy(model.state_dict()), recorder=recorder.state_dict())

    def begin(directory, model, **options):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        options = {"every": 2, "max_checkpoints": most, **options}
        return CheckpointRecorder(model, optimizer, directory, **options), optimizer

    model, saved = mlp(), {}
    torch.manual_seed(3)
    recorder, optimizer = begin(tmp_path / "parts", model)
    train(model, recorder, optimizer, range(1, 20), saved)
    again = mlp()
    again.load_state_dict(saved["model"])
    state = json.loads(json.dumps(saved["recorder"]))
    recorder, optimizer = begin(tmp_path / "parts", again, resume=state)
    assert all(one.step <= 11 for one in open_recording(tmp_path / "parts").checkpoints)
    train(again, recorder, optimizer, range(12, 25))
    recorder.close()
    found = open_recording(tmp_path / "parts").checkpoints
    sums, before = {}, 0
    for one in found:
        assert one.learning_rate_sums[0] == pytest.approx(
            sum(0.1 / step for step in range(before + 1, one.step + 1)), rel=1e-9
        )
        before = sums[one.step] = one.step
    assert before == 24 and (most is None or len(found) <= most)
    assert same(load_file(found[-1].path), again.state_dict())
    on_disk = {path.name for path in (tmp_path / "parts").glob("step_*")}
    assert on_disk == {one.path.name for one in found}
    if most is None:
        assert list(sums) == list(range(2, 25, 2))
        assert [one.model_id for one in found] == [0, 1, 2, 3, 4, *range(9, 16)]  # 5 to 8 were of another course


def test_what_a_killed_process_did_not_remove_is_removed_when_it_is_resumed(tmp_path):
    model, _, _ = record(tmp_path, steps=3)
    (tmp_path / "step_00000002.safetensors").write_bytes(b"left")
    (tmp_path / "step_by_step.txt").write_bytes(b"the user's")
    record(tmp_path, steps=1, first=3, model=model, resume=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "recording.json",
        "step_00000003.safetensors",
        "step_00000004.safetensors",
        "step_by_step.txt",
    ]


def test_a_recording_of_something_else_is_not_continued(tmp_path):
    model, _, _ = record(tmp_path / "run", steps=3)
    state = None

    def refuse(match, directory="run", **options):
        with pytest.raises(tracer.MismatchError, match=match):
            record(tmp_path / directory, **{"resume": True, "model": model, **options})

    other = mlp()
    other[4] = nn.Linear(8, 5)
    refuse(r"was recorded with another model: '4.bias' \[3\] there, \[5\] now.*choose another directory", model=other)
    refuse("was recorded with another schedule: .*'even', 'steps': 3.* there, .*'steps': 4.* now", every=4)
    refuse(
        "was recorded with another optimizer: groups of .6. parameters there, .2. now",
        make=lambda model: torch.optim.SGD(model[0].parameters(), lr=0.1),
    )
    refuse("resume=True continues after the last checkpoint, and the model does not have its weights", model=mlp())
    recorder = CheckpointRecorder(model, torch.optim.SGD(model.parameters(), lr=0.1), tmp_path / "other", every=3)
    state = {**recorder.state_dict(), "step": 1}
    refuse("came with the state of another recording than that in", resume=state)
    refuse("came with the state of a recording, and .*empty holds none", "empty", resume=state)
    (tmp_path / "run" / "step_00000003.safetensors").write_bytes(b"damaged")
    refuse("the last checkpoint of .* does not fit: .*cannot be read as safetensors")


def test_parameters_that_were_frozen_for_a_while_inside_a_group_are_refused(tmp_path):
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    with CheckpointRecorder(model, optimizer, tmp_path, every=2) as recorder:
        for step in range(6):
            model[0].requires_grad_(step >= 3)
            backward(model)
            optimizer.step()
            recorder.step()
    match = "frozen for a while .*'0.bias', '0.weight'. Train again with them in groups of their own"
    for group in (None, 0):
        with pytest.raises(tracer.InputError, match=match):
            load_checkpoints(tmp_path, group=group)


def test_a_second_recorder_of_one_directory_is_refused(tmp_path):
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    first = CheckpointRecorder(model, optimizer, tmp_path, every=1)
    with pytest.raises(tracer.StoreError, match="holds a recording of 0 checkpoints up to step 0: pass resume=True"):
        CheckpointRecorder(model, optimizer, tmp_path, every=1)
    CheckpointRecorder(model, torch.optim.SGD(model.parameters(), lr=0.1), tmp_path, every=1, resume=True)
    backward(model)
    optimizer.step()
    with pytest.raises(tracer.StoreError, match="is being recorded by another recorder, which began or resumed it"):
        first.step()


def test_files_of_the_users_stay(tmp_path):
    model, _, _ = record(tmp_path / "run", steps=3)
    for name in ("step_10.safetensors", "step_best.safetensors"):
        (tmp_path / "run" / name).write_bytes(b"the user's")
    record(tmp_path / "run", steps=1, first=3, model=model, resume=True)
    assert all((tmp_path / "run" / name).exists() for name in ("step_10.safetensors", "step_best.safetensors"))
    (tmp_path / "step_00000005.safetensors").write_bytes(b"the user's")
    with pytest.raises(tracer.StoreError, match="files that a recorder would replace: step_00000005.safetensors"):
        record(tmp_path)


def test_weights_that_are_nan_are_those_of_their_checkpoint(tmp_path):
    model, _, _ = record(tmp_path, steps=2)
    with torch.no_grad():
        model[0].weight[0] = math.nan
    record(tmp_path / "nan", steps=3, model=model)
    record(tmp_path / "nan", steps=1, first=3, model=model, resume=True)
    assert [one.step for one in open_recording(tmp_path / "nan").checkpoints] == [3, 4]


def test_a_state_that_lacks_something_is_refused(tmp_path):
    with pytest.raises(tracer.InputError, match="a state without 'step', .*pass all that recorder.state_dict"):
        record(tmp_path, resume={"recording": "x"})

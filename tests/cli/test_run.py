"""`tracer run`: settings, references, checkpoints, the plan, interruptions. The oracle is `attribute` itself."""

from __future__ import annotations

import inspect
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_cases import (
    CHECKPOINTS,
    MODULE,
    NUM_TARGETS,
    NUM_TRAIN,
    enter,
    make_project,
    printed_json,
    refused,
    run_tracer,
)

from tracer import Attribution, CheckpointRecorder, Tracer, attribute, load_checkpoints
from tracer.cli.job import find_checkpoints
from tracer.cli.run import Interruption
from tracer.cli.settings import BY_NAME, read_settings
from tracer.data.datasets import as_data_source
from tracer.errors import InputError


@pytest.fixture
def project(tmp_path, monkeypatch):
    enter(tmp_path, monkeypatch)
    return make_project(tmp_path)


def expected(folder: Path, **options) -> Attribution:
    """The result of the library for the project."""
    module = __import__(MODULE)
    checkpoints = [(f"checkpoints/{name}", rate) for name, rate in zip(CHECKPOINTS, (0.1, 0.2), strict=True)]
    options = {"task": "image_classification", "proj_dim": 64, **options}
    return attribute(
        module.build_model(),
        train=module.train_set(),
        targets=module.test_set(),
        checkpoints=checkpoints,
        save_dir=folder / "expected",
        **options,
    )


def test_every_argument_of_the_library_is_a_setting():
    arguments = {*inspect.signature(attribute).parameters, *inspect.signature(Tracer.__init__).parameters}
    assert arguments - {"self", "train_set_size", "tracer_options"} == set(BY_NAME) - {"learning_rate"}


def assert_close(found, expected):
    """Check scores up to the last bits, which depend on batch sizes and the processor."""
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * float(np.abs(expected).max()))


def test_a_run_computes_what_the_library_does(project):
    assert run_tracer("run", "tracer.toml").exit_code == 0
    found, wanted = Attribution(Tracer.open("store"), "targets"), expected(project)
    assert_close(found.scores, wanted.scores)
    assert_close(found.self_influence(), wanted.self_influence())


def test_flags_alone_do_and_win_over_the_file(project):
    options = ["--proj-dim", "32", "--save-dir", "flags", "--exp-name", "mine", "--params", "0", "--params", "2.bias"]
    assert run_tracer("run", "tracer.toml", *options).exit_code == 0
    store = Tracer.open("flags").store
    assert store.manifest.feature_dim == 32
    assert store.catalog.exp_names() == ["mine"]
    assert set(store.manifest.settings["params"]) == {"0.weight", "0.bias", "2.bias"}
    every = {**read_settings("tracer.toml", {}), "learning_rate": "0.1,0.2", "save_dir": "alone"}
    every["checkpoints"] = every["checkpoints"][0]
    flags = [part for name, value in every.items() for part in (BY_NAME[name].flag, str(value))]
    assert run_tracer("run", *flags).exit_code == 0
    assert_close(Attribution(Tracer.open("alone"), "targets").scores, expected(project).scores)


def test_flags_whiten_gradients_as_the_library_does(project):
    flags = ["--preconditioner", "kfac", "--damping", "0.1", "--curvature-examples", "20"]
    assert run_tracer("run", "tracer.toml", *flags).exit_code == 0
    options = {"preconditioner": "kfac", "damping": 0.1, "curvature_examples": 20}
    assert_close(Attribution(Tracer.open("store"), "targets").scores, expected(project, **options).scores)
    assert "preconditioner kfac" in run_tracer("info", "store").output


def test_a_task_may_be_named_in_the_users_module(project):
    assert run_tracer("run", "tracer.toml", "--task", f"{MODULE}:loss").exit_code == 0
    wanted = expected(project, task=__import__(MODULE).loss)
    assert_close(Attribution(Tracer.open("store"), "targets").scores, wanted.scores)


def test_targets_may_have_a_task_of_their_own(project):
    assert run_tracer("run", "tracer.toml", "--target-task", f"{MODULE}:loss").exit_code == 0
    found = Attribution(Tracer.open("store"), "targets").scores
    assert_close(found, expected(project, target_task=__import__(MODULE).loss).scores)
    assert printed_json("info", "store")["targets"]["targets"]["task"]["function"] == f"{MODULE}.loss"
    assert f"{MODULE}.loss" in run_tracer("info", "store").output


def test_what_it_says_to_do_next_can_be_done(project):
    output = run_tracer("run", "tracer.toml").output
    commands = [line for line in output.splitlines() if line.startswith("  tracer ") and "report" not in line]
    assert len(commands) == 3
    assert [run_tracer(*shlex.split(line)[1:]).exit_code for line in commands] == [0, 0, 0]
    other = run_tracer("run", "tracer.toml", "--save-dir", "other", "--exp-name", "new").output
    assert "tracer top other --exp-name new -k 5" in other
    assert f"tracer report other --exp-name new --train {MODULE}:train_set --targets {MODULE}:test_set" in other


def test_what_flags_changed_is_spelled_out_in_what_to_do_next(project):
    flags = ["--train", f"{MODULE}:other_set", "--estimator", "trak", "--target", "output", "--regularization", "0.5"]
    output = run_tracer("run", "tracer.toml", *flags).output
    ranking = "tracer.toml --estimator trak --target output --regularization 0.5"
    assert f"  tracer top {ranking} -k 5\n" in output
    assert f"  tracer self-influence {ranking} -k 20\n" in output
    assert f"  tracer report {ranking} --train {MODULE}:other_set --output-dir report\n" in output
    commands = [shlex.split(line)[1:] for line in output.splitlines() if line.startswith("  tracer ")]
    assert [run_tracer(*command).exit_code for command in commands if "report" not in command] == [0, 0, 0]


def test_a_file_of_settings_may_have_any_ending(project):
    (project / "run.cfg").write_text((project / "tracer.toml").read_text())
    output = run_tracer("run", "run.cfg").output
    assert "  tracer top run.cfg -k 5\n" in output
    assert run_tracer("top", "run.cfg", "-k", "5").exit_code == 0


def test_json_of_a_run_says_where_the_store_is(project):
    found = printed_json("run", "tracer.toml")
    assert "has not fitted the labels" in found.pop("warnings")[0]  # labels are random
    assert found == {
        "save_dir": "store",
        "checkpoints": 2,
        "train_rows": NUM_TRAIN,
        "targets": NUM_TARGETS,
        "complete": True,
        "notes": [],
    }


def test_processes_do_their_shares(project):
    shares = [["run", "tracer.toml", "--process", f"{number}/2"] for number in (0, 1)]
    first = run_tracer(*shares[0])
    assert first.exit_code == 0
    assert "those of other processes are missing" in first.output
    for share in (shares[1], shares[0]):
        last = run_tracer(*share)
    assert "Stored 24 training examples and 5 targets" in last.output
    found = Attribution(Tracer.open("store"), "targets")
    np.testing.assert_allclose(found.scores, expected(project).scores, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--learning-rate", "0.1,0.2,0.3"], "learning_rate has 3 values for 2 checkpoints: epoch_2.pt, epoch_10.pt"),
        (["--learning-rate", "fast"], "--learning-rate is 'fast'; expected a number, or several with commas"),
        (["--regularization", "much"], "'much' is no number; expected one, for regularization also 'auto'"),
        (["--damping", "much"], "'much' is no number"),
        (["--damping", "auto"], "damping is 'auto'; expected a number"),
        (["--process", "1of2"], "process='1of2' is not known"),
        (["--process", "a/2"], "process is 'a/2'; expected 'slurm', or a number and a count"),
        (["--checkpoints", "none/*.pt"], "checkpoints='none/*.pt' finds no file"),
        (["--checkpoints", "checkpoints/*.pt", "--checkpoints", "checkpoints/epoch_2.pt"], "more than once"),
        (["--checkpoints", "."], "is a directory without checkpoints: expected a recording (recording.json)"),
        (["--model", "build_model"], "model is 'build_model'; expected package.module:callable"),
        (["--model", "no_such_module:build"], "model is 'no_such_module:build': No module named 'no_such_module'"),
        (["--model", f"{MODULE}:build_modle"], "has no 'build_modle'; did you mean 'build_model'"),
        (["--model", f"{MODULE}:not_a_model"], "returned a str; expected a torch.nn.Module"),
        (["--batch-size", "0"], "batch_size is 0; expected 1 or more"),
        (["--batch-size", str(1 << 63)], "expected at most 9223372036854775807"),
    ],
)
def test_bad_input_is_explained(project, arguments, message):
    assert message in refused("run", "tracer.toml", *arguments)
    assert not (project / "store").exists()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def make():\n    raise KeyError('gone')", "failed with KeyError: 'gone' (tracer --debug shows"),
        ("def make():\n    raise OSError('no disk')", "failed with OSError: no disk"),
        ("raise ValueError('at import')", "failed with ValueError: at import"),
        ("import no_such_library", "failed with ModuleNotFoundError: No module named 'no_such_library'"),
        ("import argparse\nargparse.ArgumentParser().parse_args(['x'])", "ended the program (SystemExit: 2)"),
        ("def make():\n    raise SystemExit(0)", "ended the program (SystemExit: 0)"),
    ],
)
@pytest.mark.parametrize("setting", ["--model", "--train"])
def test_failures_of_the_users_code_are_3_and_one_message(project, monkeypatch, setting, source, message):
    (project / "faulty_code.py").write_text(source)
    monkeypatch.delitem(sys.modules, "faulty_code", raising=False)
    result = run_tracer("run", "tracer.toml", setting, "faulty_code:make")
    sys.modules.pop("faulty_code", None)
    assert result.exit_code == 3
    assert f"Error: {setting[2:]}: faulty_code:make {message}" in result.output
    assert not (project / "store").exists()


@pytest.mark.parametrize("more", [[], ["--dry-run"]])
def test_json_stands_alone_when_the_users_code_prints(project, monkeypatch, more):
    (project / "talking.py").write_text(
        f"import {MODULE}\nprint('importing')\ndef rows():\n    print('loading')\n    return {MODULE}.train_set()\n"
        f"def loss(model, batch):\n    print('a batch')\n    return {MODULE}.loss(model, batch)\n"
    )
    monkeypatch.delitem(sys.modules, "talking", raising=False)
    flags = ["--train", "talking:rows", "--task", "talking:loss", "--json"]
    result = run_tracer("run", "tracer.toml", *flags, *more)
    sys.modules.pop("talking", None)
    assert json.loads(result.stdout)["train_rows"] == NUM_TRAIN
    assert [text for text in ("importing", "loading", "a batch") if text not in result.stderr] == []


def test_processes_of_torchrun_that_do_not_know_each_other_are_refused(project, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "one of 2 processes of torchrun" in refused("run", "tracer.toml")
    assert not (project / "store").exists()


def test_what_a_run_needs_is_named():
    assert "This run lacks train, targets, checkpoints, save_dir: give it in the file, or as --train." in refused(
        "run", "--model", "a:b", "--task", "regression"
    )


def test_checkpoints_of_a_glob_are_sorted_by_their_numbers(project):
    found = printed_json("run", "tracer.toml", "--dry-run")["checkpoints"]
    assert [(each["path"], each["learning_rate"]) for each in found] == [
        ("checkpoints/epoch_2.pt", 0.1),
        ("checkpoints/epoch_10.pt", 0.2),
    ]


def test_a_recorders_directory_brings_its_learning_rates(project):
    module = __import__(MODULE)
    model = module.build_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    with CheckpointRecorder(model, optimizer, "recorded", every=2) as recorder:
        for _ in range(3):
            for parameter in model.parameters():
                parameter.grad = torch.ones_like(parameter)
            optimizer.step()
            recorder.step()
    assert find_checkpoints(["recorded"], None)[0] == load_checkpoints("recorded")
    settings = (project / "tracer.toml").read_text().replace("learning_rate", "# learning_rate")
    (project / "recorded.toml").write_text(settings.replace("checkpoints/*.pt", "recorded"))
    found = printed_json("run", "recorded.toml", "--dry-run")["checkpoints"]
    assert [each["learning_rate"] for each in found] == [1.0, 0.5]
    note = "replaces recorded rates of 2 checkpoints (1, 0.5) by (0.1, 0.1)"
    assert note in run_tracer("run", "recorded.toml", "--learning-rate", "0.1", "--dry-run").output
    assert note in run_tracer("run", "recorded.toml", "--learning-rate", "0.1").output
    assert printed_json("run", "recorded.toml", "--learning-rate", "1,0.5", "--dry-run")["notes"] == []
    message = r"Checkpoints \['epoch_2.pt'\] have no learning rate and the other checkpoints have one"
    with pytest.raises(InputError, match=message):
        find_checkpoints(["recorded", "checkpoints/epoch_2.pt"], None)
    assert len(find_checkpoints(["recorded", "checkpoints/epoch_2.pt"], 0.1)[0]) == 3


def test_one_learning_rate_is_for_all_checkpoints(project):
    assert [rate for _, rate in find_checkpoints(["checkpoints/*.pt"], 0.5)[0]] == [0.5, 0.5]
    assert [rate for _, rate in find_checkpoints(["checkpoints/*.pt"], None)[0]] == [None, None]


def test_every_header_is_read_before_the_first_batch(project):
    for name in ("epoch_3.pt", "epoch_11.pt"):
        torch.save({"0.weight": torch.ones(1)}, project / "checkpoints" / name)
    for options in (["--dry-run"], []):
        message = refused("run", "tracer.toml", "--learning-rate", "1", *options)
        assert "epoch_3.pt: the checkpoint does not fit the model." in message
    (project / "checkpoints" / "epoch_3.pt").unlink()
    assert "epoch_11.pt: " in refused("run", "tracer.toml", "--learning-rate", "1", "--dry-run")  # after the trial's
    assert not (project / "store").exists()


def test_a_key_chooses_the_state_dict_of_training_checkpoints(project):
    for name in CHECKPOINTS:
        state = torch.load(path := project / "checkpoints" / name)
        other = {f"module.{key}": torch.zeros_like(value) for key, value in state.items()}
        torch.save({"epoch": 1, "ema": {"weights": state}, "model_state_dict": other}, path)
    assert "choose one by checkpoint_key='ema.weights'" in refused("run", "tracer.toml")
    assert run_tracer("run", "tracer.toml", "--checkpoint-key", "ema").exit_code == 0
    given = [(torch.load(project / "checkpoints" / name)["ema"]["weights"], 0.1) for name in CHECKPOINTS]
    stored = Tracer.open("store").store
    wanted = Tracer(__import__(MODULE).build_model(), "image_classification", NUM_TRAIN, "given", 64)
    for model_id, (state, rate) in enumerate(given):
        wanted.load_checkpoint(state, model_id, rate)
        attributes = [each.table_attributes(model_id)["weights_fingerprint"] for each in (stored, wanted.store)]
        assert attributes[0] == attributes[1]


def test_a_plan_says_what_is_to_be_done_and_leaves_nothing(project):
    before = sorted(project.iterdir())
    found = printed_json("run", "tracer.toml", "--dry-run")
    assert [path for path in sorted(project.iterdir()) if path.name != "__pycache__"] == before
    assert (found["train_rows"], found["num_targets"]) == (NUM_TRAIN, NUM_TARGETS)
    assert [each["train_rows_missing"] for each in found["checkpoints"]] == [NUM_TRAIN, NUM_TRAIN]
    assert found["settings"]["feature_dim"] == 64
    assert found["num_values"] == 6 * 5 + 5 + 5 * 3 + 3
    assert 0 < found["seconds"] < 60
    assert found["peak_bytes"] > 1 << 20
    text = run_tracer("run", "tracer.toml", "--dry-run").output
    assert "epoch_10.pt" in text
    assert "64 values an example (sketch), stored as float16" in text


def test_a_plan_takes_the_time_of_an_example_without_the_checks_of_early_batches(project, monkeypatch):
    clock = [0.0]

    def tick(module, args):
        clock[0] += len(args[0]) if isinstance(module, torch.nn.Linear) else 0

    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    hook = torch.nn.modules.module.register_module_forward_pre_hook(tick)
    try:
        found = printed_json("run", "tracer.toml", "--dry-run")
    finally:
        hook.remove()
    assert found["train_seconds_per_row"] == 2  # the network has two Linear layers, and one forward is needed
    assert found["seconds"] > 2 * 2 * NUM_TRAIN


@pytest.mark.parametrize("options", [[], ["--storage", "int8"], ["--projector", "none"]], ids=" ".join)
def test_a_plan_knows_the_bytes_on_disk(project, options):
    planned = printed_json("run", "tracer.toml", "--dry-run", *options)["disk_bytes"]
    assert run_tracer("run", "tracer.toml", *options).exit_code == 0
    chunks = [path for path in (project / "store").rglob("c/**/*") if path.is_file()]
    tables = "checkpoints", "targets"
    numbers = [
        path for path in chunks if path.relative_to(project / "store").parts[0] in tables or "/scores/c/" in str(path)
    ]
    written = sum(path.stat().st_size for path in numbers)
    assert planned <= written <= planned + 100  # a file of cosines ends with an index of its tiles


def test_a_plan_of_a_run_that_is_done_has_nothing_to_do(project):
    run_tracer("run", "tracer.toml")
    found = printed_json("run", "tracer.toml", "--dry-run")["checkpoints"]
    assert [(each["train_rows_missing"], each["targets_missing"]) for each in found] == [(0, 0), (0, 0)]


def test_a_plan_finds_a_store_of_other_settings(project):
    run_tracer("run", "tracer.toml")
    output = refused("run", "tracer.toml", "--dry-run", "--proj-dim", "32")
    assert "feature_dim: stored 64, asked 32" in output


def test_a_plan_finds_rows_that_do_not_fit_the_model(project):
    result = run_tracer("run", "tracer.toml", "--dry-run", "--train", f"{MODULE}:texts")
    assert result.exit_code in (2, 3)
    assert not (project / "store").exists()


def test_missing_learning_rates_are_pointed_out(project):
    (project / "plain.toml").write_text((project / "tracer.toml").read_text().replace("learning_rate", "# learning"))
    assert "Checkpoints have no learning rate: each weighs 1." in run_tracer("run", "plain.toml", "--dry-run").output


def test_the_first_interruption_ends_rows_after_a_batch_and_the_second_is_at_once():
    batches = as_data_source((torch.arange(12.0),), "train", 2)
    with Interruption() as interruption:
        rows = interruption.guard(batches, immediately=False)
        seen = 0
        for _ in rows.batches(np.arange(12)):
            seen += 1
            if seen == 2:
                signal.raise_signal(signal.SIGINT)
        assert (seen, interruption.is_requested()) == (2, True)
        with pytest.raises(KeyboardInterrupt):
            next(iter(rows.batches(np.arange(12))))
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_an_interruption_between_batches_is_at_once():
    with Interruption(), pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("options", [[], ["--projector", "none"]], ids=["stored", "exact"])
def test_an_interrupted_run_goes_on_to_the_same_scores(project, monkeypatch, options):
    command = ["run", "tracer.toml", "--train", f"{MODULE}:SlowSet", *options]
    monkeypatch.setenv("INTERRUPT", "yes")
    stopped = run_tracer(*command)
    assert stopped.exit_code == 130
    assert f"To continue:\n  tracer {shlex.join(command)}\n" in stopped.output
    reader = Tracer.open("store")
    assert reader.remaining(0).tolist() == list(range(16, NUM_TRAIN))  # two batches of eight, the second one whole
    monkeypatch.delenv("INTERRUPT")
    assert run_tracer(*command).exit_code == 0
    wanted = expected(project, projector="none") if options else expected(project)
    np.testing.assert_allclose(Attribution(Tracer.open("store"), "targets").scores, wanted.scores, rtol=2e-6)


def test_ctrl_c_stops_a_real_process_cleanly(project):
    arguments = ["run", "tracer.toml", "--train", f"{MODULE}:SlowSet", "--progress"]
    process = subprocess.Popen(
        [sys.executable, "-m", "tracer", *arguments],
        env={**os.environ, "PAUSE": "0.3", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    limit = time.monotonic() + 100
    while not (project / "reached").exists() and process.poll() is None and time.monotonic() < limit:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert "Stopping after this batch" in errors
    assert f"To continue:\n  python -m tracer {shlex.join(arguments)}" in errors
    assert json.loads((project / "store" / "zarr.json").read_text())["attributes"]["format"] == "tracer"
    assert len(Tracer.open("store").remaining(0)) == NUM_TRAIN - 16

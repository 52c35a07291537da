"""A small training run for tests of the command line: a module with model and data, and its checkpoints."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from tracer.cli import main

MODULE = "cli_training"
NUM_TRAIN, NUM_TARGETS = 24, 5
CHECKPOINTS = ("epoch_2.pt", "epoch_10.pt")  # in this order; sorted as text it would be the other one

SOURCE = '''
import os
import signal
import time
from pathlib import Path

import torch
from torch import nn


def build_model():
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))


def rows(count, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 6, generator=generator), torch.randint(0, 3, (count,), generator=generator)


def train_set():
    return rows(24, 1)


def other_set():
    return rows(24, 7)


def test_set():
    return rows(5, 2)


class SlowSet(torch.utils.data.Dataset):
    """Pauses for PAUSE seconds an example and leaves a mark once examples are loaded."""

    def __init__(self):
        self.x, self.y = rows(24, 1)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, row):
        if row == 8:
            Path("reached").touch()
        if row == 8 and "INTERRUPT" in os.environ:
            signal.raise_signal(signal.SIGINT)
        if row >= 8:
            time.sleep(float(os.environ.get("PAUSE", "0")))
        return self.x[row], self.y[row]


def loss(model, batch):
    x, y = batch
    return nn.functional.cross_entropy(model(x), y, reduction="none")


def fit(model, rows):
    model[0].weight.data.fill_(len(rows))


def fails():
    raise KeyError("no such file")


batches = [rows(24, 1)]
names = [f"lines.csv:{row}" for row in range(24)]
texts = [f"row {row}" for row in range(24)]
not_a_model = "text"
'''


def make_project(folder: Path) -> Path:
    """Write the module, checkpoints and a file of settings into a folder."""
    (folder / f"{MODULE}.py").write_text(SOURCE)
    namespace: dict = {}
    exec(compile(SOURCE, "source", "exec"), namespace)
    (folder / "checkpoints").mkdir()
    for seed, name in enumerate(CHECKPOINTS):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            torch.save(namespace["build_model"]().state_dict(), folder / "checkpoints" / name)
    (folder / "tracer.toml").write_text(
        f"""
model = "{MODULE}:build_model"
task = "image_classification"
train = "{MODULE}:train_set"
targets = "{MODULE}:test_set"
checkpoints = "checkpoints/*.pt"
learning_rate = [0.1, 0.2]
save_dir = "store"
proj_dim = 64
batch_size = 8
"""
    )
    return folder


def enter(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a project's folder the current one. Files are not synced: other tests claim that they are."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)


def run_tracer(*arguments: str) -> Result:
    """Run the program in this process."""
    return CliRunner().invoke(main, list(arguments), prog_name="tracer")


def printed_json(*arguments: str) -> dict:
    """Run the program with ``--json``, which must succeed, and return the object."""
    result = run_tracer(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.output)


def refused(*arguments: str) -> str:
    """Run the program, which must end with one error message, and return it."""
    result = run_tracer(*arguments)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    return result.output

"""Fixtures that several test modules use."""

from __future__ import annotations

import copy
import gc
import json
import os
from collections import Counter
from pathlib import Path

import pytest
import torch
from projection_cases import stand_in  # noqa: F401  a fixture
from torch import nn

os.environ["HF_HUB_OFFLINE"] = "1"  # a name that no folder has is an error at once, and not after waiting for a network
torch.set_num_threads(1)  # tests run beside each other, and a child process must train the same weights as its parent


SLOW = Path(__file__).with_name("slow_tests.txt")
"""Test functions that `make test-fast` leaves out; `python tests/choose_fast.py` writes them."""

_WHOLE = {"project", "zoo", "faults"}  # what these folders test is the whole

_durations: Counter[str] = Counter()


def pytest_addoption(parser):
    parser.addoption("--fast", action="store_true", help=f"only the rooms' tests, without those in {SLOW.name}")
    parser.addoption("--record-durations", type=Path, metavar="FILE", help="write the seconds of each test function")


def pytest_ignore_collect(collection_path, config):
    if config.getoption("--fast") and (collection_path.name in _WHOLE or "tests" not in collection_path.parts):
        return True
    return None


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """Import without the garbage collector, which then never looks at what was imported: a fifth of the tests' time."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--fast"):
        return
    slow = set(SLOW.read_text().split())
    left_out = [item for item in items if function_of(item.nodeid) in slow]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in set(left_out)]


def function_of(nodeid: str) -> str:
    """The test without its parameters, and without spaces, as in the files of names."""
    return nodeid.partition("[")[0].replace(" ", "_")


def pytest_runtest_logreport(report):
    _durations[function_of(report.nodeid)] += report.duration


def pytest_sessionfinish(session):
    path = session.config.getoption("--record-durations")
    if path is not None and not hasattr(session.config, "workerinput"):  # the process that started the workers
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(_durations, indent=0))


def small_net() -> nn.Module:
    """A conv net with the usual layers, small enough for exact gradients."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 4, 3, stride=2),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(4 * 2 * 2, 3),
    )


class Run:
    """A model, data and three checkpoints with learning rates, as a training run leaves them."""

    def __init__(self, num_train: int = 23, num_targets: int = 5) -> None:
        self.model = small_net()
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(num_train, 2, 6, 6, generator=generator)
        self.y = torch.randint(0, 3, (num_train,), generator=generator)
        self.target_x = torch.randn(num_targets, 2, 6, 6, generator=generator)
        self.target_y = torch.randint(0, 3, (num_targets,), generator=generator)
        self.checkpoints = []
        trained = copy.deepcopy(self.model)
        optimizer = torch.optim.SGD(trained.parameters(), lr=0.1)
        for learning_rate in (0.3, 0.2, 0.1):
            optimizer.param_groups[0]["lr"] = learning_rate
            for _ in range(3):
                optimizer.zero_grad()
                nn.functional.cross_entropy(trained(self.x), self.y).backward()
                optimizer.step()
            self.checkpoints.append((copy.deepcopy(trained.state_dict()), learning_rate))

    @property
    def train(self):
        return self.x, self.y

    @property
    def targets(self):
        return self.target_x, self.target_y


@pytest.fixture
def run() -> Run:
    return Run()

"""Gradients that two processes collect in one training, against one process that collects the batches of both."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from collecting_cases import EXACT, N, X, Y, features, mlp, sgd
from collecting_worker import SIZES, STEPS, adam, rows_of
from forks import ranks
from torch import nn
from trainer_cases import TOKENS, bert, needs_transformers

from tracer import GradientCollector, collected_checkpoints
from tracer.store import Store

WORKER = Path(__file__).parents[1] / "collecting_worker.py"
COLUMNS = ("loss", "label", "gradient_norm")


WAYS = ["plain", "accumulated", "views", "second pass", "files", "resumed", "clipped", "adam"]
REFUSED = {
    "apart": "GradientError: .*is not the sum.*DistributedDataParallel",
    "apart, second pass": "MismatchError: .*different weights.*DistributedDataParallel",
    "uneven": "GradientError: Processes differ in how they collected step 1.*as many batches",
    "one second pass": "GradientError: Processes differ in how they collected step 1.*second_pass=True in all",
    "divided": "GradientError: .*keeps no second moments.*ZeroRedundancyOptimizer",
}


def run_all(ways, folder, imports="torch.distributed.optim"):
    """Run trainings in the same two processes, one after another, each in the folder of its way."""
    for way in ways:
        (folder / way).mkdir()
    running = ranks(len(SIZES), WORKER, str(folder), *ways, cwd=folder, imports=imports)
    (folder / "printed").write_text("".join(f"status {each.wait()}: {each.output}" for each in running))
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of each way's folder."""
    return run_all([*WAYS, "loss", *REFUSED], tmp_path_factory.mktemp("trained"))


def errors(folder):
    """Return the error of each process, or None."""
    files = [folder / f"rank{rank}.json" for rank in range(len(SIZES))]
    assert all(each.exists() for each in files), (folder.parent / "printed").read_text()[-4000:]
    return [json.loads(each.read_text()) for each in files]


def alone(folder, way="plain"):
    """Collect in one process: the gradient of a step is the mean of those of both batches."""
    model = mlp()
    optimizer = (adam if way == "adam" else sgd)(model)
    options = {"every": 2, "preconditioner": "adam" if way == "adam" else None, **EXACT}
    with GradientCollector(model, optimizer, folder, "classification", N, **options) as collector:
        for step in range(STEPS):
            optimizer.zero_grad()
            for rank in range(len(SIZES)):
                rows = rows_of(rank, step)
                with collector.batch((X[rows], Y[rows]), rows):
                    (nn.functional.cross_entropy(model(X[rows]), Y[rows]) / len(SIZES)).backward()
            if way == "clipped":
                nn.utils.clip_grad_norm_(model.parameters(), 0.05)
            optimizer.step()
            collector.step()
    return collector, model


def columns(store):
    return [Store.open_existing(store).checkpoint(0).column(name) for name in COLUMNS]


@pytest.mark.parametrize("way", WAYS)
def test_processes_collect_what_one_collects_of_all_their_batches(trained, tmp_path, way):
    assert errors(trained / way) == [None, None]
    collector, model = alone(tmp_path, way)
    found = torch.load(trained / way / "found.pt")
    torch.testing.assert_close(found["weights"], model.state_dict())
    expected = features(collector)
    if way == "resumed":  # a segment ended where the first training did
        found["features"], expected = found["features"].sum(0), expected.sum(0)
    torch.testing.assert_close(found["features"], expected, rtol=1e-5, atol=1e-6)
    assert not list((trained / way / "run").glob("*.bin"))


def test_losses_and_labels_are_of_the_process_that_saw_an_example_last(trained, tmp_path):
    assert errors(trained / "plain") == [None, None]
    collector, _ = alone(tmp_path)
    for found, expected in zip(columns(trained / "plain" / "run" / "store"), columns(collector.store), strict=True):
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_processes_agree_on_segments_that_end_by_the_loss(trained, tmp_path):
    assert errors(trained / "loss") == [None, None]  # each has another loss
    assert collected_checkpoints(trained / "loss" / "run")
    collector, _ = alone(tmp_path)
    found = torch.load(trained / "loss" / "found.pt")["features"]
    torch.testing.assert_close(found.sum(0), features(collector).sum(0), rtol=1e-5, atol=1e-6)


@needs_transformers
def test_the_trainer_of_hugging_face_collects_in_two_processes(tmp_path):
    folder = run_all(["hugging face"], tmp_path, "transformers.trainer") / "hugging face"
    assert errors(folder) == [None, None]
    found = torch.load(folder / "found.pt")
    before = bert().state_dict()
    change = [(before[name] - found["weights"][name]).reshape(-1) for name, _ in bert().named_parameters()]
    sums = found["features"].sum((0, 1)) / len(TOKENS)
    torch.testing.assert_close(sums, torch.cat(change), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("way", REFUSED)
def test_trainings_that_cannot_be_collected_are_an_error_in_all_processes(trained, way):
    found = errors(trained / way)
    assert all(each is not None and re.match(REFUSED[way], each) for each in found), found

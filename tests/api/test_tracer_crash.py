"""A process that featurizes is killed at any instant: what it reported done stays, and resuming gives the same."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import Run
from tracer_cases import build, featurize, score

CHILD = """
import sys
sys.path.insert(0, sys.argv[2])
from conftest import Run
from tracer_cases import build
run = Run(num_train=200)
tracing = build(run, sys.argv[1], projector="sketch", proj_dim=64)
for model_id, (state, learning_rate) in enumerate(run.checkpoints):
    tracing.load_checkpoint(state, model_id, learning_rate)
    for start in range(0, 200, 5):
        tracing.featurize((run.x[start : start + 5], run.y[start : start + 5]), num_samples=5)
        missing = set(tracing.remaining(model_id).tolist())
        print(model_id, 200 - len(missing), flush=True)
"""


def child_until_killed(path: Path, seconds: float) -> dict[int, int]:
    """Run the child, kill it some time after its first rows, and return how many rows it had reported done."""
    command = [sys.executable, "-c", CHILD, str(path), str(Path(__file__).parents[1])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    reported: dict[int, int] = {}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as child:
        first = child.stdout.readline()
        time.sleep(seconds)
        child.send_signal(signal.SIGKILL)
        for line in [first, *child.stdout]:
            if line.endswith("\n") and len(line.split()) == 2:
                model_id, done = map(int, line.split())
                reported[model_id] = done
    return reported


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_kill_loses_nothing_that_was_reported_done(tmp_path):
    run = Run(num_train=200)
    whole = build(run, tmp_path / "whole", projector="sketch", proj_dim=64)
    featurize(whole, run, batch_size=50)
    score(whole, run)
    path, seconds = tmp_path / "killed", random.Random(0)
    for _ in range(3):
        reported = child_until_killed(path, 0.3 * seconds.random())
        assert reported, "the child was killed before it reported anything"
        with build(run, path, projector="sketch", proj_dim=64) as tracing:
            for model_id, done in reported.items():
                assert len(tracing.remaining(model_id)) <= 200 - done
    resumed = build(run, path, projector="sketch", proj_dim=64)
    featurize(resumed, run, batch_size=33)
    score(resumed, run)
    expected = np.asarray(whole.finalize_scores("test"))
    np.testing.assert_allclose(resumed.finalize_scores("test"), expected, atol=1e-5 * np.abs(expected).max())

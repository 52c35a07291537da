"""Models that fully_shard divides among processes: real processes over gloo, against the plain model in one."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from forks import ranks
from torch import nn

import tracer
from tracer._core.sharding import is_sharded, layer_type
from tracer._core.validation import check_model
from tracer.gradients.backend import find_backend
from tracer.gradients.selfcheck import shrunk

TESTS = Path(__file__).resolve().parents[1]
available = torch.distributed.is_available() and torch.distributed.is_gloo_available()
if available:
    from fsdp_worker import SCENES
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
else:
    pytest.skip("torch.distributed with gloo is not available", allow_module_level=True)
if not hasattr(FSDPModule, "reset_iter_state"):
    pytest.skip("this torch has no FSDPModule.reset_iter_state", allow_module_level=True)

LAUNCHES = {  # joining processes takes time, so they run many scenes
    "values": (2, ["equals", "sketches", "other ways of", "replicas", "frozen", "wrappers"]),
    "the user's model": (2, ["training goes on", "only parts"]),
    "order and errors": (
        2,
        [
            "resumed",
            "results",
            "an error",
            "values that",
            "ranks that",
            "other ways through",
            "refusals",
            "a wrong rule",
        ],
    ),
    "uneven rows": (3, ["uneven", "resumed"]),
    "a process that ends": (2, ["a rank that ends"]),
}


def scenes(launch: str) -> list[str]:
    return [name for name in SCENES if name.startswith(tuple(LAUNCHES[launch][1]))]


def test_every_scene_is_launched():
    assert {name for launch in LAUNCHES for name in scenes(launch)} == set(SCENES)


def torchrun(count: int, script: Path, *arguments: str, cwd: Path) -> str:
    """What processes print that run a script together; one that hangs is ended."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    path = os.pathsep.join([str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [*command, str(script), *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        return process.communicate(timeout=240)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return f"the processes hang: {process.communicate()[0]}"


@pytest.mark.parametrize("launch", LAUNCHES)
def test_scenes(launch, tmp_path):
    count, names = LAUNCHES[launch][0], scenes(launch)
    running = ranks(count, TESTS / "fsdp_worker.py", str(tmp_path), *names, cwd=tmp_path)
    output = "".join(f"status {each.wait()}: {each.output}" for each in running)
    found = [json.loads(file.read_text()) for file in sorted(tmp_path.glob("rank*.json"))]
    failed = [
        f"{name} on rank {rank}:\n{error}" for rank, one in enumerate(found) for name, error in one.items() if error
    ]
    assert not failed, "\n".join(failed)
    ended = {1} if launch == "a process that ends" else set()
    missing = [(rank, set(names) - set(one)) for rank, one in enumerate(found) if rank not in ended]
    assert len(found) == count - len(ended) and all(not names for _, names in missing), (missing, output[-4000:])


def test_the_script_of_the_page_runs(tmp_path):
    page = (TESTS.parent / "docs" / "gradients.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```py\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    script = tmp_path / "script.py"
    script.write_text(code)
    output = torchrun(2, script, cwd=tmp_path)
    assert "(8, 8)" in output and "Error" not in output, output


def test_flat_parameters_are_refused():
    # Making a real one needs an accelerator.
    flat = FullyShardedDataParallel.__new__(FullyShardedDataParallel)
    nn.Module.__init__(flat)
    flat._fsdp_wrapped_module = nn.Linear(2, 2)
    for model in (flat, nn.Sequential(flat)):
        with pytest.raises(tracer.InputTypeError, match=r"FullyShardedDataParallel.*fully_shard instead"):
            check_model(model)


def test_plain_models_have_the_plain_backend():
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    assert not find_backend(model, torch.device("cpu")).is_sharded
    assert layer_type(model[0]) is nn.Linear
    assert not is_sharded(model[0].weight)


def test_long_gradients_are_compared_by_sketches_of_the_same_length():
    values = torch.randn(3_000_001, generator=torch.Generator().manual_seed(0))
    other = values.clone()
    other[1_500_000:1_500_100] += 10.0  # what differs is in a few places
    found = shrunk(values)
    assert found.shape == (1 << 14,)
    torch.testing.assert_close(found.norm(), values.norm(), rtol=0.03, atol=0)
    torch.testing.assert_close((shrunk(other) - found).norm(), (other - values).norm(), rtol=0.1, atol=0)
    torch.testing.assert_close(shrunk(2 * values), 2 * found)
    short = values[: 1 << 14]
    assert shrunk(short) is short

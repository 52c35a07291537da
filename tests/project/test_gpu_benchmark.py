"""benchmarks/gpu.py runs without a GPU in small sizes, and writes down the parts that fail."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from benchmark_scripts import BENCHMARKS, script


def test_every_part_has_a_row_and_a_failing_one_its_error(tmp_path):
    pytest.importorskip("transformers")
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--tiny", "--output-dir", str(tmp_path), "--only"]
    for part in ("exactness", "gpt2 512", "fast_jl"):
        subprocess.run([*command, part], check=True, capture_output=True)
        (row,) = json.loads((tmp_path / "gpu.json").read_text())["rows"]
        assert row["part"] == part
        if part == "exactness":
            assert max(row[name] for name in ("mlp", "resnet9", "decoder", "lstm", "gru")) < 1e-6
        elif part == "gpt2 512":
            assert row["ratio"] > 0 and row["examples"] == 3
        elif not torch.cuda.is_available():
            assert "runs on CUDA devices only" in row["error"]


def test_all_parts_fit_into_ten_minutes():
    with script("gpu") as module:
        assert sum(seconds for _, seconds in module.PARTS.values()) < 600
        assert all(seconds < 600 for _, seconds in module.SUITE.values())

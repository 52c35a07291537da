"""Every example runs in its quick mode, asserts what it claims, and takes up its own work when run again."""

from __future__ import annotations

from pathlib import Path

import pytest
from forks import fork

EXAMPLES = Path(__file__).parents[2] / "examples"


def run_example(name: str, folder: Path, *arguments: str) -> str:
    done = fork(EXAMPLES / name, *arguments, cwd=folder)
    assert done.wait() == 0, done.output
    return done.output


def test_mislabeled_digits_finds_flipped_labels_resumes_and_refuses_other_settings(tmp_path):
    pytest.importorskip("matplotlib")
    arguments = ["--quick", "--output-dir", str(tmp_path / "run")]
    first = run_example("mislabeled_digits.py", tmp_path, *arguments)
    assert "self-influence" in first
    assert "chance (expected)" in first
    report = tmp_path / "run" / "report"
    assert first.rstrip().endswith(str(report / "index.html"))
    pictures = {path.name for path in report.glob("*.png")}
    assert pictures >= {"influence.png", "recovery.png", "self_influence.png", "top_self_influence.png"}
    features = tmp_path / "run" / "store" / "checkpoints" / "0" / "features"
    written = max(path.stat().st_mtime_ns for path in features.rglob("*") if path.is_file())
    second = run_example("mislabeled_digits.py", tmp_path, *arguments)
    assert "Reusing the 5 checkpoints" in second
    assert max(path.stat().st_mtime_ns for path in features.rglob("*") if path.is_file()) == written
    table = slice(first.index("\nFlipped labels"), None)
    assert first[table] == second[second.index("\nFlipped labels") :]
    with pytest.raises(AssertionError, match="holds checkpoints of other settings"):
        run_example("mislabeled_digits.py", tmp_path, *arguments, "--seed", "1")

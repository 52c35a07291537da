"""Choose the tests of `make test-fast` by the durations that `make test` recorded: the fastest that fit.

Run it: python tests/choose_fast.py            after make test; writes tests/slow_tests.txt
"""

from __future__ import annotations

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 45.0  # of two processes together, beside their start and the collection


def slow_tests(durations: dict[str, float], seconds: float) -> list[str]:
    """The test functions, slowest first, without which the others take at most so many seconds.

    >>> slow_tests({"a": 3.0, "b": 1.0, "c": 0.5}, 2.0)
    ['a']
    """
    ordered = sorted(durations, key=lambda name: durations[name])
    total, fast = 0.0, set()
    for name in ordered:
        total += durations[name]
        if total > seconds:
            break
        fast.add(name)
    return [name for name in reversed(ordered) if name not in fast]


if __name__ == "__main__":
    recorded = json.loads((ROOT / "build" / "durations.json").read_text())
    whole = ("tests/project/", "tests/zoo/", "tests/faults/")  # which are left out anyway
    tests = {name: each for name, each in recorded.items() if name.startswith("tests/") and not name.startswith(whole)}
    chosen = slow_tests(tests, SECONDS)
    (ROOT / "tests" / "slow_tests.txt").write_text("\n".join(sorted(chosen)) + "\n")
    print(f"{len(tests) - len(chosen)} of {len(tests)} test functions are fast")

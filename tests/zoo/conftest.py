"""The table of outcomes, which `make zoo` asks for: ``ZOO_OUTCOME`` is the file to write."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest

COLUMNS = "| model | outcome | worst error | cost | remark |\n|---|---|---|---|---|\n"


class Outcomes:
    """Collects the outcomes that tests recorded, from other processes too, and writes a table at the end."""

    def __init__(self, path: Path) -> None:
        self.path, self.lines, self.kinds = path, {}, Counter()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        recorded = dict(report.user_properties)
        if report.when != "call" or "zoo" not in recorded:
            return
        kind, error, cost, note = recorded["zoo"]
        self.kinds[kind] += 1
        error = "" if error is None else f"{error:.1e}"
        cost = "" if cost is None else f"{cost:.1f}"
        self.lines[report.nodeid] = f"| {recorded['model']} | {kind} | {error} | {cost} | {note} |"

    def pytest_sessionfinish(self) -> None:
        counts = ", ".join(f"{count} {kind}" for kind, count in sorted(self.kinds.items()))
        table = "\n".join(line for _, line in sorted(self.lines.items()))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(
            f"# Outcomes of the zoo\n\n{len(self.lines)} models: {counts}. Errors are relative to a float64 loop of "
            f"single examples; costs are plain forward and backward passes.\n\n{COLUMNS}{table}\n"
        )


def pytest_configure(config: pytest.Config) -> None:
    path = os.environ.get("ZOO_OUTCOME")
    if path and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Outcomes(Path(path)))


@pytest.fixture
def recorded(record_property):
    """Runs the check of an entry and records its outcome, also if it fails."""
    import torch
    from zoo.harness import Entry, Outcome, check

    def run(entry: Entry, folder: Path) -> None:
        record_property("model", entry.name)
        try:
            outcome = check(entry, folder, timed="ZOO_OUTCOME" in os.environ)
        except BaseException as error:
            kind = "wrong" if isinstance(error, AssertionError) else "failed"
            what = entry.fault or f"{type(error).__name__}: {str(error).strip().splitlines()[0][:100]}"
            record_property("zoo", (kind, None, None, what.replace("|", "/")))
            raise
        assert isinstance(outcome, Outcome)
        record_property("zoo", (outcome.kind, outcome.error, outcome.cost, outcome.note))

    torch.set_num_threads(1)
    return run

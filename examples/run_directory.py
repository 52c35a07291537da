"""A folder of results that belongs to one set of settings, so that a run can resume."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def claim_directory(directory: Path, settings: Mapping[str, Any]) -> None:
    """Let a folder hold the results of these settings alone.

    Args:
        directory: The folder; made where it does not exist.
        settings: Plain JSON values.

    Raises:
        SystemExit: It holds results of other settings.
    """
    record, ours = directory / "settings.json", json.loads(json.dumps(settings))
    if not record.exists():
        directory.mkdir(parents=True, exist_ok=True)
        record.write_text(json.dumps(ours, indent=2))
        return
    found = json.loads(record.read_text())
    if found != ours:
        names = [name for name in {**found, **ours} if found.get(name) != ours.get(name)]
        differing = ", ".join(f"{name} {found.get(name)!r}, now {ours.get(name)!r}" for name in names)
        raise SystemExit(
            f"{directory} holds results of other settings: {differing}.\n"
            f"Choose another --output-dir, remove that folder, or go back to those settings."
        )

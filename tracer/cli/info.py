"""``tracer info``: what a store holds."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from tracer.cli.help import TaughtCommand
from tracer.cli.output import json_option, show, size_text, table
from tracer.cli.stores import open_store
from tracer.store import Store
from tracer.store.remote_path import RemotePath

EXAMPLES = r"""
tracer info runs/first
tracer info runs/first --json | jq '.checkpoints[].train_rows_done'
"""


@click.command("info", cls=TaughtCommand, examples=EXAMPLES)
@click.argument("store")
@json_option
def command(store: str, as_json: bool) -> None:
    """Show what a store holds: settings, checkpoints, rows, targets, sizes.

    STORE is a store's directory or URL, or the TOML file of its run. Nothing is computed or changed.
    """
    reader, _ = open_store(store)
    found = describe(reader.store)
    show(as_json, found, _text(found))


def describe(store: Store) -> dict[str, Any]:
    """Return what a store holds, as JSON values.

    Args:
        store: The store.

    Returns:
        Its manifest, checkpoints, target sets, scores and sizes in bytes by room.
    """
    checkpoints = []
    for model_id in store.checkpoint_ids():
        rows, attributes = store.checkpoint(model_id), store.table_attributes(model_id)
        checkpoints.append(
            {
                "model_id": model_id,
                "learning_rate": attributes.get("learning_rate"),
                "train_rows_done": rows.num_done,
                "finalized": bool(attributes.get("finalized")),
                "source": attributes.get("source"),
            }
        )
    targets = {}
    for exp_name in store.exp_names():
        tables = {model_id: store.targets(exp_name, model_id) for model_id in store.target_ids(exp_name)}
        targets[exp_name] = {
            "num_targets": next(iter(tables.values())).num_rows,
            "done": {str(model_id): rows.num_done for model_id, rows in tables.items()},
            "scores": store.score_names(exp_name),
        }
    manifest = store.manifest
    return {
        "path": str(store.path),
        "train_rows": manifest.train_set_size,
        "feature_dim": manifest.feature_dim,
        "storage": manifest.storage,
        "settings": dict(manifest.settings),
        "model": manifest.info.get("model"),
        "versions": dict(manifest.versions),
        "checkpoints": checkpoints,
        "targets": targets,
        "bytes": _sizes(store.path),
    }


def _sizes(path: Path | RemotePath) -> dict[str, int] | None:
    """Return the bytes of each room of a store on this machine; of a remote one that would list every object: None."""
    if isinstance(path, RemotePath):
        return None
    rooms = {entry.name: _size(entry) for entry in sorted(path.iterdir()) if entry.is_dir()}
    return {**rooms, "total": _size(path)}


def _size(directory: Path) -> int:
    names = (Path(root) / name for root, _, files in os.walk(directory) for name in files)
    return sum(name.stat().st_size for name in names)


def _text(found: dict[str, Any]) -> str:
    settings = found["settings"]
    facts = [
        ("store", found["path"]),
        ("model", found["model"]),
        ("task", settings["task"]["name"]),
        ("training rows", f"{found['train_rows']:,}"),
        ("parameters", f"{len(settings['params'])} selected"),
        ("features", f"{found['feature_dim']:,} numbers a row ({settings['projector']['kind']}), {found['storage']}"),
        ("made with", ", ".join(f"{name} {version}" for name, version in found["versions"].items())),
    ]
    if found["bytes"] is not None:
        rooms = ", ".join(f"{name} {size_text(size)}" for name, size in found["bytes"].items() if name != "total")
        facts.append(("on disk", f"{size_text(found['bytes']['total'])} ({rooms})"))
    headers = ("id", "learning rate", "rows done", "finalized", "weights from")
    rows = [
        (each["model_id"], each["learning_rate"], each["train_rows_done"], _yes(each["finalized"]), each["source"])
        for each in found["checkpoints"]
    ]
    parts = ["\n".join(f"{name:<14} {value}" for name, value in facts)]
    parts.append("Checkpoints\n" + table(headers, rows) if rows else "No checkpoints yet.")
    sets = [
        (name, each["num_targets"], min(each["done"].values()), len(each["done"]), ", ".join(each["scores"]) or None)
        for name, each in found["targets"].items()
    ]
    headers = ("name", "targets", "done at least", "checkpoints", "score matrices")
    parts.append("Targets\n" + table(headers, sets) if sets else "No targets yet.")
    return "\n\n".join(parts)


def _yes(value: bool) -> str:
    return "yes" if value else "no"

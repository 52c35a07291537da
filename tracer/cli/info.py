"""``tracer info``: the contents of a store."""

from __future__ import annotations

from typing import Any

import click

from tracer.cli.output import ResultCommand, format_facts, format_size, format_table, print_result
from tracer.cli.stores import open_store
from tracer.store import Store
from tracer.store.arrays.store_path import StorePath
from tracer.store.audited import AuditedShare


@click.command("info", cls=ResultCommand)
@click.argument("store")
def info(store: str) -> None:
    """Show the contents of a store: settings, checkpoints, targets, sizes.

    STORE is a store's directory or URL, or the TOML file of its run. Nothing is computed or changed.

    Examples:
        tracer info runs/first
        tracer info runs/first --json | jq '.checkpoints[].train_rows_done'
    """
    reader, _ = open_store(store)
    found = describe(reader.store)
    print_result(found, _text(found))


def describe(store: Store) -> dict[str, Any]:
    """Return settings, checkpoints, target sets and sizes in bytes as JSON values."""
    manifest, catalog = store.manifest, store.catalog
    shares: list[AuditedShare] = []
    checkpoints = [_checkpoint(store, model_id, shares) for model_id in catalog.checkpoint_ids()]
    targets = {exp_name: _target_set(store, exp_name, shares) for exp_name in catalog.exp_names()}
    share = AuditedShare(sum(each.audited for each in shares), sum(each.stored for each in shares))
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
        "audited": {"gradients": share.audited, "stored": share.stored, "wrong_at_most": share.bound},
        "bytes": _sizes(store.path),
    }


# Thousands of tables take a minute to open, and some memory each: one at a time is opened, once.
def _checkpoint(store: Store, model_id: int, shares: list[AuditedShare]) -> dict[str, Any]:
    table = store.checkpoint(model_id)
    attributes = table.attributes
    shares.append(AuditedShare.of([table]))
    return {
        "model_id": model_id,
        "learning_rate": attributes.get("learning_rate"),
        "train_rows_done": shares[-1].stored,
        "finalized": bool(attributes.get("finalized")),
        "source": attributes.get("source"),
    }


def _target_set(store: Store, exp_name: str, shares: list[AuditedShare]) -> dict[str, Any]:
    done = {}
    for model_id in store.catalog.target_ids(exp_name):
        table = store.targets(exp_name, model_id)
        shares.append(AuditedShare.of([table]))
        done[str(model_id)] = shares[-1].stored
    return {
        "num_targets": table.num_rows,
        "task": table.attributes.get("target_task"),  # None: that of training examples
        "done": done,
        "scores": store.catalog.score_names(exp_name),
    }


def _sizes(path: StorePath) -> dict[str, int] | None:
    """Return the bytes of a store by folder, or None if the path does not know them (see `total_bytes`)."""
    total = path.total_bytes()
    if total is None:
        return None
    folders = {name: (path / name).total_bytes() or 0 for name in path.children() if (path / name).is_dir()}
    return {**folders, "total": total}


def _text(found: dict[str, Any]) -> str:
    settings = found["settings"]
    projector = settings.get("projector", {}).get("kind", "unknown")
    facts = [
        ("store", found["path"]),
        ("model", found["model"]),
        ("task", settings.get("task", {}).get("name")),
        ("training set", f"{found['train_rows']:,} examples"),
        ("parameters", f"{len(settings.get('params', ()))} selected"),
        ("features", f"{found['feature_dim']:,} values an example ({projector}), stored as {found['storage']}"),
        *([("preconditioner", settings["preconditioner"])] if "preconditioner" in settings else []),
        ("run alone", str(AuditedShare(found["audited"]["gradients"], found["audited"]["stored"]))),
        ("made with", ", ".join(f"{name} {version}" for name, version in found["versions"].items())),
    ]
    if found["bytes"] is not None:
        folders = ", ".join(f"{name} {format_size(size)}" for name, size in found["bytes"].items() if name != "total")
        facts.append(("on disk", f"{format_size(found['bytes']['total'])} ({folders})"))
    checkpoints = [list(each.values()) for each in found["checkpoints"]]
    target_sets = [
        (
            name,
            _task_name(each["task"]),
            each["num_targets"],
            min(each["done"].values()),
            len(each["done"]),
            ", ".join(each["scores"]) or None,
        )
        for name, each in found["targets"].items()
    ]
    parts = [format_facts(facts)]
    headers = ("id", "learning rate", "examples done", "finalized", "weights from")
    parts.append("Checkpoints\n" + format_table(headers, checkpoints) if checkpoints else "No checkpoints yet.")
    of_targets = ("name", "task", "targets", "done at least", "checkpoints", "score matrices")
    parts.append("Targets\n" + format_table(of_targets, target_sets) if target_sets else "No targets yet.")
    return "\n\n".join(parts)


def _task_name(task: dict[str, Any] | None) -> str | None:
    return None if task is None else str(task.get("function", task.get("name")))

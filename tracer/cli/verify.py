"""``tracer verify``: damage in a store."""

from __future__ import annotations

import dataclasses

import click
import numpy as np

from tracer.cli.app import FINDING
from tracer.cli.output import ResultCommand, print_result
from tracer.cli.stores import find_store
from tracer.errors import StoreError
from tracer.store import Damage, Store, Verification
from tracer.store import verify as verify_store
from tracer.store.arrays.metadata import NODE, read_document
from tracer.store.arrays.store_path import StorePath, store_path
from tracer.store.manifest import FORMAT, FORMAT_VERSION


@click.command("verify", cls=ResultCommand)
@click.argument("store")
@click.option("--repair", is_flag=True, help="Mark damaged rows as missing, so that the next run computes them again.")
@click.pass_context
def verify(ctx: click.Context, store: str, repair: bool) -> None:
    """Read a whole store and report damage.

    Compares the checksums of all documents, stored rows, tiles of scores, kernels and top-k parts, and the sizes of the
    files of tables. Without --repair nothing is changed. Exit code 1 means damage, even if it was repaired. No other
    process may write to the store meanwhile.

    Examples:
        tracer verify runs/first || tracer verify runs/first --repair
        tracer run tracer.toml                    computes the lost rows
    """
    found = _verify(store_path(find_store(store)[0]), repair)
    result = {
        "path": found.save_dir,
        "ok": found.ok,
        "rows_read": found.num_rows,
        "tiles_read": found.num_tiles,
        "audited": None if found.audited is None else found.audited.audited,
        "damage": [dataclasses.asdict(each) for each in found.damage],
    }
    text = str(found)
    if not found.ok and not repair and any(len(each.rows) for each in found.damage):
        text += "\nTo compute the lost rows again: tracer verify --repair, then the run."
    print_result(result, text)
    if not found.ok:
        ctx.exit(FINDING)


def _verify(path: StorePath, repair: bool) -> Verification:
    """Verify a store; an unreadable root counts as damage too."""
    try:
        Store.open_existing(path)
    except StoreError as error:
        if not (path / NODE).exists() or _is_foreign(path):
            raise
        return Verification(str(path), [Damage(str(path / NODE), str(error), np.empty(0, np.int64), False)], 0, 0)
    return verify_store(str(path), repair=repair)


def _is_foreign(path: StorePath) -> bool:
    """Return whether a root is intact but of another program or another format version."""
    try:
        attributes = read_document(path / NODE, checked=False)["attributes"]
    except StoreError:
        return False
    version = attributes.get("format_version")
    return attributes.get("format") != FORMAT or (isinstance(version, int) and version != FORMAT_VERSION)

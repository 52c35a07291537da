"""``tracer verify``: whether a store is as it was written."""

from __future__ import annotations

import click
import numpy as np

from tracer.cli.app import FINDING
from tracer.cli.help import TaughtCommand
from tracer.cli.output import json_option, show
from tracer.cli.stores import find_store
from tracer.errors import StoreError
from tracer.store import Damage, Store, Verification, verify
from tracer.store.manifest import FORMAT, FORMAT_VERSION
from tracer.store.metadata import NODE, StorePath, read_document
from tracer.store.paths import store_path

EXAMPLES = r"""
tracer verify runs/first || tracer verify runs/first --repair
tracer run tracer.toml                    computes the rows that were lost
"""


@click.command("verify", cls=TaughtCommand, examples=EXAMPLES)
@click.argument("store")
@click.option("--repair", is_flag=True, help="Mark damaged rows as missing, so that the next run computes them anew.")
@json_option
@click.pass_context
def command(ctx: click.Context, store: str, repair: bool, as_json: bool) -> None:
    """Read everything that a store holds and say what is damaged.

    Checked are the metadata of the store and of each array, that files of rows marked as done are there in full, each
    such row's checksum, and that of each tile of scores marked as done. Not checked: attributes without a checksum,
    such as learning rates, and marks that were lost before a checkpoint was finished; such rows only count as work to
    be done again. Without --repair nothing is changed. Exit code 1 means damage, also when it was repaired. No other
    process may write the store meanwhile.
    """
    found = _verify(store_path(find_store(store)[0]), repair)
    damage = [{"path": each.path, "what": each.what, "rows": each.rows, "mended": each.mended} for each in found.damage]
    summary = {
        "path": found.save_dir,
        "ok": found.ok,
        "rows_read": found.num_rows,
        "tiles_read": found.num_tiles,
        "damage": damage,
    }
    text = str(found)
    if not found.ok and not repair and any(len(each.rows) for each in found.damage):
        text += "\nTo have lost rows computed again: tracer verify --repair, then the run."
    show(as_json, summary, text)
    if not found.ok:
        ctx.exit(FINDING)


def _verify(path: StorePath, repair: bool) -> Verification:
    """Verify a store; that its root cannot be read is damage too."""
    try:
        Store.open_existing(path)
    except StoreError as error:
        if not (path / NODE).exists() or _is_foreign(path):
            raise
        return Verification(str(path), [Damage(str(path / NODE), str(error), np.empty(0, np.int64), False)], 0, 0)
    return verify(str(path), repair=repair)


def _is_foreign(path: StorePath) -> bool:
    """Tell whether a root is whole, and that of another program or of another format version."""
    try:
        attributes = read_document(path / NODE)["attributes"]
    except StoreError:
        return False
    version = attributes.get("format_version")
    return attributes.get("format") != FORMAT or (isinstance(version, int) and version != FORMAT_VERSION)

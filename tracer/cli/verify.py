"""``tracer verify``: whether a store is as it was written."""

from __future__ import annotations

import click

from tracer.cli.app import FINDING
from tracer.cli.help import TaughtCommand
from tracer.cli.output import json_option, show
from tracer.cli.stores import open_store
from tracer.store import verify

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

    Every file, mark and row checksum is checked. Without --repair nothing is changed. Exit code 1 means damage, also
    when it was repaired. No other process may write the store meanwhile.
    """
    reader, _ = open_store(store)
    found = verify(str(reader.store.path), repair=repair)
    damage = [{"path": each.path, "what": each.what, "rows": each.rows, "mended": each.mended} for each in found.damage]
    summary = {
        "path": found.save_dir,
        "ok": found.ok,
        "rows_read": found.num_rows,
        "tiles_read": found.num_tiles,
        "damage": damage,
    }
    text = str(found)
    if not found.ok and not repair:
        text += "\nTo have lost rows computed again: tracer verify --repair, then the run."
    show(as_json, summary, text)
    if not found.ok:
        ctx.exit(FINDING)

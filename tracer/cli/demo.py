"""``tracer demo``: a first look, on data that comes with the package."""

from __future__ import annotations

from pathlib import Path

import click

from tracer.cli.demo_digits import Settings, run
from tracer.cli.help import TaughtCommand
from tracer.cli.output import json_option, show

EXAMPLES = """
tracer demo
tracer demo --quick --output-dir /tmp/digits
tracer self-influence runs/mislabeled_digits/store -k 10
"""


@click.command("demo", cls=TaughtCommand, examples=EXAMPLES)
@click.option(
    "--output-dir",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("runs/mislabeled_digits"),
    show_default=True,
    help="Where checkpoints, store and report go.",
)
@click.option("--flip-rate", default=0.1, show_default=True, help="Share of flipped training labels.")
@click.option("--epochs", type=click.IntRange(min=1), help="Passes over the training images (30).")
@click.option("--proj-dim", type=click.IntRange(min=1), help="Numbers kept of each gradient (4096).")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--quick", is_flag=True, help="Fewer images, epochs and numbers: a few seconds.")
@json_option
def command(
    output_dir: Path, flip_rate: float, epochs: int | None, proj_dim: int | None, seed: int, quick: bool, as_json: bool
) -> None:
    """Find flipped labels among handwritten digits, on data that is built in.

    A tenth of the labels of 1,297 digits (8 by 8 pixels) is flipped. A small conv net is trained on them and recorded
    five times on the way. Self-influence then ranks the training images: flipped labels stand out. Called again, it
    takes up what is there. It also writes a page to look through, with pictures where matplotlib is installed
    (pip install 'tracin[report]').
    """
    settings = Settings.of(seed, flip_rate, epochs, quick)
    dim = proj_dim or (512 if quick else 4096)
    found = run(settings, output_dir, dim, (lambda line: None) if as_json else click.echo)
    show(as_json, found, f"\nNext: tracer top {output_dir / 'store'} --targets 0 -k 5")

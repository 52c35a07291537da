"""``tracer demo``: a first look at the library, on data that is part of the package."""

from __future__ import annotations

from pathlib import Path

import click

from tracer.cli.demo_digits import Settings, run
from tracer.cli.output import ResultCommand, print_result, wants_json


@click.command("demo", cls=ResultCommand)
@click.option(
    "--output-dir", type=click.Path(file_okay=False, path_type=Path), default="runs/mislabeled_digits",
    show_default=True, help="Directory of checkpoints, store and report.",
)  # fmt: skip
@click.option("--flip-rate", default=0.1, show_default=True, help="Share of flipped training labels.")
@click.option("--epochs", type=click.IntRange(min=1), help="Passes over the training images. Default: 30.")
@click.option(
    "--proj-dim", type=click.IntRange(min=1), default=256, show_default=True, help="Size of a projected gradient."
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of data and training.")
@click.option("--quick", is_flag=True, help="Fewer images and epochs: a few seconds.")
def demo(output_dir: Path, flip_rate: float, epochs: int | None, proj_dim: int, seed: int, quick: bool) -> None:
    """Find flipped labels among handwritten digits, on built-in data.

    A tenth of the labels of 1,297 digits (8 by 8 pixels) is flipped. A small convolutional network is trained on them
    and recorded at five epochs. Self-influence then ranks the training images: flipped labels stand out. Run it again
    and it continues from the existing files. It also writes an HTML page, with pictures if matplotlib is installed
    (pip install 'tracin[report]').

    Examples:
        tracer demo
        tracer demo --quick --output-dir /tmp/digits
        tracer self-influence runs/mislabeled_digits/store -k 10
    """
    settings = Settings.for_demo(seed, flip_rate, epochs, quick)
    found = run(settings, output_dir, proj_dim, (lambda line: None) if wants_json() else click.echo)
    print_result(found, f"\nNext: tracer top {output_dir / 'store'} --targets 0 -k 5")

"""Find flipped labels among handwritten digits, and see which training images support and oppose a prediction.

A tenth of the training labels of the digits (8 by 8 pixels, 1,797 of them) is flipped to another digit. A small conv
net is trained on them and recorded a few times on the way. From these checkpoints `tracer.attribute` computes each
training image's self-influence (TracInCP; Pruthi et al. 2020), by which flipped labels stand out, and the proponents
and opponents of each test image.

This is what ``tracer demo`` runs from an installed package. In ``tracer/cli/demo_digits``, ``digits.py`` has the data,
the net and its training, and ``findings.py`` the questions to the store.

Run it: python examples/mislabeled_digits.py
Run it again with the same settings and it resumes: checkpoints and featurized examples are not computed again.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from tracer import InputError
from tracer.cli.demo_digits import Settings, run


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, attribute, print what is found and write the report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output-dir", type=Path, default=Path("runs/mislabeled_digits"))
    parser.add_argument("--flip-rate", type=float, default=0.1, help="share of flipped training labels (0.1)")
    parser.add_argument("--epochs", type=int, help="passes over the training images (30)")
    parser.add_argument("--proj-dim", type=int, default=256, help="numbers stored of each gradient (256)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="fewer images and epochs: a few seconds")
    options = parser.parse_args(arguments)
    try:
        settings = Settings.for_demo(options.seed, options.flip_rate, options.epochs, options.quick)
        found = run(settings, options.output_dir, options.proj_dim)
    except InputError as error:
        parser.error(str(error))
    checked, total = found["checked"][1], found["flipped"]
    by_chance = total * checked / settings.num_train
    assert found["found"]["self-influence"][1] > 2 * by_chance, (
        "self-influence should find flips far better than chance"
    )


if __name__ == "__main__":
    main()

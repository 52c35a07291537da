"""Average attribution over independently trained models, as TRAK does, and measure what each more model brings.

One trained model is one draw: another seed gives other weights and other scores. TRAK (Park et al. 2023, section 3.2)
averages over models that differ by their random numbers alone. To `tracer` they are so many checkpoints of one store,
and ``model_ids`` says over which of them scores are averaged.

The measure is the linear datamodeling score: how well sums of scores rank models that were trained on random halves of
the rows. These are trained too, hundreds of small ones at once. Everything is stored in ``--output-dir``
and taken up by the next call; a larger ``--models`` adds models to the store.

Run it: python examples/trak_ensemble.py
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from run_directory import claim_directory
from torch import Tensor, nn
from vision_data import load_vision

from tracer import Attribution, attribute
from tracer.metrics import LDS, lds
from tracer.retraining import Recipe, random_subsets, retrain, train_models

TASK = "image_classification"
ESTIMATORS = ("trak", "influence", "tracin")
Rows = tuple[Tensor, Tensor]


def make_model() -> nn.Module:
    """Return a perceptron of 4,810 parameters."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def load_rows(num_train: int, num_targets: int, seed: int) -> tuple[Rows, Rows]:
    """Return training rows and targets of the digits, ``(images [N, 1, 8, 8], labels [N])`` each."""
    data = load_vision("digits", None).subset(num_train, num_targets, seed)
    train_images, test_images = (
        torch.as_tensor(images / 255.0, dtype=torch.float32).permute(0, 3, 1, 2)  # [N, 8, 8, 1] to [N, 1, 8, 8]
        for images in (data.train_images, data.test_images)
    )
    return (train_images, torch.as_tensor(data.train_labels)), (test_images, torch.as_tensor(data.test_labels))


def ensemble(train: Rows, recipe: Recipe, count: int, directory: Path) -> list[tuple[Path, float]]:
    """Train models that differ by their seed, or take those that exist.

    Args:
        train: The rows.
        recipe: How each is trained.
        count: How many models.
        directory: The directory of their weights.

    Returns:
        A path and a learning rate for each; only TracIn looks at the rate.
    """
    directory.mkdir(parents=True, exist_ok=True)
    paths = [directory / f"model_{seed:02d}.pt" for seed in range(count)]
    missing = [seed for seed, path in enumerate(paths) if not path.exists()]
    if missing:
        print(f"Training {len(missing)} models on all {len(train[1]):,} rows ...")
        for model in train_models(make_model, TASK, train, recipe, seeds=[1000 + seed for seed in missing]):
            path = paths[model.seed - 1000]
            torch.save(model.state, path.with_suffix(".part"))
            path.with_suffix(".part").replace(path)
    return [(path, recipe.learning_rate) for path in paths]


def ensemble_sizes(count: int) -> list[int]:
    """Return 1, 2, 5, 10 ... up to the number of models.

    >>> ensemble_sizes(8)
    [1, 2, 5, 8]
    """
    return sorted({size for size in (1, 2, 5, 10, 20, 50, count) if size <= count})


def grade(found: Attribution, sizes: Sequence[int], masks: np.ndarray, outputs: np.ndarray) -> dict[str, list[LDS]]:
    """Return the LDS of each estimator for the first so many models.

    Args:
        found: The attribution over all models.
        sizes: How many models.
        masks: ``[S, N]``, the rows of each half.
        outputs: ``[S, M]``, the margins of the models that were trained on them.

    Returns:
        For each estimator one LDS for each size.
    """
    reader, graded = found.tracer, {}
    for estimator in ESTIMATORS:
        scores = [reader.finalize_scores("targets", estimator, list(range(size))) for size in sizes]
        graded[estimator] = [lds(np.asarray(part), masks, outputs) for part in scores]
    return graded


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=Path("runs/trak_ensemble"))
    parser.add_argument("--models", type=int, default=10, help="independently trained models to average over (10)")
    parser.add_argument("--subsets", type=int, default=200, help="random halves that the measure trains on (200)")
    parser.add_argument("--proj-dim", type=int, default=1024, help="numbers stored of each gradient (1024)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="fewer rows, models and subsets: a few seconds")
    options = parser.parse_args(arguments)
    if options.models < 2:
        parser.error(f"--models must be at least 2, to compare with one; got {options.models}")
    if options.quick:
        vars(options).update({"models": 5, "subsets": 40, "proj_dim": 512})
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Train the ensemble and the subsets' models, attribute, and print the LDS for growing ensembles."""
    options = parse(arguments)
    num_train, num_targets, epochs = (300, 40, 20) if options.quick else (1000, 100, 20)
    settings = {"num_train": num_train, "num_targets": num_targets, "epochs": epochs, "seed": options.seed}
    claim_directory(options.output_dir, {**settings, "proj_dim": options.proj_dim})
    train, targets = load_rows(num_train, num_targets, options.seed)
    recipe = Recipe(
        learning_rate=0.1, momentum=0.9, batch_size=25 if options.quick else 50, epochs=epochs, schedule="linear"
    )

    checkpoints = ensemble(train, recipe, options.models, options.output_dir / "models")
    found = attribute(
        make_model(), TASK, train, targets, checkpoints,
        save_dir=options.output_dir / "store", estimator="trak", proj_dim=options.proj_dim, seed=options.seed,
    )  # fmt: skip

    print(f"Training on {options.subsets} random halves of the rows, for the measure ...")
    masks = random_subsets(options.subsets, num_train, seed=options.seed)
    truth = retrain(make_model, TASK, train, targets, masks, recipe, save_dir=options.output_dir / "retrained")
    sizes = ensemble_sizes(options.models)
    graded = grade(found, sizes, masks, truth.outputs)

    print("\nLinear datamodeling score, mean over targets, with 95 % interval over subsets")
    print(f"{'models':<8}" + "".join(f"{name:>24}" for name in graded))
    for column, size in enumerate(sizes):
        cells = (graded[name][column] for name in graded)
        print(
            f"{size:<8}" + "".join(f"{f'{x.mean:.3f} ({x.interval[0]:.3f}, {x.interval[1]:.3f})':>24}" for x in cells)
        )
    means = {
        name: dict(zip(sizes, (round(value.mean, 4) for value in values), strict=True))
        for name, values in graded.items()
    }
    (options.output_dir / "lds.json").write_text(json.dumps(means, indent=2))

    for name in ("trak", "influence"):
        one, many = graded[name][0].mean, graded[name][-1].mean
        assert many > one, f"{name} over {sizes[-1]} models should predict better than over one: {many:.3f}, {one:.3f}"
    tracin = graded["tracin"][-1].mean
    assert many > tracin, f"influence should predict retraining better than TracIn: {many:.3f}, {tracin:.3f}"


if __name__ == "__main__":
    main()

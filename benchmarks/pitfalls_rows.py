"""Pitfalls of what a gradient is taken of: batch statistics, augmented views, and rows that are there twice."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from models import conv_block
from pitfalls_runs import (
    RUN_SEED,
    TASK,
    Settings,
    mean_loss,
    network,
    rank_correlation,
    row_gradients,
    scores_of,
    size,
    study,
)
from quality_methods import Rows
from quality_tasks import digits
from torch import Tensor, nn

from tracer.metrics import removal_correlation
from tracer.retraining import Recipe, retrain, train_models

Row = dict[str, Any]
"""A line of a table, values by column."""

States = Mapping[int, dict[str, Tensor]]
"""State dicts by step."""

BATCH = 20
"""Rows a step."""


def norm_mlp() -> nn.Module:
    """Return an MLP with BatchNorm."""
    return nn.Sequential(nn.Linear(64, 32, bias=False), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 10))


def norm_conv_net() -> nn.Module:
    """Return a conv net with BatchNorm."""
    layers = [nn.Unflatten(1, (1, 8, 8)), conv_block(1, 8), conv_block(8, 16, pool=True)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(256, 10))


def batch_norm(settings: Settings, steps: Sequence[int] = (0, 1, 5, 15, 30, 60, 150)) -> list[Row]:
    """Compare gradients in eval mode, which scores are made of, with those that training used.

    Args:
        settings: How much is run.
        steps: After which steps weights are kept.

    Returns:
        A row for each network and step, those of the MLP with the LDS of that checkpoint alone, and one for all.
    """
    data = digits(settings.num_train, settings.num_targets)
    rows: list[Row] = []
    for name, make_model in (("conv net", norm_conv_net), ("MLP", norm_mlp)):
        model, kept = make_model(), train_steps(make_model, data.train, steps)
        settled = {step: settle(model, state, data.train[0]) for step, state in kept.items()}
        for step in steps:
            row: Row = {"network": name, "step": step}
            for key, states in (("", kept), ("_settled", settled)):
                model.load_state_dict(states[step])
                row |= {f"{column}{key}": value for column, value in against_training(model, data.train).items()}
            rows.append(row)
    recipe = Recipe(learning_rate=0.1, batch_size=BATCH, epochs=max(1, steps[-1] * BATCH // settings.num_train))
    truth = study(settings, norm_mlp, data.train, data.targets, recipe, ())
    rows.append({"network": name, "step": "all"})
    choices = [*([number] for number in range(len(steps))), None]
    for column, states in (("lds", kept), ("lds_settled", settled)):
        pairs = [(state, 1.0) for state in states.values()]
        with scores_of(model, data.train, data.targets, pairs, storage="none") as stored:
            for row, ids in zip(rows[-len(choices) :], choices, strict=True):
                grade = truth.grade(stored.scores("tracin", ids))
                row[column], row[f"{column}_interval"] = grade.mean, grade.interval
    return rows


def train_steps(make_model: Callable[[], nn.Module], train: Rows, steps: Sequence[int]) -> dict[int, dict[str, Tensor]]:
    """Train with plain SGD of rate 0.1 and return the state dicts after some of the steps."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make_model()
    optimizer, generator = torch.optim.SGD(model.parameters(), lr=0.1), torch.Generator().manual_seed(0)
    kept = {0: copy.deepcopy(model.state_dict())}
    order: list[Tensor] = []
    for step in range(1, steps[-1] + 1):
        order = order or list(torch.randperm(len(train[1]), generator=generator).split(BATCH))
        rows = order.pop()
        optimizer.zero_grad()
        F.cross_entropy(model(train[0][rows]), train[1][rows]).backward()
        optimizer.step()
        kept[step] = copy.deepcopy(model.state_dict())
    return {step: kept[step] for step in steps}


def settle(model: nn.Module, state: dict[str, Tensor], inputs: Tensor) -> dict[str, Tensor]:
    """Return a state dict whose running statistics are the mean of those of all batches at these very weights.

    It is what ``torch.optim.swa_utils.update_bn`` does.
    """
    model.load_state_dict(state)
    torch.optim.swa_utils.update_bn(inputs.split(BATCH), model)
    return copy.deepcopy(model.state_dict())


def against_training(model: nn.Module, train: Rows, num_batches: int = 5) -> Row:
    """Compare the gradients of rows in eval mode with those of the same rows within a batch of training.

    Args:
        model: The network with the weights of a checkpoint.
        train: The training rows.
        num_batches: How many batches are looked at.

    Returns:
        The loss in eval mode; the mean cosine of the two gradients of a row, the median of the ratio of their norms,
        and the mean cosine of their sums over a batch, which is the direction of a step.
    """
    order = torch.randperm(len(train[1]), generator=torch.Generator().manual_seed(1))
    cosines, ratios, steps = [], [], []
    for rows in order.split(BATCH)[:num_batches]:
        batch = train[0][rows], train[1][rows]
        scored, used = row_gradients(model.eval(), batch), row_gradients(model.train(), batch)
        cosines.append(F.cosine_similarity(scored, used))
        ratios.append(scored.norm(dim=1) / used.norm(dim=1))
        steps.append(F.cosine_similarity(scored.sum(0), used.sum(0), dim=0))
    return {
        "loss": mean_loss(model.eval(), train),
        "cosine": torch.cat(cosines).mean().item(),
        "ratio": torch.cat(ratios).median().item(),
        "step_cosine": torch.stack(steps).mean().item(),
    }


class Shifted(nn.Module):
    """A network that in training mode sees each image moved by up to one pixel, another way each time.

    Args:
        inner: From inputs ``[B, 64]`` to logits.
    """

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        """``[B, 64]`` to logits ``[B, 10]``."""
        return self.inner(shifted(x, torch.randint(0, 3, (len(x), 2))) if self.training else x)


def shifted(x: Tensor, by: Tensor) -> Tensor:
    """Return images ``[B, 64]`` of 8 by 8 pixels moved by ``[B, 2]`` pixels less one; what comes in is black."""
    padded, pixels = F.pad(x.view(-1, 8, 8), (1, 1, 1, 1)), torch.arange(8)
    down, right = by[:, :1] + pixels, by[:, 1:] + pixels  # [B, 8]
    return padded[torch.arange(len(x))[:, None, None], down[:, :, None], right[:, None, :]].flatten(1)


def shifted_network() -> nn.Module:
    """Return the network of most runs, which is trained on shifted images."""
    return Shifted(network())


def augmentation(
    settings: Settings, num_views: int = 16, epochs: Sequence[int] = (1, 2, 5, 10, 20, 40), rate: float = 0.3
) -> list[Row]:
    """Score rows as they are, and as means over views like those that training saw.

    Args:
        settings: How much is run.
        num_views: The most views that are averaged. As many others, together, are what scores are compared with.
        epochs: The checkpoints, the last one the end of training.
        rate: The learning rate.

    Returns:
        A row for each number of views, with all checkpoints and with the last alone.
    """
    data = digits(settings.num_train, settings.num_targets)
    (x, y), targets = data.train, data.targets
    recipe = Recipe(learning_rate=rate, batch_size=BATCH, epochs=epochs[-1])
    found = study(settings, shifted_network, data.train, targets, recipe, epochs)
    generator, num_rows = torch.Generator().manual_seed(0), len(y)
    views = [shifted(x, torch.randint(0, 3, (num_rows, 2), generator=generator)) for _ in range(2 * num_views)]
    stacked = torch.cat([x, *views]), y.repeat(1 + 2 * num_views)
    checkpoints = [(checkpoint.state, 1.0) for checkpoint in found.checkpoints]
    rows: list[Row] = []
    with scores_of(shifted_network(), stacked, targets, checkpoints, storage="none") as stored:
        for chosen, ids in ((f"all {len(epochs)}", None), ("the last", [len(epochs) - 1])):
            of_views = {e: stored.scores(e, ids).reshape(1 + 2 * num_views, num_rows, -1) for e in ("tracin", "cosine")}
            reference = of_views["tracin"][1 + num_views :].mean(0)
            plain = found.grade(of_views["tracin"][0])
            for count in (0, 1, 4, num_views):
                taken = {e: all_[1 : 1 + count].mean(0) if count else all_[0] for e, all_ in of_views.items()}
                label = f"mean of {count} views" if count > 1 else "one view" if count else "as they are"
                row: Row = {"checkpoints": chosen, "rows": label}
                for estimator, values in taken.items():
                    grade = found.grade(values)
                    row[estimator], row[f"{estimator}_interval"] = grade.mean, grade.interval
                    if estimator == "tracin" and count:
                        row["gain"] = "{:+.3f} to {:+.3f}".format(*grade.difference(plain))
                row["same"] = rank_correlation(taken["tracin"], reference)
                row["size"] = size(taken["tracin"]) / size(reference)
                rows.append(row)
    return rows


def linear() -> nn.Module:
    """Return softmax regression, whose loss is convex: training without a row ends where it should."""
    return nn.Linear(64, 10)


def duplicates(settings: Settings, copies: Sequence[int] = (1, 2, 4, 8), num_rows: int = 10) -> list[Row]:
    """Add copies of some rows, and compare scores with training without one copy, and without all of them.

    Args:
        settings: How much is run; of its rows two thirds.
        copies: How often the rows are there.
        num_rows: How many rows are copied; as many others, which are there once, are left out too.

    Returns:
        Two rows for each number of copies.
    """
    data = digits(settings.num_train * 2 // 3, settings.num_targets)
    base = len(data.train[1])
    chosen = np.random.default_rng(0).permutation(base)[: 2 * num_rows]
    copied, single = chosen[:num_rows], chosen[num_rows:]
    recipe = Recipe(learning_rate=0.5, batch_size=10**6, epochs=200)
    rows: list[Row] = []
    for count in copies:
        train = tuple(torch.cat([part, part[copied].repeat(count - 1, *(1,) * (part.ndim - 1))]) for part in data.train)
        places = [[row, *range(base + number, len(train[1]), num_rows)] for number, row in enumerate(copied.tolist())]
        removals = {
            "one": [[row] for row in copied.tolist()],
            "all": places,
            "others": [[row] for row in single.tolist()],
        }
        changes = removal_changes(train, data.targets, removals, recipe)
        (run,) = train_models(
            linear, TASK, train, recipe, seeds=[RUN_SEED], checkpoint_epochs=[50, 100, 200], progress=False
        )
        checkpoints = [(checkpoint.state, 1.0) for checkpoint in run.checkpoints]
        with scores_of(linear(), train, data.targets, checkpoints) as stored:
            estimates = {e: stored.scores(e, target="output") for e in ("tracin", "trak", "influence")}
        for left_out in ("one", "all"):
            row: Row = {"copies": count, "left_out": left_out, "true": size(changes[left_out])}
            true = np.concatenate([changes[left_out], changes["others"]])
            for estimator, values in estimates.items():
                row[estimator] = size(np.stack([values[group].sum(0) for group in removals[left_out]]))
                removed = removals[left_out] + removals["others"]
                row[f"{estimator}_pearson"] = removal_correlation(values, removed, true).pearson
            rows.append(row)
    first = dict(rows[0])  # which becomes 1 itself
    for row in rows:
        row |= {column: row[column] / first[column] for column in ("true", "tracin", "trak", "influence")}
    return rows


def removal_changes(
    train: Rows, targets: Rows, removals: Mapping[str, list[list[int]]], recipe: Recipe
) -> dict[str, np.ndarray]:
    """Return how much rows raise the targets' margins, by training without them.

    Args:
        train: The training rows.
        targets: The targets.
        removals: By name, the groups of rows that are left out.
        recipe: How softmax regression is trained.

    Returns:
        For each name ``[groups, M]``: the margin with all rows minus that without the group.
    """
    groups = [group for several in removals.values() for group in several]
    masks = np.ones((1 + len(groups), len(train[1])), dtype=bool)
    for mask, group in zip(masks[1:], groups, strict=True):
        mask[group] = False
    outputs = retrain(linear, TASK, train, targets, masks, recipe, seeds=[0], paired=True, progress=False).outputs
    changes = np.split(outputs[0] - outputs[1:], np.cumsum([len(several) for several in removals.values()])[:-1])
    return dict(zip(removals, changes, strict=True))

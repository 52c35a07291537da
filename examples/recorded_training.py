"""The training loop that examples share: plain SGD with a recorder, taken up where it came to its end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from tracer import CheckpointRecorder, StoreError, load_checkpoints

Loss = Callable[[Tensor, Tensor], Tensor]


def train_or_reuse(
    model: nn.Module,
    train: Dataset,
    directory: Path,
    *,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    loss: Loss = nn.functional.cross_entropy,
    seed: int = 0,
    keep: int = 5,
) -> list[tuple[Path, float]]:
    """Train with plain SGD, as TracIn assumes, and keep checkpoints.

    A run that was interrupted continues after its last checkpoint, with the rows in the order that they would have had;
    one that has ended is not made again.

    Args:
        model: The model, which is trained in place.
        train: Rows ``(x, y)``.
        directory: Where checkpoints go.
        epochs: Passes over the rows.
        batch_size: Rows a step.
        learning_rate: Constant.
        loss: Of outputs and labels of a batch, a mean.
        seed: Of the order of rows.
        keep: How many checkpoints, evenly over the run.

    Returns:
        The path of each checkpoint and the learning rate of its steps, as `attribute` takes them.
    """
    finished = directory / "finished"  # written last: it exists only if training ended
    if finished.exists():
        checkpoints = load_checkpoints(directory)
        print(f"Reusing the {len(checkpoints)} checkpoints in {directory}.")
        return checkpoints
    try:
        load_weights(model, load_checkpoints(directory)[-1][0])
    except StoreError:
        pass  # nothing was recorded yet
    order = torch.Generator()
    loader = DataLoader(train, batch_size, shuffle=True, generator=order)
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate)  # without a state that would have to be saved
    every = -(-epochs * len(loader) // keep)
    model.train()
    with CheckpointRecorder(model, optimizer, directory, every=every, resume=True) as recorder:
        done = recorder.steps
        for epoch in range(done // len(loader), epochs):
            order.manual_seed(1000 * seed + epoch)
            total = torch.zeros(())
            for batch, (x, y) in enumerate(loader):
                if epoch * len(loader) + batch < done:
                    continue
                value = loss(model(x), y)
                optimizer.zero_grad()
                value.backward()
                optimizer.step()
                recorder.step(loss=value, epoch=epoch)
                total += value.detach() / len(loader)
            if (epoch + 1) % max(1, epochs // 5) == 0:
                print(f"  epoch {epoch + 1:>3} of {epochs}: mean loss {total:.3f}", flush=True)
    model.eval()
    finished.touch()
    return load_checkpoints(directory)


def load_weights(model: nn.Module, path: Path) -> None:
    """Put a checkpoint of the recorder into a model, in eval mode."""
    model.load_state_dict(load_file(path))
    model.eval()

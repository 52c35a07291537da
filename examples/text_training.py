"""The training loop of the text examples, with a recorder, taken up where it came to its end."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from tracer import CheckpointRecorder, load_checkpoints


def train_or_reuse(
    model: nn.Module,
    rows: Dataset,
    directory: Path,
    *,
    collate: Callable[[list], Any],
    loss: Callable[[nn.Module, Any], Tensor],
    epochs: int,
    batch_size: int,
    learning_rate: float,
    settings: Mapping[str, Any],
    adam: bool = False,
    seed: int = 0,
    keep: int = 4,
) -> list[tuple[Path, float]]:
    """Train the parameters that require a gradient and keep checkpoints; a run that came to its end is not made again.

    Args:
        model: The model, which has the last checkpoint's weights afterwards, and is in eval mode.
        rows: The rows.
        directory: Where checkpoints go.
        collate: Makes a batch of rows.
        loss: Of the model and a batch, a mean.
        epochs: Passes over the rows.
        batch_size: Rows a step.
        learning_rate: Constant.
        settings: What the weights depend on, as plain JSON values; a run with others is not reused.
        adam: Train with AdamW and keep its second moments; else with plain SGD, as TracIn assumes.
        seed: Of the order of rows.
        keep: About how many checkpoints, evenly over the run.

    Returns:
        The path of each checkpoint and the learning rate of its steps, as `attribute` takes them.

    Raises:
        SystemExit: The directory holds a run with other settings.
    """
    finished = directory / "finished.json"  # written last: it exists only if training ended
    ours = json.loads(json.dumps({**settings, "epochs": epochs, "batch_size": batch_size, "rate": learning_rate}))
    if finished.exists():
        theirs = json.loads(finished.read_text())
        if theirs != ours:
            raise SystemExit(f"{directory} holds a run of other settings: {theirs}.\nThese are: {ours}.\nRemove it.")
        checkpoints = load_checkpoints(directory)
        print(f"Reusing {len(checkpoints)} checkpoints of {directory}.")
        load_model(model, checkpoints[-1][0])
        model.eval()
        return checkpoints
    generator = torch.Generator().manual_seed(seed)
    loader: DataLoader = DataLoader(rows, batch_size, shuffle=True, collate_fn=collate, generator=generator)
    trainable = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    optimizer = (torch.optim.AdamW if adam else torch.optim.SGD)(trainable, lr=learning_rate)
    model.train()
    every = max(1, epochs * len(loader) // keep)
    with CheckpointRecorder(model, optimizer, directory, every=every, second_moments=adam) as recorder:
        for epoch in range(epochs):
            total = 0.0
            for batch in loader:
                value = loss(model, batch)
                optimizer.zero_grad()
                value.backward()
                optimizer.step()
                recorder.step(loss=value.item(), epoch=epoch)
                total += value.item() / len(loader)
            if epoch + 1 in (1, epochs) or not (epoch + 1) % 5:
                print(f"  epoch {epoch + 1:>2} of {epochs}: mean loss {total:.3f}", flush=True)
    model.eval()
    finished.write_text(json.dumps(ours))
    return load_checkpoints(directory)

"""Whether a model keeps the documents of a block apart."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from tracer.data.batches import select_samples, to_device
from tracer.data.text.source import TextSource
from tracer.data.token_tasks import LanguageModeling
from tracer.errors import InputError


@torch.no_grad()
def check_isolation(model: nn.Module, source: TextSource) -> None:
    """Raise InputError if the outputs at a block's last document change with the tokens before it."""
    several = np.flatnonzero(source.rows.bounds[:, 2] - source.rows.bounds[:, 1] > 1)
    if not source.rows.isolated or not len(several):
        return
    batch, _ = next(iter(source.batches(several[:1])))
    device = next(model.parameters()).device
    batch = to_device(select_samples(batch, torch.tensor([0]), len(batch["labels"])), device)
    last = batch["segment_ids"] == batch["segment_ids"].max()
    other = {**batch, "input_ids": torch.where(last, batch["input_ids"], batch["input_ids"].flip(1) ^ 1)}
    training = model.training
    task = LanguageModeling("sum")
    labels = batch["labels"].masked_fill(~last, -100)
    try:
        model.eval()
        one, two = (task.outputs(model, {**each, "labels": labels}).loss.double() for each in (batch, other))
    finally:
        model.train(training)
    if bool((one - two).abs().max() > 1e-5 * (1 + one.abs().max())):
        raise InputError(
            f"unit='block' with packing that keeps documents apart expects a model that tells them by position_ids; "
            f"{type(model).__name__} sees the documents before. Pass unit='document', which gives each document alone, "
            f"or packing='wrapped' if the model was trained on such blocks."
        )

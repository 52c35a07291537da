"""Scores of language models token by token: the tokens of a training example that a target's score comes from.

The loss of an example depends on the parameters through the model's logits ``z [B, T, V]``, one vector for each
position. So the inner product of its gradient with any vector v of the parameters' shape is a sum over positions,
``<∇L_b, v> = Σ_t <∂L_b/∂z_bt, J_bt v>``, ``J_bt v`` being the change of ``z_bt`` along v. With v the gradient of a
target's loss it is the TracIn score, split exactly. One forward pass in forward mode gives ``J v`` at all positions of
a batch (`torch.autograd.forward_ad`); no per-token gradient is ever built.

Layout: B examples of T positions; logits ``[B, T, V]``; a number for each position is ``[B, T]``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tracer._core.sharding import fsdp_modules
from tracer._core.validation import check_choice, check_device, check_model, check_rate, complete_rates
from tracer.api.checkpoint_sources import check_distinct, checkpoint_pairs
from tracer.api.token_parts import by_label, differentiable, loss_gradient, squared, token_parts
from tracer.data.batches import check_batch_size, count_samples, select_samples, to_device
from tracer.data.named_tasks import make_task
from tracer.errors import InputError, NonFiniteError
from tracer.gradients import ParamSelection, isolated, select_parameters
from tracer.gradients.preconditioning import DiagonalPreconditioner
from tracer.training.adam import read_training_checkpoint
from tracer.training.lend_weights import LoadedWeights, weights_in
from tracer.types import Batch, Checkpoint


@torch.inference_mode(False)
def token_influence(
    model: nn.Module,
    task: Any,
    train_batch: Batch,
    target_batch: Batch,
    checkpoints: Sequence[Checkpoint | tuple[Checkpoint, float]],
    *,
    params: ParamSelection = None,
    preconditioner: str | None = None,
    device: str | torch.device | None = None,
) -> np.ndarray:
    """Split the exact TracIn scores of a few training examples on a few targets over the training examples' tokens.

    ``score(z, z') = Σ_c η_c Σ_t <∇l_ct(z), ∇L_c(z')>`` with ``L(z) = Σ_t l_t(z)``: the score of TracInCP (Pruthi et al.
    2020) with the training example's loss written as a sum over tokens. The sum of the parts is the score of
    ``attribute(..., projector="none")``, up to rounding; a part is positive if learning to predict that token lowered
    the target's loss. To split over the *targets'* tokens, swap the two batches.

    It costs, for each target and checkpoint, a forward and backward and a forward in forward mode of the training
    batch: pass the examples that `Attribution.top` found rather than all. The model is not changed.

    Args:
        model: The model, whose logits are ``[B, T, V]``.
        task: As for `Tracer`: ``"language_modeling"``, or any task whose loss depends on the parameters only through
            the logits of one call of the model.
        train_batch: The training examples, one batch as the task takes it.
        target_batch: The targets, one batch as the task takes it.
        checkpoints: State dicts or paths, each alone or as ``(checkpoint, learning rate)``, as for `attribute`.
        params: The selected parameters, as for `Tracer`. Default: all trainable ones.
        preconditioner: ``adam`` or None, as for `Tracer`.
        device: The device to compute on. Default: that of the model.

    Returns:
        ``[num_targets, num_rows, T]``, float64. For language modelling ``[..., t]`` belongs to the t-th label, the
        token being predicted: the first of an example whose labels are shifted inside has no prediction. Tokens that
        are not predicted (label -100, padding) have 0. For other tasks ``[..., t]`` belongs to the t-th position of the
        logits.

    Raises:
        InputError: If there are no checkpoints, only some have a learning rate, or the model is sharded.
        BatchError: If a batch does not fit the task, or the logits have no position.
        GradientError: If the task's loss does not come from the logits alone, or an operation can be differentiated
            neither forward nor twice.
        NonFiniteError: If a part is NaN or infinite.

    >>> model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9))
    >>> tokens = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    >>> token_influence(model, "language_modeling", tokens, tokens[:1], [(model.state_dict(), 0.1)]).shape
    (1, 2, 4)
    """
    check_model(model)
    if fsdp_modules(model):
        raise InputError("model is sharded by fully_shard; token_influence takes the plain model, in one process.")
    task, place = make_task(task), check_device(device, model)
    names = select_parameters(model, params)
    if preconditioner is not None:
        check_choice("preconditioner", preconditioner, ("adam",))
    pairs = _with_rates(checkpoints)
    num_rows, num_targets = count_samples(train_batch), count_samples(target_batch)
    check_batch_size(train_batch, num_rows)
    check_batch_size(target_batch, num_targets)
    train_batch, target_batch = to_device(train_batch, place), to_device(target_batch, place)
    targets = [select_samples(target_batch, torch.tensor([row]), num_targets) for row in range(num_targets)]
    total: Tensor | None = None
    for checkpoint, rate in pairs:
        read = read_training_checkpoint(checkpoint, model, names, preconditioner)
        weights = LoadedWeights(model, read.state, place, read.scales())
        scaled = DiagonalPreconditioner(weights.scales) if weights.scales is not None else None
        with weights_in(model, weights), isolated(model, names, place), differentiable(model, place):
            gradients = [loss_gradient(model, task, one, names) for one in targets]
            directions = [gradient if scaled is None else squared(gradient, scaled) for gradient in gradients]
            parts = torch.stack([token_parts(model, task, train_batch, direction) for direction in directions])
        total = rate * parts if total is None else total + rate * parts
    assert total is not None  # there is a checkpoint
    _check_finite(total)
    return by_label(task, model, train_batch, total).cpu().numpy()


def _with_rates(checkpoints: Any) -> list[tuple[Checkpoint, float]]:
    """Return checkpoints with their learning rates; 1 for all if none has any."""
    pairs = list(checkpoint_pairs(checkpoints))
    given = [check_rate(rate) for _, rate in pairs]
    rates = complete_rates(range(len(pairs)), given, "Pass (checkpoint, learning_rate) for all, or for none.")
    check_distinct([checkpoint for checkpoint, _ in pairs])
    return [(checkpoint, rate) for (checkpoint, _), rate in zip(pairs, rates, strict=True)]


def _check_finite(parts: Tensor) -> None:
    bad = (~parts.isfinite()).any(2).nonzero()
    if len(bad):
        target, row = bad[0].tolist()
        raise NonFiniteError(
            f"{len(bad)} pairs have scores that are NaN or infinite, first target {target} with train row {row} of the "
            f"batches; leave such rows out, or look at the checkpoints' losses."
        )

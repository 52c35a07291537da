"""The field's methods behind one signature: from a `Case` to influence scores ``[N, M]``.

``N`` training rows, ``M`` targets, ``C`` checkpoints, ``k`` projected values. Scores are ``[train, target]``, positive
for a proponent: training on the row lowered the target's loss. Every library gets the same model, rows and checkpoints
and is called as its own documentation calls it; the defaults come first, then settings that a user might try.

- captum 0.9: TracInCP, TracInCPFast (last layer), ArnoldiInfluenceFunction (Schioppa et al. 2022) and
  NaiveInfluenceFunction (explicit Hessian, top eigenvectors). Influence functions take the last checkpoint.
- traker 0.3: TRAK (Park et al. 2023). It divides the inverse of each checkpoint's kernel by the mean of its absolute
  values, which the paper does not, so checkpoints have other weights, and it computes in float16 by default. Its
  features are divided by the square root of the number of parameters: a ridge of ours, divided by that number, is
  its ``lambda_reg``.
- dattri 0.3: see `quality_dattri`; kronfluence 1.0: see `quality_kronfluence`; bergson 2.5: see
  `quality_bergson`; logix 0.1: see `quality_logix`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fidelity import rank_correlation
from quality_bergson import bergson_methods
from quality_dattri import dattri_methods
from quality_kronfluence import kronfluence_methods
from quality_logix import logix_methods
from quality_methods import (
    Case,
    Found,
    Method,
    Runner,
    at_most,
    clock,
    log_odds,
    method,
    needs_last_layer,
    quiet,
    row_losses,
)
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from tracer import attribute

RIDGES = (1e-2, 0.1, 1.0, 10.0, 100.0, 1e3, 1e4)
"""What is tried as the ridge of traker beside its default of 0."""


# captum


class SumLoss(nn.Module):
    """The sum of the rows' losses; captum reads ``reduction``."""

    reduction = "sum"

    def forward(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Return the sum over the batch, a scalar."""
        return row_losses(outputs, labels).sum()


class EachLoss(nn.Module):
    """The loss of each row."""

    reduction = "none"

    def forward(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Return the losses, ``[B]``."""
        return row_losses(outputs, labels)


def captum_options(case: Case) -> dict[str, Any]:
    """Return what all of captum's classes take: fast mode where its rules own all parameters."""
    fast = all(type(module) in (nn.Linear, nn.Conv2d) for module in case.layers)
    return {
        "checkpoints_load_func": load_state(case),
        "loss_fn": SumLoss() if fast else EachLoss(),
        "batch_size": len(case.train[0]) if fast else case.batch_size,  # the slow mode holds the graphs of a batch
        "sample_wise_grads_per_batch": fast,
    }


def load_state(case: Case) -> Callable[[nn.Module, str], float]:
    """Return captum's loader: it takes a checkpoint's number as a string and returns its learning rate."""

    def load(model: nn.Module, number: str) -> float:
        state, learning_rate = case.checkpoints[int(number)]
        model.load_state_dict(state)
        return learning_rate

    return load


def captum_tracin(case: Case, folder: Path) -> Found:
    """TracInCP over all parameters, exact."""
    from captum.influence import TracInCP

    numbers = [str(number) for number in range(len(case.checkpoints))]
    return captum_found(TracInCP(case.model, TensorDataset(*case.train), numbers, **captum_options(case)), case)


def captum_tracin_fast(case: Case, folder: Path) -> Found:
    """TracInCPFast: TracInCP of the last linear layer."""
    from captum.influence import TracInCPFast

    numbers = [str(number) for number in range(len(case.checkpoints))]
    options = captum_options(case) | {"loss_fn": SumLoss()}
    del options["sample_wise_grads_per_batch"]
    layer = case.model.get_submodule(case.last_layer)
    return captum_found(TracInCPFast(case.model, layer, TensorDataset(*case.train), numbers, **options), case)


def captum_arnoldi(case: Case, folder: Path, **options: Any) -> Found:
    """ArnoldiInfluenceFunction at the last checkpoint."""
    from captum.influence._core.arnoldi_influence_function import ArnoldiInfluenceFunction  # 0.9 exports it nowhere

    data, last = TensorDataset(*case.train), str(len(case.checkpoints) - 1)
    return captum_found(ArnoldiInfluenceFunction(case.model, data, last, **captum_options(case), **options), case)


def captum_naive(case: Case, folder: Path, **options: Any) -> Found:
    """NaiveInfluenceFunction at the last checkpoint."""
    from captum.influence import NaiveInfluenceFunction

    data, last = TensorDataset(*case.train), str(len(case.checkpoints) - 1)
    return captum_found(NaiveInfluenceFunction(case.model, data, last, **captum_options(case), **options), case)


def captum_found(influence: Any, case: Case) -> Found:
    """Ask one of captum's objects for the matrix, and keep the question of self-influence for later."""
    scores = influence.influence(case.targets, show_progress=False).detach().T.numpy()
    return Found("", scores, suspicion=lambda: influence.self_influence().detach().numpy())


# traker


def traker_of(case: Case, folder: Path, **options: Any) -> Any:
    """Featurize training rows and targets with traker, and finalize the features."""
    from trak import TRAKer

    task = sequence_output() if case.task == "language_modeling" else "image_classification"
    (x, y), (num_train, num_targets) = case.train, case.sizes
    traker = TRAKer(case.model, task, num_train, save_dir=folder, device="cpu", logging_level=logging.ERROR, **options)
    for number, (state, _) in enumerate(case.checkpoints):
        traker.load_checkpoint(state, model_id=number)
        for batch in zip(x.split(case.batch_size), y.split(case.batch_size), strict=True):
            traker.featurize(batch, num_samples=len(batch[1]))
    traker.finalize_features()
    traker_targets(traker, case, "targets", case.targets, num_targets)
    return traker


def traker_targets(traker: Any, case: Case, name: str, rows: tuple[Tensor, Tensor], count: int) -> None:
    """Featurize rows as targets of an experiment."""
    for number, (state, _) in enumerate(case.checkpoints):
        traker.start_scoring_checkpoint(name, state, model_id=number, num_targets=count)
        for batch in zip(*(column.split(case.batch_size) for column in rows), strict=True):
            traker.score(batch, num_samples=len(batch[1]))


def sequence_output() -> Any:
    """Return a traker output for language models, which it lacks: the log odds of a sequence's mean probability.

    With L the mean loss of a sequence's tokens and p = exp(-L), f = log(p / (1 - p)) and Q = 1 - p, as dattri's
    language model example has it.
    """
    from trak.modelout_functions import AbstractModelOutput

    class SequenceOutput(AbstractModelOutput):
        """Sequences as rows."""

        def __init__(self) -> None:
            """Do nothing; traker demands it."""

        @staticmethod
        def get_output(model: nn.Module, weights: Any, buffers: Any, tokens: Tensor, labels: Tensor) -> Tensor:
            """Return f of one row."""
            outputs = torch.func.functional_call(model, (weights, buffers), tokens.unsqueeze(0))
            return log_odds(row_losses(outputs, labels.unsqueeze(0))).sum()

        def get_out_to_loss_grad(self, model: nn.Module, weights: Any, buffers: Any, batch: Any) -> Tensor:
            """Return Q of a batch, ``[B, 1]``."""
            outputs = torch.func.functional_call(model, (weights, buffers), batch[0])
            return -torch.expm1(-row_losses(outputs, batch[1])).detach().unsqueeze(-1)

    return SequenceOutput()


def run_traker(name: str, settings: Sequence[dict[str, Any]] = ({},), ensemble: bool = False, **options: Any) -> Runner:
    """Return a runner of traker's TRAK: features are made once, and finalized again for each further setting.

    Args:
        name: The method's.
        settings: ``{}`` for the default ridge of 0, or ``{"lambda_reg": ridge}``.
        ensemble: Whether all runs' checkpoints are taken.
        **options: As TRAKer takes them.

    Returns:
        The runner.
    """

    def runner(case: Case, folder: Path) -> list[Found]:
        case, results = case.copied(checkpoints=case.ensemble if ensemble else case.checkpoints), []
        with quiet():
            start = clock()
            traker = traker_of(case, folder, **options)
            featurizing = clock() - start
            for setting in settings:
                start = clock()
                if setting:
                    traker_refinalize(traker, **setting)
                scores = np.array(traker.finalize_scores("targets"), dtype=np.float64)
                seconds = featurizing + clock() - start
                suspicion = traker_self_influence(traker, case, setting)
                results.append(Found(name, scores, seconds, traker_bytes(folder, case), suspicion, setting))
        return results

    return runner


def traker_self_influence(traker: Any, case: Case, setting: dict[str, Any]) -> Callable[[], np.ndarray]:
    """Return a function that scores the training rows as targets and takes the diagonal, ``[N]``."""

    def compute() -> np.ndarray:
        traker_refinalize(traker, **setting)
        if "train" not in traker.saver.experiments:
            traker_targets(traker, case, "train", case.train, case.sizes[0])
        return np.diagonal(np.array(traker.finalize_scores("train"), dtype=np.float64)).copy()

    return compute


def traker_refinalize(traker: Any, lambda_reg: float = 0.0) -> None:
    """Finalize the features again with another ridge; ``TRAKer.finalize_features`` does so only once."""
    computer, saver = traker.score_computer, traker.saver
    computer.lambda_reg = lambda_reg
    for model_id in saver.model_ids:
        saver.load_current_store(model_id)
        gradients = torch.as_tensor(saver.current_store["grads"])
        saver.current_store["features"][:] = computer.get_x_xtx_inv(gradients, computer.get_xtx(gradients))


def traker_bytes(folder: Path, case: Case) -> float:
    """Return the bytes that traker stores for a training row: gradients, features and slopes of all checkpoints."""
    arrays = [path for name in ("grads", "features", "out_to_loss") for path in folder.glob(f"*/{name}.mmap")]
    return sum(path.stat().st_size for path in arrays) / case.sizes[0]


def trak_formula(
    train: Sequence[np.ndarray],
    targets: Sequence[np.ndarray],
    loss_grads: Sequence[np.ndarray],
    ridge: float,
    rescale: bool = False,
) -> np.ndarray:
    """Compute TRAK (Park et al. 2023) from features, in float64: the reference.

    Args:
        train: Φ of each checkpoint, ``[N, k]``.
        targets: Of each checkpoint, ``[M, k]``.
        loss_grads: 1 - p of each checkpoint's training rows, ``[N]``.
        ridge: λ, added to the diagonal of ΦᵀΦ.
        rescale: Divide each inverse by the mean of its absolute values, as traker does.

    Returns:
        ``mean_c[φ(ΦᵀΦ + λI)⁻¹φ'] · mean_c[1 - p]``, ``[N, M]``.
    """
    kernels = []
    for phi, target in zip(train, targets, strict=True):
        phi, target = phi.astype(np.float64), target.astype(np.float64)
        inverse = np.linalg.inv(phi.T @ phi + ridge * np.eye(phi.shape[1]))
        kernels.append(phi @ (inverse / np.abs(inverse).mean() if rescale else inverse) @ target.T)
    return np.mean(kernels, axis=0) * np.mean(loss_grads, axis=0).reshape(-1, 1)


def traker_agreement(case: Case, folder: Path, proj_dim: int = 256, ridge: float = 1.0) -> dict[str, float]:
    """Compare traker's scores with the formula on traker's own features.

    Args:
        case: What is scored.
        folder: Where traker may store.
        proj_dim: k.
        ridge: As traker takes it.

    Returns:
        The rank correlation over training rows, mean over targets: of one checkpoint, of all with traker's rescaling
        in the formula, and of all without it.
    """
    agreements = {}
    first = case.copied(checkpoints=case.checkpoints[-1:])
    for name, chosen in (("one", first), ("all", case)):
        with quiet():
            options = {"proj_dim": proj_dim, "use_half_precision": False}
            traker = traker_of(chosen.copied(), folder / name, **options)
            traker_refinalize(traker, ridge)
            scores = np.array(traker.finalize_scores("targets"), dtype=np.float64)
        features: tuple[list, list, list] = ([], [], [])
        for number in range(len(chosen.checkpoints)):
            traker.saver.load_current_store(number)
            traker.saver.load_current_store(number, "targets", case.sizes[1])
            store = traker.saver.current_store
            columns = store["grads"], store["targets_grads"], store["out_to_loss"]
            for kept, values in zip(features, columns, strict=True):
                kept.append(np.array(values, dtype=np.float64))
        for rescale in (False, True):
            formula = trak_formula(*features, traker.score_computer.lambda_reg, rescale)
            agreements[name + (", rescaled" if rescale else "")] = rank_correlation(formula, scores)
    return agreements


def exact_agreement(case: Case, folder: Path, ridge: float = 1.0) -> float:
    """Compare traker with tracer on whole gradients of the last checkpoint, in float32.

    Args:
        case: What is scored.
        folder: Where both may store.
        ridge: λ as tracer takes it; traker's gradients are divided by the square root of the number of parameters.

    Returns:
        The rank correlation over training rows, mean over targets.
    """
    from trak.projectors import NoOpProjector

    last = case.copied(checkpoints=case.checkpoints[-1:])
    options = {"projector": NoOpProjector(device="cpu"), "use_half_precision": False}
    with quiet():
        traker = traker_of(last, folder / "traker", lambda_reg=ridge / case.num_parameters, **options)
        theirs = np.array(traker.finalize_scores("targets"), dtype=np.float64)
    rows = case.train, case.targets, case.checkpoints[-1:]
    ours = attribute(
        case.model, case.task, *rows, save_dir=folder / "tracer", projector="none", storage="float32", progress=False
    )
    return rank_correlation(np.array(ours.tracer.finalize_scores("targets", "trak", regularization=ridge)), theirs)


# what is compared


def peer_methods() -> list[Method]:
    """Return the field's methods."""
    ridges = [{}, *({"lambda_reg": ridge} for ridge in RIDGES)]
    projected = {"proj_dim": 512, "use_half_precision": False}
    trak, ensemble = "traker TRAK, k=512, float32", "traker TRAK, k=512, float32, 3 runs"
    return [
        method("captum TracInCP", captum_tracin),
        method("captum TracInCPFast", captum_tracin_fast, unfit=needs_last_layer),
        method("captum Arnoldi", captum_arnoldi, [{}, {"projection_dim": 200, "arnoldi_dim": 400}], at_most(50_000)),
        method("captum Naive", captum_naive, [{}, {"projection_dim": 500}], at_most(1_000)),
        Method("traker TRAK", run_traker("traker TRAK"), "trak", at_most(50_000)),
        Method(trak, run_traker(trak, ridges, **projected), "trak"),
        Method(ensemble, run_traker(ensemble, ridges, True, **projected), "trak"),
        *dattri_methods(),
        *kronfluence_methods(),
        *bergson_methods(),
        *logix_methods(),
    ]

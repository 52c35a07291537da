"""dattri's methods behind one signature; see `quality_peers`.

dattri 0.3: TRAK (Park et al. 2023), TracIn (always projected), influence functions with an explicit Hessian, conjugate
gradients, Arnoldi, EK-FAC and DataInf, and representer points (Yeh et al. 2018). Influence functions and representer
points take the last checkpoint. What is seen of version 0.3.0:

- Its EK-FAC multiplies with eigenvectors transposed, and appends all biases to the flattened weights where a bias
  belongs to each row of them. ``EKFAC, repaired`` undoes both around the library's own code.
- Its Arnoldi gives NaN where the Hessian has negative eigenvalues among the chosen ones, which it warns of.
- Without a damping of their own, EK-FAC and DataInf divide by curvatures that are zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from quality_methods import Case, Found, Method, at_most, log_odds, method, needs_last_layer, row_losses
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

RIDGES = (1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0)
"""What is tried as the ridge of TRAK beside the default of 0."""

DAMPINGS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""What is tried as the damping of a Hessian of the mean loss beside the default of 0."""

INFLUENCE_FUNCTIONS = [
    ("Explicit", "regularization", 1_000),
    ("CG", "regularization", 50_000),
    ("Arnoldi", "regularization", 50_000),
    ("EKFAC", "damping", 1_000_000),
    ("EKFAC, repaired", "damping", 1_000_000),
    ("DataInf", "regularization", 50_000),
]
"""The ending of the class's name, what it calls the damping, and up to how many parameters it takes a few minutes."""

HESSIAN_PRODUCTS = ("CG", "Arnoldi")
"""Those that multiply the Hessian of all rows at once by a vector of each target."""

GRADIENT_VALUES = 50_000_000
"""How many values of per-sample gradients fit well into memory."""


def dattri_task(case: Case, output: Callable[[Tensor], Tensor], single: bool, checkpoints: slice = slice(None)) -> Any:
    """Return dattri's task.

    Args:
        case: What is scored.
        output: From the rows' losses to what is differentiated.
        single: Whether rows come without a batch dimension, as its TRAK and TracIn hand them over.
        checkpoints: Which.

    Returns:
        The task.
    """
    from dattri.task import AttributionTask

    def loss(params: dict[str, Tensor], data: tuple[Tensor, Tensor]) -> Tensor:
        x, y = (column.unsqueeze(0) for column in data) if single else data
        return output(row_losses(torch.func.functional_call(case.model, params, x), y)).mean()

    states = [state for state, _ in case.checkpoints[checkpoints]]
    return AttributionTask(loss_func=loss, model=case.model, checkpoints=states)


def loaders(case: Case, batch_size: int | None = None) -> tuple[DataLoader, DataLoader]:
    """Return loaders of training rows and targets, in order; by default each in one batch, as dattri advises."""
    train, targets = TensorDataset(*case.train), TensorDataset(*case.targets)
    return DataLoader(train, batch_size or len(train)), DataLoader(targets, batch_size or len(targets))


def dattri_tracin(case: Case, folder: Path, proj_dim: int = 512) -> Found:
    """Projected TracIn with the checkpoints' learning rates."""
    from dattri.algorithm import TracInAttributor

    rates = torch.tensor([rate for _, rate in case.checkpoints])
    options = {"proj_dim": proj_dim, "proj_max_batch_size": 32, "proj_seed": 0, "device": "cpu"}
    attributor = TracInAttributor(dattri_task(case, lambda losses: losses, True), rates, False, options, device="cpu")
    train, targets = loaders(case, max(case.batch_size, GRADIENT_VALUES // case.num_parameters))
    with torch.no_grad():
        scores = attributor.attribute(train, targets).numpy()
    return Found("", scores, suspicion=lambda: attributor.self_attribute(train).numpy())


def dattri_trak(case: Case, folder: Path, proj_dim: int = 512, regularization: float = 0.0) -> Found:
    """TRAK of dattri, without traker's rescaling."""
    from dattri.algorithm import TRAKAttributor

    def probability(params: dict[str, Tensor], data: tuple[Tensor, Tensor]) -> Tensor:
        x, y = (column.unsqueeze(0) for column in data)
        return torch.exp(-row_losses(torch.func.functional_call(case.model, params, x), y)).squeeze(0)

    task = dattri_task(case, log_odds, True)
    options = {"proj_dim": proj_dim, "proj_max_batch_size": 32, "proj_seed": 0, "device": "cpu"}
    attributor = TRAKAttributor(task, probability, options, device="cpu", regularization=regularization)
    train, targets = loaders(case, case.batch_size)
    with torch.no_grad():
        scores = attributor.attribute(targets, train).numpy()
    return Found("", scores, suspicion=lambda: attributor.self_attribute(train).detach().numpy())


def dattri_influence(case: Case, folder: Path, kind: str, **options: Any) -> Found:
    """An influence function of dattri, at the last checkpoint.

    Args:
        case: What is scored.
        folder: Not used.
        kind: One of `INFLUENCE_FUNCTIONS`.
        **options: As the class takes them.

    Returns:
        Scores and self-influence.
    """
    from dattri import algorithm

    task = dattri_task(case, lambda losses: losses, False, slice(-1, None))
    made = repaired_ekfac() if kind == "EKFAC, repaired" else getattr(algorithm, f"IFAttributor{kind}")
    attributor = made(task, device="cpu", **options)
    train, targets = loaders(case)
    attributor.cache(train)
    scores = attributor.attribute(train, targets).detach().numpy()
    return Found("", scores, suspicion=lambda: attributor.self_attribute(train).detach().numpy())


def repaired_ekfac() -> type:
    """Return dattri's EK-FAC with eigenvectors and biases in their places."""
    from dattri.algorithm import IFAttributorEKFAC
    from dattri.func import fisher

    estimate = fisher.estimate_eigenvector

    def as_rows(covariances: dict[str, tuple[Tensor, Tensor]]) -> dict[str, tuple[Tensor, Tensor]]:
        return {name: (inputs.T, outputs.T) for name, (inputs, outputs) in estimate(covariances).items()}

    class Repaired(IFAttributorEKFAC):
        """Its code takes rows for eigenvectors, and ``[out, in + 1]`` for what comes as weights and then biases."""

        def cache(self, *arguments: Any, **options: Any) -> None:
            """Estimate the factors, with eigenvectors as rows."""
            with mock.patch.object(fisher, "estimate_eigenvector", as_rows):
                super().cache(*arguments, **options)

        def transform_test_rep(self, ckpt_idx: int, test_rep: Tensor) -> Tensor:
            """Bring each bias behind its row of weights, and back."""
            order = torch.cat(list(self.layout()))
            return super().transform_test_rep(ckpt_idx, test_rep[:, order])[:, order.argsort()]

        def layout(self) -> Iterator[Tensor]:
            """Yield for each module where the values of ``[out, in + 1]`` are among its weights and biases."""
            start = 0
            for layer in self.name_to_module.values():
                rows, columns = layer.weight.shape
                place = start + torch.arange(rows * columns).view(rows, columns)
                start += rows * columns
                if layer.bias is not None:
                    place = torch.cat([place, start + torch.arange(rows).view(rows, 1)], dim=1)
                    start += rows
                yield place.flatten()

    return Repaired


def dattri_rps(case: Case, folder: Path, **options: Any) -> Found:
    """Representer points: the last layer is trained further with an L2 penalty, at the last checkpoint."""
    from dattri.algorithm import RPSAttributor
    from dattri.task import AttributionTask

    task = AttributionTask(nn.CrossEntropyLoss(), case.model, [case.checkpoints[-1][0]], nn.CrossEntropyLoss())
    attributor = RPSAttributor(task, case.last_layer, device="cpu", **options)
    train, targets = loaders(case)
    attributor.cache(train)
    return Found("", attributor.attribute(train, targets).detach().numpy())


def fits_memory(parameters: int) -> Callable[[Case], str]:
    """Return a function that says why Hessian products do not fit into memory, or nothing."""

    def unfit(case: Case) -> str:
        if not all(isinstance(module, nn.Linear) for module in case.layers):
            return "all rows in one batch, as it wants them, take more than 20 GB with layers that are not linear"
        return at_most(parameters)(case)

    return unfit


def dattri_methods() -> list[Method]:
    """Return dattri's methods."""
    return [
        method("dattri TRAK, k=512", dattri_trak, [{}, *({"regularization": ridge} for ridge in RIDGES)]),
        method("dattri TracIn, k=512", dattri_tracin),
        *(
            method(
                f"dattri influence, {kind}",
                partial(dattri_influence, kind=kind),
                [{}, *({damping: value} for value in DAMPINGS)],
                fits_memory(largest) if kind in HESSIAN_PRODUCTS else at_most(largest),
            )
            for kind, damping, largest in INFLUENCE_FUNCTIONS
        ),
        method("dattri RPS", dattri_rps, [{}, {"l2_strength": 0.03}], needs_last_layer),
    ]

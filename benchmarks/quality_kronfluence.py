"""kronfluence's EK-FAC behind one signature; see `quality_peers`.

kronfluence 1.0.1: influence functions with the Kronecker-factored Fisher information of labels drawn from the model's
predictions (Grosse et al. 2023), of linear layers and convolutions alone, by default with eigenvalues corrected and a
damping of 1e-8; ``damping_factor=None`` is its heuristic, 0.1 times the mean eigenvalue. Losses and measurements are
those of its examples: sums over the batch and, of sequences, over positions; of classes the measurement is the margin.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from quality_methods import Case, Found, Method, method
from torch import Tensor, nn
from torch.utils.data import TensorDataset

HEURISTIC = {"damping": "0.1 of the mean"}
"""The setting for the damping that kronfluence recommends in its documents but does not have as its default."""


def kronfluence_task(language: bool) -> Any:
    """Return kronfluence's task.

    Args:
        language: Whether rows are sequences, and the measurement their loss.

    Returns:
        The task.
    """
    from kronfluence.task import Task

    class CrossEntropy(Task):
        """Rows are pairs of inputs and labels."""

        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            """Return the sum of losses, of the given labels or of drawn ones."""
            x, y = batch
            logits = model(x).flatten(0, -2)
            if sample:
                with torch.no_grad():
                    y = torch.multinomial(logits.softmax(-1), 1)
            return F.cross_entropy(logits, y.flatten(), reduction="sum")

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            """Return the sum of losses of sequences, else of negative margins."""
            if language:
                return self.compute_train_loss(batch, model)
            x, y = batch
            logits, own = model(x), F.one_hot(y, model(x).shape[-1]).bool()
            return (logits.masked_fill(own, -torch.inf).logsumexp(-1) - logits[own]).sum()

    return CrossEntropy()


def kronfluence_scores(case: Case, folder: Path, strategy: str, last: bool, damping: str = "") -> Found:
    """Influence at the last checkpoint, or the sum over checkpoints.

    Args:
        case: What is scored.
        folder: Where it keeps factors and scores.
        strategy: ``ekfac`` or ``kfac``.
        last: Whether only the last checkpoint is taken.
        damping: Anything for the heuristic instead of the default.

    Returns:
        Scores and, of the last checkpoint alone, self-influence.
    """
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments

    task = kronfluence_task(case.task == "language_modeling")
    train, targets = TensorDataset(*case.train), TensorDataset(*case.targets)
    arguments = ScoreArguments(damping_factor=None) if damping else ScoreArguments()
    total = np.zeros(case.sizes)
    for number, model in enumerate(case.states()[-1:] if last else case.states()):
        torch.manual_seed(0)
        options = {"cpu": not torch.cuda.is_available(), "disable_tqdm": True, "output_dir": str(folder)}
        analyzer = Analyzer(str(number), prepare_model(model, task), task, **options)
        analyzer.fit_all_factors("factors", train, case.batch_size, factor_args=FactorArguments(strategy))
        analyzer.compute_pairwise_scores(
            "scores", "factors", targets, train, len(targets), case.batch_size, score_args=arguments
        )
        total += analyzer.load_pairwise_scores("scores")["all_modules"].double().numpy().T

    def suspicion() -> np.ndarray:
        analyzer.compute_self_scores("self", "factors", train, case.batch_size, score_args=arguments)
        return analyzer.load_self_scores("self")["all_modules"].double().numpy()

    return Found("", total, suspicion=suspicion if last else None)


def kronfluence_methods() -> list[Method]:
    """Return kronfluence's methods."""
    settings = [{}, HEURISTIC]
    return [
        method(
            "kronfluence EK-FAC, last checkpoint", partial(kronfluence_scores, strategy="ekfac", last=True), settings
        ),
        method(
            "kronfluence EK-FAC, sum of checkpoints",
            partial(kronfluence_scores, strategy="ekfac", last=False),
            settings,
        ),
        method("kronfluence K-FAC, last checkpoint", partial(kronfluence_scores, strategy="kfac", last=True), settings),
    ]

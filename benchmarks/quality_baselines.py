"""What needs no attribution: cheap rankings of rows that any method should beat.

``N`` training rows, ``M`` targets. Most rank rows by how likely their label is wrong, ``[N]``; those that compare a row
with a target give scores ``[N, M]`` too.

- random: scores from a normal distribution.
- loss, at the last checkpoint or averaged over all: the area under a row's learning curve.
- margin: the largest probability of another label minus that of the label, last checkpoint.
- gradient norm: of the loss, averaged over the checkpoints; exact.
- embedding: what the last layer sees at the last checkpoint. Scores are cosines with the target's; with ``own label``
  they are negative where the labels differ. A row is suspicious when its ten nearest rows have other labels.
- BM25 (of the package bm25s): the words of texts.
- confident learning (Northcutt et al. 2021): probabilities come from networks that did not train on the row
  (five folds, the task's recipe). Rows are ranked by the paper's normalized margin: the largest probability of
  ananother label minus that of the label; or by self-confidence, the probability of the label alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from quality_methods import Case, Found, Method, Rows, clock, row_losses
from quality_tasks import alphabet
from torch import Tensor, nn

from tracer.retraining import train_models

NUM_FOLDS, NUM_NEIGHBOURS = 5, 10


def ranked(name: str, rank: Callable[[Case], np.ndarray]) -> Method:
    """Return a method that ranks rows and has no scores; its seconds are those of the ranking."""

    def run(case: Case, folder: Path) -> list[Found]:
        start = clock()
        suspicion = rank(case)
        return [Found(name, seconds=clock() - start, suspicion=lambda: suspicion)]

    return Method(name, run, unfit=needs_labels if rank in NEED_LABELS else lambda case: "")


def needs_labels(case: Case) -> str:
    """Return why a ranking by label probabilities does not apply, or nothing."""
    return "rows have no single label" if case.task == "language_modeling" else ""


@torch.no_grad()
def logits_of(model: nn.Module, inputs: Tensor) -> Tensor:
    """Return the outputs of all rows, in eval mode."""
    model.eval()
    return torch.cat([model(part) for part in inputs.split(250)])


def last_loss(case: Case) -> np.ndarray:
    """Return the losses at the last checkpoint, ``[N]``."""
    return row_losses(logits_of(case.model, case.train[0]), case.train[1]).numpy()


def mean_loss(case: Case) -> np.ndarray:
    """Return the losses averaged over the checkpoints, ``[N]``."""
    losses = [row_losses(logits_of(model, case.train[0]), case.train[1]) for model in case.states()]
    return torch.stack(losses).mean(0).numpy()


def label_margin(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Return the largest probability of another label minus that of the label.

    Args:
        probabilities: ``[N, classes]``.
        labels: ``[N]``.

    Returns:
        ``[N]``, between -1 and 1.

    >>> label_margin(torch.tensor([[0.7, 0.2, 0.1], [0.25, 0.25, 0.5]]), torch.tensor([0, 1]))
    tensor([-0.5000,  0.2500])
    """
    own = F.one_hot(labels, probabilities.shape[1]).bool()
    return probabilities.masked_fill(own, -torch.inf).amax(1) - probabilities[own]


def last_margin(case: Case) -> np.ndarray:
    """Return the margins at the last checkpoint, ``[N]``."""
    return label_margin(logits_of(case.model, case.train[0]).softmax(1), case.train[1]).numpy()


def gradient_norm(case: Case) -> np.ndarray:
    """Return the norms of the loss gradients averaged over the checkpoints, ``[N]``."""
    norms = [loss_gradient_norms(model, case.train) for model in case.states()]
    return torch.stack(norms).mean(0).numpy()


def loss_gradient_norms(model: nn.Module, rows: Rows) -> Tensor:
    """Return the norm of each row's loss gradient over all parameters, ``[N]``."""
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def loss(values: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return row_losses(torch.func.functional_call(model, values, x.unsqueeze(0)), y.unsqueeze(0)).sum()

    gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))
    norms = []
    for x, y in zip(*(column.split(50) for column in rows), strict=True):
        squares = [part.flatten(1).square().sum(1) for part in gradients(parameters, x, y).values()]
        norms.append(torch.stack(squares).sum(0).sqrt())
    return torch.cat(norms)


@torch.no_grad()
def embeddings(model: nn.Module, layer: str, inputs: Tensor) -> Tensor:
    """Return what a layer gets as input, of sequences the mean over positions, normalized.

    Args:
        model: The network.
        layer: The layer's name.
        inputs: ``[B, ...]``.

    Returns:
        ``[B, width]``, of norm 1.
    """
    seen: list[Tensor] = []
    handle = model.get_submodule(layer).register_forward_hook(lambda module, args, output: seen.append(args[0]))
    try:
        logits_of(model, inputs)
    finally:
        handle.remove()
    found = torch.cat(seen)
    return F.normalize(found.mean(1) if found.ndim == 3 else found, dim=1)


def neighbour_labels(case: Case) -> np.ndarray:
    """Return the share of each row's nearest rows, by embedding, that have another label: ``[N]``."""
    found = embeddings(case.model, case.last_layer, case.train[0])
    similar = (found @ found.T).fill_diagonal_(-torch.inf)
    nearest = similar.topk(NUM_NEIGHBOURS, dim=1).indices
    return (case.train[1][nearest] != case.train[1].unsqueeze(1)).float().mean(1).numpy()


def embedding_similarity(case: Case, folder: Path) -> list[Found]:
    """Cosines of embeddings: plain, and negative where the labels differ."""
    name, start = "embedding", clock()
    train, targets = (embeddings(case.model, case.last_layer, rows[0]) for rows in (case.train, case.targets))
    scores = (train @ targets.T).numpy()
    found = Found(name, scores, clock() - start)
    if needs_labels(case):
        return [found]
    same = case.train[1].unsqueeze(1) == case.targets[1]
    signed = np.where(same.numpy(), scores, -scores)
    nearest = neighbour_labels(case)
    return [found, replace(found, name=f"{name}, own label", scores=signed, suspicion=lambda: nearest)]


def not_texts(case: Case) -> str:
    """Return why rows have no words, or nothing."""
    return "rows are no texts" if case.train[0].is_floating_point() else ""


def words_of(case: Case, rows: Rows) -> list[list[str]]:
    """Return the words of rows, which are characters' numbers for language models and words' numbers for others."""
    if case.task != "language_modeling":
        return [[str(word) for word in row if word] for row in rows[0].tolist()]
    characters = list(alphabet())
    return ["".join(characters[code] for code in row).split() for row in rows[0].tolist()]


def lexical(case: Case, folder: Path) -> list[Found]:
    """BM25 scores of rows for targets as queries."""
    import bm25s

    start, index = clock(), bm25s.BM25()
    index.index(words_of(case, case.train), show_progress=False)
    scores = np.stack([index.get_scores(words) for words in words_of(case, case.targets)], 1)
    return [Found("BM25", scores, clock() - start)]


def out_of_fold(case: Case) -> Tensor:
    """Return probabilities from networks that did not train on the row, ``[N, classes]``."""
    num_train = case.sizes[0]
    fold = np.random.default_rng(0).permutation(num_train) % NUM_FOLDS
    masks = fold != np.arange(NUM_FOLDS).reshape(-1, 1)
    model, order, parts = copy.deepcopy(case.model), [], []
    for trained in train_models(case.make_model, case.task, case.train, case.recipe, masks):
        model.load_state_dict(trained.state)
        order.append(torch.from_numpy(np.flatnonzero(~masks[trained.subset])))
        parts.append(logits_of(model, case.train[0][order[-1]]).softmax(1))
    return torch.cat(parts)[torch.cat(order).argsort()]


def confident_learning(case: Case, folder: Path) -> list[Found]:
    """Normalized margin and self-confidence of out-of-fold probabilities."""
    start = clock()
    probabilities, labels = out_of_fold(case), case.train[1]
    margin = label_margin(probabilities, labels).numpy()
    unlikely = 1 - probabilities.gather(1, labels.unsqueeze(1)).squeeze(1).numpy()
    seconds = clock() - start
    return [
        Found("confident learning, margin", seconds=seconds, suspicion=lambda: margin),
        Found("confident learning, self-confidence", seconds=seconds, suspicion=lambda: unlikely),
    ]


def random_scores(case: Case, folder: Path) -> list[Found]:
    """Scores that know nothing."""
    rng = np.random.default_rng(0)
    scores, order = rng.normal(size=case.sizes), rng.normal(size=case.sizes[0])
    return [Found("random", scores, 0.0, suspicion=lambda: order)]


NEED_LABELS = (last_margin,)
"""Rankings that need one label a row."""


def baseline_methods() -> list[Method]:
    """Return the baselines."""
    return [
        Method("random", random_scores),
        ranked("loss, last checkpoint", last_loss),
        ranked("loss, mean of checkpoints", mean_loss),
        ranked("margin, last checkpoint", last_margin),
        ranked("gradient norm, mean of checkpoints", gradient_norm),
        Method("embedding", embedding_similarity),
        Method("BM25", lexical, unfit=not_texts),
        Method("confident learning", confident_learning, unfit=needs_labels),
    ]

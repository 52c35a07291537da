"""Tests that need no training: are proponents of the target's class, and do scores depend on what was learnt?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tracer.errors import InputError
from tracer.metrics.inputs import Array, as_array, numbers, proponent_indices, same_size
from tracer.metrics.ranks import rank_correlation
from tracer.metrics.results import Result, mean_over_targets


@dataclass(frozen=True, repr=False, eq=False)
class ClassAgreement(Result):
    """How many proponents are of their target's class.

    Attributes:
        mean: The mean of ``per_target``.
        chance: What ``mean`` would be for train rows drawn at random.
        per_target: ``[M]``, the share of the k proponents, from 0 to 1.
    """

    mean: float
    chance: float
    per_target: np.ndarray


def class_agreement(indices: Array, train_labels: Array, target_labels: Array) -> ClassAgreement:
    """Return the share of proponents that are of their target's class.

    The identical class test of Hanawa et al. (2021), *Evaluation of Similarity-based Explanations*, there for the
    first proponent (k = 1) and the class that the model predicts for the target. High values are plausible
    explanations; they do not show that the rows had the effect: a nearest neighbour of the same class passes.

    Args:
        indices: ``[M, k]``, train rows of each target, each at most once, as ``tracer.top(...).indices``.
        train_labels: ``[N]``, integers, booleans or strings.
        target_labels: ``[M]``, the class of each target, likewise: predicted classes for the test as published.

    Returns:
        The share of each target, the mean, and what chance gives.

    Raises:
        InputError: Shapes do not agree, or an index is out of range or twice in a row.
        InputTypeError: Indices are not integers, or the two kinds of labels cannot be compared.

    >>> class_agreement([[0, 2], [1, 0]], train_labels=[7, 3, 7], target_labels=[7, 3])
    ClassAgreement(mean=0.75, chance=0.5, per_target=[1, 0.5])
    """
    train, target = as_array("train_labels", train_labels, "[N]"), as_array("target_labels", target_labels, "[M]")
    if not (train.dtype.kind in "US" and target.dtype.kind in "US"):  # text never equals a number
        train, target = numbers("train_labels", train, "[N]"), numbers("target_labels", target, "[M]")
    rows = proponent_indices("indices", indices, len(train))
    same_size("indices [M, k]", len(rows), "target_labels [M]", len(target), "M")
    classes, counts = np.unique(train, return_counts=True)
    share_of = dict(zip(classes.tolist(), (counts / len(train)).tolist(), strict=True))
    chance = sum(share_of.get(label, 0.0) for label in target.tolist()) / len(target)
    per_target = (train[rows] == target[:, None]).mean(axis=1)
    return ClassAgreement(float(per_target.mean()), chance, per_target)


@dataclass(frozen=True, repr=False, eq=False)
class RandomizationCheck(Result):
    """How far scores are those of a model that has learnt nothing.

    Attributes:
        mean: The mean of ``per_target`` over the targets where it is defined.
        mean_absolute: The mean of its absolute value, where targets of different sign do not cancel: about
            ``0.8 / sqrt(N)`` for scores that have nothing in common.
        per_target: ``[M]``, Spearman's correlation; NaN where the scores of either model are all the same.
    """

    mean: float
    mean_absolute: float
    per_target: np.ndarray


def randomization_check(scores: Array, randomized: Array) -> RandomizationCheck:
    """Return how much scores resemble those from a model with random weights.

    The model randomization test of Adebayo et al. (2018), *Sanity Checks for Saliency Maps*, for attribution as in
    Hanawa et al. (2021): the same method on the same rows and targets, once with the trained weights and once with
    random ones, compared by Spearman's correlation over the train rows of each target. Near 0, the scores come from
    what was learnt. Near 1, they come from the architecture and the inputs: the model might as well not have been
    trained. Passing is necessary and not sufficient: noise passes.

    Args:
        scores: ``[N, M]``, finite, of the trained model.
        randomized: ``[N, M]``, finite, of the model with random weights.

    Returns:
        The correlation of each target, the mean, and the mean of absolute values.

    Raises:
        InputError: Shapes do not agree, there is one train row only, values are NaN or infinite, or for each target
            the scores of one model are all the same.
        InputTypeError: An array does not hold numbers.

    >>> randomization_check([[1.0, 5.0], [2.0, 6.0], [3.0, 7.0]], [[0.1, 0.0], [0.2, 0.0], [0.3, 0.0]])
    RandomizationCheck(mean=1, mean_absolute=1, per_target=[1, nan])
    """
    scores, randomized = numbers("scores", scores, "[N, M]"), numbers("randomized", randomized, "[N, M]")
    if scores.shape != randomized.shape or len(scores) < 2:
        raise InputError(
            f"scores and randomized must be [N, M] alike with N of at least 2, got {list(scores.shape)} and "
            f"{list(randomized.shape)}."
        )
    per_target = rank_correlation(scores, randomized)
    mean = mean_over_targets("The correlation", per_target, "the scores of one of the models are all the same")
    return RandomizationCheck(mean, float(np.nanmean(np.abs(per_target))), per_target)

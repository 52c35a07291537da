"""Checks without training: are proponents of the target's class, and do scores depend on what was learned?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tracer.errors import InputError
from tracer.metrics.inputs import Array, as_array, numbers, proponent_indices, same_size
from tracer.metrics.ranks import rank_correlation
from tracer.metrics.values import Result, mean_over_targets


@dataclass(frozen=True, repr=False, eq=False)
class ClassAgreement(Result):
    """The share of proponents that are of their target's class.

    Attributes:
        mean: The mean of ``per_target``.
        chance: The expected ``mean`` for training examples drawn at random.
        per_target: ``[M]``, the share of the k proponents, from 0 to 1.
    """

    mean: float
    chance: float
    per_target: np.ndarray


def class_agreement(indices: Array, train_labels: Array, target_labels: Array) -> ClassAgreement:
    """Return the share of proponents that are of their target's class.

    The identical class test of Hanawa et al. (2021), *Evaluation of Similarity-based Explanations*, which uses the
    first proponent (k = 1) and the class predicted for the target. High values mean plausible explanations. They do not
    show that the examples had the effect: a nearest neighbor of the same class passes.

    Args:
        indices: ``[M, k]``, training examples of each target, each at most once, as in ``tracer.top(...).indices``.
        train_labels: ``[N]``, integers, booleans or strings.
        target_labels: ``[M]``, of the same kind: the class of each target, for the published test the predicted one.

    Returns:
        The share of each target, the mean, and the share by chance.

    Raises:
        InputError: If shapes do not agree, or an index is out of range or repeated.
        InputTypeError: If indices are not integers, or the two kinds of labels cannot be compared.

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
    """The similarity of scores to those of a model that has learned nothing.

    Attributes:
        mean: The mean of ``per_target`` over the targets for which it is defined.
        mean_absolute: The mean of its absolute value, in which targets of different sign do not cancel: about
            ``0.8 / sqrt(N)`` for unrelated scores.
        per_target: ``[M]``, Spearman's correlation; NaN if the scores of either model are all equal.
    """

    mean: float
    mean_absolute: float
    per_target: np.ndarray


def randomization_check(scores: Array, randomized: Array) -> RandomizationCheck:
    """Return how similar scores are to those of a model with random weights.

    The model randomization test of Adebayo et al. (2018), *Sanity Checks for Saliency Maps*, for attribution as in
    Hanawa et al. (2021): the same method with trained and with random weights, compared by Spearman's correlation over
    the training examples of each target. Near 0, the scores depend on what was learned. Near 1, they depend on
    architecture and inputs only. Passing is necessary but not sufficient: noise passes.

    Args:
        scores: ``[N, M]``, finite, of the trained model.
        randomized: ``[N, M]``, finite, of the model with random weights.

    Returns:
        The correlation of each target, the mean, and the mean of absolute values.

    Raises:
        InputError: If shapes do not agree, N is 1, values are NaN or infinite, or for each target the scores of one
            model are all equal.
        InputTypeError: If an array does not hold numbers.

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

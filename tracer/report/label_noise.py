"""The share of wrong labels, from what a model predicts of each example that it has not learned from.

Layout: N examples, C classes. The evidence on an example is the probability of its own label, and that of its *rival*,
the most probable other class.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float64, Int64

from tracer.errors import InputError

MIN_HELD_OUT = 20  # with fewer targets, nothing tells whether labels are predicted
MIN_KAPPA = 0.6
"""The least agreement with held-out labels, beyond chance, of a model that has learned from the labels in question.

With less (SST-2, 0.4 to 0.55) the step that undoes what it learned was far off."""
MIN_KAPPA_OUT_OF_SAMPLE = 0.1  # that of models which have not learned from them
_MAX_EXAMPLES = 2000
"""The likelihood counts at most so many examples.

Beyond them the error of the model of predictions is larger than that of chance (a coarsened posterior, Miller & Dunson
2019), so an interval never becomes narrower than that of so many examples.
"""
_NUM_BINS = 60
_SLOPES = np.exp(np.linspace(np.log(0.2), np.log(8.0), 22))
_OFFSETS = np.linspace(-3.0, 6.0, 28)
_STEP = 0.0025
_HELD_OUT_SHARES = np.array([0.0, 0.005, 0.01, 0.02, 0.04, 0.07, 0.1, 0.15, 0.2, 0.3, 0.4])
_CEILINGS = np.array([0.0, 0.01, 0.03, 0.06, 0.1, 0.2, 0.3])  # shares that even the surest predictions get wrong
_HELD_OUT_PRIOR = 20.0  # as if so many targets had been found right: most labels of targets are


@dataclass(frozen=True)
class LabelEvidence:
    """Out-of-sample evidence on the labels of N examples.

    Attributes:
        label: ``[N]``, int64, class indices.
        own: ``[N]``, the probability of the label.
        rival: ``[N]``, int64, the most probable class other than the label.
        rival_probability: ``[N]``, its probability.
    """

    label: Int64[np.ndarray, " N"]
    own: Float64[np.ndarray, " N"]
    rival: Int64[np.ndarray, " N"]
    rival_probability: Float64[np.ndarray, " N"]

    @classmethod
    def of_probabilities(cls, label: Any, probabilities: Any) -> LabelEvidence:
        """Return the evidence of the probabilities ``[N, C]`` of all classes.

        Raises:
            InputError: If they are no probabilities, or labels are not their classes.

        >>> found = LabelEvidence.of_probabilities([0, 0], [[0.75, 0.25], [0.25, 0.75]])
        >>> found.own.tolist(), found.rival.tolist(), found.agrees.tolist()
        ([0.75, 0.25], [1, 1], [True, False])
        """
        label, values = np.asarray(label), np.asarray(probabilities, dtype=np.float64)
        expected = f"expected [{len(label)}, C] probabilities of C >= 2 classes that sum to 1, out of sample"
        if values.ndim != 2 or len(values) != len(label) or values.shape[1] < 2:
            raise InputError(f"train_probabilities has shape {list(values.shape)}; {expected}.")
        if not (np.isfinite(values).all() and values.min() >= 0 and np.allclose(values.sum(1), 1, atol=1e-3)):
            raise InputError(f"train_probabilities has rows that are no probabilities; {expected}.")
        if label.dtype.kind not in "iu" or label.min() < 0 or label.max() >= values.shape[1]:
            raise InputError(f"train_probabilities has {values.shape[1]} classes; expected labels of 0 up to that.")
        rows = np.arange(len(label))
        others = values.copy()
        others[rows, label] = -1
        rival = others.argmax(1)
        return cls(label.astype(np.int64), values[rows, label], rival, values[rows, rival])

    @classmethod
    def of_losses(cls, label: Any, loss: Any, rival: Any, rival_share: Any, change: Any = 0.0) -> LabelEvidence:
        """Return the evidence of a task's values of N examples, ``[N]`` each (`tracer.types.SampleOutputs`).

        Args:
            label: The class indices.
            loss: The cross-entropy.
            rival: The most probable other classes.
            rival_share: Their shares of the probability of all other classes.
            change: Added to the labels' log odds.
        """
        # L = softplus(-f), so the label's log odds are f = -log(exp(L) - 1); a loss of zero is a probability of one
        loss = np.clip(np.asarray(loss, dtype=np.float64), 1e-12, 500.0)
        own = _sigmoid(change - np.log(np.expm1(loss)))
        others = (1 - own) * np.clip(np.asarray(rival_share, dtype=np.float64), 0, 1)
        return cls(np.asarray(label).astype(np.int64), own, np.asarray(rival).astype(np.int64), others)

    @classmethod
    def joined(cls, parts: Sequence[LabelEvidence]) -> LabelEvidence:
        """Return the evidence on the examples of all parts, one after another."""
        names = ("label", "own", "rival", "rival_probability")
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))

    @classmethod
    def mean(cls, parts: Sequence[LabelEvidence]) -> LabelEvidence:
        """Return the mean evidence over several models; the rival is the class of the largest sum."""
        rivals = np.stack([part.rival for part in parts])
        values = np.stack([part.rival_probability for part in parts])
        sums = np.stack([(values * (rivals == rival)).sum(0) for rival in rivals])
        best, rows = sums.argmax(0), np.arange(rivals.shape[1])
        own = np.mean([part.own for part in parts], axis=0)
        return cls(parts[0].label, own, rivals[best, rows], sums[best, rows] / len(parts))

    def select(self, rows: np.ndarray) -> LabelEvidence:
        """Return the evidence on some examples."""
        return LabelEvidence(self.label[rows], self.own[rows], self.rival[rows], self.rival_probability[rows])

    @property
    def agrees(self) -> Bool[np.ndarray, " N"]:
        """Whether the label is predicted, ``[N]``."""
        return self.own >= self.rival_probability

    @property
    def predicted(self) -> Int64[np.ndarray, " N"]:
        """The predicted class, ``[N]``."""
        return np.where(self.agrees, self.label, self.rival)

    @property
    def confidence(self) -> Float64[np.ndarray, " N"]:
        """The log odds of the predicted class, ``[N]``."""
        return _log_odds(np.maximum(self.own, self.rival_probability))

    def accuracy(self) -> tuple[float, float]:
        """Return the share of labels that are predicted, and the share that chance predicts."""
        num_classes = 1 + int(max(self.label.max(), self.predicted.max()))
        shares = [np.bincount(each, minlength=num_classes) / len(each) for each in (self.label, self.predicted)]
        return float(self.agrees.mean()), float(shares[0] @ shares[1])

    def kappa(self) -> float:
        """Return the agreement beyond chance, 1 if all labels are predicted (Cohen 1960)."""
        share, chance = self.accuracy()
        return (share - chance) / (1 - chance) if chance < 1 else 0.0

    def tells_classes_apart(self, min_kappa: float = MIN_KAPPA) -> bool:
        """Return whether labels are predicted far better than chance predicts them."""
        share, chance = self.accuracy()
        error = (chance * (1 - chance) / len(self.label)) ** 0.5
        return self.kappa() >= min_kappa and share - chance > 3 * error


@dataclass(frozen=True)
class WrongLabels:
    """An estimate of the share of wrong labels, and what it says of each label.

    Attributes:
        share: The estimate, from 0 to 1.
        low: The lower end of a 95 % interval.
        high: Its upper end.
        label: ``[N]``, int64, the labels that were examined.
        suggested: ``[N]``, int64, the most probable class other than the label.
        confidence: ``[N]``, the probability that the label is wrong.
    """

    share: float
    low: float
    high: float
    label: Int64[np.ndarray, " N"]
    suggested: Int64[np.ndarray, " N"]
    confidence: Float64[np.ndarray, " N"]

    def __repr__(self) -> str:
        wrong = f"{self.share:.1%} of {len(self.label):,} labels, 95 % interval {self.low:.1%} to {self.high:.1%}"
        return f"WrongLabels({wrong}; {int(self.suspects.sum()):,} suspects)"

    @property
    def suspects(self) -> Bool[np.ndarray, " N"]:
        """The examples whose label is more probably wrong than right, ``[N]``."""
        return self.confidence > 0.5


def estimate_wrong_labels(
    train: LabelEvidence,
    held_out: LabelEvidence | None = None,
    in_sample: LabelEvidence | None = None,
    num_models: int = 1,
) -> WrongLabels:
    """Return the share of wrong labels with an interval, and the probability that each label is wrong.

    The true class is the predicted one with probability ``g = sigmoid(a t + b)``, where t is the log odds of the
    prediction. A share ρ of the labels is wrong, each wrong class alike, so a label is the predicted class with
    probability ``g (1 - ρ) + (1 - g) ρ / (C - 1)``: however sure the predictions, a share ρ of the labels disagrees.
    ρ is the median of its posterior on a grid over (a, b, ρ). Held-out examples share a and b and have a share of wrong
    labels of their own, which is small a priori.

    Of predictions by several models that were trained without the examples, sure ones that held-out labels contradict
    may be mistakes of the models as well as wrong labels. Nothing tells which, so the posterior counts both: in the
    second case held-out labels are right, and g has a ceiling below one.

    It is the noise matrix of confident learning (Northcutt et al. 2021) with one rate, and thresholds replaced by a
    likelihood, since with weak models thresholds count hard examples as wrong labels.

    Args:
        train: The evidence on the training examples.
        held_out: That on other examples of the same classes.
        in_sample: That on the training examples without a correction for what the model learned from each of them. The
            interval is widened by the difference that the correction makes.
        num_models: How many models predicted each held-out example, whose predictions stand one after another.
    """
    num_classes = 1 + int(max(train.label.max(), train.rival.max()))
    rates, posterior, slope, offset = _posterior(train, held_out, num_classes, num_models)
    share, low, high = _quantiles(rates, posterior)
    if in_sample is not None:
        uncorrected = _quantiles(*_posterior(in_sample, held_out, num_classes)[:2])[0]
        change = abs(share - uncorrected)
        low, high = max(0.0, low - 0.5 * change), min(1.0, high + change)
    margin = slope * _log_odds(train.own) + np.where(train.agrees, offset, -offset)
    right = (1 - share) * _sigmoid(margin)
    wrong = share / (num_classes - 1) * _sigmoid(-margin)
    confidence = np.divide(wrong, wrong + right, out=np.zeros_like(wrong), where=wrong > 0)
    return WrongLabels(share, low, high, train.label, train.rival, confidence)


def out_of_sample_health(
    who: str, train: LabelEvidence, held_out: LabelEvidence | None = None, num_models: int = 1
) -> WrongLabels | str:
    """Return the estimate from predictions that have not learned from the labels, or why there is none.

    Args:
        who: What predicted, in words.
        train: As in `estimate_wrong_labels`.
        held_out: As in `estimate_wrong_labels`.
        num_models: As in `estimate_wrong_labels`.
    """
    evidence = train if held_out is None else held_out
    if evidence.tells_classes_apart(MIN_KAPPA_OUT_OF_SAMPLE):
        return estimate_wrong_labels(train, held_out, num_models=num_models)
    share, chance = evidence.accuracy()
    return (
        f"the {who} do not tell classes apart. They predict {share:.0%} of the labels of "
        f"{'training examples' if held_out is None else 'targets'}; chance predicts {chance:.0%}."
    )


def _posterior(
    train: LabelEvidence, held_out: LabelEvidence | None, num_classes: int, num_models: int = 1
) -> tuple[np.ndarray, np.ndarray, float, float]:
    """Return rates ``[R]`` with their posterior ``[R]``, and the posterior means of a and b."""
    rates = np.arange(0.0, 1 - 1 / num_classes + 1e-9, _STEP)
    parts = [train] if held_out is None else [train, held_out]
    odds = np.concatenate([part.confidence for part in parts])
    edges = np.unique(np.quantile(odds, np.linspace(0, 1, _NUM_BINS)))
    size = max(1, len(edges) - 1)
    place = np.searchsorted(edges[1:-1], odds, side="right")
    middle = np.bincount(place, odds, size) / np.maximum(1, np.bincount(place, minlength=size))
    counts = []
    for part, models in zip(parts, (1, num_models), strict=False):
        at = np.searchsorted(edges[1:-1], part.confidence, side="right")
        by_agreement = [np.bincount(at[part.agrees == agrees], minlength=size) for agrees in (True, False)]
        counts.append(np.stack(by_agreement) * min(1 / models, _MAX_EXAMPLES / len(at)))
    logs = np.empty((len(_SLOPES), len(_OFFSETS), len(rates)))
    for step, slope in enumerate(_SLOPES):
        chance = _sigmoid(slope * middle + _OFFSETS[:, None])
        logs[step] = _log_likelihood(counts[0], chance, rates, num_classes)
        if held_out is not None:
            own = _log_likelihood(counts[1], chance, _HELD_OUT_SHARES, num_classes) + _prior(_HELD_OUT_SHARES)
            logs[step] += np.logaddexp.reduce(own, axis=1)[:, None]
        if num_models > 1 and held_out is not None:
            logs[step] = np.logaddexp(logs[step], _with_ceiling(counts, chance, rates, num_classes))
        logs[step] -= 0.5 * np.log(slope) ** 2 + 0.5 * np.square(_OFFSETS[:, None] / 2)
    weights = np.exp(logs - logs.max())
    weights /= weights.sum()
    return rates, weights.sum((0, 1)), float(weights.sum((1, 2)) @ _SLOPES), float(weights.sum((0, 2)) @ _OFFSETS)


def _prior(shares: np.ndarray) -> np.ndarray:
    """Return the log prior weights of a grid of shares, most of which are small."""
    return _HELD_OUT_PRIOR * np.log1p(-shares) + np.log(np.gradient(shares))


def _with_ceiling(counts: list[np.ndarray], chance: np.ndarray, rates: np.ndarray, num_classes: int) -> np.ndarray:
    """Return the log likelihood ``[b, R]`` of both sides if held-out labels are right and the models have a ceiling."""
    parts = []
    for share, weight in zip(_CEILINGS, _prior(_CEILINGS), strict=True):
        below = chance * (1 - share) + (1 - chance) * share / (num_classes - 1)
        held_out = _log_likelihood(counts[1], below, np.zeros(1), num_classes)
        parts.append(_log_likelihood(counts[0], below, rates, num_classes) + held_out + weight)
    return np.logaddexp.reduce(np.stack(parts), axis=0)


def _log_likelihood(counts: np.ndarray, chance: np.ndarray, rates: np.ndarray, num_classes: int) -> np.ndarray:
    """Return the log likelihood ``[b, R]`` of bins with counts ``[2, n]`` of agreeing and disagreeing labels."""
    moved = rates[:, None] / (num_classes - 1)
    agreed = torch.from_numpy(chance[:, None] * (1 - rates[:, None] - moved) + moved).clip_(1e-9, 1 - 1e-9)
    # torch's logarithms, almost all of an estimate's time, take half as long as NumPy's.
    agreeing, disagreeing = map(torch.from_numpy, counts)
    return np.asarray(torch.log(agreed) @ agreeing + torch.log1p(-agreed) @ disagreeing)


def _quantiles(rates: np.ndarray, posterior: np.ndarray) -> tuple[float, float, float]:
    """Return the median and the ends of a 95 % interval."""
    cumulated = np.cumsum(posterior)
    places = np.searchsorted(cumulated, np.array([0.5, 0.025, 0.975])).clip(max=len(rates) - 1)
    median, low, high = rates[places].tolist()
    return median, low, high


def _log_odds(probability: np.ndarray) -> np.ndarray:
    clipped = np.clip(probability, 1e-6, 1 - 1e-6)
    return np.log(clipped / (1 - clipped))


def _sigmoid(value: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-np.clip(value, -30, 30)))

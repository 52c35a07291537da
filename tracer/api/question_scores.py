"""The scores of questions: by the store, by exact gradients of some examples, and split over their tokens.

A question may have several targets, whose scores are added up with weights: the mean of some, minus the mean of others.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from tracer.api.exact_scores import HoldingSink, ProductSink, gradient_lengths
from tracer.api.query import check_candidates, featurizing, fresh_targets, loaded_checkpoint
from tracer.api.token_parts import by_label, differentiable, loss_gradient, squared, token_parts
from tracer.data.batches import map_leaves, select_samples, to_device
from tracer.data.datasets import exact_batches
from tracer.data.fingerprints import fingerprint_samples
from tracer.data.halving import Halving
from tracer.data.text.questions import QuestionSource
from tracer.errors import InputError, NonFiniteError
from tracer.gradients import isolated
from tracer.gradients.inner_products import TargetGradients
from tracer.scoring.estimators import Estimate
from tracer.scoring.feature_tables import InMemoryTable
from tracer.scoring.readiness import finalized_revisions, learning_rates
from tracer.training.lend_weights import weights_in
from tracer.types import Batch

if TYPE_CHECKING:
    from tracer.api.attribution import Attribution
    from tracer.api.featurizer import Featurizer
    from tracer.api.language_inputs import LanguageInputs
    from tracer.api.tracer import Tracer


@dataclass(frozen=True)
class TargetWeights:
    """The weights of the targets of a question, those of its completions first.

    Attributes:
        weights: ``[M]``.
        groups: ``[M]``, the group of each target, in which weights are equal; None if each target is one of its own.
        of_groups: ``[G]``, the weights of groups, or of targets without groups.
    """

    weights: Float64[np.ndarray, " M"]
    groups: Int64[np.ndarray, " M"] | None
    of_groups: Float64[np.ndarray, " G"]

    @classmethod
    def of(cls, count: int, others: int) -> TargetWeights:
        """Return the weights of the mean over the first targets, minus that over the others."""
        # with one target on each side there is nothing to sum up, and stored features are multiplied as they are
        sides = np.array([1 / count, *([-1 / others] if others else [])])
        groups = np.repeat(np.arange(len(sides)), [count, others][: len(sides)])
        return cls(sides[groups], None if count <= 1 >= others else groups, sides)


class QuestionScores:
    """Computes the scores of a question.

    Args:
        found: The attribution, which has the estimator.
        tracer: Its tracer.
        inputs: The training examples.
    """

    _targets: QuestionSource
    _weights: TargetWeights

    def __init__(
        self,
        found: Attribution,
        tracer: Tracer,
        inputs: LanguageInputs,
    ) -> None:
        self._tracer, self._inputs = tracer, inputs
        shown = found.by("top")
        self._estimate = Estimate(found.estimators.top, shown.target, shown.regularization)
        self._model_ids = finalized_revisions(tracer.store, found.model_ids).model_ids

    @property
    def has_features(self) -> bool:
        """Whether the store can rank training examples."""
        return self._tracer.store.manifest.feature_storage.stores_features

    @property
    def split_estimator(self) -> str:
        """The estimator whose scores are split over tokens."""
        return "tracin" if self._estimate.kernel else self._estimate.estimator

    def ask(self, targets: QuestionSource, weights: TargetWeights) -> None:
        """Choose the targets and their weights."""
        self._targets, self._weights = targets, weights

    def check_exact(self) -> None:
        """Raise InputError if the estimator has a kernel, which only stored features have."""
        if self._estimate.kernel:
            raise InputError(
                f"exact= expects estimator 'tracin' or 'cosine', got {self._estimate.estimator!r}, whose kernel is of "
                f"stored features; a store with projector='none' has exact ones."
            )

    def check_candidates(self, candidates: int, k: int) -> None:
        """Raise an error if the store, the estimator or the number of candidates do not allow a search by the index."""
        self._tracer.store.manifest.feature_storage.require_features("candidates=")
        check_candidates(candidates, k, self._estimate)

    def of_store(self, rows: Int64[np.ndarray, " n"]) -> Float64[np.ndarray, " N"]:
        """Return the scores of training examples, ascending, from stored features; 0 of all others."""
        estimate, scorer = replace(self._estimate, groups=self._weights.groups), self._tracer.reader._scorer
        chosen = None if len(rows) == len(self._inputs.train) else rows
        scores = scorer.query_scores(self._target_tables, self._model_ids, estimate, chosen)
        found = np.zeros(len(self._inputs.train))
        found[rows] = _finite(scores.astype(np.float64) @ self._weights.of_groups)
        return found

    @cached_property
    def _target_tables(self) -> list[InMemoryTable]:
        # A contrast is then the difference of the answers, to the last bits, and not that of their roundings too.
        return fresh_targets(self._tracer, self._batches(), self._model_ids, self._inputs.folders, alike=True)

    def candidates(self, count: int, kind: str) -> Int64[np.ndarray, " n"]:
        """Return the training examples that the store's index finds for the question, ascending."""
        scorer, estimate = self._tracer.reader._scorer, replace(self._estimate, groups=self._weights.groups)
        return scorer.query_candidates(
            self._target_tables, self._model_ids, estimate, self._weights.of_groups, count, kind
        )

    def exactly(self, rows: Int64[np.ndarray, " n"]) -> Float64[np.ndarray, " n"]:
        """Return the scores of some training examples from exact gradients of both sides; see `check_exact`."""
        total = np.zeros(len(rows))
        for model_id, rate in zip(self._model_ids, self._rates, strict=True):
            loaded = loaded_checkpoint(self._tracer, model_id, self._inputs.folders)
            with (
                featurizing(self._tracer, loaded, model_id) as of_targets,
                featurizing(self._tracer, loaded, model_id, None) as of_train,
                torch.inference_mode(False),
            ):
                total += rate * self._products(of_targets, of_train, model_id, rows)
        return _finite(total)

    def _products(
        self, of_targets: Featurizer, of_train: Featurizer, model_id: int, rows: np.ndarray
    ) -> Float64[np.ndarray, " n"]:
        total, place = np.zeros(len(rows)), np.full(len(self._inputs.train), -1)
        place[rows] = np.arange(len(rows))
        for batch, chosen in self._targets.batches(np.arange(len(self._targets))):
            held, sink = TargetGradients(), HoldingSink(len(chosen), of_targets.device)
            # factors may be views of the batch, which is used again
            own = map_leaves(batch, lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf)
            outputs = of_targets.run(own, len(chosen), sink)
            length = gradient_lengths(sink.squared_norm)
            held.append(length, sink.pieces)
            held.join()
            right = self._estimate.target_weights(_numbers(outputs.loss_grad), _numbers(length)) * _numbers(length)
            right *= self._weights.weights[chosen]

            def add(train: Batch, inds: np.ndarray, held: TargetGradients = held, right: np.ndarray = right) -> None:
                found = ProductSink(held, len(inds), of_train.device)
                values = of_train.run(train, len(inds), found)
                norm = _numbers(gradient_lengths(found.squared_norm))
                left = self._estimate.train_weights(_numbers(values.loss_grad), norm)
                total[place[inds]] += left * (_numbers(found.products) @ right)

            run = Halving(add)
            for train, inds in self.examples(rows, model_id):
                run(train, inds)
        return total

    def by_token(self, rows: Int64[np.ndarray, " n"]) -> dict[int, Float64[np.ndarray, " T"]]:
        """Return the scores of the tokens of some training examples, from exact gradients; 0 if not predicted.

        Raises:
            GradientError: If the model can be differentiated neither forward nor twice.
        """
        found: dict[int, np.ndarray] = {}
        tracer = self._tracer
        model, task, names = tracer.model, tracer._factory.task, tracer._factory.engine.names
        for model_id, rate in zip(self._model_ids, self._rates, strict=True):
            loaded = loaded_checkpoint(tracer, model_id, self._inputs.folders)
            norm = tracer.store.checkpoint(model_id)
            lengths = np.abs(norm.column("loss_grad")).astype(np.float64) * norm.column("gradient_norm")
            with (
                weights_in(model, loaded.weights),
                isolated(model, names, tracer.device),
                differentiable(model, tracer.device),
            ):
                engine = tracer._factory.engine_of("targets")
                direction = self._direction(tracer._factory.make(loaded, model_id, tracer.store, engine))

                def add(
                    train: Batch,
                    inds: np.ndarray,
                    direction: dict[str, Tensor] = direction,
                    rate: float = rate,
                    lengths: np.ndarray = lengths,
                ) -> None:
                    batch = to_device(train, tracer.device)
                    parts = token_parts(model, task, batch, direction)
                    parts = by_label(tracer._factory.own_task, model, batch, parts)
                    for row, part in zip(inds.tolist(), rate * _numbers(parts), strict=True):
                        if self.split_estimator == "cosine":
                            part = part / lengths[row] if lengths[row] > 0 else 0 * part
                        found[row] = found.get(row, 0) + _finite(part)

                run = Halving(add)
                for train, inds in self.examples(rows, model_id):
                    run(train, inds)
        return found

    def _direction(self, featurizer: Featurizer) -> dict[str, Tensor]:
        """Return the weighted sum of the targets' gradients, with which inner products are scores."""
        engine, preconditioner = featurizer.engine, featurizer.preconditioner()
        total: dict[str, Tensor] = {}
        for batch, chosen in self._targets.batches(np.arange(len(self._targets))):
            for position, number in enumerate(chosen.tolist()):
                own = select_samples(batch, torch.tensor([position]), len(chosen))
                gradient = loss_gradient(engine.model, engine.task, to_device(own, featurizer.device), engine.names)
                direction = gradient if preconditioner is None else squared(gradient, preconditioner)
                factor = self._weights.weights[number]
                if self.split_estimator == "cosine":
                    length = sum(float((gradient[name].double() * direction[name]).sum()) for name in gradient) ** 0.5
                    factor = factor / length if length > 0 else 0.0
                for name, values in direction.items():
                    total[name] = values * factor if name not in total else total[name].add_(values, alpha=factor)
        return total

    @property
    def _rates(self) -> list[float]:
        return learning_rates(self._tracer.store, self._model_ids)

    def _batches(self) -> Iterator[tuple[Batch, int]]:
        for batch, chosen in self._targets.batches(np.arange(len(self._targets))):
            yield batch, len(chosen)

    def examples(self, rows: np.ndarray, model_id: int | None = None) -> Iterator[tuple[Batch, np.ndarray]]:
        """Yield batches of some training examples, after comparing them with those of the store at a checkpoint."""
        tracer = self._tracer
        table = tracer.store.checkpoint(self._model_ids[0] if model_id is None else model_id)
        compares = tracer._factory.settings.check_rows and table.has_fingerprints
        for batch, inds in exact_batches(self._inputs.train, rows):
            if compares:
                table.check_rows(inds, fingerprint_samples(batch, len(inds)))
            yield batch, inds


def _numbers(values: Tensor) -> Float64[np.ndarray, ...]:
    return values.detach().to("cpu", torch.float64).numpy()


def _finite(values: np.ndarray) -> np.ndarray:
    if not np.isfinite(values).all():
        raise NonFiniteError(
            "scores of the question are NaN or infinite: gradients are out of range; ask with estimator='cosine', or "
            "look at the losses of the checkpoints."
        )
    return values

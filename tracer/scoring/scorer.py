"""Answers from a finished store, without a model: scores, top-k, queries and self-influence."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, Float64, Int64

from tracer._core.processes import Process
from tracer._core.validation import check_choice, check_count
from tracer.data.indices import ExampleSelection, resolve_selection
from tracer.errors import IncompleteError, InputError, InputTypeError
from tracer.scoring.estimators import Estimate, self_influence
from tracer.scoring.feature_tables import CheckpointPair, FeatureTable, TrainIndices
from tracer.scoring.kernels import Kernels, kernel_weights, leverages
from tracer.scoring.preconditioned_targets import PreconditionedTargets, group_indices
from tracer.scoring.read_checks import ReadCheck
from tracer.scoring.readiness import complete_cosines, complete_targets, finalized_revisions, learning_rates
from tracer.scoring.regularization import Regularization
from tracer.scoring.search_index import IndexSearch, save_index
from tracer.scoring.source import Segment, segment_rates, unrolled_self_influence, unrolled_targets, warn_of_other_runs
from tracer.scoring.streaming import MEMORY_BYTES, TileScorer, stream_tiles, stream_topk
from tracer.scoring.top_queries import TopKQuery
from tracer.scoring.trackstar import whitened_terms
from tracer.scoring.write_scores import write_scores
from tracer.store import RowTable, ScoreArray, Store
from tracer.store.lazy_matrix import ScoreMatrix
from tracer.store.revisions import Revisions
from tracer.store.table_schema import NO_LABEL
from tracer.types import TopK

Labels = int | Sequence[int] | np.ndarray
"""The type of ``labels=``: class indices."""

MIN_DIVISOR = 0.05
"""The least ``1 − w h`` by which an example's own part in a prediction is divided."""

KINDS = ("proponents", "opponents")
"""The values of ``kind=``."""


class Scorer:
    """Computes scores from a store, which may be replaced when it grows; kernels stay in memory for the next call."""

    def __init__(
        self,
        store: Store,
        device: torch.device,
        progress: bool | None = None,
        memory_bytes: int = MEMORY_BYTES,
        process: Process | None = None,
    ) -> None:
        self.store, self.device, self.progress, self.memory_bytes = store, device, progress, memory_bytes
        self.process = process or Process()
        self._known_kernels: Kernels | None = None
        self._known_search: IndexSearch | None = None

    @property
    def num_rows(self) -> int:
        """The number of training examples."""
        return self.store.manifest.train_set_size

    def scores(self, exp_name: str, estimate: Estimate, model_ids: list[int] | None, dtype: str | None = None) -> Any:
        """Compute all scores, or this process's shard of them; see `tracer.Tracer.finalize_scores`."""
        scorer, inputs, revisions = self._tile_scorer(exp_name, estimate, model_ids)
        results, process = self.store.results, self.process
        shape, tile_rows = (self.num_rows, scorer.num_targets), scorer.stored_tile_rows

        def opened() -> ScoreArray:
            return results.scores(
                exp_name, estimate.name, shape, inputs, tile_rows=tile_rows, dtype=dtype, revisions=revisions
            )

        if process.together:
            process.rank_zero_only(lambda: opened().close())
        with opened() as scores:
            share = process.rank, process.count
            results.adopt(scores, share)
            found: Any = write_scores(scorer, scores, self.progress, scores.remaining(share))
        process.wait()
        if process.count > 1:
            scores = opened()
            found = scores.matrix() if scores.complete else ScoreMatrix(scores.shape, scores.read)
        if scores.complete and process.rank == 0:
            results.remove_superseded(scores.path.parent)
        return found

    def top(
        self,
        exp_name: str,
        k: int,
        kind: str,
        estimate: Estimate,
        model_ids: list[int] | None,
        rows: ExampleSelection | None = None,
        labels: Labels | None = None,
    ) -> TopK:
        """Select the strongest training examples of stored targets; see `tracer.Tracer.top`."""
        chosen = self._check_top(k, kind, model_ids, rows, labels)
        query = self.top_query(exp_name, k, estimate, model_ids, chosen)
        if self.process.count > 1:
            shard = self.process.rows(self.num_rows, self.store.chunk_rows)
            query.compute([(shard.start, shard.stop)])
            self.process.wait()
            missing = 0 if self.process.together else query.num_missing
            if missing:
                raise IncompleteError(
                    f"This process has searched its shard of the training examples, {shard.start} to {shard.stop - 1}, "
                    f"and stored the result; {missing} examples of other processes are missing. Call top again when "
                    f"those are done."
                )
            self.process.rank_zero_only(query.result)
        return query.result()[KINDS.index(kind)]

    def query(
        self,
        targets: Sequence[FeatureTable],
        model_ids: list[int],
        indices: TrainIndices,
        k: int,
        kind: str,
        estimate: Estimate,
        candidates: int = 0,
    ) -> TopK:
        """Select the strongest training examples, or some ``candidates`` of the index, of targets in memory."""
        revisions, scorer = self._query_scorer(targets, model_ids, estimate)
        if candidates:
            indices = self._search.candidates(revisions, scorer, candidates, kind, self.memory_bytes)
        *_, (_, *ends) = stream_topk(scorer, indices, k, self.progress, aligned=len(indices) == self.num_rows)
        revisions.check()
        return ends[KINDS.index(kind)].result()

    def query_scores(
        self,
        targets: Sequence[FeatureTable],
        model_ids: list[int],
        estimate: Estimate,
        indices: TrainIndices | None = None,
    ) -> Float32[np.ndarray, "n M"]:
        """Return the scores of training examples (None: all) for targets in memory, given at each checkpoint."""
        revisions, scorer = self._query_scorer(targets, model_ids, estimate)
        chosen = range(self.num_rows) if indices is None else indices
        scores = np.empty((len(chosen), scorer.num_targets), np.float32)
        for start, tile in stream_tiles(scorer, chosen, self.progress, aligned=indices is None):
            scores[start : start + len(tile)] = tile.cpu().numpy()
        revisions.check()
        return scores

    def query_candidates(
        self,
        targets: Sequence[FeatureTable],
        model_ids: list[int],
        estimate: Estimate,
        weights: Float64[np.ndarray, " m"],
        count: int,
        kind: str,
    ) -> Int64[np.ndarray, " n"]:
        """Return candidates for the strongest training examples of the targets' sum with weights, by the index."""
        revisions, scorer = self._query_scorer(targets, model_ids, estimate)
        found = self._search.candidates(revisions, scorer, count, kind, self.memory_bytes, weights)
        revisions.check()
        return found

    def _query_scorer(
        self, targets: Sequence[FeatureTable], model_ids: list[int], estimate: Estimate
    ) -> tuple[Revisions, TileScorer]:
        revisions = finalized_revisions(self.store, model_ids)
        pairs, _ = self._terms(revisions, targets, estimate)
        return revisions, TileScorer(pairs, estimate, self.device, self.memory_bytes)

    def build_index(self, estimate: Estimate, model_ids: list[int] | None, dims: int) -> None:
        """Compute and store the index of training examples for an estimator; see `Tracer.build_index`."""
        self.store.manifest.feature_storage.require_features("an index")
        revisions = finalized_revisions(self.store, model_ids)
        self.process.wait()
        self.process.rank_zero_only(lambda: save_index(self.store, revisions, estimate, dims, self.progress))

    @property
    def _search(self) -> IndexSearch:
        if self._known_search is None or self._known_search.store is not self.store:
            self._known_search = IndexSearch(self.store)
        return self._known_search

    def check_query(
        self,
        k: int,
        kind: str,
        estimate: Estimate,
        model_ids: list[int] | None,
        rows: ExampleSelection | None,
        labels: Labels | None = None,
    ) -> tuple[list[int], TrainIndices]:
        """Check a query's arguments before gradients are computed; return its checkpoints and training examples."""
        indices = self._check_top(k, kind, model_ids, rows, labels)
        chosen = finalized_revisions(self.store, model_ids).model_ids
        self._weights(chosen, estimate)
        return chosen, indices

    def _check_top(
        self, k: int, kind: str, model_ids: list[int] | None, rows: ExampleSelection | None, labels: Labels | None
    ) -> TrainIndices:
        """Check arguments and return the training examples to select from."""
        check_choice("kind", kind, KINDS)
        chosen = resolve_selection(rows, self.num_rows)
        if labels is not None:
            chosen = self._with_labels(chosen, labels, model_ids)
        if check_count(k, "k") > len(chosen):
            number = f"train_set_size={self.num_rows}"
            if rows is not None or labels is not None:
                number = f"the {len(chosen)} training examples that were chosen"
            raise InputError(f"k={k} is more than {number}.")
        return chosen

    def _with_labels(self, indices: TrainIndices, labels: Labels, model_ids: list[int] | None) -> np.ndarray:
        """Return those of the training examples that have one of the labels."""
        wanted = np.atleast_1d(np.asarray(labels))
        if wanted.ndim != 1 or wanted.dtype.kind not in "iu":
            raise InputTypeError(f"labels={labels!r}; expected a class index or a list of them.")
        # all finalized checkpoints have the same labels
        known = finalized_revisions(self.store, model_ids).checkpoints[0].column("label")
        if (known == NO_LABEL).all():
            raise InputError("labels= needs a task with labels, but the store knows no labels; choose by rows=.")
        chosen = np.asarray(indices)[np.isin(known[np.asarray(indices)], wanted)]
        if not len(chosen):
            raise InputError(
                f"labels={labels!r}: no training example has them; the store knows {np.unique(known).tolist()}."
            )
        return chosen

    def top_query(
        self, exp_name: str, k: int, estimate: Estimate, model_ids: list[int] | None, indices: TrainIndices
    ) -> TopKQuery:
        """Return a query of which parts can be computed one by one; `top` computes all."""
        scorer, inputs, revisions = self._tile_scorer(exp_name, estimate, model_ids)
        return TopKQuery(self.store, exp_name, inputs, revisions, scorer, indices, int(k), self.progress)

    def self_influence(self, model_ids: list[int] | None, estimate: Estimate) -> np.ndarray:
        """Return each training example's influence on itself, ``[N]``; see `tracer.Tracer.self_influence`."""
        revisions = finalized_revisions(self.store, model_ids)
        chosen = revisions.model_ids
        weights, tables = self._weights(chosen, estimate), revisions.checkpoints
        total = np.zeros(self.num_rows)
        if estimate.kernel is None:
            for weight, table in zip(weights, tables, strict=True):
                ReadCheck(table, 1).check(np.arange(table.num_rows))
                total += weight * self_influence(table.column("loss_grad"), table.column("gradient_norm"))
            revisions.check()
            return total
        kernels = self._kernels(estimate, revisions)
        if estimate.is_unrolled:
            segments = self._segments(chosen, kernels)
            total = weights[0] * unrolled_self_influence(tables, segments, self.device, self.memory_bytes)
            revisions.check()
            return total
        total = kernels.mean_leverages(chosen, estimate)
        sizes = kernels.effect_sizes(chosen, estimate) if estimate.is_relative else np.ones(self.num_rows)
        loss_grad = np.mean([table.column("loss_grad") for table in tables], axis=0, dtype=np.float64)
        revisions.check()
        power = np.abs(loss_grad) if estimate.is_relative else np.square(loss_grad)
        return np.divide(total * power, sizes, out=np.zeros_like(total), where=sizes > 0)

    def changes_without(self, model_ids: list[int] | None) -> list[np.ndarray]:
        """Return how f of each training example would change without the example at each checkpoint, ``[N]`` each."""
        # The Newton step from one example's removal: φᵀ (K - wφφᵀ + λI)⁻¹ φ Q, with h = φᵀ (K + λI)⁻¹ φ.
        estimate, revisions = Estimate("influence"), finalized_revisions(self.store, model_ids)
        chosen, kernels = revisions.model_ids, self._kernels(estimate, revisions, warns=False)
        found = kernels.regularization(chosen, estimate).value
        tables = revisions.checkpoints
        weights, changes = kernel_weights(tables, self.num_rows), []

        def own_leverages(model_id: int, table: RowTable) -> np.ndarray:
            return leverages(table, kernels.get(model_id, "loss_hess", chosen)[0], found, self.device)

        for model_id, table in zip(chosen, tables, strict=True):
            key = ("leverages", str(found), *(revisions.tables[f"checkpoints/{each}"] for each in (model_id, *chosen)))
            own = kernels.sizes(key, partial(own_leverages, model_id, table))
            changes.append(table.column("loss_grad") * own / np.clip(1 - weights * own, MIN_DIVISOR, None))
        revisions.check()
        return changes

    def regularization(self, model_ids: list[int] | None, estimate: Estimate) -> Regularization:
        """Return the regularization of an estimator with a kernel; see `tracer.Tracer.regularization`."""
        revisions = finalized_revisions(self.store, model_ids)
        found = self._kernels(estimate, revisions, warns=False).regularization(revisions.model_ids, estimate)
        revisions.check()
        return found

    def _tile_scorer(
        self, exp_name: str, estimate: Estimate, model_ids: list[int] | None
    ) -> tuple[TileScorer, dict[str, Any], Revisions]:
        """Return a scorer of stored targets, JSON values that decide scores besides the tables, and these."""
        revisions = finalized_revisions(self.store, model_ids, exp_name)
        chosen = revisions.model_ids
        tables = complete_targets(self.store, exp_name, chosen)
        for table in tables:
            ReadCheck(table, self.num_rows).check(np.arange(table.num_rows))
        pairs, described = self._terms(revisions, tables, estimate, stored=True)
        if not self.store.manifest.feature_storage.stores_features:
            pairs = [
                replace(pair, cosines=complete_cosines(self.store, exp_name, model_id, targets))
                for model_id, pair, targets in zip(chosen, pairs, tables, strict=True)
            ]
        inputs = {"model_ids": chosen, "learning_rates": [pair.weight for pair in pairs], **described}
        return TileScorer(pairs, estimate, self.device, self.memory_bytes), inputs, revisions

    def _terms(
        self, revisions: Revisions, targets: Sequence[FeatureTable], estimate: Estimate, stored: bool = False
    ) -> tuple[list[CheckpointPair], dict[str, Any]]:
        """Return the terms of the sum over checkpoints, and JSON values that decide how targets are transformed."""
        model_ids = revisions.model_ids
        weights = self._weights(model_ids, estimate)
        trains = revisions.checkpoints
        if not estimate.transforms_targets:
            return list(map(CheckpointPair, weights, trains, targets)), {}
        if not estimate.kernel and not self.store.manifest.feature_storage.stores_features:
            groups = group_indices(estimate, targets[0])
            assert groups is not None  # all that transforms these targets
            pairs = map(CheckpointPair, weights, trains, targets)
            return [replace(pair, groups=groups) for pair in pairs], {"groups": _digest(groups)}
        groups, kernels = group_indices(estimate, targets[0]), self._kernels(estimate, revisions)
        described: dict[str, Any] = {} if groups is None else {"groups": _digest(groups)}
        solves: list[Any] = [None] * len(model_ids)
        segments = self._segments(model_ids, kernels) if estimate.is_unrolled else []
        if segments:
            described["segments"] = [segment.time for segment in segments]
        elif estimate.is_newton_step:
            found, weighting = kernels.regularization(model_ids, estimate), kernels.weighting(model_ids, estimate)
            described |= {"regularization": found.value, "rule": found.rule, "kernel": weighting}
            solves = [partial(kernels.solve, each, weighting, model_ids, found.value) for each in model_ids]
        common: Any = (estimate, groups, self.device, self.memory_bytes // (4 * len(model_ids)))
        if estimate.estimator == "trackstar":
            terms, whitened = whitened_terms(kernels, revisions, targets, common, stored)
            return terms, {**described, **whitened}
        if segments:
            transformed: list[Any] = unrolled_targets(targets, segments, *common)
        else:
            transformed = [
                PreconditionedTargets(table, solve, *common) for table, solve in zip(targets, solves, strict=True)
            ]
        sizes = kernels.effect_sizes(model_ids, estimate) if estimate.is_relative else None
        pairs = map(CheckpointPair, weights, trains, transformed)
        return [replace(pair, sizes=sizes) for pair in pairs], described

    def _segments(self, model_ids: list[int], kernels: Kernels) -> list[Segment]:
        """Return the segments that end at checkpoints."""
        if self.process.together:  # processes sum up a kernel together, so none may be left out later
            for model_id in model_ids:
                kernels.get(model_id, "loss_hess", [model_id])
        warn_of_other_runs(self.store, model_ids)
        times = [rate / self.num_rows for rate in segment_rates(self.store, model_ids)]
        return [
            Segment(model_id, time, partial(kernels.get, model_id, "loss_hess", [model_id]))
            for model_id, time in zip(model_ids, times, strict=True)
        ]

    def _kernels(self, estimate: Estimate, revisions: Revisions, warns: bool = True) -> Kernels:
        """Return the kernels of this store, which must have features."""
        what = f"estimator={estimate.estimator!r}"
        self.store.manifest.feature_storage.require_features(what)
        self.store.require_gradients(f"{what} (not tracin or cosine)")
        if estimate.kernel:
            self.store.manifest.feature_storage.require_values(what)
        known = self._known_kernels
        if known is None or known.store is not self.store:  # a store that has grown is another object
            known = Kernels(self.store, self.device, self.process, self.progress, self.memory_bytes // 2)
            self._known_kernels = known
        known.revisions = revisions
        if warns:
            known.warn_of_missing(revisions.model_ids, estimate)
        return known

    def _weights(self, model_ids: list[int], estimate: Estimate) -> list[float]:
        """Return the weight of each checkpoint: its learning rate, or an equal share with a kernel."""
        if estimate.is_unrolled:
            segment_rates(self.store, model_ids)
        if estimate.kernel:
            return [1 / len(model_ids)] * len(model_ids)
        return learning_rates(self.store, model_ids)


def _digest(groups: np.ndarray) -> str:
    return hashlib.sha256(groups.astype("<i8").tobytes()).hexdigest()

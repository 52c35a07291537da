"""An index of training examples, by which a question finds candidates without reading their stored features.

A score is an inner product of vectors of D values: the features of all checkpoints, those of the training example times
its weights, those of the target times the rest. Of the former the index keeps the d coordinates in the leading
principal components of a sample, one byte each. Candidates are the examples whose inner products with the target's
coordinates are largest; they are then ranked by their stored features, so that an answer has exact scores and misses at
most some examples. A search of clusters, by FAISS, takes 0.6 of the time with the same recall, and both little
beside the ranking: ``benchmarks/search.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float32, Float64, Int8, Int64

from tracer._core.progress import tqdm
from tracer._core.validation import bar_disabled
from tracer.errors import CallOrderError, InputError, StoreError
from tracer.scoring.estimators import Estimate
from tracer.scoring.feature_tables import column_at, raw_features_at
from tracer.scoring.matmul import MemoryPlan, Multiplier
from tracer.scoring.streaming import TileScorer
from tracer.scoring.topk import RunningTopK
from tracer.store import RowTable, Store
from tracer.store.manifest import json_value
from tracer.store.result_group import load_group, save_group
from tracer.store.revisions import Revisions, result_key
from tracer.types import TopK

DIMS = 128
"""The number of coordinates of each training example."""

_VERSION = 1
_SAMPLE_BYTES = 256 << 20
_MAX_SAMPLE = 16384
_BLOCK_BYTES = 32 << 20
_ITERATIONS = 2


class SearchIndex(NamedTuple):
    """Coordinates of training examples.

    Attributes:
        basis: ``[D, d]``, of checkpoints in the order of their numbers.
        codes: ``[N, d]``, coordinates in units of ``scale``.
        scale: ``[N, 1]``, up to 1.
    """

    basis: Float32[np.ndarray, "D d"]
    codes: Int8[np.ndarray, "N d"]
    scale: Float32[np.ndarray, "N 1"]

    def candidates(
        self, targets: Float32[np.ndarray, "m D"], count: int, largest: bool, device: torch.device, memory_bytes: int
    ) -> Int64[np.ndarray, " n"]:
        """Return the examples of the largest, or smallest, approximate scores of each target, ascending."""
        coordinates = targets @ self.basis
        unit = np.abs(coordinates).max(1, keepdims=True)
        wanted = np.rint(127 * np.divide(coordinates, unit, out=np.zeros_like(coordinates), where=unit > 0))
        multiplier = Multiplier(MemoryPlan.of(memory_bytes, self.codes.shape[1], len(wanted)), device, "int8")
        right = multiplier.convert(wanted.astype(np.int8))
        num_rows, step = len(self.codes), max(count, memory_bytes // (16 * (4 * len(wanted) + 4 * self.codes.shape[1])))
        running = RunningTopK(len(wanted), count, largest)
        for first in range(0, num_rows, step):
            scale = torch.from_numpy(self.scale[first : first + step]).to(device)
            scores = multiplier.multiply(self.codes[first : first + step], right).mul_(scale).T
            values, indices = scores.topk(min(count, scores.shape[1]), largest=largest)
            running.merge(TopK(first + indices.cpu().numpy(), values.cpu().numpy()))
        return np.unique(running.result().indices)


def check_indexed(estimate: Estimate) -> None:
    """Raise InputError if an estimator has a kernel."""
    # Its inverse enlarges just the directions that principal components leave out: with 128 of 1,024, a thousand
    # candidates of 200,000 held 44 of the 100 strongest examples.
    if estimate.kernel:
        raise InputError(
            f"an index got estimator={estimate.estimator!r}, whose kernel weighs directions that the index leaves out; "
            f"expected tracin or cosine, or ask without candidates."
        )


def save_index(store: Store, revisions: Revisions, estimate: Estimate, dims: int, progress: bool | None) -> None:
    """Compute the index of an estimator and store it, if the store has none of these training examples."""
    inputs = _inputs(revisions, estimate)
    parent = store.results.kernel_path(max(revisions.model_ids), f"search_{estimate.estimator}")
    found = _computed(_ordered(revisions), estimate, dims, progress)
    revisions.check()
    arrays = {name: getattr(found, name) for name in SearchIndex._fields}
    save_group(parent / result_key(inputs), {"inputs": inputs, "sums": {}}, arrays)
    store.results.remove_superseded(parent)


def load_index(store: Store, revisions: Revisions, estimate: Estimate) -> SearchIndex:
    """Return the index of an estimator, or raise CallOrderError if there is none of these training examples."""
    inputs = _inputs(revisions, estimate)
    parent = store.catalog.kernel_path(max(revisions.model_ids), f"search_{estimate.estimator}")
    advice = (
        f"call build_index(estimator={estimate.estimator!r}) of the tracer, or `tracer index STORE --estimator "
        f"{estimate.estimator}`; or ask without candidates."
    )
    try:
        known, arrays = load_group(parent / result_key(inputs))
        if known["inputs"] != inputs:
            raise StoreError(f"{parent} was computed from something else")
        return SearchIndex(**arrays)
    except FileNotFoundError as error:
        raise CallOrderError(
            f"The store has no index of its training examples, as they are now, at checkpoints {revisions.model_ids} "
            f"for estimator {estimate.estimator!r}: {advice}"
        ) from error
    except (StoreError, LookupError, TypeError) as error:
        raise CallOrderError(f"The index in the store is damaged ({error}): {advice}") from error


def _inputs(revisions: Revisions, estimate: Estimate) -> dict[str, Any]:
    tables = {path: revision for path, revision in revisions.tables.items() if path.startswith("checkpoints/")}
    check_indexed(estimate)
    known = {"version": _VERSION, "estimator": estimate.estimator, "model_ids": sorted(revisions.model_ids)}
    return dict(json_value({**known, "revisions": tables}, "inputs"))


def _ordered(revisions: Revisions) -> list[RowTable]:
    return [table for _, table in sorted(zip(revisions.model_ids, revisions.checkpoints, strict=True), key=_number)]


def _number(each: tuple[int, Any]) -> int:
    return each[0]


def _computed(tables: Sequence[RowTable], estimate: Estimate, dims: int, progress: bool | None) -> SearchIndex:
    num_rows, dim = tables[0].num_rows, sum(table.dim for table in tables)
    count = max(2, min(num_rows, _MAX_SAMPLE, _SAMPLE_BYTES // (4 * dim)))
    rng = np.random.default_rng(0)
    sample = np.sort(rng.choice(num_rows, min(count, num_rows), replace=False))
    vectors = np.concatenate([weight[:, None] * raw for weight, raw in _terms(tables, estimate, sample)], 1)
    vectors = (vectors / (np.abs(vectors).max() or 1.0)).astype(np.float32)
    size = min(dims, *vectors.shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        extra = min(size + 16, *vectors.shape)
        basis = torch.svd_lowrank(torch.from_numpy(vectors), extra, niter=_ITERATIONS)[2][:, :size].numpy().copy()
    codes, scale = np.empty((num_rows, size), np.int8), np.empty((num_rows, 1))
    step = max(1, _BLOCK_BYTES // (4 * dim))
    with tqdm(total=num_rows, desc="index", unit="row", disable=bar_disabled(progress)) as bar:
        for first in range(0, num_rows, step):
            rows = np.arange(first, min(first + step, num_rows))
            found, place = np.zeros((len(rows), size)), 0
            for weight, raw in _terms(tables, estimate, rows):
                own = basis[place : place + raw.shape[1]]
                found += weight[:, None] * (torch.from_numpy(raw) @ torch.from_numpy(own)).numpy()
                place += raw.shape[1]
            unit = np.abs(found).max(1, keepdims=True)
            codes[rows] = np.rint(127 * np.divide(found, unit, out=np.zeros_like(found), where=unit > 0))
            scale[rows] = unit
            bar.update(len(rows))
    return SearchIndex(basis, codes, (scale / (scale.max() or 1.0)).astype(np.float32))


def _terms(
    tables: Sequence[RowTable], estimate: Estimate, rows: Int64[np.ndarray, " n"]
) -> Iterator[tuple[Float64[np.ndarray, " n"], Float32[np.ndarray, "n k"]]]:
    """Yield the weights and stored features of training examples at each checkpoint."""
    for table in tables:
        loss_grad, norm = (column_at(table, name, rows) for name in ("loss_grad", "gradient_norm"))
        weight = estimate.train_weights(loss_grad, norm)
        yield weight * column_at(table, "scale", rows), raw_features_at(table, rows).astype(np.float32)


class IndexSearch:
    """Finds candidates by a store's indices, of which the last one stays in memory."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._known: tuple[str, SearchIndex] | None = None

    def candidates(
        self,
        revisions: Revisions,
        scorer: TileScorer,
        count: int,
        kind: str,
        memory_bytes: int,
        weights: Float64[np.ndarray, " m"] | None = None,
    ) -> Int64[np.ndarray, " n"]:
        """Return candidates for the strongest training examples of a scorer's targets, ascending.

        Args:
            revisions: The checkpoints.
            scorer: The targets.
            count: The number of candidates of each target.
            kind: ``proponents`` or ``opponents``.
            memory_bytes: The approximate memory of the search.
            weights: Search for the sum over targets with these weights. Default: for each target.
        """
        key = result_key(_inputs(revisions, scorer.estimate))
        if self._known is None or self._known[0] != key:
            self._known = key, load_index(self.store, revisions, scorer.estimate)
        vectors = _target_vectors(revisions.model_ids, scorer)
        if weights is not None:
            vectors = (weights @ vectors)[None].astype(np.float32)
        largest = kind == "proponents"
        return self._known[1].candidates(vectors, count, largest, scorer.device, memory_bytes)


def _target_vectors(model_ids: Sequence[int], scorer: TileScorer) -> Float32[np.ndarray, "m D"]:
    """Return by what training examples' vectors are multiplied, up to a common factor."""
    ordered = [pair for _, pair in sorted(zip(model_ids, scorer.pairs, strict=True), key=_number)]
    weights = [pair.weight * scorer.target_weights(pair) for pair in ordered]
    largest = float(np.max(np.abs(weights))) or 1.0
    parts = []
    for pair, weight in zip(ordered, weights, strict=True):
        raw = raw_features_at(pair.targets, np.arange(pair.targets.num_rows)).astype(np.float32)
        parts.append(raw * (weight / largest)[:, None].astype(np.float32))
    return np.concatenate(parts, 1)

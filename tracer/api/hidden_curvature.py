"""The curvature of a loss in outputs that f does not show, as features of gradients of drawn or listed labels."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from tracer._core.processes import Process
from tracer.api.featurizer import Featurizer
from tracer.api.featurizer_factory import FeaturizerFactory, LoadedCheckpoint
from tracer.api.shared_sums import SharedSums, as_stored
from tracer.data.batches import select_samples
from tracer.data.datasets import DataSource, exact_batches
from tracer.data.sampled_labels import LabelDraws, ListedLabels, example_keys
from tracer.errors import CallOrderError, NonFiniteError
from tracer.scoring.readiness import check_finalized
from tracer.store import Store
from tracer.store.curvature import remove_curvatures, save_curvature
from tracer.store.hidden_rows import hidden_inputs
from tracer.types import Batch

if TYPE_CHECKING:
    from tracer.api.tracer import Tracer

MIN_ROWS, MAX_ROWS = 1024, 4096
"""How many labels are drawn at least, and at most; in between one for each training example."""

MAX_PASSES = 4
"""The most labels that are drawn for each training example, if there are so few of these."""

MAX_LISTED, LISTED_BYTES = 1 << 16, 1 << 28
"""Up to how many labels, and bytes of their features, all are listed if features are exact."""

_SAMPLE_OFFSET = 1 << 20  # draws of their own, beside those that gradients are whitened with
_LEAST_DENSITY = 1e-3


def fit_kernel(
    _tracer: Tracer, train: Any, batch_size: int = 64, collate_fn: Callable[[list], Batch] | None = None
) -> None:
    """Compute the curvature of several outputs at the loaded checkpoint, for ``influence`` and ``relatif``.

    The output f of an example shows the curvature of its loss along one direction. A softmax of more than two
    classes, a regression with several outputs, and tokens have more: the rest of their Gauss-Newton matrix comes
    from gradients of other labels (see `Task.hidden_outputs`), all of them if these are few, else 1,024 to 4,096
    drawn from the model's predictions, at most four for each example. They are stored, 4 bytes for each of ``k``
    values; called again, this resumes or does nothing, as for tasks without such a rest. Processes share the work.
    `attribute` calls it for these estimators. Without it, their kernel is that of f alone.

    Call it when the training examples are finalized at all checkpoints, after `load_checkpoint` or
    `start_scoring_checkpoint`.

    Args:
        train: All training examples, as for `fit_curvature`.
        batch_size: The batch size, for data sets and tensors. Default: 64.
        collate_fn: Makes a batch of a data set's examples.

    Raises:
        CallOrderError: If no checkpoint is loaded, its training examples are not finalized, or the store keeps no
            values of features.
        InputError: If ``train`` has another number of examples than ``train_set_size``.
        NonFiniteError: If a gradient is NaN or infinite.
    """
    session = _tracer._session
    if session is None:
        raise CallOrderError("fit_kernel needs a checkpoint; call tracer.load_checkpoint(checkpoint, model_id) first.")
    model_id = int(session.table.path.name)
    _tracer.store.require_gradients("fit_kernel")
    _tracer.store.manifest.feature_storage.require_features("fit_kernel")
    _tracer.store.manifest.feature_storage.require_values("fit_kernel")
    if _tracer._backend.is_sharded:
        raise CallOrderError(
            "fit_kernel draws labels in one process; with a model that fully_shard divides, influence has the "
            "curvature of f alone."
        )
    _tracer.flush()
    check_finalized(_tracer.store, model_id)
    source = _tracer._factory.training_source(train, _tracer.train_set_size, batch_size, collate_fn)
    HiddenFit(_tracer._factory, _tracer.store, session.loaded, model_id, _tracer.process).run(source)


class HiddenFit:
    """Computes what the kernel of ``influence`` needs beside the training examples' features, unless it is stored.

    With several outputs the Gauss-Newton matrix of the loss has a higher rank than ``w ∇f ∇fᵀ``. Its rest is a sum over
    labels (see `Task.hidden_outputs`), of which all are listed if these are few, or some are drawn: of an example in
    proportion to its ``|Q|`` if they are others than the given label, since that is their probability.

    Args:
        factory: Makes engines and knows the settings.
        store: The store.
        loaded: The checkpoint.
        model_id: Its number; its training examples are finalized.
        process: This process.
    """

    def __init__(
        self, factory: FeaturizerFactory, store: Store, loaded: LoadedCheckpoint, model_id: int, process: Process
    ) -> None:
        self._factory, self._store, self._loaded = factory, store, loaded
        self._model_id, self._process = model_id, process
        self._inputs = hidden_inputs(store, model_id)
        self._sums = SharedSums(store, model_id, self._inputs, process, factory.device, factory.settings.progress)

    def run(self, source: DataSource) -> None:
        """Compute and store the features of labels, and of the model's weights."""
        if self._process.agreed(self._sums.is_done):
            return
        featurizer = self._factory.make(self._loaded, self._model_id, self._store)
        first, _ = next(iter(exact_batches(source, np.zeros(1, dtype=np.int64))))
        count = featurizer.ask(self._factory.own_task.num_hidden, first)
        labels = "none" if count == 0 else str(self._factory.own_task.hidden_labels)
        found = self._empty() if count == 0 else self._drawn(labels, count, source)
        if found is None:
            return
        tensors, values = found.state()
        if self._factory.settings.preconditioner is None:
            tensors = {**tensors, "weights": featurizer.projected_weights()}

        def save() -> None:
            save_curvature(self._store, self._model_id, self._inputs, as_stored(tensors, values, labels=labels))
            kept = [self._inputs, self._factory.curvature_inputs(self._loaded)]
            remove_curvatures(self._store, self._model_id, except_for=kept)

        self._process.rank_zero_only(save)

    def _drawn(self, labels: str, count: int | None, source: DataSource) -> HiddenFeatures | None:
        """Return the features of labels, or None if another process has stored the result meanwhile."""
        plan = self._planned(labels, count)
        chosen = np.flatnonzero(plan.counts)
        if not len(chosen):
            return self._empty()
        engine = self._factory.hidden_engine(plan.draws)
        engine.use_fallback(self._factory.engine.fallback)
        engine.use_weights(self._loaded.fingerprint)
        featurizer = self._factory.make(self._loaded, self._model_id, self._store, engine)
        compute = partial(self._batch, plan, featurizer)
        return self._sums.sum("other labels", HiddenFeatures, chosen, source, compute, plan.digest)

    def _planned(self, labels: str, count: int | None) -> Plan:
        tables = [self._store.checkpoint(each) for each in self._store.catalog.checkpoint_ids()]
        known = [table.column("loss_grad") for table in tables if table.column("done").all()]
        density = np.ones(self._store.manifest.train_set_size)
        if labels == "others":
            density = np.mean(np.abs(known), axis=0, dtype=np.float64)
        exact = self._store.manifest.settings["projector"]["kind"] == "none"
        return planned(density, count, self._store.manifest.feature_dim if exact else None, self._seed)

    @property
    def _seed(self) -> int:
        return int(self._factory.settings.seed)

    def _empty(self) -> HiddenFeatures:
        return HiddenFeatures([torch.zeros(0, self._store.manifest.feature_dim)])

    def _batch(self, plan: Plan, featurizer: Featurizer, batch: Batch, inds: np.ndarray) -> HiddenFeatures:
        """Return the features of a batch, those of all first labels first."""
        found, counts = HiddenFeatures(), plan.counts[inds]
        for number in range(int(counts.max())):
            chosen = np.flatnonzero(counts > number)
            rows = inds[chosen]
            part = batch if len(rows) == len(inds) else select_samples(batch, torch.from_numpy(chosen), len(inds))
            keys = torch.full((len(rows),), number)
            if plan.draws is LabelDraws:
                keys = example_keys(self._seed, self._model_id, _SAMPLE_OFFSET + number, rows)
            features = featurizer.compute((part, keys), len(rows)).features
            assert features is not None
            if not np.isfinite(features).all():
                raise NonFiniteError(
                    f"The gradients of other labels of rows {rows[:5].tolist()} and others of their batch are NaN or "
                    f"infinite. Look at these rows' inputs, or at the checkpoint's weights."
                )
            scaled = features * np.sqrt(plan.scales[rows, None])
            found.merge(HiddenFeatures([torch.from_numpy(scaled.astype(np.float32))], rows.tolist()))
        return found


class HiddenFeatures:
    """Features of drawn labels ``[R, k]``, float32, and the training example of each.

    Args:
        pieces: ``[n, k]`` each.
        examples: R indices.
    """

    def __init__(self, pieces: Sequence[Tensor] = (), examples: Sequence[int] = ()) -> None:
        self.pieces, self.examples = list(pieces), list(examples)

    def merge(self, other: HiddenFeatures) -> None:
        """Append other features."""
        self.pieces += other.pieces
        self.examples += other.examples

    def state(self) -> tuple[Mapping[str, Tensor], Mapping[str, Any]]:
        """Return the features, and the examples."""
        return {"features": torch.cat(self.pieces)}, {"examples": self.examples}

    @classmethod
    def restored(cls, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> HiddenFeatures:
        """Return features of a state."""
        return cls([tensors["features"].cpu()], values["examples"])


@dataclass(frozen=True)
class Plan:
    """Which labels the features are of.

    Attributes:
        draws: Draws or lists labels.
        counts: ``[N]``, how many of each training example.
        scales: ``[N]``, the weight of each of these: sums are then expectations over labels, or sums of all.
    """

    draws: type[LabelDraws]
    counts: Int64[np.ndarray, " N"]
    scales: Float64[np.ndarray, " N"]

    @property
    def digest(self) -> str:
        """A hash of everything."""
        return hashlib.sha256(self.counts.tobytes() + self.scales.tobytes()).hexdigest()


def planned(density: Float64[np.ndarray, " N"], count: int | None, exact_dim: int | None, seed: int) -> Plan:
    """Return all labels if they are few, else draws, examples in proportion to a density.

    Args:
        density: ``[N]``, 0 or more.
        count: The number of labels of an example; None if they cannot be listed.
        exact_dim: The number of values of exact features; None if features are projected, with an error that is larger
            than that of drawing labels.
        seed: Of the draws.

    >>> planned(np.array([1.0, 0.0, 3.0]), 2, None, 0).counts.tolist()
    [2, 0, 2]
    """
    total, rows = float(density.sum()), len(density)
    drawn = min(max(rows, min(MIN_ROWS, MAX_PASSES * rows)), MAX_ROWS)
    if total == 0:
        return Plan(ListedLabels, np.zeros(rows, np.int64), np.ones(rows))
    if count is not None:
        listed = count * int(np.count_nonzero(density))
        exact = exact_dim is not None and listed <= MAX_LISTED and 4 * listed * exact_dim <= LISTED_BYTES
        if listed <= MAX_ROWS or exact:
            return Plan(ListedLabels, np.where(density > 0, count, 0), np.ones(rows))
    # Systematic: each count is within one of its expectation, so that sums vary less than with independent draws.
    density = np.maximum(density, _LEAST_DENSITY * total / rows)
    share = density / density.sum()
    ends = np.floor(np.cumsum(share) * drawn + np.random.default_rng(seed).random())
    counts = np.diff(ends, prepend=0.0).astype(np.int64)
    return Plan(LabelDraws, counts, 1 / (drawn * share))

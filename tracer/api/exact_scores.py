"""Exact cosines of the gradients of all training examples with all targets at one checkpoint; no gradient is stored.

The gradients of as many targets as memory allows are held as factors. The training set is run once for them, and inner
products with the held gradients are taken layer by layer during each backward. Cosines are stored, since they neither
overflow nor vanish with the size of gradients; scores follow from them, loss derivatives and norms.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from tracer._core.progress import tqdm
from tracer._core.validation import bar_disabled, check_count, check_model_id
from tracer.api.featurizer import Featurizer
from tracer.api.featurizer_factory import check_weights
from tracer.api.session import target_table
from tracer.api.sinks import NormSink, row_values, write_values
from tracer.data.batches import map_leaves
from tracer.data.datasets import DataSource, as_data_source, exact_batches
from tracer.errors import CallOrderError, InputError, NonFiniteError
from tracer.gradients import GradientsChanged
from tracer.gradients.inner_products import TargetGradients
from tracer.gradients.per_sample import PerSampleGradient
from tracer.store import RowTable, ScoreArray, Store
from tracer.store.revisions import Revisions
from tracer.types import Batch, Checkpoint

if TYPE_CHECKING:
    from tracer.api.tracer import Tracer

TILE_ROWS = 1024
"""How many train rows are stored at once."""


def score_exactly(
    _tracer: Tracer,
    checkpoint: Checkpoint,
    model_id: int,
    train: Any,
    targets: Any,
    exp_name: str,
    batch_size: int = 64,
    collate_fn: Callable[[list], Batch] | None = None,
) -> None:
    """Compare exact gradients of all training examples and targets at a checkpoint, without storing gradients.

    Only for ``storage="none"``, in place of `featurize` and `score`: one pass over the targets and, for every
    ``memory_bytes`` of their gradients, one over the training set. Call it again and it resumes. Then
    `finalize_features` and `finalize_scores` or `top` give the scores.

    Args:
        checkpoint: The checkpoint that was loaded under ``model_id`` by `load_checkpoint`.
        model_id: Its number in the store.
        train: All training examples: a map-style data set, a tuple of tensors, or a `DataLoader`, list or other
            iterable that yields the same batches or examples each time.
        targets: All targets, in one of the same forms.
        exp_name: The name of this set of targets.
        batch_size: The batch size, for data sets and tensors. Default: 64.
        collate_fn: Makes a batch of a data set's examples.

    Raises:
        CallOrderError: If the store has another storage, or the checkpoint was never loaded.
        InputError: If ``train`` has another number of examples than ``train_set_size``.
        MismatchError: If the weights, an example's inputs, or what model and task make of them differ from those
            stored. A Tracer reads examples whose scores are complete only once.
        NonFiniteError: If a gradient is NaN or infinite.
    """
    factory, store = _tracer._factory, _tracer.store
    if store.manifest.feature_storage.stores_features:
        raise CallOrderError(
            f"score_exactly is for storage='none'; this store has storage={store.manifest.storage!r}, whose "
            f"scores come from featurize, score and finalize_scores."
        )
    if factory.backend.is_sharded:
        raise CallOrderError(
            "score_exactly compares all training examples with all targets in one process; with a model that "
            "fully_shard divides, use featurize, score and finalize_scores with storage='float32' or 'float16'."
        )
    model_id, batch_size = check_model_id(model_id), check_count(batch_size, "batch_size")
    in_order = bool(factory.settings.check_rows)
    train_rows = factory.training_source(train, _tracer.train_set_size, batch_size, collate_fn)
    target_rows = as_data_source(targets, "targets", batch_size, collate_fn, in_order, factory.form_of(exp_name))
    loaded = factory.read(checkpoint)
    check_weights(store.checkpoint(model_id), loaded.fingerprint, model_id)
    _tracer.close()
    target_table(store, exp_name, model_id, len(target_rows), factory.target_settings)
    for engine in {factory.engine, factory.target_engine}:
        engine.use_weights(loaded.fingerprint)
    settings = factory.settings
    unread = {None, exp_name} - factory.compared if in_order else set()
    factory.written |= {None, exp_name}
    factory.compared |= unread
    featurizer = factory.make(loaded, model_id, store)
    of_targets = factory.make(loaded, model_id, store, factory.target_engine)
    while True:
        try:
            given = (store, exp_name, model_id, settings.memory_bytes, settings.progress)
            writer = CosineWriter(featurizer, of_targets, *given)
            return writer.run(train_rows, target_rows, unread)
        except GradientsChanged as change:
            factory.forget(store, change)


class CosineWriter:
    """Computes the cosines of a set of targets at a checkpoint and stores them with losses, derivatives and norms.

    Args:
        featurizer: Runs the model at the checkpoint on training examples.
        target_featurizer: Runs it on targets.
        store: The store, which has the tables of training examples and of targets.
        exp_name: The name of the targets.
        model_id: The checkpoint.
        memory_bytes: The approximate memory of held gradients; at least those of one batch of targets are held.
        progress: Show progress bars; None: on a terminal only.
    """

    def __init__(
        self,
        featurizer: Featurizer,
        target_featurizer: Featurizer,
        store: Store,
        exp_name: str,
        model_id: int,
        memory_bytes: int,
        progress: bool | None = None,
    ) -> None:
        self._featurizer, self._target_featurizer = featurizer, target_featurizer
        self._store, self._exp_name = store, exp_name
        self._memory_bytes, self._progress = memory_bytes, progress
        self._train, self._targets = store.checkpoint(model_id), store.targets(exp_name, model_id)
        self._revisions = Revisions(store, [model_id], exp_name)
        self._same_rows = store.other_checkpoint(model_id)
        self._same_targets = store.other_targets(exp_name, model_id)
        for name, tables in ((None, (self._train, self._same_rows)), (exp_name, (self._targets, self._same_targets))):
            for table in tables:
                if table is not None:
                    table.name_rows(store.ids(name).named)

    def run(self, train: DataSource, targets: DataSource, unread: Collection[str | None] = ()) -> None:
        """Compute everything that is not stored yet, block by block of targets.

        Args:
            train: All training examples.
            targets: All targets.
            unread: The names of the sets, None being the training set, whose stored examples are compared first.

        Raises:
            MismatchError: If an example's inputs differ from those stored for its index.
            NonFiniteError: If a gradient is NaN or infinite.
        """
        try:
            with torch.inference_mode(False):
                if None in unread:
                    self._featurizer.compare(self._train, train)
                if self._exp_name in unread:
                    self._target_featurizer.compare(self._targets, targets)
                self._run_blocks(train, targets)
        finally:
            for table in (self._train, self._targets):
                table.close()

    def _run_blocks(self, train: DataSource, targets: DataSource) -> None:
        results, first = self._store.results, 0
        # Blocks of examples that were replaced since keep their sizes, so that the cosines of the rest can be adopted.
        earlier = results.cosines(self._exp_name, self._revisions, earlier=True)
        sizes = {start: block.shape[1] for start, block in earlier}
        stored = dict(results.cosines(self._exp_name, self._revisions))
        while first < len(targets):
            block = stored.get(first)
            known = block is not None and self._targets.column("done", first, first + block.shape[1]).all()
            if block is None or not known or not block.complete or block.shape[0] < len(train):
                held = self._hold(targets, first, sizes.get(first))
                last = first + held.num_rows
                self._targets.flush()  # a block that is there says that its targets' values are
                block = results.cosine_block(
                    self._exp_name, first, held.num_rows, self._revisions, tile_rows=min(TILE_ROWS, len(train))
                )
                self._write_block(block, train, held, f"targets {first}-{last - 1}")
            first += block.shape[1]
        results.remove_superseded(self._store.catalog.cosines_path(self._exp_name, self._revisions.model_ids[0]))

    def _hold(self, targets: DataSource, first: int, size: int | None) -> TargetGradients:
        """Compute the gradients of ``size`` targets, or of as many as memory allows."""
        held = TargetGradients()
        last = len(targets) if size is None else first + size
        following = first
        for batch, rows in exact_batches(targets, np.arange(first, last)):
            if not np.array_equal(rows, np.arange(following, following + len(rows))):
                raise InputError(
                    f"exact scores expect targets in ascending order, got {rows[:5]} after {following - 1}."
                )
            following += len(rows)
            sink = HoldingSink(len(rows), self._featurizer.device)
            # Factors may be views of the batch, whose memory a loader may use again.
            own = map_leaves(batch, lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf)
            self._run(self._target_featurizer, self._targets, own, rows, sink, self._same_targets)
            held.append(gradient_lengths(sink.squared_norm), sink.pieces)
            if size is None and held.num_bytes() > self._memory_bytes:
                break
        held.join()
        return held

    def _write_block(self, block: ScoreArray, train: DataSource, held: TargetGradients, description: str) -> None:
        """Compute the cosines of all training examples of unfinished tiles with the held targets."""
        rows = [np.arange(start, stop) for start, stop in block.remaining()]
        if not rows:
            return
        bands: dict[int, np.ndarray] = {}
        missing: dict[int, int] = {}
        disable = bar_disabled(self._progress)
        with block, tqdm(total=len(train), unit="row", desc=description, disable=disable) as bar:
            bar.update(len(train) - sum(map(len, rows)))
            for batch, inds in exact_batches(train, np.concatenate(rows)):
                sink = ProductSink(held, len(inds), self._featurizer.device)
                self._run(self._featurizer, self._train, batch, inds, sink, self._same_rows)
                lengths = gradient_lengths(sink.squared_norm)[:, None]
                cosines = (sink.products / lengths).to("cpu", torch.float32).numpy()
                _check_finite(cosines, inds)
                for tile in np.unique(inds // block.tile_rows).tolist():
                    start = tile * block.tile_rows
                    stop = min(start + block.tile_rows, len(train))
                    band = bands.setdefault(tile, np.zeros((stop - start, held.num_rows), np.float32))
                    mine = inds // block.tile_rows == tile
                    band[inds[mine] - start] = cosines[mine]
                    missing[tile] = missing.get(tile, stop - start) - int(mine.sum())
                    if not missing[tile]:
                        self._train.flush()  # a tile that is done says that its rows' values are
                        block.write(start, bands.pop(tile))
                bar.update(len(inds))

    def _run(
        self,
        featurizer: Featurizer,
        table: RowTable,
        batch: Batch,
        rows: np.ndarray,
        sink: HoldingSink | ProductSink,
        same_rows: RowTable | None = None,
    ) -> None:
        """Run a batch, and write the values of examples that are not stored yet."""
        fingerprint, known = featurizer.check(table, batch, rows, same_rows)
        outputs = featurizer.run(batch, len(rows), sink)
        new = ~known
        values = row_values(outputs, sink.squared_norm, featurizer.engine.audited)
        write_values(table, rows[new], values.select(new), fingerprint[new])


class HoldingSink(NormSink):
    """Holds gradients and sums up their squared norms, ``[B]``, float64."""

    def __init__(self, num_rows: int, device: torch.device) -> None:
        super().__init__(num_rows, device)
        self.pieces: list[tuple[int, dict[str, PerSampleGradient]]] = []

    def begin(self) -> None:
        """Discard all gradients."""
        super().begin()
        self.pieces.clear()

    def take(self, start: int, stop: int, gradients: dict[str, PerSampleGradient]) -> None:
        """Hold the gradients of samples ``start`` to ``stop``."""
        super().take(start, stop, gradients)
        self.pieces.append((start, gradients))


class ProductSink:
    """Sums up inner products with held gradients ``[B, m]``, and squared norms ``[B]``; both float64."""

    def __init__(self, held: TargetGradients, num_rows: int, device: torch.device) -> None:
        self._held = held
        self.products = torch.zeros(num_rows, held.num_rows, dtype=torch.float64, device=device)
        self.squared_norm = torch.zeros(num_rows, dtype=torch.float64, device=device)

    def begin(self) -> None:
        """Start from zeros."""
        self.products.zero_()
        self.squared_norm.zero_()

    def take(self, start: int, stop: int, gradients: dict[str, PerSampleGradient]) -> None:
        """Add the gradients of samples ``start`` to ``stop``."""
        for name, gradient in gradients.items():
            products = self.products[start:stop]
            if gradient.device != products.device:  # of a model that lies on several devices
                products = torch.zeros_like(products, device=gradient.device)
            squares = self._held.add_products(name, gradient, products)
            self.squared_norm[start:stop] += squares.to(self.squared_norm.device)
            if products.device != self.products.device:
                self.products[start:stop] += products.to(self.products.device)


def gradient_lengths(squared_norm: Tensor) -> Tensor:
    """Return norms ``[B]``, float64, and 1 for a gradient of zero."""
    return torch.where(squared_norm > 0, squared_norm.sqrt(), 1.0)


def _check_finite(cosines: np.ndarray, rows: np.ndarray) -> None:
    bad = rows[~np.isfinite(cosines).all(axis=1)]
    if len(bad):
        raise NonFiniteError(
            f"Inner products of the gradients of rows {bad[:5].tolist()} with targets are NaN or infinite. Gradient "
            f"norms beyond about 1e18 are out of range; scale the loss, or leave these rows out."
        )

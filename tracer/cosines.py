"""Exact cosines of the gradients of all train rows with all targets at one checkpoint; no gradient is stored.

The gradients of as many targets as memory allows are held as factors. All train rows pass by, and the inner products
of their gradients with those of the targets are taken layer by layer during each backward. What is stored are cosines:
they neither overflow nor vanish, however large or small gradients are, and slopes and norms make scores of them.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from tracer.batches import select_rows
from tracer.factors import PerSampleGradient
from tracer.featurize import Featurizer, row_values, write_values
from tracer.projection.crossed import TargetGradients
from tracer.projection.norms import squared_norm
from tracer.rowsource import RowSource
from tracer.store import RowTable, ScoreArray, Store
from tracer.types import Batch

TILE_ROWS = 1024
"""How many train rows are stored at once."""


class CosineWriter:
    """Computes the cosines of an experiment at a checkpoint and stores them with the rows' losses, slopes and norms.

    Args:
        featurizer: Runs the model at the checkpoint.
        store: Where everything goes; it has the tables of train rows and of targets.
        exp_name: The name of the targets.
        model_id: The checkpoint.
        memory_bytes: How much of targets' gradients to hold, about; at least those of one batch are held.
        progress: Show a bar; None: on a terminal only.
    """

    def __init__(
        self,
        featurizer: Featurizer,
        store: Store,
        exp_name: str,
        model_id: int,
        memory_bytes: int,
        progress: bool | None = None,
    ) -> None:
        self._featurizer, self._store, self._key = featurizer, store, (exp_name, model_id)
        self._memory_bytes, self._progress = memory_bytes, progress
        self._train, self._targets = store.checkpoint(model_id), store.targets(exp_name, model_id)
        self._same_rows = _other_table(store, model_id)

    def run(self, train: RowSource, targets: RowSource) -> None:
        """Compute what is not stored yet, block by block of targets.

        Args:
            train: All train rows.
            targets: All targets.

        Raises:
            MismatchError: A row's inputs differ from those stored for its index.
            NonFiniteError: A row's gradient is NaN or infinite.
        """
        first = 0
        while first < targets.num_rows:
            size = self._stored_size(first)
            if size is None or not dict(self._store.cosines(*self._key))[first].complete:
                held, lengths = self._hold(targets, first, size)
                size = held.num_rows
                self._targets.flush()  # a block that is there says that its targets' values are
                block = self._store.cosine_block(
                    *self._key, first, size, self._inputs(first, size), tile_rows=min(TILE_ROWS, train.num_rows)
                )
                self._write_block(block, train, held, lengths, f"targets {first}-{first + size - 1}")
            first += size
        for table in (self._train, self._targets):
            table.close()

    def _inputs(self, first: int, size: int) -> dict:
        tables = [table.attributes["table_id"] for table in (self._train, self._targets)]
        return {"tables": tables, "targets": [first, first + size]}

    def _stored_size(self, first: int) -> int | None:
        """Return the number of targets of the block that is stored from a target on, None where there is none."""
        block = dict(self._store.cosines(*self._key)).get(first)
        if block is None or block.inputs != self._inputs(first, block.shape[1]):
            return None
        return block.shape[1]

    def _hold(self, targets: RowSource, first: int, size: int | None) -> tuple[TargetGradients, Tensor]:
        """Compute the gradients of ``size`` targets, or of as many as memory allows, and their norms ``[m]``."""
        held, lengths = TargetGradients(), []
        last = targets.num_rows if size is None else first + size
        for batch, rows in _wanted(targets, np.arange(first, last)):
            sink = _HoldingSink(len(rows), self._featurizer.device)
            self._run(self._targets, batch, rows, sink)
            held.append(len(rows), sink.pieces)
            lengths.append(sink.squared_norm.sqrt())
            if size is None and held.num_bytes() > self._memory_bytes:
                break
        held.join()
        return held, torch.cat(lengths)

    def _write_block(
        self, block: ScoreArray, train: RowSource, held: TargetGradients, lengths: Tensor, description: str
    ) -> None:
        """Compute the cosines of all train rows of unfinished tiles with the held targets."""
        rows = [np.arange(start, stop) for start, stop in block.remaining()]
        if not rows:
            return
        bands: dict[int, np.ndarray] = {}
        missing: dict[int, int] = {}
        disable = None if self._progress is None else not self._progress
        with block, tqdm(total=train.num_rows, unit="row", desc=description, disable=disable) as bar:
            bar.update(train.num_rows - sum(map(len, rows)))
            for batch, inds in _wanted(train, np.concatenate(rows)):
                sink = _ProductSink(held, len(inds), self._featurizer.device)
                self._run(self._train, batch, inds, sink, self._same_rows)
                cosines = _over_norms(sink.products, sink.squared_norm.sqrt(), lengths)
                for tile in np.unique(inds // block.tile_rows).tolist():
                    start = tile * block.tile_rows
                    stop = min(start + block.tile_rows, train.num_rows)
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
        table: RowTable,
        batch: Batch,
        rows: np.ndarray,
        sink: _HoldingSink | _ProductSink,
        same_rows: RowTable | None = None,
    ) -> None:
        """Run a batch, and write its rows' values where they are not there yet."""
        fingerprint, known = self._featurizer.check(table, batch, rows, same_rows)
        outputs = self._featurizer.run(batch, len(rows), sink)
        new = ~known
        values = row_values(outputs, sink.squared_norm)
        write_values(table, rows[new], values.select(new), fingerprint[new])


class _HoldingSink:
    """Holds gradients and sums up their squared norms, ``[B]``, float64."""

    def __init__(self, num_rows: int, device: torch.device) -> None:
        self.squared_norm = torch.zeros(num_rows, dtype=torch.float64, device=device)
        self.pieces: list[tuple[int, dict[str, PerSampleGradient]]] = []

    def begin(self) -> None:
        """Start anew."""
        self.squared_norm.zero_()
        self.pieces.clear()

    def take(self, start: int, stop: int, gradients: dict[str, PerSampleGradient]) -> None:
        """Hold the gradients of samples ``start`` to ``stop``."""
        self.pieces.append((start, gradients))
        with torch.no_grad(), torch.autocast(self.squared_norm.device.type, enabled=False):
            for gradient in gradients.values():
                self.squared_norm[start:stop] += squared_norm(gradient).to(self.squared_norm.device)


class _ProductSink:
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
        with torch.no_grad(), torch.autocast(self.products.device.type, enabled=False):
            for name, gradient in gradients.items():
                self.squared_norm[start:stop] += self._held.add_products(name, gradient, self.products[start:stop])


def _over_norms(products: Tensor, left: Tensor, right: Tensor) -> np.ndarray:
    """Return products ``[B, m]`` over norms ``[B]`` and ``[m]``, float32; zero where a norm is."""
    cosines = products / torch.where(left > 0, left, 1.0)[:, None] / torch.where(right > 0, right, 1.0)
    return cosines.to("cpu", torch.float32).numpy()


def _wanted(source: RowSource, rows: np.ndarray) -> Iterator[tuple[Batch, np.ndarray]]:
    """Yield batches of exactly the given rows, ascending, with their indices."""
    for batch, inds in source.batches(rows):
        mine = np.isin(inds, rows, assume_unique=True)
        if not mine.all():
            batch = select_rows(batch, torch.from_numpy(np.flatnonzero(mine)), len(inds))
        yield batch, inds[mine]


def _other_table(store: Store, model_id: int) -> RowTable | None:
    """Return the fullest table of train rows at another checkpoint."""
    others = [store.checkpoint(other) for other in store.checkpoint_ids() if other != model_id]
    return max(others, key=lambda table: table.num_done, default=None)

"""Kernels of stored train rows: read from the store, or added up from the rows, by several processes together.

Layout: train rows ``Phi [N, k]``, kernels ``[k, k]``. Sums are float64.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from tracer.arguments import bar_disabled
from tracer.curvature import Kernel, Moments, Regularization, choose_regularization
from tracer.errors import InputError
from tracer.processes import Process
from tracer.projection.base import row_blocks
from tracer.rank import Rows
from tracer.scoring import Estimate
from tracer.store import RowTable, Store
from tracer.store.kernels import load_kernel, save_kernel

BLOCK_BYTES = 32 << 20
"""How many bytes of float64 rows are held at once."""


class Kernels:
    """The kernels of a store's checkpoints, read from the store or made from its train rows.

    Args:
        store: The store.
        device: Where to multiply.
        process: Which of several processes this one is: those that run together each add up their own rows.
        progress: Show a bar; None: on a terminal only.
        memory_bytes: How many bytes of kernels are held, but one at least; also from one question to the next.
    """

    def __init__(
        self, store: Store, device: torch.device, process: Process, progress: bool | None, memory_bytes: int
    ) -> None:
        self.store, self.device, self.process, self.progress = store, device, process, progress
        dim, num_rows = store.manifest.feature_dim, store.manifest.train_set_size
        self._most = max(1, memory_bytes // (16 * dim * min(dim, num_rows)))  # a matrix or rows, and a factor or basis
        self._held: dict[tuple[str, ...], tuple[Kernel, Moments]] = {}
        self._contents: dict[int, str] = {}

    def look_again(self) -> None:
        """Begin a new question: train rows may have changed since the last one."""
        self._contents = {}

    def get(self, model_id: int, weighting: str, of: Sequence[int]) -> tuple[Kernel, Moments]:
        """Return a checkpoint's kernel and the sums beside it.

        Args:
            model_id: The checkpoint, finalized.
            weighting: A value of `tracer.scoring.KERNELS`.
            of: The checkpoints whose curvatures are averaged.

        Returns:
            Both, on the device.

        Raises:
            InputError: The loss is not convex in f.
        """
        of = [] if weighting == "plain" else sorted(of)
        key = weighting, *(self._content(each) for each in (model_id, *of))
        if key not in self._held:
            while len(self._held) >= self._most:
                del self._held[next(iter(self._held))]
            self._held[key] = self._make(model_id, weighting, of)
        return self._held[key]

    def _content(self, model_id: int) -> str:
        """Return what tells a checkpoint's rows from others, also from those that were there before."""
        if model_id not in self._contents:
            checksums = self.store.checkpoint(model_id).column("checksum")
            self._contents[model_id] = hashlib.sha256(checksums.tobytes()).hexdigest()
        return self._contents[model_id]

    def regularization(self, model_ids: list[int], estimate: Estimate) -> Regularization:
        """Return the λ with which an estimate is made.

        Args:
            model_ids: The checkpoints.
            estimate: What is asked for; its estimator has a kernel.

        Returns:
            What was given, or the choice of `choose_regularization` at the checkpoint that was trained longest, that of
            the lowest mean loss, with its own curvatures; scaled by traces to the kernel that scores are made with.
        """
        assert estimate.kernel is not None
        if estimate.regularization != "auto":
            return Regularization(float(estimate.regularization), "given")
        losses = [float(np.mean(self.store.checkpoint(model_id).column("loss"))) for model_id in model_ids]
        last = model_ids[int(np.argmin(losses))]
        kernel, own = self.get(last, "curvature", [last])
        found = choose_regularization(kernel, own)
        _, used = self.get(last, estimate.kernel, model_ids)
        tiny = np.finfo(float).tiny
        value = found.value * max(used.trace, tiny) / max(own.trace, tiny)
        return Regularization(self.process.agreed(value), found.rule)

    def _make(self, model_id: int, weighting: str, of: list[int]) -> tuple[Kernel, Moments]:
        """Make a kernel: from its rows where there are fewer of them than features, else as a matrix, which is kept."""
        table = self.store.checkpoint(model_id)
        tables = [self.store.checkpoint(each) for each in of]
        sums = _KernelSums(table, row_weighting(tables, table.num_rows), self.device)
        if table.num_rows < table.dim:
            features = torch.cat([rows for rows, _ in sums.read(range(table.num_rows))])
            return Kernel.of_rows(features, torch.from_numpy(sums.weights).to(self.device)), sums.moments()
        path = self.store.kernel_path(model_id, f"{weighting}-own" if of == [model_id] else weighting)
        inputs = {"num_rows": table.num_rows, "tables": [each.attributes["table_id"] for each in (table, *tables)]}
        self.process.wait()
        known = load_kernel(path, inputs)
        if not self.process.agreed(known is not None):
            known = None
        if known is None:
            matrix = torch.zeros(table.dim, table.dim, dtype=torch.float64, device=self.device)
            mine, disable = self._own_rows(table), bar_disabled(self.progress)
            with tqdm(total=len(mine), desc=f"kernel {model_id}", unit="row", disable=disable) as bar:
                for features, weights in sums.read(mine):
                    rows = features.mul_(weights.sqrt().unsqueeze(1))
                    matrix.addmm_(rows.T, rows)
                    bar.update(len(rows))
            scalars, vectors = sums.together(self.process)
            arrays = {"matrix": self.process.add_up(matrix).cpu().numpy(), "vectors": vectors.cpu().numpy()}
            known = scalars, arrays
            self.process.first_only(lambda: save_kernel(path, inputs, scalars, arrays))
        found, arrays = known
        matrix, vectors = (torch.from_numpy(arrays[name]).to(self.device) for name in ("matrix", "vectors"))
        return Kernel(matrix), _moments(table.num_rows, found, vectors)

    def _own_rows(self, table: RowTable) -> range:
        """Return the rows that this process adds up: a share where all run together, else all."""
        if not self.process.together:
            return range(table.num_rows)
        return self.process.rows(table.num_rows, table.block_rows)


def row_weighting(tables: Sequence[RowTable], num_rows: int) -> tuple[np.ndarray, bool]:
    """Return the weight of each train row in a kernel.

    Args:
        tables: The train rows at the checkpoints whose curvatures w are averaged; none: the weights are 1. Where w is
            zero for all rows, since the task has only a loss, the mean of Q²: the empirical Fisher matrix takes the
            Gauss-Newton matrix's place.
        num_rows: N.

    Returns:
        ``[N]``, float64, and whether they are curvatures.

    Raises:
        InputError: A curvature is negative.
    """
    if not tables:
        return np.ones(num_rows), False
    curvature, fisher = np.zeros(num_rows), np.zeros(num_rows)
    for table in tables:
        values = table.column("curvature").astype(np.float64)
        negative = np.flatnonzero(values < 0)
        if len(negative):
            raise InputError(
                f"The curvature of {len(negative)} train rows is negative, first {negative[:5].tolist()}: the task's "
                f"loss is not convex in its output f, and estimator='influence' divides by it. Use estimator='trak' "
                f"with a regularization of your own."
            )
        curvature += values / len(tables)
        fisher += np.square(table.column("slope").astype(np.float64)) / len(tables)
    return (curvature, True) if curvature.any() else (fisher, False)


class _KernelSums:
    """Goes through train rows once, giving them out and adding up everything but the kernel.

    Args:
        table: The train rows.
        weighting: Weights, and whether they are curvatures, as `row_weighting` gives them.
        device: Where to add up.
    """

    def __init__(self, table: RowTable, weighting: tuple[np.ndarray, bool], device: torch.device) -> None:
        self.table, (self.weights, is_curvature), self.device = table, weighting, device
        self.gain = table.column("gain").astype(np.float64) if is_curvature else np.zeros(table.num_rows)
        self.step = -table.column("slope").astype(np.float64)
        self.vectors = torch.zeros(2, table.dim, dtype=torch.float64, device=device)
        self.trace = torch.zeros((), dtype=torch.float64, device=device)

    def read(self, rows: range) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield φ and w of rows, ``[n, k]`` and ``[n]``, float64, block by block, and add up what else is wanted."""
        for start, features in true_blocks(self.table, rows, self.device):
            weights, gain, step = (
                torch.from_numpy(values[start : start + len(features)]).to(self.device)
                for values in (self.weights, self.gain, self.step)
            )
            self.vectors += torch.stack([weights * gain, step]) @ features
            self.trace += weights @ features.square().sum(1)
            yield features, weights

    def together(self, process: Process) -> tuple[dict[str, float], Tensor]:
        """Return the sums by name and the two vectors, added up over processes."""
        trace, squared_gain = float(process.add_up(self.trace)), float(self.weights @ np.square(self.gain))
        return {"trace": trace, "squared_gain": squared_gain}, process.add_up(self.vectors)

    def moments(self) -> Moments:
        """Return what was added up by this process alone."""
        return _moments(self.table.num_rows, *self.together(Process()))


def _moments(num_rows: int, sums: dict[str, float], vectors: Tensor) -> Moments:
    gain, step = vectors
    return Moments(num_rows, sums["trace"], gain, step, sums["squared_gain"])


def true_blocks(table: Rows, rows: range, device: torch.device) -> Iterator[tuple[int, Tensor]]:
    """Yield rows in true units, ``[n, k]``, float64, as many as are held at once, with the index of the first.

    Args:
        table: Stored rows.
        rows: Which of them, consecutive ones.
        device: Where they go.

    Yields:
        The first row's index, and a copy of the rows.
    """
    for low, high in row_blocks(len(rows), 8 * table.dim, BLOCK_BYTES):
        start, stop = rows.start + low, rows.start + high
        pieces = [torch.from_numpy(np.array(view)).to(device) for _, view in table.raw_features(start, stop)]
        scale = torch.from_numpy(table.column("scale", start, stop).astype(np.float64)).to(device)
        yield start, torch.cat(pieces).to(torch.float64).mul_(scale.unsqueeze(1))


def own_influence(table: RowTable, kernel: Kernel, regularization: float, device: torch.device) -> np.ndarray:
    """Return ``φᵀ (K + λI)⁻¹ φ`` of each train row: its leverage, without weights.

    Args:
        table: The train rows.
        kernel: Their kernel.
        regularization: λ.
        device: Where to multiply.

    Returns:
        ``[N]``, float64.
    """
    found = np.empty(table.num_rows)
    for start, rows in true_blocks(table, range(table.num_rows), device):
        found[start : start + len(rows)] = (rows * kernel.solve(rows, regularization)).sum(1).cpu().numpy()
    return found

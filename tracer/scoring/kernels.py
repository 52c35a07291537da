"""Kernels of stored train rows: read from the store, or added up from the rows, by several processes together.

Layout: train rows ``Phi [N, k]``, kernels ``[k, k]``. Sums are float64.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from tracer._core.blocks import row_blocks
from tracer._core.processes import Process
from tracer._core.validation import bar_disabled
from tracer.errors import InputError
from tracer.scoring.estimators import Estimate
from tracer.scoring.regularization import LAMBDAS, Kernel, Moments, Regularization, choose_regularization, left_out
from tracer.scoring.streaming import Rows
from tracer.store import RowTable, Store
from tracer.store.kernels import load_kernel, save_kernel

BLOCK_BYTES = 32 << 20
"""How many bytes of float64 rows are held at once."""

Known = tuple[dict[str, float], dict[str, np.ndarray]]
"""Sums and arrays by name, as the store keeps them."""

MOST_LEFT_OUT = 4096
"""How many rows are predicted by the others to choose λ, spread evenly."""


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
        # a matrix or rows, a factor or basis, and the eigenvectors by which λ is chosen
        self._most = max(1, memory_bytes // (24 * dim * min(dim, num_rows)))
        self._held: dict[tuple[str, ...], tuple[Kernel, Moments]] = {}
        self._chosen: dict[tuple[str, ...], Regularization] = {}
        self._contents: dict[int, str] = {}

    def look_again(self) -> None:
        """Begin a new question: train rows may have changed since the last one."""
        self._contents = {}

    def get(self, model_id: int, weighting: str, of: Sequence[int]) -> tuple[Kernel, Moments]:
        """Return a checkpoint's kernel and the sums beside it.

        Args:
            model_id: The checkpoint, finalized.
            weighting: A value of `tracer.scoring.estimators.KERNELS`.
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
            What was given, or the choice of `choose_regularization` for kernels weighted with curvatures, scaled by
            traces to the kernels that scores are made with.
        """
        assert estimate.kernel is not None
        if estimate.regularization != "auto":
            return Regularization(float(estimate.regularization), "given")
        losses = [float(np.mean(self.store.checkpoint(model_id).column("loss"))) for model_id in model_ids]
        last = model_ids[int(np.argmin(losses))]
        key = tuple(self._content(model_id) for model_id in (last, *sorted(model_ids)))
        if key not in self._chosen:
            self._chosen[key] = self._choice(model_ids, last)
        found = self._chosen[key]
        if estimate.kernel == "loss_hess":
            return found
        traces = [self.get(last, weighting, model_ids)[1].trace for weighting in (estimate.kernel, "loss_hess")]
        used, own = (trace or 1.0 for trace in traces)  # a kernel of zeros has no scale
        return Regularization(self.process.agreed(found.value * used / own), found.rule)

    def _choice(self, model_ids: list[int], last: int) -> Regularization:
        """Return the choice for kernels weighted with curvatures; it is kept in the store as these are.

        Args:
            model_ids: The checkpoints.
            last: The one that was trained longest: of the lowest mean loss.
        """
        tables = [self.store.checkpoint(model_id) for model_id in (last, *sorted(model_ids))]

        def choose() -> Known:
            found = self._choose(model_ids, last)
            return {"value": self.process.agreed(found.value), "held_out": float(found.rule == "held-out")}, {}

        few = tables[0].num_rows < tables[0].dim  # no kernel is kept of these either
        sums, _ = choose() if few else self._kept(last, "regularization", tables, choose)
        return Regularization(sums["value"], "held-out" if sums["held_out"] else "trace")

    def _choose(self, model_ids: list[int], last: int) -> Regularization:
        """Choose λ from how well some rows are predicted by the others."""
        num_rows = self.store.checkpoint(last).num_rows
        _, moments = self.get(last, "loss_hess", model_ids)
        unit = (moments.trace or 1.0) / num_rows
        rows = np.unique(np.linspace(0, num_rows - 1, min(num_rows, MOST_LEFT_OUT)).round().astype(np.int64))
        weights = row_weighting([self.store.checkpoint(model_id) for model_id in sorted(model_ids)], num_rows)
        predictions = torch.zeros(len(rows), len(LAMBDAS), dtype=torch.float64, device=self.device)
        lambdas = (unit * LAMBDAS).to(self.device)
        for model_id in model_ids:
            kernel, moments = self.get(model_id, "loss_hess", model_ids)
            table = self.store.checkpoint(model_id)
            own = row_pulls(table, weights)
            some, own_rows = (torch.from_numpy(values[rows]).to(self.device) for values in (weights, own))
            features = true_rows(table, rows, self.device)
            predictions += left_out(kernel, moments.pull, features, some, own_rows, lambdas)
        output_changes = torch.from_numpy(self.store.checkpoint(last).column("output_change").astype(np.float64)[rows])
        return choose_regularization(unit, predictions, output_changes.to(self.device))

    def _make(self, model_id: int, weighting: str, of: list[int]) -> tuple[Kernel, Moments]:
        """Make a kernel: from its rows where there are fewer of them than features, else as a matrix, which is kept."""
        table = self.store.checkpoint(model_id)
        tables = [self.store.checkpoint(each) for each in of]
        sums = _KernelSums(table, row_weighting(tables, table.num_rows), self.device)
        if table.num_rows < table.dim:
            features = torch.cat([rows for rows, _ in sums.read(range(table.num_rows))])
            return Kernel.of_rows(features, torch.from_numpy(sums.weights).to(self.device)), sums.moments()

        def add_up() -> Known:
            matrix = torch.zeros(table.dim, table.dim, dtype=torch.float64, device=self.device)
            mine, disable = self._own_rows(table), bar_disabled(self.progress)
            with tqdm(total=len(mine), desc=f"kernel {model_id}", unit="row", disable=disable) as bar:
                for features, weights in sums.read(mine):
                    rows = features.mul_(weights.sqrt().unsqueeze(1))
                    matrix.addmm_(rows.T, rows)
                    bar.update(len(rows))
            scalars, pull = sums.together(self.process)
            return scalars, {"matrix": self.process.add_up(matrix).cpu().numpy(), "pull": pull.cpu().numpy()[None]}

        found, arrays = self._kept(model_id, weighting, [table, *tables], add_up)
        matrix, pull = (torch.from_numpy(arrays[name]).to(self.device) for name in ("matrix", "pull"))
        return Kernel(matrix), Moments(table.num_rows, found["trace"], pull[0])

    def _kept(self, model_id: int, name: str, tables: Sequence[RowTable], make: Callable[[], Known]) -> Known:
        """Return what the store keeps beside a checkpoint, or make it and keep it there; all processes do the same.

        Args:
            model_id: The checkpoint.
            name: Of what is kept.
            tables: The train rows that decide it.
            make: Makes it, in all processes together.
        """
        path = self.store.kernel_path(model_id, name)
        # the version is that of what is kept
        inputs = {
            "version": 2,
            "num_rows": tables[0].num_rows,
            "tables": [each.attributes["table_id"] for each in tables],
        }
        self.process.wait()
        known = load_kernel(path, inputs)
        if self.process.agreed(known is not None) and known is not None:
            return known
        made = make()
        self.process.first_only(lambda: save_kernel(path, inputs, *made))
        return made

    def _own_rows(self, table: RowTable) -> range:
        """Return the rows that this process adds up: a share where all run together, else all."""
        if not self.process.together:
            return range(table.num_rows)
        return self.process.rows(table.num_rows, table.block_rows)


def row_weighting(tables: Sequence[RowTable], num_rows: int) -> np.ndarray:
    """Return the weight of each train row in a kernel.

    Args:
        tables: The train rows at the checkpoints whose curvatures w are averaged; none: the weights are 1. Where w is
            zero for all rows, since the task has only a loss, the mean of Q²: the empirical Fisher matrix takes the
            Gauss-Newton matrix's place.
        num_rows: N.

    Returns:
        ``[N]``, float64.

    Raises:
        InputError: A curvature is negative.
    """
    if not tables:
        return np.ones(num_rows)
    loss_hess, fisher = np.zeros(num_rows), np.zeros(num_rows)
    for table in tables:
        values = table.column("loss_hess").astype(np.float64)
        negative = np.flatnonzero(values < 0)
        if len(negative):
            raise InputError(
                f"The curvature of {len(negative)} train rows is negative, first {negative[:5].tolist()}: the task's "
                f"loss is not convex in its output f, and estimator='influence' divides by it. Use estimator='trak' "
                f"with a regularization of your own."
            )
        loss_hess += values / len(tables)
        fisher += np.square(table.column("loss_grad").astype(np.float64)) / len(tables)
    return loss_hess if loss_hess.any() else fisher


def row_pulls(table: RowTable, weights: np.ndarray) -> np.ndarray:
    """Return ``w · gain − Q`` of each train row, ``[N]``, float64."""
    return weights * table.column("output_change") - table.column("loss_grad").astype(np.float64)


class _KernelSums:
    """Goes through train rows once, giving them out and adding up everything but the kernel.

    Args:
        table: The train rows.
        weights: As `row_weighting` gives them.
        device: Where to add up.
    """

    def __init__(self, table: RowTable, weights: np.ndarray, device: torch.device) -> None:
        self.table, self.weights, self.device = table, weights, device
        self.own = row_pulls(table, weights)
        self.pull = torch.zeros(table.dim, dtype=torch.float64, device=device)
        self.trace = torch.zeros((), dtype=torch.float64, device=device)

    def read(self, rows: range) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield φ and w of rows, ``[n, k]`` and ``[n]``, float64, block by block, and add up what else is wanted."""
        for start, features in true_blocks(self.table, rows, self.device):
            weights, own = (
                torch.from_numpy(values[start : start + len(features)]).to(self.device)
                for values in (self.weights, self.own)
            )
            self.pull += own @ features
            self.trace += weights @ features.square().sum(1)
            yield features, weights

    def together(self, process: Process) -> tuple[dict[str, float], Tensor]:
        """Return the sum by name and the vector, added up over processes."""
        return {"trace": float(process.add_up(self.trace))}, process.add_up(self.pull)

    def moments(self) -> Moments:
        """Return what was added up by this process alone."""
        return Moments(self.table.num_rows, float(self.trace), self.pull)


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


def true_rows(table: Rows, rows: np.ndarray, device: torch.device) -> Tensor:
    """Return some rows in true units, ``[m, k]``, float64, in the order of their indices, which ascend."""
    pieces = [
        torch.from_numpy(view[rows[(rows >= start) & (rows < start + len(view))] - start].astype(np.float64))
        for start, view in table.raw_features(0, table.num_rows)
    ]
    scale = torch.from_numpy(table.column("scale").astype(np.float64)[rows]).to(device)
    return torch.cat(pieces).to(device).mul_(scale.unsqueeze(1))


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

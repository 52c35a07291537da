"""Kernels of stored training examples: read from the store, or summed over the examples by several processes together.

Layout: train features ``Φ [N, k]``, kernels ``[k, k]``. Sums are float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from tracer._core.processes import Process
from tracer._core.progress import tqdm
from tracer._core.validation import bar_disabled
from tracer.errors import InputError
from tracer.scoring.estimators import Estimate
from tracer.scoring.feature_tables import dequantized_blocks, dequantized_features
from tracer.scoring.read_checks import ReadCheck
from tracer.scoring.regularization import (
    LAMBDAS,
    Kernel,
    Regularization,
    choose_regularization,
    leave_one_out,
)
from tracer.store import RowTable, Store
from tracer.store.kernels import load_kernel, save_kernel
from tracer.store.revisions import Revisions

_VERSION = 4
"""The version of what is stored with a kernel."""

_Stored = tuple[dict[str, float], dict[str, np.ndarray]]

MAX_LEFT_OUT = 4096
"""The number of examples, spread evenly, that are predicted from the others to choose λ."""


@dataclass(frozen=True)
class KernelSums:
    """Sums over training examples that are computed together with their kernel."""

    trace: float  # Σ w ‖φ‖², the kernel's trace
    residual_sum: Tensor  # Φᵀ (w · output_change − Q), [k]


class Kernels:
    """The kernels of a store's checkpoints; as many as fit ``memory_bytes``, at least one, stay in memory."""

    def __init__(
        self, store: Store, device: torch.device, process: Process, progress: bool | None, memory_bytes: int
    ) -> None:
        self.store, self.device, self.process, self.progress = store, device, process, progress
        dim, num_rows = store.manifest.feature_dim, store.manifest.train_set_size
        # of each kernel: a matrix or features, a Cholesky factor or basis, and eigenvectors
        self._max_kernels = max(1, memory_bytes // (24 * dim * min(dim, num_rows)))
        self._kernels: dict[tuple[str, ...], tuple[Kernel, KernelSums]] = {}
        self._sizes: dict[tuple[str, ...], np.ndarray] = {}
        self._regularizations: dict[tuple[str, ...], Regularization] = {}
        self.revisions = Revisions(store, [])
        """The checkpoints of the next call, as they were before it began."""

    def get(self, model_id: int, weighting: str, averaged: Sequence[int]) -> tuple[Kernel, KernelSums]:
        """Return a checkpoint's kernel for a weighting of `KERNELS`, with ``loss_hess`` averaged over checkpoints."""
        averaged = [] if weighting == "plain" else sorted(averaged)
        key = weighting, *(self._revision(each) for each in (model_id, *averaged))
        if key not in self._kernels:
            while len(self._kernels) >= self._max_kernels:
                del self._kernels[next(iter(self._kernels))]
            self._kernels[key] = self._compute(model_id, weighting, averaged)
        return self._kernels[key]

    def solve(
        self, model_id: int, weighting: str, averaged: Sequence[int], regularization: float, features: Tensor
    ) -> Tensor:
        """Return ``(K + λI)⁻¹`` times features ``[m, k]``."""
        return self.get(model_id, weighting, averaged)[0].solve(features, regularization)

    def _revision(self, model_id: int) -> str:
        """Return the revision of a checkpoint's training examples, which changes when one is replaced."""
        return self.revisions.tables[f"checkpoints/{model_id}"]

    def mean_leverages(self, model_ids: list[int], estimate: Estimate, of_steps: bool = False) -> np.ndarray:
        """Return the mean over checkpoints of each training example's `leverages`, ``[N]``."""
        assert estimate.kernel is not None
        found, total = self.regularization(model_ids, estimate).value, np.zeros(self.store.manifest.train_set_size)
        for model_id in model_ids:
            kernel, _ = self.get(model_id, estimate.kernel, model_ids)
            table = self.store.checkpoint(model_id)
            total += leverages(table, kernel, found, self.device, of_steps=of_steps) / len(model_ids)
        return total

    def effect_sizes(self, model_ids: list[int], estimate: Estimate) -> np.ndarray:
        """Return by what ``relatif`` and ``relatif_theta`` divide training features of weight one, ``[N]``."""
        estimator = estimate.estimator
        key = (estimator, str(estimate.regularization), *map(self._revision, model_ids))
        if key not in self._sizes:
            mean = self.mean_leverages(model_ids, estimate, of_steps=estimator == "relatif_theta")
            self._sizes = {key: np.sqrt(np.maximum(mean, 0.0))}
        return self._sizes[key]

    def regularization(self, model_ids: list[int], estimate: Estimate) -> Regularization:
        """Return the given λ, or the one chosen by `choose_regularization`; the estimator has a kernel."""
        assert estimate.kernel is not None
        if estimate.regularization != "auto":
            return Regularization(float(estimate.regularization), "given")
        losses = [float(np.mean(self.store.checkpoint(model_id).column("loss"))) for model_id in model_ids]
        last = model_ids[int(np.argmin(losses))]  # the lowest loss: trained longest
        key = tuple(self._revision(model_id) for model_id in (last, *sorted(model_ids)))
        if key not in self._regularizations:
            self._regularizations[key] = self._stored_choice(model_ids, last)
        found = self._regularizations[key]
        if estimate.kernel == "loss_hess":
            return found
        # λ is chosen for the kernel weighted with loss_hess; another kernel's scale is that of its trace
        traces = [self.get(last, weighting, model_ids)[1].trace for weighting in (estimate.kernel, "loss_hess")]
        used, chosen_for = (trace or 1.0 for trace in traces)  # a kernel of zeros has no scale
        return Regularization(self.process.agreed(found.value * used / chosen_for), found.rule)

    def _stored_choice(self, model_ids: list[int], last: int) -> Regularization:
        few = self.store.manifest.train_set_size < self.store.manifest.feature_dim

        def choose() -> _Stored:
            found = self._choose(model_ids, last)
            return {"value": self.process.agreed(found.value), "held_out": float(found.rule == "held-out")}, {}

        # with so few examples no kernel is stored either, so that a question changes nothing in the store
        sums, _ = choose() if few else self._stored(last, "regularization", model_ids, choose)
        return Regularization(sums["value"], "held-out" if sums["held_out"] else "trace")

    def _choose(self, model_ids: list[int], last: int) -> Regularization:
        """Choose λ by how well training examples are predicted from the others."""
        # What is predicted is how far training has moved the outputs. Held-out labels, generalized cross-validation and
        # the marginal likelihood chose far too small a λ in trials with networks that were stopped early; a fit to the
        # changes of one checkpoint, without leaving examples out, a λ three to ten times too large after AdamW.
        num_rows = self.store.checkpoint(last).num_rows
        _, sums = self.get(last, "loss_hess", model_ids)
        unit = (sums.trace or 1.0) / num_rows
        chosen = np.unique(np.linspace(0, num_rows - 1, min(num_rows, MAX_LEFT_OUT)).round().astype(np.int64))
        weights = kernel_weights([self.store.checkpoint(model_id) for model_id in sorted(model_ids)], num_rows)
        predictions = torch.zeros(len(chosen), len(LAMBDAS), dtype=torch.float64, device=self.device)
        lambdas = (unit * LAMBDAS).to(self.device)
        for model_id in model_ids:
            kernel, sums = self.get(model_id, "loss_hess", model_ids)
            table = self.store.checkpoint(model_id)
            features = dequantized_features(table, chosen, self.device)
            w, r = (torch.from_numpy(each[chosen]).to(self.device) for each in (weights, residuals(table, weights)))
            predictions += leave_one_out(kernel, sums.residual_sum, features, w, r, lambdas)
        output_changes = self.store.checkpoint(last).column("output_change").astype(np.float64)[chosen]
        return choose_regularization(unit, predictions, torch.from_numpy(output_changes).to(self.device))

    def _compute(self, model_id: int, weighting: str, averaged: list[int]) -> tuple[Kernel, KernelSums]:
        table = self.store.checkpoint(model_id)
        tables = [self.store.checkpoint(each) for each in averaged]
        pass_over = _WeightedPass(table, kernel_weights(tables, table.num_rows), self.device)
        if table.num_rows < table.dim:  # features are smaller than the matrix, and nothing is stored
            features = torch.cat([rows for rows, _ in pass_over.blocks(range(table.num_rows))])
            weights = torch.from_numpy(pass_over.weights).to(self.device)
            return Kernel.from_features(features, weights), pass_over.sums()

        def compute() -> _Stored:
            matrix = torch.zeros(table.dim, table.dim, dtype=torch.float64, device=self.device)
            shard, disable = self._shard(table), bar_disabled(self.progress)
            with tqdm(total=len(shard), desc=f"kernel {model_id}", unit="row", disable=disable) as bar:
                for features, weights in pass_over.blocks(shard):
                    rows = features.mul_(weights.sqrt().unsqueeze(1))
                    matrix.addmm_(rows.T, rows)
                    bar.update(len(rows))
            sums = pass_over.sums(self.process)
            arrays = {"matrix": self.process.all_reduce(matrix), "residual_sum": sums.residual_sum[None]}
            return {"trace": sums.trace}, {name: array.cpu().numpy() for name, array in arrays.items()}

        # The kernel is stored and not its inverse, as λ may change and a Cholesky factor takes a second. It is float64:
        # the inverse of a float32 sum has few correct digits.
        numbers, arrays = self._stored(model_id, weighting, averaged, compute)
        matrix, residual_sum = (torch.from_numpy(arrays[name]).to(self.device) for name in ("matrix", "residual_sum"))
        return Kernel(matrix), KernelSums(numbers["trace"], residual_sum[0])

    def _stored(self, model_id: int, name: str, averaged: Sequence[int], compute: Callable[[], _Stored]) -> _Stored:
        """Return what the store has for these checkpoints, or compute it in all processes together and store it."""
        results = self.store.results
        parent = results.kernel_path(model_id, name)
        inputs = {
            "version": _VERSION,
            "num_rows": self.store.manifest.train_set_size,
            "averaged": sorted(averaged),
            "revisions": {f"checkpoints/{each}": self._revision(each) for each in (model_id, *averaged)},
        }
        self.process.wait()
        known = load_kernel(parent, inputs)
        if self.process.agreed(known is not None) and known is not None:
            return known
        computed = compute()

        def save() -> None:
            self.revisions.check()
            save_kernel(parent, inputs, *computed)
            results.remove_superseded(parent)

        self.process.rank_zero_only(save)
        return computed

    def _shard(self, table: RowTable) -> range:
        """Return the training examples that this process sums over: all of them unless processes run together."""
        if not self.process.together:
            return range(table.num_rows)
        return self.process.rows(table.num_rows, table.chunk_rows)


def kernel_weights(tables: Sequence[RowTable], num_rows: int) -> Float64[np.ndarray, " N"]:
    """Return the weight of each training example: its mean ``loss_hess`` over tables, or 1 without tables."""
    if not tables:
        return np.ones(num_rows)
    loss_hess, fisher = np.zeros(num_rows), np.zeros(num_rows)
    for table in tables:
        values = table.column("loss_hess").astype(np.float64)
        negative = np.flatnonzero(values < 0)
        if len(negative):
            raise InputError(
                f"∂²L/∂f² of {len(negative)} training examples is negative, first {negative[:5].tolist()}: the task's "
                f"loss is not convex in its output f, and estimator='influence' divides by it. Use estimator='trak' "
                f"with a regularization of your own."
            )
        loss_hess += values / len(tables)
        fisher += np.square(table.column("loss_grad").astype(np.float64)) / len(tables)
    # a task that has only a loss stores zeros: the empirical Fisher matrix takes the Gauss-Newton matrix's place
    return loss_hess if loss_hess.any() else fisher


def residuals(table: RowTable, weights: Float64[np.ndarray, " N"]) -> Float64[np.ndarray, " N"]:
    """Return ``w · output_change − Q`` of each training example."""
    return weights * table.column("output_change") - table.column("loss_grad").astype(np.float64)


class _WeightedPass:
    """One pass over training examples that yields features and weights, and sums up everything but the kernel."""

    def __init__(self, table: RowTable, weights: Float64[np.ndarray, " N"], device: torch.device) -> None:
        self.table, self.weights, self.device = table, weights, device
        self.residuals = residuals(table, weights)
        self.residual_sum = torch.zeros(table.dim, dtype=torch.float64, device=device)
        self.trace = torch.zeros((), dtype=torch.float64, device=device)

    def blocks(self, indices: range) -> Iterator[tuple[Float64[Tensor, "n k"], Float64[Tensor, " n"]]]:
        """Yield φ and w, block by block."""
        check = ReadCheck(self.table, self.table.dim)
        for start, features in dequantized_blocks(self.table, indices, self.device):
            check.check(np.arange(start, start + len(features)))
            weights, residuals = (
                torch.from_numpy(values[start : start + len(features)]).to(self.device)
                for values in (self.weights, self.residuals)
            )
            self.residual_sum += residuals @ features
            self.trace += weights @ features.square().sum(1)
            yield features, weights

    def sums(self, process: Process | None = None) -> KernelSums:
        """Return the sums over the pass of this process, or of all processes that run together."""
        process = process or Process()
        return KernelSums(float(process.all_reduce(self.trace)), process.all_reduce(self.residual_sum))


def leverages(
    table: RowTable, kernel: Kernel, regularization: float, device: torch.device, *, of_steps: bool = False
) -> Float64[np.ndarray, " N"]:
    """Return ``φᵀ (K + λI)⁻¹ φ`` of each training example without weights, or ``‖(K + λI)⁻¹ φ‖²`` of its step."""
    found, check = np.empty(table.num_rows), ReadCheck(table, table.dim)
    for start, features in dequantized_blocks(table, range(table.num_rows), device):
        check.check(np.arange(start, start + len(features)))
        steps = kernel.solve(features, regularization)
        solved = (steps * (steps if of_steps else features)).sum(1)
        found[start : start + len(features)] = solved.cpu().numpy()
    return found

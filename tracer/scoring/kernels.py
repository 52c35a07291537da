"""Kernels of stored training examples: read from the store, or summed over the examples by several processes together.

Layout: train features ``Φ [N, k]``, kernels ``[k, k]``. Sums are float64.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from tracer._core.files import is_refused
from tracer._core.processes import Process
from tracer._core.progress import tqdm
from tracer._core.validation import bar_disabled
from tracer.errors import InputError, StoreError
from tracer.scoring.estimators import Estimate
from tracer.scoring.feature_tables import dequantized_blocks, dequantized_features
from tracer.scoring.gram_kernel import GramKernel
from tracer.scoring.read_checks import ReadCheck
from tracer.scoring.regularization import (
    LAMBDAS,
    Kernel,
    Regularization,
    choose_regularization,
    leave_one_out,
    optimum_regularization,
)
from tracer.store import RowTable, Store
from tracer.store.hidden_rows import HiddenFacts, load_hidden
from tracer.store.kernels import load_kernel, save_kernel
from tracer.store.revisions import Revisions

WITH_HIDDEN = "hidden"
"""The weighting of kernels that hold the curvature of all outputs: f's and that of labels which f does not show."""

logger = logging.getLogger("tracer")

_VECTORS = ("residual_sum", "gradient_sum")
_RULES = ("trace", "held-out", "optimum")

_VERSION = 5
"""The version of what is stored with a kernel."""

AnyKernel = Kernel | GramKernel
"""A kernel as a matrix, or of fewer examples than features."""

_Stored = tuple[dict[str, float], dict[str, np.ndarray]]

MAX_SIZES = 16
"""The number of passes over training examples that are remembered as one number for each."""

MAX_LEFT_OUT = 4096
"""The number of examples, spread evenly, that are predicted from the others to choose λ."""


@dataclass(frozen=True)
class KernelSums:
    """Sums over training examples that are computed together with their kernel."""

    trace: float  # Σ w ‖φ‖², the kernel's trace
    residual_sum: Tensor  # Φᵀ (w · output_change − Q), [k]
    gradient_sum: Tensor  # Φᵀ Q, [k]

    def plus(self, features: Float64[Tensor, "R k"]) -> KernelSums:
        """Return the sums of the kernel with other features added, of weight one."""
        return replace(self, trace=self.trace + float(features.square().sum()))


class Kernels:
    """The kernels of a store's checkpoints; as many as fit ``memory_bytes``, at least one, stay in memory."""

    def __init__(
        self, store: Store, device: torch.device, process: Process, progress: bool | None, memory_bytes: int
    ) -> None:
        self.store, self.device, self.process, self.progress = store, device, process, progress
        dim, num_rows = store.manifest.feature_dim, store.manifest.train_set_size
        # of each kernel: a matrix, a Cholesky factor and eigenvectors; or features, inner products and two factors
        self._max_kernels = max(1, memory_bytes // (32 * dim * min(dim, num_rows)))
        self._kernels: dict[tuple[str, ...], tuple[AnyKernel, KernelSums]] = {}
        self._hidden: dict[str, HiddenFacts | None] = {}
        self._warned = False
        self._sizes: dict[tuple[str, ...], np.ndarray] = {}
        self._regularizations: dict[tuple[str, ...], Regularization] = {}
        self.revisions = Revisions(store, [])
        """The checkpoints of the next call, as they were before it began."""

    def get(self, model_id: int, weighting: str, averaged: Sequence[int]) -> tuple[AnyKernel, KernelSums]:
        """Return a checkpoint's kernel for a weighting from `weighting`, with weights averaged over checkpoints."""
        averaged = sorted(averaged) if weighting in ("loss_hess", WITH_HIDDEN) else []
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

    def weighting(self, model_ids: Sequence[int], estimate: Estimate) -> str:
        """Return the weighting of an estimator's kernels: `WITH_HIDDEN` if all of these have labels that f hides."""
        assert estimate.kernel is not None
        hidden = [self.hidden(each) for each in model_ids if estimate.sees_all_outputs]
        if hidden and all(each is not None and each.labels != "none" for each in hidden):
            return WITH_HIDDEN
        return estimate.kernel

    def warn_of_missing(self, model_ids: Sequence[int], estimate: Estimate) -> None:
        """Log a warning if an estimator's kernel lacks the curvature of outputs other than f."""
        missing = [each for each in model_ids if estimate.sees_all_outputs and self.hidden(each) is None]
        if missing and not self._warned:
            logger.warning(
                "the kernel of estimator=%r holds the curvature of f alone: that of other outputs at checkpoints %s "
                "was not computed, or for examples that were replaced since. attribute computes it, and "
                "Tracer.fit_kernel(train) at a loaded checkpoint. For models with one output, only the choice of the "
                "regularization can change.",
                estimate.estimator,
                missing,
            )
        self._warned = self._warned or bool(missing)

    def hidden(self, model_id: int) -> HiddenFacts | None:
        """Return what is known of the labels that show the curvature which f does not, or None."""
        key = self._revision(model_id)
        if self._hidden.get(key) is None:
            found = load_hidden(self.store, model_id)
            self._hidden[key] = None if found is None else found.facts  # its features may be large
        return self._hidden[key]

    def _revision(self, model_id: int) -> str:
        """Return the revision of a checkpoint's training examples, which changes when one is replaced."""
        return self.revisions.tables[f"checkpoints/{model_id}"]

    def mean_leverages(self, model_ids: list[int], estimate: Estimate, of_steps: bool = False) -> np.ndarray:
        """Return the mean over checkpoints of each training example's `leverages`, ``[N]``."""
        found, total = self.regularization(model_ids, estimate).value, np.zeros(self.store.manifest.train_set_size)
        weighting = self.weighting(model_ids, estimate)
        for model_id in model_ids:
            kernel, _ = self.get(model_id, weighting, model_ids)
            table = self.store.checkpoint(model_id)
            total += leverages(table, kernel, found, self.device, of_steps=of_steps) / len(model_ids)
        return total

    def effect_sizes(self, model_ids: list[int], estimate: Estimate) -> np.ndarray:
        """Return by what ``relatif`` and ``relatif_theta`` divide training features of weight one, ``[N]``."""
        estimator = estimate.estimator
        weighting = self.weighting(model_ids, estimate)
        key = (estimator, weighting, str(estimate.regularization), *map(self._revision, model_ids))
        of_steps = estimator == "relatif_theta"
        return self.sizes(key, lambda: np.sqrt(np.maximum(self.mean_leverages(model_ids, estimate, of_steps), 0.0)))

    def sizes(
        self, key: tuple[str, ...], compute: Callable[[], Float64[np.ndarray, " N"]]
    ) -> Float64[np.ndarray, " N"]:
        """Return sizes of training examples, the last `MAX_SIZES` of which are kept."""
        if key not in self._sizes:
            while len(self._sizes) >= MAX_SIZES:
                del self._sizes[next(iter(self._sizes))]
            self._sizes[key] = compute()
        return self._sizes[key]

    def regularization(self, model_ids: list[int], estimate: Estimate) -> Regularization:
        """Return the given λ, or the one chosen by `choose_regularization`; the estimator has a kernel."""
        assert estimate.kernel is not None
        if estimate.regularization != "auto":
            return Regularization(float(estimate.regularization), "given")
        losses = [float(np.mean(self.store.checkpoint(model_id).column("loss"))) for model_id in model_ids]
        last = model_ids[int(np.argmin(losses))]  # the lowest loss: trained longest
        knows_weights = self._weights(last) is not None
        key = (str(knows_weights), *(self._revision(model_id) for model_id in (last, *sorted(model_ids))))
        if key not in self._regularizations:
            self._regularizations[key] = self._stored_choice(model_ids, last)
        found, used_kernel = self._regularizations[key], self.weighting(model_ids, estimate)
        # What was learned says how long training was, of which curvature in other directions changes nothing.
        if used_kernel == "loss_hess" or (used_kernel == WITH_HIDDEN and found.rule != "trace"):
            return found
        # λ is chosen for the kernel weighted with loss_hess; another kernel's scale is that of its trace
        traces = [self.get(last, weighting, model_ids)[1].trace for weighting in (used_kernel, "loss_hess")]
        used, chosen_for = (trace or 1.0 for trace in traces)  # a kernel of zeros has no scale
        return Regularization(self.process.agreed(found.value * used / chosen_for), found.rule)

    def _stored_choice(self, model_ids: list[int], last: int) -> Regularization:
        def choose() -> _Stored:
            found = self._choose(model_ids, last)
            return {"value": self.process.agreed(found.value), "rule": float(_RULES.index(found.rule))}, {}

        knows = {"knows_weights": self._weights(last) is not None}
        try:
            sums, _ = self._stored(last, "regularization", model_ids, choose, knows)
        except StoreError as error:
            if not is_refused(error.__cause__):
                raise
            sums, _ = choose()  # of few examples no kernel is stored, and a store that is only read is enough
        return Regularization(sums["value"], _RULES[int(sums["rule"])])

    def _weights(self, model_id: int) -> np.ndarray | None:
        """Return the model's weights at a checkpoint in the space of features, ``[k]``, or None."""
        found = self.hidden(model_id)
        return None if found is None else found.weights

    def _choose(self, model_ids: list[int], last: int) -> Regularization:
        """Choose λ by the weights of a regularized optimum, or by how well examples are predicted from the others."""
        # What is predicted is how far training has moved the outputs. Held-out labels, generalized cross-validation and
        # the marginal likelihood chose far too small a λ in trials with networks that were stopped early; a fit to the
        # changes of one checkpoint, without leaving examples out, a λ three to ten times too large after AdamW.
        num_rows = self.store.checkpoint(last).num_rows
        _, sums = self.get(last, "loss_hess", model_ids)
        weights_there = self._weights(last)
        if weights_there is not None:
            at_optimum = optimum_regularization(sums.gradient_sum, torch.from_numpy(weights_there).to(self.device))
            if at_optimum is not None:
                return at_optimum
        unit = (sums.trace or 1.0) / num_rows
        chosen = np.unique(np.linspace(0, num_rows - 1, min(num_rows, MAX_LEFT_OUT)).round().astype(np.int64))
        weights = kernel_weights([self.store.checkpoint(model_id) for model_id in sorted(model_ids)], num_rows)
        predictions = torch.zeros(len(chosen), len(LAMBDAS), dtype=torch.float64, device=self.device)
        lambdas = (unit * LAMBDAS).to(self.device)
        for model_id in tqdm(model_ids, desc="regularization", disable=bar_disabled(self.progress)):
            kernel, sums = self.get(model_id, "loss_hess", model_ids)
            table = self.store.checkpoint(model_id)
            features = dequantized_features(table, chosen, self.device)
            w, r = (torch.from_numpy(each[chosen]).to(self.device) for each in (weights, residuals(table, weights)))
            predictions += leave_one_out(kernel.seen(sums.residual_sum, features, chosen), w, r, lambdas)
        output_changes = self.store.checkpoint(last).column("output_change").astype(np.float64)[chosen]
        return choose_regularization(unit, predictions, torch.from_numpy(output_changes).to(self.device))

    def _compute(self, model_id: int, weighting: str, averaged: list[int]) -> tuple[AnyKernel, KernelSums]:
        table = self.store.checkpoint(model_id)
        tables = [self.store.checkpoint(each) for each in averaged]
        weights, hidden = kernel_weights(tables, table.num_rows), torch.zeros(0, table.dim, dtype=torch.float64)
        if weighting == "second_moment":
            weights = np.square(table.column("loss_grad").astype(np.float64))
        elif weighting == WITH_HIDDEN:
            weights, hidden = self._with_hidden(model_id, tables)
        hidden = hidden.to(self.device)
        pass_over = _WeightedPass(table, weights, self.device)
        if table.num_rows + len(hidden) < table.dim:  # features are smaller than the matrix, and nothing is stored
            features = torch.cat([*(rows for rows, _ in pass_over.blocks(range(table.num_rows))), hidden])
            both = torch.cat([torch.from_numpy(weights).to(self.device), features.new_ones(len(hidden))])
            return GramKernel(features, both), pass_over.sums().plus(hidden)

        def compute() -> _Stored:
            matrix = torch.zeros(table.dim, table.dim, dtype=torch.float64, device=self.device)
            if not self.process.together or self.process.rank == 0:
                matrix.addmm_(hidden.T, hidden)
            shard, disable = self._shard(table), bar_disabled(self.progress)
            with tqdm(total=len(shard), desc=f"kernel {model_id}", unit="row", disable=disable) as bar:
                for features, weights in pass_over.blocks(shard):
                    rows = features.mul_(weights.sqrt().unsqueeze(1))
                    matrix.addmm_(rows.T, rows)
                    bar.update(len(rows))
            sums = pass_over.sums(self.process).plus(hidden)
            arrays = {"matrix": self.process.all_reduce(matrix)}
            arrays |= {name: getattr(sums, name)[None] for name in _VECTORS}
            return {"trace": sums.trace}, {name: array.cpu().numpy() for name, array in arrays.items()}

        # The kernel is stored and not its inverse, as λ may change and a Cholesky factor takes a second. It is float64:
        # the inverse of a float32 sum has few correct digits.
        few = table.num_rows < table.dim
        numbers, arrays = compute() if few else self._stored(model_id, weighting, averaged, compute)
        on_device = {name: torch.from_numpy(array).to(self.device) for name, array in arrays.items()}
        vectors = {name: on_device[name][0] for name in _VECTORS}
        return Kernel(on_device["matrix"]), KernelSums(numbers["trace"], **vectors)

    def _with_hidden(
        self, model_id: int, tables: Sequence[RowTable]
    ) -> tuple[Float64[np.ndarray, " N"], Float64[Tensor, "R k"]]:
        """Return the weights of training examples beside those of labels that f hides, and these labels' features."""
        found = load_hidden(self.store, model_id)
        if found is None:
            raise StoreError(
                f"the curvature of other outputs at checkpoint {model_id} was removed meanwhile: ask again"
            )
        features = torch.from_numpy(found.features).double()
        if found.facts.labels == "all":
            return np.zeros(self.store.manifest.train_set_size), features
        grad = [np.abs(table.column("loss_grad").astype(np.float64)) for table in tables]
        hess = [table.column("loss_hess").astype(np.float64) for table in tables]
        given = np.mean([w * q for w, q in zip(hess, grad, strict=True)], axis=0)
        others = np.mean(grad, axis=0)[found.examples]
        return given, features.mul_(torch.from_numpy(np.sqrt(others)).unsqueeze(1))

    def _stored(
        self,
        model_id: int,
        name: str,
        averaged: Sequence[int],
        compute: Callable[[], _Stored],
        others: Mapping[str, Any] | None = None,
    ) -> _Stored:
        """Return what the store has for these checkpoints, or compute it in all processes together and store it."""
        results = self.store.results
        parent = results.kernel_path(model_id, name)
        inputs = {
            "version": _VERSION,
            "num_rows": self.store.manifest.train_set_size,
            "averaged": sorted(averaged),
            **(others or {}),
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
        self.factors = np.stack([residuals(table, weights), table.column("loss_grad").astype(np.float64)])
        self.vectors = torch.zeros(len(_VECTORS), table.dim, dtype=torch.float64, device=device)
        self.trace = torch.zeros((), dtype=torch.float64, device=device)

    def blocks(self, indices: range) -> Iterator[tuple[Float64[Tensor, "n k"], Float64[Tensor, " n"]]]:
        """Yield φ and w, block by block."""
        check = ReadCheck(self.table, self.table.dim)
        for start, features in dequantized_blocks(self.table, indices, self.device):
            check.check(np.arange(start, start + len(features)))
            weights, factors = (
                torch.from_numpy(values[..., start : start + len(features)]).to(self.device)
                for values in (self.weights, self.factors)
            )
            self.vectors += factors @ features
            self.trace += weights @ features.square().sum(1)
            yield features, weights

    def sums(self, process: Process | None = None) -> KernelSums:
        """Return the sums over the pass of this process, or of all processes that run together."""
        process = process or Process()
        return KernelSums(float(process.all_reduce(self.trace)), *process.all_reduce(self.vectors))


def leverages(
    table: RowTable, kernel: AnyKernel, regularization: float, device: torch.device, *, of_steps: bool = False
) -> Float64[np.ndarray, " N"]:
    """Return ``φᵀ (K + λI)⁻¹ φ`` of each training example without weights, or ``‖(K + λI)⁻¹ φ‖²`` of its step."""
    if isinstance(kernel, GramKernel) and not of_steps:  # the table's examples are its first ones
        own = kernel.leverages(slice(table.num_rows), regularization)
        if own is not None:
            return own.cpu().numpy()
    found, check = np.empty(table.num_rows), ReadCheck(table, table.dim)
    for start, features in dequantized_blocks(table, range(table.num_rows), device):
        check.check(np.arange(start, start + len(features)))
        steps = kernel.solve(features, regularization)
        solved = (steps * (steps if of_steps else features)).sum(1)
        found[start : start + len(features)] = solved.cpu().numpy()
    return found

"""Everything that needs a store and no model: scores, top examples, self-influence, completeness, growth."""

from __future__ import annotations

import os
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch.utils.data import Subset

from tracer._core.processes import Process, ProcessChoice, this_process
from tracer._core.validation import check_choice, check_count, check_device, check_model_id
from tracer.api import example_names, search
from tracer.data.indices import ExampleIndices, ExampleSelection, check_indices
from tracer.errors import CallOrderError, InputError
from tracer.scoring.estimators import Estimate
from tracer.scoring.feature_tables import InMemoryTable, TrainIndices
from tracer.scoring.readiness import finalize_features, target_table, warn_of_processes
from tracer.scoring.regularization import Regularization
from tracer.scoring.scorer import KINDS, Labels, Scorer
from tracer.scoring.train_groups import sum_groups, top_groups, train_group_numbers
from tracer.store import Store
from tracer.types import TopK


class StoreReader:
    """A store without a model that answers questions. Get one from `Tracer.open`.

    Args:
        store: The store.
        device: The device to multiply on.
        process: This process among those that share the work.
        memory_bytes: The approximate memory of scoring.
        progress: Show progress bars; None: on a terminal only.

    Attributes:
        store: The store.
        device: The device to multiply on.
        process: This process among those that share the work.
    """

    def __init__(
        self, store: Store, device: torch.device, process: Process, memory_bytes: int, progress: bool | None
    ) -> None:
        self.store, self.device, self.process = store, device, process
        self._memory_bytes, self._progress = memory_bytes, progress
        warn_of_processes(store, process.count)
        self._scorer = Scorer(store, device, progress, memory_bytes, process)

    @classmethod
    def open(
        cls,
        save_dir: str | os.PathLike[str],
        device: str | torch.device = "cpu",
        *,
        memory_bytes: int = 1 << 30,
        process: ProcessChoice = None,
        progress: bool | None = None,
    ) -> StoreReader:
        """Open a store without its model, for scores, top examples, self-influence and reports.

        Args:
            save_dir: The store's directory or URL.
            device: The device to multiply on. Default: the CPU.
            memory_bytes: The approximate memory of scoring. Default: 1 GiB.
            process: As for `Tracer`.
            progress: Show progress bars; None: on a terminal only.

        Returns:
            A reader, with all methods of `Tracer` that need no model.

        Raises:
            StoreError: If there is no store, or it is damaged.
        """
        store, chosen = Store.open_existing(save_dir), check_device(device)
        return StoreReader(store, chosen, this_process(process), check_count(memory_bytes, "memory_bytes"), progress)

    @property
    def train_set_size(self) -> int:
        """The number of training examples ``N``."""
        return self.store.manifest.train_set_size

    def shard(self, dataset: Any) -> Subset:
        """Return this process's share of the training examples, or of targets.

        No two processes get examples of one file. The share depends only on the store, on the number of examples and on
        the number of processes: restart a process that died with the same number, and it finds its examples.

        Args:
            dataset: All examples: anything with ``len``. A data set of ``train_set_size`` examples is taken for the
                training set, except while as many targets are scored.

        Returns:
            A subset whose ``indices`` are the examples' indices in ``dataset``, a range, for ``inds=``. It is empty if
            there are more processes than files.
        """
        size = len(dataset)
        chunk_rows = self.store.chunk_rows if size == self.train_set_size else self.store.target_chunk_rows(size)
        return Subset(dataset, self.process.rows(size, chunk_rows))

    def remaining(self, model_id: int, exp_name: str | None = None) -> np.ndarray:
        """Return the indices of examples that are not durably stored yet at a checkpoint.

        Args:
            model_id: The checkpoint.
            exp_name: The name of targets. Default: the training examples.

        Returns:
            Ascending indices, int64, of all processes' shares; all other examples survive a crash.

        Raises:
            InputError: If there are no targets of this name.
            IncompleteError: If these targets were not scored at this checkpoint.
        """
        if exp_name is not None:
            return target_table(self.store, exp_name, model_id).remaining()
        if not self.store.catalog.has_checkpoint(check_model_id(model_id)):
            return np.arange(self.train_set_size, dtype=np.int64)
        return self.store.checkpoint(model_id).remaining()

    def grow(self, train_set_size: int) -> None:
        """Add training examples behind the existing ones; they are missing at every checkpoint.

        Featurize them (`remaining` lists them) and finalize again. Scores of the existing examples stay; missing scores
        are computed on the next request.

        Args:
            train_set_size: The new number of training examples.

        Raises:
            InputError: If it is below the present one.
        """
        size = check_count(train_set_size, "train_set_size")
        self.process.wait()  # what others had pending is in the store
        self.process.rank_zero_only(lambda: self.store.grow(size))
        self.store = self._scorer.store = Store.open_existing(self.store.path)

    def replace(self, inds: ExampleIndices, exp_name: str | None = None) -> None:
        """Mark examples as missing at all checkpoints, so that others can be featurized under their indices.

        Scores that depend on them are computed again on the next request, and no others.

        Args:
            inds: The indices of training examples, or of targets.
            exp_name: The name of targets. Default: the training examples.

        Raises:
            InputError: If the name is not known, or an index is out of range.
            CallOrderError: If the store has no checkpoint.
        """
        if exp_name is None:
            self.store.require_gradients("replace")
            if not self.store.catalog.checkpoint_ids():
                raise CallOrderError("The store has no checkpoint, so there are no rows to replace; featurize first.")
            rows = check_indices(inds, self.train_set_size, "train_set_size")
        else:
            known = self.store.catalog.exp_names()
            if exp_name not in known:
                raise InputError(f"exp_name={exp_name!r} is not in the store, which has {known}.")
            num_targets = self.store.targets(exp_name, self.store.catalog.target_ids(exp_name)[0]).num_rows
            rows = check_indices(inds, num_targets, "num_targets")
        self.process.wait()  # what others had pending is in the store, so that their marks go too
        self.process.rank_zero_only(lambda: self.store.replace_rows(rows, exp_name))

    def finalize_features(self, model_ids: list[int] | None = None) -> None:
        """Check that every training example is stored at each checkpoint, and allow scoring.

        Processes that run together all call it and wait for each other. Of a job array, any later process does.

        Args:
            model_ids: The checkpoints. Default: all in the store.

        Raises:
            CallOrderError: If there is no checkpoint.
            IncompleteError: If examples are missing; the message says how many and lists the first.
        """
        self.process.wait()
        self.process.rank_zero_only(lambda: finalize_features(self.store, model_ids, self._progress))
        self.process.rank_zero_only(self.store.ids().join)

    def finalize_scores(
        self,
        exp_name: str,
        estimator: str = "tracin",
        model_ids: list[int] | None = None,
        *,
        dtype: str | None = None,
        target: str | None = None,
        regularization: float | str = "auto",
        groups: Any = None,
        train_groups: Any = None,
    ) -> Any:
        """Compute the scores of all training examples for all targets of an experiment, tile by tile.

        Finished tiles are stored, so a run that was killed resumes. Processes that run together share the work. A job
        of an array computes its own share and returns; reading unfinished shares of other jobs is an error.

        Args:
            exp_name: The name of the targets.
            estimator: ``tracin``: the sum over checkpoints of learning rate times the dot product of loss gradients
                (Pruthi et al. 2020); ``cosine``: the same of normalized gradients; ``influence``: a Newton step of the
                training loss in feature space (Koh & Liang 2017), averaged over checkpoints, which may come from
                independently trained models; ``trak``: the same without the loss's curvature (Park et al. 2023);
                ``relatif``, ``relatif_theta``: that over the example's effect on itself, on weights (Barshan 2020);
                ``trackstar``: cosines of gradients whitened by the second moments of training examples and of these
                targets, averaged over checkpoints (Chang et al. 2024);
                ``source``: the steps of one run unrolled (Bae et al. 2024), from a store with
                ``shared_projection=True`` (or exact features) and learning rates that are sums over steps.
            model_ids: The checkpoints. Default: all in the store.
            dtype: The dtype of stored scores: ``float32``, or ``float16`` relative to each training example's largest
                score, which takes half the space at a relative error of 0.0005 of that. Default: that of existing
                scores, else ``float32``.
            target: Explain the target's ``loss``, or its ``output``: the task's f, in the direction in which the loss
                falls. Default: the loss for ``tracin`` and ``cosine``, else the output.
            regularization: λ of the kernel of ``trak`` and ``influence``, in units of ``Σ w ‖φ‖²`` over training
                examples; 0 is the pseudo-inverse. Default: ``auto``, chosen from the training; see `regularization`.
                For ``trackstar`` what is added to the second moments, in units of their mean eigenvalue; ``auto``: 0.1.
            groups: The group of each target, ``[M]``, integers from 0 on and -1 for none: scores are those of the sum
                over each group, ``[N, G]``. ``label``: groups are the targets' classes. Default: each target alone.
            train_groups: The group of each training example, ``[N]``, integers from 0 on and -1 for none; or
                ``document`` or ``group``, as `build_store` recorded them. Scores are summed over each group's examples,
                ``[train groups, num_targets]`` in float64. Default: each example alone.

        Returns:
            ``[train_set_size, num_targets]``, float32, read-only; only the parts that are used take memory. Positive
            scores are proponents. A numpy memory map if scores are float32 on a local disk and computed by one process;
            else a matrix that is indexed like one and reads from the store (`numpy.asarray` reads all).

        Raises:
            InputError: If the name, the estimator or a checkpoint is not known.
            IncompleteError: If targets are missing at a checkpoint.
            CallOrderError: If a checkpoint is not finalized.
        """
        estimate = Estimate(estimator, target, regularization, groups)
        numbers = None if train_groups is None else train_group_numbers(self.store, train_groups)
        scores = self._scorer.scores(exp_name, estimate, model_ids, dtype)
        return scores if numbers is None else sum_groups(scores, numbers)

    def top(
        self,
        exp_name: str,
        k: int,
        kind: str = "proponents",
        estimator: str = "tracin",
        model_ids: list[int] | None = None,
        *,
        rows: ExampleSelection | None = None,
        labels: Labels | None = None,
        target: str | None = None,
        regularization: float | str = "auto",
        groups: Any = None,
        train_groups: Any = None,
    ) -> TopK:
        """Return the strongest training examples of each target, without computing a score matrix.

        Both kinds are stored: a repeated question, even for a smaller ``k``, is read, and a killed run resumes.
        Processes that run together share the work; a job of an array raises an error while other shares are missing.

        Args:
            exp_name: The name of the targets.
            k: The number of training examples for each target.
            kind: ``proponents`` (largest scores) or ``opponents`` (smallest, most negative first).
            estimator: As in `finalize_scores`.
            model_ids: The checkpoints. Default: all in the store.
            rows: Only these training examples: a slice or range, indices, or a bool for each. The rest is not read.
            labels: Only training examples of these classes, as the task knows them.
            target: As in `finalize_scores`.
            regularization: As in `finalize_scores`.
            groups: As in `finalize_scores`.
            train_groups: As in `finalize_scores`, which is computed: indices are those of groups.

        Returns:
            Indices and scores, ``[num_targets, k]`` each, strongest first; examples of equal score by their index. With
            ``ids`` and ``target_ids`` if the store has them.

        Raises:
            InputError: If a name is not known, or ``k`` or ``rows`` is out of range.
            IncompleteError: If targets are missing at a checkpoint.
            CallOrderError: If a checkpoint is not finalized.
        """
        estimate = Estimate(estimator, target, regularization, groups)
        if train_groups is None:
            found = self._scorer.top(exp_name, k, kind, estimate, model_ids, rows, labels)
            return example_names.with_ids(found, self.store, None if groups is not None else exp_name)
        if rows is not None or labels is not None:
            raise InputError("rows= and labels= choose examples, and train_groups= groups; leave out one of them.")
        numbers = train_group_numbers(self.store, train_groups)
        check_choice("kind", kind, KINDS)
        return top_groups(sum_groups(self._scorer.scores(exp_name, estimate, model_ids), numbers), numbers, k, kind)

    def self_influence(
        self,
        model_ids: list[int] | None = None,
        estimator: str = "tracin",
        *,
        regularization: float | str = "auto",
    ) -> np.ndarray:
        """Return each training example's influence on itself: ``lr ‖gradient of the loss‖²``, summed over checkpoints.

        Exact gradient norms give it, without projection error. Mislabelled and unusual examples have large values
        (Pruthi et al. 2020, section 4.1). With ``trak`` or ``influence`` it is the square of the mean
        derivative times the mean of ``φᵀ (K + λI)⁻¹ φ``, the effect of the example's own Newton step on its loss; with
        ``source`` the score of the example on its own loss.

        Args:
            model_ids: The checkpoints. Default: all in the store.
            estimator: Any but ``cosine`` and ``trackstar``.
            regularization: As in `finalize_scores`.

        Returns:
            ``[train_set_size]``, float64.

        Raises:
            CallOrderError: If a checkpoint is not finalized.
            InputError: If the estimator is not known, or scores are cosines: that of a gradient with itself is 1.
        """
        estimate = Estimate(estimator, regularization=regularization)
        if estimate.is_cosine:
            raise InputError(
                f"estimator={estimator!r} gives cosines, and that of a gradient with itself is 1; pass 'tracin'."
            )
        return self._scorer.self_influence(model_ids, estimate)

    def changes_without(self, model_ids: list[int] | None = None) -> list[np.ndarray]:
        """Return how f of each example would change without it: one leave-one-out Newton step of ``influence``.

        Args:
            model_ids: The checkpoints. Default: all in the store.

        Returns:
            For each checkpoint ``[train_set_size]``, float64, in units of f.
        """
        return self._scorer.changes_without(model_ids)

    def regularization(self, estimator: str = "influence", model_ids: list[int] | None = None) -> Regularization:
        """Return the λ of ``regularization="auto"``, and the rule that it comes from.

        Rule ``held-out``: the λ at which the training's effect on an example is best predicted from the other examples,
        averaged over the checkpoints. Rule ``trace``, if the task does not know that effect: √2 times the mean of
        ``w ‖φ‖²``. See `tracer.scoring.regularization.choose_regularization`.

        Args:
            estimator: ``influence`` or ``trak``.
            model_ids: The checkpoints, which share one λ. Default: all in the store.

        Returns:
            ``value`` and ``rule``.

        Raises:
            CallOrderError: If a checkpoint is not finalized.
            InputError: If the estimator has no kernel.
        """
        estimate = Estimate(estimator)
        if not estimate.is_newton_step:
            raise InputError(f"estimator={estimator!r} has no kernel to regularize; pass 'influence' or 'trak'.")
        return self._scorer.regularization(model_ids, estimate)

    def check_query(
        self,
        k: int,
        kind: str,
        estimate: Estimate,
        model_ids: list[int] | None,
        rows: ExampleSelection | None,
        labels: Labels | None,
    ) -> tuple[list[int], TrainIndices]:
        """Check a query before anything is computed; return the numbers of its checkpoints, and its examples."""
        return self._scorer.check_query(k, kind, estimate, model_ids, rows, labels)

    def query(
        self,
        targets: Sequence[InMemoryTable],
        model_ids: list[int],
        indices: TrainIndices,
        k: int,
        kind: str,
        estimate: Estimate,
        candidates: int = 0,
    ) -> TopK:
        """Return the strongest training examples of targets that are in memory; see `Tracer.query`."""
        found = self._scorer.query(targets, model_ids, indices, k, kind, estimate, candidates)
        return example_names.with_ids(found, self.store, None)

    ids = example_names.ids
    set_ids = example_names.set_ids
    build_index = search.build_index

    def close(self) -> None:
        """Do nothing: files are opened for each answer."""

    def __enter__(self) -> StoreReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

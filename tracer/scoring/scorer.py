"""What can be asked of a store once its rows are there: completeness, scores, top rows, self-influence. No model."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from tracer._core.processes import Process
from tracer._core.validation import as_list, bar_disabled, check_count, check_model_id
from tracer.data.indices import RowChoice, chosen_rows
from tracer.errors import CallOrderError, IncompleteError, InputError, InputTypeError, nearest_name
from tracer.scoring import streaming
from tracer.scoring.estimators import Estimate
from tracer.scoring.kernels import Kernels, own_influence
from tracer.scoring.preconditioned_targets import DerivedRows, describe, group_indices
from tracer.scoring.regularization import Regularization
from tracer.scoring.top_queries import TopQuestion
from tracer.store import RowTable, ScoreArray, Store
from tracer.store.lazy_matrix import ScoreMatrix
from tracer.store.table_schema import NO_LABEL
from tracer.types import TopK

Labels = int | Sequence[int] | np.ndarray
"""What ``labels=`` takes: class indices."""

KINDS = ("proponents", "opponents")
"""What ``kind=`` takes."""


class Scorer:
    """Answers questions from a store.

    Args:
        store: The store.
        device: Where to multiply.
        progress: Show progress bars; None: on a terminal only.
        memory_bytes: How much scoring holds, about.
        process: Which of several processes this one is; alone by default.
    """

    def __init__(
        self,
        store: Store,
        device: torch.device,
        progress: bool | None = None,
        memory_bytes: int = streaming.MEMORY_BYTES,
        process: Process | None = None,
    ) -> None:
        self.store, self.device, self.progress, self.memory_bytes = store, device, progress, memory_bytes
        self.process = process or Process()
        self._known_kernels: Kernels | None = None

    @property
    def num_rows(self) -> int:
        """The number of train rows."""
        return self.store.manifest.train_set_size

    def finalize_features(self, model_ids: list[int] | None) -> None:
        """Check that all rows are there and mark the checkpoints; see `tracer.Tracer.finalize_features`."""
        disable = bar_disabled(self.progress)
        for model_id in tqdm(self._known_ids(model_ids), desc="finalize", unit="checkpoint", disable=disable):
            table = self.store.checkpoint(model_id)
            missing = table.remaining()
            if len(missing):
                raise IncompleteError(
                    f"Checkpoint {model_id} lacks {len(missing)} of {self.num_rows} train rows, first "
                    f"{missing[:5].tolist()}. Featurize them (tracer.remaining({model_id}) lists them all) and "
                    f"finalize again."
                )
            if not table.attributes.get("finalized"):
                table.set_attributes(finalized=True)

    def check_finalized(self, model_id: int) -> None:
        """Check that a checkpoint is ready for scoring.

        Args:
            model_id: The checkpoint.

        Raises:
            CallOrderError: It is not in the store, or not finalized.
            IncompleteError: Rows that it had are gone.
        """
        known = self.store.checkpoint_ids()
        if model_id not in known:
            raise CallOrderError(
                f"Checkpoint {model_id} is not in the store, which has {known}. Featurize all train rows at it and "
                f"call tracer.finalize_features() before scoring."
            )
        table = self.store.checkpoint(model_id)
        if not table.attributes.get("finalized"):
            raise CallOrderError(
                f"Checkpoint {model_id} is not finalized; call tracer.finalize_features() once all train rows are "
                f"featurized ({len(table.remaining())} are missing), or choose other checkpoints by model_ids=. A "
                f"checkpoint that was loaded by mistake is removed with its directory {table.path}."
            )
        missing = table.num_rows - table.num_done
        if missing:
            raise IncompleteError(
                f"Checkpoint {model_id} was finalized and lacks {missing} of {self.num_rows} train rows: files are "
                f"gone, with their marks. Restore them, or call tracer.replace(tracer.remaining({model_id})), which "
                f"forgets what came from these rows, featurize them and finalize again."
            )

    def scores(self, exp_name: str, estimate: Estimate, model_ids: list[int] | None, dtype: str | None = None) -> Any:
        """Compute all scores, or this process's share of them; see `tracer.Tracer.finalize_scores`."""
        pairs, inputs = self._pairs(exp_name, estimate, model_ids)
        num_targets = pairs[0].targets.num_rows
        tile_rows = streaming.BandScorer(pairs, estimate, self.device, self.memory_bytes).tile_rows
        shape, mine = (self.num_rows, num_targets), self.process

        def opened() -> ScoreArray:
            first = mine.rank == 0
            return self.store.scores(
                exp_name, estimate.name, shape, inputs, tile_rows=tile_rows, dtype=dtype, may_replace=first
            )

        if mine.together:
            mine.first_only(lambda: opened().close())
        with opened() as scores:
            ranges = scores.remaining((mine.rank, mine.count))
            found = streaming.write_scores(
                pairs, estimate, scores, self.device, self.progress, memory_bytes=self.memory_bytes, ranges=ranges
            )
        if mine.count == 1:
            return found
        mine.wait()
        done = self.store.read_scores(exp_name, estimate.name)
        return done.matrix() if done.complete else ScoreMatrix(done.shape, done.read)  # which refuses what is missing

    def top(
        self,
        exp_name: str,
        k: int,
        kind: str,
        estimate: Estimate,
        model_ids: list[int] | None,
        rows: RowChoice | None = None,
        labels: Labels | None = None,
    ) -> TopK:
        """Find the strongest rows; see `tracer.Tracer.top`."""
        chosen = self._check_top(k, kind, model_ids, rows, labels)
        question = self._question(exp_name, k, estimate, model_ids, chosen)
        if self.process.count > 1:
            mine = self.process.rows(self.num_rows, self.store.block_rows)
            question.cover([(mine.start, mine.stop)])
            self.process.wait()
            missing = 0 if self.process.together else question.num_missing
            if missing:
                raise IncompleteError(
                    f"This process has found the strongest of its own train rows, {mine.start} to {mine.stop - 1}, and "
                    f"they are kept; {missing} rows of other processes are missing. Ask again when those are done."
                )
            self.process.first_only(question.answer)
        return question.answer()[KINDS.index(kind)]

    def query(
        self,
        targets: Sequence[streaming.MemoryRows],
        model_ids: list[int],
        k: int,
        kind: str,
        estimate: Estimate,
        rows: RowChoice | None,
        labels: Labels | None = None,
    ) -> TopK:
        """Find the strongest rows of targets that are not in the store; nothing is stored but kernels.

        Args:
            targets: Their rows at each checkpoint.
            model_ids: The checkpoints.
            k: How many train rows for each target.
            kind: ``"proponents"`` or ``"opponents"``.
            estimate: What scores are to say, of single targets.
            rows: Only these train rows.
            labels: Only train rows of these classes.

        Returns:
            Indices and scores, ``[M, k]`` each.
        """
        chosen = self._check_top(k, kind, model_ids, rows, labels)
        pairs, _ = self._terms(model_ids, targets, estimate)
        *_, (_, *ends) = streaming.select_rows(
            pairs,
            estimate,
            chosen,
            k,
            self.device,
            self.progress,
            memory_bytes=self.memory_bytes,
            on_grid=len(chosen) == self.num_rows,
        )
        return ends[KINDS.index(kind)].result()

    def check_query(
        self,
        k: int,
        kind: str,
        estimate: Estimate,
        model_ids: list[int] | None,
        rows: RowChoice | None,
        labels: Labels | None = None,
    ) -> list[int]:
        """Check the arguments of a query before anything is computed, and return the ids of its checkpoints."""
        self._check_top(k, kind, model_ids, rows, labels)
        chosen = self._finalized_ids(model_ids)
        self._factors(chosen, estimate)
        return chosen

    def _check_top(
        self,
        k: int,
        kind: str,
        model_ids: list[int] | None,
        rows: RowChoice | None,
        labels: Labels | None,
    ) -> streaming.Band:
        """Check what is asked for and return the train rows that count."""
        if kind not in KINDS:
            raise InputError(f"kind={kind!r} is not known; {nearest_name(kind, KINDS)}.")
        chosen = chosen_rows(rows, self.num_rows)
        if labels is not None:
            chosen = self._of_labels(chosen, labels, model_ids)
        if check_count(k, "k") > len(chosen):
            filtered = rows is not None or labels is not None
            what = f"the {len(chosen)} train rows that were chosen" if filtered else f"train_set_size={self.num_rows}"
            raise InputError(f"k={k} is more than {what}.")
        return chosen

    def _of_labels(self, rows: streaming.Band, labels: Labels, model_ids: list[int] | None) -> np.ndarray:
        """Return those of the rows whose class is one of these, as a checkpoint that has all rows knows it."""
        wanted = np.atleast_1d(np.asarray(labels))
        if wanted.ndim != 1 or wanted.dtype.kind not in "iu":
            raise InputTypeError(f"labels={labels!r}; expected a class index or a list of them.")
        known = self.store.checkpoint(self._finalized_ids(model_ids)[0]).column("label")
        if (known == NO_LABEL).all():
            raise InputError("labels= came and the store knows no labels: its task gives none. Choose rows by rows=.")
        chosen = np.asarray(rows)[np.isin(known[np.asarray(rows)], wanted)]
        if not len(chosen):
            raise InputError(f"labels={labels!r}: no train row has them; the store knows {np.unique(known).tolist()}.")
        return chosen

    def _question(
        self, exp_name: str, k: int, estimate: Estimate, model_ids: list[int] | None, rows: streaming.Band
    ) -> TopQuestion:
        pairs, inputs = self._pairs(exp_name, estimate, model_ids)
        return TopQuestion(
            self.store, exp_name, estimate, inputs, pairs, rows, int(k), self.device, self.memory_bytes, self.progress
        )

    def self_influence(self, model_ids: list[int] | None, estimate: Estimate) -> np.ndarray:
        """Sum up self-influence; see `tracer.Tracer.self_influence`."""
        chosen = self._finalized_ids(model_ids)
        tables = [self.store.checkpoint(model_id) for model_id in chosen]
        factors = self._factors(chosen, estimate)
        if estimate.kernel is None:
            return streaming.summed_self_influence(list(zip(factors, tables, strict=True)))
        kernels = self._kernels(estimate)
        found = kernels.regularization(chosen, estimate)
        total, loss_grad = np.zeros(self.num_rows), np.zeros(self.num_rows)
        for factor, model_id, table in zip(factors, chosen, tables, strict=True):
            kernel, _ = kernels.get(model_id, estimate.kernel, chosen)
            total += factor * own_influence(table, kernel, found.value, self.device)
            loss_grad += factor * table.column("loss_grad")
        return total * np.square(loss_grad)

    def regularization(self, model_ids: list[int] | None, estimate: Estimate) -> Regularization:
        """Return the regularization of an estimate with a kernel; see `tracer.Tracer.regularization`."""
        return self._kernels(estimate).regularization(self._finalized_ids(model_ids), estimate)

    def targets(self, exp_name: str, model_id: int) -> RowTable:
        """Return the table of targets at a checkpoint.

        Args:
            exp_name: The name of the targets.
            model_id: The checkpoint.

        Returns:
            The table.

        Raises:
            InputError: The name is not known.
            IncompleteError: These targets were not scored at this checkpoint.
        """
        known = self.store.exp_names()
        if exp_name not in known:
            raise InputError(f"exp_name={exp_name!r} was never scored; {nearest_name(exp_name, known)}.")
        if not self.store.has_targets(exp_name, model_id):
            scored = [i for i in self.store.checkpoint_ids() if self.store.has_targets(exp_name, i)]
            raise IncompleteError(
                f"Targets {exp_name!r} were not scored at checkpoint {model_id}. Call start_scoring_checkpoint and "
                f"score for it, or choose the checkpoints {scored} by model_ids=."
            )
        return self.store.targets(exp_name, model_id)

    def _pairs(
        self, exp_name: str, estimate: Estimate, model_ids: list[int] | None
    ) -> tuple[list[streaming.CheckpointPair], dict[str, Any]]:
        """Return the tables of each checkpoint, and what decides scores apart from the estimator."""
        chosen = self._finalized_ids(model_ids)
        tables = []
        for model_id in chosen:
            targets = self.targets(exp_name, model_id)
            missing = targets.remaining()
            if len(missing):
                raise IncompleteError(
                    f"{len(missing)} of {targets.num_rows} targets {exp_name!r} are missing at checkpoint {model_id}, "
                    f"first {missing[:5].tolist()}. Score them and finalize again."
                )
            tables.append(targets)
        pairs, described = self._terms(chosen, tables, estimate)
        if self.store.manifest.storage == "none":
            pairs = [
                replace(pair, cosines=self._cosines(exp_name, model_id, pair.train, targets))
                for model_id, pair, targets in zip(chosen, pairs, tables, strict=True)
            ]
        attributes = [(self.store.table_attributes(i), self.store.table_attributes(i, exp_name)) for i in chosen]
        return pairs, {
            "model_ids": chosen,
            "learning_rates": [pair.factor for pair in pairs],
            "tables": [[each["table_id"] for each in pair] for pair in attributes],
            **described,
        }

    def _terms(
        self, model_ids: list[int], targets: Sequence[streaming.Rows], estimate: Estimate
    ) -> tuple[list[streaming.CheckpointPair], dict[str, Any]]:
        """Return the terms of a sum over checkpoints, with derived targets, and what decides them beside the tables."""
        factors = self._factors(model_ids, estimate)
        trains = [self.store.checkpoint(model_id) for model_id in model_ids]
        if not estimate.transforms_targets:
            return list(map(streaming.CheckpointPair, factors, trains, targets)), describe(None)
        groups, kernels = group_indices(estimate, targets[0]), self._kernels(estimate)
        found = kernels.regularization(model_ids, estimate) if estimate.kernel else None
        described = describe(found)
        if groups is not None:
            described["groups"] = hashlib.sha256(groups.astype("<i8").tobytes()).hexdigest()
        held = self.memory_bytes // (4 * len(model_ids))

        def solve(model_id: int, rows: torch.Tensor) -> torch.Tensor:
            assert estimate.kernel is not None and found is not None
            kernel, _ = kernels.get(model_id, estimate.kernel, model_ids)
            return kernel.solve(rows, found.value)

        derived = [
            DerivedRows(table, estimate, groups, partial(solve, model_id) if found else None, self.device, held)
            for model_id, table in zip(model_ids, targets, strict=True)
        ]
        return list(map(streaming.CheckpointPair, factors, trains, derived)), described

    def _kernels(self, estimate: Estimate) -> Kernels:
        """Return the kernels of this store.

        Raises:
            CallOrderError: The store has no features.
        """
        if self.store.manifest.storage == "none":
            what = f"estimator={estimate.estimator!r}" if estimate.kernel else "groups="
            raise CallOrderError(
                f"{what} needs stored features and this store has storage='none'; featurize into another save_dir with "
                f"storage='float32' or 'float16' (projector='none' keeps gradients exact)."
            )
        known = self._known_kernels
        if known is None or known.store is not self.store:  # which is another one when it has grown
            known = Kernels(self.store, self.device, self.process, self.progress, self.memory_bytes // 2)
            self._known_kernels = known
        known.look_again()
        return known

    def _factors(self, model_ids: list[int], estimate: Estimate) -> list[float]:
        """Return the weight of each checkpoint: its learning rate, or an equal share with a kernel."""
        return [1 / len(model_ids)] * len(model_ids) if estimate.kernel else self._rates(model_ids)

    def _cosines(
        self, exp_name: str, model_id: int, train: RowTable, targets: RowTable
    ) -> list[tuple[int, ScoreArray]]:
        """Return the blocks of cosines of all targets, complete and made from these tables."""
        tables = [table.attributes["table_id"] for table in (train, targets)]
        blocks, end = [], 0
        for first, block in self.store.cosines(exp_name, model_id):
            whole = block.complete and block.shape[0] == train.num_rows
            if first == end and whole and block.inputs["tables"] == tables:
                blocks.append((first, block))
                end += block.shape[1]
        if end < targets.num_rows:
            raise IncompleteError(
                f"Of {targets.num_rows} targets {exp_name!r} at checkpoint {model_id}, {end} were compared with all "
                f"train rows. With storage='none' features are not stored, so tracer.score_exactly (or attribute) is "
                f"to see train rows and targets together; call it again for this checkpoint."
            )
        return blocks

    def _known_ids(self, model_ids: list[int] | None) -> list[int]:
        known = self.store.checkpoint_ids()
        if not known:
            raise CallOrderError("The store has no checkpoint; call load_checkpoint and featurize first.")
        if model_ids is None:
            return known
        chosen = [check_model_id(model_id) for model_id in as_list(model_ids, "model_ids")]
        unknown = [model_id for model_id in chosen if model_id not in known]
        if unknown or not chosen:
            raise InputError(f"model_ids={chosen}: {unknown or 'nothing'} is not in the store, which has {known}.")
        if len(set(chosen)) < len(chosen):
            raise InputError(f"model_ids={chosen} has a checkpoint more than once; each counts once.")
        return chosen

    def _finalized_ids(self, model_ids: list[int] | None) -> list[int]:
        chosen = self._known_ids(model_ids)
        for model_id in chosen:
            self.check_finalized(model_id)
        return chosen

    def _rates(self, model_ids: list[int]) -> list[float]:
        rates = [self.store.table_attributes(model_id).get("learning_rate") for model_id in model_ids]
        unknown = [model_id for model_id, rate in zip(model_ids, rates, strict=True) if rate is None]
        if unknown and len(unknown) < len(model_ids):
            raise InputError(
                f"Checkpoints {unknown} have no learning rate and the others have: they cannot be weighed against each "
                f"other. Give it: tracer.load_checkpoint(checkpoint, model_id={unknown[0]}, learning_rate=...)."
            )
        return [1.0 if rate is None else float(rate) for rate in rates]

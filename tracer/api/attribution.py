"""One call from checkpoints to influence scores."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

import numpy as np
from torch import nn
from tqdm import tqdm

from tracer._core.sharding import fsdp_modules
from tracer._core.validation import bar_disabled, check_count
from tracer.api.report_metadata import StoreFacts
from tracer.api.store_reader import StoreReader
from tracer.api.tracer import Tracer
from tracer.data.datasets import DataSource, as_data_source
from tracer.errors import InputError, InputTypeError
from tracer.report import ReportOptions, write_report
from tracer.report.samples import as_array
from tracer.scoring.estimators import Estimate
from tracer.store.feature_storage import FeatureStorage
from tracer.types import Batch, Checkpoint, TopK


@dataclass(frozen=True)
class Attribution:
    """Influence of train rows on targets, as `attribute` returns it; everything lies in the store.

    Of a store that is there already it is ``Attribution(Tracer.open(save_dir), "targets")``.

    Attributes:
        tracer: The tracer, or the reader of its store, for more questions.
        exp_name: The name of the targets.
        estimator: The estimator of `scores` and `top`.
        model_ids: The checkpoints' numbers in the store; None: all.
        target: Of what on the targets' side, as `Tracer.finalize_scores` takes it.
        regularization: λ of ``trak`` and ``influence``, likewise.
    """

    tracer: Tracer | StoreReader
    exp_name: str
    estimator: str = "tracin"
    model_ids: list[int] | None = None
    target: str | None = None
    regularization: float | str = "auto"

    @property
    def scores(self) -> np.ndarray:
        """``[num_train, num_targets]``, float32, mapped from the store; computed at the first use."""
        return self.tracer.finalize_scores(self.exp_name, self.estimator, self.model_ids, **self._options)

    def top(self, k: int, kind: str = "proponents") -> TopK:
        """Return the strongest train rows of each target.

        Args:
            k: How many for each target.
            kind: ``proponents`` or ``opponents``.

        Returns:
            Indices and scores, ``[num_targets, k]`` each, strongest first.
        """
        return self.tracer.top(self.exp_name, k, kind, self.estimator, self.model_ids, **self._options)

    @property
    def _options(self) -> dict[str, Any]:
        return {"target": self.target, "regularization": self.regularization}

    def self_influence(self) -> np.ndarray:
        """Return each train row's influence on itself, ``[num_train]``, float64; see `Tracer.self_influence`."""
        return self.tracer.self_influence(self.model_ids)

    def _described(self) -> dict[str, Any]:
        """Return estimator, target and, for estimators with a kernel, λ and its rule, as reports show them."""
        estimate = Estimate(self.estimator, self.target, self.regularization)
        shown: dict[str, Any] = {"estimator": estimate.estimator, "target": estimate.target}
        if estimate.kernel is None:
            return shown
        if self.regularization != "auto":
            return {**shown, "regularization": f"{float(self.regularization):.4g}, given"}
        found = self.tracer.regularization(self.estimator, self.model_ids)
        return {**shown, "regularization": f"{found.value:.4g}, rule {found.rule}"}

    def report(
        self,
        directory: str | os.PathLike[str],
        inputs: Any = None,
        labels: Any = None,
        class_names: Sequence[str] | None = None,
        *,
        target_inputs: Any = None,
        target_labels: Any = None,
        k: int = 8,
        all_scores: bool = True,
        figures: bool = True,
        title: str = "Influence report",
        **options: Unpack[ReportOptions],
    ) -> Path:
        """Write a page that shows what was found, and files beside it.

        Labels, losses and settings that are not given come from the store.

        Args:
            directory: Where the files go; made where it does not exist.
            inputs: The train rows' inputs as images, vectors, texts or records, or None.
            labels: The train rows' labels; None: as the store knows them.
            class_names: The name of each class index.
            target_inputs: The targets' inputs, or None.
            target_labels: The targets' labels; None: as the store knows them.
            k: How many proponents and opponents to show of each target.
            all_scores: Take in all scores: their distribution, averages, classes and the estimate of wrong labels.
                They are computed into the store where they are not there yet, 4 bytes a train row and target.
            figures: Whether to write PNG files, which needs matplotlib. Default: True.
            title: The page's title.
            **options: As in `tracer.report.ReportOptions`.

        Returns:
            The path of ``index.html``.
        """
        k = min(k, self.tracer.train_set_size)
        facts = StoreFacts.of(self.tracer.store, self.exp_name, self.model_ids)
        known = {**self._described(), **facts.settings}
        options["settings"] = {**known, **(options.get("settings") or {})}
        rankings = options.get("rankings")
        if rankings is None and facts.losses is not None:
            options["rankings"] = {"mean loss": facts.losses}
        return write_report(
            directory,
            self_influence=self.self_influence(),
            proponents=self.top(k, "proponents"),
            opponents=self.top(k, "opponents"),
            scores=self.scores if all_scores else None,
            train_inputs=inputs,
            target_inputs=target_inputs,
            train_labels=_labels_or(facts.train_labels, labels, target_labels),
            target_labels=_labels_or(facts.target_labels, target_labels, labels),
            class_names=class_names,
            figures=figures,
            title=title,
            **options,
        )


def _labels_or(stored: np.ndarray | None, given: Any, others: Any) -> Any:
    """Return the labels that were given, else the store's, unless the other side's are of another kind: names."""
    if given is not None or others is None:
        return stored if given is None else given
    return stored if as_array(others, "labels").dtype.kind in "iu" else None


def attribute(
    model: nn.Module,
    task: Any,
    train: Any,
    targets: Any,
    checkpoints: Sequence[Checkpoint | tuple[Checkpoint, float]],
    *,
    save_dir: str | os.PathLike[str],
    batch_size: int = 64,
    collate_fn: Callable[[list], Batch] | None = None,
    exp_name: str = "targets",
    estimator: str = "tracin",
    target: str | None = None,
    regularization: float | str = "auto",
    progress: bool | None = None,
    **tracer_options: Any,
) -> Attribution:
    """Trace targets to train rows over the checkpoints of a training run; called again, it resumes.

    Under torchrun, with ``torch.distributed`` initialised, the processes divide the rows among them; all call it.

    Args:
        model: The model; it is left as found.
        task: As `Tracer` takes it.
        train: The train rows: a map-style data set, a tuple of tensors, a `DataLoader` with ``shuffle=False``, or a
            list of batches.
        targets: The rows to explain, likewise.
        checkpoints: State dicts or paths, each alone or as ``(checkpoint, learning rate)``; with ``preconditioner=``,
            training checkpoints.
        save_dir: Where the store lies or is to be made.
        batch_size: For data sets and tensors; loaders and lists have their own.
        collate_fn: How rows of a data set become a batch; by default as a `DataLoader` does it.
        exp_name: The name of the targets in the store.
        estimator: ``tracin``, ``cosine``, ``influence`` or ``trak``, as `Tracer.finalize_scores` explains them.
        target: ``loss`` or ``output``, likewise.
        regularization: λ of ``trak`` and ``influence``, likewise.
        progress: Show progress bars; None: on a terminal only.
        **tracer_options: As `Tracer` takes them: ``proj_dim``, ``projector``, ``params``, ``storage``, ``device``...
            With ``projector="none"``, ``storage`` is ``"none"`` by default: exact scores, without storing gradients;
            for ``trak`` and ``influence``, which need them, ``"float32"``.

    Returns:
        The attribution.

    Raises:
        InputError: There are no checkpoints or rows, a loader shuffles, or the model is sharded by ``fully_shard``.
        InputTypeError: The data or the checkpoints are of a type that cannot be used.

    >>> import tempfile
    >>> import torch
    >>> model, x, y = nn.Linear(3, 2), torch.randn(6, 3), torch.tensor([0, 1, 0, 1, 0, 1])
    >>> checkpoints = [(model.state_dict(), 0.1)]
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     found = attribute(model, "image_classification", (x, y), (x[:2], y[:2]), checkpoints, save_dir=folder)
    ...     found.scores.shape
    (6, 2)
    """
    estimate = Estimate(estimator, target, regularization)
    if fsdp_modules(model):
        raise InputError(
            "model is sharded by fully_shard, and attribute passes all rows in one process; make a Tracer on each rank "
            "and pass each its own rows by inds=, or pass the plain model."
        )
    pairs = [_pair(checkpoint) for checkpoint in _as_list(checkpoints)]
    size = check_count(batch_size, "batch_size")
    train_rows = as_data_source(train, "train", size, collate_fn)
    target_rows = as_data_source(targets, "targets", size, collate_fn)
    projector = tracer_options.get("projector", "sketch")
    tracer_options.setdefault("storage", FeatureStorage.default(projector, bool(estimate.kernel)))
    tracer = Tracer(model, task, len(train_rows), save_dir, progress=progress, **tracer_options)
    chosen = list(range(len(pairs)))
    if not tracer.store.manifest.feature_storage.stores_features:
        for model_id, (checkpoint, learning_rate) in enumerate(pairs):
            tracer.load_checkpoint(checkpoint, model_id=model_id, learning_rate=learning_rate)
            tracer.score_exactly(checkpoint, model_id, train_rows, target_rows, exp_name)
        tracer.finalize_features(chosen)
        return Attribution(tracer, exp_name, estimator, chosen, target, regularization)
    bar_options = {"unit": "row", "disable": bar_disabled(progress)}
    for model_id, (checkpoint, learning_rate) in enumerate(pairs):
        tracer.load_checkpoint(checkpoint, model_id=model_id, learning_rate=learning_rate)
        missing = _own(tracer, train_rows, tracer.remaining(model_id))
        label = f"featurize {model_id + 1}/{len(pairs)}"
        _feed(tracer.featurize, train_rows, missing, {"desc": label, **bar_options})
    tracer.finalize_features(chosen)
    for model_id, (checkpoint, _) in enumerate(pairs):
        tracer.start_scoring_checkpoint(checkpoint, model_id, len(target_rows), exp_name)
        missing = _own(tracer, target_rows, tracer.remaining(model_id, exp_name))
        _feed(tracer.score, target_rows, missing, {"desc": f"score {model_id + 1}/{len(pairs)}", **bar_options})
    tracer.flush()
    tracer.process.wait()
    return Attribution(tracer, exp_name, estimator, chosen, target, regularization)


def _own(tracer: Tracer, source: DataSource, rows: np.ndarray) -> np.ndarray:
    """Return those of the rows that are this process's."""
    return rows[np.isin(rows, np.asarray(tracer.shard(range(len(source))).indices), assume_unique=True)]


def _feed(step: Callable[..., None], source: DataSource, rows: np.ndarray, bar_options: Mapping[str, Any]) -> None:
    """Give the missing rows to the tracer, batch by batch, with a progress bar over all rows."""
    if len(rows) == 0:
        return
    initial = len(source) - len(rows)
    with tqdm(total=len(source), initial=initial, **bar_options) as bar:
        for batch, inds in source.batches(rows):
            step(batch, inds=inds)
            bar.update(int(np.isin(inds, rows, assume_unique=True).sum()))


def _as_list(checkpoints: Any) -> list:
    if isinstance(checkpoints, (str, os.PathLike, Mapping)) or not hasattr(checkpoints, "__iter__"):
        raise InputTypeError(
            f"checkpoints is a {type(checkpoints).__name__}; expected a list of state dicts or paths, each alone or as "
            f"(checkpoint, learning_rate)."
        )
    found = list(checkpoints)
    if not found:
        raise InputError("checkpoints is empty; pass one checkpoint at least.")
    return found


def _pair(checkpoint: Any) -> tuple[Checkpoint, float | None]:
    if isinstance(checkpoint, (tuple, list)):
        if len(checkpoint) != 2:
            raise InputTypeError(
                f"A checkpoint came as {len(checkpoint)} values; expected (checkpoint, learning_rate)."
            )
        return checkpoint[0], checkpoint[1]
    return checkpoint, None

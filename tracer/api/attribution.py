"""Influence scores from checkpoints in one call."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Unpack, cast

import numpy as np
from torch import nn

from tracer._core.sharding import fsdp_modules
from tracer._core.validation import check_choice, check_count, check_model
from tracer.api import display
from tracer.api.checkpoint_sources import check_distinct, checkpoint_pairs
from tracer.api.explanation import explain
from tracer.api.label_evidence import label_health, model_warnings
from tracer.api.language_inputs import LanguageInputs
from tracer.api.passes import Passes
from tracer.api.questions import Estimators
from tracer.api.report_metadata import StoreFacts, labels_or
from tracer.api.settings import AttributeOptions, FeatureOptions, chosen_storage, feature_settings, takes_settings
from tracer.api.store_reader import StoreReader
from tracer.api.tracer import Tracer
from tracer.data.datasets import DataSource, NoExamples, as_data_source
from tracer.data.example_ids import find_ids
from tracer.data.named_tasks import make_task
from tracer.data.tables import InputForm
from tracer.errors import InputError
from tracer.report import ReportOptions, write_report
from tracer.report.label_noise import WrongLabels
from tracer.scoring.estimators import ESTIMATORS, Estimate
from tracer.training.load_state import check_headers
from tracer.types import Batch, Checkpoint, TopK

logger = logging.getLogger("tracer")


@dataclass(frozen=True, repr=False)
class Attribution:
    """Influence of training examples on targets, as `attribute` returns it; everything is in the store.

    For an existing store, use ``Attribution(Tracer.open(save_dir), "targets")``, or `load_store`.

    Attributes:
        tracer: The tracer, or the reader of its store, for more questions.
        exp_name: The name of the targets.
        estimator: The estimator of all questions, ``auto``, or None, as for `attribute`; see `estimators`.
        model_ids: The checkpoints' numbers in the store. Default: all.
        target: ``loss`` or ``output``, as in `Tracer.finalize_scores`.
        regularization: λ of ``trak`` and ``influence``, as in `Tracer.finalize_scores`.
        sources: The training examples and the targets, if they are at hand, to be shown.
        language: The tokenizer and data of `build_store` and `load_store`, for `explain`.
    """

    tracer: Tracer | StoreReader
    exp_name: str
    estimator: str | None = None
    model_ids: list[int] | None = None
    target: str | None = None
    regularization: float | str = "auto"
    sources: tuple[DataSource | None, DataSource | None] = field(default=(None, None), compare=False)
    language: LanguageInputs | None = field(default=None, repr=False, compare=False)

    __repr__, _repr_html_ = display.as_text, display.as_html
    show, to_pandas = display.show, display.to_pandas
    explain = explain

    @cached_property
    def estimators(self) -> Estimators:
        """The estimators of `scores`, `top` and `self_influence`, and the reason why they were chosen."""
        return Estimators.of(self.estimator, self.tracer.store.manifest)

    @property
    def scores(self) -> np.ndarray:
        """``[num_train, num_targets]``, float32, mapped from the store; computed on first use."""
        name = self.estimators.scores
        return self.tracer.finalize_scores(self.exp_name, name, self.model_ids, **self._options(name))

    def top(self, k: int, kind: str = "proponents", train_groups: Any = None) -> TopK:
        """Return the strongest training examples of each target, by ``estimators.top``.

        Sums over groups are those of `scores`, since cosines do not add up.

        Args:
            k: The number for each target.
            kind: ``proponents`` or ``opponents``. Default: ``proponents``.
            train_groups: Groups of training examples to rank, as in `Tracer.top`. Default: each example alone.

        Returns:
            Indices and scores, ``[num_targets, k]`` each, strongest first.
        """
        name = self.estimators.top if train_groups is None else self.estimators.scores
        options = {**self._options(name), "train_groups": train_groups}
        return self.tracer.top(self.exp_name, k, kind, name, self.model_ids, **options)

    def _options(self, estimator: str) -> dict[str, Any]:
        # a λ that was given with another estimator, such as the one of auto, says nothing of this one
        ignored = self.estimator not in (None, estimator) and not Estimate(estimator).is_regularized
        return {"target": self.target, "regularization": "auto" if ignored else self.regularization}

    def self_influence(self) -> np.ndarray:
        """Return each training example's influence on itself, by ``estimators.self_influence``.

        Returns:
            ``[num_train]``, float64.

        Raises:
            InputError: If scores are cosines (``cosine``, ``trackstar``): that of a gradient with itself is 1.
        """
        named = self.estimator if self.estimator in ESTIMATORS else None  # refused if scores are cosines
        name = named or self.estimators.self_influence
        given = self._options(name)["regularization"]
        return self.tracer.self_influence(self.model_ids, name, regularization=given)

    def by(self, question: str) -> Attribution:
        """Return the attribution all of whose questions have the estimator of one: a field of `estimators`."""
        check_choice("question", question, ("scores", "top", "self_influence"))
        name = getattr(self.estimators, question)
        return replace(self, estimator=name, regularization=self._options(name)["regularization"])

    def label_health(self) -> WrongLabels | str:
        """Return the estimated share of wrong labels among the training examples, or why there is no estimate.

        Each training example is predicted as if the model had not learned from it, by the leave-one-out step of the
        estimator ``influence``; predictions of targets that are no training examples tell how far to trust these.

        Returns:
            ``share``, a 95 % interval from ``low`` to ``high``, and for each example ``confidence``, the probability
            that its label is wrong, ``suggested``, the class that the model prefers, and ``suspects``.
        """
        store, model_ids = self.tracer.store, self._checkpoints
        has_features = store.manifest.feature_storage.stores_features
        return label_health(store, self.exp_name, model_ids, self.tracer.changes_without if has_features else None)

    def warnings(self) -> list[str]:
        """Return sentences that say why the scores mean little: flat losses, labels not fitted, accuracy at chance."""
        return model_warnings(self.tracer.store, self.exp_name, self._checkpoints)

    @property
    def _checkpoints(self) -> list[int]:
        return self.model_ids or self.tracer.store.catalog.checkpoint_ids()

    def _described(self) -> dict[str, Any]:
        """Return estimator, target and, for estimators with a kernel, λ and its rule, for a report."""
        estimate = Estimate(self.estimators.scores, self.target, self.regularization)
        shown: dict[str, Any] = {"estimator": estimate.estimator, "target": estimate.target}
        if not estimate.is_regularized:
            return shown
        if self.regularization != "auto":
            return {**shown, "regularization": f"{float(self.regularization):.4g}, given"}
        if not estimate.is_newton_step:
            return shown
        found = self.tracer.regularization(estimate.estimator, self.model_ids)
        return {**shown, "regularization": f"{found.value:.4g}, rule {found.rule}"}

    def report(
        self,
        directory: str | os.PathLike[str],
        inputs: Any = None,
        labels: Any = None,
        class_names: Sequence[str] | Mapping[int, str] | None = None,
        *,
        target_inputs: Any = None,
        target_labels: Any = None,
        k: int = 8,
        all_scores: bool = True,
        figures: bool = True,
        title: str = "Influence report",
        **options: Unpack[ReportOptions],
    ) -> Path:
        """Write an HTML page of the findings, and its data files.

        Scores are those of ``estimators.top``. Labels, losses, ids and settings come from the store by default.

        Args:
            directory: The directory of the files, which is created if it does not exist.
            inputs: The training examples' inputs as images, vectors, texts, records or a DataFrame. Default: the texts
                of a language model's store; other inputs are not shown.
            labels: The training examples' labels. Default: those of the store.
            class_names: The name of each class index, in a list or in a mapping such as ``id2label``. Default: the
                index.
            target_inputs: The targets' inputs, likewise.
            target_labels: The targets' labels. Default: those of the store.
            k: The number of proponents and opponents shown for each target.
            all_scores: Include what needs all scores: their distribution, averages, classes and the estimate of wrong
                labels. Missing scores are computed and stored, 4 bytes for each training example and target.
            figures: Whether to write PNG files, which needs matplotlib. Default: True.
            title: The page's title.
            **options: The fields of `tracer.report.ReportOptions`.

        Returns:
            The path of ``index.html``.
        """
        k = min(check_count(k, "k"), self.tracer.train_set_size)
        facts = StoreFacts.of(self.tracer.store, self.exp_name, self.model_ids)
        shown = self.by("top")
        ranking = {"self-influence": self.estimators.self_influence}
        known = {**shown._described(), **ranking, **facts.settings}
        options["settings"] = {**known, **(options.get("settings") or {})}
        options = cast(ReportOptions, {**facts.defaults(labels, target_labels), **options})
        if facts.losses is not None:
            options["rankings"] = {"mean loss": facts.losses, **(options.get("rankings") or {})}
            options.setdefault("order_by", "mean loss")
        if "warnings" not in options:
            options["warnings"] = self.warnings()
        if all_scores and options.get("train_probabilities") is None and "health" not in options:
            options["health"] = self.label_health()
        return write_report(
            directory,
            self_influence=self.by("self_influence").self_influence(),
            proponents=shown.top(k, "proponents"),
            opponents=shown.top(k, "opponents"),
            scores=shown.scores if all_scores else None,
            train_inputs=_texts(self.sources[0]) if inputs is None else inputs,
            target_inputs=_texts(self.sources[1]) if target_inputs is None else target_inputs,
            train_labels=labels_or(facts.train_labels, labels, target_labels),
            target_labels=labels_or(facts.target_labels, target_labels, labels),
            class_names=class_names,
            figures=figures,
            title=title,
            **options,
        )


def _texts(source: DataSource | None) -> list[str] | None:
    """Return the texts of examples, if they are known without asking the user."""
    return None if source is None else source.texts(np.arange(len(source)))


@takes_settings(AttributeOptions)
def attribute(
    model: nn.Module,
    task: Any,
    train: Any,
    targets: Any | None,
    checkpoints: str | os.PathLike[str] | Iterable[Checkpoint | tuple[Checkpoint, float]],
    *,
    save_dir: str | os.PathLike[str],
    batch_size: int = 64,
    collate_fn: Callable[[list], Batch] | None = None,
    exp_name: str = "targets",
    estimator: str | None = None,
    ids: Any = None,
    target_ids: Any = None,
    **options: Unpack[AttributeOptions],
) -> Attribution:
    """Attribute a model's behavior on targets to training examples, over the checkpoints of its training.

    With ``projector="none"``, the default of ``storage`` is ``"none"`` (exact scores, without storing gradients), or
    ``"float32"`` for estimators that need features; with ``source``, that of ``shared_projection`` is True. Call it
    again with the same ``save_dir`` and it resumes. Under torchrun, with ``torch.distributed`` initialized, all
    processes call it and share the work.

    Args:
        model: The model; it is not changed.
        task: As for `Tracer`.
        train: The training examples: a map-style data set, also one of `datasets`; a tuple of tensors, arrays or
            tables such as DataFrames, ``(inputs, labels)``, or a table with a column of labels; or a `DataLoader`, list
            or other iterable that yields the same batches or examples each time.
        targets: The examples to explain, in one of the same forms; None: none yet.
        checkpoints: State dicts or paths, each alone or as ``(checkpoint, learning rate)``; with ``preconditioner=``,
            training checkpoints. An iterator's are loaded one at a time. A path alone may be a folder of checkpoints,
            a recording or a glob.
        save_dir: The directory or URL of the store, which is created if it does not exist.
        batch_size: The batch size, for data sets, tensors and single examples; halved if memory does not suffice.
            Default: 64.
        collate_fn: Makes a batch of a data set's examples; or a tokenizer, which pads them. Default: that of
            `DataLoader`.
        exp_name: The name of the targets in the store.
        estimator: One of `Tracer.finalize_scores` for all questions. ``auto``: scores predict what training without
            examples would change, by the estimator that does so best on such a store, and ``cosine`` ranks
            proponents. Default: scores by ``tracin``, what this run's steps did, and proponents by ``cosine``.
        ids: The id of each training example, only once each: texts, integers or paths, which are stored and shown with
            the indices; or the name of a column or attribute of ``train``. Default: the index of a DataFrame, if it
            does not just count.
        target_ids: The id of each target, in the same forms.
        **options: The settings.

    Returns:
        The attribution.

    Raises:
        InputError: If there are no checkpoints or examples, a loader shuffles, ids do not name each example once, or
            the model is sharded by ``fully_shard``.
        MismatchError: If an example has another id in the store.
        InputTypeError: If the data or the checkpoints have an invalid type.

    >>> import tempfile
    >>> import torch
    >>> model, x, y = nn.Linear(3, 2), torch.randn(6, 3), torch.tensor([0, 1, 0, 1, 0, 1])
    >>> checkpoints = [(model.state_dict(), 0.1)]
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     found = attribute(model, "image_classification", (x, y), (x[:2], y[:2]), checkpoints, save_dir=folder)
    ...     found.scores.shape
    (6, 2)
    """
    target, regularization = options.pop("target", None), options.pop("regularization", "auto")
    estimate = Estimate({None: "tracin", "auto": "influence"}.get(estimator) or str(estimator), target, regularization)
    plain_model = check_model(model)
    if fsdp_modules(model):
        raise InputError(
            "model is sharded by fully_shard, and attribute passes all examples in one process; make a Tracer on each "
            "rank and pass its own examples by inds=, or pass the plain model."
        )
    pairs = checkpoint_pairs(checkpoints)
    if isinstance(pairs, list):
        check_distinct([checkpoint for checkpoint, _ in pairs])
        for checkpoint, _ in pairs:
            check_headers(plain_model, checkpoint, options.get("checkpoint_key"))
    size = check_count(batch_size, "batch_size")
    in_order = bool(options.get("check_rows", True))
    tasks = make_task(task), make_task(options.get("target_task") or task, "target_task")
    forms = [InputForm.of(plain_model, each) for each in tasks]
    train_rows = as_data_source(train, "train", size, collate_fn, in_order, forms[0])
    explained = NoExamples() if targets is None else targets
    target_rows = as_data_source(explained, "targets", size, collate_fn, in_order, forms[1])
    names = {
        None: find_ids(ids, train, len(train_rows)),
        exp_name: find_ids(target_ids, targets, len(target_rows), "target_ids"),
    }
    options["storage"] = chosen_storage(options, estimator).name
    if estimate.is_unrolled and not options.setdefault("shared_projection", True):
        raise InputError("expected shared_projection=True with estimator='source', got False; leave it out.")
    feature_settings(options, "attribute")  # names the caller in its errors
    tracer = Tracer(model, task, len(train_rows), save_dir, **cast(FeatureOptions, options))
    if not tracer.store.manifest.feature_storage.stores_features and not len(target_rows):
        raise InputError("storage='none' keeps no gradients, so it expects targets; pass some, or another storage.")
    for name, found_ids in names.items():
        if found_ids:
            tracer.store.ids(name).add(range(len(found_ids)), found_ids)
            tracer.store.ids(name).flush()
    manifest = tracer.store.manifest
    estimators = Estimators.of(estimator, manifest)
    if estimator == "auto":
        logger.info("estimator='auto': %s, since %s", estimators, estimators.reason)
    fits_kernel = Estimate(estimators.scores).sees_all_outputs and not manifest.feature_storage.is_binary
    chosen = Passes(tracer, train_rows, target_rows, exp_name, fits_kernel).run(pairs)
    found = Attribution(tracer, exp_name, estimator, chosen, target, regularization, (train_rows, target_rows))
    if tracer.process.count == 1:
        for sentence in found.warnings():
            logger.warning("%s", sentence)
    return found

"""`TRAKer`: the interface of TRAK's package on a `Tracer`, so that code written for it runs with the import changed."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tracer._core.validation import check_choice
from tracer.api.tracer import Tracer
from tracer.data.indices import ExampleIndices
from tracer.data.named_tasks import TASK_NAMES
from tracer.errors import InputError
from tracer.types import Batch, Checkpoint

_PROJECTORS = {
    "NoOpProjector": "none",
    "BasicSingleBlockProjector": "rademacher",
    "BasicProjector": "rademacher",
    "CudaProjector": "fast_jl",
    "ChunkedCudaProjector": "fast_jl",
}
"""The names of ours by the classes of TRAK's."""

_REPLACED = {
    "gradient_computer": "gradients come from layer rules, and from torch.func where these do not apply",
    "saver": "features and scores are in a zarr store, for which save_dir may also be a URL",
    "score_computer": "scores are computed block by block; lambda_reg is the regularization",
}
_TASKS = {"clip": "CLIPModelOutput", "iterative_image_classification": "IterativeImageClassificationModelOutput"}


@dataclass(eq=False, repr=False)  # the model's own is long
class TRAKer:
    """TRAK's class of this name (Park et al. 2023), with its arguments in its order, on a `Tracer`.

    Scores are those of ``estimator="trak"``. They are TRAK's up to the projection and a constant: TRAK's package
    divides the inverse of a checkpoint's kernel by the mean of its absolute values, which the paper does not.

    Attributes:
        model: The model.
        task: A name, as in `Tracer`, or an ``AbstractModelOutput`` of TRAK's package or of your own.
        train_set_size: The number of training examples ``N``.
        save_dir: The directory of the store. Default: ``./trak_results``.
        load_from_save_dir: Of no effect: a store that exists is opened, by any number of jobs at once.
        device: The device to compute on. Default: that of the model; TRAK's is ``cuda``.
        gradient_computer: Refused unless None.
        projector: The name of a projector, as in `Tracer`. Default: ``sketch``.
        saver: Refused unless None.
        score_computer: Refused unless None.
        proj_dim: The number of values stored of a gradient. Default: 2048.
        logging_level: The level of the logger ``tracer``. Default: unchanged.
        use_half_precision: Store features in float16, else in float32. Default: True.
        proj_max_batch_size: Of no effect: projections choose the size of their blocks.
        projector_seed: The seed of the projection. Default: 0.
        grad_wrt: Names of parameters. Default: all trainable ones.
        lambda_reg: λ of TRAK, whose gradients are divided by the square root of the number of parameters and projected
            without ``1/sqrt(proj_dim)``. Default: 0, which stands for the λ that is chosen from the training.

    Raises:
        InputError: If an argument has no counterpart; the message says what to do.
    """

    model: nn.Module
    task: Any
    train_set_size: int
    save_dir: str | os.PathLike[str] = "./trak_results"
    load_from_save_dir: bool = True
    device: str | torch.device | None = None
    gradient_computer: Any = None
    projector: Any = None
    saver: Any = None
    score_computer: Any = None
    proj_dim: int = 2048
    logging_level: int | None = None
    use_half_precision: bool = True
    proj_max_batch_size: int = 32
    projector_seed: int = 0
    grad_wrt: Iterable[str] | None = None
    lambda_reg: float = 0.0

    def __post_init__(self) -> None:
        for name, instead in _REPLACED.items():
            if getattr(self, name) is not None:
                raise InputError(f"{name} has no counterpart: {instead}. Leave {name} out.")
        if isinstance(self.task, str) and self.task in _TASKS:
            raise InputError(
                f"task={self.task!r} is no name here; pass an instance of TRAK's class, trak.modelout_functions."
                f"{_TASKS[self.task]}, or one of {', '.join(TASK_NAMES)}."
            )
        if self.logging_level is not None:
            logging.getLogger("tracer").setLevel(self.logging_level)
        self._tracer = Tracer(
            self.model,
            self.task,
            self.train_set_size,
            self.save_dir,
            self.proj_dim,
            projector=_projector_name(self.projector),
            storage="float16" if self.use_half_precision else "float32",
            device=self.device,
            seed=self.projector_seed,
            params=None if self.grad_wrt is None else list(self.grad_wrt),
        )

    @property
    def tracer(self) -> Tracer:
        """The `Tracer`, for everything that TRAK's class has not: `Tracer.top`, other estimators, remote stores."""
        return self._tracer

    def load_checkpoint(
        self, checkpoint: Checkpoint, model_id: int, _allow_featurizing_already_registered: bool = False
    ) -> None:
        """Select the checkpoint for `featurize`; see `Tracer.load_checkpoint`.

        Args:
            checkpoint: A state dict, or the path of a file with one.
            model_id: The checkpoint's number, 0 or more.
        """
        self._tracer.load_checkpoint(checkpoint, model_id)

    def featurize(self, batch: Batch, inds: ExampleIndices | None = None, num_samples: int | None = None) -> None:
        """Compute and store the features of a batch of training examples; see `Tracer.featurize`.

        Args:
            batch: The batch; a tuple ``(input_ids, token_type_ids, attention_mask, labels)`` is bound by these names.
            inds: The indices of its examples in the training set, ``[B]``; or
            num_samples: the number of examples ``B``, counted on from the batch before.
        """
        self._tracer.featurize(batch, inds, num_samples)

    def finalize_features(self, model_ids: Iterable[int] | None = None, del_grads: bool = False) -> None:
        """Check that every training example is stored, and allow scoring; see `Tracer.finalize_features`.

        Args:
            model_ids: The checkpoints. Default: all in the store.
            del_grads: Of no effect: features are stored once.
        """
        self._tracer.finalize_features(None if model_ids is None else list(model_ids))

    def start_scoring_checkpoint(self, exp_name: str, checkpoint: Checkpoint, model_id: int, num_targets: int) -> None:
        """Select the checkpoint and the targets for `score`; see `Tracer.start_scoring_checkpoint`.

        Args:
            exp_name: The name of this set of targets.
            checkpoint: The checkpoint that was featurized under ``model_id``.
            model_id: Its number.
            num_targets: The number of targets ``M``.
        """
        self._tracer.start_scoring_checkpoint(checkpoint, model_id, num_targets, exp_name)

    def score(self, batch: Batch, inds: ExampleIndices | None = None, num_samples: int | None = None) -> None:
        """Compute and store the features of a batch of targets; see `Tracer.score`.

        Args:
            batch: The batch.
            inds: The indices of its examples among the targets, ``[B]``; or
            num_samples: the number of examples ``B``, counted on from the batch before.
        """
        self._tracer.score(batch, inds, num_samples)

    def finalize_scores(self, exp_name: str, model_ids: Iterable[int] | None = None, allow_skip: bool = False) -> Any:
        """Compute TRAK scores of all training examples for all targets; see `Tracer.finalize_scores`.

        Args:
            exp_name: The name of the targets.
            model_ids: The checkpoints. Default: all in the store.
            allow_skip: Leave out checkpoints at which no target was scored. Default: False, an error.

        Returns:
            ``[N, M]``, float32, read-only; positive scores are proponents.
        """
        ids = None if model_ids is None else list(model_ids)
        if allow_skip:
            self._tracer.flush()
            catalog = self._tracer.store.catalog
            check_choice("exp_name", exp_name, catalog.exp_names())
            scored = catalog.target_ids(exp_name)
            ids = scored if ids is None else [each for each in ids if each in scored]
        regularization = self.lambda_reg * self._kernel_scale() if self.lambda_reg else "auto"
        return self._tracer.finalize_scores(exp_name, "trak", ids, regularization=regularization)

    def _kernel_scale(self) -> float:
        """Return by what TRAK's kernel is smaller than ours, whose products estimate those of whole gradients."""
        manifest = self._tracer.store.manifest
        signs = 1 if manifest.settings["projector"]["kind"] == "none" else manifest.feature_dim  # of projections
        return sum(math.prod(shape) for shape in manifest.settings["params"].values()) / signs


def _projector_name(projector: Any) -> str:
    """Return the name of a projector, or raise `InputError` for an object or a class."""
    if projector is None or isinstance(projector, str):
        return projector or "sketch"
    name = getattr(projector, "__name__", type(projector).__name__)
    ours = f"projector={_PROJECTORS[name]!r} for the same" if name in _PROJECTORS else "register_projector for your own"
    raise InputError(
        f"projector is {name}; expected the name of a projector. Leave it out for the default, whose features are as "
        f"good and cheaper, or use {ours}."
    )

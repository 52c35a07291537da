"""The settings of a `Tracer`: one place that defines, validates, documents and serializes them.

`FeatureSettings` is the definition. From its fields come the typed signatures of `Tracer` and `attribute`
(`FeatureOptions` names them for type checkers and editors; a test holds both equal), the ``Args`` of their docstrings,
entries of the store's manifest, and the flags of the command line.
"""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields
from typing import Any, TypedDict, TypeVar

import torch

from tracer._core.processes import ProcessChoice
from tracer._core.validation import check_autocast, check_choice, check_count, check_flag, check_positive, check_seed
from tracer.errors import InputError, InputTypeError, nearest_name
from tracer.gradients import METHODS, ParamSelection
from tracer.gradients.preconditioning import CURVATURE_VERSION, KRONECKER, PRECONDITIONERS, check_preconditioner
from tracer.projection import projector_kinds
from tracer.scoring.estimators import KERNELS, Estimate
from tracer.store.feature_storage import STORAGES, FeatureStorage
from tracer.store.manifest import Manifest

NORMS = ("exact", "projected")
"""The choices of ``norms=``."""

Signed = TypeVar("Signed", bound=Callable[..., Any])


def _setting(default: Any, text: str, choices: tuple[str, ...] = ()) -> Any:
    return field(default=default, metadata={"help": text, "choices": choices})


@dataclass(frozen=True)
class FeatureSettings:
    """The settings of the features of an example: which gradients are computed, how they are projected and stored.

    Each field's metadata has ``help``, its documentation, and ``choices`` if its values can be listed.

    Raises:
        InputError: If a setting is unknown or out of range.
        InputTypeError: If it has an invalid type.

    >>> FeatureSettings(storage="int8").proj_dim
    4096
    """

    proj_dim: int = _setting(
        4096,
        "The number of values ``k`` stored of an example's gradient; inner products have a relative RMS error of about "
        "``1/sqrt(k)``. Ignored by ``projector='none'``.",
    )
    projector: str = _setting(
        "sketch",
        "``sketch``, ``none`` (exact gradients), ``rademacher``, ``gaussian``, ``factored`` or ``fast_jl``.",
        ("sketch", "none", "rademacher", "gaussian", "factored", "fast_jl"),
    )
    target_task: Any = _setting(
        None,
        "The task of targets, if it is another one than ``task``: in any of its forms. Positive scores lower what it "
        "gives, so return the negative of what should grow. None: ``task``.",
    )
    gradients: str = _setting(
        "auto",
        "``auto`` (layer rules, and ``torch.func`` as the fallback), ``capture`` (no fallback) or ``functional`` "
        "(``torch.func`` only).",
        METHODS,
    )
    params: ParamSelection = _setting(
        None,
        "Name patterns of parameters, or a function ``(name, parameter) -> bool``; None: all trainable ones.",
    )
    storage: str = _setting(
        "float16",
        "``float16`` or ``int8`` (relative to a float32 scale per row), ``float32``, ``binary`` (the signs of training "
        "examples' features, eight to a byte, for ``tracin`` and ``cosine`` with a large ``proj_dim``), or, with "
        "``projector='none'``, ``none``: only losses, derivatives and norms are stored, and scores come from "
        "`score_exactly`.",
        STORAGES,
    )
    norms: str = _setting(
        "exact",
        "``exact``, or ``projected``: the norm of an example's gradient, which ``cosine`` and self-influence use, is "
        "that of its projection. It errs by about ``1/sqrt(2k)``, with ``factored`` several times as much, and costs "
        "nothing; the cost of exact norms grows with the square of the number of tokens.",
        NORMS,
    )
    device: str | torch.device | None = _setting(None, "The device to compute on; None: that of the model.")
    seed: int = _setting(0, "The seed of the projection.")
    shared_projection: bool = _setting(
        False,
        "Use one projection at all checkpoints, as ``estimator='source'`` needs; its errors do not average out over "
        "checkpoints, as those of independent ones do. Of no effect with ``projector='none'``.",
    )
    resume: bool = _setting(True, "Open an existing store in ``save_dir``; with False it is an error.")
    check_rows: bool = _setting(
        True, "Recognize examples by a fingerprint of their inputs, so that a shuffled loader is an error."
    )
    autocast: str | torch.dtype | None = _setting(
        None,
        "``bfloat16`` or ``float16``: run forwards and backwards under ``torch.autocast``, like mixed-precision "
        "training; None: in the model's own dtypes.",
        ("bfloat16", "float16"),
    )
    preconditioner: str | None = _setting(
        None,
        "``adam``: inner products of gradients are those of Adam's steps, ``<g / (sqrt(v̂) + eps), g'>`` (as in "
        "LESS, Xia et al. 2024), or of Adafactor's; checkpoints then hold the optimizer's state dict too. ``kfac`` and "
        "``ekfac``: those of influence functions, ``<(F + λ)^-1 g, g'>`` with the Kronecker-factored Fisher "
        "information F of Martens & Grosse (2015), for ``ekfac`` with corrected eigenvalues (George et al. 2018); see "
        "`Tracer.fit_curvature`. None: plain inner products, as for SGD.",
        PRECONDITIONERS,
    )
    damping: float | None = _setting(
        None,
        "λ of ``kfac`` and ``ekfac``, as a multiple of the mean eigenvalue of each parameter's F; None: 0.03 for "
        "``kfac``, 0.1 for ``ekfac``.",
    )
    curvature_examples: int | None = _setting(
        None,
        "The number of training examples that F is computed from, spread evenly; None: a quarter, at least 256 and at "
        "most 16,384.",
    )
    curvature_samples: int = _setting(
        1, "The number of labels that are drawn from the model's predictions for each of these examples and positions."
    )
    checkpoint_key: str | None = _setting(
        None,
        "The key of the model's state dict in checkpoints that hold several that fit, or the prefix of its names, "
        "such as ``ema`` or ``state_dict.net``; None: the single one that fits the model.",
    )
    memory_bytes: int = _setting(
        1 << 30, "The approximate memory of scoring; for `score_exactly`, more memory means fewer passes over the data."
    )
    process: ProcessChoice = _setting(
        None,
        "The number of this process and the number of processes that share the work and the store, for example "
        "``(0, 4)``; ``'slurm'`` in a job array; None: from ``torch.distributed`` if it is initialized, else alone.",
    )
    progress: bool | None = _setting(None, "Show progress bars; None: on a terminal only.")

    def __post_init__(self) -> None:
        for name in ("shared_projection", "resume", "check_rows"):
            check_flag(getattr(self, name), name)
        if self.progress is not None:
            check_flag(self.progress, "progress")
        check_choice("gradients", self.gradients, METHODS)
        check_choice("projector", self.projector, projector_kinds())
        FeatureStorage(self.storage).check_projector(self.projector, self.proj_dim)
        check_choice("norms", self.norms, NORMS)
        if self.norms == "projected" and self.projector == "none":
            raise InputError(
                "norms='projected' needs a projection, got projector='none', which computes exact gradients"
            )
        check_seed(self.seed)
        check_autocast(self.autocast)
        check_preconditioner(self.preconditioner)
        if self.damping is not None:
            check_positive(self.damping, "damping")
        check_count(self.curvature_samples, "curvature_samples")
        if self.curvature_examples is not None:
            check_count(self.curvature_examples, "curvature_examples")
        check_count(self.memory_bytes, "memory_bytes")

    @property
    def chosen_damping(self) -> float:
        """``damping``, or the preconditioner's default."""
        if self.damping is None:
            return 0.1 if self.preconditioner == "ekfac" else 0.03
        return float(self.damping)

    def manifest_entries(self) -> dict[str, Any]:
        """Return the settings that a store compares, apart from those that model, task and projector decide."""
        entries = {"storage": self.storage, "check_rows": bool(self.check_rows)}
        if self.preconditioner is not None:
            entries["preconditioner"] = self.preconditioner
        if self.norms != "exact":
            entries["norms"] = self.norms
        if self.shared_projection and self.projector != "none":
            entries["shared_projection"] = True
        if self.preconditioner in KRONECKER:
            entries |= {"damping": self.chosen_damping, "curvature_version": CURVATURE_VERSION}
            entries |= {name: getattr(self, name) for name in ("curvature_examples", "curvature_samples")}
        return entries


class FeatureOptions(TypedDict, total=False):
    """The fields of `FeatureSettings` as keyword arguments, apart from ``proj_dim``."""

    projector: str
    target_task: Any
    gradients: str
    params: ParamSelection
    storage: str
    norms: str
    device: str | torch.device | None
    seed: int
    shared_projection: bool
    resume: bool
    check_rows: bool
    autocast: str | torch.dtype | None
    preconditioner: str | None
    damping: float | None
    curvature_examples: int | None
    curvature_samples: int
    checkpoint_key: str | None
    memory_bytes: int
    process: ProcessChoice
    progress: bool | None


class AttributeOptions(FeatureOptions, total=False):
    """Those of `attribute`, with ``proj_dim`` and two fields of `Estimate`."""

    proj_dim: int
    target: str | None
    regularization: float | str


class CollectorOptions(TypedDict, total=False):
    """Those of `GradientCollector`: of features that are sums over steps of a training."""

    proj_dim: int
    projector: str
    target_task: Any
    params: ParamSelection
    storage: str
    device: str | torch.device | None
    seed: int
    shared_projection: bool
    autocast: str | torch.dtype | None
    preconditioner: str | None
    memory_bytes: int


def feature_settings(options: Mapping[str, Any], caller: str) -> FeatureSettings:
    """Return the settings from a caller's keyword arguments, or raise InputTypeError naming the nearest known one."""
    known = [each.name for each in fields(FeatureSettings)]
    for name in options:
        if name not in known:
            raise InputTypeError(
                f"{caller}() got an unexpected keyword argument {name!r}; {nearest_name(name, known)}."
            )
    return FeatureSettings(**options)


def stored_settings(manifest: Manifest) -> dict[str, Any]:
    """Return the keyword arguments of `Tracer` with which a store was made, as its manifest has them."""
    settings = manifest.settings
    projector, task, params = (dict(settings.get(name) or {}) for name in ("projector", "task", "params"))
    found = {name: settings[name] for name in FeatureOptions.__annotations__ if name in settings and name != "params"}
    found |= {name: projector[key] for name, key in _OF_PROJECTOR.items() if key in projector}
    if task.get("autocast") is not None:
        found["autocast"] = task["autocast"]
    return {**found, "params": lambda name, _: name in params}


_OF_PROJECTOR = {"projector": "kind", "proj_dim": "proj_dim", "seed": "seed"}


def chosen_storage(options: Mapping[str, Any], estimator: str | None) -> FeatureStorage:
    """Return the storage of `attribute` with these options; by default exact gradients are stored only if needed."""
    default = FeatureStorage.default(options.get("projector", FeatureSettings.projector), estimator in KERNELS)
    return FeatureStorage(options.get("storage", default))


def takes_settings(options: type) -> Callable[[Signed], Signed]:
    """Return a decorator that puts settings into the signature of a class or function, and into its docstring.

    Args:
        options: The settings: `FeatureOptions` or `AttributeOptions`. They replace ``**options:`` in the docstring.
    """
    known = {each.name: each for each in (*fields(Estimate), *fields(FeatureSettings))}

    def decorate(target: Signed) -> Signed:
        function: Any = target.__init__ if inspect.isclass(target) else target
        signature = inspect.signature(function)
        given = [each for each in signature.parameters.values() if each.kind is not inspect.Parameter.VAR_KEYWORD]
        hints: dict[str, Any] = dict(options.__annotations__)
        own = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=known[name].default, annotation=hints[name])
            for name in hints
        ]
        function.__signature__ = signature.replace(parameters=[*given, *own])
        if inspect.isclass(target):  # sphinx reads a class's own signature
            target.__signature__ = signature.replace(parameters=[*given[1:], *own])  # type: ignore[attr-defined]
        target.__doc__ = _with_documentation(target.__doc__ or "", [known[name] for name in hints])
        return target

    return decorate


def _with_documentation(text: str, settings: Sequence[Field]) -> str:
    lines = []
    for line in text.split("\n"):
        if not line.lstrip().startswith("**options:"):
            lines.append(line)
            continue
        indent = line[: len(line) - len(line.lstrip())]
        for each in settings:
            lines += textwrap.wrap(_documented(each), 120, initial_indent=indent, subsequent_indent=indent + "    ")
    return "\n".join(lines)


def _documented(setting: Field) -> str:
    default = "" if setting.default is None else f" Default: {setting.default}."
    return f"{setting.name}: {setting.metadata['help']}{default}"

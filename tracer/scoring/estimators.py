"""Estimators: their settings, and the weight that each one gives to the features of an example.

Layout: train features ``[n, k]``, target features ``[m, k]``, scores ``[n, m]`` (train by target). A positive score
marks a proponent: training on that example lowered the target's loss. With C checkpoints:

- ``tracin``: ``sum_c lr_c Q_c(z) Q_c(z') <phi_c(z), phi_c(z')>`` (TracInCP; Pruthi et al. 2020, section 3.3);
- ``cosine``: the same with every loss gradient divided by its exact norm, which leaves the signs of Q and divides by
  the norms of the output gradients; a zero gradient has cosine zero with everything;
- ``trak``: ``mean_c[phi_c(z')ᵀ (Phi_cᵀ Phi_c + λI)⁻¹ phi_c(z)] · mean_c[-Q_c(z)]`` (Park et al. 2023, section 3);
- ``influence``: the same with the Gauss-Newton kernel ``Phi_cᵀ diag(mean_c w_c) Phi_c``: a Newton step of the whole
  training loss (Koh & Liang 2017, eq. 2, for a model that is linear in its features);
- ``relatif``: ``influence`` over the square root of the training example's self-influence, its effect on its own loss
  (ℓ-RelatIF; Barshan et al. 2020, eq. 14); ``relatif_theta``: over the root mean square of how far the example's step
  moves the parameters, ``|mean_c Q_c(z)| ‖(K_c + λI)⁻¹ phi_c(z)‖`` (θ-RelatIF, eq. 10);
- ``source``: the unrolled steps of one run, segment by segment (Bae et al. 2024; see `tracer.scoring.source`);
- ``trackstar``: ``mean_c`` of the cosines of loss gradients whitened by the mean second moments of training examples
  and targets (Chang et al. 2024; see `tracer.scoring.trackstar`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float, Float64

from tracer._core.validation import check_choice, shown
from tracer.errors import InputError, InputTypeError

ESTIMATORS = ("tracin", "cosine", "influence", "trak", "source", "relatif", "relatif_theta", "trackstar")
"""The values of ``estimator=``."""

KERNELS = {
    "trak": "plain",
    **dict.fromkeys(("influence", "source", "relatif", "relatif_theta"), "loss_hess"),
    "trackstar": "second_moment",
}
"""The weights of training examples in an estimator's kernel: 1, the loss's second derivative ∂²L/∂f², or Q²."""

TARGETS = ("loss", "output")
"""The values of ``target=``."""


@dataclass(frozen=True)
class Estimate:
    """The settings of an estimator.

    Each field's metadata has ``help``, a sentence, and ``choices`` if its values can be listed. Signatures, command
    line flags and documentation are made from these.

    Attributes:
        estimator: ``"tracin"``, ``"cosine"``, ``"trak"``, ``"influence"``, ``"relatif"``, ``"relatif_theta"``,
            ``"trackstar"`` or ``"source"``. Default: ``"tracin"``.
        target: Explain the target's ``"loss"``, or its ``"output"``: f, in the direction in which the loss falls. That
            has the same sign, and it does not vanish if the model fits the target. None: the loss for ``tracin``,
            ``cosine`` and ``trackstar`` (for cosines both are the same), else the output.
        regularization: λ of the kernel of ``trak`` and ``influence``, in units of ``Σ w ‖φ‖²``, 0 or more; or
            ``"auto"``, which chooses it from what training has done. For ``trackstar`` δ, in units of the mean
            eigenvalue of its second moments, of which ``"auto"`` takes a tenth.
        groups: The group of each target, ``[M]``, integers from 0 on, -1 for none; for example ``[0, 0, 1]``. Scores
            are then those of the sum over each group, ``[N, G]``. Or ``"label"``: the targets' classes.

    Raises:
        InputError: A value is not known or out of range.
        InputTypeError: A value has the wrong type.
    """

    estimator: str = field(
        default="tracin", metadata={"help": "Method by which influence is estimated.", "choices": ESTIMATORS}
    )
    target: str | None = field(
        default=None,
        metadata={
            "help": "Explain the target's loss or its output. Default: output for influence, trak, relatif and source, "
            "else loss.",
            "choices": TARGETS,
        },
    )
    regularization: float | str = field(
        default="auto", metadata={"help": "Lambda of influence and trak: a number of 0 or more, or auto."}
    )
    groups: Any = field(
        default=None, metadata={"help": "The group of each target, or label; scores are those of sums over groups."}
    )

    def __post_init__(self) -> None:
        """Check the settings and complete them."""
        check_choice("estimator", self.estimator, ESTIMATORS)
        if self.target is None:
            object.__setattr__(self, "target", "loss" if self.kernel is None or self.is_cosine else "output")
        check_choice("target", self.target, TARGETS)
        if self.regularization != "auto":
            object.__setattr__(self, "regularization", _checked_regularization(self.regularization))
            if not self.is_regularized:
                raise InputError(
                    f"got regularization={self.regularization} with estimator={self.estimator!r}, which has no kernel "
                    f"to regularize; pass estimator='trak' or 'influence', or leave regularization out."
                )
        object.__setattr__(self, "groups", _checked_groups(self.groups))

    @property
    def kernel(self) -> str | None:
        """The weights of training examples in the estimator's kernel, a value of `KERNELS`; None without a kernel."""
        return KERNELS.get(self.estimator)

    @property
    def is_regularized(self) -> bool:
        """Whether the estimator has a regularization."""
        return self.kernel is not None and not self.is_unrolled

    @property
    def is_newton_step(self) -> bool:
        """Whether the estimator is a Newton step of the mean gradient over checkpoints, with a regularization λ."""
        return self.is_regularized and not self.is_cosine

    @property
    def is_cosine(self) -> bool:
        """Whether scores are cosines, in which only the signs of Q are left."""
        return self.estimator in ("cosine", "trackstar")

    @property
    def is_unrolled(self) -> bool:
        """Whether the estimator follows a run from checkpoint to checkpoint."""
        return self.estimator == "source"

    @property
    def sees_all_outputs(self) -> bool:
        """Whether the kernel is the Gauss-Newton matrix in all outputs of the model; see `Tracer.fit_kernel`."""
        return self.kernel == "loss_hess" and not self.is_unrolled

    @property
    def is_relative(self) -> bool:
        """Whether scores are divided by the size of the training example's own effect."""
        return self.estimator.startswith("relatif")

    @property
    def transforms_targets(self) -> bool:
        """Whether target features are preconditioned or summed over groups before they are multiplied."""
        return self.kernel is not None or self.groups is not None

    @property
    def name(self) -> str:
        """The name under which results are stored; variants have names of their own and do not replace each other."""
        usual = self.is_cosine or (self.target == "output") == (self.kernel is not None)
        return self.estimator + ("" if usual else f"-{self.target}") + ("" if self.groups is None else "-groups")

    def train_weights(
        self, loss_grad: Float[np.ndarray, " N"], gradient_norm: Float[np.ndarray, " N"]
    ) -> Float64[np.ndarray, " N"]:
        """Return the factor of each training example's features, from Q and the exact norm of the gradient of f.

        It is Q (with a λ its mean over checkpoints); for ``cosine`` the sign of Q over the norm, and for ``relatif``
        and ``relatif_theta`` that over the size of the example's effect, which is passed in place of the norm, for
        ``trackstar`` over the norm of the whitened gradient.

        >>> Estimate("cosine").train_weights(np.array([-0.5, 2.0]), np.array([4.0, 0.0])).tolist()
        [-0.25, 0.0]
        """
        loss_grad, gradient_norm = np.asarray(loss_grad, np.float64), np.asarray(gradient_norm, np.float64)
        if not self.is_cosine and not self.is_relative:
            return loss_grad
        return np.divide(np.sign(loss_grad), gradient_norm, out=np.zeros_like(loss_grad), where=gradient_norm > 0)

    def target_weights(
        self, loss_grad: Float[np.ndarray, " M"], gradient_norm: Float[np.ndarray, " M"]
    ) -> Float64[np.ndarray, " M"]:
        """Return the factor of each target's features: as for training examples, or only the sign of Q for outputs.

        >>> Estimate("trak").target_weights(np.array([-0.0, 2.0]), np.ones(2)).tolist()
        [-1.0, 1.0]
        """
        if self.is_cosine:
            return self.train_weights(loss_grad, gradient_norm)
        if self.target == "loss":
            return np.asarray(loss_grad, np.float64)
        # copysign, since a Q that has rounded to zero keeps its sign in floating point and sign() would lose it
        return np.copysign(1.0, np.asarray(loss_grad, np.float64))


def _checked_regularization(value: Any) -> float:
    expected = "expected a finite number of 0 or more, or 'auto'"
    if isinstance(value, (bool, str)) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise InputTypeError(f"regularization is {value!r}; {expected}.")
    if not 0 <= value < np.inf:
        raise InputError(f"regularization is {value}; {expected}.")
    return float(value)


def _checked_groups(groups: Any) -> Any:
    if groups is None or (isinstance(groups, str) and groups == "label"):
        return groups
    try:
        found = np.asarray(groups)
    except ValueError:  # lists of different lengths
        found = np.empty(0, object)
    if found.ndim != 1 or found.dtype.kind not in "iu":
        raise InputTypeError(
            f"groups is {shown(groups)}; expected the group of each target, integers from 0 on (-1: none), or 'label'."
        )
    if not len(found) or found.min() < -1 or found.max() < 0:
        raise InputError(f"groups is {shown(groups)}; expected integers from 0 on, or -1 for targets without a group.")
    return found.astype(np.int64)


def self_influence(
    loss_grad: Float[np.ndarray, " N"], gradient_norm: Float[np.ndarray, " N"]
) -> Float64[np.ndarray, " N"]:
    """Return each example's influence on itself at one checkpoint, ``Q² ‖∇f‖²``, from exact norms."""
    return np.square(np.asarray(loss_grad, np.float64) * np.asarray(gradient_norm, np.float64))

"""The interface of projectors: linear maps from the per-parameter gradients of a sample to ``dim`` numbers.

A projector is keyed by parameter name and seed: its numbers for a parameter do not depend on the batch, the process,
the machine or the device. It gets factors (`tracer.gradients.per_sample`) and need not build gradients.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from tracer._core.validation import check_count, check_seed
from tracer.errors import InputError, nearest_name
from tracer.gradients.per_sample import PerSampleGradient
from tracer.types import Projection


class Projector(ABC):
    """A linear map P of a sample's gradient with ``E[PᵀP] = I`` over seeds, so that inner products are unbiased.

    Subclass it to add a projection of your own: set `kind` and `version`, implement `add`, and pass the class to
    `tracer.projection.register_projector`. It is built as ``cls(shapes, proj_dim, seed, device)``.

    Args:
        shapes: The shape of each parameter by name, in the model's order; at least one.
        proj_dim: The number of values wanted for a training example or target; positive.
        seed: The seed of all random numbers, from 0 to 2**64 - 1.
        device: The device of the gradients, for projectors that run on some devices only; the numbers do not depend on
            it. Default: any.

    Attributes:
        kind: The name users pass as ``projector=``.
        version: Raised whenever the numbers change for the same seed; recorded in the store.
        dim: The number of values stored for an example; ``proj_dim`` unless the subclass sets another.
        shapes: The shape of each parameter by name, in the model's order.
        adds_norms: Whether squared norms are wanted. A projector may leave them out if they are not, to save time.

    Raises:
        InputError: If ``shapes`` is empty, or ``proj_dim`` or the seed is out of range.
        InputTypeError: If ``proj_dim`` or the seed is no integer.
    """

    kind: ClassVar[str]
    version: ClassVar[int] = 1
    dim: int
    adds_norms: bool = True

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        proj_dim: int,
        seed: int,
        device: torch.device | str | None = None,
    ) -> None:
        if not shapes:
            raise InputError("shapes is empty: a projector needs at least one parameter; check `params=`")
        self.shapes = {name: tuple(shape) for name, shape in shapes.items()}
        self.proj_dim = check_count(proj_dim, "proj_dim")
        if not hasattr(type(self), "dim"):  # a subclass may have it as a class attribute or a property
            self.dim = self.proj_dim
        self.seed = check_seed(seed)
        self._prepare(device)

    def _prepare(self, device: torch.device | str | None) -> None:  # noqa: B027
        """Make what `add` needs; set `dim` here if it is not ``proj_dim``."""

    @abstractmethod
    def add(self, name: str, gradient: PerSampleGradient, features: Tensor, squared_norm: Tensor) -> None:
        """Add one parameter's share to the features, and its exact squared norm, both in place.

        Args:
            name: The parameter's name, a key of `shapes`.
            gradient: Its per-sample gradient, of ``B`` samples.
            features: ``[B, dim]``, where P's share of this parameter is added.
            squared_norm: ``[B]``, float64, where the squared norm of this parameter's gradient is added.
        """

    def project(self, gradients: Mapping[str, PerSampleGradient]) -> Projection:
        """Project the gradients of ``B`` samples; a missing parameter has gradient zero.

        Args:
            gradients: The per-sample gradient of each parameter; at least one.

        Returns:
            The features ``[B, dim]``, float64 if any gradient is float64 and else float32, and the exact squared norms
            ``[B]``.

        Raises:
            InputError: If there are none, a name is unknown, or shapes, batch sizes or devices do not fit.
        """
        dtype, num_rows, device = self._check(gradients)
        running = self.start(
            Projection(
                torch.zeros(num_rows, self.dim, dtype=dtype, device=device),
                torch.zeros(num_rows, dtype=torch.float64, device=device),
            )
        )
        running.add(gradients)
        return running.finish()

    def start(self, into: Projection) -> RunningProjection:
        """Start a projection of gradients that arrive parameter by parameter, as in a backward.

        Args:
            into: Features ``[B, dim]``, float32 or float64, and squared norms ``[B]``, float64, that shares are added
                to.

        Returns:
            The running projection.
        """
        return RunningProjection(self, into)

    def _check(self, gradients: Mapping[str, PerSampleGradient]) -> tuple[torch.dtype, int, torch.device]:
        """Check gradients against the shapes and each other; return the dtype of features, ``B`` and the device."""
        if not gradients:
            raise InputError("no gradients to project: pass the per-sample gradient of at least one parameter")
        first_name, first = next(iter(gradients.items()))
        for name, gradient in gradients.items():
            if name not in self.shapes:
                raise InputError(f"this projector has no parameter {name!r}: {nearest_name(name, self.shapes)}")
            if tuple(gradient.shape) != self.shapes[name]:
                raise InputError(
                    f"parameter {name!r} has shape {self.shapes[name]}, its gradients are of shape "
                    f"{tuple(gradient.shape)}; build the projector from this model's shapes"
                )
            if gradient.batch_size != first.batch_size or gradient.device != first.device:
                raise InputError(
                    f"gradients must be of the same samples on one device: {first_name!r} has {first.batch_size} on "
                    f"{first.device}, {name!r} has {gradient.batch_size} on {gradient.device}"
                )
        double = any(gradient.dtype == torch.float64 for gradient in gradients.values())
        return torch.float64 if double else torch.float32, first.batch_size, first.device

    def settings(self) -> dict[str, Any]:
        """Return everything that decides the numbers as JSON values, which the store records and compares."""
        return {"kind": self.kind, "version": self.version, "proj_dim": self.proj_dim, "seed": self.seed}


class RunningProjection:
    """A projection that gradients of some parameters and samples are added to.

    Args:
        projector: The projector.
        into: Features ``[B, dim]`` and squared norms ``[B]``, updated in place.
    """

    def __init__(self, projector: Projector, into: Projection) -> None:
        self.projector, self.result = projector, into

    def add(self, gradients: Mapping[str, PerSampleGradient], start: int = 0, stop: int | None = None) -> None:
        """Add gradients of samples ``start`` to ``stop``. Default: all.

        Args:
            gradients: The per-sample gradient of each parameter; at least one. Add each parameter of a sample once.
            start: The first sample.
            stop: One past the last sample.

        Raises:
            InputError: If there are none, a name is unknown, or shapes, numbers of samples or devices do not fit.
        """
        stop = len(self.result.features) if stop is None else stop
        dtype, num_rows, device = self.projector._check(gradients)
        features, squared_norm = self.result.features[start:stop], self.result.squared_norm[start:stop]
        if num_rows != len(features):
            raise InputError(f"gradients of {num_rows} samples came for samples {start} to {stop}")
        # Under autocast the matrix products here would silently run in half precision.
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            if (dtype, device) == (features.dtype, features.device):
                for name, gradient in gradients.items():
                    self._add(name, gradient, start, stop, features, squared_norm)
            else:  # float64 gradients, or a model that lies on several devices
                apart = Projection(
                    torch.zeros(features.shape, dtype=dtype, device=device),
                    torch.zeros(num_rows, dtype=torch.float64, device=device),
                )
                running = self.projector.start(apart)
                running.add(gradients)
                running.finish()
                features += apart.features.to(features)
                squared_norm += apart.squared_norm.to(squared_norm)

    def _add(
        self, name: str, gradient: PerSampleGradient, start: int, stop: int, features: Tensor, squared_norm: Tensor
    ) -> None:
        """Add one parameter; a projector that treats several together overrides it."""
        self.projector.add(name, gradient, features, squared_norm)

    def finish(self) -> Projection:
        """Return the finished projection."""
        return self.result

"""What every projector is: a linear map from the per-parameter gradients of a sample to ``dim`` numbers.

A projector is keyed by parameter name and seed: the numbers it gives for a parameter do not depend on the batch, the
process, the machine or the device. It sees factors (`tracer.gradients.per_sample`) and need not build gradients.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from tracer._core.random_streams import check_seed, whole_number
from tracer.errors import InputError, nearest_name
from tracer.gradients.per_sample import PerSampleGradient
from tracer.types import Projection


class Projector(ABC):
    """A linear map P of a sample's gradient with ``E[PᵀP] = I`` over seeds: inner products keep their value.

    Subclass it to add a projection of your own: set `kind` and `version`, set `dim` in ``__init__`` and implement
    `add`; then `tracer.projection.register_projector`. It is built as ``cls(shapes, proj_dim, seed, device)``.

    Args:
        shapes: The shape of each parameter by name, in the model's order; at least one.
        proj_dim: The number of values wanted for a row; positive.
        seed: Decides all random numbers, from 0 to 2**64 - 1.
        device: Where gradients will come from, for projectors that run on some devices only; the numbers do not
            depend on it.

    Attributes:
        kind: The name users pass as ``projector=``.
        version: Raised whenever the numbers change for the same seed; recorded in the store.
        dim: The number of values stored for a row.
        shapes: The shape of each parameter by name, in the model's order.

    Raises:
        InputError: If ``shapes`` is empty, ``proj_dim`` is not a positive integer or the seed cannot be used.
    """

    kind: ClassVar[str]
    version: ClassVar[int] = 1
    dim: int

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        proj_dim: int,
        seed: int,
        device: torch.device | str | None = None,
    ) -> None:
        if not shapes:
            raise InputError("shapes is empty: a projector needs at least one parameter; check `params=`")
        number = whole_number(proj_dim)
        if number is None or number < 1:
            raise InputError(f"proj_dim must be a positive integer, got {proj_dim!r}; pass for example proj_dim=4096")
        self.shapes = {name: tuple(shape) for name, shape in shapes.items()}
        self.proj_dim = number
        self.seed = check_seed(seed)

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
        """Project the gradients of ``B`` samples; a parameter that is not there has gradient zero.

        Args:
            gradients: The per-sample gradient of each parameter; at least one.

        Returns:
            The features ``[B, dim]``, float64 if any gradient is float64 and else float32, and the exact squared norms
            ``[B]``.
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
        """Start projecting gradients that come piece by piece, as a backward gives them.

        Args:
            into: Features ``[B, dim]``, float32 or float64, and squared norms ``[B]``, float64, to which is added.

        Returns:
            What takes the pieces.
        """
        return RunningProjection(self, into)

    def _check(self, gradients: Mapping[str, PerSampleGradient]) -> tuple[torch.dtype, int, torch.device]:
        """Check the gradients against the shapes and each other.

        Args:
            gradients: The per-sample gradient of each parameter; at least one.

        Returns:
            The dtype of features, float64 if any gradient is float64 and else float32; ``B``; and the device.

        Raises:
            InputError: If there are none, a name is unknown, or shapes, batch sizes or devices do not fit.
        """
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
        """Return what decides the numbers, as plain JSON values: the store records it and compares it."""
        return {"kind": self.kind, "version": self.version, "proj_dim": self.proj_dim, "seed": self.seed}


class RunningProjection:
    """A projection to which the gradients of some parameters and samples are added at a time.

    Args:
        projector: The projector.
        into: Features ``[B, dim]`` and squared norms ``[B]``, to which is added.
    """

    def __init__(self, projector: Projector, into: Projection) -> None:
        self.projector, self.result = projector, into

    def add(self, gradients: Mapping[str, PerSampleGradient], start: int = 0, stop: int | None = None) -> None:
        """Add gradients of samples ``start`` to ``stop``, by default of all.

        Args:
            gradients: The per-sample gradient of each parameter; at least one, and each parameter of a sample once.
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
        """Add one parameter; a projector that joins parameters overrides it.

        Args:
            name: The parameter.
            gradient: Its gradient of samples ``start`` to ``stop``.
            start: The first sample.
            stop: One past the last sample.
            features: These samples' features, a view.
            squared_norm: Their squared norms, a view.
        """
        self.projector.add(name, gradient, features, squared_norm)

    def finish(self) -> Projection:
        """Return the projection of all that was added; nothing may be added after it."""
        return self.result

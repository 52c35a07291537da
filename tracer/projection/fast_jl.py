"""Dense random signs on CUDA through the optional package fast_jl (the projection kernel of TRAK, Park et al. 2023).

Properties of the kernel, and what this module does about them:

- it multiplies by signs +-1 without a scale: results are divided by ``sqrt(k)``;
- it rounds its inputs to half precision and sums in float32: each gradient is first scaled by a power of two to a
  largest entry of about 2**12, so that nothing overflows, and entries are good to 2**-11 of themselves down to 2**-26
  of the largest. Features are linear up to this rounding;
- its signs depend on how entries are cut into feature tiles, the argument that TRAK sets to the number of
  multiprocessors: it is fixed here, so that all devices give the same numbers;
- it launches on the default stream of the current device, while its own sums run on torch's current stream: the call
  is made with the default stream current;
- it has variants for 8, 16 and 32 samples at once, whose signs are the same: one is used, the self-test compares two.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tracer._core.blocks import row_blocks
from tracer._core.random_streams import Stream
from tracer.errors import InputError, MissingDependencyError
from tracer.gradients import norms
from tracer.gradients.per_sample import PerSampleGradient
from tracer.projection.base import Projector

NUM_FEATURE_TILES = 128
"""Passed as ``num_sms``; part of what decides the signs."""

VARIANT = 16
"""Samples at once; the variant for 32 needs more registers than some devices have."""

BLOCK_ENTRIES = 1 << 22
"""Entries of a parameter that one call projects; part of what decides the signs."""

MULTIPLE = 512
"""The kernel writes this many values a thread block."""

_HINT = "install it with `pip install tracin[fast]` where the CUDA toolkit is, or use projector='sketch'"


class FastJLProjector(Projector):
    """Dense projection with signs over ``sqrt(k)``, computed by fast_jl on a CUDA device.

    The kernel is tested on construction: linearity, inner products, and agreement between batches and variants.

    Raises:
        InputError: If ``proj_dim`` is not a multiple of 512.
        MissingDependencyError: If the device is not CUDA, or fast_jl is not installed or fails its test.
    """

    kind = "fast_jl"

    def _prepare(self, device: torch.device | str | None) -> None:
        if self.dim % MULTIPLE:
            below = max(1, self.dim // MULTIPLE) * MULTIPLE
            raise InputError(
                f"projector='fast_jl' needs proj_dim to be a multiple of 512, got {self.dim}; pass {below}"
            )
        check_device(device)
        try:
            self._module = importlib.import_module("fast_jl")
        except ImportError as error:
            raise MissingDependencyError(f"projector='fast_jl' needs the package fast_jl: {_HINT}") from error
        self._test(torch.device(device or "cuda"))

    def add(self, name: str, gradient: PerSampleGradient, features: Tensor, squared_norm: Tensor) -> None:
        """Add the projected gradients to ``features [B, k]`` and their exact squared norms, in place."""
        for index, first in enumerate(range(0, gradient.numel, BLOCK_ENTRIES)):
            last = min(first + BLOCK_ENTRIES, gradient.numel)
            seed = Stream(self.seed, self.version, self.kind, name, index).below(1 << 32)
            for start, stop in row_blocks(gradient.batch_size, 4 * (last - first), 256 << 20):
                entries = gradient.entries(start, stop, first, last)
                squared_norm[start:stop] += norms.row_squares(entries)
                features[start:stop] += self._multiply(entries, seed)

    def settings(self) -> dict[str, Any]:
        """Return everything that decides the numbers, including how the kernel is called."""
        return super().settings() | {"num_sms": NUM_FEATURE_TILES, "variant": VARIANT, "block_entries": BLOCK_ENTRIES}

    def _multiply(self, rows: Tensor, seed: int, variant: int = VARIANT) -> Tensor:
        """Multiply rows ``[b, n]`` by a matrix of signs over ``sqrt(k)``: ``[b, k]``."""
        exponent = torch.frexp(rows.abs().amax(1, keepdim=True)).exponent.clamp(-100, 100)
        scaled = torch.ldexp(rows, 12 - exponent).float().contiguous()
        function = getattr(self._module, f"project_rademacher_{variant}")
        with _on_default_stream(rows.device):
            signed = function(scaled, self.dim, seed, NUM_FEATURE_TILES)
        if signed.is_cuda:
            signed.record_stream(torch.cuda.current_stream(signed.device))
        return torch.ldexp(signed.to(rows.dtype), exponent - 12) * self.dim**-0.5

    def _test(self, device: torch.device) -> None:
        """Raise `MissingDependencyError` if a known projection is off by more than chance and half precision."""
        num_rows, num_entries = 2 * VARIANT + 1, 3001
        stream = Stream(0, 1, self.kind, "self-test")
        rows = torch.from_numpy(stream.gaussians(num_rows * num_entries)).reshape(num_rows, num_entries).to(device)
        rows[0] = rows[1] - 2.0 * rows[2]
        rows[3] *= 1e6
        try:
            whole = self._multiply(rows, 1)
            alone = torch.cat([self._multiply(rows[i : i + 1], 1) for i in range(num_rows)])
            other = self._multiply(rows[:8], 1, variant=8)
        except Exception as error:
            raise MissingDependencyError(f"fast_jl is installed but fails on {device}: {error}; {_HINT}") from error
        lengths = rows.norm(dim=1)
        cosines = (rows / lengths[:, None]) @ (rows / lengths[:, None]).T
        projected = whole / lengths[:, None]
        largest = (projected @ projected.T - cosines).abs().max().item()
        # Standard error at most sqrt(2 / k); 561 pairs exceed 7 of them with probability below 1e-8.
        found = {
            "inner products": (largest, 7 * (2 / self.dim) ** 0.5),
            "linearity": (_relative(whole[0], whole[1] - 2.0 * whole[2]), 0.01),
            "rows alone against rows together": (_relative(alone, whole), 1e-3),
            "8 rows at once against 16": (_relative(other, whole[:8]), 1e-3),
        }
        for what, (error_size, limit) in found.items():
            if not error_size <= limit:
                raise MissingDependencyError(
                    f"fast_jl fails its self-test on {device}: {what} differ by {error_size:.3g}, expected at most "
                    f"{limit:.3g}; reinstall it for this device (`pip install --no-cache-dir tracin[fast]`) or use "
                    "projector='sketch'"
                )


def check_device(device: torch.device | str | None) -> None:
    """Refuse devices that fast_jl cannot run on.

    Args:
        device: Where gradients come from.

    Raises:
        MissingDependencyError: If it is not a CUDA device.
    """
    if device is None or torch.device(device).type != "cuda":
        raise MissingDependencyError(
            f"projector='fast_jl' runs on CUDA devices only, got device={str(device)!r}; pass device='cuda' or use "
            f"projector='rademacher' (on a CUDA device: {_HINT})"
        )


def _relative(found: Tensor, expected: Tensor) -> float:
    """Return ``|found - expected| / |expected|`` in the worst row."""
    return ((found - expected).norm(dim=-1) / expected.norm(dim=-1)).max().item()


@contextlib.contextmanager
def _on_default_stream(device: torch.device) -> Iterator[None]:
    """Run on the default stream of ``device``, after what is queued on the current one and before what follows."""
    if device.type != "cuda":
        yield
        return
    with torch.cuda.device(device):
        current, default = torch.cuda.current_stream(), torch.cuda.default_stream()
        default.wait_stream(current)
        with torch.cuda.stream(default):
            yield
        current.wait_stream(default)

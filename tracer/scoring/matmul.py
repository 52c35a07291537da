"""Matrix products of stored features with stored features, block by block, in memory that is used again.

Layout: train features ``[n, k]`` and target features ``[m, k]`` as stored (float32, float16 or int8), products
``[n, m]`` float32 of stored values: the caller applies scales and weights.
"""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float32, Shaped
from torch import Tensor

BLOCK_BYTES = 8 << 20
"""The most bytes of a block of converted train features: it stays in a processor's last cache beside the products."""

_INT8_COLUMNS = 1 << 17
"""Sums of products of int8 values over this many columns stay below 2**31: 127 * 127 * 2**17 < 2**31."""

_PAD_ROWS, _PAD = 32, 16
"""int8 products on CUDA need more than 16 rows, and other sizes that are a multiple of 8 (of 16 is faster)."""

_FEW_TARGETS = 3
"""Up to so many targets, products with one vector at a time are faster on a CPU."""

logger = logging.getLogger("tracer")


@dataclass(frozen=True)
class MemoryPlan:
    """Sizes that keep scoring within its memory."""

    rows: int  # of train features that are converted at once
    columns: int  # of these
    targets: int  # that are multiplied at once
    resident_bytes: int  # of converted targets that stay in memory
    tile_bytes: int  # of a tile of scores, of which two are held

    @classmethod
    def of(cls, memory_bytes: int, dim: int, num_targets: int) -> MemoryPlan:
        """Return sizes for about ``memory_bytes``, independent of the number of training examples.

        >>> MemoryPlan.of(1 << 30, 4096, 1000).rows
        512
        """
        block = max(1 << 12, min(BLOCK_BYTES, memory_bytes // 16))
        rows = min(max(block // (4 * dim), 64), 2048)
        columns = max(1, min(dim, block // (4 * rows)))
        targets = min(block // (4 * rows), max(1, memory_bytes // 8 // (4 * columns)), num_targets)
        return cls(rows, columns, max(targets, 1), memory_bytes // 2, memory_bytes // 16)


class Multiplier:
    """Multiplies stored train features with target features of the same storage dtype, in blocks of a plan's sizes."""

    def __init__(self, plan: MemoryPlan, device: torch.device, storage: str) -> None:
        self.plan, self.device, self.storage = plan, device, storage
        # int8 features are multiplied without conversion, with exact sums in int32, if that is fast and correct
        self.integer = storage == "int8" and has_int8_units(device) and int8_products_are_exact(device)
        self._memory: dict[tuple[str, torch.dtype], Tensor] = {}

    def target_bytes(self, num_targets: int, dim: int) -> int:
        """Return the size of converted targets."""
        return num_targets * dim * (1 if self.integer else 4)

    def convert(self, raw: Shaped[np.ndarray, "m k"]) -> Shaped[Tensor, "m k"]:
        """Return a copy of target features on the device: int8 for integer products, else float32."""
        dtype = torch.int8 if self.integer else torch.float32
        return _shared_tensor(raw).to(self.device, dtype, copy=True)

    def multiply(
        self, train: Shaped[np.ndarray, "n k"], target: Shaped[Tensor, "m k"] | Shaped[np.ndarray, "m k"]
    ) -> Float32[Tensor, "n m"]:
        """Return all products of a block, in memory that the next call overwrites; targets from `convert` or stored."""
        products = self._reused("products", torch.float32, len(train), len(target))
        step = self.plan.columns
        for first in range(0, train.shape[1], step):
            columns = slice(first, first + step)
            right = target[:, columns]
            if not isinstance(right, Tensor):
                right = self._converted("right", right)
            if self.integer:
                self._add_integers(products, train[:, columns], right, first == 0)
            else:
                left = self._converted("left", train[:, columns])
                torch.addmm(products, left, right.T, beta=float(first > 0), out=products)
        return products

    def _converted(self, name: str, raw: Shaped[np.ndarray, "n k"]) -> Shaped[Tensor, "n k"]:
        """Return features on the device, float32 (or int8 for integer products), in reused memory."""
        rows = _shared_tensor(raw)
        dtype = torch.int8 if self.integer else torch.float32
        if rows.dtype == dtype and self.device.type == "cpu":
            return rows
        return self._reused(name, dtype, *rows.shape).copy_(rows.to(self.device))

    def _add_integers(
        self, products: Float32[Tensor, "n m"], train: Shaped[np.ndarray, "n k"], target: Tensor, overwrite: bool
    ) -> None:
        """Add integer products; ``overwrite`` begins with them."""
        for first in range(0, train.shape[1], _INT8_COLUMNS):
            columns = slice(first, first + _INT8_COLUMNS)
            left, right = _shared_tensor(train[:, columns]).to(self.device), target[:, columns]
            if self.device.type == "cpu" and len(right) <= _FEW_TARGETS:
                for place in range(len(right)):
                    product = torch._int_mm(left.contiguous(), right[place : place + 1].T)[:, 0]
                    if overwrite and first == 0:
                        products[:, place].copy_(product)
                    else:
                        products[:, place] += product
                continue
            found = torch._int_mm(self._padded("left", left, _PAD_ROWS), self._padded("right", right, 1).T)
            found = found[: len(left), : len(right)]
            if overwrite and first == 0:
                products.copy_(found)
            else:
                products += found

    def _padded(self, name: str, rows: Tensor, min_rows: int) -> Tensor:
        """Return features padded with zeros to a shape that every device takes."""
        shape = max(_round_up(len(rows)), min_rows), _round_up(rows.shape[1])
        if rows.shape == shape and rows.is_contiguous():
            return rows
        memory = self._reused(f"{name} padded", torch.int8, *shape).zero_()
        memory[: len(rows), : rows.shape[1]] = rows
        return memory

    def _reused(self, name: str, dtype: torch.dtype, *shape: int) -> Tensor:
        size = shape[0] * shape[1]
        known = self._memory.get((name, dtype))
        if known is None or known.numel() < size:  # new memory is slow: each of its pages faults when first touched
            known = self._memory[name, dtype] = torch.empty(size, dtype=dtype, device=self.device)
        return known[:size].view(shape)


def _shared_tensor(raw: np.ndarray) -> Tensor:
    """Return a tensor that shares an array's memory, also if the array is read-only; do not write to it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(raw)


def _round_up(size: int) -> int:
    return -(-size // _PAD) * _PAD


def has_int8_units(device: torch.device) -> bool:
    """Tell whether a device multiplies int8 faster than float32: VNNI or AMX, or CUDA compute capability 7.5."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (7, 5)
    if device.type != "cpu":
        return False
    checks = (getattr(torch.cpu, name, None) for name in ("_is_vnni_supported", "_is_amx_tile_supported"))
    return any(check is not None and check() for check in checks)


@lru_cache(maxsize=8)
def int8_products_are_exact(device: torch.device) -> bool:
    """Compare integer products of extreme and random values with numpy's; log a line if they differ or fail."""
    # some instructions add pairs of products in 16 bits and saturate: 2 * 127 * 127 fits, 2 * 255 * 127 does not
    rng = np.random.default_rng(0)
    left, right = (rng.integers(-127, 128, (rows, 1040)).astype(np.int8) for rows in (48, 32))
    for rows in (left, right):
        rows[:8:2], rows[1:8:2] = 127, -127
        rows[8:16, ::2] = 127
        rows[8:12, 1::2] = -127
        rows[16:24] = rng.choice([-127, 0, 127], (8, 1040))
    expected = left.astype(np.int64) @ right.astype(np.int64).T
    try:
        one, other = (torch.from_numpy(each).to(device) for each in (left, right))
        exact = np.array_equal(torch._int_mm(one, other.T).cpu().numpy(), expected)
        if device.type == "cpu":  # a single vector takes another path
            single = [torch._int_mm(one, other[place : place + 1].T) for place in range(len(other))]
            exact = exact and np.array_equal(torch.cat(single, 1).numpy(), expected)
    except (RuntimeError, NotImplementedError, AttributeError) as error:
        logger.info("int8 features are converted to float32: integer products fail on %s (%s)", device, error)
        return False
    if not exact:
        logger.info("int8 features are converted to float32: integer products on %s are not exact", device)
    return exact

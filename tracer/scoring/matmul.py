"""Products of stored rows with stored rows, converted block by block in memory that is used again.

Layout: train rows ``[n, k]`` and target rows ``[m, k]`` as they are stored (float32, float16 or int8), products
``[n, m]`` float32, in stored units: scales and weights are the caller's.

A block of train rows is converted to float32 and multiplied while it is in the cache. On processors and GPUs that
multiply int8 fast, int8 rows are multiplied as they are, with exact sums in int32, after a test that they do it right.
"""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

BLOCK_BYTES = 8 << 20
"""The most bytes of converted train rows: what a processor's last cache holds beside the products."""

_INT8_COLUMNS = 1 << 17
"""Over so many columns a sum of products of int8 values stays below 2**31: 127 * 127 * 2**17 < 2**31."""

_PAD_ROWS, _PAD = 32, 16
"""What int8 products on CUDA ask for: more than 16 rows, other sizes a multiple of 8 (16 is faster)."""

logger = logging.getLogger("tracer")


@dataclass(frozen=True)
class Plan:
    """Sizes that keep scoring within its memory.

    Attributes:
        rows: How many train rows are converted at once.
        columns: How many of their values.
        targets: How many target rows are multiplied at once.
        resident_bytes: How much of converted targets may stay.
        band_bytes: How much of scores may be held, twice.
    """

    rows: int
    columns: int
    targets: int
    resident_bytes: int
    band_bytes: int

    @classmethod
    def of(cls, memory_bytes: int, dim: int, num_targets: int) -> Plan:
        """Return the sizes.

        Args:
            memory_bytes: How much may be held, about.
            dim: The values of a row.
            num_targets: The number of target rows.

        Returns:
            The plan; its sizes do not grow with the number of train rows.

        >>> Plan.of(1 << 30, 4096, 1000).rows
        512
        """
        block = max(1 << 12, min(BLOCK_BYTES, memory_bytes // 16))
        rows = min(max(block // (4 * dim), 64), 2048)
        columns = max(1, min(dim, block // (4 * rows)))
        targets = min(block // (4 * rows), max(1, memory_bytes // 8 // (4 * columns)), num_targets)
        return cls(rows, columns, max(targets, 1), memory_bytes // 2, memory_bytes // 16)


def as_tensor(raw: np.ndarray) -> Tensor:
    """Return rows as a tensor without copying them; it is only to be read."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(raw)


class Multiplier:
    """Multiplies train rows with target rows.

    Args:
        plan: The sizes of blocks.
        device: Where to multiply.
        storage: The dtype of both sides: ``"float32"``, ``"float16"`` or ``"int8"``.

    Attributes:
        integer: Whether int8 rows are multiplied as they are.
    """

    def __init__(self, plan: Plan, device: torch.device, storage: str) -> None:
        self.plan, self.device, self.storage = plan, device, storage
        self.integer = storage == "int8" and has_int8_units(device) and int8_products_are_exact(device)
        self._memory: dict[tuple[str, torch.dtype], Tensor] = {}

    def target_bytes(self, num_targets: int, dim: int) -> int:
        """Return the bytes of converted targets."""
        return num_targets * dim * (1 if self.integer else 4)

    def convert(self, raw: np.ndarray) -> Tensor:
        """Return target rows converted for good.

        Args:
            raw: ``[m, k]``, as stored.

        Returns:
            ``[m, k]``, on the device: int8 for integer products, else float32.
        """
        dtype = torch.int8 if self.integer else torch.float32
        return as_tensor(raw).to(self.device, dtype, copy=True)

    def multiply(self, train: np.ndarray, target: Tensor | np.ndarray) -> Tensor:
        """Return products of all pairs.

        Args:
            train: ``[n, k]``, as stored, of at most the plan's rows.
            target: ``[m, k]``, as `convert` gives it, or as stored; of at most the plan's targets.

        Returns:
            ``[n, m]``, float32, in memory that the next call overwrites.
        """
        products = self._take("products", torch.float32, len(train), len(target))
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

    def _converted(self, name: str, raw: np.ndarray) -> Tensor:
        """Return rows on the device, float32 (or int8 for integer products), in memory that is used again."""
        rows = as_tensor(raw)
        dtype = torch.int8 if self.integer else torch.float32
        if rows.dtype == dtype and self.device.type == "cpu":
            return rows
        return self._take(name, dtype, *rows.shape).copy_(rows.to(self.device))

    def _add_integers(self, products: Tensor, train: np.ndarray, target: Tensor, begin: bool) -> None:
        """Add products of int8 rows, or begin with them; sizes that the device does not take are padded."""
        for first in range(0, train.shape[1], _INT8_COLUMNS):
            columns = slice(first, first + _INT8_COLUMNS)
            left, right = as_tensor(train[:, columns]).to(self.device), target[:, columns]
            found = torch._int_mm(self._padded("left", left, _PAD_ROWS), self._padded("right", right, 1).T)
            found = found[: len(left), : len(right)]
            if begin and first == 0:
                products.copy_(found)
            else:
                products += found

    def _padded(self, name: str, rows: Tensor, least: int) -> Tensor:
        """Return rows followed by rows and columns of zeros to a size that every device takes."""
        shape = max(_up(len(rows)), least), _up(rows.shape[1])
        if rows.shape == shape and rows.is_contiguous():
            return rows
        memory = self._take(f"{name} padded", torch.int8, *shape).zero_()
        memory[: len(rows), : rows.shape[1]] = rows
        return memory

    def _take(self, name: str, dtype: torch.dtype, *shape: int) -> Tensor:
        """Return memory ``[n, m]``; new pages are slow, so it is kept."""
        size = shape[0] * shape[1]
        known = self._memory.get((name, dtype))
        if known is None or known.numel() < size:
            known = self._memory[name, dtype] = torch.empty(size, dtype=dtype, device=self.device)
        return known[:size].view(shape)


def _up(size: int) -> int:
    return -(-size // _PAD) * _PAD


def has_int8_units(device: torch.device) -> bool:
    """Tell whether a device multiplies int8 faster than float32: VNNI or AMX, or CUDA from 7.5 on."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (7, 5)
    if device.type != "cpu":
        return False
    checks = (getattr(torch.cpu, name, None) for name in ("_is_vnni_supported", "_is_amx_tile_supported"))
    return any(check is not None and check() for check in checks)


@lru_cache(maxsize=8)
def int8_products_are_exact(device: torch.device) -> bool:
    """Tell whether integer products on a device are right, also where partial sums are largest.

    Some instructions add pairs of products in 16 bits, where 2 * 127 * 127 fits and 2 * 255 * 127 does not.

    Args:
        device: The device.

    Returns:
        Whether products of extreme and of random values equal those of Python's integers; False, with a line in the
        log, means that rows are converted instead.
    """
    rng = np.random.default_rng(0)
    left, right = (rng.integers(-127, 128, (rows, 1040)).astype(np.int8) for rows in (48, 32))
    for rows in (left, right):
        rows[:8:2], rows[1:8:2] = 127, -127
        rows[8:16, ::2] = 127
        rows[8:12, 1::2] = -127
        rows[16:24] = rng.choice([-127, 0, 127], (8, 1040))
    expected = left.astype(np.int64) @ right.astype(np.int64).T
    try:
        found = torch._int_mm(torch.from_numpy(left).to(device), torch.from_numpy(right).to(device).T)
        right_ones = np.array_equal(found.cpu().numpy(), expected)
    except (RuntimeError, NotImplementedError, AttributeError) as error:
        logger.info("int8 rows are converted to float32: integer products fail on %s (%s)", device, error)
        return False
    if not right_ones:
        logger.info("int8 rows are converted to float32: integer products on %s are not exact", device)
    return right_ones

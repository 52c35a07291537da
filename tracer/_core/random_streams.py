"""Random numbers that are the same on every machine, device and version of torch and numpy.

They derive from `numpy.random.SeedSequence` and the raw 64-bit stream of `numpy.random.Philox`, which numpy keeps
stable for good; its distributions (``integers``, ``permutation``, ``normal``) may change between versions and are not
used. A stream is keyed by the seed, the projector's version, its purpose, the parameter's name and counters (tiles,
blocks), so a parameter's numbers depend on no other parameter and not on the order of calls.
"""

from __future__ import annotations

import hashlib

import numpy as np

_TWO_PI = 2.0 * np.pi


class Stream:
    """One stream of raw random words, keyed by a purpose, a parameter name and counters.

    Args:
        seed: The user's seed, below 2**64.
        version: The version of the projector's numbers.
        purpose: The use of the numbers, for example a projector's kind.
        name: The parameter's name.
        indices: Counters below 2**32 that distinguish tiles or blocks of one parameter.

    >>> Stream(0, 1, "sketch", "weight", 0, 0).words(1)
    array([1024477239257450320], dtype=uint64)
    """

    def __init__(self, seed: int, version: int, purpose: str, name: str, *indices: int) -> None:
        # Every entry takes a fixed number of 32-bit words: SeedSequence joins them without marking the borders.
        digest = hashlib.blake2b(f"{purpose}\0{name}".encode(), digest_size=16).digest()
        key = [seed & 0xFFFFFFFF, seed >> 32, version, *np.frombuffer(digest, dtype="<u4").tolist(), *indices]
        self._bits = np.random.Philox(np.random.SeedSequence(key))

    def words(self, count: int) -> np.ndarray:
        """Return the next ``count`` raw words: ``[count]``, uint64."""
        return self._bits.random_raw(count)

    def below(self, bound: int) -> int:
        """Return an integer uniform in ``[0, bound)``; the bias is below ``bound / 2**64``."""
        return (int(self.words(1)[0]) * bound) >> 64

    def permutation(self, count: int) -> np.ndarray:
        """Return a uniform permutation of ``range(count)``: ``[count]``, int64, the order of random words."""
        return np.argsort(self.words(count), kind="stable").astype(np.int64, copy=False)

    def packed_signs(self, count: int) -> np.ndarray:
        """Return ``count`` random bits, eight to a byte, lowest first: ``[8 * ceil(count / 64)]``, uint8."""
        return self.words(-(-count // 64)).astype("<u8", copy=False).view(np.uint8)

    def signs(self, count: int) -> np.ndarray:
        """Return ``count`` random signs: ``[count]``, float32, each 1 (bit 0) or -1 (bit 1)."""
        return unpack_signs(self.packed_signs(count), count)

    def gaussians(self, count: int) -> np.ndarray:
        """Return ``count`` standard normal numbers, Box & Muller's cosines before sines: ``[count]``, float32."""
        half = -(-count // 2)
        uniform = (self.words(2 * half) >> np.uint64(11)).astype(np.float64) * 2.0**-53
        radius = np.sqrt(-2.0 * np.log(uniform[:half] + 2.0**-54))
        angle = _TWO_PI * uniform[half:]
        normal = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])
        return normal[:count].astype(np.float32)


def unpack_signs(packed: np.ndarray, count: int) -> np.ndarray:
    """Return the first ``count`` signs of `Stream.packed_signs`: ``[count]``, float32, 1 or -1.

    >>> unpack_signs(np.array([0b00000101], dtype=np.uint8), 4)
    array([-1.,  1., -1.,  1.], dtype=float32)
    """
    bits = np.unpackbits(packed, count=count, bitorder="little")
    return np.subtract(1.0, 2.0 * bits, dtype=np.float32)

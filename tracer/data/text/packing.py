"""Documents cut into pieces, and pieces put into blocks, as TRL's ``pack_dataset`` does."""

from __future__ import annotations

import bisect
from collections import defaultdict, deque
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int64

GROUP = 1000
"""The documents that are packed together: the batch size of ``Dataset.map``, by which TRL packs."""

Piece = tuple[int, int, int]  # a document, and the first and last token of it, the last one excluded


def pack(
    lengths: Int64[np.ndarray, " n"], packing: str, max_length: int | None, keep_end: bool = False
) -> list[list[Piece]]:
    """Return the pieces of each block; without packing a block is one document, and may be empty.

    >>> pack(np.array([5, 2, 3, 1]), "bfd", 4)
    [[(0, 0, 4)], [(2, 0, 3), (3, 0, 1)], [(1, 0, 2)]]
    >>> pack(np.array([5, 2, 3, 1]), "bfd_split", 4)
    [[(0, 0, 4)], [(2, 0, 3), (0, 4, 5)], [(1, 0, 2), (3, 0, 1)]]
    >>> pack(np.array([5, 2, 3, 1]), "wrapped", 4)
    [[(0, 0, 4)], [(0, 4, 5), (1, 0, 2), (2, 0, 1)], [(2, 1, 3), (3, 0, 1)]]
    """
    sizes = lengths.tolist()
    if packing == "wrapped":
        assert max_length is not None
        return _wrapped(sizes, max_length)
    if packing == "bfd_split":
        assert max_length is not None
        starts = [(document, start) for document, size in enumerate(sizes) for start in range(0, size, max_length)]
        pieces = [(document, start, min(start + max_length, sizes[document])) for document, start in starts]
        return _best_fit(pieces, max_length)
    kept = [size if max_length is None else min(size, max_length) for size in sizes]
    if packing == "bfd":
        assert max_length is not None
        return _best_fit([(document, 0, size) for document, size in enumerate(kept) if size], max_length)
    cut = [size - some if keep_end else 0 for size, some in zip(sizes, kept, strict=True)]
    return [[(document, start, start + kept[document])] for document, start in enumerate(cut)]


def _wrapped(sizes: Sequence[int], block: int) -> list[list[Piece]]:
    found: list[list[Piece]] = []
    space = 0
    for document, size in enumerate(sizes):
        start = 0
        while start < size:
            if not space:
                found.append([])
                space = block
            stop = min(size, start + space)
            found[-1].append((document, start, stop))
            space -= stop - start
            start = stop
    return found


def _best_fit(pieces: Sequence[Piece], block: int) -> list[list[Piece]]:
    """Put each piece, longest first, into the block with the least space that suffices."""
    found: list[list[Piece]] = []
    by_space: dict[int, deque[list[Piece]]] = defaultdict(deque)
    spaces: list[int] = []  # of blocks, ascending, each once
    for piece in sorted(pieces, key=lambda each: each[1] - each[2]):
        size = piece[2] - piece[1]
        place = bisect.bisect_left(spaces, size)
        if place < len(spaces):
            space = spaces[place]
            chosen = by_space[space].popleft()
            if not by_space[space]:
                spaces.pop(place)
        else:
            space, chosen = block, []
            found.append(chosen)
        chosen.append(piece)
        if not by_space[space - size] and space > size:
            bisect.insort(spaces, space - size)
        by_space[space - size].append(chosen)
    return found

"""The hash of a tile: pinned, injective along rows and columns, and fair to every structure a gradient may have."""

import math

import pytest
import torch

from tracer._core.random_streams import Stream
from tracer.projection.sketch.hashing import RUN, column_ranges, make_tile, padded_stride, tile_ranges

CPU = torch.device("cpu")


def tile(rows, cols, k, seed=0, num_taps=1):
    stream = Stream(seed, 1, "sketch", "weight", 0, 0)
    return make_tile(stream, slice(0, rows), slice(0, cols // num_taps), slice(0, num_taps), num_taps, k, CPU)


def buckets(one, k):
    """Bucket of every entry of the tile in the matrix's own order: ``[o, i]``."""
    memory = (one.row_bucket(k)[:, None] + torch.arange(one.num_cols)) % k
    natural = torch.empty_like(memory)
    natural[one.matrix_rows[:, None], one.columns] = memory
    return natural


def test_tables_are_pinned():
    one = tile(5, 4, 8, seed=4)
    assert (one.offset, one.stride, one.group) == (7, 4, 2)
    assert one.row_order.indices.tolist() == [3, 4, 2, 0, 1]
    assert one.channel_order.indices.tolist() == [2, 0, 1, 3]
    assert one.row_sign.tolist() == [-1.0, 1.0, -1.0, 1.0, 1.0]
    assert one.col_sign.tolist() == [1.0, -1.0, 1.0, 1.0]


def test_tables_of_a_convolution_are_pinned():
    one = tile(3, 6, 8, seed=4, num_taps=3)
    assert (one.offset, one.stride, one.group) == (7, 7, 8)
    assert one.columns.tolist() == [0, 3, 1, 4, 2, 5]  # tap by tap, channels permuted


@pytest.mark.parametrize("k", [1, 2, 30, 210, 512, 1000, 4096, 999983])
def test_a_stride_holds_a_row_and_wastes_an_eighth_at_most(k):
    for cols in (1, 2, 3, 7, 27, 64, 256, 576, 768, k - 1, k):
        if 1 <= cols <= k:
            stride = padded_stride(cols, k)
            assert cols <= stride <= cols + max(1, cols // 8)
            assert math.gcd(stride, k) * (k // math.gcd(stride, k)) == k


def test_large_matrices_have_aligned_rows_that_move_in_runs():
    one = tile(512, 768, 4096)
    assert one.stride % 16 == 0
    assert one.row_order.run == RUN
    assert one.channel_order.run == 1
    assert one.group == 256


@pytest.mark.parametrize(("rows", "cols", "k"), [(8, 8, 8), (5, 7, 9), (30, 17, 30), (64, 3, 64), (2, 64, 64)])
def test_entries_of_one_row_or_column_never_collide(rows, cols, k):
    table = buckets(tile(rows, cols, k), k)
    assert all(len(set(row.tolist())) == cols for row in table)
    assert all(len(set(column.tolist())) == rows for column in table.T)


def test_a_tile_that_fits_has_no_collisions_and_no_permutation():
    one = tile(8, 8, 64)
    assert one.row_order is None
    assert one.channel_order is None
    assert len(set(buckets(one, 64).flatten().tolist())) == 64


def collision_ratios(energies, k, num_seeds):
    """Return the variance of ``<Sx, Sy>`` times ``k / (|x|² |y|²)`` for entries of these energies and random signs.

    That is ``k`` times the energy of colliding pairs; 1 for a fully random hash and much structure-free energy.
    """
    flat = torch.stack([energy.flatten() / energy.sum() for energy in energies], 1)
    total = torch.zeros(len(energies), dtype=torch.float64)
    for seed in range(num_seeds):
        table = buckets(tile(*energies[0].shape, k, seed), k).flatten()
        folded = torch.zeros(k, len(energies), dtype=torch.float64).index_add_(0, table, flat)
        total += k * (folded.square().sum(0) - flat.square().sum(0))
    return (total / num_seeds).tolist()


def structures(rows, cols, k):
    def hot(row_slice=slice(None), col_slice=slice(None)):
        energy = torch.zeros(rows, cols, dtype=torch.float64)
        energy[row_slice, col_slice] = 1.0
        return energy

    generator = torch.Generator().manual_seed(0)
    heavy = [torch.rand(size, generator=generator, dtype=torch.float64) ** -0.8 for size in (rows, cols)]
    return {
        "flat": hot(),
        "two rows that a plain lattice lays over each other": hot([0, min(rows - 1, k // cols - 1)]),
        "rows of period k / I": hot(slice(None, None, max(1, k // cols))),
        "two columns": hot(col_slice=[0, 2 * cols // 3]),
        "centre taps": hot(col_slice=slice(4, None, 9)),
        "columns of period k mod I": hot(col_slice=slice(None, None, max(2, k % cols))),
        "heavy tails": torch.outer(*heavy),
    }


@pytest.mark.parametrize(
    ("rows", "cols", "k"),
    [
        (256, 64, 4096),
        (64, 576, 4096),
        (64, 64, 1000),
        (128, 512, 1024),
        (256, 256, 256),
        (512, 48, 512),
        (512, 96, 1024),
    ],
)
def test_no_structure_collides_more_than_a_random_hash_does(rows, cols, k):
    energies = structures(rows, cols, k)
    # Two hot rows overlap rarely and then wholly: their mean needs many seeds.
    ratios = collision_ratios(list(energies.values()), k, 200)
    assert max(ratios) <= 1.15**2, dict(zip(energies, ratios, strict=True))


@pytest.mark.parametrize(("rows", "cols", "k"), [(64, 96, 1024), (33, 200, 210), (90, 90, 90), (16, 3, 17)])
def test_a_pair_of_entries_collides_with_probability_at_most_about_one_in_k(rows, cols, k):
    # Permutations make all pairs that differ in row and column alike, so counting the pairs of one tile is enough.
    counts = torch.bincount(buckets(tile(rows, cols, k), k).flatten(), minlength=k).double()
    pairs = rows * (rows - 1) * cols * (cols - 1)
    assert (counts * (counts - 1)).sum().item() / pairs * k <= 1.1


def test_every_tile_is_its_own_hash():
    ranges = slice(0, 9), slice(0, 9), slice(0, 1), 1
    one, other = (make_tile(Stream(0, 1, "sketch", "w", 0, c), *ranges, 16, CPU) for c in (0, 1))
    assert one.row_order.indices.tolist() != other.row_order.indices.tolist()


def test_ranges_cover_everything_once():
    assert [(r.start, r.stop) for r in tile_ranges(10, 4)] == [(0, 4), (4, 8), (8, 10)]
    for channels, taps, k in [(512, 9, 4096), (3, 9, 8), (40, 4, 16), (1, 1, 1), (5, 3, 1)]:
        seen = torch.zeros(channels, taps, dtype=torch.int64)
        for channel, tap in column_ranges(channels, taps, k):
            seen[channel, tap] += 1
            assert 1 <= seen[channel, tap].numel() <= k
        assert bool((seen == 1).all())

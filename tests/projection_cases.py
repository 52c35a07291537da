"""Per-sample gradients in every form, the explicit matrix of a projector, and measures of its error."""

import sys
import types

import pytest
import torch

from tracer.gradients.combined import SumGradient
from tracer.gradients.per_sample import DenseGradient, OuterGradient, PerSampleGradient, matrix_shape
from tracer.gradients.rows import RowsGradient
from tracer.projection import fast_jl


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


class OnlyDense(PerSampleGradient):
    """A user's gradient that can be built and has no other form."""

    def __init__(self, values):
        self.values = values
        self.shape, self.batch_size = tuple(values.shape[1:]), values.shape[0]

    device = property(lambda self: self.values.device)
    dtype = property(lambda self: self.values.dtype)

    def dense(self, start, stop):
        return self.values[start:stop].reshape(stop - start, -1)


def outer(shape, batch_size=5, positions=3, seed=0, dtype=torch.float64, positions_last=False):
    rows, cols = matrix_shape(shape)
    left = normal(batch_size, positions, rows, seed=seed, dtype=dtype)
    right = normal(batch_size, positions, cols, seed=seed + 1, dtype=dtype)
    if positions_last:  # as unfolded convolution inputs lie in memory
        left, right = (values.transpose(1, 2).contiguous().transpose(1, 2) for values in (left, right))
    return OuterGradient(left, right, shape)


def embedding(shape, batch_size=5, positions=4, seed=0, dtype=torch.float64):
    rows, cols = matrix_shape(shape)
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(rows, (batch_size, positions), generator=generator)
    index[:, -1] = index[:, 0]  # a row that occurs twice adds up
    return RowsGradient(index, normal(batch_size, positions, cols, seed=seed + 2, dtype=dtype), shape)


def dense(shape, batch_size=5, seed=0, dtype=torch.float64):
    return DenseGradient(normal(batch_size, *shape, seed=seed, dtype=dtype))


def all_forms(shape, batch_size=5, dtype=torch.float64):
    """Every form that a matrix parameter's gradient may have, by name."""
    size = {"batch_size": batch_size, "dtype": dtype}
    return {
        "dense": dense(shape, **size),
        "vector input": outer(shape, positions=1, **size),
        "sequence": outer(shape, positions=3, **size),
        "long sequence": outer(shape, positions=70, **size),
        "unfolded": outer(shape, positions=3, positions_last=True, **size),
        "embedding": embedding(shape, **size),
        "tied": SumGradient([outer(shape, **size), embedding(shape, seed=7, **size)]),
        "three parts": SumGradient(
            [dense(shape, **size), SumGradient([outer(shape, **size), outer(shape, positions=1, seed=9, **size)])]
        ),
        "two embeddings": SumGradient([embedding(shape, **size), embedding(shape, seed=3, **size)]),
        "only dense": OnlyDense(normal(batch_size, *shape, dtype=dtype)),
    }


def oracle_rows(gradient):
    """Build the gradients in float64: ``[B, numel]``."""
    if isinstance(gradient, SumGradient):
        return sum(oracle_rows(part) for part in gradient.summands)
    if isinstance(gradient, RowsGradient):
        gradient = RowsGradient(gradient.index, gradient.values.double(), gradient.shape)
    factors = gradient.outer(0, gradient.batch_size)
    if factors is not None:
        return torch.einsum("bto,bti->boi", factors[0].double(), factors[1].double()).flatten(1)
    return gradient.dense(0, gradient.batch_size).double()


def matrix_of(projector, name):
    """Return P of one parameter by projecting every unit vector: ``[numel, dim]``, float64."""
    shape = projector.shapes[name]
    numel = torch.Size(shape).numel()
    units = torch.eye(numel, dtype=torch.float64).reshape(numel, *shape)
    return projector.project({name: DenseGradient(units)}).features


def assert_is_linear_map(projector, name, gradient, rtol=1e-9):
    """Features are ``rows @ P`` and norms are exact, whatever form the gradient has."""
    rows = oracle_rows(gradient)
    result = projector.project({name: gradient})
    scale = rows.norm(dim=1).max().item()
    torch.testing.assert_close(
        result.features.double(), rows @ matrix_of(projector, name), rtol=0, atol=scale * rtol, check_device=False
    )
    torch.testing.assert_close(result.squared_norm, rows.square().sum(1), rtol=rtol, atol=0)


def relative_errors(features, rows):
    """Return ``(<Px, Py> - <x, y>) / (|x||y|)`` of all pairs of different rows."""
    rows, features = rows.double(), features.double()
    lengths = rows.norm(dim=1)
    errors = (features @ features.T - rows @ rows.T) / torch.outer(lengths, lengths)
    return errors[tuple(torch.triu_indices(len(rows), len(rows), 1))]


def assert_unbiased(make, rows, num_seeds=250):
    """The mean of ``<Px, Py>`` over seeds is ``<x, y>`` within five standard errors; ``make(seed)`` gives features."""
    errors = torch.stack([relative_errors(make(seed), rows) for seed in range(num_seeds)])
    mean, spread = errors.mean(0), errors.std(0)
    assert (mean.abs() <= 5 * spread / num_seeds**0.5).all(), mean.abs() / (spread / num_seeds**0.5)
    assert spread.max() < 1  # or the test would say nothing


@pytest.fixture
def stand_in(monkeypatch):
    """Install a module that behaves like fast_jl and runs on the CPU; functions may be replaced."""
    module = types.ModuleType("fast_jl")
    for variant in (8, 16, 32):
        setattr(module, f"project_rademacher_{variant}", project)
    monkeypatch.setitem(sys.modules, "fast_jl", module)
    monkeypatch.setattr(fast_jl, "check_device", lambda device: None)
    return module


def project(rows, k, seed, num_tiles):
    assert rows.ndim == 2 and rows.is_contiguous() and rows.dtype == torch.float32
    assert k % 512 == 0 and 0 <= seed < 2**32
    return rows.half().float() @ signs(rows.shape[1], k, seed, num_tiles)


def signs(num_entries, k, seed, num_tiles):
    """Signs of each feature tile from a generator of its own, as the kernel draws them."""
    num_tiles = min(num_entries, num_tiles)
    size = -(-num_entries // num_tiles)
    tiles = []
    for tile in range(-(-num_entries // size)):
        generator = torch.Generator().manual_seed(seed * 1000 + tile)
        tiles.append(torch.randint(2, (size, k), generator=generator).float() * 2 - 1)
    return torch.cat(tiles)[:num_entries]

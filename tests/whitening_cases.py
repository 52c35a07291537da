"""Whitening by whole Kronecker-factored matrices, from loops over examples in float64.

A gradient is, for each block of parameters, the list of outer products ``(left, right)`` that add up to it.
"""

from __future__ import annotations

import numpy as np
import torch

from tracer.data.sampled_labels import LabelDraws, example_keys

DAMPING = 0.2


def drawn_label(model, x, number, row, sample):
    """Return a label that is drawn from the prediction for one example, as the checkpoint's curvature takes it."""
    key = example_keys(0, number, sample, np.array([row]))
    return LabelDraws(key).classes(model(x[None]), torch.zeros(1, dtype=torch.int64))[0]


def built(terms):
    """Return the sum of outer products, flattened."""
    return sum(torch.outer(*term) for term in terms).flatten()


def normalized(vectors):
    """Return the sum of vectors' outer products with themselves, over its mean eigenvalue."""
    total = sum(torch.outer(each, each) for each in vectors)
    return total * len(total) / total.trace()


def damped_products(drawn, others, kind):
    """Return the damped curvature of each block, ``[O * I, O * I]``, from gradients of drawn labels' losses.

    Eigenvalues are corrected by other gradients than those that eigenvectors come from.
    """
    whole = {
        name: torch.stack([built(each[name]) for each in (drawn if kind == "kfac" else others)]) for name in drawn[0]
    }
    means = {name: float(rows.square().mean()) for name, rows in whole.items()}
    sizes = {name: rows.shape[1] for name, rows in whole.items()}
    floor = 1e-8 * sum(means[name] * sizes[name] for name in means) / sum(sizes.values())
    found = {}
    for name, rows in whole.items():
        left, right = (normalized([term[side] for each in drawn for term in each[name]]) for side in (0, 1))
        if kind == "kfac":
            left, right = (side + DAMPING**0.5 * torch.eye(len(side), dtype=side.dtype) for side in (left, right))
            found[name] = (means[name] + floor) * torch.kron(left, right)
        else:
            basis = torch.kron(torch.linalg.eigh(left)[1], torch.linalg.eigh(right)[1])
            values = (rows @ basis).square().mean(0)
            found[name] = basis @ torch.diag(values + DAMPING * means[name] + floor) @ basis.T
    return found


def whitened_products(own, others, curvature):
    """Return ``[n, m]``, the inner products of gradients through the inverse of each block's curvature."""
    total = torch.zeros(len(own), len(others), dtype=torch.float64)
    for name, product in curvature.items():
        left, right = (torch.stack([built(each[name]) for each in side]) for side in (own, others))
        total += left @ torch.linalg.solve(product, right.T)
    return total

"""What gradients are compared with on texts: BM25, and the similarity of a model's hidden states."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn


def bm25(documents: Sequence[str], queries: Sequence[str], k1: float = 1.5, b: float = 0.75) -> np.ndarray:
    """Return the BM25 scores (Robertson et al. 1994) of documents for queries, by whole words, ``[N, M]``."""
    counts = [Counter(text.split()) for text in documents]
    holders = Counter(word for count in counts for word in count)
    lengths = np.array([count.total() for count in counts], dtype=float)
    scores = np.zeros((len(documents), len(queries)))
    for column, query in enumerate(queries):
        for word in query.split():
            frequency = np.array([count[word] for count in counts])
            rarity = np.log1p((len(counts) - holders[word] + 0.5) / (holders[word] + 0.5))
            scores[:, column] += rarity * frequency / (frequency + k1 * (1 - b + b * lengths / lengths.mean()))
    return scores


@torch.no_grad()
def similarity(model: nn.Module, train: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> np.ndarray:
    """Return the cosines of the last layer's states, averaged over tokens, ``[N, M]``, of two padded batches."""
    means = []
    for batch in (train, targets):
        states = model(**batch, output_hidden_states=True).hidden_states[-1]
        mask = batch["attention_mask"][..., None]
        means.append(nn.functional.normalize((states * mask).sum(1) / mask.sum(1)))
    return (means[0] @ means[1].T).numpy()

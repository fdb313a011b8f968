"""Selectors that no text has taught anything, for tests of what is done with their choice."""

from __future__ import annotations

import numpy as np

from edgert.architectures.base import Hyperparameters
from edgert.engine.retrieval_head import Floats, Positions
from retrieval.choosing import page_layers
from retrieval.selectors import HeadSelector, PageSelector, Selector


class RandomHead:
    """A head of random projections, which no text has taught anything: it chooses something, and always the same."""

    feature_layers, dim, n_groups = (0,), 16, 1

    def __init__(self, hidden_size: int) -> None:
        rng = np.random.default_rng(7)
        self._q, self._k = (rng.standard_normal((2 * hidden_size, self.dim), dtype=np.float32) / 8 for _ in range(2))

    def project_queries(self, features: Floats, positions: Positions) -> Floats:
        return (features @ self._q)[:, None]

    def project_keys(self, features: Floats, positions: Positions) -> Floats:
        return (features @ self._k)[:, None]

    def scores(self, query: Floats, keys: Floats) -> Floats:
        return keys @ query


def head_selector(hp: Hyperparameters, context_length: int) -> Selector:
    return HeadSelector(RandomHead(hp.hidden_size), context_length, hp.hidden_size)


def page_selector(hp: Hyperparameters, context_length: int) -> Selector:
    return PageSelector(page_layers(hp), hp.n_kv_heads, hp.head_dim, context_length)

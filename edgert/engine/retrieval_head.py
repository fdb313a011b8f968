"""The seam of the retrieval head: what tells, before a step computes, which cached tokens it will look at.

A token's *features* are known once it has passed through the model: its embedding row and the residual stream after
each of a few layers, every one of them divided by its root mean square. Contract: a step's query comes from the
features of the token *before* it (which the step before, or prefill, has computed), a cached token's key from its own.
Both are made at the token's own position: the query for position t is made of token t - 1 at position t - 1. One
query and one key for each group of layers that shares a set of tokens; implementations may have one group.

Source: SpeContext, arXiv 2512.00722, section 4; hidden states as in EAGLE-3, arXiv 2503.01840.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Positions = NDArray[np.int64]
_EPS = np.float32(1e-6)


class RetrievalHead(Protocol):
    """Projections of features, and the score of a key for a query. Holds no keys: those are the cache's."""

    @property
    def feature_layers(self) -> tuple[int, ...]:
        """The layers, in rising order and below n_layers - 1, behind which the residual stream (the hidden state that
        the next layer gets) is a feature."""
        ...

    @property
    def dim(self) -> int:
        """Values of a query and of a key."""
        ...

    @property
    def n_groups(self) -> int:
        """Groups of layers with a set of their own."""
        ...

    def project_queries(self, features: Floats, positions: Positions) -> Floats:
        """(n, n_groups, dim) float32 of features (n, n_features) at their tokens' positions (n,)."""
        ...

    def project_keys(self, features: Floats, positions: Positions) -> Floats:
        """(n, n_groups, dim) float32 of features (n, n_features) at their tokens' positions (n,)."""
        ...

    def scores(self, query: Floats, keys: Floats) -> Floats:
        """(n,) float32 of query (dim,) and keys (n, dim): their softmax is how the head divides attention among
        cached tokens, sinks and recent ones left out."""
        ...


def features_of(streams: Sequence[Floats]) -> Floats:
    """(n, n_features) of the embedding rows and of the residual stream after each feature layer, each (n, hidden_size)
    float32, in this order: every one divided by its root mean square, as by a norm without weights. n_features =
    (1 + number of feature layers) * hidden_size."""
    stacked = np.concatenate(streams, axis=1, dtype=np.float32).reshape(len(streams[0]), len(streams), -1)
    mean_square = np.einsum("nsh,nsh->ns", stacked, stacked) / np.float32(stacked.shape[2])
    stacked /= np.sqrt(mean_square + _EPS)[:, :, None]
    return stacked.reshape(len(stacked), -1)

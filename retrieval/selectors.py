"""What scores cached tokens for the next step: a distilled head, or bounds on keys where a model has no head.

A selector is told of every token that is computed (`add`) and of every step that was observed (`saw`). Its scores are
for the step after the last token. Source of the bounds: Quest, arXiv 2406.10774, section 3.2.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from edgert.engine.retrieval_head import Floats, RetrievalHead, features_of
from retrieval.arrays import Halves
from retrieval.graph import Observation

PAGE_TOKENS = 16
# A step's tokens, and as many before: after guesses that were wrong, the query is that of the last right one; after a
# step that failed, of the one before it.
_MAX_FEATURES = 16


class Selector(Protocol):
    name: str
    """What chooses, for people."""

    @property
    def feature_layers(self) -> frozenset[int] | None:
        """The layers whose residual stream it reads; None where it reads none, not even embeddings."""
        ...

    @property
    def key_layers(self) -> frozenset[int]:
        """The layers whose keys it reads."""
        ...

    @property
    def resident_bytes(self) -> int:
        """What it keeps of the tokens, at the context's full length."""
        ...

    def add_features(self, start: int, streams: Sequence[Floats]) -> None:
        """Tokens from `start` on: embedding rows and residual streams, each (n, hidden_size)."""
        ...

    def add_keys(self, start: int, keys: Mapping[int, Halves]) -> None:
        """Tokens from `start` on: their keys after RoPE, by layer, each (n, n_kv_heads, head_dim)."""
        ...

    def saw(self, position: int, observations: Sequence[Observation]) -> None:
        """The step of the token at `position` was observed."""
        ...

    def forget(self) -> None:
        """Another request begins: what was observed is no longer what the next step wants."""
        ...

    @property
    def identity(self) -> str:
        """Two selectors of one identity read each other's state."""
        ...

    def state_size(self, n_tokens: int) -> int:
        """Values that `state` has: what cannot be made again of the tokens' keys."""
        ...

    def state(self, n_tokens: int) -> Floats:
        """(state_size(n_tokens),): what it keeps of the first tokens."""
        ...

    def restore(self, state: Floats, n_tokens: int) -> None: ...

    def scores(self, n_tokens: int) -> Floats | None:
        """(n_tokens,): for the step after the last of so many tokens. None where nothing is known of what it wants."""
        ...


class HeadSelector:
    """A retrieval head, and the keys of every token, of which memory is taken as they come."""

    name = "head"
    key_layers: frozenset[int] = frozenset()

    def __init__(self, head: RetrievalHead, context_length: int, hidden_size: int) -> None:
        self._head, self._n_features = head, (1 + len(head.feature_layers)) * hidden_size
        self.feature_layers: frozenset[int] | None = frozenset(head.feature_layers)
        self._keys = np.zeros((head.n_groups, context_length, head.dim), np.float32)
        self._features: dict[int, Floats] = {}  # by position, of the last tokens, for queries

    @property
    def resident_bytes(self) -> int:
        return self._keys.nbytes

    def add_features(self, start: int, streams: Sequence[Floats]) -> None:
        features = features_of(streams)
        positions = np.arange(start, start + len(features), dtype=np.int64)
        self._keys[:, start:start + len(features)] = self._head.project_keys(features, positions).swapaxes(0, 1)
        kept = {at: row for at, row in self._features.items() if -_MAX_FEATURES <= at - start < 0}
        last = features[-_MAX_FEATURES:].copy()
        self._features = kept | dict(zip(positions[-_MAX_FEATURES:].tolist(), last, strict=True))

    def add_keys(self, start: int, keys: Mapping[int, Halves]) -> None:
        """It reads none."""

    def saw(self, position: int, observations: Sequence[Observation]) -> None:
        """It has its own queries."""

    def forget(self) -> None:
        """Nothing was observed."""

    @property
    def identity(self) -> str:
        """The head by what it does: a hash of its projections of one token."""
        n_features = self._n_features
        probe = np.linspace(-1, 1, n_features, dtype=np.float32)[None]
        raw = self._head.project_keys(probe, np.array([7], np.int64)).astype(np.float32)
        return f"head {zlib.crc32(np.round(raw, 3).tobytes()):08x}"

    def state_size(self, n_tokens: int) -> int:
        return n_tokens * self._keys.shape[0] * self._keys.shape[2]

    def state(self, n_tokens: int) -> Floats:
        return self._keys[:, :n_tokens].reshape(-1)

    def restore(self, state: Floats, n_tokens: int) -> None:
        n_tokens_here = min(n_tokens, self._keys.shape[1])
        kept = state.reshape(self._keys.shape[0], n_tokens, -1)
        self._keys[:, :n_tokens_here] = kept[:, :n_tokens_here]

    def scores(self, n_tokens: int) -> Floats | None:
        features = self._features.get(n_tokens - 1)
        if features is None:
            return None
        query = self._head.project_queries(features[None], np.array([n_tokens - 1], np.int64))[0]
        groups = [self._head.scores(one, keys[:n_tokens]) for one, keys in zip(query, self._keys, strict=True)]
        return groups[0] if len(groups) == 1 else np.mean(groups, axis=0, dtype=np.float32)


class PageSelector:
    """No training: pages of 16 tokens, bounded by their keys' least and greatest values in a few layers.

    A page's score is the share of attention that its best key could have, by the queries that were seen last, in the
    head that gives it most. A page is made anew by keys that begin with its first.
    """

    name = "pages"
    feature_layers: frozenset[int] | None = None

    def __init__(self, key_layers: frozenset[int], n_kv_heads: int, head_dim: int, context_length: int) -> None:
        self.key_layers = key_layers
        n_pages = -(-context_length // PAGE_TOKENS)
        shape = (n_kv_heads, n_pages, 2 * head_dim)  # greatest values, then least ones
        self._bounds = {layer: np.zeros(shape, np.float32) for layer in sorted(key_layers)}
        self._head_dim = head_dim
        self._position = -1
        self._pages: Floats = np.zeros(0, np.float32)

    @property
    def resident_bytes(self) -> int:
        return sum(bounds.nbytes for bounds in self._bounds.values())

    def add_features(self, start: int, streams: Sequence[Floats]) -> None:
        """It reads none."""

    def add_keys(self, start: int, keys: Mapping[int, Halves]) -> None:
        for layer, rows in keys.items():
            bounds, by_head = self._bounds[layer], rows.astype(np.float32).swapaxes(0, 1)  # (n_kv_heads, n, head_dim)
            done = 0
            while done < by_head.shape[1]:
                page, inside = divmod(start + done, PAGE_TOKENS)
                part = by_head[:, done:done + PAGE_TOKENS - inside]
                high, low = part.max(1), part.min(1)
                if inside:
                    high = np.maximum(high, bounds[:, page, :self._head_dim])
                    low = np.minimum(low, bounds[:, page, self._head_dim:])
                bounds[:, page, :self._head_dim], bounds[:, page, self._head_dim:] = high, low
                done += part.shape[1]

    @property
    def identity(self) -> str:
        return self.name

    def state_size(self, n_tokens: int) -> int:
        return 0  # pages are made of keys

    def state(self, n_tokens: int) -> Floats:
        return np.zeros(0, np.float32)

    def restore(self, state: Floats, n_tokens: int) -> None:
        """It is shown the keys."""

    def forget(self) -> None:
        self._position = -1

    def saw(self, position: int, observations: Sequence[Observation]) -> None:
        n_pages = position // PAGE_TOKENS + 1
        best = np.zeros(n_pages, np.float32)
        for one in observations:
            bounds = self._bounds[one.layer][:, :n_pages]
            q = one.queries.reshape(len(bounds), -1, self._head_dim) * np.float32(one.scale)
            signed = np.concatenate([np.maximum(q, 0), np.minimum(q, 0)], axis=2)
            logits = signed @ bounds.swapaxes(1, 2)  # (n_kv_heads, heads of each, n_pages)
            logits -= logits.max(axis=2, keepdims=True)
            shares = np.exp(logits, out=logits)
            shares /= shares.sum(axis=2, keepdims=True)
            best = np.maximum(best, shares.max(axis=(0, 1)))
        self._position, self._pages = position, np.log(best + np.float32(1e-20))

    def scores(self, n_tokens: int) -> Floats | None:
        if not 0 <= self._position < n_tokens:
            return None
        known = np.repeat(self._pages, PAGE_TOKENS)[:n_tokens]
        return np.pad(known, (0, n_tokens - len(known)), constant_values=known.min())

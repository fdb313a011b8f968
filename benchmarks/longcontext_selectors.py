"""The methods that are compared at equal budgets: ours, peers', an oracle, and chance.

Peers are re-implemented from their papers' rules, at the granularity and per the heads that those say. Each set holds
4 sinks and 32 recent tokens inside the budget where the method itself does not say otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from longcontext_model import Selector, Snapshot

from edgert.engine.retrieval_head import RetrievalHead
from retrieval.arrays import Amounts, Floats, Positions
from retrieval.repeats import following, repeats
from retrieval.selection import Policy, Survivors, merits, select

N_SINKS, N_RECENT = 4, 32


class Base(Selector):
    """Keeps nothing and sees everything: full attention."""

    def start(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot

    def before(self, n_cached: int, token_features: Floats) -> None:
        """Nothing to prepare."""

    def choose(self, layer: int, queries: Floats, n_cached: int) -> Positions | None:
        return None

    def observe(self, layer: int, chosen: Positions | None, attention: Floats) -> None:
        """Nothing to learn."""


class Full(Base):
    """Everything; records each step's attention, averaged over layers and heads, for the oracle."""

    def __init__(self) -> None:
        self.attention: list[Floats] = []

    def start(self, snapshot: Snapshot) -> None:
        super().start(snapshot)
        self.attention = []

    def before(self, n_cached: int, token_features: Floats) -> None:
        self.attention.append(np.zeros(n_cached, np.float32))

    def observe(self, layer: int, chosen: Positions | None, attention: Floats) -> None:
        self.attention[-1] += attention.mean(0) / len(self.snapshot.keys)


class OneSet(Base):
    """A set for a step, of all layers and heads."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.sets: list[Positions] = []

    def start(self, snapshot: Snapshot) -> None:
        super().start(snapshot)
        self.sets = []

    def before(self, n_cached: int, token_features: Floats) -> None:
        everything = n_cached <= self.budget
        self.sets.append(np.arange(n_cached) if everything else self.of_step(n_cached, token_features))

    def of_step(self, n_cached: int, token_features: Floats) -> Positions:
        raise NotImplementedError

    def choose(self, layer: int, queries: Floats, n_cached: int) -> Positions | None:
        return self.sets[-1]


def forced(n_cached: int) -> Positions:
    return np.concatenate([np.arange(N_SINKS), np.arange(n_cached - N_RECENT, n_cached)])


def with_best(scores: Floats, budget: int) -> Positions:
    """The forced tokens, and the best of the others."""
    scores, always = scores.astype(np.float32, copy=True), forced(len(scores))
    scores[always] = np.inf
    return np.sort(np.argpartition(-scores, budget - 1)[:budget])


class Streaming(OneSet):
    """Sinks and a window (StreamingLLM, arXiv 2309.17453)."""

    def of_step(self, n_cached: int, token_features: Floats) -> Positions:
        return np.concatenate([np.arange(N_SINKS), np.arange(n_cached - self.budget + N_SINKS, n_cached)])


class Chance(OneSet):
    """Forced tokens, and others drawn by lot."""

    def of_step(self, n_cached: int, token_features: Floats) -> Positions:
        return with_best(np.random.default_rng(n_cached).random(n_cached).astype(np.float32), self.budget)


class Oracle(OneSet):
    """The best set for all layers and heads: of the attention that full attention paid in this very step."""

    def __init__(self, budget: int, full: Full) -> None:
        super().__init__(budget)
        self._full = full

    def of_step(self, n_cached: int, token_features: Floats) -> Positions:
        return with_best(self._full.attention[len(self.sets)], self.budget)


class Reuse(OneSet):
    """The best set of the step before, scored by full attention (an upper bound: a runtime sees resident ones only)."""

    def __init__(self, budget: int, full: Full) -> None:
        super().__init__(budget)
        self._full = full

    def of_step(self, n_cached: int, token_features: Floats) -> Positions:
        step = len(self.sets)
        before = self._full.attention[max(0, step - 1)]
        return with_best(np.pad(before, (0, n_cached - len(before)))[:n_cached], self.budget)


class Ours(OneSet):
    """What retrieval/planning.py composes: the head, the attention that was observed on the set in the step before (in
    the same few layers, and on everything in the prompt's last step), and what follows earlier occurrences of the
    text's end; and exchanges as many as that does. Without a head, the two others."""

    def __init__(self, policy: Policy, head: RetrievalHead | None, observed: frozenset[int],
                 token_ids: Sequence[int]) -> None:
        super().__init__(policy.budget)
        self._policy, self._head, self._observed = policy, head, observed
        self._ids = np.array(token_ids, np.int32)  # of the whole item: a step sees those up to its own

    def start(self, snapshot: Snapshot) -> None:
        super().start(snapshot)
        n = snapshot.n_tokens
        if self._head is not None:
            self._keys = np.zeros((len(snapshot.features), self._head.dim), np.float32)
            self._keys[:n] = self._head.project_keys(snapshot.features[:n], np.arange(n))[:, 0]
        self._n_keys, self._attention = n, np.zeros(n, np.float32)
        self._repeated: Amounts = np.zeros(0)
        for layer in self._observed:
            self.observe(layer, None, full_attention(snapshot, layer))

    def of_step(self, n_cached: int, token_features: Floats) -> Positions:
        policy, before = self._policy, self.sets[-1] if self.sets else None
        seen = np.arange(n_cached) if before is None else np.append(before, n_cached - 1)
        survivors = Survivors(seen, np.pad(self._attention, (0, len(seen) - len(self._attention))))
        known, held = merits(self._scores(n_cached, token_features), survivors, policy), None
        if before is not None:
            likely = select(known, following(self._repeated), policy, before, policy.n_beside).positions
            held = np.concatenate([likely, before])
        self._repeated = repeats(self._ids[:n_cached], int(self._ids[n_cached]))
        chosen = select(known, self._repeated, policy, held, policy.n_late, is_late=True).positions
        self._attention = np.zeros(len(chosen), np.float32)
        return chosen

    def _scores(self, n_cached: int, token_features: Floats) -> Floats:
        if self._head is None:
            return np.zeros(n_cached, np.float32)
        new, last = np.arange(self._n_keys, n_cached), np.array([n_cached - 1])
        if len(new):
            self._keys[new] = self._head.project_keys(token_features[new], new)[:, 0]
            self._n_keys = n_cached
        query = self._head.project_queries(token_features[last], last)[0, 0]
        return self._head.scores(query, self._keys[:n_cached])

    def observe(self, layer: int, chosen: Positions | None, attention: Floats) -> None:
        if layer in self._observed:
            self._attention += attention.mean(0) + attention.max(0)


def full_attention(snapshot: Snapshot, layer: int) -> Floats:
    """(n_heads, n_tokens): of the snapshot's last token, itself included."""
    keys, q = snapshot.keys[layer][:, :snapshot.n_tokens], snapshot.last_queries[layer][-1]
    scores = (q.reshape(len(keys), -1, q.shape[1]) @ keys.transpose(0, 2, 1) * snapshot.scale).reshape(len(q), -1)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.asarray(weights / weights.sum(-1, keepdims=True), np.float32)


class Quest(Base):
    """Per layer and KV head, pages of 16 by the upper bound of their keys (Quest, arXiv 2406.10774), each head's bounds
    as shares of its attention, so that no head outvotes the others of its group. The first page and the last two are
    always in the set."""

    PAGE = 16

    def __init__(self, budget: int) -> None:
        self.budget = budget

    def start(self, snapshot: Snapshot) -> None:
        super().start(snapshot)
        self._n_pages = snapshot.n_tokens // self.PAGE
        pages = [k[:, :self._n_pages * self.PAGE].reshape(len(k), self._n_pages, self.PAGE, -1) for k in snapshot.keys]
        self._bounds = [(page.min(2), page.max(2)) for page in pages]

    def choose(self, layer: int, queries: Floats, n_cached: int) -> Positions | None:
        if n_cached <= self.budget:
            return None
        low, high = self._bounds[layer]  # (n_kv_heads, n_pages, head_dim)
        q = queries.reshape(len(low), -1, 1, queries.shape[1]) * np.float32(self.snapshot.scale)
        bounds = np.maximum(q * low[:, None], q * high[:, None]).sum(-1)  # (n_kv_heads, heads of each, n_pages)
        shares = np.exp(bounds - bounds.max(-1, keepdims=True))
        shares = (shares / shares.sum(-1, keepdims=True)).max(1)
        shares[:, [0, -2, -1]] = np.inf
        tail = np.arange(self._n_pages * self.PAGE, n_cached)  # tokens of no whole page are recent: always seen
        n_chosen = max(1, (self.budget - len(tail)) // self.PAGE)
        pages = np.sort(np.argpartition(-shares, min(n_chosen, self._n_pages) - 1, 1)[:, :n_chosen], 1)
        rows = (pages[:, :, None] * self.PAGE + np.arange(self.PAGE)).reshape(len(pages), -1)
        return np.concatenate([rows, np.broadcast_to(tail, (len(rows), len(tail)))], 1)


class SnapKV(Base):
    """Per layer and KV head, what the prompt's last 32 queries voted for, pooled over 7, those with most votes first;
    later tokens stay (SnapKV, arXiv 2404.14469)."""

    def __init__(self, budget: int, window: int = 32, pool: int = 7) -> None:
        self.budget, self._window, self._pool = budget, window, pool

    def start(self, snapshot: Snapshot) -> None:
        super().start(snapshot)
        self._kept = [self._of_layer(snapshot, layer) for layer in range(len(snapshot.keys))]

    def _of_layer(self, snapshot: Snapshot, layer: int) -> Positions:
        n, keys = snapshot.n_tokens, snapshot.keys[layer]
        q = snapshot.last_queries[layer][-self._window:].transpose(1, 0, 2)  # (n_heads, window, head_dim)
        scores = q.reshape(len(keys), -1, q.shape[2]) @ keys[:, :n].transpose(0, 2, 1) * snapshot.scale
        scores = scores.reshape(len(q), self._window, n)
        scores[:, np.arange(n)[None] > np.arange(n - self._window, n)[:, None]] = -np.inf
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        votes = (weights / weights.sum(-1, keepdims=True)).sum(1).reshape(len(keys), -1, n).sum(1)
        pooled = np.lib.stride_tricks.sliding_window_view(
            np.pad(votes, ((0, 0), (self._pool // 2, self._pool // 2))), self._pool, 1).max(-1)
        pooled[:, -self._window:] = np.inf
        return np.argsort(-pooled, 1, kind="stable")[:, :self.budget]

    def choose(self, layer: int, queries: Floats, n_cached: int) -> Positions | None:
        if n_cached <= self.budget:
            return None
        since = np.arange(self.snapshot.n_tokens, n_cached)
        kept = self._kept[layer][:, :max(0, self.budget - len(since))]  # what is new takes the place of the least voted
        return np.concatenate([kept, np.broadcast_to(since, (len(kept), len(since)))], 1)

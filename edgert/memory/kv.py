"""What a KV cache takes whose steps attend to a set of tokens: closed terms, each exact.

Sources: SpeContext, arXiv 2512.00722, section 6, with what it leaves out: a head keeps keys alone; what attention
reads has slots of its own; a prompt needs one layer's keys and values while it passes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from edgert.memory.profile import DiskSpeed

# KV takes memory in cells of this many tokens (edgert/engine/kv_cache.py).
CELLS_PER_BUCKET = 256
# What a step over a set takes beyond a dense one over as many tokens, and beyond its waits: once, for each token of the
# text, and for each of the set. (SmolLM2-135M on two cores of 2025, with the waits. Sets of 512 and 128 of a real text
# of 4k: 4.0 and 3.4 ms; of random ones, 512 of 4k, 512 and 128 of 16k: 3.5, 5.2 and 4.1 ms.)
_STEP_S, _TEXT_TOKEN_S, _SET_TOKEN_S = 2.2e-3, 1.1e-7, 1.4e-6
# Of the tokens that may come late, those that do: on real texts 21 of 64. (Of those beside the step before, 23 of 24.)
_LATE_SHARE = 1 / 3
# Reads of a batch, each of a record, that end in the time of one that is alone (100 of 23 KB: 3.1 ms; one: 78 us).
_AT_ONCE = 2.5
# Those that were foreseen are read while the second half of the step before is computed.
_SHARE_BESIDE = 0.5


@dataclass(frozen=True, slots=True)
class KVSizes:
    """`tier` is where the whole text's keys and values lie. Bytes."""

    tier: Literal["memory", "disk"]
    budget: int  # tokens of a set
    n_beside: int  # of them, the most that come beside the step before
    n_late: int  # and the most that are waited for
    from_tokens: int  # up to here the cache is dense and in memory
    fixed_bytes: int  # slots, windows, records that wait for the disk, and tables over the context
    selector_bytes_per_token: float  # a head's keys, or bounds on pages
    layer_bytes_per_token: int  # one layer's K and V: what a prompt needs of the text before it
    passing_bytes_per_token: int  # hidden state and features of the tokens that pass the layers together
    passing_tokens: int
    block_bytes: int  # records while they move between the tiers
    waiting_bytes_per_token: int = 0  # of a prompt that is attended in memory: what its tokens keep between two layers

    def bytes(self, dense_bytes_per_token: int, n_tokens: int) -> int:
        """Peak memory up to a text of `n_tokens`.

        In memory: dense + what waits + fixed + selector. On disk: the larger of a dense cache of `from_tokens` with
        what waits and, beyond, a layer's K and V + what passes; each with a block; + fixed + selector.
        """
        cells = -(-n_tokens // CELLS_PER_BUCKET) * CELLS_PER_BUCKET
        beside = self.fixed_bytes + int(n_tokens * self.selector_bytes_per_token)
        dense_cells = min(cells, -(-self.from_tokens // CELLS_PER_BUCKET) * CELLS_PER_BUCKET)
        if self.tier == "memory":
            return cells * dense_bytes_per_token + n_tokens * self.waiting_bytes_per_token + beside
        waiting = min(n_tokens, self.from_tokens) * self.waiting_bytes_per_token
        dense = dense_cells * dense_bytes_per_token + waiting + self.block_bytes
        if n_tokens <= self.from_tokens:
            return dense + beside
        passing = min(n_tokens, self.passing_tokens) * self.passing_bytes_per_token
        staged = cells * self.layer_bytes_per_token + passing + self.block_bytes
        return max(dense, staged) + beside

    def touched_bytes(self, dense_bytes_per_token: int, n_tokens: int) -> int:
        """What of `bytes` a text of `n_tokens` has written to, and so takes: all of it beyond `from_tokens`; up to
        there n_tokens * (dense + what waits + selector), for slots and blocks fill as the text comes near."""
        if n_tokens > self.from_tokens:
            return self.bytes(dense_bytes_per_token, n_tokens)
        return int(n_tokens * (dense_bytes_per_token + self.waiting_bytes_per_token + self.selector_bytes_per_token))

    def attended(self, n_cached: int) -> int:
        """Tokens that one step attends to of so many."""
        return n_cached if n_cached <= self.from_tokens else min(n_cached, self.budget)

    def choose_s(self, n_cached: int) -> float:
        """Seconds that a step's set takes to be chosen: once + text * a token's + set * a token's."""
        if n_cached <= self.from_tokens:
            return 0.0
        return _STEP_S + n_cached * _TEXT_TOKEN_S + self.attended(n_cached) * _SET_TOKEN_S

    def wait_s(self, n_cached: int, record_bytes: int, disk: DiskSpeed, step_s: float) -> float:
        """Seconds that a step of `step_s` waits for its set, where that is on disk: what comes beside the step before,
        but for half of a step; and a batch of what comes late. A batch takes latency + exchanged * the longer of
        latency / reads at once and record / bandwidth."""
        if self.tier == "memory" or n_cached <= self.from_tokens:
            return 0.0
        token_s = max(disk.latency_s / _AT_ONCE, record_bytes / disk.bytes_s)
        beside_s, late_s = (disk.latency_s + n * token_s for n in (self.n_beside, _LATE_SHARE * self.n_late))
        return max(0.0, beside_s - _SHARE_BESIDE * step_s) + late_s

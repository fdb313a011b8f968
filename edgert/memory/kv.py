"""What a KV cache takes whose steps attend to a set of tokens: closed terms, each exact.

Sources: SpeContext, arXiv 2512.00722, section 6, with what it leaves out: a head keeps keys alone; what attention
reads has slots of its own; a prompt needs one layer's keys and values while it passes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# As everywhere in the manager: cells come in buckets of this many tokens (edgert/engine/kv_cache.py).
CELLS_PER_BUCKET = 256


@dataclass(frozen=True, slots=True)
class KVSizes:
    """`tier` is where the whole text's keys and values lie. Bytes."""

    tier: Literal["memory", "disk"]
    budget: int  # tokens of a set
    from_tokens: int  # up to here the cache is dense and in memory
    fixed_bytes: int  # slots, windows, records that wait for the disk, and tables over the context
    selector_bytes_per_token: float  # a head's keys, or bounds on pages
    layer_bytes_per_token: int  # one layer's K and V: what a prompt needs of the text before it
    passing_bytes_per_token: int  # hidden state and features of the tokens that pass the layers together
    passing_tokens: int
    block_bytes: int  # records while they move between the tiers

    def bytes(self, dense_bytes_per_token: int, n_tokens: int) -> int:
        """Peak memory up to a text of `n_tokens`.

        In memory: dense + fixed + selector. On disk: the larger of a dense cache of `from_tokens` and, beyond, a
        layer's K and V + what passes + a block; + fixed + selector.
        """
        cells = -(-n_tokens // CELLS_PER_BUCKET) * CELLS_PER_BUCKET
        beside = self.fixed_bytes + int(n_tokens * self.selector_bytes_per_token)
        dense_cells = min(cells, -(-self.from_tokens // CELLS_PER_BUCKET) * CELLS_PER_BUCKET)
        if self.tier == "memory":
            return cells * dense_bytes_per_token + beside
        dense = dense_cells * dense_bytes_per_token + self.block_bytes
        if n_tokens <= self.from_tokens:
            return dense + beside
        passing = min(n_tokens, self.passing_tokens) * self.passing_bytes_per_token
        staged = cells * self.layer_bytes_per_token + passing + self.block_bytes
        return max(dense, staged) + beside

    def attended(self, n_cached: int) -> int:
        """Tokens that one step attends to of so many."""
        return n_cached if n_cached <= self.from_tokens else min(n_cached, self.budget)

"""The sizes of a retrieved cache, from a model's shape: what the memory manager counts, and what is then opened."""

from __future__ import annotations

from typing import Literal

from edgert.architectures.base import Hyperparameters
from edgert.engine.retrieval_head import RetrievalHead
from edgert.memory.kv import KVSizes
from retrieval.choosing import page_layers
from retrieval.hot import ring_rows, slots_for
from retrieval.records import RecordShape
from retrieval.selection import Policy
from retrieval.selectors import PAGE_TOKENS
from retrieval.staged import BLOCK_TOKENS
from retrieval.store import N_WAITING

# Shorter texts are as fast attended whole (SmolLM2-135M, Qwen2.5-0.5B).
FROM_TOKENS = 2048
# Tokens of a prompt that pass the layers together: their hidden states and features wait in memory, and every further
# thousand tokens read the layers' keys and values before them again. Streamed weights are read as often.
PASSING_TOKENS = {"resident": 2048, "streamed": 8192}


def policy_for(budget: int) -> Policy:
    """A set of `budget` tokens, a quarter more where the head is unsure. Small budgets have small windows."""
    return Policy(budget, budget + budget // 4, n_recent=min(32, budget // 4), n_sinks=min(4, budget // 16))


def kv_sizes(hp: Hyperparameters, context_length: int, budget: int, from_tokens: int, tier: Literal["memory", "disk"],
             head: RetrievalHead | None, weights: Literal["resident", "streamed"]) -> KVSizes:
    policy = policy_for(budget)
    n_slots = slots_for(policy)
    shapes = {RecordShape.full(hp): n_slots, RecordShape.windowed(hp): ring_rows(hp, context_length)}
    shapes = {shape: rows for shape, rows in shapes.items() if shape.layers}
    strides = sum(shape.stride_bytes for shape in shapes)
    tables = 4 * context_length + 16 * n_slots
    waiting = (N_WAITING * strides + 4 * len(shapes) * context_length) if tier == "disk" else 0
    fixed = sum(shape.stride_bytes * rows for shape, rows in shapes.items()) + tables + waiting
    n_features = 1 + (len(head.feature_layers) if head else -1)
    whole_tokens = min(context_length, max(from_tokens, budget))
    return KVSizes(tier, budget, policy.n_beside, policy.n_late, whole_tokens, fixed,
                   selector_bytes_per_token(hp, head), 4 * hp.kv_size, 4 * hp.hidden_size * (1 + n_features),
                   PASSING_TOKENS[weights], BLOCK_TOKENS * strides,
                   _waiting_bytes(hp, head, tier) if weights == "streamed" else 0)


def selector_bytes_per_token(hp: Hyperparameters, head: RetrievalHead | None) -> float:
    """What chooses keeps so much of each token: a head's keys, or its part of the bounds on its page's."""
    return 4 * head.n_groups * head.dim if head else len(page_layers(hp)) * 8 * hp.kv_size / PAGE_TOKENS


def _waiting_bytes(hp: Hyperparameters, head: RetrievalHead | None, tier: Literal["memory", "disk"]) -> int:
    """Of a token of a prompt that passes streamed weights layer by layer: its features, which are kept up to the last
    of their layers, beyond the keys and values of the layers after that, which are not there yet. And its hidden state,
    where a plan does not count that itself (edgert/memory/model.py)."""
    hidden_bytes = 4 * hp.hidden_size
    features = late = 0
    if head is not None:
        features = (1 + len(head.feature_layers)) * hidden_bytes
        late = 4 * hp.kv_size * (hp.n_layers - 1 - max(head.feature_layers))
    return max(0, features - late) + (hidden_bytes if tier == "disk" else 0)

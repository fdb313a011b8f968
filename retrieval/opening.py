"""Opens an engine whose steps attend to a set of tokens, of the sizes that a plan says."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

from edgert.architectures.base import Architecture, Hyperparameters
from edgert.engine.blockwise import BlockwiseGraphs
from edgert.engine.collective import Collective
from edgert.engine.engine import Engine
from edgert.engine.kv_cache import DenseKVCache
from edgert.engine.retrieval_head import RetrievalHead
from edgert.engine.trace import OFF, Trace
from edgert.engine.weights import WeightSource
from edgert.ggml.backend import Backend
from edgert.memory.kv import KVSizes
from retrieval.cache import RetrievedKVCache
from retrieval.choosing import page_layers
from retrieval.engine import RetrievalEngine
from retrieval.selection import Policy
from retrieval.selectors import HeadSelector, PageSelector, Selector
from retrieval.sizes import FROM_TOKENS, policy_for
from retrieval.store import DiskTier, temporary_files
from retrieval.together import FollowingEngine, LeadingEngine

_log = logging.getLogger(__name__)


def open_retrieval(arch: Architecture, weights: WeightSource, dense: DenseKVCache, backend: Backend, sizes: KVSizes,
                   head: RetrievalHead | None, store: Path, *, batch_size: int = 512,
                   graphs: BlockwiseGraphs | None = None, trace: Trace = OFF) -> RetrievalEngine:
    """The engine owns everything that it is given. Raises KVStoreError, NoSpace, OutOfMemory."""
    hp, context_length = arch.hp, dense.context_length
    selector, disk = open_selector(hp, head, context_length), None
    if sizes.tier == "disk":
        disk = DiskTier(backend, hp, context_length, temporary_files(store))
    kv = RetrievedKVCache(backend, hp, dense, selector, _policy(sizes.budget, head),
                           sizes.from_tokens, disk=disk)
    return RetrievalEngine(arch, weights, kv, backend, store=store, batch_size=batch_size, graphs=graphs, trace=trace)


def open_rank(arch: Architecture, weights: WeightSource, kv: DenseKVCache, backend: Backend, collective: Collective,
              budget: int | None, head: RetrievalHead | None, *, batch_size: int = 512,
              graphs: BlockwiseGraphs | None = None, trace: Trace = OFF) -> Engine:
    """One of several devices. Where there is a `budget`, it leads, and chooses so many tokens for each step."""
    if budget is None:
        return FollowingEngine(arch, weights, kv, backend, collective, batch_size=batch_size, graphs=graphs,
                               trace=trace)
    selector = open_selector(arch.hp, head, kv.context_length)
    return LeadingEngine(arch, weights, kv, backend, collective, selector, _policy(budget, head), FROM_TOKENS,
                         batch_size=batch_size, graphs=graphs, trace=trace)


def _policy(budget: int, head: RetrievalHead | None) -> Policy:
    if head is not None:
        return policy_for(budget)
    # Bounds are no distribution that could tell how sure they are; and they are alike for whole pages, so that to
    # hold on to many costs more (SmolLM2 at 8k, held by 0, 0.5, 1 and 2: KL 0.11, 0.12, 0.13 and 0.17, of 2.0,
    # 1.5, 1.0 and 0.6 MB a step).
    return replace(policy_for(budget), least_mass=0.0, hold=1.0)


def open_selector(hp: Hyperparameters, head: RetrievalHead | None, context_length: int) -> Selector:
    """The head's, or, for a model without one, bounds on keys."""
    if head is not None:
        return HeadSelector(head, context_length, hp.hidden_size)
    _log.warning("this model has no retrieval head: bounds on its keys choose the tokens that a step attends to")
    return PageSelector(page_layers(hp), hp.n_kv_heads, hp.head_dim, context_length)

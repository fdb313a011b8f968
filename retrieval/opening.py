"""Opens an engine whose steps attend to a set of tokens, of the sizes that a plan says."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

from edgert.architectures.base import Architecture, Hyperparameters
from edgert.engine.blockwise import BlockwiseGraphs
from edgert.engine.kv_cache import DenseKVCache
from edgert.engine.retrieval_head import RetrievalHead
from edgert.engine.trace import OFF, Trace
from edgert.engine.weights import WeightSource
from edgert.ggml.backend import Backend
from edgert.memory.kv import KVSizes
from retrieval.cache import RetrievedKVCache
from retrieval.choosing import page_layers
from retrieval.engine import RetrievalEngine
from retrieval.selectors import HeadSelector, PageSelector, Selector
from retrieval.sizes import policy_for
from retrieval.store import DiskTier, temporary_files

_log = logging.getLogger(__name__)


def open_retrieval(arch: Architecture, weights: WeightSource, dense: DenseKVCache, backend: Backend, sizes: KVSizes,
                   head: RetrievalHead | None, store: Path, *, batch_size: int = 512,
                   graphs: BlockwiseGraphs | None = None, trace: Trace = OFF) -> RetrievalEngine:
    """The engine owns everything that it is given. Raises KVStoreError, NoSpace, OutOfMemory."""
    hp, context_length = arch.hp, dense.context_length
    selector, disk = open_selector(hp, head, context_length), None
    if sizes.tier == "disk":
        disk = DiskTier(backend, hp, context_length, temporary_files(store))
    policy = policy_for(sizes.budget)
    if head is None:
        # Bounds are no distribution that could tell how sure they are; and they are alike for whole pages, so that to
        # hold on to many costs more (SmolLM2 at 8k, held by 0, 0.5, 1 and 2: KL 0.11, 0.12, 0.13 and 0.17, of 2.0,
        # 1.5, 1.0 and 0.6 MB a step).
        policy = replace(policy, least_mass=0.0, hold=1.0)
    kv = RetrievedKVCache(backend, hp, dense, selector, policy, sizes.from_tokens, disk=disk)
    return RetrievalEngine(arch, weights, kv, backend, store=store, batch_size=batch_size, graphs=graphs, trace=trace)


def open_selector(hp: Hyperparameters, head: RetrievalHead | None, context_length: int) -> Selector:
    """The head's, or, for a model without one, bounds on keys."""
    if head is not None:
        return HeadSelector(head, context_length, hp.hidden_size)
    _log.warning("this model has no retrieval head: bounds on its keys choose the tokens that a step attends to")
    return PageSelector(page_layers(hp), hp.n_kv_heads, hp.head_dim, context_length)

"""The implementations of each seam, for the contract suites: a new one is one line here, and is tested."""

from __future__ import annotations

import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgert.architectures.base import Architecture, Hyperparameters
from edgert.architectures.registry import open_architecture
from edgert.engine.batch import Batch
from edgert.engine.collective import Collective, Solo
from edgert.engine.engine import Engine
from edgert.engine.kv_cache import DenseKVCache, KVCache
from edgert.engine.layouts import LayoutChoice, choose_layouts
from edgert.engine.resident import ResidentWeights
from edgert.engine.weights import WeightSource
from edgert.ggml.backend import Backend
from edgert.gguf.model_file import ModelFile
from offload.arena import Arena
from offload.embedding import EmbeddingRows
from offload.expert_layout import PoolShape, split_experts
from offload.residency import Residency, block_bytes, cut
from offload.window import WindowWeights
from retrieval.cache import RetrievedKVCache
from retrieval.hot import HotKVCache
from retrieval.masked import MaskedKVCache
from retrieval.selection import Policy
from retrieval.selectors import PageSelector
from retrieval.staged import LayerFile, StagedKVCache
from tensorpar.collectives import Algorithm, Group, Network
from tensorpar.link import Link

_BATCH_SIZE = 64  # the largest that the tests use


def _resident(layout: LayoutChoice) -> Callable[[Backend, ModelFile, Architecture], WeightSource]:
    def open_source(backend: Backend, model: ModelFile, arch: Architecture) -> WeightSource:
        types = frozenset(one.type.id for one in model.tensors.values() if len(one.shape) > 1)
        return ResidentWeights(backend, model, arch, choose_layouts(layout, backend, types, Path("never read")))

    return open_source


def _window(backend: Backend, model: ModelFile, arch: Architecture) -> WeightSource:
    """Every matrix streams, through a window of about two blocks."""
    pieces = cut(model, arch)
    pinned = tuple(piece for piece in pieces if piece.spec.use == "vector")
    streamed = tuple(piece for piece in pieces if piece.spec.use != "vector")
    residency = Residency(tuple(pieces), pinned, 2 * max(block_bytes(streamed).values()))
    arena = Arena(residency.pinned_bytes + residency.window_bytes + EmbeddingRows.arena_bytes(model, _BATCH_SIZE))
    return WindowWeights(backend, model, arch, residency, arena, n_threads=2, batch_size=_BATCH_SIZE)


def _experts(backend: Backend, model: ModelFile, arch: Architecture) -> WeightSource:
    """Everything but experts is pinned; experts come one by one, into slots for half of them. (Dense: all pinned.)"""
    static, experts = split_experts(cut(model, arch))
    residency = Residency(tuple(static), tuple(static), 0)
    pool = (PoolShape.of(experts), arch.hp.n_layers * arch.hp.n_experts // 2) if experts else None
    arena = Arena(residency.pinned_bytes + EmbeddingRows.arena_bytes(model, _BATCH_SIZE)
                  + (pool[1] * pool[0].slot_bytes if pool else 0))
    return WindowWeights(backend, model, arch, residency, arena, n_threads=2, batch_size=_BATCH_SIZE, pool=pool)


WEIGHT_SOURCES: dict[str, Callable[[Backend, ModelFile, Architecture], WeightSource]] = {
    "resident, plain": _resident("plain"),
    "resident, repacked": _resident("repack"),
    "window": _window,
    "experts": _experts,
}
DENSE_KV_CACHES: dict[str, Callable[[Backend, Hyperparameters, int], DenseKVCache]] = {
    "dense f16": lambda backend, hp, context_length: DenseKVCache(backend, hp, context_length, "f16"),
    "dense q8_0": lambda backend, hp, context_length: DenseKVCache(backend, hp, context_length, "q8_0"),
}


class _OwningMasked(MaskedKVCache):
    """Everything is visible, and the dense cache goes with it."""

    def close(self) -> None:
        self._dense.close()


class _OwningStaged(StagedKVCache):
    def close(self) -> None:
        super().close()
        self._file.close()


def _staged(backend: Backend, hp: Hyperparameters, context_length: int) -> KVCache:
    file = LayerFile(Path(tempfile.gettempdir()), hp, context_length)
    return _OwningStaged(backend, hp, context_length, file, lambda layer, start, keys: None, frozenset())


def _retrieved(backend: Backend, hp: Hyperparameters, context_length: int) -> KVCache:
    pages = PageSelector(frozenset({0}), hp.n_kv_heads, hp.head_dim, context_length)
    return RetrievedKVCache(backend, hp, DenseKVCache(backend, hp, context_length), pages, Policy(64), context_length)


# Each may hold as many tokens as the context has: then attention is that of a dense cache.
KV_CACHES: dict[str, Callable[[Backend, Hyperparameters, int], KVCache]] = {
    **DENSE_KV_CACHES,
    "hot": lambda backend, hp, context_length: HotKVCache(backend, hp, context_length, context_length + 64),
    "masked": lambda backend, hp, context_length: _OwningMasked(DenseKVCache(backend, hp, context_length), hp,
                                                                frozenset({0})),
    "staged": _staged,
    "retrieved": _retrieved,
}


def begin_pass(kv: KVCache, batch: Batch) -> None:
    """What the owner of a cache tells it before a batch passes the layers."""
    if isinstance(kv, HotKVCache):
        assert not len(kv.prepare(np.arange(batch.start, dtype=np.int64), batch).missing)
    elif isinstance(kv, StagedKVCache):
        kv.start, kv.end = batch.start, batch.end


def _group(n_ranks: int, algorithm: Algorithm | None) -> Callable[[], list[Collective]]:
    """Ranks of one process, every two of them connected by a pair of sockets."""
    def connect() -> list[Collective]:
        links: list[dict[int, Link]] = [{} for _ in range(n_ranks)]
        for a, b in combinations(range(n_ranks), 2):
            ends = socket.socketpair()
            links[a][b], links[b][a] = Link(ends[0], b), Link(ends[1], a)
        network = Network(latency_s=1e-4, bytes_per_s=1e9, is_mesh=True)
        return [Group(rank, n_ranks, links[rank], network=network, algorithm=algorithm) for rank in range(n_ranks)]

    return connect


# For each rank of a group of one or more, in rank order.
COLLECTIVES: dict[str, Callable[[], list[Collective]]] = {
    "solo": lambda: [Solo()],
    "star of 2": _group(2, "star"),
    "star of 4": _group(4, "star"),
    "one-shot of 2": _group(2, "one-shot"),
    "one-shot of 3": _group(3, "one-shot"),
    "scatter of 2": _group(2, "scatter"),
    "scatter of 3": _group(3, "scatter"),
    "chosen of 3": _group(3, None),
}
# A weight source, and whether the whole model is one graph.
ENGINES: dict[str, tuple[str, bool | None]] = {
    "fused": ("resident, plain", True),
    "block by block": ("resident, plain", False),
    "window": ("window", None),
    "experts": ("experts", None),
}


@contextmanager
def open_engine(name: str, path: Path, *, context_length: int = 512, batch_size: int = _BATCH_SIZE,
                kv_cache: str = "dense f16", collective: Collective | None = None) -> Iterator[Engine]:
    """The engine `name` of ENGINES over the model at `path`."""
    source, fused = ENGINES[name]
    file = ModelFile.open(path)
    arch, backend = open_architecture(file), Backend(1)
    kv = DENSE_KV_CACHES[kv_cache](backend, arch.hp, context_length)
    engine = Engine(arch, WEIGHT_SOURCES[source](backend, file, arch), kv, backend, collective=collective,
                    batch_size=batch_size, fused=fused)
    try:
        yield engine
    finally:
        engine.close()


def token_ids(n_tokens: int, seed: int = 0, vocab_size: int = 300) -> NDArray[np.int32]:
    return np.random.default_rng(seed).integers(0, vocab_size, n_tokens, dtype=np.int32)

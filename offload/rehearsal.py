"""How long a model's pass of one token takes here, before its weights are in memory: its own graphs over other memory.

The engine's loop runs over blocks of the model's shapes and types that lie, round and round, in memory which no cache
holds whole. So products, small operations, threads that meet after each, Python between graphs, and the bookkeeping
of experts cost what they will cost. Experts that are missed are read from the file while others compute, for what such
a read takes is no matter of bandwidth: 2.6 MiB that the disk has in 0.7 ms, a layer waits 2.5 ms for.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, replace
from statistics import median

import numpy as np

from edgert.architectures.base import Architecture
from edgert.cpu import largest_cache_bytes
from edgert.engine.batch import Batch
from edgert.engine.blockwise import BlockwiseGraphs
from edgert.engine.collective import Solo
from edgert.engine.engine import forward
from edgert.engine.expert_segments import ExpertSegments
from edgert.engine.fused import FusedGraphs
from edgert.engine.kv_cache import DenseKVCache, KVType
from edgert.ggml.abi import TYPE_F32
from edgert.ggml.backend import Backend
from edgert.gguf.model_file import ModelFile
from edgert.memory.profile import Rehearsal
from edgert.memory.shape import ModelShape
from edgert.neighbours import Neighbours
from offload.arena import Arena
from offload.direct_file import ALIGN_BYTES
from offload.expert_layout import PoolShape, split_experts
from offload.experts import ExpertPool
from offload.residency import Piece, cut
from offload.stage import AnyMatrix, Stage, StagedBlocks, aligned

# Memory that is gone round, in largest caches: with 2, a part is still found there, and a token of a model with experts
# took 23.6 ms instead of 25.9. The least that tells anything, and the most.
_RING_CACHES, _LEAST_RING_BYTES, _MOST_RING_BYTES = 8, 64 * 2**20, 512 * 2**20
# Tokens in the cache: attention costs more for each of the first than of later ones, which its threads share; and more
# again once a layer's keys and values, which each head reads, exceed a core's cache (of 1 MiB, with 4096 tokens).
_N_CACHED, _N_CELLS = (0, 255, 1023, 4095), 4096
# Some passes, of which the first, which builds graphs, does not count; of long ones, of fewer passes with
# fewer lengths, so that all of it takes some 3 s.
_LEAST_PASSES, _PASSES_S, _MOST_PASSES_S = 3, 0.25, 0.5
_SLOW_S, _FEW_CACHED = 0.1, (0, 1023)
LONG_S = 0.3
_LAYERS_TO_A_MISS = 4


@dataclass(frozen=True, slots=True)
class _Cast:
    """What a rehearsal is of."""

    backend: Backend
    model: ModelFile
    arch: Architecture
    pieces: Sequence[Piece]
    shape: ModelShape
    kv_type: KVType
    weights: Stage
    cells: Stage


def rehearse(backend: Backend, model: ModelFile, arch: Architecture, pieces: Sequence[Piece], shape: ModelShape,
             kv_type: KVType, most_bytes: int) -> Rehearsal | None:
    """The model's pass of one token, timed. None where it would hold more than `most_bytes`, which is the largest
    tensor and two rings, or take long: a pass of half a second has little beside its products."""
    vectors, others = ([t.n_bytes for t in model.tensors.values() if (len(t.shape) == 1) == is_vector]
                       for is_vector in (True, False))
    cells_bytes = _N_CELLS * shape.kv_bytes_per_token
    room_bytes = (most_bytes - max(others) - cells_bytes // (2 * shape.n_layers)) // 2
    ring_bytes = min(_MOST_RING_BYTES, max(_LEAST_RING_BYTES, _RING_CACHES * largest_cache_bytes()),
                     room_bytes // ALIGN_BYTES * ALIGN_BYTES)
    if ring_bytes < _LEAST_RING_BYTES:
        return None
    sizes = min(ring_bytes, aligned(model.file_bytes)), max(others), max(vectors, default=ALIGN_BYTES)
    # Cells on a stage of their own: what a pass writes there must not become the next one's weights.
    with closing(Stage(backend, min(ring_bytes, aligned(cells_bytes)), cells_bytes // (2 * shape.n_layers),
                       huge_pages=False)) as cells:
        try:
            with closing(Stage(backend, *sizes)) as weights:
                cast = _Cast(backend, model, arch, pieces, shape, kv_type, weights, cells)
                empty_s = _blocks_s(cast, 0)
                lengths = (_FEW_CACHED if empty_s > _SLOW_S else _N_CACHED)[1:]
                attend_s = {0: 0.0, **{n: max(0.0, _blocks_s(cast, n) - empty_s) for n in lengths}}
                misses_s = _misses(cast, empty_s) if shape.n_experts else {}
            with closing(Stage(backend, *sizes, huge_pages=False)) as weights:  # as a file is mapped: 10 % slower
                fused_s = _fused_s(replace(cast, weights=weights))
        except _TakesLong:
            return None
    return Rehearsal(fused_s, empty_s, attend_s, misses_s)


class _TakesLong(Exception):
    """The rehearsal would cost more than it tells."""


def _misses(cast: _Cast, found_s: float) -> dict[int, float]:
    """What misses add to a pass: one in some layers, in every layer, and all. Few may cost next to nothing where many
    wait for the disk's bandwidth; what a slow disk makes too long, is left out. Nothing where that is all."""
    n_layers, n_used = cast.shape.n_layers, cast.shape.n_experts_used
    misses_s = {0: 0.0}
    with suppress(_TakesLong):
        for n_missed in sorted({max(1, n_layers // _LAYERS_TO_A_MISS), n_layers, n_layers * n_used}):
            misses_s[n_missed] = max(*misses_s.values(), _blocks_s(cast, 0, n_missed) - found_s)
    return misses_s if len(misses_s) > 1 else {}


def _blocks_s(cast: _Cast, n_cached: int, n_missed: int = 0) -> float:
    """A pass over block graphs in which so many experts are missed: none, one in some layers or in each, or all."""
    with ExitStack() as opened:
        kv = _cache(cast, opened)
        graphs = BlockwiseGraphs(cast.backend, cast.arch, kv)
        opened.callback(graphs.close)
        pool = _pool(cast, opened)
        blocks = StagedBlocks(cast.backend, cast.pieces, cast.model, cast.weights, pool,
                         _by_layer(cast.shape.n_layers, n_missed))
        opened.callback(blocks.close)
        segments = ExpertSegments(cast.backend, cast.arch, kv)
        opened.callback(segments.close)
        batch, arch = _token_after(n_cached), cast.arch
        if pool is not None:
            return _typical(lambda: segments.run(batch, blocks,
                                                 lambda state: forward([state], arch, state, kv, Solo())))
        return _typical(lambda: graphs.run([batch], lambda states: forward(states, arch, blocks, kv, Solo())))


def _by_layer(n_layers: int, n_missed: int) -> dict[int, int]:
    """Misses of each layer, evenly spread."""
    return {layer: (layer + 1) * n_missed // n_layers - layer * n_missed // n_layers for layer in range(n_layers)}


def _fused_s(cast: _Cast) -> float:
    """A pass over one graph of the whole model, an empty cache."""
    with ExitStack() as opened:
        kv = _cache(cast, opened)
        graphs = FusedGraphs(cast.backend, cast.arch, kv)
        opened.callback(graphs.close)
        blocks = StagedBlocks(cast.backend, cut(cast.model, cast.arch, is_whole=True), cast.model, cast.weights)
        opened.callback(blocks.close)
        batch = _token_after(0)
        return _typical(lambda: graphs.run(batch, lambda states: forward(states, cast.arch, blocks, kv, Solo())))


def _token_after(n_cached: int) -> Batch:
    return Batch(np.zeros(1, np.int32), n_cached)


def _typical(run: Callable[[], object]) -> float:
    """Seconds of a run, after one that builds graphs: the median; where other programs compute, the least. Raises
    _TakesLong."""
    run()
    others, times = Neighbours(), list[float]()
    while len(times) < 2 or sum(times) < (_PASSES_S if len(times) >= _LEAST_PASSES else _MOST_PASSES_S):
        before = time.perf_counter()
        run()
        times.append(time.perf_counter() - before)
        if len(times) > 1 and min(times) > LONG_S:
            raise _TakesLong
    return min(times) if others.disturb else median(times)


def _cache(cast: _Cast, opened: ExitStack) -> DenseKVCache:
    """K and V on the stage, as full of values as if tokens had left them."""
    kv = DenseKVCache(cast.backend, cast.arch.hp, _N_CELLS, cast.kv_type)
    opened.callback(kv.close)
    for tensor in (tensor for pair in zip(kv.k, kv.v, strict=True) for tensor in pair):
        cast.cells.place(tensor)
    return kv


def _pool(cast: _Cast, opened: ExitStack) -> ExpertPool | None:
    """A pool for the model's experts, each matrix a page: the bookkeeping is that of real ones. With room for all that
    are used."""
    hp, (_, experts) = cast.arch.hp, split_experts(cast.pieces)
    if not experts:
        return None
    small = [replace(piece, type_id=TYPE_F32, shape=(ALIGN_BYTES // 4, 1, hp.n_experts), part=0, offset=0,
                     n_bytes=ALIGN_BYTES * hp.n_experts) for piece in experts]
    n_slots = hp.n_experts_used * hp.n_layers
    shape = PoolShape.of(small)
    arena = Arena(n_slots * shape.slot_bytes)
    opened.callback(arena.close)
    buffer = cast.backend.wrap(arena.base, arena.size_bytes)
    opened.callback(buffer.close)
    file = AnyMatrix(cast.model.parts[experts[0].part], max(piece.n_bytes // piece.shape[2] for piece in experts))
    opened.callback(file.close)
    pool = ExpertPool(shape, hp, n_slots, arena, buffer, [file], lambda: False)
    opened.callback(pool.close, arena)
    return pool

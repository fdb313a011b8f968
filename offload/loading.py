"""What everything but weights takes, measured before a weight is read; and opening weights of the planned sizes.

The process, and the compute buffers, which ggml lays out for graphs of the largest shapes without weights. How much
is pinned, how wide the window is and how many experts have a slot, the plan says (edgert/memory/planner.py).
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgert.architectures.base import Architecture, Block, Weights
from edgert.engine.batch import MAX_DECODE_TOKENS, Batch, Phase
from edgert.engine.blockwise import MAX_GRAPHS, PART_TOKENS, BlockwiseGraphs
from edgert.engine.collective import Solo
from edgert.engine.engine import forward
from edgert.engine.expert_segments import ExpertSegments
from edgert.engine.fused import FusedGraphs
from edgert.engine.kv_cache import CELLS_PER_BUCKET, DenseKVCache
from edgert.engine.trace import OFF, Trace
from edgert.engine.weights import Experts
from edgert.ggml.backend import Backend
from edgert.ggml.graph import Context, Tensor
from edgert.gguf.model_file import ModelFile
from edgert.memory.planner import Plan
from edgert.memory.probe import MemoryProbe
from edgert.memory.shape import Overheads
from offload.arena import HUGE_PAGE_BYTES, Arena
from offload.direct_file import forget_cached
from offload.embedding import EmbeddingRows
from offload.expert_layout import PoolShape, split_experts
from offload.residency import Piece, Residency, always_pinned, block_bytes, choose, cut, n_parts
from offload.window import WindowWeights, by_block

# What the process still grows by after its weights are placed: stacks of readers and of compute threads (1 MiB), the
# template engine (2 MiB), what Python and the C library keep. 114 graphs with their Python objects took 3 MiB.
_GROWTH_BYTES, _GRAPH_BYTES = 5 * 2**20, 32 * 2**10
# Those of a prompt's experts, with the gaps that they leave in the heap: 10 MiB after ten prompts of 3 to 984 tokens.
_EXPERT_GRAPH_BYTES = 80 * 2**10
# The kernel reads ahead this far behind a header, more than any disk's read_ahead_kb that we have seen.
_READAHEAD_BYTES = 32 * 2**20
_log = logging.getLogger(__name__)


class Headers:
    """A WeightSource without weights: shapes and types, for graphs that are only measured."""

    resident, stay = False, True

    def __init__(self, backend: Backend, pieces: Sequence[Piece], model: ModelFile, batch_size: int,
                 n_slots: int = 1, *, are_whole: bool = False) -> None:
        """Experts in `n_slots` slots; where blocks `are_whole`, with their layers."""
        self._context = Context(len(pieces) + 1)
        # Placed where nothing is ever read: the allocator must only not give them memory of its own.
        self._buffer = backend.wrap(HUGE_PAGE_BYTES, HUGE_PAGE_BYTES)
        pieces, experts = (pieces, []) if are_whole else split_experts(pieces)
        self.experts: Experts | None = _AnyExperts({
            layer: {piece.spec.key: self._tensor(piece.type_id, (*piece.shape[:2], n_slots)) for piece in of_layer}
            for layer, of_layer in _by_layer(experts).items()}) if experts else None
        tensors = {piece: self._tensor(piece.type_id, piece.shape) for piece in pieces}
        self._blocks = {block: {piece.spec.key: tensors[piece] for piece in of_block}
                        for block, of_block in by_block(pieces).items()}
        self.n_output_parts, self.n_ffn_parts = n_parts([*self._blocks])
        info = model.tensors[EmbeddingRows.key]
        self._table = self._tensor(info.type.id, (info.shape[0], batch_size))

    def _tensor(self, type_id: int, shape: tuple[int, ...]) -> Tensor:
        tensor = self._context.tensor(type_id, shape)
        tensor.struct.data, tensor.struct.buffer = HUGE_PAGE_BYTES, self._buffer.handle
        return tensor

    @contextmanager
    def lease_embedding(self, token_ids: NDArray[np.int32],
                        phase: Phase) -> Iterator[tuple[Weights, NDArray[np.int32]]]:
        yield {EmbeddingRows.key: self._table}, token_ids

    @contextmanager
    def lease(self, block: Block, phase: Phase) -> Iterator[Weights]:
        yield self._blocks[block]

    def close(self) -> None:
        self._context.close()
        self._buffer.close()


class _AnyExperts:
    """Experts that nobody reads."""

    holds_a_layer = True

    def __init__(self, layers: Mapping[int, Weights]) -> None:
        self._layers = layers

    def request(self, layer: int, last_use: Mapping[int, int]) -> None:
        """Nothing moves."""

    def expect(self, layer: int, experts: Sequence[int]) -> None:
        """Nor here."""

    def waves(self, layer: int, last_use: Mapping[int, int]) -> Iterator[Mapping[int, int]]:
        yield dict.fromkeys(last_use, 0)

    def weights(self, layer: int) -> Weights:
        return self._layers[layer]

    def release(self) -> None:
        """Nothing is held."""

    def hit_curve(self) -> None:
        """Nothing is learnt."""


def measure_overheads(backend: Backend, model: ModelFile, arch: Architecture, kv: DenseKVCache,
                      graphs: BlockwiseGraphs, pieces: Sequence[Piece], *, batch_size: int, n_logits: int = 1,
                      is_shard: bool = False, probe: MemoryProbe, budget_bytes: int) -> Overheads:
    """Everything but weights and KV, for a full context of `kv` and steps that want up to `n_logits` rows of logits.
    Shards never compute as one graph, and always in the smallest parts."""
    headers = Headers(backend, pieces, model, batch_size, _most_slots(pieces, arch, budget_bytes))
    n_tokens, compute_bytes, prompt_bytes = min(batch_size, kv.context_length), dict[int, int](), 0
    parts = PART_TOKENS[-1:] if is_shard else PART_TOKENS[:1] if arch.hp.n_experts else PART_TOKENS
    graphs.is_alone = not is_shard
    try:
        fused_bytes = 0 if is_shard else _fused_bytes(backend, model, arch, kv, n_tokens, n_logits)
        for part_tokens in parts:
            graphs.part_tokens = part_tokens
            most = max(part.n_tokens for part in graphs.in_parts([Batch(np.zeros(n_tokens, np.int32), 0)]))
            compute_bytes[part_tokens] = graphs.reserve(_largest(most, n_logits, kv),
                                                        lambda states: forward(states, arch, headers, kv, Solo()))
        if arch.hp.n_experts and not is_shard:
            segments_bytes, prompt_bytes = _segments_bytes(backend, arch, kv, headers), graphs.own_bytes
            compute_bytes = {part: n_bytes + segments_bytes for part, n_bytes in compute_bytes.items()}
    finally:
        headers.close()
    for path, data_start in zip(model.parts, model.data_starts, strict=True):
        forget_cached(path, data_start + _READAHEAD_BYTES)
    return Overheads(_process_bytes(probe, budget_bytes), _growth_bytes(arch, kv.context_length, n_logits),
                     compute_bytes, fused_bytes or max(compute_bytes.values()),
                     EmbeddingRows.bytes_needed(model, batch_size, kv.context_length), batch_size, prompt_bytes)


def open_window(backend: Backend, model: ModelFile, arch: Architecture, pieces: Sequence[Piece], plan: Plan, *,
                trace: Trace = OFF) -> WindowWeights:
    """Weights of the plan's sizes, at the stage with the shortest context. Raises ModelFileError, OutOfMemory."""
    static, experts = split_experts(pieces)
    residency = choose(static, plan.stages[0].pinned_bytes, plan.sizes.window_bytes,
                       [stage.pinned_bytes for stage in plan.stages[1:]])
    pool = (PoolShape.of(experts), plan.stages[0].token_slots) if experts else None
    pool_bytes = pool[1] * pool[0].slot_bytes if pool else 0
    _log_plan(residency, plan, pool_bytes)
    spare_bytes = spare_window_bytes(residency)
    arena = Arena(residency.pinned_bytes + residency.window_bytes + EmbeddingRows.arena_bytes(model, plan.batch_size)
                  + pool_bytes, spare_bytes)
    return WindowWeights(backend, model, arch, residency, arena, batch_size=plan.batch_size,
                         context_length=plan.context_length, trace=trace, pool=pool, spare_window_bytes=spare_bytes)


def spare_window_bytes(residency: Residency) -> int:
    """Where all is pinned, and may have to stream: two blocks, and the gap that a ring leaves, as far as there is no
    window that holds them."""
    if residency.streamed:
        return 0
    large = [piece for piece in residency.pieces if not always_pinned(piece)]
    wanted = 2 * max(block_bytes(large).values(), default=0) + max((piece.slot_bytes for piece in large), default=0)
    return max(0, wanted - residency.window_bytes)


def _fused_bytes(backend: Backend, model: ModelFile, arch: Architecture, kv: DenseKVCache, n_tokens: int,
                 n_logits: int) -> int:
    """Compute buffers of the whole model in one graph."""
    pieces = cut(model, arch, is_whole=True)
    whole, fused = Headers(backend, pieces, model, n_tokens, are_whole=True), FusedGraphs(backend, arch, kv)
    try:
        return fused.reserve(_largest(n_tokens, n_logits, kv), lambda states: forward(states, arch, whole, kv, Solo()))
    finally:
        fused.close()
        whole.close()


def _segments_bytes(backend: Backend, arch: Architecture, kv: DenseKVCache, headers: Headers) -> int:
    """Compute buffers of single tokens, where only experts are awaited."""
    segments = ExpertSegments(backend, arch, kv)
    try:
        segments.prepare(Batch(np.zeros(1, np.int32), kv.context_length - 1), headers,
                         lambda state: forward([state], arch, state, kv, Solo()))
        return segments.compute_bytes
    finally:
        segments.close()


def _largest(n_tokens: int, n_logits: int, kv: DenseKVCache) -> list[Batch]:
    """Batches at the end of the context: of prefill, of decode, and of guesses that are verified."""
    sizes = {n_tokens: 1, **{n: min(n, n_logits) for n in (min(n_tokens, MAX_DECODE_TOKENS), min(n_tokens, n_logits))}}
    return [Batch(np.zeros(n, np.int32), kv.context_length - n, n_rows) for n, n_rows in sizes.items()]


def _most_slots(pieces: Sequence[Piece], arch: Architecture, budget_bytes: int) -> int:
    experts = split_experts(pieces)[1]
    if not experts:
        return 1
    return min(arch.hp.n_layers * arch.hp.n_experts, budget_bytes // PoolShape.of(experts).slot_bytes + 1)


def _growth_bytes(arch: Architecture, context_length: int, n_logits: int) -> int:
    """What comes once a prompt fills the context: graphs for prefill, for decode and for two shapes that verify guesses
    (one every CELLS_PER_BUCKET tokens in each), two kinds of layers."""
    n_kinds = 4 if n_logits > 1 else 2
    n_graphs = 12 * n_kinds + 8 + 2 * n_kinds * context_length // CELLS_PER_BUCKET
    if arch.hp.n_experts:  # every size of a wave. A token's own were made once: the process holds their memory already.
        return _GROWTH_BYTES + MAX_GRAPHS * _EXPERT_GRAPH_BYTES
    return _GROWTH_BYTES + min(MAX_GRAPHS, n_graphs) * _GRAPH_BYTES


def _process_bytes(probe: MemoryProbe, budget_bytes: int) -> int:
    """What the process has taken already. In a control group about the budget's size, what the group is charged:
    pages of libraries and of the file's header count there."""
    resident, group = probe.process_bytes(), probe.control_group()
    if group is None or group.limit_bytes > 1.25 * budget_bytes:
        return resident
    # What was read ahead of libraries and modules, and is not used: 20 MiB from a cold cache, the more the larger the
    # limit, so that a budget would look too small only because it was larger than the one before.
    for path in [*probe.mapped_files(), *_module_files()]:
        forget_cached(path)
    return max(resident, (probe.control_group() or group).usage_bytes)


def _module_files() -> list[Path]:
    """What Python has read of its modules' code."""
    files = [getattr(module, "__cached__", None) for module in [*sys.modules.values()]]
    return [Path(file) for file in files if isinstance(file, str)]


def _by_layer(pieces: Sequence[Piece]) -> dict[int, list[Piece]]:
    layers: dict[int, list[Piece]] = {}
    for piece in pieces:
        layers.setdefault(piece.block.layer, []).append(piece)
    return layers


def _log_plan(residency: Residency, plan: Plan, pool_bytes: int) -> None:
    figures = {"budget": plan.budget_bytes, "kv": plan.kv_bytes, "pinned": residency.pinned_bytes,
               "pinned_when_full": plan.sizes.pinned_bytes, "window": residency.window_bytes,
               "streamed_per_pass": residency.streamed_bytes, "experts": pool_bytes}
    _log.info("plan: %s", ", ".join(f"{name} {n_bytes / 2**20:.1f} MiB" for name, n_bytes in figures.items()))

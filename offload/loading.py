"""Fitting a model into a budget: what everything but weights takes, then a window over the rest.

The budget is for the whole process. What the process, the KV cache and the compute buffers take is measured, not
guessed: graphs of the largest shapes are laid out before the first byte of a weight is read.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from edgert.architectures.base import OUTPUT, Architecture, Block, Weights
from edgert.engine.batch import MAX_DECODE_TOKENS, Batch, Phase
from edgert.engine.blockwise import MAX_GRAPHS, PART_TOKENS, BlockwiseGraphs
from edgert.engine.collective import Solo
from edgert.engine.engine import forward
from edgert.engine.expert_graphs import Choice
from edgert.engine.kv_cache import CELLS_PER_BUCKET, DenseKVCache
from edgert.engine.trace import OFF, Trace
from edgert.errors import BudgetTooSmall
from edgert.ggml.backend import Backend
from edgert.ggml.graph import Context, Tensor
from edgert.gguf.model_file import ModelFile
from edgert.memory.probe import MemoryProbe
from offload.arena import HUGE_PAGE_BYTES, Arena
from offload.direct_file import forget_cached
from offload.embedding import EmbeddingRows
from offload.experts import PoolShape, least_slots, split_experts
from offload.residency import Piece, Residency, choose, cut
from offload.window import WindowWeights

# What the process still grows by after its weights are placed: stacks of readers and of compute threads (1 MiB), the
# template engine (2 MiB), what Python and the C library keep. A graph takes 50 KiB with its Python objects.
_GROWTH_BYTES, _GRAPH_BYTES = 5 * 2**20, 64 * 2**10
# What compute buffers may take of the budget before batches are computed in smaller parts.
_COMPUTE_SHARE = 0.12
# The kernel reads ahead this far behind a header, more than any disk's read_ahead_kb that we have seen.
_READAHEAD_BYTES = 32 * 2**20
_log = logging.getLogger(__name__)


class Headers:
    """A WeightSource without weights: shapes and types, for graphs that are only measured."""

    resident = False

    def __init__(self, backend: Backend, pieces: Sequence[Piece], model: ModelFile, batch_size: int,
                 n_slots: int = 1) -> None:
        self._context = Context(len(pieces) + 1)
        # Placed where nothing is ever read: the allocator must only not give them memory of its own.
        self._buffer = backend.wrap(HUGE_PAGE_BYTES, HUGE_PAGE_BYTES)
        self._blocks: dict[Block, dict[str, Tensor]] = {}
        pieces, experts = split_experts(pieces)
        self.experts = _AnyExperts({
            layer: {piece.spec.key: self._tensor(piece.type_id, (*piece.shape[:2], n_slots)) for piece in of_layer}
            for layer, of_layer in _by_layer(experts).items()}) if experts else None
        for piece in pieces:
            self._blocks.setdefault(piece.block, {})[piece.spec.key] = self._tensor(piece.type_id, piece.shape)
        for block, weights in self._blocks.items():
            if block.kind == "output":
                for key in ("output_norm.weight",):
                    weights.setdefault(key, self._blocks[OUTPUT][key])
        self.n_output_parts = sum(block.kind == "output" for block in self._blocks)
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

    def hint(self, blocks: Sequence[Block]) -> None:
        """Nothing moves."""

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

    def waves(self, layer: int, last_use: Mapping[int, int]) -> Iterator[Mapping[int, int]]:
        yield dict.fromkeys(last_use, 0)

    def weights(self, layer: int) -> Weights:
        return self._layers[layer]

    def release(self) -> None:
        """Nothing is held."""


def open_window(backend: Backend, model: ModelFile, arch: Architecture, kv: DenseKVCache, graphs: BlockwiseGraphs,
                budget_bytes: int, *, batch_size: int, n_logits: int = 1, probe: MemoryProbe,
                trace: Trace = OFF) -> WindowWeights:
    """Weights within `budget_bytes` for the whole process, for steps that want up to `n_logits` rows of logits. Raises
    BudgetTooSmall before any weight is read."""
    pieces = cut(model, arch)
    static, experts = split_experts(pieces)
    shape = PoolShape.of(experts) if experts else None
    most_slots = min(arch.hp.n_layers * arch.hp.n_experts, budget_bytes // shape.slot_bytes + 1) if shape else 1
    compute_bytes = _reserve(backend, pieces, model, arch, kv, graphs, batch_size, n_logits, budget_bytes,
                             most_slots)
    for path, data_start in zip(model.parts, model.data_starts, strict=True):
        forget_cached(path, data_start + _READAHEAD_BYTES)
    fixed_bytes = (_process_bytes(probe, budget_bytes) + _growth_bytes(arch, kv.context_length, n_logits)
                   + kv.size_bytes + compute_bytes + EmbeddingRows.bytes_needed(model, batch_size))
    later_tokens = max(0, kv.context_length - batch_size)
    residency, pool = _share_out(static, shape, arch, budget_bytes, fixed_bytes, later_tokens)
    _log_plan(residency, budget_bytes, fixed_bytes, compute_bytes, kv.size_bytes, pool)
    arena = Arena(residency.pinned_bytes + residency.window_bytes + EmbeddingRows.arena_bytes(model, batch_size)
                  + (pool[1] * pool[0].slot_bytes if pool else 0))
    return WindowWeights(backend, model, arch, residency, arena, batch_size=batch_size, trace=trace, pool=pool)


def _share_out(static: Sequence[Piece], shape: PoolShape | None, arch: Architecture, budget_bytes: int,
               fixed_bytes: int, later_tokens: int) -> tuple[Residency, tuple[PoolShape, int] | None]:
    """Experts get what is left when everything else is pinned, or as little as works while something else streams."""
    if shape is None:
        return choose(static, budget_bytes - fixed_bytes, budget_bytes, fixed_bytes), None
    fitting, refusals = [], list[BudgetTooSmall]()
    # A pool for less than a layer has all batches of a prompt keep their experts' outputs at the same time.
    for least, kept_bytes in ((arch.hp.n_experts, 0), (least_slots(arch.hp), Choice.size_bytes(arch.hp, later_tokens))):
        taken_bytes = fixed_bytes + kept_bytes + least * shape.slot_bytes
        try:
            residency = choose(static, budget_bytes - taken_bytes, budget_bytes, taken_bytes)
        except BudgetTooSmall as refusal:
            refusals.append(refusal)
            continue
        left_bytes = budget_bytes - taken_bytes - residency.pinned_bytes - residency.window_bytes
        n_slots = min(least + left_bytes // shape.slot_bytes, arch.hp.n_layers * arch.hp.n_experts)
        fitting.append((residency, (shape, n_slots)))
        if not residency.streamed:
            break
    if not fitting:
        raise min(refusals, key=lambda refusal: refusal.smallest_bytes)
    return fitting[-1]


def _reserve(backend: Backend, pieces: Sequence[Piece], model: ModelFile, arch: Architecture, kv: DenseKVCache,
             graphs: BlockwiseGraphs, batch_size: int, n_logits: int, budget_bytes: int, n_slots: int) -> int:
    """Choose how many tokens are computed at once, and allocate what the largest shapes need. Bytes."""
    headers = Headers(backend, pieces, model, batch_size, n_slots)
    n_tokens = min(batch_size, kv.context_length)
    compute_bytes = 0
    try:
        for part_tokens in PART_TOKENS:
            graphs.part_tokens = part_tokens
            most = max(part.n_tokens for part in graphs.in_parts([Batch(np.zeros(n_tokens, np.int32), 0)]))
            sizes = {most: 1, **{n: min(n, n_logits) for n in (min(most, MAX_DECODE_TOKENS), min(most, n_logits))}}
            largest = [Batch(np.zeros(n, np.int32), kv.context_length - n, n_rows) for n, n_rows in sizes.items()]
            compute_bytes = graphs.reserve(largest, lambda states: forward(states, arch, headers, Solo()))
            if arch.hp.n_experts or compute_bytes <= _COMPUTE_SHARE * budget_bytes:
                break
        return compute_bytes
    finally:
        headers.close()


def _growth_bytes(arch: Architecture, context_length: int, n_logits: int) -> int:
    """What comes beside the compute buffers once a prompt fills the context: the hidden states of all its batches,
    and graphs for prefill, for decode and for two shapes that verify guesses (one every CELLS_PER_BUCKET tokens in
    each), two kinds of layers."""
    hidden_bytes = context_length * (arch.hp.hidden_size + arch.hp.carried_size) * 4
    n_kinds = 4 if n_logits > 1 else 2
    n_graphs = 12 * n_kinds + 8 + 2 * n_kinds * context_length // CELLS_PER_BUCKET
    if arch.hp.n_experts:  # every size of a wave
        n_graphs = MAX_GRAPHS
    return _GROWTH_BYTES + hidden_bytes + min(MAX_GRAPHS, n_graphs) * _GRAPH_BYTES


def _process_bytes(probe: MemoryProbe, budget_bytes: int) -> int:
    """What the process has taken already. In a control group about the budget's size, what the group is charged:
    pages of libraries and of the file's header count there."""
    resident = probe.process_bytes()
    group = probe.control_group()
    if group is not None and group.limit_bytes <= 1.25 * budget_bytes:
        return max(resident, group.usage_bytes)
    return resident


def _by_layer(pieces: Sequence[Piece]) -> dict[int, list[Piece]]:
    layers: dict[int, list[Piece]] = {}
    for piece in pieces:
        layers.setdefault(piece.block.layer, []).append(piece)
    return layers


def _log_plan(residency: Residency, budget_bytes: int, fixed_bytes: int, compute_bytes: int, kv_bytes: int,
              pool: tuple[PoolShape, int] | None) -> None:
    figures = {"budget": budget_bytes, "fixed": fixed_bytes, "compute": compute_bytes, "kv": kv_bytes,
               "pinned": residency.pinned_bytes, "window": residency.window_bytes,
               "streamed_per_pass": residency.streamed_bytes,
               "experts": pool[1] * pool[0].slot_bytes if pool else 0}
    _log.info("plan: %s", ", ".join(f"{name} {n_bytes / 2**20:.1f} MiB" for name, n_bytes in figures.items()))

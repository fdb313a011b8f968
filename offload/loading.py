"""Fitting a model into a budget: what everything but weights takes, then a window over the rest.

The budget is for the whole process. What the process, the KV cache and the compute buffers take is measured, not
guessed: graphs of the largest shapes are laid out before the first byte of a weight is read.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from edgert.architectures.base import OUTPUT, Architecture, Block, Weights
from edgert.engine.batch import MAX_DECODE_TOKENS, Batch, Phase
from edgert.engine.blockwise import MAX_GRAPHS, PART_TOKENS, BlockwiseGraphs
from edgert.engine.collective import Solo
from edgert.engine.engine import forward
from edgert.engine.kv_cache import CELLS_PER_BUCKET, DenseKVCache
from edgert.engine.trace import OFF, Trace
from edgert.ggml.backend import Backend
from edgert.ggml.graph import Context, Tensor
from edgert.gguf.model_file import ModelFile
from edgert.memory.probe import MemoryProbe
from offload.arena import HUGE_PAGE_BYTES, Arena
from offload.direct_file import forget_cached
from offload.embedding import EmbeddingRows
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

    def __init__(self, backend: Backend, pieces: Sequence[Piece], model: ModelFile, batch_size: int) -> None:
        self._context = Context(len(pieces) + 1)
        # Placed where nothing is ever read: the allocator must only not give them memory of its own.
        self._buffer = backend.wrap(HUGE_PAGE_BYTES, HUGE_PAGE_BYTES)
        self._blocks: dict[Block, dict[str, Tensor]] = {}
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


def open_window(backend: Backend, model: ModelFile, arch: Architecture, kv: DenseKVCache, graphs: BlockwiseGraphs,
                budget_bytes: int, *, batch_size: int, n_logits: int = 1, probe: MemoryProbe,
                trace: Trace = OFF) -> WindowWeights:
    """Weights within `budget_bytes` for the whole process, for steps that want up to `n_logits` rows of logits. Raises
    BudgetTooSmall before any weight is read."""
    pieces = cut(model, arch)
    compute_bytes = _reserve(backend, pieces, model, arch, kv, graphs, batch_size, n_logits, budget_bytes)
    for path, data_start in zip(model.parts, model.data_starts, strict=True):
        forget_cached(path, data_start + _READAHEAD_BYTES)
    fixed_bytes = (_process_bytes(probe, budget_bytes) + _growth_bytes(arch, kv.context_length, n_logits)
                   + kv.size_bytes + compute_bytes + EmbeddingRows.bytes_needed(model, batch_size))
    residency = choose(pieces, budget_bytes - fixed_bytes, budget_bytes, fixed_bytes)
    _log_plan(residency, budget_bytes, fixed_bytes, compute_bytes, kv.size_bytes)
    arena = Arena(residency.pinned_bytes + residency.window_bytes + EmbeddingRows.arena_bytes(model, batch_size))
    return WindowWeights(backend, model, arch, residency, arena, batch_size=batch_size, trace=trace)


def _reserve(backend: Backend, pieces: Sequence[Piece], model: ModelFile, arch: Architecture, kv: DenseKVCache,
             graphs: BlockwiseGraphs, batch_size: int, n_logits: int, budget_bytes: int) -> int:
    """Choose how many tokens are computed at once, and allocate what the largest shapes need. Bytes."""
    headers = Headers(backend, pieces, model, batch_size)
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
    return _GROWTH_BYTES + hidden_bytes + min(MAX_GRAPHS, n_graphs) * _GRAPH_BYTES


def _process_bytes(probe: MemoryProbe, budget_bytes: int) -> int:
    """What the process has taken already. In a control group about the budget's size, what the group is charged:
    pages of libraries and of the file's header count there."""
    resident = probe.process_bytes()
    group = probe.control_group()
    if group is not None and group.limit_bytes <= 1.25 * budget_bytes:
        return max(resident, group.usage_bytes)
    return resident


def _log_plan(residency: Residency, budget_bytes: int, fixed_bytes: int, compute_bytes: int, kv_bytes: int) -> None:
    figures = {"budget": budget_bytes, "fixed": fixed_bytes, "compute": compute_bytes, "kv": kv_bytes,
               "pinned": residency.pinned_bytes, "window": residency.window_bytes,
               "streamed_per_pass": residency.streamed_bytes}
    _log.info("plan: %s", ", ".join(f"{name} {n_bytes / 2**20:.1f} MiB" for name, n_bytes in figures.items()))

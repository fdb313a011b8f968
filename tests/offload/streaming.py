"""Opens engines that stream tiny models: weights in as few bytes as a test likes, everything else as the Runtime does.

Tensors of a tiny model are smaller than what is always pinned, and its head is smaller than what is cut: `small_pieces`
makes both limits small.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from edgert.architectures.registry import open_architecture
from edgert.engine.engine import Engine
from edgert.engine.kv_cache import DenseKVCache
from edgert.engine.trace import OFF, Trace
from edgert.ggml.backend import Backend
from edgert.gguf.model_file import ModelFile
from offload import residency
from offload.arena import Arena
from offload.embedding import EmbeddingRows
from offload.expert_layout import PoolShape, split_experts
from offload.experts import ExpertPool
from offload.loading import spare_window_bytes
from offload.residency import Piece, Residency, always_pinned, block_bytes, choose, cut
from offload.window import WindowWeights


def small_pieces(monkeypatch: pytest.MonkeyPatch, max_piece_bytes: int = 2**14) -> None:
    """Let everything but vectors stream, and cut a head beyond `max_piece_bytes`."""
    monkeypatch.setattr(residency, "_SMALL_BYTES", 0)
    monkeypatch.setattr(residency, "MAX_PIECE_BYTES", max_piece_bytes)


def residency_of(pieces: Sequence[Piece], share: float) -> Residency:
    """Pinned pieces and a window in memory between the least that works (0.0) and all weights (1.0)."""
    large = [p for p in pieces if not always_pinned(p)]
    small_bytes, total_bytes = (sum(p.slot_bytes for p in of) for of in ([*{*pieces} - {*large}], pieces))
    largest = max(block_bytes(large).values(), default=0)
    least_window = largest + max((p.slot_bytes for p in large), default=0)
    available = small_bytes + least_window + int((total_bytes - small_bytes - least_window) * share)
    if available >= total_bytes:
        return choose(pieces, total_bytes, 0)
    window = max(least_window, min(2 * largest, (available - small_bytes) // 2))
    return choose(pieces, available - window, window)


@contextmanager
def open_streaming(path: Path, share: float = 0.0, *, context_length: int = 1024, batch_size: int = 512,
                   n_threads: int = 1, n_readers: int = 4, trace: Trace = OFF,
                   n_slots: int | None = None) -> Iterator[Engine]:
    """An engine whose weights stream, with `share` of the memory between the least and all of it; with `n_slots`,
    experts come one by one, and `share` is of everything else."""
    file = ModelFile.open(path)
    arch = open_architecture(file)
    backend = Backend(n_threads)
    kv = DenseKVCache(backend, arch.hp, context_length)
    pieces, experts = (cut(file, arch), []) if n_slots is None else split_experts(cut(file, arch))
    pool = (PoolShape.of(experts), n_slots) if n_slots is not None else None
    chosen = residency_of(pieces, share)
    spare_bytes = spare_window_bytes(chosen)
    arena = Arena(chosen.pinned_bytes + chosen.window_bytes + EmbeddingRows.arena_bytes(file, batch_size)
                  + (pool[1] * pool[0].slot_bytes if pool else 0), spare_bytes)
    weights = WindowWeights(backend, file, arch, chosen, arena, n_threads=n_readers, batch_size=batch_size,
                            context_length=context_length, trace=trace, pool=pool, spare_window_bytes=spare_bytes)
    engine = Engine(arch, weights, kv, backend, batch_size=batch_size, trace=trace)
    try:
        yield engine
    finally:
        engine.close()


def window_of(engine: Engine) -> WindowWeights:
    """The engine's weights, which stream."""
    assert isinstance(engine.weights, WindowWeights)
    return engine.weights


def pool_of(engine: Engine) -> ExpertPool:
    """The engine's experts, which stream."""
    pool = window_of(engine).experts
    assert pool is not None
    return pool


def logits_of(engine: Engine, steps: list[list[int]]) -> list[NDArray[np.float32]]:
    """Logits after each step."""
    return [engine.step(np.array(step, np.int32))[0].copy() for step in steps]

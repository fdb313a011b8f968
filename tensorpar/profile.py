"""What a device can do: how fast it reads weights while it computes, and how much memory it has left.

Decoding is bound by the bytes of weights that pass through the processor; one matrix larger than its caches shows how
many a second do.
"""

from __future__ import annotations

import ctypes
import time
from dataclasses import asdict, dataclass
from typing import Any

from edgert.ggml.abi import TYPE_F32
from edgert.ggml.backend import Allocator, Backend
from edgert.ggml.functions import ggml
from edgert.ggml.graph import Context, Graph
from edgert.gguf.types import TENSOR_TYPES_BY_NAME
from edgert.memory.probe import MemoryProbe

_N_COLUMNS, _N_ROWS = 4096, 8192  # 18 MiB of Q4_K, four times over: beyond most last-level caches
_N_MATRICES, _N_ROUNDS = 3, 4
_MAX_BYTES = 2**60


@dataclass(frozen=True, slots=True)
class Profile:
    """One device's figures. `bytes_per_s` of weights in decode, with all its threads."""

    bytes_per_s: float
    memory_bytes: int
    n_threads: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of_message(cls, raw: object) -> Profile:
        """What a peer says about itself. Raises ValueError where it is impossible."""
        if not isinstance(raw, dict):
            raise ValueError("no profile")
        speed, memory, threads = (raw.get(key) for key in ("bytes_per_s", "memory_bytes", "n_threads"))
        if not (isinstance(speed, (int, float)) and 0 < speed < _MAX_BYTES and isinstance(memory, int)
                and 0 <= memory < _MAX_BYTES and isinstance(threads, int) and 0 < threads < 4096):
            raise ValueError("an impossible profile")
        return cls(float(speed), memory, threads)


def measure(n_threads: int, memory_bytes: int | None = None) -> Profile:
    """Measure this device: about 0.1 s. `memory_bytes` is what the user grants; else what is left."""
    return Profile(_speed(n_threads), memory_bytes or MemoryProbe().available_bytes(), n_threads)


def _speed(n_threads: int) -> float:
    backend, context = Backend(n_threads), Context(_N_MATRICES)
    kind = TENSOR_TYPES_BY_NAME["Q4_K"]
    weights = [context.tensor(kind.id, (_N_COLUMNS, _N_ROWS)) for _ in range(_N_MATRICES)]
    buffer = backend.alloc("a speed test", sum(one.n_bytes + 64 for one in weights))
    ctypes.memset(buffer.base, 0, buffer.size_bytes)
    address = buffer.base
    graph, allocator = Graph(4 * _N_MATRICES + 8), Allocator(backend)
    x = graph.input("x", TYPE_F32, (_N_COLUMNS, 1))
    for one in weights:
        buffer.place(one, address)
        address += -(-one.n_bytes // 64) * 64
        graph.output(graph.mul_mat(one, x))
    allocator.alloc(graph)
    ggml()
    Backend.array(x)[...] = 1
    best_s = float("inf")
    for _ in range(_N_ROUNDS):
        began_s = time.perf_counter()
        backend.compute(graph)
        best_s = min(best_s, time.perf_counter() - began_s)
    n_bytes = sum(one.n_bytes for one in weights)
    for resource in (allocator, graph, buffer, context, backend):
        resource.close()
    return n_bytes / best_s

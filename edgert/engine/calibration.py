"""Measures this device's kernels for the memory manager: products by type, layout and batch size, attention, and what
a small operation costs. Times are the best of several runs: a busy moment is no property of the device.

Kernels depend on ggml's build and the processor; results are kept under `Backend.speed_key`.
"""

from __future__ import annotations

import ctypes
import math
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import TypeVar

import numpy as np

from edgert.engine.layouts import can_repack, repack_buffer_type
from edgert.ggml.abi import TYPE_F16, TYPE_F32
from edgert.ggml.backend import Allocator, Backend, Buffer
from edgert.ggml.functions import ggml
from edgert.ggml.graph import Context, Graph, Tensor
from edgert.gguf.types import TENSOR_TYPES
from edgert.memory.profile import DeviceProfile, Layout

# Matrices of a small model's size, as many as exceed a cache of 32 MiB: one token reads them from memory.
_N_COLUMNS, _N_ROWS, _SET_BYTES = 2048, 2048, 48 * 2**20
# One token, few tokens, a batch. Beyond the last, time grows with the tokens.
_BATCHES = (1, 8, 128)
# The best of many short runs: on a busy machine, most of them are not the device's doing.
_LEAST_RUNS, _RUNS_S = 3, 0.15
# Attention over this many cached tokens: for one token in as many layers as exceed a cache, for a batch in one.
_N_CACHED, _N_HEADS = 2048, 8
_LAYERS_BY_BATCH = {1: 8, 128: 1}
_N_SMALL_OPS, _SMALL_WIDTH = 200, 1024
_COPY_BYTES = 64 * 2**20
Owned = TypeVar("Owned", Context, Graph, Allocator, Buffer)


def calibrate(backend: Backend, known: DeviceProfile | None, types: Iterable[int], head_dim: int,
              deadline_s: float) -> DeviceProfile:
    """`known`, with what it lacks of `types` and of the head's size measured. No measurement begins after
    `deadline_s` seconds; what is then missing keeps nominal figures, and is measured another time."""
    start = time.perf_counter()
    profile = known or _basic(backend)
    for type_id in sorted(types):
        if f"{type_id}/plain" in profile.multiply_s or time.perf_counter() - start > deadline_s:
            continue
        profile = replace(profile, multiply_s={**profile.multiply_s, **_products(backend, type_id)})
    if head_dim not in profile.attend_s and time.perf_counter() - start < deadline_s:
        profile = replace(profile, attend_s={**profile.attend_s, head_dim: _attention(backend, head_dim)})
    return profile


def _basic(backend: Backend) -> DeviceProfile:
    return DeviceProfile(op_s=_small_op(backend), block_s=_block(backend), memory_bytes_s=_memory_bandwidth(backend),
                         n_threads=backend.n_threads)


def _products(backend: Backend, type_id: int) -> dict[str, dict[int, float]]:
    """`type/layout` -> tokens -> seconds for each byte of a matrix."""
    layouts: dict[Layout, int | None] = {"plain": None}
    with ExitStack() as owned:
        context = _owned(owned, Context(1))
        sample = context.tensor(type_id, (_N_COLUMNS, _N_ROWS))
        repack = repack_buffer_type(backend.device)
        if repack is not None and can_repack(backend, sample):
            layouts["repack"] = repack
    return {f"{type_id}/{layout}": _products_in(backend, type_id, buffer_type)
            for layout, buffer_type in layouts.items()}


def _products_in(backend: Backend, type_id: int, buffer_type: int | None) -> dict[int, float]:
    matrix_bytes = TENSOR_TYPES[type_id].row_bytes(_N_COLUMNS) * _N_ROWS
    n_matrices = max(1, _SET_BYTES // matrix_bytes)
    with ExitStack() as owned:
        context = _owned(owned, Context(n_matrices))
        weights = [context.tensor(type_id, (_N_COLUMNS, _N_ROWS)) for _ in range(n_matrices)]
        buffer = _owned(owned, backend.alloc("calibration", n_matrices * (matrix_bytes + 64) + 64, buffer_type))
        address, raw = -(-buffer.base // 64) * 64, (ctypes.c_uint8 * matrix_bytes)()
        for weight in weights:
            buffer.place(weight, address)
            ggml().base.ggml_backend_tensor_set(weight.address, raw, 0, matrix_bytes)
            address += -(-matrix_bytes // 64) * 64
        found = {}
        for n_tokens in _BATCHES:
            used = weights if n_tokens == 1 else weights[:max(1, 16 // n_tokens)]
            seconds = _time_graph(backend, partial(_multiply_all, used, n_tokens))
            found[n_tokens] = seconds / (len(used) * matrix_bytes)
        return found


def _multiply_all(weights: list[Tensor], n_tokens: int, g: Graph) -> list[Tensor]:
    x = g.input("x", TYPE_F32, (_N_COLUMNS, n_tokens))
    for weight in weights:
        g.output(g.mul_mat(weight, x))
    return [x]


def _attention(backend: Backend, head_dim: int) -> dict[int, float]:
    """Tokens at once -> seconds for each multiplication with a cached value, all of the mask open."""
    found = {}
    for n_tokens, n_layers in _LAYERS_BY_BATCH.items():
        def build(g: Graph, n: int = n_tokens, n_layers: int = n_layers) -> list[Tensor]:
            q, mask = g.input("q", TYPE_F32, (head_dim, _N_HEADS, n)), g.input("mask", TYPE_F16, (_N_CACHED, n))
            caches = [g.input("kv", TYPE_F16, (head_dim, _N_HEADS, _N_CACHED)) for _ in range(2 * n_layers)]
            for k, v in zip(caches[::2], caches[1::2], strict=True):
                g.output(g.flash_attention(q, k, v, mask, head_dim**-0.5))
            return [q, mask, *caches]

        products = 2 * _N_HEADS * head_dim * _N_CACHED * n_tokens * n_layers
        found[n_tokens] = _time_graph(backend, build) / products
    return found


def _small_op(backend: Backend) -> float:
    def build(g: Graph) -> list[Tensor]:
        x = first = g.input("x", TYPE_F32, (_SMALL_WIDTH, 1))
        for _ in range(_N_SMALL_OPS):
            x = g.rms_norm(x, None, 1e-5)
        g.output(x)
        return [first]

    return _time_graph(backend, build) / _N_SMALL_OPS


def _block(backend: Backend) -> float:
    """Python's part of a block: three graphs of one operation, and some ten placeholders that are bound."""
    with ExitStack() as owned:
        context, buffer = _owned(owned, Context(1)), _owned(owned, backend.alloc("calibration", 4 * _SMALL_WIDTH))
        graph, allocator = _owned(owned, Graph(16)), _owned(owned, Allocator(backend))
        x = context.tensor(TYPE_F32, (_SMALL_WIDTH, 1))
        buffer.place(x, buffer.base)
        stand_in = graph.placeholder(x)
        graph.output(graph.rms_norm(stand_in, None, 1e-5))
        allocator.alloc(graph)

        def run() -> None:
            for _ in range(3):
                for _ in range(5):
                    graph.rebind(stand_in, x)
                backend.compute(graph)

        return _best(run)


def _memory_bandwidth(backend: Backend) -> float:
    """Bytes/s that one core reads and writes in a copy, times the root of the threads up to four, which share a bus."""
    source, target = (np.ones(_COPY_BYTES, np.uint8) for _ in range(2))
    return 2 * _COPY_BYTES / _best(lambda: np.copyto(target, source)) * math.sqrt(min(backend.n_threads, 4))


def _time_graph(backend: Backend, build: Callable[[Graph], list[Tensor]]) -> float:
    """Seconds of one computation of what `build` adds to a graph; it gives the inputs, which are set to 0."""
    with ExitStack() as owned:
        graph, allocator = _owned(owned, Graph(512)), _owned(owned, Allocator(backend))
        inputs = build(graph)
        allocator.alloc(graph)
        for tensor in inputs:
            Backend.array(tensor)[...] = 0
        backend.compute(graph)  # pages, threads, work buffer
        return _best(lambda: backend.compute(graph))


def _best(run: Callable[[], object]) -> float:
    """Seconds of the quickest of several runs."""
    start, times = time.perf_counter(), [_time(run)]
    while len(times) < _LEAST_RUNS or time.perf_counter() - start < _RUNS_S:
        times.append(_time(run))
    return min(times)


def _time(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _owned(stack: ExitStack, resource: Owned) -> Owned:
    stack.callback(resource.close)
    return resource

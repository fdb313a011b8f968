"""Measures this device's kernels for the memory manager: products by type, layout and batch size, attention, and what
a small operation costs. Times are the best of several runs: a busy moment is no property of the device.

Kernels depend on ggml's build and the processor; results are kept under `Backend.speed_key`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from edgert.engine.layouts import can_repack, repack_buffer_type
from edgert.ggml.abi import TYPE_F16, TYPE_F32, TYPE_I32
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
_COPY_BYTES = 64 * 2**20
# Bytes that stand for weights: any, but that every second has a float16's sign and one of these exponents, so that the
# scales of blocks, whatever their type, are 2^-5 to 2^-4, as scales are. Zeros are computed 10-20 % faster than weights
# (fewer bits switch, and the clock is higher), scales down to 2^-12 up to twice as slowly.
_EXPONENTS, _PATTERN_BYTES = (0x28, 0x2B), 4 * 2**20
Given = Mapping[Tensor, int | NDArray[np.int64]]  # the inputs of a graph, with what they hold
Owned = TypeVar("Owned", Context, Graph, Allocator, Buffer)


def calibrate(backend: Backend, known: DeviceProfile | None, types: Iterable[int], head_dim: int,
              deadline_s: float, expert_types: Iterable[int] = ()) -> DeviceProfile:
    """`known`, with what it lacks of `types`, of `expert_types` and of the head's size measured. No measurement begins
    after `deadline_s` seconds; what is then missing keeps nominal figures, and is measured another time."""
    start = time.perf_counter()
    profile = known or _basic(backend)
    missing = [*((f"{t}/plain", partial(_products, backend, t)) for t in sorted(types)),
               *((f"{t}/experts", partial(_expert_products, backend, t)) for t in sorted(expert_types))]
    for key, measure in missing:
        if key not in profile.multiply_s and time.perf_counter() - start <= deadline_s:
            profile = replace(profile, multiply_s={**profile.multiply_s, **measure()})
    if head_dim not in profile.attend_s and time.perf_counter() - start < deadline_s:
        profile = replace(profile, attend_s={**profile.attend_s, head_dim: _attention(backend, head_dim)})
    return profile


def _basic(backend: Backend) -> DeviceProfile:
    return DeviceProfile(memory_bytes_s=_memory_bandwidth(backend), n_threads=backend.n_threads)


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
    with ExitStack() as owned:
        weights = _matrices(owned, backend, type_id, (), max(1, _SET_BYTES // matrix_bytes), buffer_type)
        found = {}
        for n_tokens in _BATCHES:
            used = weights if n_tokens == 1 else weights[:max(1, 16 // n_tokens)]
            seconds = _time_graph(backend, partial(_multiply_all, used, n_tokens))
            found[n_tokens] = seconds / (len(used) * matrix_bytes)
        return found


def _expert_products(backend: Backend, type_id: int) -> dict[str, dict[int, float]]:
    """As `_products`, of a layer's experts, each of which that many tokens have chosen."""
    with ExitStack() as owned:
        n_experts = max(1, _SET_BYTES // (TENSOR_TYPES[type_id].row_bytes(_N_COLUMNS) * _N_ROWS))
        weights, = _matrices(owned, backend, type_id, (n_experts,), 1, None)
        found = {}
        for n_tokens in _BATCHES:
            n_used = n_experts if n_tokens == 1 else max(1, min(n_experts, 16 // n_tokens))
            seconds = _time_graph(backend, partial(_multiply_experts, weights, n_used, n_tokens))
            found[n_tokens] = seconds / (n_used * weights.n_bytes // n_experts)
        return {f"{type_id}/experts": found}


def _matrices(owned: ExitStack, backend: Backend, type_id: int, experts: tuple[int, ...], n_matrices: int,
              buffer_type: int | None) -> list[Tensor]:
    """So many matrices, or stacks of them, with bytes like weights'."""
    context = _owned(owned, Context(n_matrices))
    weights = [context.tensor(type_id, (_N_COLUMNS, _N_ROWS, *experts)) for _ in range(n_matrices)]
    n_bytes = weights[0].n_bytes
    buffer = _owned(owned, backend.alloc("calibration", n_matrices * (n_bytes + 64) + 64, buffer_type))
    address, raw = -(-buffer.base // 64) * 64, np.resize(bytes_like_weights(), n_bytes)
    for weight in weights:
        buffer.place(weight, address)
        ggml().base.ggml_backend_tensor_set(weight.address, raw.ctypes.data, 0, n_bytes)
        address += -(-n_bytes // 64) * 64
    return weights


def bytes_like_weights() -> NDArray[np.uint8]:
    """Finite in blocks of every type, and computed as fast as weights."""
    random, n = np.random.default_rng(0), _PATTERN_BYTES // 2
    pattern = random.integers(0, 256, 2 * n, np.uint8)
    pattern[1::2] = random.integers(*_EXPONENTS, n, np.uint8) | random.integers(0, 2, n, np.uint8) << 7
    return pattern


def _multiply_all(weights: list[Tensor], n_tokens: int, g: Graph) -> Given:
    x = g.input("x", TYPE_F32, (_N_COLUMNS, n_tokens))
    for weight in weights:
        g.output(g.mul_mat(weight, x))
    return {x: 1}


def _multiply_experts(weights: Tensor, n_used: int, n_tokens: int, g: Graph) -> Given:
    """Rows of tokens one after the other, as many for each expert (edgert/engine/block_state.py)."""
    x = g.input("x", TYPE_F32, (_N_COLUMNS, 1, n_used * n_tokens))
    ids = g.input("ids", TYPE_I32, (1, n_used * n_tokens))
    g.output(g.mul_mat_id(weights, x, ids))
    return {x: 1, ids: np.repeat(np.arange(n_used), n_tokens)[:, None]}


def _attention(backend: Backend, head_dim: int) -> dict[int, float]:
    """Tokens at once -> seconds for each multiplication with a cached value, all of the mask open."""
    found = {}
    for n_tokens, n_layers in _LAYERS_BY_BATCH.items():
        def build(g: Graph, n: int = n_tokens, n_layers: int = n_layers) -> Given:
            q, mask = g.input("q", TYPE_F32, (head_dim, _N_HEADS, n)), g.input("mask", TYPE_F16, (_N_CACHED, n))
            caches = [g.input("kv", TYPE_F16, (head_dim, _N_HEADS, _N_CACHED)) for _ in range(2 * n_layers)]
            for k, v in zip(caches[::2], caches[1::2], strict=True):
                g.output(g.flash_attention(q, k, v, mask, head_dim**-0.5))
            return {q: 1, **dict.fromkeys([mask, *caches], 0)}

        products = 2 * _N_HEADS * head_dim * _N_CACHED * n_tokens * n_layers
        found[n_tokens] = _time_graph(backend, build) / products
    return found


def _memory_bandwidth(backend: Backend) -> float:
    """Bytes/s that one core reads and writes in a copy, times the root of the threads up to four, which share a bus."""
    source, target = (np.ones(_COPY_BYTES, np.uint8) for _ in range(2))
    return 2 * _COPY_BYTES / _best(lambda: np.copyto(target, source)) * math.sqrt(min(backend.n_threads, 4))


def _time_graph(backend: Backend, build: Callable[[Graph], Given]) -> float:
    """Seconds of one computation of what `build` adds to a graph; it gives the inputs."""
    with ExitStack() as owned:
        graph, allocator = _owned(owned, Graph(512)), _owned(owned, Allocator(backend))
        inputs = build(graph)
        allocator.alloc(graph)
        for tensor, values in inputs.items():
            Backend.array(tensor)[...] = values
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

"""The seam of the KV cache, and the dense cache that keeps every token.

Contract: `open(graph, batch)` gives the cache as one graph sees it; its `attend` appends the batch's K and V of a
layer and attends over what the cache holds for every token, or for the last `hp.window` of them in a layer of
`hp.window_layers`. `write(inputs, batch)` fills the graph's inputs before it computes, and inside
`with lease(layer)` what attention reads of a layer is in memory. `length` tokens are valid; a step adds its tokens by
`commit`, so an aborted step leaves nothing behind. `truncate(n)` forgets all but the first n tokens.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from edgert.architectures.base import Hyperparameters
from edgert.engine.batch import Batch
from edgert.errors import ContextOverflow, OutOfMemory, UsageError
from edgert.ggml.abi import TYPE_F16, TYPE_F32, TYPE_I64, TYPE_Q8_0
from edgert.ggml.backend import Backend, Buffer
from edgert.ggml.graph import Context, Graph, Tensor
from edgert.gguf.types import TENSOR_TYPES

KVType = Literal["f16", "q8_0"]
KV_TYPES: dict[str, int] = {"f16": TYPE_F16, "q8_0": TYPE_Q8_0}
# Attention reads a multiple of this many cells, so that a graph serves that many steps. llama.cpp's own figure:
# flash attention divides the cells between threads, so another figure would sum in another order.
CELLS_PER_BUCKET = 256
_V_ROTATION = 64
_IN_MEMORY = nullcontext()


class KVGraph(Protocol):
    """The cache as one graph sees it."""

    arrays: list[NDArray[Any]]
    """The inputs' memory, once it is placed; emptied when they are placed anew."""

    def attend(self, g: Graph, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor: ...

    def inputs(self) -> list[Tensor]:
        """Every tensor of the cache that needs memory beside the graph's results."""
        ...

    def variant(self, layer: int) -> int | None:
        """Layers of one kind and one variant have the same graph."""
        ...

    def with_inputs(self, inputs: Sequence[Tensor], k: Tensor, v: Tensor) -> KVGraph:
        """The same view over other tensors: `inputs` in the order of `inputs()`, and one layer's K and V."""
        ...


class KVCache(Protocol):
    length: int
    context_length: int

    @property
    def k(self) -> Sequence[Tensor]:
        """Each layer's keys, a row for each cell."""
        ...

    @property
    def v(self) -> Sequence[Tensor]: ...

    @property
    def resident_bytes(self) -> int:
        """Memory that the tokens take which it holds now."""
        ...

    def bucket(self, batch: Batch) -> int:
        """Cells that attention reads in this batch; graphs are kept per bucket."""
        ...

    def open(self, g: Context, n_tokens: int, n_cells: int) -> KVGraph: ...

    def write(self, inputs: Any, batch: Batch) -> None:
        """Fill the inputs of a graph that `open` gave."""
        ...

    def lease(self, layer: int) -> AbstractContextManager[None]: ...

    def check_room(self, n_tokens: int, trained_length: int | None = None) -> None:
        """Raises ContextOverflow when `n_tokens` in all do not fit."""
        ...

    def commit(self, batch: Batch) -> None: ...

    def truncate(self, n_tokens: int) -> None: ...

    def give_back(self) -> None:
        """Let the system have memory that no token takes."""
        ...

    def close(self) -> None: ...


@dataclass(slots=True)
class DenseKVGraph:
    """Graph inputs, and the K and V tensors of every layer (or one stand-in for all layers, rebound for each)."""

    k: Sequence[Tensor]
    v: Sequence[Tensor]
    cells: Tensor  # (n_tokens,) int64: where the batch is written
    mask: Tensor  # (n_cells, n_tokens) float16: 0 or -inf
    window_mask: Tensor | None  # the same, for the layers of `window_layers`
    window_layers: frozenset[int]
    n_cells: int
    k_rotation: Tensor | None
    v_rotation: Tensor | None
    arrays: list[NDArray[Any]] = field(default_factory=list)

    def inputs(self) -> list[Tensor]:
        optional = (self.window_mask, self.k_rotation, self.v_rotation)
        return [self.cells, self.mask, *(t for t in optional if t is not None)]

    def variant(self, layer: int) -> None:
        return None

    def with_inputs(self, inputs: Sequence[Tensor], k: Tensor, v: Tensor) -> DenseKVGraph:
        cells, mask, *others = inputs
        given = iter(others)
        window_mask, k_rotation, v_rotation = (
            None if own is None else next(given) for own in (self.window_mask, self.k_rotation, self.v_rotation))
        return DenseKVGraph([k], [v], cells, mask, window_mask, self.window_layers, self.n_cells, k_rotation,
                            v_rotation)

    def attend(self, g: Graph, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        if self.k_rotation is not None:
            q, k = g.hadamard(self.k_rotation, q), g.hadamard(self.k_rotation, k)
        if self.v_rotation is not None:
            v = g.hadamard(self.v_rotation, v)
        for tensor in (q, v, k):
            g.expand(tensor)
        keys = append(g, self.k[layer % len(self.k)], k, self.cells, self.n_cells)
        values = append(g, self.v[layer % len(self.v)], v, self.cells, self.n_cells)
        mask = self.window_mask if self.window_mask is not None and layer in self.window_layers else self.mask
        out = g.flash_attention(q, keys, values, mask, scale)  # (head_dim, n_heads, n_tokens)
        head_dim, n_heads, n_tokens, _ = out.ne
        if self.v_rotation is not None:
            out = g.hadamard(self.v_rotation, g.reshape(out, head_dim * n_heads, n_tokens, 1))
        return g.reshape(out, head_dim * n_heads, n_tokens)


def append(g: Graph, cache: Tensor, new: Tensor, cells: Tensor, n_cells: int) -> Tensor:
    """Write `new` (head_dim, n_kv_heads, n_tokens) to the rows `cells` of a layer's cache (kv_size, n_rows), which may
    lie apart; give its first `n_cells` rows as (head_dim, n_kv_heads, n_cells)."""
    head_dim, n_kv_heads, n_tokens, _ = new.ne
    rows = g.view(new, (cache.ne[0], n_tokens), (new.nb[2],))
    g.expand(g.set_rows(cache, rows, cells))
    head_bytes = TENSOR_TYPES[cache.type].row_bytes(head_dim)
    return g.view(cache, (head_dim, n_kv_heads, n_cells), (head_bytes, cache.nb[1]))


class DenseKVCache:
    """K and V of every token and layer: 2 * n_layers * kv_size * bytes of the type, for each token of the context.

    One row of a layer holds all KV heads of a token, keys after RoPE. Rows that no token has used are zeros (ggml
    multiplies masked rows by 0: they must not hold NaN) and take no memory.
    """

    def __init__(self, backend: Backend, hp: Hyperparameters, context_length: int, kv_type: KVType = "f16") -> None:
        type_id = _type_id(hp, kv_type)
        self.context_length = context_length
        self.length = 0
        self._backend = backend
        self._window, self._window_layers = hp.window, hp.window_layers
        self.n_cells = -(-context_length // CELLS_PER_BUCKET) * CELLS_PER_BUCKET
        self._context = Context(2 * hp.n_layers)
        shape = (hp.kv_size, self.n_cells)
        self.k = [self._context.tensor(type_id, shape, f"k.{layer}") for layer in range(hp.n_layers)]
        self.v = [self._context.tensor(type_id, shape, f"v.{layer}") for layer in range(hp.n_layers)]
        self.size_bytes = sum(t.n_bytes for t in (*self.k, *self.v))
        self._buffer = self._place()
        # A quantised cache keeps rotated values (llama.cpp does so for heads of a multiple of 64).
        rotates = kv_type != "f16" and hp.head_dim % 64 == 0
        self._k_rotation = _hadamard(_largest_power_of_two_factor(hp.head_dim)) if rotates else None
        self._v_rotation = _hadamard(_V_ROTATION) if rotates else None
        self._rotations = [r for r in (self._k_rotation, self._v_rotation) if r is not None]

    def _place(self) -> Buffer:
        try:
            buffer = self._backend.alloc_zeroed("the KV cache", self.size_bytes)
        except OutOfMemory as error:
            self._context.close()
            raise OutOfMemory(error.what, error.needed_bytes,
                              "Ask for a shorter --context, or --kv-type q8_0.") from None
        address = buffer.base
        for tensor in (t for pair in zip(self.k, self.v, strict=True) for t in pair):
            buffer.place(tensor, address)
            address += tensor.n_bytes
        return buffer

    def bucket(self, batch: Batch) -> int:
        return min(self.n_cells, -(-batch.end // CELLS_PER_BUCKET) * CELLS_PER_BUCKET)

    def open(self, g: Context, n_tokens: int, n_cells: int) -> DenseKVGraph:
        k_rotation, v_rotation = (None if r is None else g.input("rotation", TYPE_F32, r.shape)
                                  for r in (self._k_rotation, self._v_rotation))
        cells, mask = g.input("cells", TYPE_I64, (n_tokens,)), g.input("mask", TYPE_F16, (n_cells, n_tokens))
        window_mask = g.input("window_mask", TYPE_F16, (n_cells, n_tokens)) if self._window_layers else None
        return DenseKVGraph(self.k, self.v, cells, mask, window_mask, self._window_layers, n_cells, k_rotation,
                            v_rotation)

    def write(self, inputs: DenseKVGraph, batch: Batch) -> None:
        """Fill the inputs: each token sees the cells up to its own, or the last of them in a window."""
        if not inputs.arrays:
            inputs.arrays = [Backend.array(t) for t in inputs.inputs()]
        cells, mask, *others = inputs.arrays
        cells[:] = range(batch.start, batch.end)
        fill_causal(mask, batch.start)
        if inputs.window_mask is not None:
            window_mask, *others = others
            fill_causal(window_mask, batch.start, self._window)
        for array, values in zip(others, self._rotations, strict=True):
            array[:] = values

    @property
    def resident_bytes(self) -> int:
        return self.size_bytes // self.n_cells * self.length

    def lease(self, layer: int) -> AbstractContextManager[None]:
        return _IN_MEMORY

    def check_room(self, n_tokens: int, trained_length: int | None = None) -> None:
        if n_tokens > self.context_length:
            raise ContextOverflow(n_tokens, self.context_length, trained_length)

    def commit(self, batch: Batch) -> None:
        self.length = batch.end

    def truncate(self, n_tokens: int) -> None:
        self.length = min(self.length, n_tokens)

    def give_back(self) -> None:
        """Let the system have the memory of the cells beyond `length`: whole pages, which read as zeros again."""
        self.give_back_layers(slice(None))

    def give_back_layers(self, layers: slice) -> None:
        """The same for some of the layers: 47 MB at once are a quarter of a small model's token."""
        memory, row_bytes = self._buffer.memory, self.size_bytes // self.n_cells // (2 * len(self.k))
        if memory is None or not hasattr(mmap, "MADV_DONTNEED"):
            return
        for tensor in (*self.k[layers], *self.v[layers]):
            start = tensor.data - self._buffer.base
            first = -(-(start + self.length * row_bytes) // mmap.PAGESIZE) * mmap.PAGESIZE
            end = (start + self.n_cells * row_bytes) // mmap.PAGESIZE * mmap.PAGESIZE
            if first < end:
                memory.madvise(mmap.MADV_DONTNEED, first, end - first)

    def close(self) -> None:
        self._buffer.close()
        self._context.close()


def fill_causal(mask: NDArray[np.float16], start: int, window: int = 0) -> None:
    """Fill (n_tokens, n_cells) or, for one token, (n_cells,): 0 up to each token's own cell, then -inf.

    With a window, only the last `window` cells up to its own are visible to a token.
    """
    rows = mask.reshape(-1, mask.shape[-1])
    end = start + len(rows)
    rows[:, :start] = 0
    rows[:, start:end] = _triangle(len(rows))
    rows[:, end:] = -np.inf
    if window:
        for row, n_visible in zip(rows, range(start + 1, end + 1), strict=True):
            row[:max(0, n_visible - window)] = -np.inf


@lru_cache(maxsize=8)
def _triangle(n: int) -> NDArray[np.float16]:
    """(n, n): 0 up to the diagonal, then -inf."""
    return np.triu(np.full((n, n), -np.inf, np.float16), 1)


def _largest_power_of_two_factor(n: int) -> int:
    return n & -n


def _hadamard(n: int) -> NDArray[np.float32]:
    """Orthonormal Sylvester-Hadamard matrix (n, n)."""
    matrix = np.array([[1 / np.sqrt(np.float32(n))]], np.float32)
    while len(matrix) < n:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return np.ascontiguousarray(matrix, np.float32)


def kv_bytes_per_token(hp: Hyperparameters, kv_type: KVType) -> int:
    """Bytes that one token occupies in a dense cache, all layers."""
    return 2 * hp.n_layers * TENSOR_TYPES[_type_id(hp, kv_type)].row_bytes(hp.kv_size)


def _type_id(hp: Hyperparameters, kv_type: KVType) -> int:
    """ggml's number of the type. Raises UsageError where heads of this size are no whole number of its blocks."""
    type_id = KV_TYPES.get(kv_type)
    if type_id is None:
        raise UsageError(f"--kv-type {kv_type} is unknown", f"Choose one of {', '.join(KV_TYPES)}.")
    if hp.head_dim % TENSOR_TYPES[type_id].block_size:
        raise UsageError(f"--kv-type {kv_type} does not fit this model's heads of {hp.head_dim} values",
                         "Use --kv-type f16.")
    return type_id

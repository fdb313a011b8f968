"""Records: one token's keys and values of several layers, side by side, in memory and on disk alike.

A record is what moves between the tiers, so that a token is one read. Attention reads each layer's rows out of the
records where they lie: ggml follows strides.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgert.architectures.base import Hyperparameters
from edgert.ggml.abi import TYPE_F16
from edgert.ggml.backend import Backend
from edgert.ggml.graph import Context, Tensor
from retrieval.arrays import Halves

Bytes = NDArray[np.uint8]
# Disks are read in blocks of this size.
_SECTOR_BYTES = 512
# Rows a multiple of this apart fall into the same few sets of the processor's caches: attention over 768 rows of
# SmolLM2-135M makes a step 24 % slower at 24576 bytes apart, 3 % slower at 23040.
_ALIASING_BYTES = 2048
_VALUE_BYTES = 2


@dataclass(frozen=True, slots=True)
class RecordShape:
    """For each of `layers` in order, kv_size values of K and as many of V, float16."""

    layers: tuple[int, ...]
    kv_size: int

    @classmethod
    def full(cls, hp: Hyperparameters) -> RecordShape:
        """Of the layers that see the whole context."""
        return cls(tuple(layer for layer in range(hp.n_layers) if layer not in hp.window_layers), hp.kv_size)

    @classmethod
    def windowed(cls, hp: Hyperparameters) -> RecordShape:
        """Of the layers that see a window of it."""
        return cls(tuple(sorted(hp.window_layers)), hp.kv_size)

    @property
    def used_bytes(self) -> int:
        return len(self.layers) * 2 * self.kv_size * _VALUE_BYTES

    @property
    def stride_bytes(self) -> int:
        """From one record to the next."""
        stride = max(1, -(-self.used_bytes // _SECTOR_BYTES)) * _SECTOR_BYTES
        return stride + _SECTOR_BYTES if stride % _ALIASING_BYTES == 0 else stride

    def values(self, rows: Bytes) -> Halves:
        """(n, n_layers, 2, kv_size) float16, a view of rows (n, stride_bytes)."""
        return rows[:, :self.used_bytes].view(np.float16).reshape(len(rows), len(self.layers), 2, self.kv_size)


class Records:
    """`n_rows` records in memory: `rows` (n_rows, stride_bytes), and `k` and `v` of each layer as tensors over them.

    Zeros at first (attention multiplies masked rows by 0: they must not hold NaN); page aligned, so that a disk can
    read into them.
    """

    def __init__(self, backend: Backend, shape: RecordShape, n_rows: int, what: str) -> None:
        self.shape, self.n_rows = shape, n_rows
        self.size_bytes = n_rows * shape.stride_bytes
        self._context = Context(2 * len(shape.layers))
        self._buffer = backend.alloc_zeroed(what, self.size_bytes)
        memory = self._buffer.memory
        if memory is not None and hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)
        # From the address: an array over the map itself would keep it from closing.
        raw = memoryview((ctypes.c_uint8 * self.size_bytes).from_address(self._buffer.base))
        self.rows: Bytes = np.frombuffer(raw, np.uint8).reshape(n_rows, -1)
        self.k = {layer: self._tensor(2 * index) for index, layer in enumerate(shape.layers)}
        self.v = {layer: self._tensor(2 * index + 1) for index, layer in enumerate(shape.layers)}

    @property
    def base(self) -> int:
        """The first record's address."""
        return self._buffer.base

    def _tensor(self, part: int) -> Tensor:
        row_bytes, stride = self.shape.kv_size * _VALUE_BYTES, self.shape.stride_bytes
        tensor = self._context.tensor(TYPE_F16, (self.shape.kv_size, self.n_rows))
        tensor.struct.nb[1] = stride
        tensor.struct.nb[2] = tensor.struct.nb[3] = stride * self.n_rows
        self._buffer.place(tensor, self._buffer.base + part * row_bytes)
        return tensor

    def values(self) -> Halves:
        """(n_rows, n_layers, 2, kv_size) float16: the records' memory."""
        return self.shape.values(self.rows)

    def close(self) -> None:
        self.rows = self.rows[:0]
        self._buffer.close()
        self._context.close()


def in_layer_order(*by_layer: Mapping[int, Tensor]) -> list[Tensor]:
    """One tensor for each layer, from mappings that hold some layers each."""
    tensors = {layer: tensor for mapping in by_layer for layer, tensor in mapping.items()}
    return [tensors[layer] for layer in range(len(tensors))]

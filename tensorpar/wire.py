"""How partial results travel: float32, float16, or blocks of 32 signed bytes with a float16 scale (34 bytes).

Whoever sums adds what the others decode; its own part too, unless it sums for all: every rank then holds the same bits.
float32 is neither packed nor unpacked: what is sent and what came is the memory itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

WireName = Literal["f32", "f16", "q8"]
Floats = NDArray[np.float32]
_BLOCK = 32
_BLOCK_BYTES = 2 + _BLOCK
_LARGEST_F16 = 65504.0


@dataclass(frozen=True, slots=True)
class Wire:
    """One encoding. `encode` gives the bytes of so many values, `decode` their first `n` values again: an array of its
    own, or (float32) the bytes themselves seen as numbers."""

    name: WireName
    n_bytes: Callable[[int], int]
    encode: Callable[[Floats], memoryview]
    decode: Callable[[memoryview, int], Floats]

    @property
    def is_exact(self) -> bool:
        return self.name == "f32"


def _encode_f32(values: Floats) -> memoryview:
    return values.data.cast("B")


def _decode_f32(raw: memoryview, n: int) -> Floats:
    return np.frombuffer(raw, np.float32, n)


def _encode_f16(values: Floats) -> memoryview:
    return np.clip(values, -_LARGEST_F16, _LARGEST_F16).astype(np.float16).data.cast("B")


def _decode_f16(raw: memoryview, n: int) -> Floats:
    return np.frombuffer(raw, np.float16, n).astype(np.float32)


def _encode_q8(values: Floats) -> memoryview:
    n_blocks = -(-len(values) // _BLOCK)
    if len(values) % _BLOCK:
        values = np.concatenate([values, np.zeros(n_blocks * _BLOCK - len(values), np.float32)])
    blocks = values.reshape(n_blocks, _BLOCK)
    scales = np.minimum(np.abs(blocks).max(axis=1) / 127, _LARGEST_F16).astype(np.float16)
    divisors = scales.astype(np.float32)
    divisors[divisors == 0] = 1
    out = np.empty((n_blocks, _BLOCK_BYTES), np.uint8)
    out[:, :2] = scales.view(np.uint8).reshape(n_blocks, 2)
    out[:, 2:] = np.clip(np.rint(blocks / divisors[:, None]), -127, 127).astype(np.int8).view(np.uint8)
    return out.data.cast("B")


def _decode_q8(raw: memoryview, n: int) -> Floats:
    blocks = np.frombuffer(raw, np.uint8).reshape(-1, _BLOCK_BYTES)
    scales = np.ascontiguousarray(blocks[:, :2]).view(np.float16).astype(np.float32)
    values: Floats = np.ascontiguousarray(blocks[:, 2:]).view(np.int8) * scales
    return values.reshape(-1)[:n]


WIRES: dict[str, Wire] = {
    "f32": Wire("f32", lambda n: 4 * n, _encode_f32, _decode_f32),
    "f16": Wire("f16", lambda n: 2 * n, _encode_f16, _decode_f16),
    "q8": Wire("q8", lambda n: -(-n // _BLOCK) * _BLOCK_BYTES, _encode_q8, _decode_q8),
}

"""Which tensor types this build of ggml computes with."""

from __future__ import annotations

import ctypes
from functools import cache

from edgert.ggml.functions import ggml
from edgert.gguf.types import TENSOR_TYPES

_FLOATS = frozenset((0, 1, 30))  # F32, F16, BF16


class _CpuTraits(ctypes.Structure):
    """The beginning of `struct ggml_type_traits_cpu`."""

    _fields_ = (("from_float", ctypes.c_void_p), ("vec_dot", ctypes.c_void_p))


@cache
def multipliable_types() -> frozenset[int]:
    """Types that the CPU multiplies with float32: those with a dot product."""
    found = set()
    for type_id in TENSOR_TYPES:
        traits = ggml().cpu.ggml_get_type_traits_cpu(type_id)
        if traits and _CpuTraits.from_address(traits).vec_dot:
            found.add(type_id)
    return frozenset(found)


@cache
def readable_types() -> frozenset[int]:
    """Types whose rows can be turned into float32."""
    return frozenset(t for t in multipliable_types() if t in _FLOATS or ggml().base.ggml_is_quantized(t))

"""The name of a file's quantisation: what `general.file_type` calls it, else the type that most of its bytes have."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

# llama.h, enum llama_ftype. The numbers that are left out are no longer written.
FILE_TYPES = MappingProxyType({
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K", 11: "Q3_K_S", 12: "Q3_K_M",
    13: "Q3_K_L", 14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S", 17: "Q5_K_M", 18: "Q6_K", 19: "IQ2_XXS", 20: "IQ2_XS",
    21: "Q2_K_S", 22: "IQ3_XS", 23: "IQ3_XXS", 24: "IQ1_S", 25: "IQ4_NL", 26: "IQ3_S", 27: "IQ3_M", 28: "IQ2_S",
    29: "IQ2_M", 30: "IQ4_XS", 31: "IQ1_M", 32: "BF16", 36: "TQ1_0", 37: "TQ2_0", 38: "MXFP4", 39: "NVFP4",
    40: "Q1_0", 41: "Q2_0",
})
_GUESSED = 1024  # added by llama.cpp where the type was derived from the tensors


def quantisation_name(file_type: int | None, type_bytes: Mapping[str, int]) -> str:
    """`Q4_K_M` and the like; `type_bytes` maps the names of tensor types to the bytes that they take."""
    if file_type is not None and (file_type & ~_GUESSED) in FILE_TYPES:
        return FILE_TYPES[file_type & ~_GUESSED]
    return max(type_bytes, key=lambda name: type_bytes[name], default="unknown")

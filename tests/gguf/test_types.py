"""The table of tensor types against ggml's own."""

from __future__ import annotations

import ctypes

import pytest

from edgert.ggml.library import load_libraries
from edgert.gguf.types import TENSOR_TYPES, TENSOR_TYPES_BY_NAME


def test_every_type_of_ggml_is_in_the_table_with_its_sizes() -> None:
    base = load_libraries().base
    base.ggml_blck_size.restype = ctypes.c_int64
    base.ggml_type_size.restype = ctypes.c_size_t
    base.ggml_type_name.restype = ctypes.c_char_p
    # ggml reads its table without a bound, so ask only below GGML_TYPE_COUNT, which is the last id and one.
    known = {}
    for type_id in range(max(TENSOR_TYPES) + 1):
        if block_size := base.ggml_blck_size(type_id):  # 0 for removed types
            known[type_id] = (base.ggml_type_name(type_id).decode().upper(), block_size, base.ggml_type_size(type_id))
    assert {one.id: (one.name, one.block_size, one.type_bytes) for one in TENSOR_TYPES.values()} == known


def test_a_row_is_whole_blocks() -> None:
    q4_k = TENSOR_TYPES_BY_NAME["Q4_K"]
    assert q4_k.row_bytes(1024) == 4 * 144
    assert q4_k.row_bytes(0) == 0
    with pytest.raises(ValueError, match="256"):
        q4_k.row_bytes(1000)

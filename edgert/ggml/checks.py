"""What ggml demands of shapes, types and strides, asked in Python before it would end the process over them.

Knows tensors' headers; never touches their data. A demand that is not met is our own mistake: AssertionError.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

from edgert.ggml.abi import MAX_DIMS, TYPE_F16, TYPE_F32, TYPE_Q8_0
from edgert.ggml.types import multipliable_types
from edgert.gguf.types import TENSOR_TYPES

if TYPE_CHECKING:
    from edgert.ggml.graph import Tensor

FLOATS = (TYPE_F32, TYPE_F16)
CACHE_TYPES = (TYPE_F32, TYPE_F16, TYPE_Q8_0)  # attention reads them, and set_rows writes them
# Far above every tensor, and far enough below 2**63 that no sum of offsets and sizes wraps in C.
_MAX_TENSOR_BYTES = 1 << 61


def check(holds: bool, what: str, *tensors: Tensor) -> None:
    if not holds:
        shown = ", ".join(f"{t.ne} of type {t.type} in steps of {t.nb} bytes" for t in tensors)
        raise AssertionError(f"{what}: shapes do not fit: {shown}")


def check_shape(type_id: int, shape: tuple[int, ...]) -> None:
    """One to four positive dimensions, rows of whole blocks, and a size that 64 bits hold."""
    kind = TENSOR_TYPES.get(type_id)
    if kind is None or not 1 <= len(shape) <= MAX_DIMS or min(shape) < 1 or shape[0] % kind.block_size:
        raise AssertionError(f"no tensor of type {type_id} has the shape {shape}")
    if kind.row_bytes(shape[0]) * prod(shape[1:]) > _MAX_TENSOR_BYTES:
        raise AssertionError(f"a tensor of the shape {shape} is beyond every memory")


def has_whole_rows(tensor: Tensor) -> bool:
    """Whether each row's elements lie side by side; rows may lie anywhere."""
    return tensor.nb[0] == TENSOR_TYPES[tensor.type].type_bytes


def is_contiguous(tensor: Tensor) -> bool:
    """Whether the elements lie in order without gaps. The stride of a dimension of 1 does not count."""
    kind = TENSOR_TYPES[tensor.type]
    expected = kind.type_bytes
    for axis, (n, stride) in enumerate(zip(tensor.ne, tensor.nb, strict=True)):
        if n != 1 and stride != expected:
            return False
        expected *= n // kind.block_size if axis == 0 else n
    return True


def is_float(tensor: Tensor) -> bool:
    """Float32 or float16 with whole rows: what element-wise operations take."""
    return tensor.type in FLOATS and has_whole_rows(tensor)


def is_float32(tensor: Tensor) -> bool:
    return tensor.type == TYPE_F32 and has_whole_rows(tensor)


def is_matrix_for_product(tensor: Tensor) -> bool:
    """A weight as mul_mat takes it: a type with a dot product, not transposed."""
    return tensor.type in multipliable_types() and has_whole_rows(tensor) and tensor.nb[0] <= tensor.nb[1]

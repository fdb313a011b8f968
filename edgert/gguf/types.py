"""Every tensor type that ggml knows, as plain numbers: how many elements a block holds, how many bytes it takes.

Pure data, so that a file's header can be read without loading ggml; a test holds it against ggml's own figures.
Knows nothing of how a block is decoded, nor which types have a fast kernel on this device.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True, slots=True)
class TensorType:
    """One ggml tensor type: `id` as in a GGUF tensor entry, `block_size` elements stored in `type_bytes` bytes."""

    id: int
    name: str
    block_size: int
    type_bytes: int

    def row_bytes(self, n_elements: int) -> int:
        """Bytes of a row of `n_elements`. Raises ValueError when they are no whole number of blocks."""
        n_blocks, rest = divmod(n_elements, self.block_size)
        if rest:
            raise ValueError(f"{n_elements} elements are no whole number of {self.name} blocks of {self.block_size}")
        return n_blocks * self.type_bytes


_ALL = (
    TensorType(0, "F32", 1, 4),
    TensorType(1, "F16", 1, 2),
    TensorType(2, "Q4_0", 32, 18),
    TensorType(3, "Q4_1", 32, 20),
    # 4 and 5 were Q4_2 and Q4_3; ggml removed them
    TensorType(6, "Q5_0", 32, 22),
    TensorType(7, "Q5_1", 32, 24),
    TensorType(8, "Q8_0", 32, 34),
    TensorType(9, "Q8_1", 32, 36),
    TensorType(10, "Q2_K", 256, 84),
    TensorType(11, "Q3_K", 256, 110),
    TensorType(12, "Q4_K", 256, 144),
    TensorType(13, "Q5_K", 256, 176),
    TensorType(14, "Q6_K", 256, 210),
    TensorType(15, "Q8_K", 256, 292),
    TensorType(16, "IQ2_XXS", 256, 66),
    TensorType(17, "IQ2_XS", 256, 74),
    TensorType(18, "IQ3_XXS", 256, 98),
    TensorType(19, "IQ1_S", 256, 50),
    TensorType(20, "IQ4_NL", 32, 18),
    TensorType(21, "IQ3_S", 256, 110),
    TensorType(22, "IQ2_S", 256, 82),
    TensorType(23, "IQ4_XS", 256, 136),
    TensorType(24, "I8", 1, 1),
    TensorType(25, "I16", 1, 2),
    TensorType(26, "I32", 1, 4),
    TensorType(27, "I64", 1, 8),
    TensorType(28, "F64", 1, 8),
    TensorType(29, "IQ1_M", 256, 56),
    TensorType(30, "BF16", 1, 2),
    # 31 to 33 were Q4_0 in repacked layouts; files hold plain Q4_0 now
    TensorType(34, "TQ1_0", 256, 54),
    TensorType(35, "TQ2_0", 256, 66),
    # 36 to 38 were IQ4_NL in repacked layouts
    TensorType(39, "MXFP4", 32, 17),
    TensorType(40, "NVFP4", 64, 36),
    TensorType(41, "Q1_0", 128, 18),
    TensorType(42, "Q2_0", 64, 18),
)

TENSOR_TYPES: Mapping[int, TensorType] = MappingProxyType({one.id: one for one in _ALL})
TENSOR_TYPES_BY_NAME: Mapping[str, TensorType] = MappingProxyType({one.name: one for one in _ALL})

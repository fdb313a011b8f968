"""A model's matrices in the type that this processor multiplies fastest with many tokens at once.

A teacher reads hundreds of thousands of tokens, and kernels differ: on a Zen 4 core, Q4_1 gives 12 and BF16 150 billion
multiplications a second. The values are the file's own, rounded to 8 bits of mantissa, which is less than ggml's own
rounding of activations beside quantised weights. Memory: two bytes for each value.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from edgert.architectures.base import Architecture, Block, Weights, blocks_of
from edgert.engine.batch import Phase
from edgert.engine.layouts import Layouts
from edgert.engine.resident import ResidentWeights
from edgert.ggml.abi import TYPE_F16, TYPE_F32, TYPE_I32
from edgert.ggml.backend import Allocator, Backend, Buffer
from edgert.ggml.graph import Context, Graph, Tensor
from edgert.gguf.model_file import ModelFile
from edgert.gguf.types import TENSOR_TYPES_BY_NAME

_TYPE_BF16 = TENSOR_TYPES_BY_NAME["BF16"].id
_N_COLUMNS, _N_ROWS, _N_TOKENS, _N_TRIALS = 1024, 512, 512, 3
_ALIGN_BYTES = 64


class TeacherWeights(ResidentWeights):
    """Resident weights whose matrices inside layers are converted where that computes faster."""

    def __init__(self, backend: Backend, model: ModelFile, arch: Architecture) -> None:
        super().__init__(backend, model, arch, Layouts({"prefill": frozenset(), "decode": frozenset()}))
        self._buffers: list[Buffer] = []
        self._headers = Context(len(model.tensors) + 1)
        self._converted: dict[Block, Weights] = {}
        best: dict[int, int] = {}
        for block in blocks_of(arch.hp):
            if block.kind not in ("attention", "ffn"):
                continue
            matrices = {spec.key for spec in arch.specs(block) if spec.use == "matrix"}
            with super().lease(block, "prefill") as weights:
                self._converted[block] = {key: self._convert(tensor, best) if key in matrices else tensor
                                          for key, tensor in weights.items()}

    def _convert(self, tensor: Tensor, best: dict[int, int]) -> Tensor:
        if tensor.ne[2] > 1:  # experts: few tokens come to each
            return tensor
        if tensor.type not in best:
            candidates = (tensor.type, TYPE_F16, _TYPE_BF16)
            best[tensor.type] = max(candidates, key=lambda type_id: _speed(self._backend, type_id))
        if best[tensor.type] == tensor.type:
            return tensor
        values = dequantised(self._backend, tensor)
        target = self._headers.tensor(best[tensor.type], tensor.ne[:2])
        buffer = self._backend.alloc("the teacher's weights", target.n_bytes + _ALIGN_BYTES)
        self._buffers.append(buffer)
        buffer.place(target, -(-buffer.base // _ALIGN_BYTES) * _ALIGN_BYTES)
        raw = values.astype(np.float16) if target.type == TYPE_F16 else bfloat16(values)
        Backend.raw(target)[:] = raw.reshape(-1).view(np.uint8)
        return target

    @contextmanager
    def lease(self, block: Block, phase: Phase) -> Iterator[Weights]:
        if block in self._converted:
            yield self._converted[block]
        else:
            with super().lease(block, phase) as weights:
                yield weights

    def close(self) -> None:
        super().close()
        for buffer in self.__dict__.pop("_buffers", []):
            buffer.close()


def dequantised(backend: Backend, tensor: Tensor) -> NDArray[np.float32]:
    """(n_rows, n_columns) of a matrix in any type that ggml reads rows of."""
    if tensor.type == TYPE_F32:
        return np.array(Backend.array(tensor), np.float32).reshape(tensor.ne[1], tensor.ne[0])
    graph, allocator = Graph(8), Allocator(backend)
    try:
        ids = graph.input("ids", TYPE_I32, (tensor.ne[1],))
        rows = graph.output(graph.get_rows(tensor, ids))
        allocator.alloc(graph)
        Backend.array(ids)[:] = np.arange(tensor.ne[1])
        backend.compute(graph)
        return np.array(Backend.array(rows), np.float32).reshape(tensor.ne[1], tensor.ne[0])
    finally:
        graph.close()
        allocator.close()


def bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The upper half of each float32, rounded to nearest even. For finite values."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded: NDArray[np.uint16] = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return rounded


def _speed(backend: Backend, type_id: int) -> float:
    """Products of this type a second, best of some trials, on a matrix of a small model's size."""
    context, graph, allocator = Context(1), Graph(8), Allocator(backend)
    weight = context.tensor(type_id, (_N_COLUMNS, _N_ROWS))
    buffer = backend.alloc_zeroed("calibration", weight.n_bytes)
    try:
        buffer.place(weight, buffer.base)
        graph.output(graph.mul_mat(weight, graph.input("x", TYPE_F32, (_N_COLUMNS, _N_TOKENS))))
        allocator.alloc(graph)
        best_s = np.inf
        for _ in range(_N_TRIALS):
            start = time.perf_counter()
            backend.compute(graph)
            best_s = min(best_s, time.perf_counter() - start)
        return 1 / best_s
    finally:
        graph.close()
        allocator.close()
        context.close()
        buffer.close()

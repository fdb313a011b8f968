"""A backend for each test, and a way to compute one small graph on numpy arrays."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgert.ggml.abi import TYPE_F16, TYPE_F32, TYPE_I32, TYPE_I64
from edgert.ggml.backend import Allocator, Backend
from edgert.ggml.graph import Graph, Tensor

_TYPES = {"float32": TYPE_F32, "float16": TYPE_F16, "int32": TYPE_I32, "int64": TYPE_I64}
Compute = Callable[..., NDArray[Any]]


@pytest.fixture
def backend() -> Iterator[Backend]:
    opened = Backend(2)
    yield opened
    opened.close()


@pytest.fixture
def compute(backend: Backend) -> Compute:
    """`compute(build, *arrays)`: what `build(graph, *tensors)` computes of the arrays (slowest dimension first)."""

    def run(build: Callable[..., Tensor], *arrays: NDArray[Any]) -> NDArray[Any]:
        graph, allocator = Graph(128), Allocator(backend)
        inputs = [graph.input(f"input {i}", _TYPES[a.dtype.name], a.shape[::-1]) for i, a in enumerate(arrays)]
        for tensor in inputs:
            graph.expand(tensor)
        result = graph.output(build(graph, *inputs))
        allocator.alloc(graph)
        for tensor, array in zip(inputs, arrays, strict=True):
            Backend.array(tensor)[...] = array.reshape(Backend.array(tensor).shape)
        backend.compute(graph)
        computed = np.array(Backend.array(result))
        graph.close()
        allocator.close()
        return computed

    return run

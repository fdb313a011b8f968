"""A placeholder means the memory that it was last bound to, and so do its views."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

from edgert.ggml.abi import TYPE_F32
from edgert.ggml.backend import Allocator, Backend, Buffer
from edgert.ggml.graph import Context, Graph, Tensor


class Sources:
    """Tensors (4, 4) with memory of their own."""

    def __init__(self, backend: Backend) -> None:
        self.context = Context(8)
        self.buffer: Buffer = backend.alloc("sources", 8 * 64)
        self._n = 0

    def make(self, values: NDArray[np.float32]) -> Tensor:
        tensor = self.context.tensor(TYPE_F32, (4, 4))
        self.buffer.place(tensor, self.buffer.base + 64 * self._n)
        self._n += 1
        Backend.array(tensor)[...] = values
        return tensor

    def close(self) -> None:
        self.buffer.close()
        self.context.close()


@pytest.fixture
def sources(backend: Backend) -> Iterator[Sources]:
    made = Sources(backend)
    yield made
    made.close()


def matrix(first: int) -> NDArray[np.float32]:
    return np.arange(first, first + 16, dtype=np.float32).reshape(4, 4)


def test_one_graph_serves_several_sources(backend: Backend, sources: Sources) -> None:
    first, second = sources.make(matrix(0)), sources.make(matrix(100))
    graph, allocator = Graph(16), Allocator(backend)
    stand_in = graph.placeholder(first)
    doubled = graph.output(graph.scale(stand_in, 2.0))
    allocator.alloc(graph)
    for source, expected in ((first, matrix(0)), (second, matrix(100)), (first, matrix(0))):
        graph.rebind(stand_in, source)
        backend.compute(graph)
        np.testing.assert_array_equal(Backend.array(doubled), 2 * expected)
    graph.close()
    allocator.close()


def test_views_follow_their_placeholder(backend: Backend, sources: Sources) -> None:
    """Also a view of a view, a reshape, a permute: whatever ggml makes as a view."""
    first, second = sources.make(matrix(0)), sources.make(matrix(100))
    graph, allocator = Graph(32), Allocator(backend)
    stand_in = graph.placeholder(first)
    window = graph.view(stand_in, (4, 2), (16,), 16)  # rows 1 and 2
    inner = graph.view(window, (2, 2), (16,), 8)  # their last two columns
    outputs = [graph.output(graph.contiguous(view)) for view in (
        window, inner, graph.reshape(stand_in, 8, 2), graph.permute(stand_in, 1, 0, 2, 3))]
    allocator.alloc(graph)
    for source, m in ((first, matrix(0)), (second, matrix(100))):
        graph.rebind(stand_in, source)
        backend.compute(graph)
        for output, expected in zip(outputs, (m[1:3], m[1:3, 2:], m.reshape(2, 8), m.T), strict=True):
            np.testing.assert_array_equal(Backend.array(output), expected)
    graph.close()
    allocator.close()


def test_what_a_graph_writes_goes_to_the_bound_memory(backend: Backend, sources: Sources) -> None:
    source, first, second = sources.make(matrix(0)), sources.make(matrix(0) * 0), sources.make(matrix(0) * 0)
    graph, allocator = Graph(16), Allocator(backend)
    target = graph.placeholder(first)
    graph.expand(graph.copy(source, target))
    allocator.alloc(graph)
    graph.rebind(target, second)
    backend.compute(graph)
    np.testing.assert_array_equal(Backend.array(second), matrix(0))
    assert not Backend.array(first).any()
    graph.close()
    allocator.close()


def test_a_placeholder_has_the_shape_and_strides_of_what_it_stands_for(sources: Sources) -> None:
    source = sources.make(matrix(0))
    source.struct.nb[1] = 32  # rows with gaps, as a part of wider rows has them
    graph = Graph(4)
    stand_in = graph.placeholder(source)
    assert (stand_in.ne, stand_in.nb, stand_in.type, stand_in.data) == (source.ne, source.nb, source.type, source.data)
    graph.close()

"""Memory comes and goes as promised, and a computation stops when it is told to."""

from __future__ import annotations

import mmap
import threading
import time

import numpy as np
import psutil
import pytest
from settling import check_settles, descriptors_and_threads

from edgert.errors import OutOfMemory
from edgert.ggml.abi import TYPE_F32, TYPE_Q8_0
from edgert.ggml.backend import MAX_THREADS, Allocator, Backend, Cancelled
from edgert.ggml.graph import Context, Graph, Tensor

MIB = 2**20
# Linux may hand out memory of 2 MiB at a time where a byte of it is written.
_HUGE_PAGE_BYTES = 2 * MIB


def rss_bytes() -> int:
    return int(psutil.Process().memory_info().rss)


# -- where tensors lie --------------------------------------------------------------------------------------------
def test_a_tensor_is_placed_only_inside_its_buffer(backend: Backend) -> None:
    context, buffer = Context(1), backend.alloc("test", 256)
    tensor = context.tensor(TYPE_F32, (32,))  # 128 bytes
    for address in (buffer.base - 32, buffer.base + 129, buffer.base + 256, 0):
        with pytest.raises(AssertionError, match="outside"):
            buffer.place(tensor, address)
        assert not tensor.data
    buffer.place(tensor, buffer.base + 128)
    assert tensor.data == buffer.base + 128
    buffer.close()
    context.close()


def test_a_tensor_may_be_placed_anew_but_a_view_may_not(backend: Backend) -> None:
    graph, buffer = Graph(2), backend.alloc("test", 256)
    tensor = graph.tensor(TYPE_F32, (32,))
    view = graph.view(tensor, (16,), ())
    buffer.place(tensor, buffer.base)
    buffer.place(tensor, buffer.base + 64)
    assert tensor.data == buffer.base + 64
    with pytest.raises(AssertionError, match="view"):
        buffer.place(view, buffer.base)
    buffer.close()
    with pytest.raises(AssertionError, match="closed"):
        buffer.place(tensor, 0)
    graph.close()


def test_memory_that_is_not_aligned_cannot_be_wrapped(backend: Backend) -> None:
    for address in (0, 4096 + 8):
        with pytest.raises(AssertionError, match="aligned"):
            backend.wrap(address, 64)


def test_an_array_is_the_tensors_own_memory_slowest_dimension_first(backend: Backend) -> None:
    context, buffer = Context(2), backend.alloc("test", 4096)
    tensor, row = context.tensor(TYPE_F32, (4, 3, 2)), context.tensor(TYPE_F32, (1,))
    buffer.place(tensor, buffer.base)
    buffer.place(row, buffer.base + 4)
    Backend.array(tensor)[...] = np.arange(24).reshape(2, 3, 4)
    assert Backend.array(tensor).shape == (2, 3, 4)
    assert Backend.array(row).tolist() == [1.0]
    Backend.array(row)[0] = 7
    assert Backend.array(tensor)[0, 0, 1] == 7
    buffer.close()
    context.close()


# -- memory -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("size_bytes", [2**45, 2**62, 2**63, 2**64 + 64])
@pytest.mark.parametrize("method", ["alloc", "alloc_zeroed"])
def test_an_absurd_size_is_out_of_memory(method: str, size_bytes: int, backend: Backend) -> None:
    with pytest.raises(OutOfMemory, match="the moon") as raised:
        getattr(backend, method)("the moon", size_bytes)
    assert raised.value.needed_bytes == size_bytes


def test_an_absurd_graph_is_out_of_memory_and_says_how_much_it_needs(backend: Backend) -> None:
    allocator, small, large, again = Allocator(backend), Graph(4), Graph(4), Graph(4)
    for graph in (small, again):
        graph.output(graph.scale(graph.input("x", TYPE_F32, (64,)), 2.0))
    assert allocator.alloc(small)
    x = large.input("x", TYPE_F32, (2**40, 4))
    large.output(large.scale(x, 2.0))
    with pytest.raises(OutOfMemory, match="compute buffer") as raised:
        allocator.alloc(large)
    assert raised.value.needed_bytes >= x.n_bytes
    assert allocator.size_bytes == 0  # ggml has given the old buffer back
    assert allocator.alloc(again)
    for graph in (small, large, again):
        graph.close()
    allocator.close()


def test_an_allocator_says_when_its_buffer_moved(backend: Backend) -> None:
    allocator, graphs = Allocator(backend), [Graph(4) for _ in range(3)]
    moved = []
    for graph, size in zip(graphs, (64, 4096, 64), strict=True):
        graph.output(graph.scale(graph.input("x", TYPE_F32, (size,)), 2.0))
        moved.append(allocator.alloc(graph))
    assert moved == [True, True, False]
    assert allocator.size_bytes >= 4096 * 4
    allocator.close()
    assert allocator.size_bytes == 0
    for graph in graphs:
        graph.close()


def test_zeroed_memory_is_zero_and_resident_only_where_it_is_written(backend: Backend) -> None:
    before = rss_bytes()
    buffer = backend.alloc_zeroed("a long context", 512 * MIB)
    assert rss_bytes() - before < 16 * MIB
    context = Context(1)
    tensor = context.tensor(TYPE_F32, (1024, 1024))
    buffer.place(tensor, buffer.base + 256 * MIB)
    array = Backend.array(tensor)
    assert not array.any()
    array[0] = 1
    assert rss_bytes() - before < 16 * MIB + tensor.n_bytes + _HUGE_PAGE_BYTES
    buffer.close()
    context.close()


def test_closing_gives_memory_and_descriptors_back() -> None:
    def open_and_close() -> None:
        backend = Backend(1)
        written, zeroed = backend.alloc("written", 8 * MIB), backend.alloc_zeroed("zeroed", 8 * MIB)
        context, graph, allocator = Context(1), Graph(64), Allocator(backend)
        tensor = context.tensor(TYPE_F32, (2 * MIB,))
        for buffer in (written, zeroed):
            buffer.place(tensor, buffer.base)
            Backend.array(tensor)[...] = 1
        graph.output(graph.scale(tensor, 2.0))
        allocator.alloc(graph)
        backend.compute(graph)
        for resource in (allocator, graph, context, written, zeroed, backend):
            resource.close()
            resource.close()  # twice does no harm

    for _ in range(4):  # the first ones make what stays: OpenMP's threads, what the heap keeps for later
        open_and_close()
    before, held = rss_bytes(), descriptors_and_threads()
    for _ in range(50):
        open_and_close()
    assert rss_bytes() - before < 24 * MIB  # one round holds 24 MiB
    check_settles(*held)


def test_zeroed_memory_starts_at_a_page(backend: Backend) -> None:
    buffer = backend.alloc_zeroed("small", 1)
    assert buffer.base % mmap.PAGESIZE == 0
    buffer.close()


@pytest.mark.parametrize("n_threads", [0, -1, MAX_THREADS + 1, 2**31])
def test_an_impossible_number_of_threads_is_refused(n_threads: int) -> None:
    with pytest.raises(AssertionError, match="threads"):
        Backend(n_threads)


# -- computing and cancelling -------------------------------------------------------------------------------------
def long_computation(n_products: int) -> tuple[Graph, Tensor, Tensor, Tensor]:
    """A chain of matrix products: its input, its first result, and where the last one is copied to."""
    graph = Graph(n_products + 8)
    x, end = graph.input("x", TYPE_F32, (512, 512)), graph.input("end", TYPE_F32, (512, 512))
    first = last = graph.output(graph.mul_mat(x, x))
    for _ in range(n_products - 1):
        last = graph.mul_mat(x, last)
    graph.expand(graph.copy(last, end))
    return graph, x, first, end


def test_a_switch_stops_a_running_computation_from_another_thread(backend: Backend) -> None:
    graph, x, first, end = long_computation(2000)  # 1.5 s on a fast core, for the thread needs time to come
    allocator = Allocator(backend)
    allocator.alloc(graph)
    Backend.array(x)[...] = np.eye(512, dtype=np.float32)
    for tensor in (first, end):
        Backend.array(tensor)[...] = 0

    def cancel_once_it_runs() -> None:
        while not Backend.array(first).any():
            time.sleep(0.001)
        backend.cancel.set()

    thread = threading.Thread(target=cancel_once_it_runs)
    thread.start()
    with pytest.raises(Cancelled):
        backend.compute(graph)
    thread.join()
    assert Backend.array(first).any()  # it had begun
    assert not Backend.array(end).any()  # and did not end
    graph.close()
    allocator.close()


def test_a_switch_that_is_set_stops_everything_until_it_is_cleared(backend: Backend) -> None:
    graph, x, first, _ = long_computation(2)
    allocator = Allocator(backend)
    allocator.alloc(graph)
    Backend.array(x)[...] = np.eye(512, dtype=np.float32)
    Backend.array(first)[...] = 0
    backend.cancel.set()
    assert backend.cancel.is_set
    for _ in range(2):
        with pytest.raises(Cancelled):
            backend.compute(graph)
    backend.cancel.clear()
    assert not backend.cancel.is_set
    backend.compute(graph)
    np.testing.assert_array_equal(Backend.array(first), np.eye(512, dtype=np.float32))
    graph.close()
    allocator.close()


def test_switches_of_two_backends_are_their_own(backend: Backend) -> None:
    other = Backend(1)
    backend.cancel.set()
    graph, x, first, _ = long_computation(2)
    allocator = Allocator(other)
    allocator.alloc(graph)
    Backend.array(x)[...] = np.eye(512, dtype=np.float32)
    other.compute(graph)
    assert Backend.array(first).any()
    graph.close()
    allocator.close()
    other.close()


def test_quantised_weights_multiply_to_within_their_rounding(backend: Backend) -> None:
    """The smallest whole way: memory of ours, a tensor placed in it, a product, and numbers read back."""
    graph, allocator, context = Graph(8), Allocator(backend), Context(1)
    weight = context.tensor(TYPE_Q8_0, (64, 8))
    buffer = backend.alloc("weights", weight.n_bytes)
    buffer.place(weight, buffer.base)
    blocks = np.zeros((8, 2), [("scale", "<f2"), ("values", "i1", 32)])
    blocks["scale"], blocks["values"] = 0.5, np.arange(32)
    raw = np.frombuffer(blocks.tobytes(), np.uint8)
    backend._base.ggml_backend_tensor_set(weight.address, raw.ctypes.data, 0, len(raw))
    x = graph.input("x", TYPE_F32, (64, 1))
    product = graph.output(graph.mul_mat(weight, x))
    allocator.alloc(graph)
    Backend.array(x)[...] = 1
    backend.compute(graph)
    np.testing.assert_allclose(Backend.array(product), np.full((8,), 2 * 0.5 * np.arange(32).sum()), rtol=1e-2)
    for resource in (graph, allocator, buffer, context):
        resource.close()

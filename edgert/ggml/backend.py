"""A ggml backend: the device that computes, its buffers, and moving bytes in and out of tensors.

Knows how to run a graph and how to stop it. Knows no models, and decides nothing about where weights lie.
"""

from __future__ import annotations

import ctypes
import mmap
import platform
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgert.cpu import cpu_model
from edgert.errors import ComputeError, OutOfMemory
from edgert.ggml.abi import TYPE_F16, TYPE_F32, TYPE_I32, TYPE_I64
from edgert.ggml.functions import ggml
from edgert.ggml.graph import Graph, Tensor

_DTYPES = {TYPE_F32: "f4", TYPE_F16: "f2", TYPE_I32: "i4", TYPE_I64: "i8"}
_STATUS_SUCCESS, _STATUS_ABORTED = 0, 1
_USAGE_WEIGHTS = 1
_ALIGN_BYTES = 32  # what ggml demands of memory that it is given
MAX_THREADS = 512  # GGML_MAX_N_THREADS; OpenMP ends the process when it cannot start as many as it is asked for
_MAX_BYTES = 1 << 62  # more would wrap in C's size_t, and come back as a small buffer


class Cancelled(Exception):
    """The computation was stopped between two operations; what it was to write is undefined."""


class CancelSwitch:
    """Stops a running graph from any thread, between two operations.

    ggml asks a C function `bool f(void *data)` before every operation. A Python callback there costs 1 us and the
    GIL, 750 times a token. libc's `strlen` has the right shape: the length of an empty string is false.
    """

    def __init__(self) -> None:
        self._flag = ctypes.create_string_buffer(2)
        self.function = ctypes.cast(ctypes.CDLL(None).strlen, ctypes.c_void_p)
        self.data = ctypes.cast(self._flag, ctypes.c_void_p)

    def set(self) -> None:
        self._flag[0] = b"x"

    def clear(self) -> None:
        self._flag[0] = b"\0"

    @property
    def is_set(self) -> bool:
        return self._flag[0] != b"\0"


@dataclass(slots=True)
class Buffer:
    """Memory that tensors lie in. Owned by whoever made it; `close` gives it back."""

    handle: int
    size_bytes: int
    memory: mmap.mmap | None = None

    @property
    def base(self) -> int:
        return int(ggml().base.ggml_backend_buffer_get_base(self.handle))

    def place(self, tensor: Tensor, address: int) -> None:
        """Let `tensor` lie at `address`, which must be inside this buffer."""
        if not self.handle or tensor.struct.view_src:
            raise AssertionError("the buffer is closed" if not self.handle else "a view lies where its source lies")
        end = self.base + self.size_bytes
        if not self.base <= address <= end - tensor.n_bytes:
            raise AssertionError(f"tensor of {tensor.n_bytes} bytes outside its buffer")
        tensor.struct.buffer = tensor.struct.data = None  # it may have lain elsewhere before
        ggml().base.ggml_backend_tensor_alloc(self.handle, tensor.address, address)

    def mark_as_weights(self) -> None:
        ggml().base.ggml_backend_buffer_set_usage(self.handle, _USAGE_WEIGHTS)

    def close(self) -> None:
        if self.handle:
            ggml().base.ggml_backend_buffer_free(self.handle)
            self.handle = 0
        if self.memory is not None:
            self.memory.close()
            self.memory = None


class Backend:
    """The CPU backend with `n_threads` threads. Not safe for two computations at once."""

    def __init__(self, n_threads: int) -> None:
        if not 1 <= n_threads <= MAX_THREADS:
            raise AssertionError(f"{n_threads} threads, expected 1 to {MAX_THREADS}")
        libraries = ggml()
        self._base = libraries.base
        self.n_threads = n_threads
        self.handle: int = libraries.cpu.ggml_backend_cpu_init()
        libraries.cpu.ggml_backend_cpu_set_n_threads(self.handle, n_threads)
        self.device: int = self._base.ggml_backend_get_device(self.handle)
        self.buffer_type: int = self._base.ggml_backend_get_default_buffer_type(self.handle)
        self.cancel = CancelSwitch()
        libraries.cpu.ggml_backend_cpu_set_abort_callback(self.handle, self.cancel.function, self.cancel.data)

    @property
    def speed_key(self) -> str:
        """What the kernels' speed depends on: processor, ggml's build, threads."""
        return f"{platform.machine()}/{cpu_model()}/{ggml().version}/{self.n_threads}"

    def compute(self, graph: Graph) -> None:
        """Run the graph. Raises Cancelled when `cancel` was set, ComputeError when ggml failed."""
        status = self._base.ggml_backend_graph_compute(self.handle, graph.handle)
        if status == _STATUS_SUCCESS:
            return
        if status == _STATUS_ABORTED:
            raise Cancelled
        raise ComputeError(f"ggml stopped with status {status}", "Try again with fewer --threads or less --context.")

    def work_bytes(self, graph: Graph) -> int:
        """Memory that computing the graph takes besides its tensors: activations in the format of the weights. The
        backend keeps as much as the neediest graph so far."""
        return int(ggml().cpu.ggml_graph_plan(graph.handle, self.n_threads, None).work_size)

    def alloc(self, what: str, size_bytes: int, buffer_type: int | None = None) -> Buffer:
        """A new buffer, 64-byte aligned or better. Raises OutOfMemory naming `what`."""
        if size_bytes < 0:
            raise AssertionError(f"{what}: {size_bytes} bytes")
        handle = None
        if size_bytes <= _MAX_BYTES:
            handle = self._base.ggml_backend_buft_alloc_buffer(buffer_type or self.buffer_type, max(size_bytes, 64))
        if not handle:
            raise OutOfMemory(what, size_bytes)
        return Buffer(handle, size_bytes)

    def alloc_zeroed(self, what: str, size_bytes: int) -> Buffer:
        """A buffer of zeros that takes physical memory only where it is written: a long context costs what it holds."""
        try:
            memory = mmap.mmap(-1, max(size_bytes, mmap.PAGESIZE), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except (OSError, OverflowError) as error:
            raise OutOfMemory(what, size_bytes) from error
        pointer = ctypes.c_char.from_buffer(memory)
        address = ctypes.addressof(pointer)
        del pointer  # an exported pointer would keep the map from closing
        buffer = self.wrap(address, size_bytes)
        buffer.memory = memory
        return buffer

    def wrap(self, address: int, size_bytes: int) -> Buffer:
        """A buffer over memory of ours (a mapped file), which must stay until the buffer is closed."""
        if not address or address % _ALIGN_BYTES:
            raise AssertionError(f"memory at {address:#x} is not aligned to {_ALIGN_BYTES} bytes")
        return Buffer(self._base.ggml_backend_cpu_buffer_from_ptr(address, size_bytes), size_bytes)

    @staticmethod
    def array(tensor: Tensor) -> NDArray[Any]:
        """The tensor's own memory as an array, slowest dimension first (ggml's `ne` reversed, ones dropped).

        For contiguous tensors that were placed; valid until the graph or buffer that placed them goes. Writing into
        it costs no call into C, which a decode step of 8 ms notices.
        """
        n_dims = max(d for d in range(1, 5) if d == 1 or tensor.ne[d - 1] > 1)
        flat: NDArray[Any] = Backend.raw(tensor).view(np.dtype(_DTYPES[tensor.type]))
        return flat.reshape(tensor.ne[:n_dims][::-1])

    @staticmethod
    def raw(tensor: Tensor) -> NDArray[np.uint8]:
        """The tensor's own bytes, as `array` gives its values: of any type."""
        memory = memoryview((ctypes.c_uint8 * tensor.n_bytes).from_address(tensor.data))
        raw: NDArray[np.uint8] = np.frombuffer(memory, np.uint8)
        return raw

    def close(self) -> None:
        if self.handle:
            self._base.ggml_backend_free(self.handle)
            self.handle = 0


class Allocator:
    """Gives the tensors of graphs their memory. All its graphs share one buffer, so one runs at a time."""

    def __init__(self, backend: Backend) -> None:
        self._base = ggml().base
        self._buffer_type = backend.buffer_type
        self._handle: int = self._base.ggml_gallocr_new(self._buffer_type)

    @property
    def size_bytes(self) -> int:
        """Bytes that the buffer takes; 0 before the first graph and after `close`."""
        return 0 if not self._handle else int(self._base.ggml_gallocr_get_buffer_size(self._handle, 0))

    def alloc(self, graph: Graph) -> bool:
        """Place the graph. True when the buffer moved: graphs that were placed before are then invalid.

        They are invalid after OutOfMemory too: ggml gives the old buffer back before it asks for a larger one.
        """
        before = self.size_bytes
        if not self._base.ggml_gallocr_alloc_graph(self._handle, graph.handle):
            needed_bytes = self._needed_bytes(graph)
            # ggml now believes in a buffer that it has not: a smaller graph of as many nodes would be placed at 0.
            self.close()
            self._handle = self._base.ggml_gallocr_new(self._buffer_type)
            raise OutOfMemory("the compute buffer", needed_bytes, "Ask for a smaller --batch or --context.")
        return self.size_bytes != before

    def _needed_bytes(self, graph: Graph) -> int:
        sizes = (ctypes.c_size_t * 1)()
        self._base.ggml_gallocr_reserve_n_size(self._handle, graph.handle, None, None, sizes)
        return int(sizes[0])

    def close(self) -> None:
        if self._handle:
            self._base.ggml_gallocr_free(self._handle)
            self._handle = 0

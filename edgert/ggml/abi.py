"""The C structures of ggml that edgert reads or writes by layout, and the check that they are still so.

Describes ggml 0.25 (ggml/include/ggml.h). Everything else is reached through functions alone.
"""

from __future__ import annotations

import ctypes
from ctypes import c_bool, c_char, c_int32, c_int64, c_size_t, c_void_p

from edgert.errors import NativeLibraryError
from edgert.ggml.library import Libraries

MAX_DIMS = 4
MAX_NAME_BYTES = 64
TYPE_F32, TYPE_F16, TYPE_Q8_0, TYPE_I32, TYPE_I64 = 0, 1, 8, 26, 27


class TensorStruct(ctypes.Structure):
    """`struct ggml_tensor`: type, place, shape (elements), strides (bytes), operation and sources."""

    _fields_ = (
        ("type", c_int32),
        ("buffer", c_void_p),
        ("ne", c_int64 * MAX_DIMS),
        ("nb", c_size_t * MAX_DIMS),
        ("op", c_int32),
        ("op_params", c_int32 * 16),
        ("flags", c_int32),
        ("src", c_void_p * 10),
        ("view_src", c_void_p),
        ("view_offs", c_size_t),
        ("data", c_void_p),
        ("name", c_char * MAX_NAME_BYTES),
        ("extra", c_void_p),
        ("padding", c_char * 8),
    )


class InitParams(ctypes.Structure):
    """`struct ggml_init_params`: the memory pool of a context."""

    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


class ComputePlan(ctypes.Structure):
    """`struct ggml_cplan`: what computing a graph takes besides the graph."""

    _fields_ = (("work_size", c_size_t), ("work_data", c_void_p), ("n_threads", c_int32), ("threadpool", c_void_p),
                ("abort_callback", c_void_p), ("abort_callback_data", c_void_p), ("use_ref", c_bool))


def check_layout(libraries: Libraries) -> None:
    """Make a tensor and a view of it, and find what they say where TensorStruct has it. Raises NativeLibraryError."""
    base = libraries.base
    context = base.ggml_init(InitParams(4096, None, True))
    try:
        address = base.ggml_new_tensor_2d(context, TYPE_F16, 5, 7)
        base.ggml_set_name(address, b"layout")
        view = TensorStruct.from_address(base.ggml_view_1d(context, address, 3, 20))
        tensor = TensorStruct.from_address(address)
        tensor.data = ctypes.addressof(tensor)
        as_described = (
            base.ggml_tensor_overhead() >= ctypes.sizeof(TensorStruct)
            and base.ggml_get_data(address) == tensor.data
            and (tensor.type, *tensor.ne) == (TYPE_F16, 5, 7, 1, 1)
            and tuple(tensor.nb) == (2, 10, 70, 70)
            and tensor.name == b"layout"
            and (view.view_src, view.view_offs, view.src[0]) == (address, 20, address)
        )
    finally:
        base.ggml_free(context)
    if not as_described:
        raise NativeLibraryError(f"ggml {libraries.version} lays out its tensors differently from ggml 0.25",
                                 "Install the version that edgert knows: pip install llama-cpp-python==0.3.36.")
